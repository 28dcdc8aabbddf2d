"""What is there of a dataset, without needing all of it: the answers of ``embcache datasets``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embcache.data.checks import SPLITS
from embcache.data.chosen import Columns
from embcache.data.dataset import ImageDataset, columns_of, join_groups, read_snapshot
from embcache.data.files import locate_files
from embcache.data.published import (
    DATASETS,
    DatasetSource,
    choose_name,
    default_root,
    find_source,
    refusals_told,
    resolve_root,
)
from embcache.errors import DatasetError, DatasetNotFoundError, EmbcacheError, first_few
from embcache.io import home_folders, skip
from embcache.paths import PathLike, home_dir


@dataclass(frozen=True, eq=False)
class Survey:
    """A dataset as its labels name it, and which of its images are there."""

    dataset: ImageDataset  # every labelled row, whether or not its image is there
    present: npt.NDArray[np.bool_]  # (n,); which rows have their image
    source: DatasetSource  # the loader

    def splits(self) -> list[str]:
        """The splits that have rows, in the order train, val, test."""
        there = set(self.dataset.table["split"].tolist())
        return [split for split in SPLITS if split in there]

    def count(self, split: str, label: int | None = None) -> tuple[int, int]:
        """(rows, rows whose image is there) of a split, of one label or of all."""
        wanted = (self.dataset.table["split"] == split).to_numpy()
        if label is not None:
            wanted = wanted & (self.dataset.labels == label)
        return int(wanted.sum()), int((wanted & self.present).sum())

    def group_count(self, split: str) -> int:
        """Number of groups with rows in a split."""
        return int(self.dataset.table.loc[self.dataset.table["split"] == split, "group"].nunique())

    def to_dict(self) -> dict[str, Any]:
        """The survey as plain data, for JSON."""
        ds = self.dataset
        names = [*enumerate(ds.class_names), *([(-1, "unlabelled")] if (ds.labels < 0).any() else [])]
        return {
            "name": ds.name,
            "kind": ds.kind,
            "description": self.source.description,
            "root": str(ds.root),
            "metric": ds.metric,
            "subset_sizes": dict(ds.subset_sizes),
            "images": len(ds),
            "images_found": int(self.present.sum()),
            "classes": {name: {s: self.count(s, c)[0] for s in self.splits()} for c, name in names},
            "classes_found": {name: {s: self.count(s, c)[1] for s in self.splits()} for c, name in names},
            "groups": {split: self.group_count(split) for split in self.splits()},
            "missing": list(ds.missing),
            "notes": list(ds.notes),
        }


@dataclass(frozen=True)
class Listed:
    """One row of the list of datasets: what is found, or why nothing is."""

    name: str
    description: str
    found: Survey | None
    root: Path | None  # where it is, or is looked for; None for a folder dataset that nobody has named
    problem: str = ""  # why there is no survey


def survey_dataset(
    name: str, root: PathLike | None = None, home: PathLike | None = None, columns: Columns = Columns()
) -> Survey:
    """Look at a dataset: counts from its labels, and which images are there. Missing images are no error."""
    cached = read_snapshot(name, home) if root is None or name not in DATASETS else None
    if cached is None:
        return _survey_files(find_source(name, home), root, home, None, columns)
    source = find_source(cached.kind)
    columns, told = columns_of(cached, root, columns)
    if root is not None:
        survey = _survey_files(source, root, home, cached.name, columns)
        return replace(survey, dataset=replace(survey.dataset, notes=(*survey.dataset.notes, *told)))
    for folder in (cached.origin, None if cached.kind == "folder" else default_root(cached.kind, home)):
        if folder is not None and folder.exists():
            try:
                return _survey_files(source, folder, home, cached.name, columns)
            except DatasetNotFoundError:  # the folder has been emptied, or is another thing of that name
                continue
    note = "the folder is gone: this is the snapshot that extraction kept"
    missing = tuple(dict.fromkeys(cached.table["path"].tolist()))
    return Survey(
        replace(cached, notes=(*cached.notes, note), missing=missing), np.zeros(len(cached), dtype=bool), source
    )


def list_datasets(home: PathLike | None = None) -> list[Listed]:
    """Every dataset that loads by name, and every other one that is cached; what is broken is told, not raised."""
    rows = [_list_one(name, DATASETS[name].description, default_root(name, home), home) for name in DATASETS]
    for ds in _cached_datasets(home):
        if ds.name not in DATASETS:
            what = (
                f"cached, from a {ds.kind}: {first_few(ds.class_names, 4)}"
                if ds.kind == "folder"
                else f"cached, as {ds.kind}"
            )
            rows.append(_list_one(ds.name, what, ds.origin, home))
    return rows


def _list_one(name: str, description: str, root: Path | None, home: PathLike | None) -> Listed:
    if name == "folder":
        return Listed(name, description, None, None)
    try:
        survey = survey_dataset(name, home=home)
    except EmbcacheError as error:
        absent = isinstance(error, DatasetNotFoundError) and (root is None or not root.exists())
        return Listed(name, description, None, root, "" if absent else error.problem)
    return Listed(name, description, survey, survey.dataset.origin)


def _survey_files(
    source: DatasetSource, root: PathLike | None, home: PathLike | None, name: str | None, columns: Columns
) -> Survey:
    with refusals_told():
        folder = resolve_root(source, root, home, draw=False)
        return _compare(source.load(folder, choose_name(source, folder, name), columns), source)


def _compare(ds: ImageDataset, source: DatasetSource) -> Survey:
    """Every row kept, with groups and notes as loading would give them."""
    if ds.root is None:
        return Survey(ds, np.ones(len(ds), dtype=bool), source)
    paths = ds.table["path"].tolist()
    sizes = locate_files(ds.root, paths, sizes=source.merge_identical)
    ds = replace(ds, missing=tuple(path for path, size in sizes.items() if size is None))
    ds = join_groups(ds, source, sizes)
    return Survey(ds, np.array([sizes[path] is not None for path in paths], dtype=bool), source)


def _cached_datasets(home: PathLike | None) -> list[ImageDataset]:
    found = []
    for folder in home_folders(home_dir(home)):
        try:
            dataset = read_snapshot(folder.name, home)
        except DatasetError as error:
            skip(folder, error)
            continue
        found += [dataset] if dataset is not None else []
    return found
