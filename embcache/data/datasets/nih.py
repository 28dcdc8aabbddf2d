"""NIH chest X-rays with the four findings that experts adjudicated (Majkowska et al. 2020)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from embcache.data.dataset import ImageDataset
from embcache.data.files import check_file_ids, find_level, refuse_outside, walk_images
from embcache.data.published import DatasetLayout
from embcache.data.tables import check_unique, read_table
from embcache.errors import DatasetError, first_few

FINDINGS = {  # column -> class
    "Airspace opacity": "airspace opacity",
    "Nodule or mass": "nodule or mass",
    "Fracture": "fracture",
    "Pneumothorax": "pneumothorax",
}
CLASSES = ("other", *FINDINGS.values())  # "other" is none of the four, not "no finding"

_FILES = {
    "train": ("four_findings_expert_labels_validation_labels.csv", "validation_labels.csv"),
    "test": ("four_findings_expert_labels_test_labels.csv", "test_labels.csv"),
}
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
    """Read both expert label files; the images lie anywhere below the root and are found by their names."""
    level = find_level(root, lambda folder: _label_file(folder, "train") is not None)
    if level is None:
        raise LAYOUT.layout_error(root, "the expert label files of NIH are not there")
    parts, notes = [], []
    for split in _FILES:
        file = _label_file(level, split)
        if file is None:
            raise LAYOUT.layout_error(level, f"the expert label file for {split} is not there")
        part, several = _read_labels(file, split)
        notes += [f"{several:,} {split} images with more than one of the four findings are left out"] if several else []
        parts.append(part)
    table = pd.concat(parts, ignore_index=True)
    check_unique(table["id"].tolist(), where=level)
    names, outside, places = set(table["id"].tolist()), list[str](), dict[str, str]()
    for path in walk_images(root, outside=outside):
        if (image := path.rpartition("/")[2]) in names:
            places.setdefault(image, path)
    if linked := [path for path in outside if path.rpartition("/")[2].startswith("images")]:
        raise refuse_outside(linked[0], where=root)
    table.insert(1, "path", [places.get(i, f"images/{i}") for i in table["id"].tolist()])
    return ImageDataset(
        name, root, CLASSES, metric="macro_auc", augment="chest", table=table.astype({"label": "int64"}),
        subset_sizes={"S": 20, "M": 200}, notes=tuple(notes),
    )  # fmt: skip


def _label_file(folder: Path, split: str) -> Path | None:
    return next((folder / name for name in _FILES[split] if (folder / name).is_file()), None)


def _read_labels(file: Path, split: str) -> tuple[pd.DataFrame, int]:
    """The rows with at most one finding, and how many have several.

    `read_table` splits the header at every comma: two of its names hold one (``OriginalImage[Width,Height]``), and
    the rows have a field for each part.
    """
    given = read_table(file, ["Image Index", *FINDINGS, *_SOURCE_COLUMNS])
    findings = given[list(FINDINGS)]
    wrong = findings.where(~findings.isin(("YES", "NO"))).set_axis(given["Image Index"]).stack().dropna()
    if len(wrong):
        found = [f"{i}: {v!r}" for i, v in zip(wrong.index.get_level_values(0), wrong, strict=True)]
        raise DatasetError(
            f"unknown label in {len(wrong):,} rows", code="unknown-label", expected="YES or NO",
            found=first_few(found), where=file,
        )  # fmt: skip
    check_file_ids(given["Image Index"], where=file)
    check_unique(given["Image Index"].tolist(), where=file)
    present = (findings == "YES").to_numpy()  # (n, 4)
    count = present.sum(axis=1)
    cells = {
        "id": given["Image Index"], "place": "", "label": (present.argmax(axis=1) + 1) * (count == 1),
        "group": given["Patient ID"], "split": split,
    }  # fmt: skip
    table = pd.DataFrame({**cells, **{column: given[original] for original, column in _SOURCE_COLUMNS.items()}})
    try:
        table = table.assign(**{column: pd.to_numeric(table[column]) for column in _NUMBERS})
    except ValueError as error:
        raise DatasetError("a number cannot be read", code="not-a-number", found=str(error), where=file) from error
    return table[count <= 1].reset_index(drop=True), int((count > 1).sum())


LAYOUT = DatasetLayout(
    name="nih",
    read=read_nih,
    description="chest X-rays, four findings adjudicated by experts (NIH)",
    expected="four_findings_expert_labels_{validation,test}_labels.csv\n"
    "(from the Google Cloud bucket gcs-public-data--healthcare-nih-chest-xray-labels)\n"
    "and images_001/images/*.png to images_012, or images/*.png",
    download="dataset_download('nih-chest-xrays/data')",
)
