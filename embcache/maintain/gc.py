"""Freeing what nothing needs: superseded rows, and what killed processes have left (``embcache gc``).

In an object store these are attempts at shards of which another attempt counts; the rest is about stores on a disk.

Live rows of shards that also hold superseded ones are copied, not computed, into new shards with the next free numbers.
No lock keeps other processes away. A row is copied with the size, time and digest of its own plan, and only if no plan
owes its image; the copy's plan takes the number after the highest that was there when all this was read. Where another
process has planned meanwhile that number is taken, and everything is looked at again: a copy never supersedes a row
that was planned later than the one that it copies.

Once the copies are committed and read back, every row of the old shards is superseded, and they go: first the plan,
then the shard, each at once. Killed at any instant, every live row is still in a committed shard, and the next run goes
on. Old numbers are never given to other rows: a process that has the store open gets an error for a file that is gone,
never features of another image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from embcache.errors import StoreError
from embcache.io import bytes_under, discard, mirror_of
from embcache.io import leftovers as leftovers_in
from embcache.log import log
from embcache.maintain.verify import lease_files, leftovers
from embcache.paths import PathLike, home_dir, home_folders, skip, slug
from embcache.runs.folders import PARTIAL, run_folders
from embcache.store.commit import PlanEntry, ShardRows, commit_shard, publish_plan, refresh_view, take_out
from embcache.store.lease import is_abandoned
from embcache.store.reading import (
    LiveRows,
    committed_numbers,
    plan_numbers,
    plan_path,
    read_features,
    read_header,
    read_live,
    read_plan,
    read_plans,
    row_sources,
    shard_path,
    unless_collected,
)
from embcache.store.schema import StoreHeader

Moved = tuple[LiveRows, Sequence[PlanEntry], Sequence[int]]  # rows to copy: their plan, and places among live ones
_REPLACED = ("runs", "splits", "figures", "figures/attention", "figures/coordinates")
"""Folders of a dataset in which files and folders are replaced."""


@dataclass(frozen=True)
class Collected:
    """What was freed of one store, or would be."""

    dataset: str  # folder name of the store's dataset
    path: Path  # the store's folder
    superseded: int  # rows that a later row of the same image had replaced
    moved: int  # live rows that were copied into new shards, so that the old ones could go
    shards: int  # shards that were removed
    leftovers: int  # files and folders that killed processes had left, dead leases included
    freed: int  # bytes; of a dry run what the removed shards take less what the new ones would


def collect(path: Path, *, dry_run: bool = False) -> Collected:
    """Free what nothing needs of one store."""
    header, name = read_header(path), f"{path.parent.name}/{path.name}"
    if mirror := mirror_of(path):
        # Superseded rows stay: without its commit, which names its files, another attempt at a shard could win.
        removed = mirror.collect(path, committed_numbers(path), dry_run=dry_run)
        log.info("%s: in an object store superseded rows stay; `embcache info` counts them", name)
        return Collected(path.parent.name, path, 0, 0, 0, len(removed), sum(entry.size for entry in removed))
    seen, rubbish, moved = unless_collected(path, lambda: _look(path, header)), leftovers(path), 0
    before = bytes_under(path) + sum(bytes_under(each) for each in rubbish if path not in each.parents)
    if seen.waiting:
        shards = ", ".join(map(str, seen.waiting[:5])) + (" …" if len(seen.waiting) > 5 else "")
        log.info("%s: shards %s hold rows that are planned to be computed again: freed after the next extraction",
                 name, shards)  # fmt: skip
    if dry_run:
        freed = max(0, _gain(path, header, seen) + sum(map(bytes_under, rubbish)))
        counts = (seen.superseded, len(seen.moving), len(seen.wasteful), len(rubbish), freed)
        return Collected(path.parent.name, path, *counts)
    while True:
        left, copied = unless_collected(path, lambda: _look(path, header)), moved
        for number, rows in _new_shards(path, header, left):
            unless_collected(path, partial(_copy, path, header, number, rows))
            log.info("%s: shard %d: %d rows copied from older shards", name, number, len(rows[1]))
            moved += len(rows[1])
        if moved == copied and not len(left.moving):
            break
    if left.wasteful:
        live = set(read_live(path, header).shards.tolist())  # read back what is there now
        for number in live:
            read_features(path, header, number)
        if still := sorted(live & set(left.wasteful)):
            raise StoreError("rows of old shards are still in use", code="shards-in-use", found=f"shards {still}",
                             where=path, fix="embcache verify")  # fmt: skip
        for number in left.wasteful:
            take_out(path, plan_path(path, number), "gc-plan")
            take_out(path, shard_path(path, number), "gc-shard")
            log.info("%s: shard %d: removed, its rows were superseded or copied", name, number)
    if committed_numbers(path):
        refresh_view(path)  # also where a killed run has removed shards and not come to this
    for each in rubbish:
        discard(each)
    freed = max(0, before - bytes_under(path))
    superseded = max(0, left.superseded - moved)
    return Collected(path.parent.name, path, superseded, moved, len(left.wasteful), len(rubbish), freed)


@dataclass(frozen=True)
class _Seen:
    """A store at one moment."""

    live: LiveRows
    sources: list[PlanEntry]
    plans: Mapping[int, Sequence[PlanEntry]]  # of shards that are planned and not committed
    next: int  # the number after the highest
    wasteful: list[int]  # shards with superseded rows that can go, once ``moving``, places in ``live``, are copied
    waiting: list[int]  # shards with superseded rows that stay: they hold rows that are planned to be computed anew
    moving: np.ndarray
    superseded: int  # superseded rows of the wasteful shards


def _look(path: Path, header: StoreHeader) -> _Seen:
    # The plans come first: whatever is planned after them takes the number that we would.
    while True:
        plans = read_plans(path)
        committed = committed_numbers(path)
        if {*plans} <= {*plan_numbers(path)}:
            break  # else another gc removed some: they are not owed
    live = read_live(path, header, committed)
    owed = {number: entries for number, entries in plans.items() if number not in live.shard_rows}
    anew = {entry.id for entries in owed.values() for entry in entries}
    counts = np.bincount(live.shards, minlength=max(committed, default=-1) + 1)
    partly = [number for number, rows in live.shard_rows.items() if counts[number] < rows]
    held = {shard for id_, shard in zip(live.ids, live.shards.tolist(), strict=True) if id_ in anew}
    wasteful = [number for number in partly if number not in held]
    return _Seen(
        live=live,
        sources=row_sources(live, lambda number: plans.get(number, ())),
        plans=owed,
        next=max([*plans, *committed], default=-1) + 1,
        wasteful=wasteful,
        waiting=[number for number in partly if number in held],
        moving=np.flatnonzero(np.isin(live.shards, wasteful)),
        superseded=sum(live.shard_rows[number] - int(counts[number]) for number in wasteful),
    )


def _new_shards(path: Path, header: StoreHeader, seen: _Seen) -> Iterator[tuple[int, Moved]]:
    """Number of each new shard and its rows, as places among live ones; plans of a run that was killed come first.

    Ends before all rows are through where another process has planned since ``seen``: that must be looked at first.
    """
    unfinished = False
    for number, entries in seen.plans.items():
        # Extraction plans what it has to compute, without a digest: this one was planned to be copied.
        if not any(entry.digest for entry in entries):
            continue
        live = read_live(path, header, [n for n in seen.live.shard_rows if n < number])
        place = {entry: k for k, entry in enumerate(row_sources(live, partial(read_plan, path)))}
        if all(entry in place for entry in entries):
            unfinished = True
            yield number, (live, entries, [place[entry] for entry in entries])
    for index, start in enumerate(range(0, 0 if unfinished else len(seen.moving), header.rows_per_shard)):
        places = seen.moving[start : start + header.rows_per_shard].tolist()
        entries = tuple(seen.sources[k] for k in places)
        if not publish_plan(path, seen.next + index, entries):
            return
        yield seen.next + index, (seen.live, entries, places)


def _copy(path: Path, header: StoreHeader, number: int, rows: Moved) -> None:
    live, entries, places = rows
    if number in committed_numbers(path):
        return  # another process was quicker, and may have removed the old shards already
    features = np.empty((len(places), *header.row_shape), header.dtype)
    shards, positions = live.shards[list(places)], live.positions[list(places)]
    for shard in np.unique(shards).tolist():
        mine = np.flatnonzero(shards == shard)
        features[mine] = read_features(path, header, shard)[positions[mine]]
    digests, reasons = (tuple(texts[k] for k in places) for texts in (live.digests, live.reasons))
    ids = tuple(entry.id for entry in entries)
    commit_shard(path, number, ShardRows(ids, features, live.valid[list(places)], digests, reasons))


def _gain(path: Path, header: StoreHeader, seen: _Seen) -> int:
    """Bytes of the wasteful shards less those of the copies of what is in use in them."""
    sizes = {number: bytes_under(shard_path(path, number)) for number in seen.wasteful}
    if header.format == "zarr":  # a shard's array has room for all rows, however few there are
        shards = -(-len(seen.moving) // header.rows_per_shard)
        return sum(sizes.values()) - shards * (sum(sizes.values()) // max(len(sizes), 1))
    held = np.bincount(seen.live.shards, minlength=seen.next)
    return sum(size - round(size * int(held[n]) / seen.live.shard_rows[n]) for n, size in sizes.items())


def collect_home(
    home: PathLike | None = None, datasets: Sequence[str] = (), *, dry_run: bool = False
) -> Mapping[str, int]:
    """Remove what killed processes have left of all but the stores, in a home or in the folders of some datasets.

    That is what was to replace a snapshot, a scan, a run, a splits file or a figure, and the checkpoints of finetunings
    whose runs are finished. What cannot be listed is skipped.
    """
    root, found = home_dir(home), list[Path]()
    for folder in [root / slug(name) for name in datasets] or [root, *home_folders(root)]:
        for place in [folder, *(folder / name for name in _REPLACED if folder != root)]:
            try:
                found += leftovers_in(place)
            except OSError as error:
                skip(place, error)
    for name in datasets or (None,):
        found += [path for path in run_folders(home, name, partial=True) if _is_finished(path)]
    freed = sum(map(bytes_under, found))
    for path in () if dry_run else found:
        discard(path)
    there = mirror.collect_rest(dry_run=dry_run) if (mirror := mirror_of(root)) else []
    return {"leftovers": len(found) + len(there), "freed": freed + sum(entry.size for entry in there)}


def _is_finished(partial: Path) -> bool:
    """Whether the run of these checkpoints was saved after them, and no process works on it."""
    run = partial.with_name(partial.name.removeprefix(".").removesuffix(PARTIAL))
    try:
        saved, kept = ((path.lstat().st_mtime_ns) for path in (run / "result.json", partial / "state.json"))
    except OSError:
        return False
    return saved >= kept and all(is_abandoned(lease) for lease in lease_files(partial))
