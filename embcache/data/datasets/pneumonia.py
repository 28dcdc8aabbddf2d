"""Chest X-rays of children with and without pneumonia (Kermany et al. 2018), as Kaggle or Mendeley publishes them."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from embcache.data.dataset import ImageDataset
from embcache.data.files import passed_note, walk_images
from embcache.data.published import DatasetLayout

CLASSES = ("NORMAL", "PNEUMONIA")

# Kaggle: `person12_bacteria_46.jpeg`; `IM-0115-0001.jpeg` and `NORMAL2-IM-0012-0001.jpeg` are numbered separately.
# Mendeley: `BACTERIA-1008087-0001.jpeg`, `VIRUS-…`, `NORMAL-…`, the patient in the middle.
_PATIENT = re.compile(r"(person\d+|(?:NORMAL2-)?IM-\d+)|(?:BACTERIA|VIRUS|NORMAL)-(\d+)-\d+")
_PATHOGEN = re.compile(r"_(bacteria|virus)_|(BACTERIA|VIRUS)-")


def read_pneumonia(root: Path, name: str) -> ImageDataset:
    """Read the official ``train`` and ``test``; the 16 official ``val`` images are left out."""
    level = LAYOUT.level(root, lambda folder: all((folder / "train" / c).is_dir() for c in CLASSES))
    rows, passed, unknown = [], list[str](), 0
    for split in ("train", "test"):
        for label, class_name in enumerate(CLASSES):
            folder = f"{split}/{class_name}"
            for path in walk_images(level, folder, passed) if (level / folder).is_dir() else ():
                stem = path.rpartition("/")[2].rpartition(".")[0]
                patient, pathogen = _PATIENT.match(stem), _PATHOGEN.search(stem)
                group = patient.group(1) or patient.group(2) if patient else path
                unknown += patient is None
                cause = (pathogen.group(1) or pathogen.group(2).lower()) if pathogen else ""
                rows.append((path, path, "", label, group, split, cause))
    if not rows:
        raise LAYOUT.layout_error(root, "the class folders hold no images")
    notes = passed_note(passed)
    if unknown == len(rows):
        notes.append("ungrouped: the images' names follow neither Kaggle's nor Mendeley's scheme of patients")
    elif unknown:
        notes.append(f"{unknown:,} of {len(rows):,} images have names without a patient: each is a group of its own")
    left_out = sum(1 for _ in walk_images(level, "val")) if (level / "val").is_dir() else 0
    if left_out:
        notes.append(f"the {left_out} images of the official val split are left out: too few to choose by")
    if not any(row[5] == "test" for row in rows):
        notes.append("the official test images are not there: a local test set is held out of the training images")
    columns = ["id", "path", "place", "label", "group", "split", "pathogen"]
    table = pd.DataFrame(rows, columns=columns).astype({"label": "int64"})
    return ImageDataset(
        name,
        level,
        CLASSES,
        metric="auc",
        augment="chest",
        table=table,
        grouped=unknown < len(rows),
        notes=tuple(notes),
    )


LAYOUT = DatasetLayout(
    name="pneumonia",
    read=read_pneumonia,
    description="chest X-rays of children, normal or pneumonia (Kermany 2018)",
    expected="chest_xray/{train,test}/{NORMAL,PNEUMONIA}/*.jpeg (Kaggle's or Mendeley's)",
    download="dataset_download('paultimothymooney/chest-xray-pneumonia')",
)
