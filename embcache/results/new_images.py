"""What to predict: images and folders as a user names them, or the images of a dataset."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embcache.config import DatasetRef
from embcache.data.dataset import ImageDataset
from embcache.data.files import IMAGE_SUFFIXES, TABLE_SUFFIXES, passed_note, settle_paths, walk_images
from embcache.data.groups import UNGROUPED, known_groups, merge_groups, patient_keys
from embcache.data.images import ImageRef, image_refs
from embcache.data.roles import find_columns, find_groups
from embcache.data.tables import named_columns, open_table
from embcache.errors import DatasetError, DatasetNotFoundError, UsageError
from embcache.extract.scan import image_root
from embcache.paths import PathLike


@dataclass(frozen=True)
class Asked:
    """Images to predict."""

    root: Path  # what the paths of the sources are relative to
    names: tuple[str, ...]  # what the user calls them
    sources: tuple[ImageRef, ...]  # where they are
    reasons: tuple[str, ...]  # why an image need not be tried; ``""`` where it may be
    groups: tuple[str, ...]  # patient, slide … of each image; ``""`` where it is not known
    notes: tuple[str, ...] = ()  # what was inferred of tables


def images_of_dataset(ds: ImageDataset) -> Asked:
    """All images of a dataset, by their ids; `DatasetNotFoundError` where its folder is not here."""
    sources = tuple(image_refs(ds.table))
    known = ds.grouped and UNGROUPED not in ds.notes
    groups = tuple(ds.table["group"].tolist()) if known else ("",) * len(sources)
    return Asked(image_root(ds), tuple(ds.table["id"]), sources, ("",) * len(sources), groups)


def images_of_paths(paths: Sequence[PathLike], columns: DatasetRef = DatasetRef()) -> Asked:
    """Images anywhere in the file system, by their paths as named; links are followed to where they lead."""
    notes: list[str] = []
    found = list_images(paths, notes, columns)
    real = [os.path.realpath(path) for path in found]
    sources = tuple(ImageRef(str(k), path.removeprefix(Path(path).anchor), "") for k, path in enumerate(real))
    reasons = tuple(map(_not_readable, real))
    # Groups by PatientID are called after their first image: a PatientID is in no answer.
    anchor, asked = Path(Path.cwd().anchor), [k for k, why in enumerate(reasons) if not why]
    patients = patient_keys(anchor, [sources[k].path for k in asked]) or []
    names = [str(path) for path in found]
    known = [(names[k], patient) for k, patient in zip(asked, patients, strict=False) if patient]
    of = dict(zip((n for n, _ in known), merge_groups([n for n, _ in known], [p for _, p in known]), strict=True))
    groups = tuple(group or of.get(str(path), "") for path, group in found.items())
    return Asked(anchor, tuple(names), sources, reasons, groups, tuple(notes))


def list_images(paths: Sequence[PathLike], notes: list[str], columns: DatasetRef = DatasetRef()) -> dict[Path, str]:
    """The named files, those that tables name, and the images in and below the named folders (sorted), each once.

    A file that was named is kept whatever its name, but for a CSV, TSV, Parquet or Excel file: it is a table with a
    column ``path``, relative to its folder, and perhaps ``group``, or columns with names that are as usual or that
    ``columns`` names; labels are not looked at. Linked folders inside folders are not followed. What was inferred, and
    how many other files the folders hold, is added to ``notes``.
    """
    found: dict[Path, str] = {}
    passed = Counter[str]()
    tables = any(Path(path).suffix.lower() in TABLE_SUFFIXES for path in paths)
    if unused := [role for role in named_columns(columns) if not tables or role not in ("path", "group")]:
        raise UsageError(
            "predicting images needs no such column" if tables else "there is no table that could have columns",
            found=" ".join(f"--{role}-column" for role in unused),
            expected="--path-column and --group-column, with a table",
        )
    for path in map(Path, paths):
        if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
            found |= _listed(path, notes, columns)
            continue
        if not path.is_dir():
            found.setdefault(path, "")
            continue
        inside = [path / image for image in walk_images(path, "", passed, refuse=False)]
        if not inside:
            raise DatasetNotFoundError(
                "a folder holds no images",
                expected="files that end in " + ", ".join(sorted(IMAGE_SUFFIXES)),
                found=", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "an empty folder",
                where=path,
                fix="name the images themselves, or the folder they are in",
            )
        found |= {image: found.get(image, "") for image in inside}
    notes += passed_note(passed)
    return found


def _listed(file: Path, notes: list[str], wanted: DatasetRef) -> dict[Path, str]:
    """Images that a table names, with their groups."""
    table, read = open_table(file)
    columns, named = find_columns(table, wanted, where=file, required=["path"], roles=["path"])
    column = columns["path"]
    if table.empty or not all(table[column]):
        raise DatasetError("a row of a table names no image", expected="a path in every row", where=file)
    paths, settled = settle_paths(file.parent.resolve(), table[column].tolist())
    free = table if column == wanted.group_column else table.drop(columns=column)
    _, group, told = find_groups(free, wanted, [-1] * len(paths), paths, where=file, refuse=False)
    notes += [*read, *named, *settled, *told]
    groups = known_groups(table[group].tolist()) if group else [""] * len(paths)
    return {file.parent / path: name for path, name in zip(paths, groups, strict=True)}


def _not_readable(path: str) -> str:
    """Why a file need not even be opened; ``""`` where it may be tried."""
    try:
        os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return "the file is not there"
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    return "" if os.access(path, os.R_OK) else "the file may not be read"
