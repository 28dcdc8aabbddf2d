"""One's own images: class folders, ``train/`` and ``test/`` of class folders, or a table of paths and labels."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from embcache.data.checks import COLUMNS, check_paths, check_strings, check_unique, first_few
from embcache.data.dataset import ImageDataset
from embcache.data.files import TABLE_SUFFIXES, is_image_name, list_folder, subfolders, walk_images
from embcache.data.labels import class_order, label_numbers, read_table
from embcache.data.source import DatasetSource
from embcache.errors import DatasetError

SPLIT_NAMES = {  # of folders and in a split column, compared in lower case
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
UNGROUPED = "no group column: every image counts as a patient of its own"


def read_folder(root: Path, name: str) -> ImageDataset:
    """Read class folders, or the table that ``root`` is."""
    if root.is_file():
        if root.suffix.lower() not in TABLE_SUFFIXES:
            raise SOURCE.layout_error(root, "the root is a file, but not a table")
        return read_label_table(root, name)
    names = {e.name for e in list_folder(root) if e.is_dir()}
    if any(SPLIT_NAMES.get(n.lower()) == "train" and _has_classes(root / n) for n in names):
        return _read_split_folders(root, name)
    return _assemble(root, name, _class_rows(root, "", "train"), notes=_strays(root))


def read_label_table(file: Path, name: str) -> ImageDataset:
    """Read a table of ``path,label[,group][,split][,id][,anything]``; paths are relative to its folder.

    Labels are names or whole numbers, empty where unlabelled; rows without a split are for training; rows without
    a group are a group of their own; without an ``id`` column the path is the id. Further columns are kept.

    Raises
    ------
    DatasetError
        A column is absent; an id repeats; a split is unknown; a label occurs outside training only; a path
        or an id is absolute or leads out of the folder.
    """
    source = read_table(file, ["path", "label"])
    if source.empty:
        raise DatasetError("a label file has no rows", expected="one row an image", where=file)
    paths = [p.removeprefix("./") for p in check_strings(source["path"].tolist(), "path", where=file)]
    check_paths(paths, "path", where=file)
    ids = check_strings(source["id"].tolist(), "id", where=file) if "id" in source else paths
    check_paths(ids, "id", where=file)
    check_unique(ids, where=file)
    splits = (
        [SPLIT_NAMES.get(s.lower() or "train", s) for s in source["split"]]
        if "split" in source
        else ["train"] * len(ids)
    )
    unknown = [f"{i}: {s!r}" for i, s in zip(ids, splits, strict=True) if s not in SPLIT_NAMES]
    if unknown:
        raise DatasetError(
            f"unknown split in {len(unknown):,} rows",
            expected="train, val or test",
            found=first_few(unknown),
            where=file,
        )
    labels = source["label"].tolist()
    class_names = class_order(label for label, s in zip(labels, splits, strict=True) if s == "train")
    has_group = "group" in source
    table = pd.DataFrame(
        {
            "id": ids,
            "path": paths,
            "member": -1,
            "label": label_numbers(labels, class_names, ids=ids, where=file),
            "group": [g or i for g, i in zip(source["group"], ids, strict=True)] if has_group else ids,
            "split": splits,
        }
    )
    for column in source.columns:
        if column not in ("path", "label", "group", "split", "id"):
            table["source_" + column if column in COLUMNS else column] = source[column].tolist()
    return _dataset(file.parent, name, class_names, table, notes=() if has_group else (UNGROUPED,))


def _read_split_folders(root: Path, name: str) -> ImageDataset:
    rows, others = [], []
    for folder in subfolders(root):
        split = SPLIT_NAMES.get(folder.name.lower())  # the paths keep the folder's own spelling
        if split is None:
            others.append(folder.name)
            continue
        rows += _class_rows(root, folder.name + "/", split)
        if split == "test":  # images beside the class folders: a test set whose labels are kept elsewhere
            flat = [f"{folder.name}/{e.name}" for e in list_folder(folder) if is_image_name(e.name) and e.is_file()]
            rows += [(path, "", split) for path in flat]
    notes = _strays(root)
    if others:
        notes.append(f"folders beside the splits are left out: {first_few(others)}")
    return _assemble(root, name, rows, notes=notes)


def _class_rows(root: Path, prefix: str, split: str) -> list[tuple[str, str, str]]:
    """(path, class name, split) of every image in the class folders of ``root/prefix``."""
    rows = []
    for entry in list_folder(root / prefix):
        if entry.is_dir():
            rows += [(path, entry.name, split) for path in walk_images(root, prefix + entry.name)]
    return rows


def _assemble(root: Path, name: str, rows: list[tuple[str, str, str]], *, notes: list[str]) -> ImageDataset:
    if not any(label for _, label, _ in rows):
        raise SOURCE.layout_error(root, "no class folders with images")
    paths = [path for path, _, _ in rows]
    check_strings(paths, "path", where=root)
    labels = [label for _, label, _ in rows]
    class_names = class_order(label for _, label, split in rows if split == "train")
    table = pd.DataFrame(
        {
            "id": paths,
            "path": paths,
            "member": -1,
            "label": label_numbers(labels, class_names, ids=paths, where=root),
            "group": paths,
            "split": [split for _, _, split in rows],
        }
    )
    return _dataset(root, name, class_names, table, notes=(UNGROUPED, *notes))


def _dataset(
    root: Path, name: str, class_names: tuple[str, ...], table: pd.DataFrame, notes: tuple[str, ...]
) -> ImageDataset:
    return ImageDataset(
        name=name,
        root=root,
        class_names=class_names,
        metric="auc" if len(class_names) == 2 else "macro_auc",
        augment="generic",
        table=table.astype({"member": "int64", "label": "int64"}),
        kind="folder",
        notes=notes,
    )


def _has_classes(folder: Path) -> bool:
    return any(next(walk_images(folder, child.name), None) for child in subfolders(folder))


def _strays(root: Path) -> list[str]:
    strays = [e.name for e in list_folder(root) if is_image_name(e.name) and e.is_file()]
    return [f"{len(strays):,} images outside the class folders are left out ({first_few(strays, 3)})"] if strays else []


SOURCE = DatasetSource(
    name="folder",
    description="your own: class folders, train/ and test/ of them, or a table",
    expected="ROOT/<class>/*.png, or ROOT/{train,test}/<class>/*.png,\n"
    "or a CSV or Parquet file with path,label[,group][,split][,id] given as the root",
    download=None,
    read=read_folder,
)
