"""Freeing what nothing needs: superseded rows, and what killed processes have left (``embcache gc``).

Live rows of shards that also hold superseded ones are copied, not computed, into new shards with the next free numbers.
Once these are committed and read back, every row of the old shards is superseded, and they go: first the plan, then
the shard, each at once. Killed at any instant, every live row is still in a committed shard, and the next run goes on.
Old numbers are never given to other rows: whoever has the store open is told that a file is gone, and is never served
another image's features.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embcache.errors import StoreError
from embcache.store.commit import ShardRows, commit_shard, discard, publish_plan, set_aside, write_view
from embcache.store.feature_store import FeatureStore
from embcache.store.formats import FORMATS
from embcache.store.header import StoreHeader
from embcache.store.reading import (
    LiveRows,
    committed_numbers,
    plan_numbers,
    read_features,
    read_header,
    read_live,
    read_plan,
    shard_name,
)
from embcache.store.rows import PlanEntry
from embcache.upkeep.notes import leftovers, live_leases, stale
from embcache.upkeep.verify import moved_aside
from embcache.upkeep.view import spanned_shards

Say = Callable[[str], object]


@dataclass(frozen=True)
class Collected:
    """What was freed of one store, or would be.

    Attributes
    ----------
    path : Path
        The store's folder.
    superseded : int
        Rows that a later row of the same image had replaced.
    moved : int
        Live rows that were copied into new shards, so that the old ones could go.
    shards : int
        Shards that were removed.
    leftovers : int
        Files and folders that killed processes had left, dead leases included.
    freed : int
        Bytes; of a dry run what the removed shards take less what the new ones would.
    """

    path: Path
    superseded: int
    moved: int
    shards: int
    leftovers: int
    freed: int

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON data."""
        return {
            "dataset": self.path.parent.name,
            "path": str(self.path),
            "superseded": self.superseded,
            "moved": self.moved,
            "shards": self.shards,
            "leftovers": self.leftovers,
            "freed": self.freed,
        }


def collect(path: Path, *, dry_run: bool = False, say: Say = lambda line: None) -> Collected:
    """Free what nothing needs of one store.

    Parameters
    ----------
    path : Path
        The store's folder.
    dry_run : bool
        Only say what would be freed.
    say : callable
        Told each thing that is done.

    Raises
    ------
    StoreError
        Another process is computing in the store, or the disk refuses.
    CorruptStoreError
        The store is damaged: nothing is removed from it.
    """
    if working := live_leases(path):
        raise StoreError(
            "another process is computing in this store",
            found=f"{len(working)} leases, of shard {', '.join(str(int(lease.stem)) for lease in working[:5])}",
            where=path,
            fix="wait until it is done, then run the same command again",
        )
    header = read_header(path)
    live = read_live(path, header)
    counts = dict(zip(*map(np.ndarray.tolist, np.unique(live.shards, return_counts=True)), strict=True))
    wasteful = [number for number, rows in live.shard_rows.items() if counts.get(number, 0) < rows]
    superseded = sum(live.shard_rows[number] - counts.get(number, 0) for number in wasteful)
    moving = np.flatnonzero(np.isin(live.shards, wasteful))
    rubbish = [*leftovers(path), *_mended(path)]
    before = folder_bytes(path) + sum(folder_bytes(each) for each in rubbish if path not in each.parents)
    if dry_run:
        taken = sum(folder_bytes(path / "shards" / shard_name(number)) for number in wasteful)
        if header.format == "zarr":  # a shard's array has room for all rows, however few there are
            kept = -(-len(moving) // header.rows_per_shard) * (taken // max(len(wasteful), 1))
        else:
            kept = sum(_share(path, number, counts.get(number, 0), live.shard_rows[number]) for number in wasteful)
        freed = taken - kept + sum(map(folder_bytes, rubbish))
        return Collected(path, superseded, len(moving), len(wasteful), len(rubbish), max(0, freed))
    if wasteful:
        for number, entries, places in _new_shards(path, header, live, moving):
            _copy(path, header, live, number, entries, places)
            say(f"shard {number}: {len(entries):,} rows copied from older shards")
        _check_superseded(path, header, wasteful)
        for number in wasteful:
            plan = path / "plan" / f"{shard_name(number)}.json"
            if plan.exists():
                discard(set_aside(path, plan, "gc-plan"))
            discard(set_aside(path, path / "shards" / shard_name(number), "gc-shard"))
            say(f"shard {number}: removed, {live.shard_rows[number] - counts.get(number, 0):,} rows were superseded")
    view = path / FORMATS[header.format].view
    if wasteful or (view.exists() and set(spanned_shards(view)) - set(committed_numbers(path))):
        write_view(path)  # also where a killed run has removed shards and not come to this
    for each in rubbish:
        discard(each)
    if rubbish:
        say(f"{len(rubbish)} leftovers of killed processes: removed")
    freed = before - folder_bytes(path)
    return Collected(path, superseded, len(moving), len(wasteful), len(rubbish), max(0, freed))


def _new_shards(
    path: Path, header: StoreHeader, live: LiveRows, moving: np.ndarray
) -> Iterator[tuple[int, Sequence[PlanEntry], Sequence[int]]]:
    """Number, plan and rows (places in ``live``) of each new shard; plans of a run that was killed come first."""
    place = {live.ids[k]: int(k) for k in moving}
    sources = FeatureStore(path).sources()
    committed = set(committed_numbers(path))
    for number in plan_numbers(path):
        entries = () if number in committed else read_plan(path, number)
        # Extraction plans what it has to compute, without a digest: this one was planned to be copied.
        copied = any(entry.digest for entry in entries) and all(e == sources.get(e.id) for e in entries)
        if copied and all(entry.id in place for entry in entries):
            yield number, entries, [place.pop(entry.id) for entry in entries]
    rest = list(place.values())
    for start in range(0, len(rest), header.rows_per_shard):
        places = rest[start : start + header.rows_per_shard]
        entries = tuple(sources[live.ids[k]] for k in places)
        number = max([*plan_numbers(path), *committed_numbers(path)]) + 1
        if not publish_plan(path, number, entries):
            raise StoreError(
                "another process is planning in this store",
                where=path,
                fix="run the same command again when it is done",
            )
        yield number, entries, places


def _copy(
    path: Path,
    header: StoreHeader,
    live: LiveRows,
    number: int,
    entries: Sequence[PlanEntry],
    places: Sequence[int],
) -> None:
    features = np.empty((len(places), *header.row_shape), np.dtype(header.recipe.dtype))
    shards = live.shards[list(places)]
    for shard in np.unique(shards).tolist():
        mine = np.flatnonzero(shards == shard)
        positions = live.positions[[places[k] for k in mine.tolist()]]
        features[mine] = read_features(path, header, shard)[positions]
    rows = ShardRows(
        tuple(entry.id for entry in entries),
        features,
        live.valid[list(places)],
        tuple(live.digests[k] for k in places),
        tuple(live.reasons[k] for k in places),
    )
    commit_shard(path, number, rows)


def _check_superseded(path: Path, header: StoreHeader, wasteful: Sequence[int]) -> None:
    """Read back what is there now: no live row may lie in what is about to be removed."""
    live = read_live(path, header)
    left = set(live.shards.tolist()) & set(wasteful)
    for number in set(live.shards.tolist()):
        read_features(path, header, number)
    if left:
        raise StoreError(
            "rows of old shards are still in use", found=f"shards {sorted(left)}", where=path, fix="embcache verify"
        )


def _mended(path: Path) -> list[Path]:
    """Damaged shards that a repair has put aside, and that are there again."""
    there = set(committed_numbers(path))
    return [aside for number, aside in moved_aside(path).items() if number in there]


def _share(path: Path, number: int, kept: int, rows: int) -> int:
    return round(folder_bytes(path / "shards" / shard_name(number)) * kept / rows)


def folder_bytes(path: Path) -> int:
    """Bytes of a file or of all files under a folder; links count as links."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size if path.exists() else 0
    return sum((Path(root) / name).lstat().st_size for root, _, names in os.walk(path) for name in names)


def collect_dataset(folder: Path, *, dry_run: bool = False) -> Mapping[str, int]:
    """Remove what killed processes have left beside a dataset's stores: half-written snapshots and scans."""
    found = [
        path
        for prefix in (".dataset.parquet-", ".scan.parquet-")
        for path in (folder.glob(f"{prefix}*") if folder.is_dir() else ())
        if stale(path)
    ]
    freed = sum(map(folder_bytes, found))
    for path in () if dry_run else found:
        discard(path)
    return {"leftovers": len(found), "freed": freed}
