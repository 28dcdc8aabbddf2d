"""Where in a folder the classes are: whatever level of an archive is named, and never folders that name no class."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from embcache.data.chosen import Columns
from embcache.data.files import (
    TABLE_SUFFIXES,
    holds_images,
    is_image_file,
    list_folder,
    passed_note,
    subfolders,
    suffix_counts,
    suffix_of,
    walk_images,
)
from embcache.data.labels import open_table
from embcache.data.roles import SPLIT_NAMES, may_hold_labels
from embcache.errors import DatasetError, DatasetNotFoundError, first_few

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


@dataclass(frozen=True)
class Layout:
    """Where the images of a folder dataset are."""

    root: Path  # the folder, at the level that counts
    table: Path | None  # the table that names the images
    rows: list[tuple[str, str, str]]  # without a table: every image, "" where it has no class
    notes: list[str]


def find_layout(root: Path, columns: Columns) -> Layout:
    """Find the table, the splits or the class folders at or below ``root``.

    The only folder with images is gone into; a table is used where there are no class folders beside it.
    """
    top, notes, passed = root, list[str](), Counter[str]()
    while True:
        children = _image_folders(root)
        tables = _label_tables(root, columns)
        divided = any(SPLIT_NAMES.get(n.lower()) == "train" and _image_folders(root / n) for n in children)
        classes = divided or (len(children) > 1 and not all(_names_no_class(n) for n in children))
        if tables and not classes:
            if len(tables) > 1:
                raise _unclear(root, "several tables could be that of the labels", tables, root / tables[0])
            return Layout(
                root, root / tables[0], [], [*notes, f"{tables[0]}, beside the images, is the table of labels"]
            )
        if len(children) == 1 and not divided and not _images_in(root / children[0]):
            notes += _strays(root) + _unread(root, children, passed)
            root = root / children[0]
            continue
        break
    if root != top:
        notes.append(f"the classes are the folders in {root.relative_to(top).as_posix()}/, the only folder with images")
    if tables:
        notes.append(
            f"{first_few(tables)} beside the class folders is not used: --data-root '{root / tables[0]}' takes it"
        )
        passed.subtract(Counter(suffix_of(name) for name in tables))
    if children:
        notes += _unread(root, children, passed)
    parts = {name: _image_folders(root / name) for name in children}
    if divided:
        rows = _split_rows(root, children, passed, notes)
    elif not children:
        raise _no_classes(top, root, columns)
    elif not any(name.lower() in SPLIT_NAMES for name in children) and any(
        part.lower() in SPLIT_NAMES for inner in parts.values() for part in inner
    ):
        rows = _rows_of_parts(root, parts, passed, notes)
    else:
        left_out = _refuse_no_classes(root, children, tables, columns)
        notes += [f"{name}/ holds the class folders once more and is left out as a copy" for name in left_out]
        rows = [
            (path, name, "train")
            for name in children
            if name not in left_out
            for path in walk_images(root, name, passed)
        ]
        beside = [f.name for f in subfolders(root.parent) if SPLIT_NAMES.get(f.name.lower(), "train") != "train"]
        if SPLIT_NAMES.get(root.name.lower()) == "train" and beside:
            notes.append(f"{first_few(beside)} beside {root.name}/ is not used: --data-root '{root.parent}' takes all")
    return Layout(root, None, rows, [*notes, *_strays(root), *passed_note(+passed)])


def _split_rows(
    root: Path, children: Sequence[str], passed: Counter[str], notes: list[str]
) -> list[tuple[str, str, str]]:
    rows, others, within = [], [], dict[str, set[str]]()
    for name in children:
        split = SPLIT_NAMES.get(name.lower())  # the paths keep the folder's own spelling
        if split is None:
            others.append(name)
            continue
        folder = _gone_into(root, name)  # train/images/<class>
        classes = _image_folders(root / folder)
        notes += _unread(root, classes, passed, folder)
        for each in classes:
            rows += [(path, each, split) for path in walk_images(root, f"{folder}/{each}", passed)]
            within[each] = within.get(each, set()) | _inner(root, f"{folder}/{each}")
        flat = [f"{folder}/{image}" for image in _images_in(root / folder)]
        if split == "test":  # a test set whose labels are kept elsewhere
            rows += [(path, "", split) for path in flat]
        elif flat:
            notes.append(f"{len(flat):,} images in {folder}/ outside its class folders are left out")
    if others:
        notes.append(f"folders beside the splits are left out: {first_few(others)}")
    names = sorted({label for _, label, _ in rows if label})
    if all(_names_no_class(name) for name in names) and len(names) > 1:
        raise _unclear(root, "the folders in train/ do not name classes", names, None)
    _refuse_shared(root, within)
    return rows


def _rows_of_parts(
    root: Path, parts: Mapping[str, Sequence[str]], passed: Counter[str], notes: list[str]
) -> list[tuple[str, str, str]]:
    """Rows of splits within the class folders; refused where one holds images otherwise, or none is for training."""
    whole = next((root / n for n, inner in parts.items() for p in inner if _image_folders(root / n / p)), None)
    rows = []
    for name, inner in parts.items():
        odd = [part for part in inner if part.lower() not in SPLIT_NAMES] + _images_in(root / name)
        if odd:
            problem = "some class folders hold splits, and one holds other images"
            raise _unclear(root, problem, sorted(parts), whole, f"{name}/ holds {first_few(odd, 3)}")
        notes += _unread(root, inner, passed, name)
        rows += [
            (path, name, SPLIT_NAMES[part.lower()])
            for part in inner
            for path in walk_images(root, f"{name}/{part}", passed)
        ]
    if all(split != "train" for _, _, split in rows):
        raise _unclear(
            root, "the folders in the class folders are splits, and none is for training", sorted(parts), None
        )
    _refuse_shared(root, {name: set().union(*(_inner(root, f"{name}/{p}") for p in parts[name])) for name in parts})
    notes.append("the splits are the folders in each class folder")
    return rows


def _refuse_no_classes(root: Path, children: Sequence[str], tables: Sequence[str], columns: Columns) -> list[str]:
    """Refuse folders that name no class; of those that are copies of the others, the names."""
    within = {name: _inner(root, name) for name in children}
    copies = [name for name in children if len(within[name] & set(children)) > 1]
    for copy in copies:
        images = {path.partition("/")[2] for path in walk_images(root, copy)}
        if not images <= {path for name in children if name != copy for path in walk_images(root, name)}:
            raise _unclear(
                root, f"the folder {copy!r} has folders of the same names as those beside it", children, root / copy
            )
    names = [name for name in children if name not in copies]
    odd = [name for name in names if name.lower() in SPLIT_NAMES]
    table = root / tables[0] if tables else None
    if odd:
        problem = f"the folder {odd[0]!r} names a split, not a class"
        holds = "images, not class folders" if _images_in(root / odd[0]) else first_few(sorted(within[odd[0]]))
        raise _unclear(root, problem, names, table, f"{odd[0]}/ holds {holds}")
    _refuse_shared(root, {name: within[name] for name in names})
    if all(_names_no_class(name) for name in names) or any(_NEVER.fullmatch(name) for name in names):
        beside = f"{first_few(tables)} lies beside them" if tables else ""
        elsewhere = None if tables else _table_elsewhere(root, columns)
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


def _no_classes(top: Path, root: Path, columns: Columns) -> DatasetError:
    """The error for a root without folders of images: what lies in it, or above it."""
    if _images_in(root):
        above = _label_tables(root.parent, columns)
        if not above and (elsewhere := _table_elsewhere(root.parent, columns)):
            raise elsewhere
        beside = _image_folders(root.parent)
        if above:
            return _unclear(
                root, "the images have no labels here", above, root.parent / above[0], "a table beside the folder"
            )
        if len(beside) > 1:
            return _unclear(root, "this is one folder of images, without class folders", beside, root.parent)
    note = passed_note(_all_suffixes(root))
    return layout_error(top, "no class folders with images", "; ".join(note) or None)


def _table_elsewhere(root: Path, columns: Columns) -> DatasetError | None:
    """The error for images whose table lies in a folder beside theirs (``metadata/labels.csv``), if one does."""
    for folder in subfolders(root):
        for table in _label_tables(folder, columns):
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
    return layout_error(
        root,
        problem,
        first_few(seen) + (f" ({more})" if more else ""),
        f"--data-root '{instead}', or {table}" if instead else table,
    )


def layout_error(root: Path, problem: str, found: str | None = None, fix: str | None = None) -> DatasetNotFoundError:
    """The error for a folder whose classes cannot be told."""
    entries = [entry.name for entry in list_folder(root)] if root.is_dir() else []
    return DatasetNotFoundError(
        problem,
        expected=EXPECTED,
        found=found or (first_few(entries) or "an empty folder" if root.is_dir() else "a file"),
        where=root,
        fix=fix or "make one sub-folder per class, or a table, and name it with --data-root",
    )


def _label_tables(folder: Path, columns: Columns) -> list[str]:
    """Tables of paths and labels in a folder, by their header; and those whose header cannot be read."""
    found = []
    for entry in list_folder(folder):
        if os.path.splitext(entry.name)[1].lower() in TABLE_SUFFIXES and entry.is_file():  # noqa: PTH122
            try:
                header, _ = open_table(folder / entry.name, rows=1)
            except DatasetError:  # if it is the only one, reading it says why
                header = None
            if header is None or may_hold_labels(header.columns.tolist(), columns):
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
    told = f"{len(strays):,} images outside the class folders are left out ({first_few(strays, 3)})"
    return [told] if strays else []


def _unread(root: Path, children: Sequence[str], passed: Counter[str], folder: str = "") -> list[str]:
    """Count the other files in a folder; a note on folders there whose files are all of no format that is read."""
    told = []
    for entry in list_folder(root / folder):
        own = Counter[str]()
        path = f"{folder}/{entry.name}" if folder else entry.name
        if entry.is_dir() and entry.name not in children:
            list(walk_images(root, path, own))
            told += [f"{path} ({suffix_counts(own)})"] if own else []
        elif entry.is_file() and not is_image_file(root / folder, entry.name):
            own[suffix_of(entry.name)] += 1
        passed.update(own)
    return [f"folders without an image that can be read are left out: {first_few(told)}"] if told else []


def _all_suffixes(root: Path) -> Counter[str]:
    passed: Counter[str] = Counter()
    for _ in walk_images(root, "", passed):
        pass
    return passed
