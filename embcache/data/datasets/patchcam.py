"""PatchCamelyon: lymph node tiles with and without metastasis, in Kaggle's layout or as the original HDF5 files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from embcache.data.checks import check_file_id
from embcache.data.containers.array_rows import own_array
from embcache.data.containers.chunks import StrictFile
from embcache.data.dataset import ImageDataset
from embcache.data.files import find_level, image_index, locate_files
from embcache.data.labels import label_numbers, read_table
from embcache.data.published import DatasetSource
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
    level = find_level(root, lambda folder: (folder / (_H5.format(part="train", what="x") + ".h5")).is_file())
    if level is not None:
        return _read_hdf5(level, name)
    raise SOURCE.layout_error(root)


def _read_kaggle(root: Path, name: str) -> ImageDataset:
    """``train_labels.csv`` and ``train/``; ``test/`` in the order of ``sample_submission.csv`` where it is there."""
    labelled = read_table(root / "train_labels.csv", ["id", "label"])
    labelled, notes = _drop_repeats(labelled, root / "train_labels.csv")
    ids = labelled["id"].tolist()
    labels = label_numbers(labelled["label"].tolist(), ("0", "1"), ids=ids, where=root / "train_labels.csv")
    train = image_index(root / "train")
    unnamed = len(train.keys() - set(ids))
    if unnamed:
        notes.append(f"{unnamed:,} images in train/ have no row in train_labels.csv and are left out")
    test = image_index(root / "test")
    test_ids = list(test)
    if test and (root / "sample_submission.csv").is_file():  # its order is the one to hand in
        test_ids = read_table(root / "sample_submission.csv", ["id"])["id"].tolist()
    if not test:
        notes.append("the official test images are not there: only --test local is possible")
    for image_id in (*ids, *test_ids):
        check_file_id(image_id, where=root)
    paths = [f"train/{train.get(i, i + '.tif')}" for i in ids] + [f"test/{test.get(i, i + '.tif')}" for i in test_ids]
    slides = _slide_map(root)
    ids = ids + test_ids
    table = pd.DataFrame(
        {
            "id": ids,
            "path": paths,
            "member": -1,
            "label": labels + [-1] * len(test_ids),
            "group": [slides.get(i, i) for i in ids],
            "split": ["train"] * len(labels) + ["test"] * len(test_ids),
        }
    )
    grouped = bool(slides)
    if grouped:
        alone = sum(1 for i in ids[: len(labels)] if i not in slides)
        notes += [f"{alone:,} training images are not in {SLIDE_MAP}: each is a group of its own"] if alone else []
    return _dataset(root, name, table, grouped, notes, leaderboard_alpha=0.51)


def _read_hdf5(root: Path, name: str) -> ImageDataset:
    """The original release: labels of all parts are public; train and valid are the pool."""
    parts = []
    for part, split in _PARTS.items():
        images, targets = (f"{_H5.format(part=part, what=what)}.h5" for what in "xy")
        places = locate_files(root, [images, targets], sizes=False)
        absent = [file for file, size in places.items() if size is None]
        if absent:
            packed = [f"{file}.gz" for file in absent if (root / f"{file}.gz").is_file()]
            fix = f"gunzip --keep {' '.join(packed)}" if packed else f"put {' and '.join(absent)} there"
            raise DatasetError(
                "a file of the original PatchCamelyon release is not there",
                found=f"no {first_few(absent)}",
                where=root,
                fix=fix,
            )
        n = _count_images(root / images)
        labels = _read_labels(root / targets, n)
        ids = [f"{part}-{row:06d}" for row in range(n)]
        slides = _hdf5_slides(root, part, n)
        parts.append(
            pd.DataFrame(
                {
                    "id": ids,
                    "path": images,
                    "member": np.arange(n, dtype=np.int64),
                    "label": labels,
                    "group": slides or ids,
                    "split": split,
                    "part": part,
                    "has_slide": slides is not None,
                }
            )
        )
    table = pd.concat(parts, ignore_index=True)
    grouped = bool(table.pop("has_slide").all())
    return _dataset(root, name, table, grouped, [])


def _dataset(
    root: Path,
    name: str,
    table: pd.DataFrame,
    grouped: bool,
    notes: list[str],
    leaderboard_alpha: float | None = None,
) -> ImageDataset:
    return ImageDataset(
        name=name,
        root=root,
        class_names=CLASSES,
        metric="auc",
        augment="patch",
        table=table.astype({"member": "int64", "label": "int64"}),
        kind="patchcam",
        subset_sizes={"S": 500, "M": 5000},
        pool_limit=50_000,  # in either layout: the paper's F is 50,000 drawn at random
        leaderboard_alpha=leaderboard_alpha,
        grouped=grouped,
        notes=tuple(notes if grouped else [UNGROUPED, *notes]),
    )


def _drop_repeats(table: pd.DataFrame, where: Path) -> tuple[pd.DataFrame, list[str]]:
    """One row an id: ids are hashes of the tile, so that a tile cut twice is listed twice. Labels must agree."""
    labels: dict[str, set[str]] = {}
    for image_id, label in zip(table["id"], table["label"], strict=True):
        labels.setdefault(image_id, set()).add(label)
    disputed = [image_id for image_id, values in labels.items() if len(values) > 1]
    if disputed:
        raise DatasetError(
            f"duplicate ids: {len(disputed):,} ids occur with different labels",
            expected="one label an id",
            found=first_few(disputed),
            where=where,
            fix="remove the wrong rows",
        )
    repeats = len(table) - len(labels)
    notes = [f"{repeats:,} rows of {where.name} repeat an id with the same label and count once"] if repeats else []
    return table.drop_duplicates("id"), notes


def _slide_map(root: Path) -> dict[str, str]:
    """Slide of each image by the community's map, where it is there."""
    if not (root / SLIDE_MAP).is_file():
        return {}
    table = read_table(root / SLIDE_MAP, ["id", "wsi"])
    return {i: f"slide {slide}" for i, slide in zip(table["id"], table["wsi"], strict=True) if slide}


def _hdf5_slides(root: Path, part: str, n: int) -> list[str] | None:
    """Slides by the release's own ``…_meta.csv`` (column ``wsi``), where it is there."""
    path = root / f"{_H5.format(part=part, what='meta')}.csv"
    if not path.is_file():
        return None
    slides: list[str] = read_table(path, ["wsi"])["wsi"].tolist()
    if len(slides) != n or not all(slides):
        raise DatasetError(
            "a slide list does not fit its images", expected=f"{n:,} slides", found=f"{len(slides):,}", where=path
        )
    return slides


def _read_labels(path: Path, n: int) -> list[int]:
    """The labels of ``n`` images, (N, 1, 1, 1) in the file, as a list of 0 and 1."""
    with _open_array(path, "y") as array:
        if array.size != n:  # before reading: a file may claim any number of them
            raise DatasetError("images and labels differ in number", found=f"{n:,} and {array.size or 0:,}", where=path)
        if array.dtype.kind not in "biu":
            raise DatasetError("labels are not whole numbers", expected="0 or 1", found=str(array.dtype), where=path)
        labels = array[()].reshape(-1).astype(np.int64)
    if not np.isin(labels, (0, 1)).all():
        wrong = Counter(labels[~np.isin(labels, (0, 1))].tolist())
        raise DatasetError("unknown label", expected="0 or 1", found=first_few(sorted(wrong)), where=path)
    return [int(label) for label in labels]


def _count_images(path: Path) -> int:
    with _open_array(path, "x") as array:
        return len(array)


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
            "an HDF5 file cannot be read",
            expected=f"an array {key!r}",
            found=str(error),
            where=path,
            fix="download it again",
        ) from error


SOURCE = DatasetSource(
    name="patchcam",
    description="lymph node tiles with or without metastasis (PatchCamelyon)",
    expected="train_labels.csv, train/*.tif, test/*.tif (Kaggle)\n"
    "or camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5 (original);\n"
    f"groups by slide where {SLIDE_MAP} (id,wsi) or the original's *_meta.csv is there",
    download="competition_download('histopathologic-cancer-detection')",
    read=read_patchcam,
    merge_identical=False,  # 220,025 files of one size: those that matter are compared by the digests of their features
)
