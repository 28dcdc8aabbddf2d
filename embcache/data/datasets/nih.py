"""NIH chest X-rays: the four findings that experts adjudicated (Majkowska et al. 2020), as five classes or as findings;
and the 14 findings of ChestX-ray14 (Wang et al. 2017), which are mined from reports.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from embcache.data.dataset import ImageDataset
from embcache.data.files import check_file_ids, find_level, refuse_outside, walk_images
from embcache.data.published import DatasetLayout
from embcache.data.tables import as_numbers, check_unique, lacks_column, read_table
from embcache.errors import DatasetError, first_few

FINDINGS = {  # column -> class
    "Airspace opacity": "airspace opacity",
    "Nodule or mass": "nodule or mass",
    "Fracture": "fracture",
    "Pneumothorax": "pneumothorax",
}
CLASSES = ("other", *FINDINGS.values())  # "other" is none of the four, not "no finding"
MINED = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip

_FILES = {
    "train": ("four_findings_expert_labels_validation_labels.csv", "validation_labels.csv"),
    "test": ("four_findings_expert_labels_test_labels.csv", "test_labels.csv"),
}
_MINED_FILES = ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv")
_LISTS = {"train": "train_val_list.txt", "test": "test_list.txt"}
_SOURCE_COLUMNS = {
    "Patient ID": "patient_id",
    "Patient Age": "age",
    "Patient Gender": "sex",
    "View Position": "view_position",
    "Follow-up #": "follow_up",
    "Finding Labels": "finding_labels",
    "OriginalImage[Width": "width",
    "Height]": "height",
    "OriginalImagePixelSpacing[x": "pixel_spacing_x",
    "y]": "pixel_spacing_y",
}
_NUMBERS = ("age", "follow_up", "width", "height", "pixel_spacing_x", "pixel_spacing_y")


def read_nih(root: Path, name: str) -> ImageDataset:
    """Images with at most one of the four findings, as five classes."""
    table = _read_experts(root, LAYOUT)
    present = table[list(FINDINGS.values())].to_numpy() == 1  # (n, 4)
    several = present.sum(axis=1) > 1
    counts = {split: int((several & (table["split"] == split)).sum()) for split in _FILES}
    notes = [f"{n:,} {s} images with more than one of the four findings are left out" for s, n in counts.items() if n]
    table = table.assign(label=(present.argmax(axis=1) + 1) * present.any(axis=1)).drop(columns=FINDINGS.values())
    return _with_images(root, name, table[~several], notes, CLASSES)


def read_expert_findings(root: Path, name: str) -> ImageDataset:
    """All images of both expert label files, with the four findings."""
    return _with_images(root, name, _read_experts(root, EXPERT_LAYOUT), (), tuple(FINDINGS.values()), "findings")


def read_nih14(root: Path, name: str) -> ImageDataset:
    """The 14 findings of ``Data_Entry_2017.csv``, with the official lists of training and test images."""
    level = find_level(root, lambda folder: _one_of(folder, _MINED_FILES) is not None)
    absent = [file for file in _LISTS.values() if level is None or not (level / file).is_file()]
    file = None if level is None else _one_of(level, _MINED_FILES)
    if level is None or file is None or absent:
        raise MINED_LAYOUT.layout_error(level or root, f"{absent[0] if level else _MINED_FILES[0]} is not there")
    lists = {split: set((level / name).read_text("utf-8").split()) for split, name in _LISTS.items()}
    if both := lists["train"] & lists["test"]:
        raise DatasetError(
            f"{len(both):,} images are for training and for testing", code="split-twice", found=first_few(sorted(both)),
            expected=f"each image in one of {' and '.join(_LISTS.values())}", where=level, fix="get the files anew",
        )  # fmt: skip
    given = read_table(file, ["Image Index", "Finding Labels"])
    given = given.rename(columns={"Patient Sex": "Patient Gender"})
    listed = [set(text.split("|")) for text in given["Finding Labels"].tolist()]
    if unknown := sorted(set().union(*listed) - {*MINED, "No Finding"}):
        raise DatasetError(
            f"unknown label in {sum(bool(each & {*unknown}) for each in listed):,} rows", code="unknown-label",
            expected=f"No Finding, or {', '.join(MINED)} with | between them", found=first_few(unknown), where=file,
        )  # fmt: skip
    splits = [next((s for s in lists if i in lists[s]), "") for i in given["Image Index"].tolist()]
    values = {finding: np.array([finding in each for each in listed], dtype=np.int64) for finding in MINED}
    table = _as_table(given, splits, values, file)
    notes = ["the labels are mined from reports: a finding that is not listed counts as absent"]
    if outside := splits.count(""):
        notes.append(f"{outside:,} images of {file.name} are in neither {' nor '.join(_LISTS.values())}: left out")
    return _with_images(root, name, table[table["split"] != ""], notes, MINED, "findings", {"S": 200, "M": 2000})


def _with_images(
    root: Path,
    name: str,
    table: pd.DataFrame,
    notes: list[str] | tuple[()],
    names: tuple[str, ...],
    kind: str = "classes",
    sizes: dict[str, int] | None = None,
) -> ImageDataset:
    """The dataset of a table, whose images lie anywhere below the root and are found by their names."""
    names_of, outside, places = set(table["id"].tolist()), list[str](), dict[str, str]()
    for path in walk_images(root, outside=outside):
        if (image := path.rpartition("/")[2]) in names_of:
            places.setdefault(image, path)
    if linked := [path for path in outside if path.rpartition("/")[2].startswith("images")]:
        raise refuse_outside(linked[0], where=root)
    table.insert(1, "path", [places.get(i, f"images/{i}") for i in table["id"].tolist()])
    return ImageDataset(
        name, root, names, metric="macro_auc", augment="chest", table=table.astype({"label": "int64"}), kind=kind,
        subset_sizes=sizes or {"S": 20, "M": 200}, notes=tuple(notes), columns=names if kind == "findings" else (),
    )  # fmt: skip


def _one_of(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_experts(root: Path, layout: DatasetLayout) -> pd.DataFrame:
    """All rows of both expert label files, with a column of 0 and 1 for each of the four findings."""
    problem = "the expert label files of NIH are not there"
    level = layout.level(root, lambda folder: _one_of(folder, _FILES["train"]) is not None, problem)
    parts = []
    for split, names in _FILES.items():
        file = _one_of(level, names)
        if file is None:
            raise layout.layout_error(level, f"the expert label file for {split} is not there")
        given = read_table(file, ["Image Index", *FINDINGS, *_SOURCE_COLUMNS])
        findings = given[list(FINDINGS)]
        wrong = findings.where(~findings.isin(("YES", "NO"))).set_axis(given["Image Index"]).stack().dropna()
        if len(wrong):
            found = [f"{i}: {v!r}" for i, v in zip(wrong.index.get_level_values(0), wrong, strict=True)]
            raise DatasetError(
                f"unknown label in {len(wrong):,} rows", code="unknown-label", expected="YES or NO",
                found=first_few(found), where=file,
            )  # fmt: skip
        values = {name: (given[column] == "YES").to_numpy(dtype=np.int64) for column, name in FINDINGS.items()}
        parts.append(_as_table(given, [split] * len(given), values, file))
    table = pd.concat(parts, ignore_index=True)
    check_unique(table["id"].tolist(), where=level)
    return table


def _as_table(given: pd.DataFrame, splits: list[str], values: dict[str, np.ndarray], file: Path) -> pd.DataFrame:
    """The table of a label file without paths.

    `read_table` splits the header at every comma: two of its names hold one (``OriginalImage[Width,Height]``), and
    the rows have a field for each part.
    """
    if absent := [column for column in _SOURCE_COLUMNS if column not in given.columns]:
        raise lacks_column(file, absent, [*_SOURCE_COLUMNS], given, "get the file anew")
    check_file_ids(given["Image Index"], where=file)
    check_unique(given["Image Index"].tolist(), where=file)
    cells = {"id": given["Image Index"], "place": "", "label": 0, "group": given["Patient ID"], "split": splits}
    source = {column: given[original] for original, column in _SOURCE_COLUMNS.items()}
    table = pd.DataFrame({**cells, **source, **values})
    return as_numbers(table, _NUMBERS, where=file)


_IMAGES = "and images_001/images/*.png to images_012, or images/*.png"
_BUCKET = (
    "four_findings_expert_labels_{validation,test}_labels.csv\n"
    "(from the Google Cloud bucket gcs-public-data--healthcare-nih-chest-xray-labels)\n" + _IMAGES
)
_KAGGLE = "dataset_download('nih-chest-xrays/data')"

LAYOUT = DatasetLayout(
    name="nih",
    read=read_nih,
    description="chest X-rays, four findings adjudicated by experts (NIH)",
    expected=_BUCKET,
    download=_KAGGLE,
)
EXPERT_LAYOUT = DatasetLayout(
    name="nih-findings",
    read=read_expert_findings,
    description="the images of nih, with all of the four findings that each has",
    expected=_BUCKET,
    download=_KAGGLE,
)
MINED_LAYOUT = DatasetLayout(
    name="nih14",
    read=read_nih14,
    description="chest X-rays, 14 findings mined from reports (ChestX-ray14)",
    expected="Data_Entry_2017.csv (or Data_Entry_2017_v2020.csv), train_val_list.txt, test_list.txt\n" + _IMAGES,
    download=_KAGGLE,
)
