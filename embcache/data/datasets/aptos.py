"""APTOS 2019: fundus photographs with a grade of diabetic retinopathy, as Kaggle's competition lays them out."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from embcache.data.checks import check_file_id, check_unique
from embcache.data.dataset import ImageDataset
from embcache.data.files import find_level, image_index
from embcache.data.labels import label_numbers, read_table
from embcache.data.published import DatasetSource

CLASSES = ("no DR", "mild", "moderate", "severe", "proliferative DR")
_GRADES = ("0", "1", "2", "3", "4")
_EYE = re.compile(r"(\d+)_(?:left|right)")  # EyePACS's names tell the patient; APTOS's own do not


def read_aptos(root: Path, name: str) -> ImageDataset:
    """Read ``train.csv`` and, where their images are there, the unlabelled rows of ``test.csv``."""
    level = find_level(root, lambda folder: (folder / "train.csv").is_file() and (folder / "train_images").is_dir())
    if level is None:
        raise SOURCE.layout_error(root)
    labelled = read_table(level / "train.csv", ["id_code", "diagnosis"])
    ids: list[str] = labelled["id_code"].tolist()
    labels = label_numbers(labelled["diagnosis"].tolist(), _GRADES, ids=ids, where=level / "train.csv")
    notes = []
    test = image_index(level / "test_images")
    listed = (level / "test.csv").is_file()
    test_ids: list[str] = read_table(level / "test.csv", ["id_code"])["id_code"].tolist() if listed else list(test)
    if not test:
        test_ids = []
        notes.append("the official test images are not there: only --test local is possible")
    train = image_index(level / "train_images")
    unnamed = len(train.keys() - set(ids))
    if unnamed:
        notes.append(f"{unnamed:,} images in train_images/ have no row in train.csv and are left out")
    paths = [f"train_images/{train.get(i, i + '.png')}" for i in ids]
    paths += [f"test_images/{test.get(i, i + '.png')}" for i in test_ids]
    ids = ids + test_ids
    for image_id in ids:
        check_file_id(image_id, where=level)
    check_unique(ids, where=level)
    table = pd.DataFrame(
        {
            "id": ids,
            "path": paths,
            "member": -1,
            "label": labels + [-1] * len(test_ids),
            "group": [eye.group(1) if (eye := _EYE.fullmatch(i)) else i for i in ids],
            "split": ["train"] * len(labels) + ["test"] * len(test_ids),
        }
    )
    return ImageDataset(
        name=name,
        root=level,
        class_names=CLASSES,
        metric="kappa",
        augment="fundus",
        table=table.astype({"member": "int64", "label": "int64"}),
        kind="aptos",
        leaderboard_alpha=0.85,
        notes=tuple(notes),
    )


SOURCE = DatasetSource(
    name="aptos",
    description="fundus photographs, diabetic retinopathy 0 to 4 (APTOS 2019)",
    expected="train.csv (id_code,diagnosis), train_images/*.png; test.csv, test_images/*.png",
    download="competition_download('aptos2019-blindness-detection')",
    read=read_aptos,
)
