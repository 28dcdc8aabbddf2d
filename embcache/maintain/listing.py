"""What is cached (``embcache ls``, ``embcache info``), and what an extraction would add to it (``--dry-run``)."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embcache.config import ExtractConfig
from embcache.cores import default_workers
from embcache.data.budget import Decoding, check_max_pixels
from embcache.data.published import snapshot_ids
from embcache.errors import DatasetError, StoreError
from embcache.fields import bare_name
from embcache.io import bytes_under
from embcache.paths import PathLike, skip, slug
from embcache.runs.folders import PARTIAL, run_folders
from embcache.sealed import plain, read_sealed
from embcache.store.feature_store import FeatureStore, folders_with, store_folders
from embcache.store.reading import CommitRecord, read_commit, read_header, store_bytes

# What computes is imported by `dry_run`: `embcache ls` needs none of it.
if TYPE_CHECKING:
    from embcache.data.dataset import ImageDataset
    from embcache.extract.scan import DatasetFiles
    from embcache.extract.worker import FrozenNetwork

STORE_NAME = re.compile(r"(?P<slug>.+)-(?P<digits>[0-9a-f]{12})")
VIEWS = ("view.zarr", "view.h5", "view.refs.json")
_FIRST = 20  # ids of added, changed and removed images in the JSON of a dry run


@dataclass(frozen=True)
class CachedStore:
    """One row of ``embcache ls``."""

    dataset: str
    backbone: str
    fingerprint: str
    rows: int
    quarantined: int
    owed: int  # images of the snapshot, or of published plans, that have no row yet
    complete: bool  # whether every image of the dataset has a row
    format: str
    bytes: int  # on disk, whole store
    precision: str
    transform: str
    views: int  # of an image in one row
    problem: str  # what is wrong with it; ``""`` if nothing is. The numbers mean nothing then
    path: Path  # the store's folder


@dataclass(frozen=True)
class InterruptedRun:
    """A finetuning that was begun and is not finished; it may be running."""

    dataset: str
    id: str
    bytes: int  # of its checkpoints on disk
    path: Path  # their folder
    command: str  # that continues it; ``""`` where that cannot be read


@dataclass(frozen=True)
class StoreInfo:
    """What ``embcache info`` says of one store, in addition to what the store says itself."""

    store: FeatureStore
    summary: CachedStore
    shards: int
    uncommitted: tuple[int, ...]
    superseded: int
    view: Path | None
    otherwise: Mapping[int, CommitRecord]  # shards not computed with the store's own batch size and threads

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON data."""
        store, summary = self.store, plain(self.summary)
        alike = ("dataset", "backbone", "path", "rows", "views", "owed", "complete", "format", "bytes")
        settled = ("batch_size", "threads", "runtime")
        otherwise = {str(n): {name: vars(record)[name] for name in settled} for n, record in self.otherwise.items()}
        made = {"rows_per_shard": store.rows_per_shard, **{name: vars(store)[name] for name in settled}}
        return {
            **{name: summary[name] for name in alike}, "fingerprint": store.recipe.fingerprint,
            "row_shape": list(store.row_shape), "dtype": str(store.dtype), "quarantined": store.quarantined,
            "superseded": self.superseded, "shards": self.shards, "uncommitted": list(self.uncommitted),
            "view": None if self.view is None else str(self.view), "recipe": store.recipe.to_json(),
            "created_with": {**made, **store.provenance}, "computed_otherwise": otherwise,
        }  # fmt: skip


def walk_stores(
    home: PathLike | None = None, datasets: Sequence[str] = (), backbones: Sequence[str] = (), recipe: str | None = None
) -> tuple[list[Path], list[dict[str, str]]]:
    """Folders of stores, those without a recipe too, of all or some datasets; names may be as folders spell them.

    Beside them ``path`` and ``error`` of folders that cannot be listed; raises as
    `embcache.store.feature_store.folders_with`.
    """
    unread = list[dict[str, str]]()

    def skipped(path: PathLike, error: OSError) -> None:
        skip(path, error)
        unread.append({"path": str(path), "error": error.strerror or str(error)})

    stores, wanted = list[Path](), {slug(name) for name in backbones}
    for dataset in datasets or (None,):
        found = {path for entry in ("recipe.json", "shards") for path in folders_with(entry, home, dataset, skipped)}
        for path in sorted(found):
            name = STORE_NAME.fullmatch(path.name)
            if name and (not wanted or name["slug"] in wanted) and name["digits"].startswith((recipe or "")[:12]):
                stores.append(path)
    return stores, unread


def require_weights(stores: Sequence[Path], weights: Mapping[str, PathLike], home: PathLike | None) -> None:
    """Name the checkpoints of the user's own that are not given, of all stores, before the first is read."""
    from embcache.extract.recipes import require_checkpoints

    recipes = []
    for path in stores:
        with suppress(StoreError):
            recipes.append(read_header(path).recipe)
    require_checkpoints(recipes, weights, home)


def list_cached(home: PathLike | None = None, dataset: str | None = None) -> list[CachedStore]:
    """Describe every store under ``home``; one that is damaged is listed with its problem."""
    rows, snapshot = [], functools.cache(lambda folder: _snapshot(folder, home))
    for path in store_folders(home, dataset):
        name, ids = snapshot(path.parent)
        try:
            rows.append(_summary(FeatureStore(path), name, ids))
        except StoreError as error:
            problem = f"{error.problem} ({error.where})" if error.where else error.problem
            backbone, _, fingerprint = path.name.rpartition("-")
            size = bytes_under(path)
            rows.append(CachedStore(name, backbone, fingerprint, 0, 0, 0, False, "", size, "", "", 1, problem, path))
    return rows


def count_runs(home: PathLike | None = None) -> dict[str, int]:
    """Runs kept of each dataset, by the name of its folder."""
    return dict(Counter(run.parent.parent.name for run in run_folders(home)))


def list_interrupted(home: PathLike | None = None, dataset: str | None = None) -> list[InterruptedRun]:
    """Describe the checkpoints of every finetuning under ``home`` that is not finished."""
    found = []
    for path in run_folders(home, dataset, partial=True):
        try:
            command = str(read_sealed(path / "state.json", "", indent=None).get("command", ""))[:2000]
        except FileNotFoundError:
            continue  # nothing was trained yet
        except (StoreError, OSError):
            command = ""
        id = path.name.removeprefix(".").removesuffix(PARTIAL)
        found.append(InterruptedRun(path.parent.parent.name, id, bytes_under(path), path, command))
    return found


def store_info(store: FeatureStore, home: PathLike | None = None) -> StoreInfo:
    """Describe one store in full."""
    name, ids = _snapshot(store.path.parent, home or store.path.parent.parent)
    whole = FeatureStore(store.path)
    plans, committed = whole.plans(), whole.committed()
    made = {number: read_commit(store.path, number) for number in committed}
    return StoreInfo(
        store=store if ids is None else whole.restrict(ids),
        summary=_summary(whole, name, ids),
        shards=len(committed),
        uncommitted=tuple(number for number in plans if number not in committed),
        superseded=sum(len(plans[number]) for number in committed) - len(whole.ids) - len(whole.quarantined),
        view=next((path for name in VIEWS if (path := store.path / name).exists()), None),
        otherwise={
            number: record for number, record in made.items() if record != CommitRecord(record.rows, record.files)
        },
    )


def transform_words(transform: Mapping[str, Any]) -> str:
    """A transform in a few words: ``paper: resize 256×256, crop 224×224, bilinear, 4 views (chest)``."""

    def size(value: Any) -> str:
        return "×".join(map(str, value)) if isinstance(value, list) else str(value)

    words = [f"{verb} {size(transform[verb])}" for verb in ("resize", "crop") if transform.get(verb)]
    if not words and transform.get("size"):
        words = [f"as it is, {size(transform['size'])}"]
    if transform.get("resize") and transform.get("interpolation"):
        words.append(str(transform["interpolation"]))
    if "decode" in transform:
        words.append(f"{transform['decode']} decoding")
    if "views" in transform:
        words.append(f"{transform['views']} views ({transform['augment']['kind']})")
    kind = transform.get("kind")
    return (f"{kind}: " if kind and words else str(kind or "")) + ", ".join(words)


def _snapshot(folder: Path, home: PathLike | None) -> tuple[str, list[str] | None]:
    """Name and ids of the dataset whose stores lie in ``folder``; the folder's name and None without a snapshot."""
    try:
        known = snapshot_ids(folder.name, home)
    except DatasetError:
        known = None  # says nothing of the stores; `extract` writes it anew
    return known or (folder.name, None)


def _summary(store: FeatureStore, name: str, ids: Sequence[str] | None) -> CachedStore:
    wanted = set(ids or ())
    if ids is None or store.holds_pixels:  # else the plans need not be read
        planned = {entry.id for entries in store.plans().values() for entry in entries}
        wanted = planned if ids is None else planned & wanted
    shown = store if ids is None else store.restrict(ids)
    owed = len(wanted.difference(shown.ids.tolist(), shown.quarantined))
    return CachedStore(
        dataset=name,
        backbone=store.recipe.backbone,
        fingerprint=store.recipe.fingerprint[:12],
        rows=len(shown),
        quarantined=len(shown.quarantined),
        owed=owed,
        complete=not owed,
        format=store.format,
        bytes=store_bytes(store.path),
        precision=str(store.dtype) if store.holds_pixels else store.recipe.precision,
        transform=transform_words(store.recipe.transform),
        views=store.views,
        problem="",
        path=store.path,
    )


# What an extraction would do.


@dataclass(frozen=True)
class Cached:
    """A store of the same backbone over the same dataset."""

    fingerprint: str
    path: Path
    rows: int  # images that it holds, readable or not
    differs: Mapping[str, tuple[Any, Any]]  # field → (wanted, cached); empty where an extraction would continue it
    missing: int  # images of the dataset that it does not hold
    removed: int  # images that it holds and the dataset does not
    problem: str = ""  # why it cannot be read; the rest means nothing then


@dataclass(frozen=True)
class DryRun:
    """What an extraction by one backbone would do."""

    backbone: str
    fingerprint: str
    recipe: Mapping[str, Any]
    cached: tuple[Cached, ...]  # the most alike first
    images: int
    added: tuple[str, ...]  # all images where no store has this recipe
    changed: tuple[str, ...]  # cached, and to be computed again
    removed: tuple[str, ...]  # cached, and no longer in the dataset
    bytes: int  # that the new features take

    @property
    def match(self) -> Cached | None:
        """The store with this recipe."""
        return next((each for each in self.cached if not each.differs and not each.problem), None)

    @property
    def owed(self) -> int:
        """Images that would be computed."""
        return len(self.added) + len(self.changed)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON data."""
        cached = [
            {**plain(each), "differs": {k: {"wanted": a, "cached": b} for k, (a, b) in each.differs.items()}}
            for each in self.cached
        ]
        first = {"added": self.added, "changed": self.changed, "removed": self.removed}
        return {
            "backbone": self.backbone, "fingerprint": self.fingerprint, "recipe": plain(self.recipe),
            "match": None if self.match is None else str(self.match.path), "cached": cached, "images": self.images,
            "owed": self.owed, "bytes": self.bytes,
            **{name: {"number": len(ids), "first": list(ids[:_FIRST])} for name, ids in first.items()},
        }  # fmt: skip


def dry_run(
    names: Sequence[str], dataset: ImageDataset, config: ExtractConfig | None = None, *, home: PathLike | None = None
) -> list[DryRun]:
    """Compare what an extraction with this config wants with what is cached; nothing is written."""
    from embcache.extract.foreign import refuse_foreign
    from embcache.extract.recipes import Traits, open_networks
    from embcache.extract.scan import scan_dataset

    config = config or ExtractConfig()
    with ThreadPoolExecutor(default_workers()) as pool:
        files = scan_dataset(dataset, home, pool, Decoding(check_max_pixels(config.max_pixels)))
        refuse_foreign([bare_name(name) for name in names], dataset, home)
        networks = open_networks(names, Traits.of(dataset, files), config, home)
        return [
            _one(name, network, dataset, files, home, config.retry_quarantined)
            for name, network in zip(names, networks, strict=True)
        ]


def _one(
    name: str, network: FrozenNetwork, dataset: ImageDataset, files: DatasetFiles, home: PathLike | None, again: bool
) -> DryRun:
    from embcache.extract.recipes import make_recipe
    from embcache.extract.scan import plan_store

    recipe, ids = make_recipe(network), dataset.table["id"].tolist()
    cached, unreadable = [], []
    known, held, owed = set(ids), set[str](), ids
    folders = walk_stores(home, [dataset.name], [recipe.backbone])[0]
    if recipe.nameless:  # it may have been made under another name
        folders = sorted({*folders, *walk_stores(home, [dataset.name], recipe=recipe.fingerprint)[0]})
    for path in folders:
        try:
            store = FeatureStore(path)
            there = set(store.ids.tolist()) | set(store.quarantined)
        except StoreError as error:
            unreadable.append(Cached(path.name[-12:], path, 0, {}, 0, 0, f"{error.problem}; try: {error.fix}"))
            continue
        differs, digits = recipe.differences(store.recipe), store.recipe.fingerprint[:12]
        cached.append(Cached(digits, path, len(there), differs, len(known - there), len(there - known)))
        if not differs:
            held = there
            plan = plan_store(store, dataset, files.scan, publish=False, retry_quarantined=again)
            owed = [image for shard in plan.shards for image in shard.ids]
    added = tuple(image for image in owed if image not in held)
    changed = tuple(image for image in owed if image in held and image in known)
    return DryRun(
        backbone=bare_name(name),
        fingerprint=recipe.fingerprint,
        recipe=recipe.to_json(),
        cached=(*sorted(cached, key=lambda each: len(each.differs)), *unreadable),
        images=len(ids),
        added=added,
        changed=changed,
        removed=tuple(sorted(held - known)),
        bytes=(len(added) + len(changed)) * prod(network.row_shape) * np.dtype(network.dtype).itemsize,
    )
