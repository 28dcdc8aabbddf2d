"""Which images a feature store owes, and in which shards they are computed.

An image is owed if its ID is not in the store or its bytes changed. A file in the state in which it was last hashed
(size, mtime, ctime, inode: see `embcache.extract.scan`) has the same bytes; any other is hashed, so that touching or
copying a dataset costs a read and no extraction. Size and modification time alone prove nothing: bitmaps, tiles, DICOM
and array files have one size, and archives restore times. Owed images go into new shards; a published plan is never
edited.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from embcache.data.budget import fits_now
from embcache.data.dataset import ImageDataset
from embcache.data.files import FileState
from embcache.extract.batching import LEFT
from embcache.extract.scan import ABSENT, Scan
from embcache.store.commit import PlanEntry, publish_plan
from embcache.store.feature_store import FeatureStore


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


def plan_store(
    store: FeatureStore,
    dataset: ImageDataset,
    root: Path,
    scan: Scan,
    *,
    publish: bool = True,
    retry_quarantined: bool = False,
) -> Plan:
    """Publish what ``store`` owes for ``dataset`` as new shards, and return all shards still to compute.

    Shards that an earlier, interrupted run planned come first, unchanged. With ``publish=False`` nothing is written
    and the shards are those that would be. With ``retry_quarantined`` quarantined images are owed once more, though
    their files have not changed. So are images that were too large, if the scan's limit on pixels now allows them.
    """
    states = scan.states
    ids, paths, rows = (dataset.table[name].tolist() for name in ("id", "path", "place"))
    members = dict(zip(ids, zip(paths, rows, strict=True), strict=True))
    while True:
        # In this order: `embcache gc` removes plans before shards, and what it removed is not owed.
        committed, plans = set(store.committed()), store.plans()
        owed = {number: entries for number, entries in plans.items() if number not in committed}
        held, reasons = store.sources_and_reasons()
        # The row of an image that had left the dataset says nothing about one that is back.
        again = {
            image
            for image, reason in reasons.items()
            if retry_quarantined or reason == LEFT or fits_now(reason, scan.decoding.max_pixels)
        }
        cached = sum(image in held for image in members)
        due, copied = dict[str, PlanEntry](), dict[str, PlanEntry]()
        for _, entries in sorted(owed.items()):
            # Only `embcache gc` plans digests: it copies the rows that were made of those bytes.
            (copied if any(entry.digest for entry in entries) else due).update({entry.id: entry for entry in entries})
        held.update(copied | due)
        again.difference_update(due)
        scan.confirm(
            (path, place)
            for image, (path, place) in members.items()
            if image in held and image not in due and _comparable(held[image], states[path], place)
        )
        fresh = [
            image
            for image, (path, place) in members.items()
            if image not in held or image in again or not _same_bytes(held[image], image in due, scan, path, place)
        ]
        retried = sum(image in again for image in fresh)
        changed = sum(image in held for image in fresh) - retried
        size = store.rows_per_shard
        first = max([*plans, *committed], default=-1) + 1
        chunks = {first + i: fresh[start : start + size] for i, start in enumerate(range(0, len(fresh), size))}
        # Another process may plan at the same moment: the one that finds its number taken starts again.
        if not publish or all(
            publish_plan(store.path, number, [_entry(image, members[image], scan) for image in chunk])
            for number, chunk in chunks.items()
        ):
            shards = [Shard(number, tuple(entry.id for entry in entries)) for number, entries in sorted(owed.items())]
            shards += [Shard(number, tuple(chunk)) for number, chunk in chunks.items()]
            return Plan(
                tuple(sorted(shards, key=lambda shard: shard.number)),
                cached - changed - retried,
                len(fresh) - changed - retried,
                changed,
                retried,
            )


def _entry(image: str, source: tuple[str, str], scan: Scan) -> PlanEntry:
    path, place = source
    size, mtime_ns = scan.states[path][:2]
    return PlanEntry(image, size, mtime_ns, None, place)


def _same_bytes(held: PlanEntry, owed: bool, scan: Scan, path: str, place: str) -> bool:
    """Whether the image's bytes are those that its row was made from, or is owed of."""
    state = scan.states[path]
    alike = (held.size, held.mtime_ns) == state[:2]
    if owed:  # it is read when it is computed
        return alike
    if not held.digest:
        # There were no bytes, or not of the image alone (array files). Another store's scan may have seen the change.
        return alike and path not in scan.moved and (state.size == ABSENT or not scan.readable(path, place))
    return held.digest == scan.digests.get((path, place))


def _comparable(held: PlanEntry, state: FileState, place: str) -> bool:
    """Whether only its digest tells if an image has changed."""
    return bool(held.digest) and state.size != ABSENT and (place != "" or held.size == state.size)
