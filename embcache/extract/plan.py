"""Which images a feature store owes, and in which shards they are computed.

An image is owed when its id is not in the store or its bytes changed. Unchanged size and modification time are proof
enough that bytes are the same; where they differ the bytes are hashed, so touching or copying a dataset costs a read
and no extraction. Owed images go into new shards; a published plan is never edited.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from embcache.data.dataset import ImageDataset
from embcache.data.images import DECODER_VERSION, read_image, read_size
from embcache.errors import ImageError
from embcache.store.commit import PlanEntry, publish_plan
from embcache.store.feature_store import FeatureStore

# Size of a file that is not there: such images are planned too, and quarantined with the reason when computed.
ABSENT = -1

_SCAN_COLUMNS = ["path", "size", "mtime_ns", "width", "height"]
_DECODER = "decoder"  # column of a kept scan: the version that read its headers


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


def scan_images(dataset: ImageDataset, root: Path, known: pd.DataFrame | None, pool: Executor) -> pd.DataFrame:
    """State of each distinct file of a dataset.

    Returns
    -------
    DataFrame
        ``path``, ``size`` (bytes), ``mtime_ns``, ``width``, ``height`` (pixels; 0 where the header cannot be read).
        Headers are read where size or modification time differ from ``known``, an earlier scan, and where that
        could not read them: another decoder may.

    Raises
    ------
    DatasetError
        A path leads out of the root, or what decodes an image is not installed.
    """
    table = dataset.table[["path", "member"]].drop_duplicates("path")
    before = {} if known is None else _by_path(known)

    def scan(path: str, member: int) -> tuple[str, int, int, int, int]:
        try:
            state = (root / path).stat()
        except FileNotFoundError:
            return path, ABSENT, 0, 0, 0
        seen = before.get(path)
        if seen is not None and seen[:2] == (state.st_size, state.st_mtime_ns) and seen[2] > 0:
            return (path, *seen)
        try:
            width, height = read_size(root, path, member)
        except ImageError:
            width = height = 0
        return path, state.st_size, state.st_mtime_ns, width, height

    rows = pool.map(scan, table["path"], table["member"])
    return pd.DataFrame(list(rows), columns=_SCAN_COLUMNS)


def _by_path(scan: pd.DataFrame) -> dict[str, tuple[int, int, int, int]]:
    """Path → (size, mtime_ns, width, height)."""
    columns = [scan[name].tolist() for name in _SCAN_COLUMNS]
    return {path: (size, mtime, width, height) for path, size, mtime, width, height in zip(*columns, strict=True)}


def encode_scan(scan: pd.DataFrame) -> bytes:
    """A scan as Parquet bytes, with the decoder's version."""
    buffer = io.BytesIO()
    scan.assign(**{_DECODER: DECODER_VERSION}).to_parquet(buffer, index=False)
    return buffer.getvalue()


def decode_scan(path: Path) -> pd.DataFrame | None:
    """The scan kept in a file, or None: it only saves work, so one that cannot be read counts as absent.

    So does one that another version of the decoder made: it may see other sizes.
    """
    try:
        scan = pd.read_parquet(path)
    except (OSError, ValueError):
        return None
    if not {*_SCAN_COLUMNS, _DECODER} <= set(scan.columns) or not (scan[_DECODER] == DECODER_VERSION).all():
        return None
    return scan[_SCAN_COLUMNS]


def image_sizes(scan: pd.DataFrame) -> set[tuple[int, int]]:
    """The distinct (width, height) of the images that can be read."""
    readable = scan[scan["width"] > 0]
    return {(int(width), int(height)) for width, height in zip(readable["width"], readable["height"], strict=True)}


def plan_store(
    store: FeatureStore, dataset: ImageDataset, root: Path, scan: pd.DataFrame, *, publish: bool = True
) -> Plan:
    """Publish what ``store`` owes for ``dataset`` as new shards, and return all shards still to compute.

    Shards that an earlier, interrupted run planned come first, unchanged. With ``publish=False`` nothing is written
    and the shards are those that would be.
    """
    states = {path: state[:2] for path, state in _by_path(scan).items()}
    members = dict(
        zip(dataset.table["id"], zip(dataset.table["path"], dataset.table["member"], strict=True), strict=True)
    )
    while True:
        plans, committed = store.plans(), set(store.committed())
        owed = {number: entries for number, entries in plans.items() if number not in committed}
        held = dict(store.sources())
        cached = sum(image in held for image in members)
        for _, entries in sorted(owed.items()):
            held.update((entry.id, entry) for entry in entries)
        fresh = [
            PlanEntry(image, *states[path], None)
            for image, (path, member) in members.items()
            if image not in held or not _same_bytes(held[image], root, path, int(member), states[path])
        ]
        changed = sum(entry.id in held for entry in fresh)
        size = store.rows_per_shard
        chunks = [fresh[start : start + size] for start in range(0, len(fresh), size)]
        first = max(plans, default=-1) + 1
        # Another process may plan at the same moment: the one whose number is taken looks again.
        if not publish or all(publish_plan(store.path, first + i, chunk) for i, chunk in enumerate(chunks)):
            numbered: Mapping[int, object] = {first + i: chunk for i, chunk in enumerate(chunks)}
            shards = [Shard(n, tuple(e.id for e in entries)) for n, entries in sorted({**owed, **numbered}.items())]  # type: ignore[attr-defined]
            return Plan(tuple(shards), cached - changed, len(fresh) - changed, changed)


def _same_bytes(held: PlanEntry, root: Path, path: str, member: int, state: tuple[int, int]) -> bool:
    if (held.size, held.mtime_ns) == state:
        return True
    if not held.digest or state[0] == ABSENT or (member < 0 and held.size != state[0]):
        return False
    return held.digest == _digest(root, path, member)


def _digest(root: Path, path: str, member: int) -> str:
    if member < 0:
        with (root / path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return read_image(root, path, member)[1]
