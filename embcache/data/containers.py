"""Files that hold many images: rows of an array in an HDF5 file, as the original PatchCamelyon release has them.

HDF5 only says where a row lies; its bytes are read and unpacked here, to no more than the chunk they belong to. The
library's own filters trust what the file says of its chunks: a damaged size is enough to end the process.
"""

from __future__ import annotations

import atexit
import io
import itertools
import math
import os
import threading
import zlib
from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt

from embcache.data.budget import Decoding, broken, reasons, unsupported
from embcache.errors import DatasetError

KEY = "x"  # the array, (N, H, W, 3) uint8
MOST_CHUNK_BYTES = 1 << 28
_DEFLATE, _SHUFFLE, _FLETCHER32 = 1, 2, 3
_OPEN_FILES = 4
_files: OrderedDict[tuple[object, ...], Any] = OrderedDict()
_lock = threading.Lock()


def place_pixels(path: str, place: str, decoding: Decoding) -> npt.NDArray[np.uint8]:
    """The image at row ``place`` of the array in an HDF5 file, shape (H, W, 3), uint8."""
    with _lock, reasons("the HDF5 file cannot be read"):
        array = _array(path, place, decoding)
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            return read_row(array, int(place), file.fileno())


def place_size(path: str, place: str, decoding: Decoding) -> tuple[int, int]:
    """(width, height) of `place_pixels`."""
    with _lock, reasons("the HDF5 file cannot be read"):
        height, width = _array(path, place, decoding).shape[1:3]
    return int(width), int(height)


def own_array(file: Any, key: str) -> Any:
    """Array ``key`` of an open HDF5 file, whose values lie in that file and nowhere else.

    HDF5 can take an array from other files: by external and soft links, external storage, and virtual datasets. A
    dataset's pixels and labels lie inside its root, so none of these is followed.
    """
    import h5py

    link = file.get(key, getlink=True)  # never `key in file`, which would follow a link to another file
    if link is None:
        raise KeyError(f"there is no {key!r} in the file")
    array = file[key] if isinstance(link, h5py.HardLink) else link
    if isinstance(array, h5py.Dataset) and not array.external and not array.is_virtual:
        return array
    raise DatasetError(
        "an array of an HDF5 file lies elsewhere, or is none, and is refused", code="array-elsewhere",
        expected=f"an array {key!r} with its values in the file itself",
        found=f"a {type(array).__name__}, linked, external or virtual", where=file.filename,
        fix="download it again, or copy the values into one file",
    )  # fmt: skip


@atexit.register
def _close_files() -> None:
    """Close what is open: HDF5 does so when the interpreter is gone, and then calls `StrictFile` all the same."""
    for key, file in _files.items():
        if key[0] == os.getpid():
            file.close()


def _array(path: str, place: str, decoding: Decoding) -> Any:
    """The array of an open file; files stay open, for opening costs more than reading a row."""
    import h5py

    state = os.stat(path)  # noqa: PTH116
    # Keyed by process: a handle must not be used on both sides of a fork.
    key = (os.getpid(), path, state.st_ino, state.st_size, state.st_mtime_ns)
    if key not in _files:
        _files[key] = h5py.File(StrictFile(path), "r")
        if len(_files) > _OPEN_FILES:
            _files.popitem(last=False)[1].close()
    _files.move_to_end(key)
    try:
        array = own_array(_files[key], KEY)
    except KeyError as error:
        raise unsupported(f"the HDF5 file has no array {KEY!r}") from error
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
        raise unsupported(f"the array {KEY!r} is not (N, H, W, 3) of uint8 but {array.shape} of {array.dtype}"[:200])
    decoding.check_size(int(array.shape[2]), int(array.shape[1]))
    if min(array.shape[1:]) < 1:
        raise broken("the array's images have no pixels")
    if not (place.isascii() and place.isdecimal() and len(place) < 20 and int(place) < len(array)):
        raise broken(f"there is no row {place[:40]}: the array has {len(array)}")
    return array


class StrictFile(io.FileIO):
    """A file for h5py that refuses to be read past its end, before anything is put into memory.

    HDF5 takes as much memory as a header claims, and fills with zeros what the file does not hold: gigabytes.
    """

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; ValueError where the file ends before that."""
        target = memoryview(buffer).cast("B")
        if self.tell() + len(target) > os.fstat(self.fileno()).st_size:
            raise ValueError("the HDF5 file claims more than it holds")
        return super().readinto(target)

    def __del__(self) -> None:
        self.close()  # h5py lets go of it without doing so


def read_row(array: Any, row: int, descriptor: int) -> npt.NDArray[np.uint8]:
    """Row ``row`` of an array of uint8 with four axes, contiguous or in chunks (deflate, shuffle, fletcher32)."""
    import h5py

    layout, shape, chunk = array.id.get_create_plist(), array.shape[1:], array.chunks
    if layout.get_layout() == h5py.h5d.CONTIGUOUS:
        start, size = array.id.get_offset(), math.prod(shape)
        if start is None:
            raise broken("the array was never written")
        return np.frombuffer(_read(descriptor, start + row * size, size), np.uint8).reshape(shape)
    if layout.get_layout() != h5py.h5d.CHUNKED:
        raise unsupported("the array is neither contiguous nor in chunks")
    filters = [layout.get_filter(k) for k in range(layout.get_nfilters())]
    if unknown := [f[3] for f in filters if f[0] not in (_DEFLATE, _SHUFFLE, _FLETCHER32)]:
        names = b", ".join(unknown).decode("ascii", "replace")
        raise unsupported(f"the array is compressed as {names}: only deflate is read (h5repack -f GZIP=4)")
    per_row = math.prod(-(-s // c) for s, c in zip(shape, chunk[1:], strict=True))
    if math.prod(chunk) > MOST_CHUNK_BYTES or per_row > 4096:
        raise unsupported(f"the array has chunks of {chunk}: too large, or too many a row")
    out, first = np.zeros(shape, np.uint8), row // chunk[0] * chunk[0]
    for at in itertools.product(*(range(0, s, c) for s, c in zip(shape, chunk[1:], strict=True))):
        info = array.id.get_chunk_info_by_coord((first, *at))
        if info.byte_offset is None or info.size == 0:
            raise broken(f"row {row} was never written")
        values = _unpack(_read(descriptor, info.byte_offset, info.size), filters, info.filter_mask, chunk)
        part = out[tuple(slice(start, start + c) for start, c in zip(at, chunk[1:], strict=True))]
        part[...] = values[row - first, : part.shape[0], : part.shape[1], : part.shape[2]]
    return out


def _read(descriptor: int, start: int, size: int) -> bytes:
    if start + size > os.fstat(descriptor).st_size or len(data := os.pread(descriptor, size, start)) != size:
        raise broken("the HDF5 file ends before the row does")
    return data


def _unpack(data: bytes, filters: list[Any], skipped: int, chunk: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    size = math.prod(chunk)
    for k in reversed(range(len(filters))):
        if skipped >> k & 1:
            continue
        if filters[k][0] == _DEFLATE:
            data = zlib.decompressobj().decompress(data, size + 64)
        elif filters[k][0] == _FLETCHER32:
            from numcodecs.fletcher32 import Fletcher32

            data = bytes(Fletcher32().decode(data)) if len(data) > 4 else b""
        # Shuffling values of one byte leaves them where they are.
    if len(data) != size:
        raise broken(f"a chunk unpacks to {len(data)} bytes instead of {size}")
    return np.frombuffer(data, np.uint8).reshape(chunk)
