"""One's own images: class folders, ``train/`` and ``test/`` of class folders, or a table of paths and labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from embcache.data.checks import COLUMNS, check_paths, check_strings, check_unique, is_absolute
from embcache.data.chosen import Columns
from embcache.data.classes import same_but_for_case
from embcache.data.dataset import ImageDataset
from embcache.data.files import TABLE_SUFFIXES, passed_note, walk_images
from embcache.data.groups import UNGROUPED
from embcache.data.labels import class_order, label_notes, label_numbers, open_table, unify
from embcache.data.levels import EXPECTED, find_layout, layout_error
from embcache.data.nearby import near_misses, settle_paths
from embcache.data.published import DatasetSource
from embcache.data.roles import SPLIT_NAMES, find_columns, find_groups, plain_name
from embcache.errors import DatasetError, UsageError, first_few


def read_folder(root: Path, name: str, columns: Columns = Columns()) -> ImageDataset:
    """Read class folders, the table that lies beside images, or the table that ``root`` is."""
    if root.is_file():
        if root.suffix.lower() not in TABLE_SUFFIXES:
            raise layout_error(root, "the root is a file, but not a table")
        return read_label_table(root, name, columns)
    layout = find_layout(root, columns)
    if layout.table is not None:
        ds = read_label_table(layout.table, name, columns)
        return replace(ds, notes=(*layout.notes, *ds.notes, *_not_named(layout.root, ds)))
    if columns.named():
        raise UsageError(
            "class folders have no columns",
            found=" ".join(f"--{role}-column" for role in columns.named()),
            fix="--data-root TABLE, or leave these options out",
        )
    paths = [path for path, _, _ in layout.rows]
    check_strings(paths, "path", where=root)
    splits = [split for _, _, split in layout.rows]
    cells = {"id": paths, "path": paths, "group": paths, "split": splits}
    labels = [label for _, label, _ in layout.rows]
    notes = [UNGROUPED, *_inner_folders(layout.rows), *layout.notes]
    return _dataset(layout.root, name, cells, labels, columns, notes, layout.root)


def _inner_folders(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """A note where class folders have folders of several images, which may be patients."""
    images = Counter(path.rpartition("/")[0] for path, _, _ in rows)
    classes = {(label, split) for _, label, split in rows}
    several = sum(n > 1 for n in images.values())
    if several <= max(len(classes), 3):
        return []
    told = f"{len(images):,} folders within the class folders are not taken for groups"
    return [f"{told}: if they are patients, a table of path,label,group keeps the images of each together"]


def read_label_table(file: Path, name: str, columns: Columns = Columns()) -> ImageDataset:
    """Read a table of ``path,label[,group][,split][,id][,anything]``; paths are relative to its folder.

    Labels are names or whole numbers, empty where unlabelled; rows without a split are for training; rows without
    a group are a group of their own; without an ``id`` column the path is the id. Further columns are kept. Columns
    may have other names that are usual, which notes name.
    """
    source, notes = open_table(file)
    found, more = find_columns(source, columns, where=file)
    notes += more
    if source.empty:
        raise DatasetError("a label file has no rows", expected="one row per image", where=file)
    paths, more = settle_paths(file.parent, check_strings(source[found["path"]].tolist(), "path", where=file))
    notes += more
    _refuse_elsewhere(file, paths)
    check_paths(paths, "path", where=file)
    ids = check_strings(source[found["id"]].tolist(), "id", where=file) if "id" in found else paths
    check_paths(ids, "id", where=file)
    check_unique(ids, where=file)
    given = source[found["split"]].tolist() if "split" in found else [""] * len(ids)
    splits = [SPLIT_NAMES.get(s.lower() or "train", s) for s in given]
    unknown = [f"{i}: {s!r}" for i, s in zip(ids, splits, strict=True) if s not in SPLIT_NAMES]
    if unknown:
        raise DatasetError(
            f"unknown split in {len(unknown):,} rows",
            expected="train, val or test",
            found=first_few(unknown),
            where=file,
        )
    labels = source[found["label"]].tolist()
    number = {label: c for c, label in enumerate(dict.fromkeys(labels))} | {"": -1}
    used = {found[role] for role in ("path", "label", "split", "id") if role in found}
    free = source.drop(columns=[c for c in source.columns if c in used and c != columns.group])
    groups, column, more = find_groups(free, columns, [number[label] for label in labels], ids, where=file)
    notes += more if groups is not None else [UNGROUPED, *more]
    cells = {"id": ids, "path": paths, "group": groups or ids, "split": splits}
    used |= {column} if plain_name(column) == "group" else set()
    for each in (c for c in source.columns if c not in used):
        cells["source_" + each if each in COLUMNS else each] = source[each].tolist()
    return _dataset(file.parent, name, cells, labels, columns, notes, file)


def _not_named(root: Path, ds: ImageDataset) -> list[str]:
    """Notes on the files beside a table that it does not name."""
    passed = Counter[str]()
    images = list(walk_images(root, "", passed, refuse=False))
    named = set(ds.table["path"].tolist())
    others = [path for path in images if path not in named]
    told = f"{len(others):,} of {len(images):,} images beside the table are not named in it and are left out"
    tables = Counter(suffix for suffix in passed.elements() if suffix in TABLE_SUFFIXES)
    return ([f"{told} ({first_few(others, 3)})"] if others else []) + passed_note(passed - tables)


def _refuse_elsewhere(file: Path, paths: Sequence[str]) -> None:
    """Absolute paths to other folders are refused as any that leave the root, with what comes near them in it."""
    absolute = [path for path in paths if is_absolute(path)]
    near, advice = near_misses(file.parent, absolute) if absolute else ("", "")
    if near:
        raise DatasetError(
            f"{len(absolute):,} paths lead out of the dataset's root, which is the table's folder, and are refused",
            expected="paths relative to the table's folder",
            found=near,
            where=file,
            fix=advice,
        )


def _dataset(
    root: Path,
    name: str,
    cells: dict[str, list[str]],
    given: list[str],
    columns: Columns,
    notes: list[str],
    where: Path,
) -> ImageDataset:
    spellings = unify(label for label in given if label)
    labels = [spellings.of.get(label, "") for label in given]
    merged, done, more = same_but_for_case(labels, columns.merge_class, where=where)
    labels = [merged.get(label, label) for label in labels] if merged else labels
    class_names = class_order(label for label, split in zip(labels, cells["split"], strict=True) if split == "train")
    numbers = label_numbers(labels, class_names, ids=cells["id"], where=where)
    if len(class_names) == 1:
        above = f"--data-root '{root.parent}'"
        raise DatasetError(
            "there is one class only, so there is nothing to tell apart",
            expected="two classes or more among the training images, or a table whose column label is empty",
            found=class_names[0],
            where=where,
            fix="--label-column NAME, another column of the table" if where.is_file() else above,
        )
    if not class_names and where.is_dir():
        raise layout_error(root, "no class folders with images")
    own: dict[str, Any] = {**cells, "member": np.full(len(given), -1), "label": np.array(numbers, dtype=np.int64)}
    order = [*COLUMNS, *(name for name in cells if name not in COLUMNS)]
    return ImageDataset(
        name=name,
        root=root,
        class_names=class_names,
        metric="auc" if len(class_names) == 2 else "macro_auc",
        augment="generic",
        table=pd.DataFrame({name: own[name] for name in order}),
        kind="folder",
        notes=(*notes, *spellings.notes(), *more, *label_notes(labels, class_names)),
        columns=replace(columns, merge_class=done),
    )


SOURCE = DatasetSource(
    name="folder",
    description="your own: class folders, train/ and test/ of them, or a table",
    expected=EXPECTED,
    download=None,
    read=read_folder,
    own_columns=True,
)
