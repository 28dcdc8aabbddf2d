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
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embcache.cores import default_workers
from embcache.data.budget import Decoding, fits_now
from embcache.data.dataset import ImageDataset
from embcache.data.files import FileState, is_inside, is_object, open_file, stat_each, stat_files
from embcache.data.formats import is_square_of
from embcache.data.images import DECODER_VERSION, ImageRef, read_image, read_size
from embcache.data.partitioned import PartitionedDataset, text_array
from embcache.errors import DatasetNotFoundError, ImageError
from embcache.extract.part_plan import ABSENT as ABSENT
from embcache.extract.part_plan import Plan as Plan
from embcache.extract.part_plan import Shard as Shard
from embcache.extract.part_plan import plan_part
from embcache.extract.quarantine import LEFT, medium_failed
from embcache.io import read_regular
from embcache.partitions import MOST_ROWS, Partition, columns_key
from embcache.paths import PathLike, home_dir, slug
from embcache.sealed import open_parquet
from embcache.store.commit import publish_plan, write_scan
from embcache.store.feature_store import FeatureStore, extract_command
from embcache.store.schema import Digests, PlanEntry, digests_to_bytes

UNREADABLE = (0, 0)
"""Width and height of an image whose header cannot be read; the next scan tries again, for another decoder may."""
UNKNOWN = (-1, -1)
"""Width and height of an image whose header was not read."""

# Images with a longer side are resized by every transform, whatever the sizes of the others.
_LARGEST_KEPT = 224
_TOGETHER = 256  # headers that a thread reads at a time
GONE = FileState(ABSENT, 0, 0, 0)
# A file that was written so shortly before the scan may be written again without another time.
TICK_NS = 2_000_000_000
_STATE = list(FileState._fields)
_SIZE = ["width", "height"]
_SCAN_COLUMNS = ["path", "place", *_STATE, *_SIZE, "digest"]
_DECODER = "decoder"  # column of a kept scan: the version that read its headers


@dataclass(frozen=True, eq=False)
class Scan:
    """The distinct images of a dataset as their files are now. Arrays have one row per image: there may be millions."""

    root: Path  # folder of the images
    rows: Mapping[tuple[str, str], int]  # row of each image, by its path and its place
    firsts: NDArray[np.int64]  # row of the first image of the same file, (n,)
    states: NDArray[np.int64]  # as `FileState`, (n, 4); size `ABSENT` where there is no file
    seen: NDArray[np.int64]  # width and height, (n, 2), of first images of files whose header was read, now or earlier
    digests: NDArray[np.uint8]  # sha256 of the images' bytes, (n, 32); zeros where it is not known
    moved: NDArray[np.bool_]  # whether a file changed since an earlier scan except for size and time, (n,)
    began_ns: int  # when the files were looked at
    decoding: Decoding  # the limit on pixels

    @cached_property
    def images(self) -> Sequence[tuple[str, str]]:
        """Path and place of each row."""
        return list(self.rows)

    def confirm(self, rows: Sequence[int] | NDArray[np.int64]) -> None:
        """Read those images whose digest is not known, several at once, for :attr:`digests`."""
        wanted = np.asarray(rows, np.int64)
        unknown: list[int] = wanted[~self.digests[wanted].any(axis=1)].tolist()
        with ThreadPoolExecutor(default_workers()) as pool:
            images = [self.images[row] for row in unknown]
            chunks = [images[start : start + _TOGETHER] for start in range(0, len(images), _TOGETHER)]
            found = pool.map(partial(_digests, self.root, self.decoding), chunks)
            self._put(unknown, list(chain.from_iterable(found)))

    def fault(self, path: str, place: str) -> str:
        """Why an image cannot be decoded, empty if it can; `DatasetError` if its file cannot be read for now."""
        try:
            read_image(self.root, path, place, self.decoding)
        except ImageError as error:
            return error.problem
        except OSError as error:
            raise medium_failed(self.root / path, error) from error
        return ""

    def learn(self, sources: Sequence[ImageRef], digests: Sequence[str]) -> None:
        """Take over the digests of images that were just read; ``""`` is none."""
        known = [(self.rows[s.path, s.place], d) for s, d in zip(sources, digests, strict=True) if d]
        self._put([row for row, _ in known], [digest for _, digest in known])

    def _put(self, rows: Sequence[int], digests: Sequence[str]) -> None:
        self.digests[np.asarray(rows, np.int64)] = digests_to_bytes(digests)

    def recall(self, known: pd.DataFrame | None) -> None:
        """Take over what an earlier scan has of files that are unchanged, and note which changed unseen."""
        if known is None:
            return
        pairs = zip(known["path"].tolist(), known["place"].tolist(), strict=True)
        rows = np.fromiter((self.rows.get(pair, -1) for pair in pairs), np.int64, len(known))
        known, rows = known[rows >= 0], rows[rows >= 0]
        digests = digests_to_bytes(known["digest"].tolist())
        self._take_over(rows, known[_STATE].to_numpy(), known[["width", "height"]].to_numpy(), digests)

    def recall_part(self, known: pa.Table | None) -> None:
        """As :meth:`recall`, of an earlier scan of the same partition: row by row."""
        if known is not None and known.num_rows == len(self.states):
            states, headers = (np.stack([known[name] for name in names], axis=1) for names in (_STATE, _SIZE))
            digests = np.frombuffer(known["digest"].combine_chunks().buffers()[1], np.uint8, 32 * known.num_rows)
            self._take_over(np.arange(known.num_rows), states, headers, digests.reshape(-1, 32))

    def _take_over(
        self, rows: NDArray[np.int64], states: NDArray[np.int64], headers: NDArray[np.int64], digests: NDArray[np.uint8]
    ) -> None:
        equal = states == self.states[rows]
        same, alike = equal.all(axis=1), equal[:, :2].all(axis=1)
        read = same & (headers[:, 0] > 0)
        self.seen[self.firsts[rows[read]]] = headers[read]
        learned = same & digests.any(axis=1) & ~self.digests[rows].any(axis=1)
        self.digests[rows[learned]] = digests[learned]
        moved = np.zeros_like(self.moved)
        moved[self.firsts[rows[alike & ~same]]] = True
        self.moved[:] |= moved[self.firsts]

    def read(self, rows: Sequence[int], pool: Executor, guess: tuple[int, int] | None = None) -> set[tuple[int, int]]:
        """Read the headers of some images, several at once; return the distinct sizes of those that can be read."""
        chunks = [rows[start : start + _TOGETHER] for start in range(0, len(rows), _TOGETHER)]
        found = list(chain.from_iterable(pool.map(lambda some: self._read(some, guess or UNKNOWN), chunks)))
        self.seen[np.asarray(rows, np.int64)] = np.reshape(np.array(found, np.int64), (-1, 2))
        return set(found) - {UNREADABLE}

    def _read(self, rows: Sequence[int], guess: tuple[int, int]) -> list[tuple[int, int]]:
        side = guess[0] if guess[0] == guess[1] else 0
        inside: dict[str, bool] = {}  # whether a folder, links followed, lies in the root
        sizes = []
        for path, place in map(self.images.__getitem__, rows):
            folder = path.rpartition("/")[0]
            if folder not in inside:
                real = os.path.realpath(f"{self.root}/{folder}")
                inside[folder] = not is_object(path) and is_inside(self.root, real)
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
                with open_file(root, path) as file:
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
    first = scan.firsts == np.arange(len(scan.firsts))
    unread = np.flatnonzero(first & (scan.seen[:, 0] == UNKNOWN[0]) & (scan.states[:, 0] != ABSENT)).tolist()
    sizes = {(width, height) for width, height in np.unique(scan.seen[first], axis=0).tolist() if width > 0}
    start, count = 0, 16
    # No further size can change the transform once there are two, or one that every transform resizes.
    while start < len(unread) and len(sizes) < 2 and not any(max(size) > _LARGEST_KEPT for size in sizes):
        sizes |= scan.read(unread[start : start + count], pool, next(iter(sizes), None))
        start, count = start + count, min(2 * count, 1 << 14)
    return sizes


@dataclass(frozen=True)
class DatasetFiles:
    """A dataset's files as they are now."""

    root: Path  # folder of the images
    folder: Path  # folder of the dataset's stores
    scan: Scan  # see :func:`scan_images`
    sizes: Collection[tuple[int, int]]  # see `read_sizes`; at least one
    part: Partition | None = None  # where the files are those of one partition

    def keep(self) -> None:
        """Write the scan beside the stores, so that the next one reads no header and no unchanged file again."""
        if self.part is None:
            write_scan(self.folder, encode_scan(self.scan))
        else:
            write_scan(self.folder, encode_part(self.scan), _kept_scan(self.folder, self.part))

    def recall(self) -> None:
        """Take over what was kept of unchanged files, here or by other processes."""
        if self.part is None:
            self.scan.recall(decode_scan(self.folder / "scan.parquet"))
        else:
            self.scan.recall_part(decode_part(self.folder / _kept_scan(self.folder, self.part)))

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Keep the scan once more, however the block ends, if digests were learned in it."""
        known = self.scan.digests.any(axis=1).sum()
        try:
            yield
        finally:
            if self.scan.digests.any(axis=1).sum() > known:
                # What other processes kept meanwhile stays, as far as it holds for the files as they were here.
                self.recall()
                self.keep()


def scan_dataset(
    dataset: ImageDataset, home: PathLike | None, pool: Executor, decoding: Decoding | None = None
) -> DatasetFiles:
    """Look at every file of a dataset; what an earlier scan knows of unchanged ones is not read again."""
    root, folder = image_root(dataset), home_dir(home) / slug(dataset.name)
    if (part := dataset.part) is not None:
        scan = scan_part(dataset, root, decode_part(folder / _kept_scan(folder, part)), pool, decoding)
        return DatasetFiles(root, folder, scan, part.sizes or read_sizes(scan, pool), part)
    scan = scan_images(dataset, root, decode_scan(folder / "scan.parquet"), pool, decoding)
    sizes = read_sizes(scan, pool)
    if not sizes:
        raise none_readable(dataset, scan)
    return DatasetFiles(root, folder, scan, sizes)


def decisive_sizes(
    dataset: PartitionedDataset, home: PathLike | None, decoding: Decoding | None = None
) -> tuple[tuple[int, int], ...]:
    """The distinct sizes of the readable images of all partitions, as far as any transform depends on them."""
    sizes = set[tuple[int, int]]()
    with ThreadPoolExecutor(default_workers()) as pool:
        for part in dataset.parts():
            files = scan_dataset(part, home, pool, decoding)
            sizes |= {*files.sizes}
            files.keep()  # the headers that were read
            if len(sizes) > 1 or any(max(size) > _LARGEST_KEPT for size in sizes):
                return tuple(sorted(sizes))
    if not sizes:
        raise none_readable(part, files.scan)
    return tuple(sizes)


def image_root(dataset: ImageDataset) -> Path:
    """Folder of the images; `DatasetNotFoundError` if it is not here."""
    if dataset.root is None or not dataset.root.is_dir():
        raise DatasetNotFoundError(
            f"the images of {dataset.name} are not here; extraction needs them", code="images-not-found",
            expected=str(dataset.root) if dataset.root else None,
            fix=extract_command("NAME", replace(dataset, root=None, origin=None)),
        )  # fmt: skip
    return dataset.root


def none_readable(dataset: ImageDataset, scan: Scan) -> DatasetNotFoundError:
    """The error for a dataset without any readable image, with the first reasons."""
    reasons = dict.fromkeys(filter(None, (scan.fault(*image) for image in scan.images[:3])))
    return DatasetNotFoundError(
        "none of the dataset's images can be read", code="no-readable-image", where=scan.root,
        found=f"{len(dataset)} names; the first: {'; '.join(reasons) or 'headers without a size'}",
        fix=f"embcache datasets {dataset.layout} --data-root {scan.root}",
    )  # fmt: skip


def scan_images(
    dataset: ImageDataset, root: Path, known: pd.DataFrame | None, pool: Executor, decoding: Decoding | None = None
) -> Scan:
    """State of each distinct file of a dataset, with what ``known``, an earlier scan, has of the unchanged ones.

    The header of the first file of each suffix is read, so that a decoder that is not installed is missed now.
    """
    began = time.time_ns()
    rows: dict[tuple[str, str], int] = {}
    first: dict[str, int] = {}  # row of the first image in each file
    firsts = list[int]()
    for image in zip(dataset.table["path"].tolist(), dataset.table["place"].tolist(), strict=True):
        if (row := rows.setdefault(image, len(rows))) == len(firsts):
            firsts.append(first.setdefault(image[0], row))
    states = np.full((len(rows), len(_STATE)), GONE, np.int64)
    try:
        for path, state in stat_files(root, list(first)):
            states[first[path]] = state or GONE
    except OSError as error:
        raise medium_failed(Path(error.filename or root), error) from error
    scan = Scan(root, rows, np.array(firsts), states[firsts], *_nothing(len(rows)), began, decoding or Decoding())
    scan.recall(known)
    _read_first(scan, first.items(), pool)
    return scan


def _nothing(n: int) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.bool_]]:
    """What is known of the headers, digests and unseen changes of n images before anything is looked up."""
    return np.full((n, 2), UNKNOWN), np.zeros((n, 32), np.uint8), np.zeros(n, bool)


def _read_first(scan: Scan, files: Iterable[tuple[str, int]], pool: Executor) -> None:
    """Read the header of the first file of each suffix, given path and row of each."""
    suffixes: dict[str, int] = {}
    for path, row in files:
        if scan.states[row, 0] != ABSENT:
            suffixes.setdefault(path[path.rfind(".") :].lower() if "." in path[-8:] else "", row)
    scan.read([row for row in suffixes.values() if scan.seen[row, 0] == UNKNOWN[0]], pool)


class _PartRows(Mapping[tuple[str, str], int]):
    """Path and place of each row of a partition, and the row of each; no object per image until one is asked for."""

    def __init__(self, table: pd.DataFrame) -> None:
        self._table = table

    @cached_property
    def _rows(self) -> dict[tuple[str, str], int]:
        return dict(zip(self, range(len(self)), strict=True))

    def __getitem__(self, image: tuple[str, str]) -> int:
        return self._rows[image]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return zip(self._table["path"].tolist(), self._table["place"].tolist(), strict=True)

    def __len__(self) -> int:
        return len(self._table)


def scan_part(
    dataset: ImageDataset, root: Path, known: pa.Table | None, pool: Executor, decoding: Decoding | None = None
) -> Scan:
    """As `scan_images`, of the rows of a partition, in arrays: row k of the scan is row k of the table."""
    began, coded = time.time_ns(), text_array(dataset.table, "path").dictionary_encode()
    paths, codes = coded.dictionary.to_pylist(), coded.indices.to_numpy().astype(np.int64)
    first = np.zeros(len(paths), np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]  # the last to be written is the first row
    states = np.empty((len(paths), len(_STATE)), np.int64)
    try:
        for k, state in enumerate(stat_each(root, paths)):
            states[k] = state or GONE
    except OSError as error:
        raise medium_failed(Path(error.filename or root), error) from error
    rows, firsts = _PartRows(dataset.table), first[codes]
    scan = Scan(root, rows, firsts, states[codes], *_nothing(len(codes)), began, decoding or Decoding())
    scan.recall_part(known)
    _read_first(scan, zip(paths, first.tolist(), strict=True), pool)
    return scan


def encode_scan(scan: Scan) -> bytes:
    """A scan as Parquet bytes, one row per image, with the decoder's version.

    Width and height are -1 for headers that were not read; a digest is empty if it is not known, or if the file was
    written so shortly before the scan that it could change without another time.
    """
    digests = Digests(_settled_digests(scan))
    columns = [*zip(*scan.images, strict=True), *scan.states.T, *scan.seen.T, digests]
    buffer = io.BytesIO()
    table = pd.DataFrame(dict(zip(_SCAN_COLUMNS, columns, strict=True)))
    table.assign(**{_DECODER: DECODER_VERSION}).to_parquet(buffer, index=False)
    return buffer.getvalue()


def _settled_digests(scan: Scan) -> NDArray[np.uint8]:
    settled = scan.states[:, 1:3].max(axis=1, initial=0) < scan.began_ns - TICK_NS
    return np.where(settled[:, None], scan.digests, np.uint8(0))


def encode_part(scan: Scan) -> bytes:
    """As `encode_scan`, of the rows of a partition, whose paths and places are in the partition."""
    digests = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(32), len(scan.states), [None, pa.py_buffer(np.ascontiguousarray(_settled_digests(scan)))]
    )
    columns = dict(zip([*_STATE, *_SIZE], [*scan.states.T, *scan.seen.T], strict=True))
    table = pa.table({name: np.ascontiguousarray(values) for name, values in columns.items()} | {"digest": digests})
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_DECODER: DECODER_VERSION}), buffer)
    return buffer.getvalue()


def decode_part(path: Path) -> pa.Table | None:
    """The scan of a partition that is kept in a file, or None, as `decode_scan`."""
    try:
        table = open_parquet(read_regular(path), most_rows=MOST_ROWS)[1]
    except (OSError, ValueError, pa.ArrowException):
        return None
    wanted = pa.schema([*((name, pa.int64()) for name in [*_STATE, *_SIZE]), ("digest", pa.binary(32))])
    ours = table.schema.equals(wanted) and not any(column.null_count for column in table.columns)
    return table if ours and (table.schema.metadata or {}).get(_DECODER.encode()) == DECODER_VERSION.encode() else None


def _kept_scan(folder: Path, part: Partition) -> str:
    """Named after the files: it stays where labels or other columns change."""
    return f"partitions/{columns_key(folder, part.digest, 'path', 'place')}.scan.parquet"


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
    return scan[_SCAN_COLUMNS] if texts and scan["digest"].str.fullmatch("([0-9a-f]{64})?").all() else None


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
    if dataset.part is not None:
        return plan_part(store, dataset, scan, publish=publish, retry_quarantined=retry_quarantined)
    ids, paths, places = (dataset.table[name].tolist() for name in ("id", "path", "place"))
    rows = [scan.rows[image] for image in zip(paths, places, strict=True)]
    # Where the path is the id, one string serves as both.
    ids = [path if id_ == (path := scan.images[row][0]) else id_ for id_, row in zip(ids, rows, strict=True)]
    images = dict(zip(ids, rows, strict=True))
    while True:
        # In this order: `embcache gc` removes plans before shards, and what it removed is not owed.
        committed = set(store.committed())
        owed = store.plans(committed)
        held, reasons = store.sources_and_reasons()
        # The row of an image that had left the dataset says nothing about one that is back.
        again = {
            image
            for image, reason in reasons.items()
            if retry_quarantined or reason == LEFT or fits_now(reason, scan.decoding.max_pixels)
        }
        cached = sum(image in images for image in held)
        due, copied = dict[str, PlanEntry](), dict[str, PlanEntry]()
        for _, entries in sorted(owed.items()):
            # Only `embcache gc` plans digests: it copies the rows that were made of those bytes.
            (copied if any(entry.digest for entry in entries) else due).update({entry.id: entry for entry in entries})
        held.update(copied | due)
        again.difference_update(due)
        scan.confirm([
            row
            for (image, row), place in zip(images.items(), places, strict=True)
            # Only its digest tells if it has changed.
            if image in held and image not in due and held[image].digest
            and (size := scan.states[row, 0]) != ABSENT and (place or held[image].size == size)
        ])  # fmt: skip
        fresh = [
            k
            for k, (image, row) in enumerate(images.items())
            if image not in held or image in again or not _same_bytes(held[image], image in due, scan, row)
        ]
        retried = sum(ids[k] in again for k in fresh)
        changed = sum(ids[k] in held for k in fresh) - retried
        size = store.rows_per_shard
        number = max([*owed, *committed], default=-1) + 1
        chunks = [fresh[start : start + size] for start in range(0, len(fresh), size)]
        # Another process may plan at the same moment: the one that finds its number taken starts again.
        if not publish or all(
            publish_plan(store.path, number + i, [
                PlanEntry(ids[k], int(scan.states[rows[k], 0]), int(scan.states[rows[k], 1]), None, places[k])
                for k in chunk
            ])
            for i, chunk in enumerate(chunks)
        ):  # fmt: skip
            shards = [Shard(n, tuple(entry.id for entry in entries)) for n, entries in owed.items()]
            shards += [Shard(number + i, tuple(ids[k] for k in chunk)) for i, chunk in enumerate(chunks)]
            shards.sort(key=lambda shard: shard.number)
            return Plan(tuple(shards), cached - changed - retried, len(fresh) - changed - retried, changed, retried)


def _same_bytes(held: PlanEntry, owed: bool, scan: Scan, row: int) -> bool:
    """Whether the image's bytes are those that its row was made from, or is owed of."""
    size, mtime_ns = scan.states[row, :2].tolist()
    alike = bool((held.size, held.mtime_ns) == (size, mtime_ns))
    if owed:  # it is read when it is computed
        return alike
    if not held.digest:
        # There were no bytes, or not of the image alone (array files). Another store's scan may have seen the change.
        if not alike or scan.moved[row]:
            return False
        return bool(size == ABSENT or scan.fault(*scan.images[row]))
    return bool(bytes.fromhex(held.digest) == scan.digests[row].tobytes())
