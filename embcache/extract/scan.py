"""The state of a dataset's image files, the image sizes that decide the transform, and what a store owes.

Files are listed folder by folder; a header is read once, and only if a transform may depend on it. Width, height and
digest of a file are kept in ``scan.parquet`` with the state that the file had (`FileState`), and hold while it has it.

An image is owed if its ID is not in the store or its bytes changed. A file in the state in which it was last hashed has
the same bytes; any other is hashed, so that touching or copying a dataset costs a read and no extraction. Size and
modification time alone prove nothing: bitmaps, tiles, DICOM and array files have one size, and archives restore times.
Owed images go into new shards; a published plan is never edited.
"""

from __future__ import annotations

import hashlib
import io
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from embcache.backbones.catalog import Backbone
from embcache.backbones.transforms import Transform, choose_transform
from embcache.cores import default_workers
from embcache.data.budget import Decoding, fits_now
from embcache.data.dataset import ImageDataset
from embcache.data.files import FileState, is_inside, stat_files
from embcache.data.formats import is_square_of
from embcache.data.images import DECODER_VERSION, ImageRef, image_refs, read_image, read_size
from embcache.errors import DatasetNotFoundError, ImageError
from embcache.extract.worker import LEFT, medium_failed, prepare
from embcache.io import read_regular
from embcache.paths import PathLike, home_dir, slug
from embcache.sealed import open_parquet
from embcache.store.commit import publish_plan, write_scan
from embcache.store.feature_store import FeatureStore, extract_command
from embcache.store.schema import PlanEntry

# Size of a file that is not there: such images are planned too, and quarantined with the reason when computed.
ABSENT = -1
UNREADABLE = (0, 0)
"""Width and height of an image whose header cannot be read; the next scan tries again, for another decoder may."""
UNKNOWN = (-1, -1)
"""Width and height of an image whose header was not read."""

# Images with a longer side are resized by every transform, whatever the sizes of the others.
_LARGEST_KEPT = 224
_TOGETHER = 256  # headers that a thread reads at a time
_GONE = FileState(ABSENT, 0, 0, 0)
# A file that was written so shortly before the scan may be written again without another time.
_TICK_NS = 2_000_000_000
_STATE = list(FileState._fields)
_SCAN_COLUMNS = ["path", "place", *_STATE, "width", "height", "digest"]
_DECODER = "decoder"  # column of a kept scan: the version that read its headers


@dataclass(frozen=True, eq=False)
class Scan:
    """The distinct files of a dataset as they are now."""

    root: Path  # folder of the images
    states: Mapping[str, FileState]  # of each path; size `ABSENT` where there is no file
    seen: dict[str, tuple[int, int]]  # width and height of the images whose header was read, now or earlier
    members: Mapping[str, str]  # place of each path inside its container, empty for a file
    digests: dict[tuple[str, str], str] = field(default_factory=dict)
    moved: frozenset[str] = frozenset()
    images: Sequence[tuple[str, str]] = ()  # path and place of every distinct image
    began_ns: int = 0  # when the files were looked at
    decoding: Decoding = field(default_factory=Decoding)  # the limit on pixels

    def confirm(self, images: Iterable[tuple[str, str]]) -> None:
        """Read those images whose digest is not known, several at once, for :attr:`digests`."""
        unknown = [image for image in images if image not in self.digests]
        with ThreadPoolExecutor(default_workers()) as pool:
            chunks = [unknown[start : start + _TOGETHER] for start in range(0, len(unknown), _TOGETHER)]
            found = pool.map(partial(_digests, self.root, self.decoding), chunks)
            digests = zip(unknown, chain.from_iterable(found), strict=True)
            self.digests.update({image: digest for image, digest in digests if digest})

    def readable(self, path: str, place: str) -> bool:
        """Whether an image can be decoded now; `DatasetError` if its file cannot be read for now."""
        try:
            read_image(self.root, path, place, self.decoding)
        except ImageError:
            return False
        except OSError as error:
            raise medium_failed(self.root / path, error) from error
        return True

    def learn(self, sources: Sequence[ImageRef], digests: Sequence[str]) -> None:
        """Take over the digests of images that were just read; ``""`` is none."""
        for source, digest in zip(sources, digests, strict=True):
            if digest:
                self.digests[source.path, source.place] = digest

    def read(self, paths: Sequence[str], pool: Executor, guess: tuple[int, int] | None = None) -> set[tuple[int, int]]:
        """Read the headers of some files, several at once; return the distinct sizes of those that can be read."""
        chunks = [paths[start : start + _TOGETHER] for start in range(0, len(paths), _TOGETHER)]
        sizes = chain.from_iterable(pool.map(lambda some: self._read(some, guess), chunks))
        found = dict(zip(paths, sizes, strict=True))
        self.seen.update(found)
        return set(found.values()) - {UNREADABLE}

    def _read(self, paths: Sequence[str], guess: tuple[int, int] | None) -> list[tuple[int, int]]:
        guess = guess or UNKNOWN
        side = guess[0] if guess[0] == guess[1] else 0
        inside: dict[str, bool] = {}  # whether a folder, links followed, lies in the root
        sizes = []
        for path in paths:
            place, folder = self.members[path], path.rpartition("/")[0]
            if folder not in inside:
                inside[folder] = is_inside(self.root, os.path.realpath(f"{self.root}/{folder}"))
            try:
                square = False
                with suppress(OSError):  # a link, or something that the decoder reports
                    square = side > 0 and not place and inside[folder] and is_square_of(f"{self.root}/{path}", side)
                sizes.append(guess if square else read_size(self.root, path, place))
            except ImageError:
                sizes.append(UNREADABLE)
            except OSError as error:
                raise medium_failed(self.root / path, error) from error
        return sizes


def _digests(root: Path, decoding: Decoding, images: Sequence[tuple[str, str]]) -> list[str]:
    """Sha256 of the bytes of each image; empty if it is missing, or unreadable in its array file."""
    digests = []
    for path, place in images:
        try:
            if place:
                digests.append(read_image(root, path, place, decoding)[1])
            else:
                with (root / path).open("rb") as file:
                    digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except (ImageError, FileNotFoundError, NotADirectoryError):
            digests.append("")
        except OSError as error:
            raise medium_failed(root / path, error) from error
    return digests


def read_sizes(scan: Scan, pool: Executor) -> set[tuple[int, int]]:
    """The distinct (width, height) of the readable images, as far as any transform depends on them.

    Reading stops at a second size, or at a side above `_LARGEST_KEPT`: `choose_transform` then chooses what it would
    choose knowing all sizes.
    """
    sizes = set(scan.seen.values()) - {UNREADABLE}
    unread = [path for path, state in scan.states.items() if path not in scan.seen and state.size != ABSENT]
    start, count = 0, 16
    # No further size can change the transform once there are two, or one that every transform resizes.
    while start < len(unread) and len(sizes) < 2 and not any(max(size) > _LARGEST_KEPT for size in sizes):
        guess = next(iter(sizes)) if len(sizes) == 1 else None
        sizes |= scan.read(unread[start : start + count], pool, guess)
        start, count = start + count, min(2 * count, 1 << 14)
    return sizes


@dataclass(frozen=True)
class DatasetFiles:
    """A dataset's files as they are now."""

    root: Path  # folder of the images
    folder: Path  # folder of the dataset's stores
    scan: Scan  # see :func:`scan_images`
    sizes: Collection[tuple[int, int]]  # see `read_sizes`; at least one

    def keep(self) -> None:
        """Write the scan beside the stores, so that the next one reads no header and no unchanged file again."""
        write_scan(self.folder, encode_scan(self.scan))

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Keep the scan once more, however the block ends, if digests were learned in it."""
        known = len(self.scan.digests)
        try:
            yield
        finally:
            if len(self.scan.digests) > known:
                # What other processes kept meanwhile stays, as far as it holds for the files as they were here.
                _, others, _ = _still_true(decode_scan(self.folder / "scan.parquet"), self.scan.states)
                self.scan.digests.update(others | self.scan.digests)
                self.keep()


def scan_dataset(
    dataset: ImageDataset, home: PathLike | None, pool: Executor, decoding: Decoding | None = None
) -> DatasetFiles:
    """Look at every file of a dataset; what an earlier scan knows of unchanged ones is not read again."""
    root, folder = image_root(dataset), home_dir(home) / slug(dataset.name)
    scan = scan_images(dataset, root, decode_scan(folder / "scan.parquet"), pool, decoding)
    sizes = read_sizes(scan, pool)
    if not sizes:
        raise none_readable(dataset, root, decoding)
    return DatasetFiles(root, folder, scan, sizes)


def image_root(dataset: ImageDataset) -> Path:
    """Folder of the images; `DatasetNotFoundError` if it is not here."""
    if dataset.root is None or not dataset.root.is_dir():
        raise DatasetNotFoundError(
            f"the images of {dataset.name} are not here; extraction needs them", code="images-not-found",
            expected=str(dataset.root) if dataset.root else None,
            fix=extract_command("NAME", replace(dataset, root=None, origin=None)),
        )  # fmt: skip
    return dataset.root


def none_readable(dataset: ImageDataset, root: Path, decoding: Decoding | None = None) -> DatasetNotFoundError:
    """The error for a dataset without any readable image, with the first reasons."""
    prepared = [prepare(root, source, (), decoding=decoding) for source in image_refs(dataset.table.head(3))]
    reasons = dict.fromkeys(image.reason for image in prepared if image.reason)
    return DatasetNotFoundError(
        "none of the dataset's images can be read", code="no-readable-image", where=root,
        found=f"{len(dataset)} names; the first: {'; '.join(reasons) or 'headers without a size'}",
        fix=f"embcache datasets {dataset.layout} --data-root {root}",
    )  # fmt: skip


def dataset_transform(
    backbone: Backbone, kind: str | None, dataset: ImageDataset, home: PathLike | None = None
) -> Transform:
    """The transform that an extraction of ``backbone`` over ``dataset`` would use."""
    with ThreadPoolExecutor(default_workers()) as pool:
        files = scan_dataset(dataset, home, pool)
    chosen = choose_transform(backbone, kind, files.sizes)
    files.keep()
    return chosen


def scan_images(
    dataset: ImageDataset, root: Path, known: pd.DataFrame | None, pool: Executor, decoding: Decoding | None = None
) -> Scan:
    """State of each distinct file of a dataset, with what ``known``, an earlier scan, has of the unchanged ones.

    The header of the first file of each suffix is read, so that a decoder that is not installed is missed now.
    """
    began = time.time_ns()
    images = list(dict.fromkeys(zip(dataset.table["path"].tolist(), dataset.table["place"].tolist(), strict=True)))
    members: dict[str, str] = {}
    for path, place in images:
        members.setdefault(path, place)
    try:
        states = {path: state or _GONE for path, state in stat_files(root, list(members))}
    except OSError as error:
        raise medium_failed(Path(error.filename or root), error) from error
    seen, digests, moved = _still_true(known, states)
    scan = Scan(root, states, seen, members, digests, moved, images, began, decoding or Decoding())
    first: dict[str, str] = {}
    for path, state in states.items():
        if state.size != ABSENT:
            first.setdefault(path[path.rfind(".") :].lower() if "." in path[-8:] else "", path)
    scan.read([path for path in first.values() if path not in scan.seen], pool)
    return scan


def _still_true(
    known: pd.DataFrame | None, states: Mapping[str, FileState]
) -> tuple[dict[str, tuple[int, int]], dict[tuple[str, str], str], frozenset[str]]:
    """Sizes and digests of an earlier scan that still hold, and files changed except for size and time."""
    seen: dict[str, tuple[int, int]] = {}
    digests: dict[tuple[str, str], str] = {}
    moved = set()
    for path, place, *then, width, height, digest in () if known is None else known.itertuples(index=False, name=None):
        now = states.get(path)
        if now is not None and now == tuple(then):
            if width > 0:
                seen[path] = width, height
            if digest:
                digests[path, place] = digest
        elif now is not None and now[:2] == tuple(then[:2]):
            moved.add(path)
    return seen, digests, frozenset(moved)


def encode_scan(scan: Scan) -> bytes:
    """A scan as Parquet bytes, one row per image, with the decoder's version.

    Width and height are -1 for headers that were not read; a digest is empty if it is not known, or if the file was
    written so shortly before the scan that it could change without another time.
    """
    late = scan.began_ns - _TICK_NS
    states = np.array([scan.states[path] for path, _ in scan.images], dtype=np.int64).reshape(-1, len(_STATE))
    sizes = np.array([scan.seen.get(path, UNKNOWN) for path, _ in scan.images], dtype=np.int64).reshape(-1, 2)
    settled = states[:, 1:3].max(axis=1) < late
    digests = [scan.digests.get(image, "") if old else "" for image, old in zip(scan.images, settled, strict=True)]
    columns = [[path for path, _ in scan.images], [place for _, place in scan.images], *states.T, *sizes.T, digests]
    buffer = io.BytesIO()
    table = pd.DataFrame(dict(zip(_SCAN_COLUMNS, columns, strict=True)))
    table.assign(**{_DECODER: DECODER_VERSION}).to_parquet(buffer, index=False)
    return buffer.getvalue()


def decode_scan(path: Path) -> pd.DataFrame | None:
    """The scan kept in a file, or None: it only saves work, so one that cannot be read counts as absent.

    So does one that another version of the decoder made: it may see other sizes.
    """
    try:
        scan: pd.DataFrame = open_parquet(read_regular(path))[1].to_pandas()
    except (OSError, ValueError, pa.ArrowException):
        return None
    ours = {*_SCAN_COLUMNS, _DECODER} <= set(scan.columns) and (scan[_DECODER] == DECODER_VERSION).all()
    if not ours or any(scan[name].dtype != "int64" for name in _SCAN_COLUMNS[2:-1]):
        return None
    texts = all(isinstance(value, str) for name in ("path", "place", "digest") for value in scan[name])
    return scan[_SCAN_COLUMNS] if texts else None


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
            # Only its digest tells if it has changed.
            if image in held and image not in due and held[image].digest and states[path].size != ABSENT
            and (place or held[image].size == states[path].size)
        )  # fmt: skip
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
        made = {image: PlanEntry(image, *states[members[image][0]][:2], None, members[image][1]) for image in fresh}
        # Another process may plan at the same moment: the one that finds its number taken starts again.
        if not publish or all(
            publish_plan(store.path, number, [made[image] for image in chunk]) for number, chunk in chunks.items()
        ):
            shards = [Shard(number, tuple(entry.id for entry in entries)) for number, entries in sorted(owed.items())]
            shards += [Shard(number, tuple(chunk)) for number, chunk in chunks.items()]
            shards.sort(key=lambda shard: shard.number)
            return Plan(tuple(shards), cached - changed - retried, len(fresh) - changed - retried, changed, retried)


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
