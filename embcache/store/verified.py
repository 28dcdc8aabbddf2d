"""Reading files whose size and checksum are known: nothing leaves here that is not what was committed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import google_crc32c
import numpy as np
import numpy.typing as npt

from embcache.errors import CorruptStoreError, StoreError
from embcache.io import IrregularError, open_regular, read_regular
from embcache.paths import PathLike
from embcache.sealed import crc32c

_PIECE = 1 << 18  # bytes read at a time: the checksum finds them in the core's own cache


class Scratch:
    """Memory that is used again for file after file; fresh pages cost as much as reading does."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def take(self, size: int) -> npt.NDArray[np.uint8]:
        """``size`` bytes, whatever they hold; the next call may give the same ones."""
        if len(self._memory) < size:
            self._memory = np.empty(size, np.uint8)
        return self._memory[:size]


def read_file(path: PathLike, fix: str, expected: tuple[int, str] | None = None) -> bytes:
    """The bytes of a file; with ``expected`` (size, crc32c) only those."""
    with refusals_told(path, fix):
        if expected is None:
            return read_regular(path)
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            # A wrong size is refused before reading: what grew to gigabytes is not loaded to be told so.
            data = file.readall() if size == expected[0] else b""
    if size != expected[0] or crc32c(data) != expected[1]:
        raise _other_bytes(path, fix, expected, size, crc32c(data))
    return data


def read_into(path: PathLike, fix: str, expected: tuple[int, str], targets: Sequence[npt.NDArray[np.uint8]]) -> None:
    """Read a whole file into arrays, one after the other, and check it on the way."""
    crc = done = 0
    with refusals_told(path, fix), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size == expected[0]:
            for target in targets:
                for start in range(0, len(target), _PIECE):
                    piece = target[start : start + _PIECE]
                    filled = 0
                    while filled < len(piece) and (more := file.readinto(piece[filled:].data)):
                        filled += more
                    crc = google_crc32c.extend(crc, piece[:filled])
                    done += filled
            size = done  # less where the file was cut short meanwhile
    if size != expected[0] or f"{crc:08x}" != expected[1]:
        raise _other_bytes(path, fix, expected, size, f"{crc:08x}")


@contextmanager
def refusals_told(path: PathLike, fix: str) -> Iterator[None]:
    """What the system refuses inside, as errors of the store: missing is damage, the rest says nothing of the bytes."""
    try:
        yield
    except IrregularError as error:
        raise CorruptStoreError(
            "a file of the feature store is not a plain file", found=error.strerror, where=path, fix=fix
        ) from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptStoreError("a file of the feature store is missing", where=path, fix=fix) from error
    except OSError as error:
        # Says nothing about the bytes: a disk that fails, a share that is gone, missing permission.
        raise StoreError(
            "a file of the feature store cannot be read",
            found=error.strerror or str(error),
            where=path,
            fix="check the disk and its permissions, then repeat the command",
        ) from error


def _other_bytes(path: PathLike, fix: str, expected: tuple[int, str], size: int, crc: str) -> CorruptStoreError:
    return CorruptStoreError(
        "a file of the feature store is not the one that was committed",
        expected=f"{expected[0]} bytes, crc32c {expected[1]}",
        found=f"{size} bytes" + (f", crc32c {crc}" if size == expected[0] else ""),
        where=path,
        fix=fix,
    )
