"""Your own images: class folders, ``train/`` and ``test/`` of class folders, or a table of paths and labels.

Class folders are found at whatever level of an archive is named, and folders that name no class are never classes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from embcache.config import DatasetRef
from embcache.data.classes import class_order, label_notes, label_numbers, same_but_for_case
from embcache.data.dataset import ImageDataset
from embcache.data.files import (
    TABLE_SUFFIXES,
    check_paths,
    holds_images,
    is_absolute,
    is_image_file,
    list_folder,
    near_misses,
    passed_note,
    settle_paths,
    subfolders,
    suffix_counts,
    suffix_of,
    walk_images,
)  # fmt: skip
from embcache.data.groups import UNGROUPED
from embcache.data.published import DatasetLayout
from embcache.data.roles import SPLIT_NAMES, find_columns, find_groups, may_hold_labels, plain_name
from embcache.data.tables import COLUMNS, check_strings, check_unique, named_columns, open_table, unify
from embcache.errors import DatasetError, DatasetNotFoundError, UsageError, first_few

EXPECTED = """ROOT/<class>/*.png, or ROOT/{train,test}/<class>/*.png,
or a table (CSV, TSV, Parquet, Excel) of path,label[,group][,split][,id] in ROOT, or given as the root"""

_NO_CLASSES = re.compile(  # folders of these names only, numbered or not, are parts of a collection
    r"(?:images?|imgs?|pictures?|pics?|photos?|data|datasets?|files?|folders?|dirs?|dicoms?|dcms?|pngs?|jpe?gs?|tiffs?|tifs?|"
    r"tiles?|patches|patch|slides?|scans?|frames?|raw|processed|all|inputs?|samples?|site|cent(?:er|re)|hospital|clinic|scanner|"
    r"batch|part|fold|chunk|shard|archive|set|split|disk|volume|session|patients?|pat|subjects?|sub|cases?|persons?|study|"
    r"series)(?:[\s_.-]*(?:\d+|[a-z]))?",
    re.IGNORECASE,
)
_NEVER = re.compile(r"(?:images?|imgs?)(?:[\s_.-]*\d+)?", re.IGNORECASE)
# What class folders may share below them: sides, years and running numbers; single digits are rather classes.
_SIDES = re.compile(r"\d{2,4}|left|right|od|os", re.IGNORECASE)


@dataclass
class _Found:
    """Where the images of a folder are, as far as it is known."""

    root: Path  # the folder, at the level that counts
    table: Path | None = None  # the table that names the images
    rows: list[tuple[str, str, str]] = field(default_factory=list)  # path, class ("" for none) and split
    notes: list[str] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)  # other files by suffix

    def add(self, folder: str, label: str, split: str) -> None:
        """Add the images at or below a folder."""
        self.rows += [(path, label, split) for path in walk_images(self.root, folder, self.passed)]


def _find(top: Path, ref: DatasetRef) -> _Found:
    """Find the table, the splits or the class folders at or below ``top``.

    The only folder with images is gone into; a table is used where there are no class folders beside it.
    """
    found = _Found(top)
    while True:
        root = found.root
        children, tables = _image_folders(root), _label_tables(root, ref)
        divided = any(SPLIT_NAMES.get(n.lower()) == "train" and _image_folders(root / n) for n in children)
        classes = divided or (len(children) > 1 and not all(map(_names_no_class, children)))
        if tables and not classes:
            if len(tables) > 1:
                raise _unclear(root, "several tables could be that of the labels", tables, root / tables[0])
            found.notes.append(f"{tables[0]}, beside the images, is the table of labels")
            found.table = root / tables[0]
            return found
        if len(children) != 1 or divided or _images_in(root / children[0]):
            break
        found.notes += _strays(root) + _unread(found, children)
        found.root = root / children[0]
    if root != top:
        level = root.relative_to(top).as_posix()
        found.notes.append(f"the classes are the folders in {level}/, the only folder with images")
    if tables:
        takes = f"--data-root '{root / tables[0]}' takes it"
        found.notes.append(f"{first_few(tables)} beside the class folders is not used: {takes}")
        found.passed.subtract(Counter(map(suffix_of, tables)))
    if not children:
        raise _no_classes(top, root, ref)
    found.notes += _unread(found, children)
    parts = {name: _image_folders(root / name) for name in children}
    if divided:
        _add_splits(found, children)
    elif not any(name.lower() in SPLIT_NAMES for name in children) and any(
        part.lower() in SPLIT_NAMES for inner in parts.values() for part in inner
    ):
        _add_splits_of_classes(found, parts)
    else:
        copies = _refuse_no_classes(root, children, tables, ref)
        found.notes += [f"{name}/ holds the class folders once more and is left out as a copy" for name in copies]
        for name in children:
            if name not in copies:
                found.add(name, name, "train")
        beside = [f.name for f in subfolders(root.parent) if SPLIT_NAMES.get(f.name.lower(), "train") != "train"]
        if SPLIT_NAMES.get(root.name.lower()) == "train" and beside:
            takes = f"--data-root '{root.parent}' takes all"
            found.notes.append(f"{first_few(beside)} beside {root.name}/ is not used: {takes}")
    found.notes += [*_strays(root), *passed_note(+found.passed)]
    return found


def _add_splits(found: _Found, children: Sequence[str]) -> None:
    """Rows of ``train/<class>`` and the like."""
    root, others, within = found.root, list[str](), dict[str, set[str]]()
    for name in children:
        split = SPLIT_NAMES.get(name.lower())  # the paths keep the folder's own spelling
        if split is None:
            others.append(name)
            continue
        folder = _gone_into(root, name)  # train/images/<class>
        classes = _image_folders(root / folder)
        found.notes += _unread(found, classes, folder)
        for each in classes:
            found.add(f"{folder}/{each}", each, split)
            within[each] = within.get(each, set()) | _inner(root, f"{folder}/{each}")
        flat = [f"{folder}/{image}" for image in _images_in(root / folder)]
        if split == "test":  # a test set whose labels are kept elsewhere
            found.rows += [(path, "", split) for path in flat]
        elif flat:
            found.notes.append(f"{len(flat):,} images in {folder}/ outside its class folders are left out")
    if others:
        found.notes.append(f"folders beside the splits are left out: {first_few(others)}")
    names = sorted({label for _, label, _ in found.rows if label})
    if len(names) > 1 and all(map(_names_no_class, names)):
        raise _unclear(root, "the folders in train/ do not name classes", names, None)
    _refuse_shared(root, within)


def _add_splits_of_classes(found: _Found, parts: Mapping[str, Sequence[str]]) -> None:
    """Rows of ``<class>/train`` …; refused where a class has other images, or none is for training."""
    root = found.root
    whole = next((root / n for n, inner in parts.items() for p in inner if _image_folders(root / n / p)), None)
    for name, inner in parts.items():
        if odd := [part for part in inner if part.lower() not in SPLIT_NAMES] + _images_in(root / name):
            problem = "some class folders hold splits, and one holds other images"
            raise _unclear(root, problem, sorted(parts), whole, f"{name}/ holds {first_few(odd, 3)}")
        found.notes += _unread(found, inner, name)
        for part in inner:
            found.add(f"{name}/{part}", name, SPLIT_NAMES[part.lower()])
    if all(split != "train" for _, _, split in found.rows):
        problem = "the folders in the class folders are splits, and none is for training"
        raise _unclear(root, problem, sorted(parts), None)
    _refuse_shared(root, {name: set().union(*(_inner(root, f"{name}/{p}") for p in parts[name])) for name in parts})
    found.notes.append("the splits are the folders in each class folder")


def _refuse_no_classes(root: Path, children: Sequence[str], tables: Sequence[str], ref: DatasetRef) -> list[str]:
    """Refuse folders that name no class; of those that are copies of the others, the names."""
    within = {name: _inner(root, name) for name in children}
    copies = [name for name in children if len(within[name] & set(children)) > 1]
    for copy in copies:
        images = {path.partition("/")[2] for path in walk_images(root, copy)}
        if not images <= {path for name in children if name != copy for path in walk_images(root, name)}:
            problem = f"the folder {copy!r} has folders of the same names as those beside it"
            raise _unclear(root, problem, children, root / copy)
    names = [name for name in children if name not in copies]
    odd = [name for name in names if name.lower() in SPLIT_NAMES]
    table = root / tables[0] if tables else None
    if odd:
        problem = f"the folder {odd[0]!r} names a split, not a class"
        holds = "images, not class folders" if _images_in(root / odd[0]) else first_few(sorted(within[odd[0]]))
        raise _unclear(root, problem, names, table, f"{odd[0]}/ holds {holds}")
    _refuse_shared(root, {name: within[name] for name in names})
    if all(map(_names_no_class, names)) or any(_NEVER.fullmatch(name) for name in names):
        beside = f"{first_few(tables)} lies beside them" if tables else ""
        elsewhere = None if tables else _table_elsewhere(root, ref)
        raise elsewhere or _unclear(root, "the folders do not name classes", names, table, beside)
    return copies


def _refuse_shared(root: Path, within: Mapping[str, set[str]]) -> None:
    """Refuse folders (sites, patients, copies) that hold the same two or more folders, which may be the classes."""
    shared = Counter(inner for names in within.values() for inner in names)
    both = [n for n in shared if shared[n] > 1 and not _SIDES.fullmatch(n) and not _names_no_class(n)]
    if len(both) > 1:
        names, holds = sorted(within), f"each with {first_few(sorted(both))}"
        inside = root / names[0] if (root / names[0]).is_dir() else None
        raise _unclear(root, "several folders have folders of the same names", names, inside, holds)


def _gone_into(root: Path, folder: str) -> str:
    """``folder``, or the only one with images in it where that has a name that tells nothing, as deep as that goes."""
    while len(inner := _image_folders(root / folder)) == 1 and _NO_CLASSES.fullmatch(inner[0]):
        folder = f"{folder}/{inner[0]}"
    return folder


def _inner(root: Path, folder: str) -> set[str]:
    return set(_image_folders(root / _gone_into(root, folder)))


def _no_classes(top: Path, root: Path, ref: DatasetRef) -> DatasetError:
    """The error for a root without folders of images: what lies in it, or above it."""
    if _images_in(root):
        above = _label_tables(root.parent, ref)
        if not above and (elsewhere := _table_elsewhere(root.parent, ref)):
            raise elsewhere
        beside = _image_folders(root.parent)
        if above:
            beside_it = "a table beside the folder"
            return _unclear(root, "the images have no labels here", above, root.parent / above[0], beside_it)
        if len(beside) > 1:
            return _unclear(root, "this is one folder of images, without class folders", beside, root.parent)
    passed: Counter[str] = Counter()
    for _ in walk_images(root, "", passed):
        pass
    return layout_error(top, "no class folders with images", "; ".join(passed_note(passed)) or None)


def _table_elsewhere(root: Path, ref: DatasetRef) -> DatasetError | None:
    """The error for images whose table lies in a folder beside theirs (``metadata/labels.csv``), if one does."""
    for folder in subfolders(root):
        for table in _label_tables(folder, ref):
            return layout_error(
                root,
                "the images have no labels here",
                f"a table in another folder: {folder / table}",
                f"move {table} into {root}, with paths as seen from there, and --data-root '{root / table}'",
            )
    return None


def _unclear(
    root: Path, problem: str, seen: Sequence[str], instead: Path | None, more: str = ""
) -> DatasetNotFoundError:
    table = "a table of path,label (and group, split) as --data-root; or rename folders that do name classes"
    fix = f"--data-root '{instead}', or {table}" if instead else table
    found = first_few(seen) + (f" ({more})" if more else "")
    return DatasetNotFoundError(problem, code="classes-unclear", expected=EXPECTED, found=found, where=root, fix=fix)


def layout_error(root: Path, problem: str, found: str | None = None, fix: str | None = None) -> DatasetNotFoundError:
    """The error for a folder whose classes are unclear."""
    entries = [entry.name for entry in list_folder(root)] if root.is_dir() else []
    return DatasetNotFoundError(
        problem, code="dataset-layout", expected=EXPECTED, where=root,
        found=found or (first_few(entries) or "an empty folder" if root.is_dir() else "a file"),
        fix=fix or "make one sub-folder per class, or a table, and name it with --data-root",
    )  # fmt: skip


def _label_tables(folder: Path, ref: DatasetRef) -> list[str]:
    """Tables of paths and labels in a folder, by their header; and those whose header cannot be read."""
    found = []
    for entry in list_folder(folder):
        if Path(entry.name).suffix.lower() in TABLE_SUFFIXES and entry.is_file():
            try:
                header, _ = open_table(folder / entry.name, rows=1)
            except DatasetError:  # if it is the only one, reading it says why
                header = None
            if header is None or may_hold_labels(header.columns.tolist(), ref):
                found.append(entry.name)
    return found


def _names_no_class(name: str) -> bool:
    return name.lower() in SPLIT_NAMES or _NO_CLASSES.fullmatch(name) is not None


def _image_folders(folder: Path) -> list[str]:
    """Folders in a folder with images at any depth."""
    return [inner.name for inner in subfolders(folder) if holds_images(inner)]


def _images_in(folder: Path) -> list[str]:
    return [e.name for e in list_folder(folder) if e.is_file() and is_image_file(folder, e.name)]


def _strays(root: Path) -> list[str]:
    strays = _images_in(root)
    note = f"{len(strays):,} images outside the class folders are left out ({first_few(strays, 3)})"
    return [note] if strays else []


def _unread(found: _Found, children: Sequence[str], folder: str = "") -> list[str]:
    """Count the other files in a folder; a note on folders there whose files are all of no format that is read."""
    unread = []
    for entry in list_folder(found.root / folder):
        own = Counter[str]()
        path = f"{folder}/{entry.name}" if folder else entry.name
        if entry.is_dir() and entry.name not in children:
            list(walk_images(found.root, path, own))
            unread += [f"{path} ({suffix_counts(own)})"] if own else []
        elif entry.is_file() and not is_image_file(found.root / folder, entry.name):
            own[suffix_of(entry.name)] += 1
        found.passed.update(own)
    return [f"folders without an image that can be read are left out: {first_few(unread)}"] if unread else []


def read_folder(root: Path, name: str, ref: DatasetRef = DatasetRef()) -> ImageDataset:
    """Read class folders, the table that lies beside images, or the table that ``root`` is."""
    if root.is_file():
        if root.suffix.lower() not in TABLE_SUFFIXES:
            raise layout_error(root, "the root is a file, but not a table")
        return read_label_table(root, name, ref)
    found = _find(root, ref)
    if found.table is not None:
        ds = read_label_table(found.table, name, ref)
        return replace(ds, notes=(*found.notes, *ds.notes, *_not_named(found.root, ds)))
    if named := named_columns(ref):
        raise UsageError(
            "class folders have no columns", code="columns-of-folders",
            found=" ".join(f"--{role}-column" for role in named), fix="--data-root TABLE, or leave these options out",
        )  # fmt: skip
    paths = check_strings([path for path, _, _ in found.rows], "path", where=root)
    splits = [split for _, _, split in found.rows]
    labels = [label for _, label, _ in found.rows]
    cells = {"id": paths, "path": paths, "group": paths, "split": splits}
    notes = [UNGROUPED, *_inner_folders(found.rows), *found.notes]
    return _dataset(found.root, name, cells, labels, ref, notes)


def _inner_folders(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """A note where class folders have folders of several images, which may be patients."""
    images = Counter(path.rpartition("/")[0] for path, _, _ in rows)
    classes = {(label, split) for _, label, split in rows}
    several = sum(n > 1 for n in images.values())
    if several <= max(len(classes), 3):
        return []
    note = f"{len(images):,} folders within the class folders are not taken for groups"
    return [f"{note}: if they are patients, a table of path,label,group keeps the images of each together"]


def read_label_table(file: Path, name: str, ref: DatasetRef = DatasetRef()) -> ImageDataset:
    """Read a table of ``path,label[,group][,split][,id][,anything]``; paths are relative to its folder.

    Labels are names or whole numbers, empty where unlabelled; rows without a split are for training; rows without
    a group are a group of their own; without an ``id`` column the path is the id. Further columns are kept. Columns
    may have other names that are usual, which notes name.
    """
    given, notes = open_table(file)
    found, more = find_columns(given, ref, where=file)
    notes += more
    if given.empty:
        raise DatasetError("a label file has no rows", code="table-empty", expected="one row per image", where=file)
    paths, more = settle_paths(file.parent, check_strings(given[found["path"]].tolist(), "path", where=file))
    notes += more
    absolute = [path for path in paths if is_absolute(path)]
    near, advice = near_misses(file.parent, absolute) if absolute else ("", "")
    if near:
        raise DatasetError(
            f"{len(absolute):,} paths lead out of the dataset's root, which is the table's folder, and are refused",
            code="outside-root", expected="paths relative to the table's folder", found=near, where=file, fix=advice,
        )  # fmt: skip
    check_paths(paths, "path", where=file)
    ids = check_strings(given[found["id"]].tolist(), "id", where=file) if "id" in found else paths
    check_paths(ids, "id", where=file)
    check_unique(ids, where=file)
    splits = given[found["split"]].tolist() if "split" in found else [""] * len(ids)
    splits = [SPLIT_NAMES.get(s.lower() or "train", s) for s in splits]
    unknown = [f"{i}: {s!r}" for i, s in zip(ids, splits, strict=True) if s not in SPLIT_NAMES]
    if unknown:
        raise DatasetError(
            f"unknown split in {len(unknown):,} rows", code="unknown-split", expected="train, val or test",
            found=first_few(unknown), where=file,
        )  # fmt: skip
    labels = given[found["label"]].tolist()
    number = {label: c for c, label in enumerate(dict.fromkeys(labels))} | {"": -1}
    used = {found[role] for role in ("path", "label", "split", "id") if role in found}
    free = given.drop(columns=[c for c in given.columns if c in used and c != ref.group_column])
    groups, column, more = find_groups(free, ref, [number[label] for label in labels], ids, where=file)
    notes += more if groups is not None else [UNGROUPED, *more]
    cells = {"id": ids, "path": paths, "group": groups or ids, "split": splits}
    used |= {column} if plain_name(column) == "group" else set()
    for each in (c for c in given.columns if c not in used):
        cells["source_" + each if each in COLUMNS else each] = given[each].tolist()
    return _dataset(file.parent, name, cells, labels, ref, notes, file)


def _not_named(root: Path, ds: ImageDataset) -> list[str]:
    """Notes on the files beside a table that it does not name."""
    passed = Counter[str]()
    images = list(walk_images(root, "", passed, refuse=False))
    named = set(ds.table["path"].tolist())
    others = [path for path in images if path not in named]
    note = f"{len(others):,} of {len(images):,} images beside the table are not named in it and are left out"
    tables = Counter(suffix for suffix in passed.elements() if suffix in TABLE_SUFFIXES)
    return ([f"{note} ({first_few(others, 3)})"] if others else []) + passed_note(passed - tables)


def _dataset(
    root: Path,
    name: str,
    cells: dict[str, list[str]],
    given: list[str],
    ref: DatasetRef,
    notes: list[str],
    table: Path | None = None,
) -> ImageDataset:
    where = table or root
    spellings = unify(label for label in given if label)
    labels = [spellings.of.get(label, "") for label in given]
    merged, done, more = same_but_for_case(labels, ref.merge_class, where=where)
    labels = [merged.get(label, label) for label in labels] if merged else labels
    class_names = class_order(label for label, split in zip(labels, cells["split"], strict=True) if split == "train")
    numbers = label_numbers(labels, class_names, ids=cells["id"], where=where)
    if len(class_names) == 1:
        above = f"--data-root '{root.parent}'"
        raise DatasetError(
            "there is one class only, so there is nothing to predict", code="too-few-classes",
            expected="two classes or more among the training images, or a table whose column label is empty",
            found=class_names[0], where=where,
            fix="--label-column NAME, another column of the table" if table else above,
        )  # fmt: skip
    if not class_names and table is None:
        raise layout_error(root, "no class folders with images")
    own: dict[str, Any] = {**cells, "place": "", "label": np.array(numbers, dtype=np.int64)}
    order = [*COLUMNS, *(name for name in cells if name not in COLUMNS)]
    options = {f"{role}_column": column for role, column in named_columns(ref).items()}
    return ImageDataset(
        name, root, class_names, metric="auc" if len(class_names) == 2 else "macro_auc", augment="generic",
        table=pd.DataFrame({column: own[column] for column in order}),
        notes=(*notes, *spellings.notes(), *more, *label_notes(labels, class_names)),
        ref=DatasetRef.make(options={**options, "merge_class": done}),
    )  # fmt: skip


LAYOUT = DatasetLayout(
    name="folder",
    read=read_folder,
    description="your own: class folders, train/ and test/ of them, or a table",
    expected=EXPECTED,
    own_columns=True,
)
