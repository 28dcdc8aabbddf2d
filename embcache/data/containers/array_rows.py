"""Images that are rows of an array in an HDF5 file, as the original PatchCamelyon release has them."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from embcache.data.budget import Decoding
from embcache.data.containers.chunks import StrictFile, read_row
from embcache.errors import DatasetError, EmbcacheError, ImageError

KEY = "x"  # the array, (N, H, W, 3) uint8
_OPEN_FILES = 4
_files: OrderedDict[tuple[object, ...], Any] = OrderedDict()
_lock = threading.Lock()


def member_pixels(path: str, member: int, decoding: Decoding) -> npt.NDArray[np.uint8]:
    """Row ``member`` of the array in an HDF5 file, shape (H, W, 3), uint8."""
    with _lock, _reasons():
        array = _array(path, member, decoding)
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            return read_row(array, member, file.fileno())


def member_size(path: str, member: int, decoding: Decoding) -> tuple[int, int]:
    """(width, height) of `member_pixels`."""
    with _lock, _reasons():
        height, width = _array(path, member, decoding).shape[1:3]
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
        "an array of an HDF5 file lies elsewhere, or is none, and is refused",
        expected=f"an array {key!r} whose values the file itself holds",
        found=found,
        where=file.filename,
        fix="download it again, or copy the values into one file",
    )


def _array(path: str, member: int, decoding: Decoding) -> Any:
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
        raise ImageError(f"the HDF5 file has no array {KEY!r}") from error
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
        raise ImageError(f"the array {KEY!r} is not (N, H, W, 3) of uint8 but {array.shape} of {array.dtype}"[:200])
    decoding.check_size(int(array.shape[2]), int(array.shape[1]))
    if min(array.shape[1:]) < 1:
        raise ImageError("the array's images have no pixels")
    if member >= len(array):
        raise ImageError(f"there is no row {member}: the array has {len(array)}")
    return array


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn whatever h5py raises on broken bytes into an `ImageError`; trouble of the machine passes."""
    try:
        yield
    except (EmbcacheError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise ImageError("the file is not there") from error
    except Exception as error:
        # The system's own errors stand in the text of h5py's, whatever their type.
        number = re.search(r"errno = (\d+)", str(error))
        code = int(number.group(1)) if number else getattr(error, "errno", None)
        if code not in (None, 0, errno.EINVAL):
            raise OSError(code, os.strerror(code)) from error
        text = "".join(c if c.isprintable() else " " for c in str(error))
        reason = " ".join(text.split())[:120] or type(error).__name__
        raise ImageError(f"the HDF5 file cannot be read: {reason}") from error
