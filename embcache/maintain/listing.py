"""What is cached (``embcache ls``), and what one store is made of (``embcache info``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embcache.data.published import snapshot_ids
from embcache.errors import DatasetError, StoreError
from embcache.io import bytes_under
from embcache.paths import PathLike
from embcache.runs.folders import PARTIAL, run_folders
from embcache.sealed import plain, read_sealed
from embcache.store.feature_store import FeatureStore, store_folders
from embcache.store.reading import CommitRecord, read_commit


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
        return {name: summary[name] for name in alike} | {
            "fingerprint": store.recipe.fingerprint,
            "row_shape": list(store.row_shape),
            "dtype": str(store.dtype),
            "quarantined": store.quarantined,
            "superseded": self.superseded,
            "shards": self.shards,
            "uncommitted": list(self.uncommitted),
            "view": None if self.view is None else str(self.view),
            "recipe": store.recipe.to_json(),
            "created_with": {
                "rows_per_shard": store.rows_per_shard,
                "batch_size": store.batch_size,
                "threads": store.threads,
                "runtime": store.runtime,
                **store.provenance,
            },
            "computed_otherwise": {
                str(n): {"batch_size": made.batch_size, "threads": made.threads} for n, made in self.otherwise.items()
            },
        }


def list_cached(home: PathLike | None = None, dataset: str | None = None) -> list[CachedStore]:
    """Describe every store under ``home``; one that is damaged is listed with its problem."""
    rows, snapshots = [], dict[Path, tuple[str, list[str] | None]]()
    for path in store_folders(home, dataset):
        if path.parent not in snapshots:
            snapshots[path.parent] = _snapshot(path.parent, home)
        name, ids = snapshots[path.parent]
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
    live = len(whole.ids) + len(whole.quarantined)
    made = {number: read_commit(store.path, number) for number in committed}
    return StoreInfo(
        store=store if ids is None else whole.restrict(ids),
        summary=_summary(whole, name, ids),
        shards=len(committed),
        uncommitted=tuple(number for number in plans if number not in committed),
        superseded=sum(len(plans[number]) for number in committed) - live,
        view=next((path for path in (store.path / "view.zarr", store.path / "view.h5") if path.exists()), None),
        otherwise={number: record for number, record in made.items() if record.batch_size or record.threads},
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
        bytes=bytes_under(store.path),
        precision=str(store.dtype) if store.holds_pixels else store.recipe.precision,
        transform=transform_words(store.recipe.transform),
        views=store.views,
        problem="",
        path=store.path,
    )
