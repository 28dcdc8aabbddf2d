"""Reading cached features: one store, and finding the stores that are there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from embcache.errors import StoreError, printable
from embcache.io import home_folders, not_readable, skip
from embcache.notebook import html_table
from embcache.paths import PathLike, home_dir, slug
from embcache.store.features import Features
from embcache.store.header import StoreHeader
from embcache.store.messages import (
    NamedTable,
    describe_differences,
    extract_command,
    nothing_matches,
    several_match,
)
from embcache.store.reading import (
    LiveRows,
    committed_numbers,
    plan_numbers,
    read_commit,
    read_header,
    read_live,
    read_plan,
    read_plans,
    row_sources,
    unless_collected,
)
from embcache.store.recipe import Recipe
from embcache.store.rows import PlanEntry

__all__ = [
    "PIXELS",
    "FeatureStore",
    "NamedTable",
    "describe_differences",
    "extract_command",
    "list_stores",
    "open_store",
    "store_folders",
]

# What stands for the backbone in the recipe of a store whose rows are images, decoded and resized.
PIXELS = "pixels"


@dataclass(frozen=True, repr=False)
class FeatureStore:
    """Cached features of one backbone over one dataset, under one recipe.

    ``ids``, ``features``, ``quarantined`` and ``digests`` describe the store as it was when first asked for one of
    them; ``plans()``, ``committed()`` and ``sources()`` look at the disk each time. Nothing here writes.

    Parameters
    ----------
    path : Path
        The store's folder.
    keep : tuple of str, optional
        Ids to show, in this order; see :meth:`restrict`. Default: all, in shard order.

    Attributes
    ----------
    recipe : Recipe
        What determines the features.
    format : {"zarr", "hdf5"}
        File format of the shards.
    row_shape : tuple of int
        Shape of one row of features.
    rows_per_shard, batch_size, threads : int
        As the store was created with.
    provenance : mapping of str to JSON
        Where the features come from, for people.

    Raises
    ------
    CorruptStoreError
        From any method: bytes on disk are not those that were committed.
    """

    path: Path
    keep: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        self._header  # noqa: B018  # a damaged recipe is told at once

    @cached_property
    def _header(self) -> StoreHeader:
        return read_header(self.path)

    @cached_property
    def _live(self) -> LiveRows:
        return read_live(self.path, self._header)

    @cached_property
    def _shown(self) -> np.ndarray:
        """Places in ``_live`` of the rows that are shown, valid or not."""
        if self.keep is None:
            return np.arange(len(self._live.ids))
        place = {id_: i for i, id_ in enumerate(self._live.ids)}
        return np.array([place[id_] for id_ in self.keep if id_ in place], dtype=np.int64)

    @cached_property
    def _usable(self) -> np.ndarray:
        return cast("np.ndarray", self._shown[self._live.valid[self._shown]])

    @property
    def recipe(self) -> Recipe:
        """What determines the features."""
        return self._header.recipe

    @property
    def format(self) -> str:
        """File format of the shards: ``zarr`` or ``hdf5``."""
        return self._header.format

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row of features."""
        return self._header.row_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the features, as stored."""
        return np.dtype(self.recipe.dtype)

    @property
    def holds_pixels(self) -> bool:
        """Whether a row is an image, uint8 (H, W, 3), and not its features."""
        return self.recipe.backbone == PIXELS

    @property
    def views(self) -> int:
        """Views of an image in one row: 1 for rows (D,), V for rows (V, D) of which the first is the plain image."""
        return self.row_shape[0] if len(self.row_shape) == 2 else 1

    @property
    def rows_per_shard(self) -> int:
        """Rows of a full shard."""
        return self._header.rows_per_shard

    @property
    def batch_size(self) -> int:
        """Batch size that the store was created with."""
        return self._header.batch_size

    @property
    def threads(self) -> int:
        """Threads that the store was created with."""
        return self._header.threads

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where the features come from, for people."""
        return self._header.provenance

    @property
    def dataset(self) -> str:
        """Folder name of the store's dataset."""
        return self.path.parent.name

    def plans(self) -> dict[int, tuple[PlanEntry, ...]]:
        """Rows that each published shard owes or owed, by number, ascending."""
        return read_plans(self.path)

    def committed(self) -> tuple[int, ...]:
        """Numbers of the committed shards, ascending."""
        return tuple(committed_numbers(self.path))

    def sources(self) -> dict[str, PlanEntry]:
        """State of the source file that each live row was made from, valid or not.

        Size and modification time are those seen when the row was planned; the digest is that of the decoded bytes.
        """
        return self.sources_and_reasons()[0]

    def sources_and_reasons(self) -> tuple[dict[str, PlanEntry], dict[str, str]]:
        """:meth:`sources`, and by id why a live row is not valid, of one look at the disk."""

        def look() -> tuple[LiveRows, list[PlanEntry]]:
            live = read_live(self.path, self._header)
            return live, row_sources(live, {n: read_plan(self.path, n) for n in set(live.shards.tolist())})

        live, held = unless_collected(self.path, look)
        reasons = {id_: reason for id_, reason in zip(live.ids, live.reasons, strict=True) if reason}
        return {entry.id: entry for entry in held}, reasons

    @cached_property
    def ids(self) -> np.ndarray:
        """Ids of the rows of ``features``, str (N,): live, readable, and shown."""
        return np.array([self._live.ids[i] for i in self._usable], dtype=np.str_)

    @cached_property
    def features(self) -> Features:
        """Features (N, *row_shape), rows as ``ids``. Index it to read: ``features[:]``."""
        return Features(self.path, self._header, self._live.shards[self._usable], self._live.positions[self._usable])

    @cached_property
    def quarantined(self) -> dict[str, str]:
        """Why an image could not be read, by id, of the shown rows."""
        return {self._live.ids[i]: self._live.reasons[i] for i in self._shown if not self._live.valid[i]}

    @cached_property
    def digests(self) -> dict[str, str]:
        """Sha256 of the image's bytes, by id, of the shown and readable rows for which it is known.

        Not of quarantined ones: two files that are cut to nothing are not one image of two patients.
        """
        live = self._live
        return {live.ids[i]: live.digests[i] for i in self._usable if live.digests[i]}

    def restrict(self, ids: Iterable[str]) -> FeatureStore:
        """Return the same store showing only ``ids``, in their order; those that it does not hold are passed over."""
        return FeatureStore(self.path, tuple(dict.fromkeys(map(str, ids))))

    def rows_of(self, ids: Iterable[str]) -> np.ndarray:
        """Return where in ``features`` the rows of images are, int64 (n,); -1 for an image that has none.

        Parameters
        ----------
        ids : iterable of str, length n
            Of the images.
        """
        place = {id_: row for row, id_ in enumerate(self.ids.tolist())}
        return np.array([place.get(id_, -1) for id_ in ids], dtype=np.int64)

    def arrays(self, ds: NamedTable, split: str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features, labels and groups of a dataset's rows, in the dataset's order, quarantined rows left out.

        Parameters
        ----------
        ds : ImageDataset
            Anything with ``name`` and a ``table`` that has the columns ``id, label, group, split``.
        split : {"train", "test", "val"}, optional
            Only the rows of this split.

        Returns
        -------
        X : ndarray (n, *row_shape)
            Of the stored dtype.
        y : ndarray of int64 (n,)
            Labels; -1 where there is none.
        groups : ndarray of str (n,)
            Patient, slide or whatever must not be divided.

        Raises
        ------
        StoreError
            The store has not got all of the asked rows: it is not complete for this dataset.
        """
        table = ds.table if split is None else ds.table[ds.table["split"] == split]
        wanted = [str(id_) for id_ in table["id"]]
        rows = self.rows_of(wanted)
        kept = rows >= 0
        absent = [id_ for id_, there in zip(wanted, kept, strict=True) if not there and id_ not in self.quarantined]
        if absent:
            raise StoreError(
                f"{len(absent):,} of {len(wanted):,} images have no features yet",
                found=f"no row for {absent[0]!r}" + (f" and {len(absent) - 1:,} more" if len(absent) > 1 else ""),
                where=self.path,
                fix=extract_command(self.recipe.backbone, ds),
            )
        labels = table["label"].to_numpy(dtype=np.int64)[kept]
        groups = np.array([str(group) for group in table["group"]], dtype=np.str_)[kept]
        return self.features[rows[kept]], labels, groups

    def __len__(self) -> int:
        return len(self._usable)

    def _facts(self) -> list[tuple[str, str]]:
        """What a person wants to know of it, as (name, value). No features are read.

        An HDF5 shard is one file that is verified whole before it is parsed: unless its rows were asked for before,
        they are counted from the commits, which do not tell how many are quarantined or superseded.
        """
        each = " × ".join(map(str, self.row_shape))
        facts = [("rows", f"{each} {self.dtype}" + (f", {self.views} views of an image" if self.views > 1 else ""))]
        try:
            numbers = self.committed()
            if self.format == "zarr" or "_live" in self.__dict__:
                facts += [("images", f"{len(self):,}"), ("quarantined", f"{len(self.quarantined):,}")]
            else:
                rows = sum(read_commit(self.path, number).rows for number in numbers)
                facts.append(("images", f"{rows:,} rows committed, quarantined ones among them"))
            owed = len(set(plan_numbers(self.path)) - set(numbers))
            facts.append(("shards", f"{len(numbers):,} ({self.format})" + (f", {owed:,} owed" if owed else "")))
        except StoreError as error:  # a repr says so and does not raise; whoever reads rows gets the whole message
            facts.append(("unreadable", error.problem))
        facts += [("shown", f"restricted to {len(self.keep):,} ids")] if self.keep is not None else []
        recipe = self.recipe
        made = f"{recipe.fingerprint[:12]} ({recipe.backbone}, {recipe.precision}, {recipe.pooling})"
        return [*facts, ("recipe", made), ("path", str(self.path))]

    def __repr__(self) -> str:
        lines = [f"  {name}: {value}" for name, value in self._facts()]
        return printable("\n".join([f"FeatureStore({self.recipe.backbone!r} over {self.dataset!r}", *lines]) + ")")

    def _repr_html_(self) -> str:
        return html_table(f"FeatureStore {self.recipe.backbone} over {self.dataset}", self._facts())


def folders_with(
    name: str,
    home: PathLike | None = None,
    dataset: str | None = None,
    skipped: Callable[[PathLike, OSError], object] = skip,
) -> list[Path]:
    """Folders under those of a dataset, or of every one, that hold an entry of this name, sorted."""
    root, found = home_dir(home), []
    for folder in home_folders(root, skipped) if dataset is None else [root / slug(dataset)]:
        try:
            paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise not_readable(folder, error) from error
        for path in paths:
            try:
                with suppress(FileNotFoundError, NotADirectoryError):
                    os.lstat(path / name)
                    found.append(path)
            except OSError as error:
                skipped(path, error)
    return found


def store_folders(home: PathLike | None = None, dataset: str | None = None) -> list[Path]:
    """Folders that hold a recipe, sorted by dataset and name; nothing in them is read."""
    return folders_with("recipe.json", home, dataset)


def list_stores(
    home: PathLike | None = None, dataset: str | None = None, *, pixels: bool = False
) -> list[FeatureStore]:
    """All stores of features under ``home``, of one dataset or of every one; with ``pixels`` those of pixels too.

    Reads their recipes only, until rows are asked for. A store whose recipe is damaged or cannot be read is skipped,
    with a line in the log: in a shared home one of them does not end what others do.

    Raises
    ------
    StoreError
        The home, or the folder of the one dataset, cannot be listed.
    """
    stores = []
    for path in store_folders(home, dataset):
        try:
            stores.append(FeatureStore(path))
        except StoreError as error:
            skip(path, error)
    return [store for store in stores if pixels or not store.holds_pixels]


def open_store(
    backbone: str,
    dataset: str | NamedTable,
    home: PathLike | None = None,
    recipe: str | None = None,
    views: int | None = None,
) -> FeatureStore:
    """Open the cached features of a backbone over a dataset. Never computes.

    Parameters
    ----------
    backbone : str
        Name as given to ``embcache extract``.
    dataset : str or ImageDataset
        Its name; or the dataset, and then rows are shown in its order and those of images that it has not are hidden.
    home : path-like, optional
        Folder of stores; default ``$EMBCACHE_HOME``, else ``~/.cache/embcache``.
    recipe : str, optional
        First digits of the fingerprint, where several recipes are cached.
    views : int, optional
        Only a store with so many views of each image: rows (D,) for one, (V, D) for more. Default: one view, and
        where features are only cached in several, those.

    Raises
    ------
    StoreNotFoundError
        Nothing matches.
    RecipeError
        Several recipes match; the message lists in what they differ.
    CorruptStoreError
        The store's recipe is damaged.
    """
    name = dataset if isinstance(dataset, str) else dataset.name
    folders = [path for path in store_folders(home, name) if not _named(path, PIXELS)]
    stores = [FeatureStore(path) for path in folders if _named(path, backbone)]
    fitting = [s for s in stores if s.recipe.fingerprint.startswith(recipe or "")]
    plain = [s for s in fitting if s.views == 1]
    matching = (plain or fitting) if views is None else [s for s in fitting if s.views == views]
    if not matching:
        raise nothing_matches(backbone, dataset, home, recipe, views, folders, stores)
    if len(matching) > 1:
        raise several_match(backbone, dataset, matching)
    found = matching[0]
    return found if isinstance(dataset, str) else found.restrict(dataset.table["id"])


def _named(path: Path, backbone: str) -> bool:
    return re.fullmatch(re.escape(slug(backbone)) + "-[0-9a-f]{12}", path.name) is not None
