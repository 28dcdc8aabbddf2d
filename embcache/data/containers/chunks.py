"""One row of an array in an HDF5 file, taken from the file's bytes without HDF5's filters.

Where a row lies is asked of HDF5; its bytes are read and unpacked here, to no more than the chunk they belong to. The
library's own filters trust what the file says of its chunks: a damaged size is enough to end the process.
"""

from __future__ import annotations

import io
import math
import os
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from embcache.errors import ImageError

MOST_CHUNK_BYTES = 1 << 28
_DEFLATE, _SHUFFLE, _FLETCHER32 = 1, 2, 3


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
            raise ImageError("the array was never written")
        return np.frombuffer(_read(descriptor, start + row * size, size), np.uint8).reshape(array.shape[1:])
    if layout.get_layout() != h5py.h5d.CHUNKED:
        raise ImageError("the array is neither contiguous nor in chunks")
    filters = [layout.get_filter(k) for k in range(layout.get_nfilters())]
    unknown = [
        f[3].decode("ascii", "replace") or str(f[0]) for f in filters if f[0] not in (_DEFLATE, _SHUFFLE, _FLETCHER32)
    ]
    if unknown:
        raise ImageError(f"the array is compressed as {', '.join(unknown)}: only deflate is read (h5repack -f GZIP=4)")
    chunk = array.chunks
    out = np.zeros(array.shape[1:], np.uint8)
    if (
        math.prod(chunk) > MOST_CHUNK_BYTES
        or math.prod(-(-s // c) for s, c in zip(array.shape[1:], chunk[1:], strict=True)) > 4096
    ):
        raise ImageError(f"the array has chunks of {chunk}: too large, or too many a row")
    first = row // chunk[0] * chunk[0]
    for y in range(0, array.shape[1], chunk[1]):
        for x in range(0, array.shape[2], chunk[2]):
            for c in range(0, array.shape[3], chunk[3]):
                info = array.id.get_chunk_info_by_coord((first, y, x, c))
                if info.byte_offset is None or info.size == 0:
                    raise ImageError(f"row {row} was never written")
                values = _unpack(_read(descriptor, info.byte_offset, info.size), filters, info.filter_mask, chunk)
                part = out[y : y + chunk[1], x : x + chunk[2], c : c + chunk[3]]
                part[...] = values[row - first, : part.shape[0], : part.shape[1], : part.shape[2]]
    return out


def _read(descriptor: int, start: int, size: int) -> bytes:
    if start + size > os.fstat(descriptor).st_size:
        raise ImageError("the HDF5 file ends before the row does")
    data = os.pread(descriptor, size, start)
    if len(data) != size:
        raise ImageError("the HDF5 file ends before the row does")
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
                raise ImageError("the checksum of a chunk does not match")
            data = data[:-4]
        # Shuffling values of one byte leaves them where they are.
    if len(data) != size:
        raise ImageError(f"a chunk unpacks to {len(data)} bytes instead of {size}")
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
