"""Which images a feature store owes, and in which shards they are computed.

An image is owed when its id is not in the store or its bytes changed. Unchanged size and modification time are proof
enough that bytes are the same; where they differ the bytes are hashed, so touching or copying a dataset costs a read
and no extraction. Owed images go into new shards; a published plan is never edited.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from embcache.data.dataset import ImageDataset
from embcache.data.images import read_image
from embcache.errors import ImageError
from embcache.extract.batching import LEFT, medium_failed
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
    retried: int = 0  # images that were quarantined, and are owed once more


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
    and the shards are those that would be. With ``retry_quarantined`` quarantined images are owed once more: what could
    not be read then may be now, though the files have not changed.
    """
    states = scan.states
    ids, paths, rows = (dataset.table[name].tolist() for name in ("id", "path", "member"))
    members = dict(zip(ids, zip(paths, rows, strict=True), strict=True))
    while True:
        # In this order: `embcache gc` removes plans before shards, and what it removed is not owed.
        committed, plans = set(store.committed()), store.plans()
        owed = {number: entries for number, entries in plans.items() if number not in committed}
        held, reasons = store.sources_and_reasons()
        # A row of an image that had left the dataset says nothing of one that is back.
        again = {image for image, reason in reasons.items() if retry_quarantined or reason == LEFT}
        cached = sum(image in held for image in members)
        for _, entries in sorted(owed.items()):
            held.update((entry.id, entry) for entry in entries)
            again.difference_update(entry.id for entry in entries)
        fresh = [
            image
            for image, (path, member) in members.items()
            if image not in held or image in again or not _same_bytes(held[image], root, path, member, states[path])
        ]
        retried = sum(image in again for image in fresh)
        changed = sum(image in held for image in fresh) - retried
        size = store.rows_per_shard
        first = max([*plans, *committed], default=-1) + 1
        chunks = {first + i: fresh[start : start + size] for i, start in enumerate(range(0, len(fresh), size))}
        # Another process may plan at the same moment: the one whose number is taken looks again.
        if not publish or all(
            publish_plan(store.path, number, [PlanEntry(image, *states[members[image][0]]) for image in chunk])
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


def _same_bytes(held: PlanEntry, root: Path, path: str, member: int, state: tuple[int, int]) -> bool:
    if (held.size, held.mtime_ns) == state:
        return True
    if not held.digest or state[0] == ABSENT or (member < 0 and held.size != state[0]):
        return False
    return held.digest == _digest(root, path, member)


def _digest(root: Path, path: str, member: int) -> str:
    """Of an image's bytes as they are now; empty where they cannot be had, so that computing it says why."""
    try:
        if member < 0:
            with (root / path).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        return read_image(root, path, member)[1]
    except (ImageError, FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise medium_failed(root / path, error) from error
