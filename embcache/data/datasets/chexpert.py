"""Chest X-rays with the 14 observations of the CheXpert labeler: CheXpert (Irvin et al. 2019) and MIMIC-CXR-JPG
(Johnson et al. 2019).

The labeler writes 1.0 (present), 0.0 (absent), -1.0 (uncertain), or leaves a cell empty: the report does not mention
the observation. ``No Finding`` is 1.0 or empty, and empty where any other observation but support devices is present
or uncertain.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from embcache.config import DatasetRef
from embcache.data.dataset import ImageDataset
from embcache.data.published import DatasetLayout
from embcache.data.tables import as_numbers, check_unique, read_large
from embcache.errors import DatasetError, first_few
from embcache.targets.findings import read_columns

OBSERVATIONS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
_SPLITS = {"train": "train.csv", "test": "valid.csv"}
_MIMIC = {part: f"mimic-cxr-2.0.0-{part}.csv" for part in ("chexpert", "split", "metadata")}
_MIMIC_SPLITS = {"train": "train", "validate": "val", "test": "test"}


def read_chexpert(root: Path, name: str, ref: DatasetRef = DatasetRef()) -> ImageDataset:
    """Read ``train.csv``, and ``valid.csv`` as the test set; paths count from the folder that holds them."""
    level = LAYOUT.level(root, lambda folder: all((folder / file).is_file() for file in _SPLITS.values()))
    source = {"Sex": "sex", "Age": "age", "Frontal/Lateral": "view", "AP/PA": "view_position"}
    parts = {s: read_large(level / file, ["Path", *source, *OBSERVATIONS]) for s, file in _SPLITS.items()}
    given = pd.concat(parts.values(), ignore_index=True)
    paths = given["Path"].str.replace(r"^CheXpert-v[^/]*/", "", regex=True)
    patients = paths.str.extract(r"^[^/]+/(patient\d+)/", expand=False)
    if len(wrong := given["Path"][patients.isna()]):
        raise DatasetError(
            f"{len(wrong):,} paths name no patient", code="chexpert-path", found=first_few(wrong.tolist()), where=level,
            expected="CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg", fix="get train.csv anew",
        )  # fmt: skip
    check_unique(paths.tolist(), where=level)
    cells = {
        "id": paths, "path": paths, "place": "", "label": 0, "group": patients,
        "split": [split for split, part in parts.items() for _ in range(len(part))],
        **{column: given[original] for original, column in source.items()},
    }  # fmt: skip
    notes = ["the validation set is the test set"]
    if (level / "test.csv").is_file():
        notes.append("test.csv is not read: `--dataset folder` takes a table of your own")
    return _dataset(level, name, as_numbers(pd.DataFrame(cells), ["age"], where=level), given, ref, notes)


def read_mimic(root: Path, name: str, ref: DatasetRef = DatasetRef()) -> ImageDataset:
    """Read the labels of the studies, and the split and the view of their images."""
    level = MIMIC_LAYOUT.level(root, lambda folder: _large(folder, "split").is_file())
    if absent := [file for part, file in _MIMIC.items() if not _large(level, part).is_file()]:
        raise MIMIC_LAYOUT.layout_error(level, f"{absent[0]} is not there")
    images = read_large(_large(level, "split"), ["dicom_id", "study_id", "subject_id", "split"])
    views = read_large(_large(level, "metadata"), ["dicom_id", "ViewPosition"])
    studies = read_large(_large(level, "chexpert"), ["study_id", *OBSERVATIONS])
    for part, table in {"split": images, "metadata": views, "chexpert": studies}.items():
        check_unique(table.iloc[:, 0].tolist(), where=_large(level, part))
    splits = images["split"].map(_MIMIC_SPLITS)
    if len(wrong := images["split"][splits.isna()]):
        raise DatasetError(
            f"unknown split in {len(wrong):,} rows", code="unknown-split", expected=", ".join(_MIMIC_SPLITS),
            found=first_few(sorted(set(wrong))), where=_large(level, "split"),
        )  # fmt: skip
    subject, study = images["subject_id"], images["study_id"]
    cells = {
        "id": images["dicom_id"],
        "path": "files/p" + subject.str[:2] + "/p" + subject + "/s" + study + "/" + images["dicom_id"] + ".jpg",
        "place": "", "label": 0, "group": subject, "split": splits, "study": study,
        "view_position": images["dicom_id"].map(views.set_index("dicom_id")["ViewPosition"]).fillna(""),
    }  # fmt: skip
    given = studies.set_index("study_id").reindex(study).reset_index(drop=True)
    unlabeled = given["No Finding"].isna()
    notes = [f"{unlabeled.sum():,} images of studies without labels"] if unlabeled.any() else []
    return _dataset(level, name, pd.DataFrame(cells), given, ref, notes)


def _large(folder: Path, part: str) -> Path:
    """A label file of MIMIC-CXR-JPG, unpacked or as it is published."""
    return file if (file := folder / _MIMIC[part]).is_file() else folder / f"{_MIMIC[part]}.gz"


def _dataset(
    root: Path, name: str, table: pd.DataFrame, given: pd.DataFrame, ref: DatasetRef, notes: list[str]
) -> ImageDataset:
    """The dataset of a table and the cells of its observations, missing where an image has no labels at all."""
    texts = {finding: given[finding].fillna("?").tolist() for finding in OBSERVATIONS}
    texts["No Finding"] = [text or "0" for text in texts["No Finding"]]
    y, more = read_columns(texts, ref.uncertain, ref.unmentioned, where=root)
    known = (y >= 0).any(axis=1)
    table = table.assign(label=known.astype("int64") - 1, **dict(zip(OBSERVATIONS, y.T, strict=True)))
    note = "an empty No Finding counts as absent: the labeler writes it wherever it finds nothing"
    return ImageDataset(
        name, root, OBSERVATIONS, metric="macro_auc", augment="chest", table=table, kind="findings",
        columns=OBSERVATIONS, subset_sizes={"S": 200, "M": 2000}, notes=(*notes, *more, note),
        ref=DatasetRef(uncertain=ref.uncertain, unmentioned=ref.unmentioned),
    )  # fmt: skip


LAYOUT = DatasetLayout(
    name="chexpert",
    read=read_chexpert,
    description="chest X-rays, 14 findings mined from reports (CheXpert)",
    expected="CheXpert-v1.0-small/ or CheXpert-v1.0/ with train.csv, valid.csv\n"
    "and {train,valid}/patient*/study*/view*.jpg",
    download="dataset_download('ashery/chexpert')",
    uncertain=True,
)
MIMIC_LAYOUT = DatasetLayout(
    name="mimic-cxr",
    read=read_mimic,
    description="chest X-rays, 14 findings mined from reports (MIMIC-CXR-JPG)",
    expected="mimic-cxr-2.0.0-{chexpert,split,metadata}.csv or .csv.gz\n"
    "and files/p10/p10000032/s50414267/*.jpg (physionet.org/content/mimic-cxr-jpg, after its training)",
    uncertain=True,
)
