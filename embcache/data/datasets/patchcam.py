"""PatchCamelyon: lymph node tiles with and without metastasis, in Kaggle's layout or as the original HDF5 files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from embcache.data.classes import label_numbers
from embcache.data.containers import StrictFile, own_array
from embcache.data.dataset import ImageDataset
from embcache.data.datasets import competition_table
from embcache.data.files import find_level, locate_files
from embcache.data.published import DatasetLayout
from embcache.data.tables import read_table
from embcache.errors import DatasetError, first_few

CLASSES = ("normal", "tumour")
SLIDE_MAP = "patch_id_wsi_full.csv"
UNGROUPED = "ungrouped: images of one patient or slide may be on both sides"
_H5 = "camelyonpatch_level_2_split_{part}_{what}"
_PARTS = {"train": "train", "valid": "train", "test": "test"}  # the original's parts and the split each belongs to


def read_patchcam(root: Path, name: str) -> ImageDataset:
    """Read whichever of the two layouts is there."""
    level = find_level(root, lambda folder: (folder / "train_labels.csv").is_file() and (folder / "train").is_dir())
    if level is not None:
        return _read_kaggle(level, name)
    level = LAYOUT.level(root, lambda folder: (folder / (_H5.format(part="train", what="x") + ".h5")).is_file())
    return _read_hdf5(level, name)


def _read_kaggle(root: Path, name: str) -> ImageDataset:
    """``train_labels.csv`` and ``train/``; ``test/`` in the order of ``sample_submission.csv`` where it is there."""
    file = root / "train_labels.csv"
    labeled, notes = _drop_repeats(read_table(file, ["id", "label"]), file)
    ids, labels = labeled["id"], labeled["label"].tolist()
    slides = _slide_map(root)
    table, more = competition_table(
        root, ids, label_numbers(labels, ("0", "1"), ids=ids.tolist(), where=file), lambda i: slides.get(i, i),
        files=(file.name, "sample_submission.csv"), folders=("train", "test"), suffix=".tif",
    )  # fmt: skip
    alone = sum(i not in slides for i in ids) if slides else 0
    more += [f"{alone:,} training images are not in {SLIDE_MAP}: each is a group of its own"] if alone else []
    return _dataset(root, name, table, bool(slides), [*notes, *more], leaderboard_alpha=0.51)


def _read_hdf5(root: Path, name: str) -> ImageDataset:
    """The original release: labels of all parts are public; train and valid are the pool."""
    parts, grouped = [], True
    for part, split in _PARTS.items():
        images, targets = (f"{_H5.format(part=part, what=what)}.h5" for what in "xy")
        absent = [file for file, size in locate_files(root, [images, targets], sizes=False).items() if size is None]
        if absent:
            packed = [f"{file}.gz" for file in absent if (root / f"{file}.gz").is_file()]
            raise DatasetError(
                "a file of the original PatchCamelyon release is not there", code="images-missing",
                found=f"no {first_few(absent)}", where=root,
                fix=f"gunzip --keep {' '.join(packed)}" if packed else f"put {' and '.join(absent)} there",
            )  # fmt: skip
        with _open_array(root / images, "x") as array:
            n = len(array)
        labels, slides = _read_labels(root / targets, n), _hdf5_slides(root, part, n)
        ids, grouped = [f"{part}-{row:06d}" for row in range(n)], grouped and slides is not None
        cells = {
            "id": ids, "path": images, "place": [str(row) for row in range(n)], "label": labels,
            "group": slides or ids, "split": split, "part": part,
        }  # fmt: skip
        parts.append(pd.DataFrame(cells))
    return _dataset(root, name, pd.concat(parts, ignore_index=True), grouped, [])


def _dataset(
    root: Path, name: str, table: pd.DataFrame, grouped: bool, notes: list[str], leaderboard_alpha: float | None = None
) -> ImageDataset:
    # The pool's limit, in either layout: the paper's F is 50,000 drawn at random.
    return ImageDataset(
        name, root, CLASSES, metric="auc", augment="patch", table=table.astype({"label": "int64"}),
        subset_sizes={"S": 500, "M": 5000}, pool_limit=50_000, leaderboard_alpha=leaderboard_alpha, grouped=grouped,
        notes=tuple(notes if grouped else [UNGROUPED, *notes]),
    )  # fmt: skip


def _drop_repeats(table: pd.DataFrame, where: Path) -> tuple[pd.DataFrame, list[str]]:
    """One row per id: ids are hashes of the tile, so that a tile cut twice is listed twice. Labels must agree."""
    labels = table.groupby("id", sort=False)["label"].nunique()
    disputed = labels[labels > 1].index.tolist()
    if disputed:
        raise DatasetError(
            f"duplicate ids: {len(disputed):,} ids occur with different labels", code="duplicate-ids",
            expected="one label per id", found=first_few(disputed), where=where, fix="remove the wrong rows",
        )  # fmt: skip
    repeats = len(table) - len(labels)
    notes = [f"{repeats:,} rows of {where.name} repeat an id with the same label and count once"] if repeats else []
    return table.drop_duplicates("id"), notes


def _slide_map(root: Path) -> dict[str, str]:
    if not (root / SLIDE_MAP).is_file():
        return {}
    table = read_table(root / SLIDE_MAP, ["id", "wsi"])
    return {i: f"slide {slide}" for i, slide in zip(table["id"], table["wsi"], strict=True) if slide}


def _hdf5_slides(root: Path, part: str, n: int) -> list[str] | None:
    path = root / f"{_H5.format(part=part, what='meta')}.csv"
    if not path.is_file():
        return None
    slides: list[str] = read_table(path, ["wsi"])["wsi"].tolist()
    if len(slides) != n or not all(slides):
        raise DatasetError(
            "a slide list does not fit its images", code="counts-differ", expected=f"{n:,} slides",
            found=f"{len(slides):,}", where=path,
        )  # fmt: skip
    return slides


def _read_labels(path: Path, n: int) -> list[int]:
    with _open_array(path, "y") as array:
        if array.size != n:  # before reading: a file may claim any number of them
            found = f"{n:,} and {array.size or 0:,}"
            raise DatasetError("images and labels differ in number", code="counts-differ", found=found, where=path)
        kind = array.dtype
        labels = array[()].reshape(-1) if kind.kind in "biu" else np.zeros(0, np.int64)
    wrong = labels[~np.isin(labels, (0, 1))]
    if kind.kind not in "biu" or len(wrong):
        found = first_few(np.unique(wrong).tolist()) or str(kind)
        raise DatasetError("unknown label", code="unknown-label", expected="0 or 1", found=found, where=path)
    return [int(label) for label in labels]


@contextmanager
def _open_array(path: Path, key: str) -> Iterator[Any]:
    """Array ``key`` of an HDF5 file, open; whatever h5py raises on broken bytes becomes a `DatasetError`."""
    import h5py

    try:
        with h5py.File(StrictFile(os.fspath(path)), "r") as file:
            yield own_array(file, key)
    except (DatasetError, MemoryError, PermissionError):
        raise
    except Exception as error:
        raise DatasetError(
            "an HDF5 file cannot be read", code="array-unreadable", expected=f"an array {key!r}",
            found=str(error), where=path, fix="download it again",
        ) from error  # fmt: skip


LAYOUT = DatasetLayout(
    name="patchcam",
    read=read_patchcam,
    description="lymph node tiles with or without metastasis (PatchCamelyon)",
    expected="train_labels.csv, train/*.tif, test/*.tif (Kaggle)\n"
    "or camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5 (original);\n"
    f"groups by slide where {SLIDE_MAP} (id,wsi) or the original's *_meta.csv is there",
    download="competition_download('histopathologic-cancer-detection')",
    merge_identical=False,  # 220,025 files of one size: those that matter are compared by the digests of their features
)
