"""The state of a dataset's image files: what is where, how large, since when; and the transform that follows."""

from __future__ import annotations

import io
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from embcache.data.dataset import ImageDataset
from embcache.data.images import DECODER_VERSION, read_size
from embcache.errors import ImageError
from embcache.extract.backbones import Backbone
from embcache.extract.batching import medium_failed
from embcache.extract.request import default_workers, image_root, none_readable
from embcache.extract.transforms import Transform, choose_transform
from embcache.paths import PathLike, home_dir, slug
from embcache.store.commit import write_scan

# Size of a file that is not there: such images are planned too, and quarantined with the reason when computed.
ABSENT = -1

_SCAN_COLUMNS = ["path", "size", "mtime_ns", "width", "height"]
_DECODER = "decoder"  # column of a kept scan: the version that read its headers


@dataclass(frozen=True)
class DatasetFiles:
    """A dataset's files as they are now.

    Attributes
    ----------
    root : Path
        Folder of the images.
    folder : Path
        Folder of the dataset's stores.
    scan : DataFrame
        See :func:`scan_images`.
    sizes : set of (int, int)
        The distinct (width, height) of the images that can be read; at least one.
    """

    root: Path
    folder: Path
    scan: pd.DataFrame
    sizes: set[tuple[int, int]]

    def keep(self) -> None:
        """Write the scan beside the stores, so that the next one reads no headers."""
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
    sizes = image_sizes(scan)
    if not sizes:
        raise none_readable(dataset, root)
    return DatasetFiles(root, folder, scan, sizes)


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
        A path leads out of the root, what decodes an image is not installed, or a file cannot be read for now.
    """
    table = dataset.table[["path", "member"]].drop_duplicates("path")
    before = {} if known is None else file_states(known)

    def scan(path: str, member: int) -> tuple[str, int, int, int, int]:
        try:
            state = (root / path).stat()
        except (FileNotFoundError, NotADirectoryError):
            return path, ABSENT, 0, 0, 0
        except OSError as error:
            raise medium_failed(root / path, error) from error
        seen = before.get(path)
        if seen is not None and seen[:2] == (state.st_size, state.st_mtime_ns) and seen[2] > 0:
            return (path, *seen)
        try:
            width, height = read_size(root, path, member)
        except ImageError:
            width = height = 0
        except OSError as error:
            raise medium_failed(root / path, error) from error
        return path, state.st_size, state.st_mtime_ns, width, height

    rows = pool.map(scan, table["path"], table["member"])
    return pd.DataFrame(list(rows), columns=_SCAN_COLUMNS)


def file_states(scan: pd.DataFrame) -> dict[str, tuple[int, int, int, int]]:
    """Path → (size, mtime_ns, width, height) of a scan."""
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
