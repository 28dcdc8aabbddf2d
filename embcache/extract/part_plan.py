"""What a store owes for one partition of a dataset, in arrays: no object is kept for each of millions of images.

The rules are those of `embcache.extract.scan.plan_store`. Owed images that follow each other in the partition are
planned as a range of its rows, others as a list of IDs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from embcache.data.budget import fits_now
from embcache.data.dataset import ImageDataset
from embcache.data.partitioned import text_array
from embcache.extract.quarantine import LEFT
from embcache.partitions import Partition
from embcache.store import reading
from embcache.store.commit import PlanEntry, PlannedRange, publish_plan, publish_range
from embcache.store.feature_store import FeatureStore
from embcache.store.schema import digests_to_bytes

if TYPE_CHECKING:
    from embcache.extract.scan import Scan

# Size of a file that is not there: such images are planned too, and quarantined with the reason when computed.
ABSENT = -1
_FEWEST = 16  # rows of a range: fewer are listed

Rows = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Shard:
    """A fixed run of rows of one store that is planned and not yet committed."""

    number: int
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What one store owes for one dataset."""

    shards: tuple[Shard, ...]
    cached: int  # images of the dataset that are committed already
    added: int  # images that no shard held before this plan
    changed: int  # images whose bytes changed since they were extracted
    retried: int = 0  # quarantined images that are owed once more


@dataclass(frozen=True)
class _Held:
    """What a store holds, or owes, of each of a partition's n images."""

    owed: dict[int, tuple[str, ...]]  # IDs of shards that are planned and not committed
    free: int  # the first number that no shard has
    live: Flags  # (n,) has a committed row
    due: Flags  # (n,) in a planned shard, and is read when it is computed
    held: Flags  # (n,) either, or in a shard that `embcache gc` planned, which has digests
    again: Flags  # (n,) quarantined, and owed once more
    states: Rows  # size and time when planned, (n, 2), where there is no digest
    digests: NDArray[np.uint8]  # sha256 (n, 32), zeros where there is none


def plan_part(
    store: FeatureStore, dataset: ImageDataset, scan: Scan, *, publish: bool, retry_quarantined: bool
) -> Plan:
    """Publish what ``store`` owes for a partition, and return it; row k of the scan is row k of the table."""
    part, (ids, places) = dataset.part, (text_array(dataset.table, name) for name in ("id", "place"))
    assert part is not None and len(ids) == len(scan.states), "a partition is planned as a whole"  # noqa: PT018
    while True:
        now = reading.unless_collected(store.path, lambda: _look(store, part, ids, scan, retry_quarantined))
        fresh = _fresh(now, scan)
        retried = int(now.again[fresh].sum())
        changed = int(now.held[fresh].sum()) - retried
        size = store.rows_per_shard
        chunks = [fresh[start : start + size] for start in range(0, len(fresh), size)]
        # Another process may plan at the same moment: the one that finds its number taken starts again.
        if not publish or all(
            _publish(store, now.free + i, part, ids, places, scan, rows) for i, rows in enumerate(chunks)
        ):
            shards = [Shard(number, names) for number, names in now.owed.items()]
            shards += [
                Shard(now.free + i, tuple(ids.take(pa.array(rows)).to_pylist())) for i, rows in enumerate(chunks)
            ]
            cached = int(now.live.sum()) - changed - retried
            return Plan(tuple(shards), cached, len(fresh) - changed - retried, changed, retried)


def _publish(
    store: FeatureStore, number: int, part: Partition, ids: pa.Array, places: pa.Array, scan: Scan, rows: Rows
) -> bool:
    start, stop, states = int(rows[0]), int(rows[-1]) + 1, scan.states[rows, :2]
    if len(rows) >= _FEWEST and stop - start == len(rows):
        return publish_range(store.path, number, PlannedRange(part.digest, start, stop, states))
    texts = (column.take(pa.array(rows)).to_pylist() for column in (ids, places))
    columns = zip(*texts, states.tolist(), strict=True)
    return publish_plan(
        store.path, number, [PlanEntry(id_, size, time, None, place) for id_, place, (size, time) in columns]
    )


def _look(store: FeatureStore, part: Partition, ids: pa.Array, scan: Scan, retry_quarantined: bool) -> _Held:
    """What the store holds of a partition's images now."""
    n, path = len(ids), store.path
    # In this order: `embcache gc` removes plans before shards, and what it removed is not owed.
    committed = {*store.committed()}
    free, numbers = reading.numbers_of_part(path, part)
    there, due, copied, again = (np.zeros(n, bool) for _ in range(4))
    states, digests = np.full((n, 2), -1, np.int64), np.zeros((n, 32), np.uint8)

    live = reading.read_live(path, reading.read_header(path), [number for number in numbers if number in committed])
    rows = _rows(path, part, ids, live)
    kept = np.flatnonzero(rows >= 0)
    there[rows[kept]], digests[rows[kept]] = True, live.digests.raw[kept]
    for k in kept[~live.valid[kept]].tolist():
        reason = live.reasons[k]
        again[rows[k]] = retry_quarantined or reason == LEFT or fits_now(reason, scan.decoding.max_pixels)
    bare = kept[~live.digests.raw[kept].any(axis=1)]  # with a digest the state when planned says nothing more
    for number in np.unique(live.shards[bare]).tolist():
        known, those = _states(reading.read_planned(path, number)), bare[live.shards[bare] == number]
        those = those[live.positions[those] < len(known)]
        states[rows[those]] = known[live.positions[those]]

    plans = [_Owed.read(path, part, ids, number) for number in numbers if number not in committed]
    # Images of other partitions, too: only what is all its own is computed with a partition.
    plans = [each for each in plans if not (each.rows < 0).any()]
    for each in sorted(plans, key=lambda each: not each.digests.any()):  # an image that is due is read, however planned
        (copied if each.digests.any() else due)[each.rows] = True
        states[each.rows], digests[each.rows] = each.states, each.digests
    owed = {each.number: each.ids for each in plans}
    return _Held(owed, free, there, due, there | due | copied, again & ~due, states, digests)


@dataclass(frozen=True)
class _Owed:
    """A shard that is planned and not committed."""

    number: int
    ids: tuple[str, ...]
    rows: Rows  # of the partition, (n,); -1 for images of others
    states: Rows  # (n, 2)
    digests: NDArray[np.uint8]  # (n, 32)

    @classmethod
    def read(cls, path: Path, part: Partition, ids: pa.Array, number: int) -> _Owed:
        planned = reading.read_planned(path, number)
        own = planned if isinstance(planned, PlannedRange) and planned.partition == part.digest else None
        if own is not None and own.stop <= len(ids):
            n = own.stop - own.start
            names = tuple(ids.slice(own.start, n).to_pylist())
            return cls(number, names, np.arange(n) + own.start, own.states, np.zeros((n, 32), np.uint8))
        entries = reading.read_plan(path, number)
        names, digests = tuple(entry.id for entry in entries), [entry.digest or "" for entry in entries]
        rows = pc.fill_null(pc.index_in(pa.array(names, ids.type), value_set=ids), -1).to_numpy().astype(np.int64)
        return cls(number, names, rows, _states(entries), digests_to_bytes(digests))


def _states(planned: PlannedRange | Sequence[PlanEntry]) -> Rows:
    """Size and time of the files of a plan's rows, (n, 2)."""
    if isinstance(planned, PlannedRange):
        return planned.states
    return np.array([(entry.size, entry.mtime_ns) for entry in planned], np.int64)


def _rows(path: Path, part: Partition, ids: pa.Array, live: reading.LiveRows) -> Rows:
    """Row of the partition of each live row of a store; -1 for other images."""
    numbers, inverse = np.unique(live.shards, return_inverse=True)
    ranges = [reading.range_of(path, number) for number in numbers.tolist()]
    starts = np.array([start if digest == part.digest else -1 for digest, start in ranges], np.int64)
    rows = np.where(starts[inverse] >= 0, starts[inverse] + live.positions, -1)
    names = pa.array(live.ids, ids.type)
    there = ids.take(pa.array(rows, mask=(rows < 0) | (rows >= len(ids))))
    others = np.flatnonzero(~pc.fill_null(pc.equal(there, names), False).to_numpy(zero_copy_only=False))
    if len(others):
        found = pc.index_in(names.take(pa.array(others)), value_set=ids)
        rows[others] = pc.fill_null(found, -1).to_numpy()
    return rows


def _fresh(now: _Held, scan: Scan) -> Rows:
    """Rows of the images that no shard holds, or not as their bytes are now."""
    alike = (now.states == scan.states[:, :2]).all(axis=1)
    absent = scan.states[:, 0] == ABSENT
    known = now.digests.any(axis=1)
    # Only its digest tells if an image has changed.
    scan.confirm(np.flatnonzero(now.held & ~now.due & known & ~absent))
    same = np.where(now.due | ~known, alike, (now.digests == scan.digests).all(axis=1))
    # There were no bytes. Another store's scan may have seen the change.
    bare = now.held & ~now.due & ~known
    same &= ~(bare & scan.moved)
    for row in np.flatnonzero(bare & same & ~absent).tolist():
        same[row] = bool(scan.fault(*scan.images[row]))
    return np.flatnonzero(~now.held | now.again | ~same)
