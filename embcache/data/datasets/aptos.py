"""Fundus photographs with a grade of diabetic retinopathy, as two competitions of Kaggle lay them out: APTOS 2019 and
EyePACS (diabetic-retinopathy-detection, 2015).
"""

from __future__ import annotations

import re
from pathlib import Path

from embcache.data.classes import label_numbers
from embcache.data.dataset import ImageDataset
from embcache.data.datasets import competition_table
from embcache.data.published import DatasetLayout
from embcache.data.tables import read_table

CLASSES = ("no DR", "mild", "moderate", "severe", "proliferative DR")
_GRADES = ("0", "1", "2", "3", "4")
_EYE = re.compile(r"(\d+)_(?:left|right)")  # EyePACS's names identify the patient; APTOS's own do not


def read_aptos(root: Path, name: str) -> ImageDataset:
    """Read ``train.csv`` and, where their images are there, the unlabeled rows of ``test.csv``."""
    level = LAYOUT.level(root, lambda folder: (folder / "train.csv").is_file() and (folder / "train_images").is_dir())
    labeled = read_table(level / "train.csv", ["id_code", "diagnosis"])
    ids, grades = labeled["id_code"], labeled["diagnosis"].tolist()
    table, notes = competition_table(
        level, ids, label_numbers(grades, _GRADES, ids=ids.tolist(), where=level / "train.csv"),
        _patient, files=("train.csv", "test.csv"), folders=("train_images", "test_images"), suffix=".png",
    )  # fmt: skip
    return ImageDataset(
        name, level, CLASSES, metric="kappa", augment="fundus", table=table, leaderboard_alpha=0.85, notes=tuple(notes),
        kind="ordinal",
    )  # fmt: skip


def read_eyepacs(root: Path, name: str) -> ImageDataset:
    """Read ``trainLabels.csv``, and the test labels of ``retinopathy_solution.csv`` where it is there."""
    level = EYEPACS_LAYOUT.level(root, lambda folder: (folder / "trainLabels.csv").is_file())
    files = [level / "trainLabels.csv", level / "retinopathy_solution.csv"]
    given = [read_table(file, ["image", "level"]) for file in files if file.is_file()]
    labels = [
        label_numbers(part["level"].tolist(), _GRADES, ids=part["image"].tolist(), where=file)
        for part, file in zip(given, files, strict=False)
    ]
    tested = dict(zip(given[1]["image"].tolist(), labels[1], strict=True)) if len(given) > 1 else {}
    table, notes = competition_table(
        level, given[0]["image"], labels[0], _patient, tested, files=("trainLabels.csv", "sampleSubmission.csv"),
        folders=("train", "test"), suffix=".jpeg",
    )  # fmt: skip
    return ImageDataset(
        name, level, CLASSES, metric="kappa", augment="fundus", table=table, notes=tuple(notes), kind="ordinal"
    )


def _patient(image: str) -> str:
    return eye.group(1) if (eye := _EYE.fullmatch(image)) else image


LAYOUT = DatasetLayout(
    name="aptos",
    read=read_aptos,
    description="fundus photographs, diabetic retinopathy 0 to 4 (APTOS 2019)",
    expected="train.csv (id_code,diagnosis), train_images/*.png; test.csv, test_images/*.png",
    download="competition_download('aptos2019-blindness-detection')",
)
EYEPACS_LAYOUT = DatasetLayout(
    name="eyepacs",
    read=read_eyepacs,
    description="fundus photographs, diabetic retinopathy 0 to 4 (EyePACS, Kaggle 2015)",
    expected="trainLabels.csv (image,level), train/*.jpeg, test/*.jpeg; retinopathy_solution.csv (image,level,Usage)",
    download="competition_download('diabetic-retinopathy-detection')",
)
