"""Reading cached features: one store, and finding the existing stores."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex, cast, runtime_checkable

import numpy as np

from embcache.cores import usable_cores
from embcache.errors import RecipeError, StoreError, StoreNotFoundError, printable
from embcache.fields import bare_name
from embcache.io import mirror_of
from embcache.mirror import shown_home
from embcache.notebook import html_table
from embcache.partitions import Partition
from embcache.paths import PathLike, data_dir, home_dir, home_folders, not_readable, skip, slug
from embcache.store import reading
from embcache.store.schema import PlanEntry, Recipe, StoreHeader
from embcache.targets import Target, make_target

if TYPE_CHECKING:
    import pandas as pd

PIXELS = "pixels"
"""Stands for the backbone in the recipe of a store whose rows are images, decoded and resized."""

Rows = slice | SupportsIndex | np.ndarray | list[int]
_FEW = 2  # shards that are read one by one, the last of them kept for reading the next rows
_REQUESTS = 16  # shards of an object store at a time: what takes long is waiting for the answers
_THREADS = 4  # reading and checking are at the speed of the memory long before there are more


class NamedTable(Protocol):
    """What a store needs of a dataset; an ImageDataset has it."""

    @property
    def name(self) -> str:
        """Name of the dataset."""

    @property
    def table(self) -> pd.DataFrame:
        """One row per image: at least ``id``, ``label``, ``group``, ``split``."""


@runtime_checkable
class Targeted(NamedTable, Protocol):
    """A dataset that says what is predicted of it, as an ImageDataset does."""

    @property
    def task(self) -> Target:
        """What is predicted."""


@runtime_checkable
class LoadedDataset(NamedTable, Protocol):
    """A dataset that knows how it was loaded, as an ImageDataset does."""

    layout: str
    root: Path | None
    origin: Path | None
    missing: Sequence[str]

    def read_options(self) -> list[str]:
        """Options of the command line that say how its table was read."""


class Features:
    """A view over the live rows of a store's shards, as an array that is read when indexed.

    ``features[:]``, ``features[3]``, ``features[10:20]``, ``features[[4, 2]]`` and boolean masks select rows and return
    numpy arrays. Shards that hold none of the selected rows are not read; those that do are verified first.
    """

    def __init__(self, path: Path, header: StoreHeader, shards: np.ndarray, positions: np.ndarray) -> None:
        self._path, self._header, self._shards, self._positions = path, header, shards, positions
        self._last: tuple[int, np.ndarray] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, *row_shape)."""
        return (len(self._shards), *self._header.row_shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """As stored."""
        return self._header.dtype

    @property
    def shards(self) -> np.ndarray:
        """Number of the shard that each row lies in, int64 (N,); read-only."""
        shards = self._shards.view()
        shards.flags.writeable = False
        return shards

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, rows: Rows) -> np.ndarray:
        chosen = self._shards[rows]
        shards, positions = np.ravel(chosen), np.ravel(self._positions[rows])
        out = np.empty((len(shards), *self._header.row_shape), self.dtype)
        order = np.argsort(shards, kind="stable")
        starts = np.flatnonzero(np.diff(shards[order], prepend=-1))

        def take(part: np.ndarray, read: Callable[[int], np.ndarray]) -> None:
            out[_run(part)] = read(int(shards[part[0]]))[_run(positions[part])]

        parts = np.split(order, starts[1:]) if len(order) else []  # places in out, one part per shard
        if len(parts) <= _FEW:
            for part in parts:
                take(part, self._shard)
        elif parts:
            self._last = None
            read = partial(reading.read_features, self._path, self._header)
            threads = min(_THREADS, usable_cores()) if mirror_of(self._path) is None else _REQUESTS
            with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
                list(pool.map(lambda part: take(part, read), parts))  # the first error is raised
        return out.reshape(*np.shape(chosen), *self._header.row_shape)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("features are read from disk: an array of them is always a copy")
        return self[:].astype(dtype or self.dtype, copy=False)

    def __repr__(self) -> str:
        return f"Features({self.shape} {self.dtype}; index to read, [:] for all)"

    def _shard(self, number: int) -> np.ndarray:
        # Row after row is a common way to read; shards are immutable, so the last one need not be read again.
        last, self._last = self._last, None
        if last is None or last[0] != number:
            last = None  # freed before the next is read: a shard of pixels takes 25 MB
            last = (number, reading.read_features(self._path, self._header, number))
        self._last = last
        return last[1]


def _run(rows: np.ndarray) -> np.ndarray | slice:
    """Rows without gaps as a slice, which is copied at once."""
    return slice(int(rows[0]), int(rows[-1]) + 1) if bool((np.diff(rows) == 1).all()) else rows


@dataclass(frozen=True, repr=False)
class FeatureStore:
    """Cached features of one backbone over one dataset, under one recipe.

    ``ids``, ``features``, ``quarantined`` and ``digests`` describe the store as it was when one of them, or
    ``sources()``, was first read; ``plans()``, ``committed()`` and ``sources()`` look at the disk each time. Nothing
    here writes.

    Any method raises a `CorruptStoreError` where bytes on disk are not those that were committed, and a `StoreError`
    where the store has a form that this version does not read.

    Parameters
    ----------
    path : Path
        The store's folder.
    keep : tuple of str, optional
        Ids to show, in this order; see :meth:`restrict`. Default: all, in shard order.
    """

    path: Path
    keep: tuple[str, ...] | None = None
    recipe: Recipe = field(init=False, compare=False)
    format: str = field(init=False, compare=False)  # "zarr" or "hdf5"
    row_shape: tuple[int, ...] = field(init=False, compare=False)  # of one row of features
    rows_per_shard: int = field(init=False, compare=False)  # as are the next three, settled when it was created
    batch_size: int = field(init=False, compare=False)
    threads: int = field(init=False, compare=False)
    runtime: str = field(init=False, compare=False)  # what executes the network
    provenance: Mapping[str, Any] = field(init=False, compare=False)  # where the features come from, for people

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        for name, value in vars(self._header).items():
            object.__setattr__(self, name, value)

    @cached_property
    def _header(self) -> StoreHeader:
        return reading.read_header(self.path)

    @cached_property
    def _live(self) -> reading.LiveRows:
        return reading.read_live(self.path, self._header)

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
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the features, as stored."""
        return self._header.dtype

    @property
    def holds_pixels(self) -> bool:
        """Whether a row is an image, uint8 (H, W, 3), and not its features."""
        return self.recipe.backbone == PIXELS

    @property
    def views(self) -> int:
        """Views of an image in one row: 1 for rows (D,), V for rows (V, D) of which the first is the plain image."""
        return self.row_shape[0] if len(self.row_shape) == 2 and not self.holds_patches else 1

    @property
    def holds_patches(self) -> bool:
        """Whether a row is (T, D), one vector per patch."""
        return self.recipe.pooling.startswith("patches")

    @property
    def dataset(self) -> str:
        """Folder name of the store's dataset."""
        return self.path.parent.name

    def plans(self, but: Container[int] = ()) -> dict[int, tuple[PlanEntry, ...]]:
        """Rows that each published shard owes or owed, by number, ascending; without those of some numbers."""
        return reading.read_plans(self.path, but)

    def committed(self) -> tuple[int, ...]:
        """Numbers of the committed shards, ascending."""
        return tuple(reading.committed_numbers(self.path))

    def sources(self) -> dict[str, PlanEntry]:
        """State of the source file of each live row, valid or not: size and time as planned, digest as decoded."""
        return self.sources_and_reasons()[0]

    def sources_and_reasons(self) -> tuple[dict[str, PlanEntry], dict[str, str]]:
        """:meth:`sources`, and by id why a live row is not valid, both from one look at the disk."""

        def look() -> tuple[reading.LiveRows, list[PlanEntry]]:
            live = reading.read_live(self.path, self._header)
            if mirror := mirror_of(self.path):
                mirror.prefetch(reading.plan_path(self.path, number) for number in live.shard_rows)
            return live, reading.row_sources(live, partial(reading.read_plan, self.path))

        live, held = reading.unless_collected(self.path, look)
        self.__dict__.setdefault("_live", live)
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
        """Sha256 of the image's bytes, by id, of the shown and readable rows for which it is known."""
        # Not of quarantined ones: two files that are cut to nothing are not one image of two patients.
        live = self._live
        return {live.ids[i]: live.digests[i] for i in self._usable if live.digests[i]}

    def restrict(self, ids: Iterable[str]) -> FeatureStore:
        """Return the same store showing only ``ids``, in their order; ids that it does not hold are ignored."""
        restricted = FeatureStore(self.path, tuple(dict.fromkeys(map(str, ids))))
        if "_live" in self.__dict__:
            restricted.__dict__["_live"] = self._live
        return restricted

    def of_part(self, part: Partition) -> FeatureStore:
        """Return the same store showing only the shards that may hold rows of one partition of a dataset.

        ``part`` is that of a dataset that `embcache.data.partitioned.PartitionedDataset.parts` gives. Neither the
        other shards nor their IDs are read.
        """

        def look() -> reading.LiveRows:
            committed = {*reading.committed_numbers(self.path)}
            numbers = [number for number in reading.numbers_of_part(self.path, part)[1] if number in committed]
            return reading.read_live(self.path, self._header, numbers)

        shown = FeatureStore(self.path, self.keep)
        shown.__dict__["_live"] = reading.unless_collected(self.path, look)
        return shown

    def rows_of(self, ids: Iterable[str]) -> np.ndarray:
        """Return the rows of ``features`` that belong to n images, int64 (n,); -1 for an image without one."""
        place = {id_: row for row, id_ in enumerate(self.ids.tolist())}
        return np.array([place.get(id_, -1) for id_ in ids], dtype=np.int64)

    def arrays(self, dataset: NamedTable, split: str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features, labels and groups of a dataset's rows, in the dataset's order, quarantined rows left out.

        ``dataset`` is an ImageDataset, or anything with ``name`` and a ``table`` that has the columns ``id, label,
        group, split``; with ``split`` only the rows of this one: ``train``, ``test`` or ``val``.

        Returns
        -------
        X : ndarray (n, *row_shape)
            Of the stored dtype.
        y : ndarray of int64 (n,)
            Labels; -1 where there is none. Of an ImageDataset with another target its values: findings int64 (n, L), -1
            unknown; a number float64 (n,), NaN unknown.
        groups : ndarray of str (n,)
            Patient, slide or whatever must not be divided.

        Raises
        ------
        StoreError
            Some of the rows are not computed yet.
        """
        table = dataset.table if split is None else dataset.table[dataset.table["split"] == split]
        wanted = [str(id_) for id_ in table["id"]]
        rows = self.rows_of(wanted)
        kept = rows >= 0
        absent = [id_ for id_, there in zip(wanted, kept, strict=True) if not there and id_ not in self.quarantined]
        if absent:
            raise StoreError(
                f"{len(absent):,} of {len(wanted):,} images have no features yet", code="features-incomplete",
                found=f"no row for {absent[0]!r}" + (f" and {len(absent) - 1:,} more" if len(absent) > 1 else ""),
                where=self.path, fix=fill_command(self, dataset),
            )  # fmt: skip
        target = dataset.task if isinstance(dataset, Targeted) else make_target("classes", ())
        labels = target.values(table)[kept]
        groups = np.array([str(group) for group in table["group"]], dtype=np.str_)[kept]
        return self.features[rows[kept]], labels, groups

    def __len__(self) -> int:
        return len(self._usable)

    def _facts(self) -> list[tuple[str, str]]:
        """Names and values for people. No features are read.

        Of HDF5 shards, one file each, rows are counted from the commits unless they were read before.
        """
        each = " × ".join(map(str, self.row_shape))
        facts = [("rows", f"{each} {self.dtype}" + (f", {self.views} views of an image" if self.views > 1 else ""))]
        try:
            numbers = self.committed()
            if self.format == "zarr" or "_live" in self.__dict__:
                facts += [("images", f"{len(self):,}"), ("quarantined", f"{len(self.quarantined):,}")]
            else:
                rows = sum(reading.read_commit(self.path, number).rows for number in numbers)
                facts.append(("images", f"{rows:,} rows committed, quarantined ones among them"))
            owed = len(set(reading.plan_numbers(self.path)) - set(numbers))
            facts.append(("shards", f"{len(numbers):,} ({self.format})" + (f", {owed:,} owed" if owed else "")))
        except StoreError as error:  # a repr does not raise; reading rows gives the whole message
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

    Reads their recipes only. A store whose recipe is damaged or cannot be read is skipped, with a line in the log: in a
    shared home one of them does not keep others from being used. `StoreError` if a folder cannot be listed.
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
        Its name; or the dataset, which gives the order of the rows and hides those of images that it does not have.
    home : path-like, optional
        Folder of stores; default ``$EMBCACHE_HOME``, else ``~/.cache/embcache``.
    recipe : str, optional
        First digits of the fingerprint, where several recipes are cached.
    views : int, optional
        Only a store with this number of views of each image: rows (D,) for one, (V, D) for more. Default: one view, or
        several where features are only cached so.

    Raises
    ------
    StoreNotFoundError
        Nothing matches.
    RecipeError
        Several recipes match; the message lists in what they differ.
    CorruptStoreError
        The store's recipe is damaged.
    """
    matching = find_stores(backbone, dataset, home, recipe, views)
    if len(matching) > 1:
        raise several_match({backbone: matching}, dataset)
    return matching[0] if isinstance(dataset, str) else matching[0].restrict(dataset.table["id"])


def find_stores(
    backbone: str,
    dataset: str | NamedTable,
    home: PathLike | None = None,
    recipe: str | None = None,
    views: int | None = None,
) -> list[FeatureStore]:
    """The stores, at least one, that fit the arguments of `open_store`."""
    name = dataset if isinstance(dataset, str) else dataset.name
    folders = [path for path in store_folders(home, name) if not _named(path, PIXELS)]
    stores = [FeatureStore(path) for path in folders if _named(path, backbone)]
    fitting = [s for s in stores if s.recipe.fingerprint.startswith(recipe or "")]
    plain = [s for s in fitting if s.views == 1 and not s.holds_patches]
    matching = (plain or fitting) if views is None else [s for s in fitting if s.views == views]
    if not matching:
        wanted = f" with {views} view{'s' if views > 1 else ''}" if views is not None else ""
        wanted += f" under a recipe that begins with {recipe}" if recipe else ""
        cached = [f"{s.recipe.fingerprint[:12]}" + (f" ({s.views} views)" if s.views > 1 else "") for s in stores]
        found = "recipes " + ", ".join(cached) if cached else ", ".join(path.name for path in folders)
        more = f" --views {views}" if views and views > 1 else ""
        fix = extract_command(backbone, dataset, home) + more
        if stores and views is None:
            fix = f"--recipe {stores[0].recipe.fingerprint[:12]}"
        else:  # as extraction takes it: mine=MODEL, hf:FOLDER, hf:ORG/NAME@REVISION
            prefix, _, rest = backbone.partition(":")
            bare = {bare_name(backbone), backbone.partition("@")[0], f"{prefix}:{Path(rest).name}"} - {backbone}
            fix = next((f"--backbone {each}" for each in sorted(bare) if any(_named(p, each) for p in folders)), fix)
        raise StoreNotFoundError(
            f"no features of {backbone}{wanted} are cached for {name}", code="store-not-found",
            found=found or "nothing cached for this dataset", where=home_dir(home) / slug(name),
            fix=fix,
        )  # fmt: skip
    return matching


def _named(path: Path, backbone: str) -> bool:
    return re.fullmatch(re.escape(slug(backbone)) + "-[0-9a-f]{12}", path.name) is not None


def several_match(
    matching: Mapping[str, Sequence[FeatureStore]], dataset: str | NamedTable, named: Sequence[str] = ()
) -> RecipeError:
    """The error where several stores of backbones match: in what they differ; ``named`` are the prefixes so far."""
    name, lines = dataset if isinstance(dataset, str) else dataset.name, []
    images = [] if isinstance(dataset, str) else [dataset.table["id"]]
    for backbone, stores in matching.items():
        held = [len(set(store.sources()).intersection(*images)) for store in stores]
        differ = describe_differences([store.recipe for store in stores])
        begin = f"{backbone} " if len(matching) > 1 else ""
        lines += [f"{begin}{line}; {number} of its images" for line, number in zip(differ, held, strict=True)]
    every = list(matching.values())
    numbers = sorted({store.views for stores in every for store in stores})
    # One of each backbone; of the first one any.
    others = [stores[0].recipe.fingerprint[:12] for stores in every[1:]]
    return RecipeError(
        f"features of {', '.join(matching)} are cached for {name} under several recipes", code="several-recipes",
        expected="one of each backbone", where=every[0][0].path.parent, found="\n".join(lines),
        fix=(
            *([f"--views {number}" for number in numbers] if len(numbers) > 1 else []),
            *("--recipe " + ",".join([*named, s.recipe.fingerprint[:12], *others]) for s in every[0]),
        ),
    )  # fmt: skip


def describe_differences(recipes: list[Recipe]) -> list[str]:
    """One line per recipe, with the fields in which they are not all the same."""
    names = dict.fromkeys(name for other in recipes[1:] for name in recipes[0].differences(other))
    lines = []
    for recipe in recipes:
        texts = {name: str(recipe.flat().get(name, "full" if name == "transform.decode" else None)) for name in names}
        values = (f"{name} = {text if len(text) <= 40 else text[:16] + '…'}" for name, text in texts.items())
        lines.append(f"{recipe.fingerprint[:12]}: {', '.join(values)}")
    return lines


def extract_command(backbone: str, dataset: str | NamedTable, home: PathLike | None = None) -> str:
    """The command that extracts a backbone over a dataset."""
    return _command(["extract", "--backbone", backbone], dataset, home)


def import_command(store: FeatureStore, dataset: str | NamedTable, home: PathLike | None = None) -> str:
    """The command that imported the features of a store."""
    file = str(store.provenance.get("imported_from", "FILE"))
    return _command(["import", file, "--backbone-name", store.recipe.backbone], dataset, home)


def fill_command(store: FeatureStore, dataset: str | NamedTable) -> str:
    """The command that adds what a store lacks."""
    return import_command(store, dataset) if store.recipe.foreign else extract_command(store.recipe.typed, dataset)


def _command(words: list[str], dataset: str | NamedTable, home: PathLike | None) -> str:
    words = ["embcache", *words]
    if not isinstance(dataset, LoadedDataset):
        words += ["--dataset", dataset if isinstance(dataset, str) else dataset.name]
    else:
        kind = dataset.layout or dataset.name
        # What it was loaded from may be a table, where the root is the folder of its images.
        origin = dataset.origin or dataset.root
        words += ["--dataset", kind]
        if kind == "folder" or (origin is not None and kind != "sample" and origin != (data_dir() / kind).resolve()):
            words += ["--data-root", str(origin or "FOLDER")]
        words += ["--name", dataset.name] if dataset.name != kind else []
        words += ["--allow-missing"] if dataset.missing else []
        words += dataset.read_options()
    return shlex.join([*words, "--home", shown_home(home)] if home is not None else words)
