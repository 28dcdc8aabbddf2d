"""What is there of a dataset, without needing all of it: the answers of ``embcache datasets``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embcache.data.checks import SPLITS
from embcache.data.dataset import ImageDataset, group_identical, read_snapshot
from embcache.data.files import locate_files
from embcache.data.groups import overlap_notes
from embcache.data.source import (
    DATASETS,
    DatasetSource,
    choose_name,
    default_root,
    find_source,
    refusals_told,
    resolve_root,
)
from embcache.errors import DatasetNotFoundError, EmbcacheError
from embcache.paths import PathLike, home_dir


@dataclass(frozen=True, eq=False)
class Survey:
    """A dataset as its labels name it, and which of its images are there.

    Attributes
    ----------
    dataset : ImageDataset
        Every labelled row, whether or not its image is there; ``missing`` names the files that are not.
    present : ndarray of bool, shape (n,)
        Which rows have their image.
    source : DatasetSource
        The loader.
    """

    dataset: ImageDataset
    present: npt.NDArray[np.bool_]
    source: DatasetSource

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
    """One row of the list of datasets: what is found, or why nothing is.

    Attributes
    ----------
    name, description : str
    found : Survey or None
    root : Path or None
        Where it is, or is looked for; None for a folder dataset that nobody has named.
    problem : str
        Why there is no survey; empty where there is one, and where the images were merely never put there.
    """

    name: str
    description: str
    found: Survey | None
    root: Path | None
    problem: str = ""


def survey_dataset(name: str, root: PathLike | None = None, home: PathLike | None = None) -> Survey:
    """Look at a dataset: counts from its labels, and which images are there. Missing images are no error.

    Parameters
    ----------
    name : str
        As for `find_dataset`: a loader, or a cached dataset.
    root, home : path, optional
        As for `load_dataset`; nothing is drawn.

    Raises
    ------
    DatasetNotFoundError
        Neither the labels nor a snapshot of them are there.
    DatasetError
        The labels are broken.
    """
    cached = read_snapshot(name, home) if root is None else None
    if cached is not None and not (cached.origin is not None and cached.origin.exists()):
        note = "the folder is gone: this is the snapshot that extraction kept"
        cached = replace(
            cached, notes=(*cached.notes, note), missing=tuple(dict.fromkeys(cached.table["path"].tolist()))
        )
        return Survey(cached, np.zeros(len(cached), dtype=bool), find_source(cached.kind))
    source = find_source(cached.kind if cached is not None else name)
    with refusals_told():
        folder = resolve_root(source, cached.origin if cached is not None else root, home, draw=False)
        ds = source.read(folder, choose_name(source, folder, cached.name if cached is not None else None))
        return _compare(replace(ds, origin=folder), source)


def _compare(ds: ImageDataset, source: DatasetSource) -> Survey:
    """Every row kept, with groups and notes as loading would give them."""
    if ds.root is None:
        return Survey(ds, np.ones(len(ds), dtype=bool), source)
    paths = ds.table["path"].tolist()
    sizes = locate_files(ds.root, paths, sizes=source.merge_identical)
    ds = replace(ds, missing=tuple(path for path, size in sizes.items() if size is None))
    if source.merge_identical:
        ds = group_identical(ds, sizes)
    else:
        ds = replace(ds, notes=(*ds.notes, *overlap_notes(ds.table)))
    return Survey(ds, np.array([sizes[path] is not None for path in paths], dtype=bool), source)


def list_datasets(home: PathLike | None = None) -> list[Listed]:
    """Every dataset that loads by name, and every other one that is cached; what is broken is told, not raised."""
    cached = [name for name in _cached_names(home) if name not in DATASETS]
    rows = []
    for name in [*DATASETS, *cached]:
        if name == "folder":
            rows.append(Listed(name, DATASETS[name].description, None, None))
            continue
        try:
            survey = survey_dataset(name, home=home)
            rows.append(Listed(name, survey.source.description, survey, survey.dataset.root))
        except EmbcacheError as error:
            expected_root = default_root(name, home)
            problem = "" if isinstance(error, DatasetNotFoundError) and not expected_root.exists() else error.problem
            description = DATASETS[name].description if name in DATASETS else ""
            rows.append(Listed(name, description, None, expected_root, problem))
    return rows


def _cached_names(home: PathLike | None) -> Sequence[str]:
    names = []
    for path in sorted(home_dir(home).glob("*/dataset.parquet")):
        try:
            names.append(ImageDataset.from_parquet_bytes(path.read_bytes()).name)
        except (EmbcacheError, OSError):  # `embcache doctor` is for those; a list goes on
            continue
    return names
