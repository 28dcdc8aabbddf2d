"""The state of a dataset's image files: what is where, how large, since when; and the transform that follows.

Files are listed and looked up, a folder at a time; a header is read only where a transform hangs on it, and once.
"""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from embcache.data.dataset import ImageDataset
from embcache.data.files import is_inside, stat_files
from embcache.data.headers import is_square_of
from embcache.data.images import DECODER_VERSION, read_size
from embcache.data.snapshot import open_parquet
from embcache.errors import ImageError
from embcache.extract.backbones import Backbone
from embcache.extract.batching import medium_failed
from embcache.extract.request import default_workers, image_root, none_readable
from embcache.extract.transforms import Transform, choose_transform
from embcache.io import read_regular
from embcache.paths import PathLike, home_dir, slug
from embcache.store.commit import write_scan

# Size of a file that is not there: such images are planned too, and quarantined with the reason when computed.
ABSENT = -1
UNREADABLE = (0, 0)
"""Width and height of an image whose header cannot be read; it is looked at again, for another decoder may."""
UNKNOWN = (-1, -1)
"""Width and height of an image whose header nobody has looked at."""

# Images with a longer side are resized by every transform, whatever the sizes of the others.
_LARGEST_KEPT = 224
_TOGETHER = 256  # headers that a thread reads before it is asked again
_SCAN_COLUMNS = ["path", "size", "mtime_ns", "width", "height"]
_DECODER = "decoder"  # column of a kept scan: the version that read its headers


@dataclass(frozen=True, eq=False)
class Scan:
    """The distinct files of a dataset as they are now.

    Attributes
    ----------
    root : Path
        Folder of the images.
    states : mapping of str to (int, int)
        Size in bytes and modification time in ns of each path; size `ABSENT` where there is no file.
    seen : dict of str to (int, int)
        Width and height of the images whose header was read, now or earlier; `UNREADABLE` where it cannot be.
        Grows as :class:`ImageSizes` looks.
    members : mapping of str to int
        Row inside the array file of each path, -1 for an image.
    """

    root: Path
    states: Mapping[str, tuple[int, int]]
    seen: dict[str, tuple[int, int]]
    members: Mapping[str, int]

    def read(self, paths: Sequence[str], pool: Executor, guess: tuple[int, int] | None = None) -> set[tuple[int, int]]:
        """Read the headers of some files, several at once; return the distinct sizes of those that can be read.

        Parameters
        ----------
        paths : sequence of str
            Files that are there.
        pool : Executor
            Reads them.
        guess : (int, int), optional
            A size that many of them are likely to have.

        Raises
        ------
        DatasetError
            A path leads out of the root, or what decodes an image is not installed.
        """
        chunks = [paths[start : start + _TOGETHER] for start in range(0, len(paths), _TOGETHER)]
        found: set[tuple[int, int]] = set()
        for chunk, sizes in zip(chunks, pool.map(lambda some: self._read(some, guess), chunks), strict=True):
            self.seen.update(zip(chunk, sizes, strict=True))
            found.update(sizes)
        return found - {UNREADABLE}

    def _read(self, paths: Sequence[str], guess: tuple[int, int] | None) -> list[tuple[int, int]]:
        guess = guess or UNKNOWN
        side = guess[0] if guess[0] == guess[1] else 0
        inside: dict[str, bool] = {}  # whether a folder, links followed, lies in the root
        sizes = []
        for path in paths:
            member, folder = self.members[path], path.rpartition("/")[0]
            if folder not in inside:
                inside[folder] = is_inside(self.root, os.path.realpath(f"{self.root}/{folder}"))
            try:
                if side > 0 and member < 0 and inside[folder] and _says(f"{self.root}/{path}", side):
                    sizes.append(guess)
                else:
                    sizes.append(read_size(self.root, path, member))
            except ImageError:
                sizes.append(UNREADABLE)
            except OSError as error:
                raise medium_failed(self.root / path, error) from error
        return sizes


def _says(path: str, side: int) -> bool:
    try:
        return is_square_of(path, side)
    except OSError:  # a link, or whatever the decoder is to tell
        return False


class ImageSizes(Collection[tuple[int, int]]):
    """The distinct (width, height) of a dataset's images, as far as any transform depends on them; at least one.

    Nothing is read until somebody asks. Reading stops at a second size, or at a side that is above `_LARGEST_KEPT`:
    :func:`embcache.extract.transforms.choose_transform` chooses then what it would choose knowing all sizes.

    Parameters
    ----------
    scan : Scan
        Whose headers are read, and kept in it.
    """

    def __init__(self, scan: Scan) -> None:
        self._scan = scan

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._settled())

    def __len__(self) -> int:
        return len(self._settled())

    def __contains__(self, size: object) -> bool:
        return size in self._settled()

    def _settled(self) -> set[tuple[int, int]]:
        scan = self._scan
        sizes = set(scan.seen.values()) - {UNREADABLE}
        if _decided(sizes):
            return sizes
        unread = [path for path, (size, _) in scan.states.items() if path not in scan.seen and size != ABSENT]
        with ThreadPoolExecutor(default_workers()) as pool:
            start, count = 0, 16
            while start < len(unread) and not _decided(sizes):
                guess = next(iter(sizes)) if len(sizes) == 1 else None
                sizes |= scan.read(unread[start : start + count], pool, guess)
                start, count = start + count, min(2 * count, 1 << 14)
        return sizes


def _decided(sizes: Collection[tuple[int, int]]) -> bool:
    """Whether no further size can change the transform."""
    return len(sizes) > 1 or any(max(size) > _LARGEST_KEPT for size in sizes)


@dataclass(frozen=True)
class DatasetFiles:
    """A dataset's files as they are now.

    Attributes
    ----------
    root : Path
        Folder of the images.
    folder : Path
        Folder of the dataset's stores.
    scan : Scan
        See :func:`scan_images`.
    sizes : ImageSizes
        The distinct (width, height) of its images, as far as a transform depends on them.
    """

    root: Path
    folder: Path
    scan: Scan
    sizes: ImageSizes

    def keep(self) -> None:
        """Write the scan beside the stores, so that the next one reads no header again."""
        write_scan(self.folder, encode_scan(self.scan))


def scan_dataset(dataset: ImageDataset, home: PathLike | None, pool: Executor) -> DatasetFiles:
    """Look at every file of a dataset; what an earlier scan knows of unchanged ones is not read again.

    Raises
    ------
    DatasetNotFoundError
        The images are not here, or none of them can be read.
    DatasetError
        A path leads out of the root, or what decodes an image is not installed.
    """
    root, folder = image_root(dataset), home_dir(home) / slug(dataset.name)
    scan = scan_images(dataset, root, decode_scan(folder / "scan.parquet"), pool)
    if all(size == UNREADABLE for size in scan.seen.values()) and not list(ImageSizes(scan)):
        raise none_readable(dataset, root)
    return DatasetFiles(root, folder, scan, ImageSizes(scan))


def dataset_transform(
    backbone: Backbone,
    kind: str | None,
    dataset: ImageDataset,
    home: PathLike | None = None,
    pool: Executor | None = None,
) -> Transform:
    """The transform that an extraction of ``backbone`` over ``dataset`` would use.

    Parameters
    ----------
    backbone : Backbone
        From `embcache.extract.backbones.find_backbone`.
    kind : {"paper", "imagenet", "model"} or None
        See `embcache.extract.transforms.choose_transform`.
    dataset : ImageDataset
        Its files are looked at, and the scan is kept beside the stores.
    home : path-like, optional
        Folder of stores.
    pool : Executor, optional
        Reads headers; default: threads of its own.

    Raises
    ------
    UsageError, DatasetError
        As `choose_transform` and :func:`scan_dataset`.
    """
    with ExitStack() as stack:
        files = scan_dataset(dataset, home, pool or stack.enter_context(ThreadPoolExecutor(default_workers())))
    chosen = choose_transform(backbone, kind, files.sizes)
    files.keep()
    return chosen


def scan_images(dataset: ImageDataset, root: Path, known: pd.DataFrame | None, pool: Executor) -> Scan:
    """State of each distinct file of a dataset, and what ``known``, an earlier scan, tells of the unchanged ones.

    The header of the first file of each suffix is read, so that a decoder that is not installed is missed now.

    Raises
    ------
    DatasetError
        A path leads out of the root, what decodes an image is not installed, or a file cannot be read for now.
    """
    members: dict[str, int] = {}
    for path, member in zip(dataset.table["path"].tolist(), dataset.table["member"].tolist(), strict=True):
        members.setdefault(path, member)
    try:
        states = {path: state or (ABSENT, 0) for path, state in stat_files(root, list(members))}
    except OSError as error:
        raise medium_failed(Path(error.filename or root), error) from error
    scan = Scan(root, states, _still_true(known, states), members)
    first: dict[str, str] = {}
    for path, (size, _) in states.items():
        if size != ABSENT:
            first.setdefault(path[path.rfind(".") :].lower() if "." in path[-8:] else "", path)
    scan.read([path for path in first.values() if path not in scan.seen], pool)
    return scan


def _still_true(known: pd.DataFrame | None, states: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Width and height, from an earlier scan, of readable images whose file has not changed since."""
    if known is None:
        return {}
    columns = [known.loc[known["width"] > 0, name].tolist() for name in _SCAN_COLUMNS]
    return {
        path: (width, height)
        for path, size, mtime, width, height in zip(*columns, strict=True)
        if states.get(path) == (size, mtime)
    }


def encode_scan(scan: Scan) -> bytes:
    """A scan as Parquet bytes, with the decoder's version; width and height are -1 of headers that were not read."""
    states = np.array(list(scan.states.values()), dtype=np.int64).reshape(-1, 2)
    sizes = np.array([scan.seen.get(path, UNKNOWN) for path in scan.states], dtype=np.int64).reshape(-1, 2)
    columns = [list(scan.states), states[:, 0], states[:, 1], sizes[:, 0], sizes[:, 1]]
    buffer = io.BytesIO()
    table = pd.DataFrame(dict(zip(_SCAN_COLUMNS, columns, strict=True)))
    table.assign(**{_DECODER: DECODER_VERSION}).to_parquet(buffer, index=False)
    return buffer.getvalue()


def decode_scan(path: Path) -> pd.DataFrame | None:
    """The scan kept in a file, or None: it only saves work, so one that cannot be read counts as absent.

    So does one that another version of the decoder made: it may see other sizes.

    Returns
    -------
    DataFrame or None
        ``path``, ``size`` (bytes), ``mtime_ns``, ``width``, ``height`` (pixels; 0 where the header cannot be read,
        -1 where it was not).
    """
    try:
        scan: pd.DataFrame = open_parquet(read_regular(path))[1].to_pandas()
    except (OSError, ValueError, pa.ArrowException):
        return None
    if not {*_SCAN_COLUMNS, _DECODER} <= set(scan.columns) or not (scan[_DECODER] == DECODER_VERSION).all():
        return None
    if any(scan[name].dtype != "int64" for name in _SCAN_COLUMNS[1:]):
        return None
    return scan[_SCAN_COLUMNS]
