"""Your own images: class folders, ``train/`` and ``test/`` of class folders, or a table of paths and labels.

Class folders are found at whatever level of an archive is named, and folders that name no class are never classes.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd

from embcache.config import DatasetRef
from embcache.data.dataset import ImageDataset
from embcache.data.files import (
    TABLE_SUFFIXES,
    check_paths,
    is_absolute,
    list_folder,
    near_misses,
    passed_note,
    refuse_outside,
    settle_paths,
    subfolders,
    suffix_counts,
    walk_images,
)  # fmt: skip
from embcache.data.groups import UNGROUPED, find_groups
from embcache.data.label_texts import (
    class_order,
    label_notes,
    label_numbers,
    same_but_for_case,
    unclear_labels,
)
from embcache.data.published import DatasetLayout, named_columns
from embcache.data.tables import (
    COLUMNS,
    SPLIT_NAMES,
    check_strings,
    check_unique,
    find_columns,
    may_hold_labels,
    open_table,
    plain_name,
    spelling_notes,
    unify,
)  # fmt: skip
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

_Rows = list[tuple[str, str, str]]  # path, class ("" for none) and split


class _Tree:
    """Images below a folder, by the folders that hold them."""

    def __init__(self, root: Path, images: list[str], ref: DatasetRef) -> None:
        self.root, self.images, self.ref = root, images, ref
        self.flat = defaultdict[str, list[str]](list)  # images directly in each folder
        self.inner = defaultdict[str, list[str]](list)  # names of the folders in each folder that hold images
        self.span: dict[str, tuple[int, int]] = {}  # those below a folder follow each other
        for number, path in enumerate(images):
            *folders, _ = path.split("/")
            self.flat["/".join(folders)].append(path)
            for folder in accumulate(folders, "{}/{}".format):
                if folder not in self.span:
                    above, _, own = folder.rpartition("/")
                    self.inner[above].append(own)
                start, _ = self.span.get(folder, (number, 0))
                self.span[folder] = start, number + 1

    def under(self, folder: str) -> list[str]:
        """Images at or below a folder."""
        return self.images[slice(*self.span[folder])]

    def gone_into(self, folder: str) -> str:
        """``folder``, or the only one with images in it where that has a name that tells nothing, however deep."""
        while len(inner := self.inner[folder]) == 1 and _NO_CLASSES.fullmatch(inner[0]):
            folder = f"{folder}/{inner[0]}"
        return folder

    def within(self, folder: str) -> set[str]:
        """Names of the folders in a folder, or in the one that is gone into."""
        return set(self.inner[self.gone_into(folder)])

    def refuse(self, problem: str, more: str = "") -> NoReturn:
        """Raise the error for folders whose classes are unclear: what lies in them, and the root to try instead."""
        children, flat, tables = self.inner[""], self.flat[""], _label_tables(self.root, self.ref)
        found = [f"{n}/ with {first_few([*self.inner[n], *_names(self.flat[n])], 3)}" for n in children]
        found += [*tables, *([f"{len(flat):,} images"] if flat else []), *filter(None, [more])]
        fix = "a table of path,label (and group, split) as --data-root; or rename folders that do name classes"
        base = self.root if children else self.root.parent
        near = [base / table for table in _label_tables(base, self.ref)] if children or flat else []
        elsewhere = ((folder, table) for folder in subfolders(base) for table in _label_tables(folder, self.ref))
        if (children or flat) and not near and (one := next(elsewhere, None)):
            found.append(f"a table in another folder: {one[0] / one[1]}")
            fix = f"move {one[1]} into {base}, with paths as seen from there, and --data-root '{base / one[1]}'"
        elif near := near + [base / name for name in children if self.inner[name]] + [base] * bool(flat):
            fix = f"--data-root '{near[0]}', or {fix}"
        raise DatasetNotFoundError(
            problem, code="classes-unclear" if children or flat else "dataset-layout", expected=EXPECTED,
            found=first_few(found, 8) or "no images", where=self.root, fix=fix,
        )  # fmt: skip


def read_folder(root: Path, name: str, ref: DatasetRef = DatasetRef()) -> ImageDataset:
    """Read class folders, the table that lies beside images, or the table that ``root`` is.

    The only folder with images is gone into; a table is used where there are no class folders beside it.
    """
    if root.is_file():
        if root.suffix.lower() not in TABLE_SUFFIXES:
            raise DatasetNotFoundError(
                "the root is a file, but not a table", code="dataset-layout", expected=EXPECTED, where=root,
                found=f"a file {root.suffix}", fix="name a folder, or a table, with --data-root",
            )  # fmt: skip
        return read_label_table(root, name, ref)
    others, outside = list[str](), list[str]()
    tree = _Tree(root, list(walk_images(root, "", others, outside)), ref)
    notes = _unread(tree, others)
    while True:
        children, tables = tree.inner[""], _label_tables(tree.root, ref)
        divided = any(SPLIT_NAMES.get(n.lower()) == "train" and tree.inner[n] for n in children)
        if tables and not (divided or (len(children) > 1 and not all(map(_names_no_class, children)))):
            if len(tables) > 1:
                tree.refuse("several tables could be that of the labels")
            ds = read_label_table(tree.root / tables[0], name, ref)
            listed, passed = set(ds.table["path"]), [path for path in others if not path.endswith(TABLE_SUFFIXES)]
            notes = [f"{tables[0]}, beside the images, is the table of labels", *ds.notes]
            notes += _left_out("beside the table are not named in it and", [p for p in tree.images if p not in listed])
            return replace(ds, notes=(*notes, *passed_note(passed)))
        notes += _left_out("outside the class folders", tree.flat[""])
        if len(children) != 1 or divided or tree.flat[children[0]]:
            break
        below = [path.partition("/")[2] for path in tree.under(children[0])]
        tree = _Tree(tree.root / children[0], below, ref)
    if outside:
        raise refuse_outside(outside[0], where=root)
    if named := named_columns(ref):
        raise UsageError(
            "class folders have no columns", code="columns-of-folders",
            found=" ".join(f"--{role}-column" for role in named), fix="--data-root TABLE, or leave these options out",
        )  # fmt: skip
    rows = _rows(tree, divided, notes)
    if tree.root != root:
        level = tree.root.relative_to(root).as_posix()
        notes.append(f"the classes are the folders in {level}/, the only folder with images")
    if tables:
        takes = f"--data-root '{tree.root / tables[0]}' takes it"
        notes.append(f"{first_few(tables)} beside the class folders is not used: {takes}")
    at = tree.root.relative_to(root).as_posix() + "/"
    unused = {("" if at == "./" else at) + table for table in tables}
    notes += passed_note([path for path in others if path not in unused])
    paths = check_strings([path for path, _, _ in rows], "path", where=tree.root)
    cells = {"id": paths, "path": paths, "group": paths, "split": [split for _, _, split in rows]}
    notes = [UNGROUPED, *_inner_folders(rows), *notes]
    return _dataset(tree.root, name, cells, [label for _, label, _ in rows], ref, notes)


def _rows(tree: _Tree, divided: bool, notes: list[str]) -> _Rows:
    """Path, class and split of each image by the folders that it lies in; notes are added."""
    children, rows, within = tree.inner[""], _Rows(), dict[str, set[str]]()
    splits_within = any(part.lower() in SPLIT_NAMES for name in children for part in tree.inner[name])
    if not children:
        tree.refuse("there are no class folders with images")
    if divided:  # train/<class>
        for name in children:
            if (split := SPLIT_NAMES.get(name.lower())) is None:
                notes.append(f"a folder beside the splits is left out: {name}")
                continue
            folder = tree.gone_into(name)
            for each in tree.inner[folder]:
                rows += [(path, each, split) for path in tree.under(f"{folder}/{each}")]
                within.setdefault(each, set()).update(tree.within(f"{folder}/{each}"))
            if split == "test":  # a test set whose labels are kept elsewhere
                rows += [(path, "", split) for path in tree.flat[folder]]
            else:
                notes += _left_out(f"in {folder}/ outside its class folders", tree.flat[folder])
        if len(within) > 1 and all(map(_names_no_class, within)):
            tree.refuse("the folders in train/ do not name classes", first_few(sorted(within)))
    elif splits_within and not any(name.lower() in SPLIT_NAMES for name in children):  # <class>/train
        within = {name: {i for part in tree.inner[name] for i in tree.within(f"{name}/{part}")} for name in children}
        for name in children:
            if tree.flat[name] or any(part.lower() not in SPLIT_NAMES for part in tree.inner[name]):
                tree.refuse("some class folders hold splits, and one holds other images", f"{name}/")
            for part in tree.inner[name]:
                rows += [(path, name, SPLIT_NAMES[part.lower()]) for path in tree.under(f"{name}/{part}")]
        if all(split != "train" for _, _, split in rows):
            tree.refuse("the folders in the class folders are splits, and none is for training")
        notes.append("the splits are the folders in each class folder")
    else:
        copies = [name for name in children if len(tree.within(name) & set(children)) > 1]
        names = [name for name in children if name not in copies]
        others = {path for name in names for path in tree.under(name)}
        for copy in copies:
            if not {path.partition("/")[2] for path in tree.under(copy)} <= others:
                tree.refuse(f"the folder {copy!r} has folders of the same names as those beside it")
            notes.append(f"{copy}/ holds the class folders once more and is left out as a copy")
        within = {name: tree.within(name) for name in names}
        if odd := [name for name in names if name.lower() in SPLIT_NAMES]:
            tree.refuse(f"the folder {odd[0]!r} names a split, not a class")
        _refuse_shared(tree, within)
        if all(map(_names_no_class, names)) or any(map(_NEVER.fullmatch, names)):
            tree.refuse("the folders do not name classes")
        rows = [(path, name, "train") for name in names for path in tree.under(name)]
        beside = [f.name for f in subfolders(tree.root.parent) if SPLIT_NAMES.get(f.name.lower()) in ("val", "test")]
        if SPLIT_NAMES.get(tree.root.name.lower()) == "train" and beside:
            takes = f"--data-root '{tree.root.parent}' takes all"
            notes.append(f"{first_few(beside)} beside {tree.root.name}/ is not used: {takes}")
    _refuse_shared(tree, within)
    return rows


def _refuse_shared(tree: _Tree, within: Mapping[str, set[str]]) -> None:
    """Refuse folders (sites, patients, copies) that hold the same two or more folders, which may be the classes."""
    shared = Counter(inner for names in within.values() for inner in names)
    both = sorted(n for n in shared if shared[n] > 1 and not _SIDES.fullmatch(n) and not _names_no_class(n))
    if len(both) > 1:
        found = f"{first_few(sorted(within))}, each with {first_few(both)}"
        tree.refuse("several folders have folders of the same names, which may be the classes", found)


def _names_no_class(name: str) -> bool:
    return name.lower() in SPLIT_NAMES or _NO_CLASSES.fullmatch(name) is not None


def _names(paths: Sequence[str]) -> list[str]:
    return [path.rpartition("/")[2] for path in paths[:3]]


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


def _left_out(where: str, paths: Sequence[str]) -> list[str]:
    return [f"{len(paths):,} images {where} are left out ({first_few(paths, 3)})"] if paths else []


def _unread(tree: _Tree, others: Sequence[str]) -> list[str]:
    unread = defaultdict[str, list[str]](list)
    for path in others:
        folders = accumulate(path.split("/")[:-1], "{}/{}".format)
        if without := next((folder for folder in folders if folder not in tree.span), ""):
            unread[without].append(path)
    listed = [f"{folder} ({suffix_counts(paths)})" for folder, paths in sorted(unread.items())]
    return [f"folders without an image that can be read are left out: {first_few(listed)}"] if listed else []


def _inner_folders(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    images = Counter(path.rpartition("/")[0] for path, _, _ in rows)
    classes = {(label, split) for _, label, split in rows}
    several = sum(n > 1 for n in images.values())
    if several <= max(len(classes), 3):
        return []
    note = f"{len(images):,} folders within the class folders are not taken for groups"
    return [f"{note}: if they are patients, a table of path,label,group keeps the images of each together"]


def read_label_table(file: Path, name: str, ref: DatasetRef = DatasetRef()) -> ImageDataset:
    """Read a table of ``path,label[,group][,split][,id][,anything]``; paths are relative to its folder.

    Labels are names or whole numbers, empty where unlabeled; rows without a split are for training; rows without
    a group are a group of their own; without an ``id`` column the path is the id. Further columns are kept. Columns
    may have other names that are usual, which notes name.
    """
    given, notes = open_table(file)
    required = ("path",) if ref.target else ("path", "label")  # columns may hold what is predicted
    found, more = find_columns(given, ref, where=file, required=required)
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
    labels = given[found["label"]].tolist() if "label" in found else [""] * len(ids)
    number = {label: c for c, label in enumerate(dict.fromkeys(labels))} | {"": -1}
    used = {found[role] for role in ("path", "label", "split", "id") if role in found}
    free = given.drop(columns=[c for c in given.columns if c in used and c != ref.group_column])
    groups, column, more = find_groups(free, ref, [number[label] for label in labels], ids, where=file)
    notes += more if groups is not None else [UNGROUPED, *more]
    cells = {"id": ids, "path": paths, "group": groups or ids, "split": splits}
    used |= {column} if plain_name(column) == "group" else set()
    label = found.get("label", "label")
    if label != "label" and plain_name(label) in map(plain_name, (ref.target or "").split(",")):
        used -= {label}  # a target by that name is its values
    for each in (c for c in given.columns if c not in used):
        cells["source_" + each if each in COLUMNS else each] = given[each].tolist()
    if "label" in found:  # else the target is remembered
        ref = replace(ref, target=None)
    return _dataset(file.parent, name, cells, labels, ref, notes, file)


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
    shown = unify(filter(None, given))
    labels = [shown.get(label, "") for label in given]
    merged, done, more = same_but_for_case(labels, ref.merge_class, where=where)
    labels = [merged.get(label, label) for label in labels] if merged else labels
    class_names = class_order(label for label, split in zip(labels, cells["split"], strict=True) if split == "train")
    every = class_order(labels)
    other = ref.task not in (None, "classes")
    if len(every) > len(class_names) and (other or unclear_labels(labels, every)):
        class_names = every  # no classes at all, perhaps: `refuse_unclear` asks before training
    numbers = label_numbers(labels, class_names, ids=cells["id"], where=where)
    if len(class_names) < 2 and (class_names or table is None):
        above = f"--data-root '{root.parent}'"
        raise DatasetError(
            "there is one class only, so there is nothing to predict", code="too-few-classes",
            expected="two classes or more among the training images, or a table with an empty column label",
            found=first_few(class_names) or "none", where=where,
            fix="--label-column NAME, another column of the table" if table else above,
        )  # fmt: skip
    own: dict[str, Any] = {**cells, "place": "", "label": np.array(numbers, dtype=np.int64)}
    order = [*COLUMNS, *(name for name in cells if name not in COLUMNS)]
    options = {f"{role}_column": column for role, column in named_columns(ref).items()}
    return ImageDataset(
        name, root, class_names, metric="auc" if len(class_names) == 2 else "macro_auc", augment="generic",
        table=pd.DataFrame({column: own[column] for column in order}),
        notes=(*notes, *spelling_notes(filter(None, given), shown), *more, *label_notes(labels, class_names)),
        ref=DatasetRef.make(
            options={**options, "merge_class": done, "target": ref.target, "task": ref.task if ref.target else None}
        ),
    )  # fmt: skip


LAYOUT = DatasetLayout(
    name="folder",
    read=read_folder,
    description="your own: class folders, train/ and test/ of them, or a table",
    expected=EXPECTED,
    own_columns=True,
)
