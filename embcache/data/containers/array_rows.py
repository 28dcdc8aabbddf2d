"""Images that are rows of an array in an HDF5 file, as the original PatchCamelyon release has them.

HDF5 only says where a row lies; its bytes are read and unpacked here, to no more than the chunk they belong to. The
library's own filters trust what the file says of its chunks: a damaged size is enough to end the process.
"""

from __future__ import annotations

import errno
import io
import math
import os
import re
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from embcache.data.budget import Decoding, broken, unsupported
from embcache.errors import DatasetError, EmbcacheError, ImageError

KEY = "x"  # the array, (N, H, W, 3) uint8
MOST_CHUNK_BYTES = 1 << 28
_DEFLATE, _SHUFFLE, _FLETCHER32 = 1, 2, 3
_OPEN_FILES = 4
_files: OrderedDict[tuple[object, ...], Any] = OrderedDict()
_lock = threading.Lock()


def place_pixels(path: str, place: str, decoding: Decoding) -> npt.NDArray[np.uint8]:
    """The image at row ``place`` of the array in an HDF5 file, shape (H, W, 3), uint8."""
    with _lock, _reasons():
        array = _array(path, place, decoding)
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            return read_row(array, int(place), file.fileno())


def place_size(path: str, place: str, decoding: Decoding) -> tuple[int, int]:
    """(width, height) of `place_pixels`."""
    with _lock, _reasons():
        height, width = _array(path, place, decoding).shape[1:3]
    return int(width), int(height)


def own_array(file: Any, key: str) -> Any:
    """Array ``key`` of an open HDF5 file, whose values lie in that file and nowhere else.

    HDF5 can take an array from other files: by external and soft links, external storage, and virtual datasets. A
    dataset's pixels and labels lie inside its root, so none of these is followed.
    """
    import h5py

    link = file.get(key, getlink=True)
    if link is None:
        raise KeyError(f"there is no {key!r} in the file")
    array = file[key] if isinstance(link, h5py.HardLink) else None
    if isinstance(array, h5py.Dataset) and not array.external and not array.is_virtual:
        return array
    if isinstance(array, h5py.Dataset):
        found = "a virtual dataset" if array.is_virtual else "external storage"
    else:
        found = f"a {type(link if array is None else array).__name__}"
    raise DatasetError(
        "an array of an HDF5 file lies elsewhere, or is none, and is refused", code="array-elsewhere",
        expected=f"an array {key!r} whose values the file itself holds", found=found, where=file.filename,
        fix="download it again, or copy the values into one file",
    )  # fmt: skip


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
        array = own_array(_files[key], KEY)  # never `KEY in file`, which would follow a link to another file
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


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn whatever h5py raises on broken bytes into an `ImageError`; trouble of the machine passes."""
    try:
        yield
    except (EmbcacheError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise ImageError("the file is not there", code="image-missing") from error
    except Exception as error:
        # The system's own errors stand in the text of h5py's, whatever their type.
        number = re.search(r"errno = (\d+)", str(error))
        code = int(number.group(1)) if number else getattr(error, "errno", None)
        if code not in (None, 0, errno.EINVAL):
            raise OSError(code, os.strerror(code)) from error
        text = "".join(c if c.isprintable() else " " for c in str(error))
        reason = " ".join(text.split())[:120] or type(error).__name__
        raise broken(f"the HDF5 file cannot be read: {reason}") from error


class StrictFile(io.RawIOBase):
    """A file for h5py that refuses to be read past its end, before anything is put into memory.

    HDF5 takes as much memory as a header claims, and fills with zeros what the file does not hold: gigabytes.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        self._size, self._at = os.fstat(self._descriptor).st_size, 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def fileno(self) -> int:
        """The descriptor that it reads from."""
        return self._descriptor

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; as `io.RawIOBase` has it."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; ValueError where the file ends before that."""
        target = memoryview(buffer).cast("B")
        if self._at < 0 or self._at + len(target) > self._size:
            raise ValueError("the HDF5 file claims more than it holds")
        data = os.pread(self._descriptor, len(target), self._at)
        target[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        """Close the descriptor."""
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def read_row(array: Any, row: int, descriptor: int) -> npt.NDArray[np.uint8]:
    """Row ``row`` of an array of uint8 with four axes, contiguous or in chunks (deflate, shuffle, fletcher32)."""
    import h5py

    layout = array.id.get_create_plist()
    if layout.get_layout() == h5py.h5d.CONTIGUOUS:
        start, size = array.id.get_offset(), math.prod(array.shape[1:])
        if start is None:
            raise broken("the array was never written")
        return np.frombuffer(_read(descriptor, start + row * size, size), np.uint8).reshape(array.shape[1:])
    if layout.get_layout() != h5py.h5d.CHUNKED:
        raise unsupported("the array is neither contiguous nor in chunks")
    filters = [layout.get_filter(k) for k in range(layout.get_nfilters())]
    known = (_DEFLATE, _SHUFFLE, _FLETCHER32)
    unknown = [f[3].decode("ascii", "replace") or str(f[0]) for f in filters if f[0] not in known]
    if unknown:
        raise unsupported(f"the array is compressed as {', '.join(unknown)}: only deflate is read (h5repack -f GZIP=4)")
    chunk = array.chunks
    out = np.zeros(array.shape[1:], np.uint8)
    per_row = math.prod(-(-s // c) for s, c in zip(array.shape[1:], chunk[1:], strict=True))
    if math.prod(chunk) > MOST_CHUNK_BYTES or per_row > 4096:
        raise unsupported(f"the array has chunks of {chunk}: too large, or too many a row")
    first = row // chunk[0] * chunk[0]
    for y in range(0, array.shape[1], chunk[1]):
        for x in range(0, array.shape[2], chunk[2]):
            for c in range(0, array.shape[3], chunk[3]):
                info = array.id.get_chunk_info_by_coord((first, y, x, c))
                if info.byte_offset is None or info.size == 0:
                    raise broken(f"row {row} was never written")
                values = _unpack(_read(descriptor, info.byte_offset, info.size), filters, info.filter_mask, chunk)
                part = out[y : y + chunk[1], x : x + chunk[2], c : c + chunk[3]]
                part[...] = values[row - first, : part.shape[0], : part.shape[1], : part.shape[2]]
    return out


def _read(descriptor: int, start: int, size: int) -> bytes:
    if start + size > os.fstat(descriptor).st_size:
        raise broken("the HDF5 file ends before the row does")
    data = os.pread(descriptor, size, start)
    if len(data) != size:
        raise broken("the HDF5 file ends before the row does")
    return data


def _unpack(data: bytes, filters: list[Any], skipped: int, chunk: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    size = math.prod(chunk)
    for k in reversed(range(len(filters))):
        if skipped >> k & 1:
            continue
        if filters[k][0] == _DEFLATE:
            unpacker = zlib.decompressobj()
            data = unpacker.decompress(data, size + 64)
        elif filters[k][0] == _FLETCHER32:
            if len(data) < 4 or int.from_bytes(data[-4:], "little") != _fletcher32(data[:-4]):
                raise broken("the checksum of a chunk does not match")
            data = data[:-4]
        # Shuffling values of one byte leaves them where they are.
    if len(data) != size:
        raise broken(f"a chunk unpacks to {len(data)} bytes instead of {size}")
    return np.frombuffer(data, np.uint8).reshape(chunk)


def _fletcher32(data: bytes) -> int:
    """HDF5's checksum: big-endian words of 16 bits, an odd last byte as the upper half of one."""
    words = np.frombuffer(data + b"\0" * (len(data) % 2), ">u2").astype(np.uint64)
    one, two = 0, 0
    for start in range(0, len(words), 1 << 16):
        part = words[start : start + (1 << 16)]
        weights = np.arange(len(part), 0, -1, dtype=np.uint64)
        two = (two + one * len(part) + int((part * weights).sum())) % 65535
        one = (one + int(part.sum())) % 65535
    return two << 16 | one
