"""Images that are rows of an array in an HDF5 file, as the original PatchCamelyon release has them."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections import OrderedDict
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from embcache.errors import ImageError

KEY = "x"  # the array, (N, H, W, 3) uint8
_OPEN_FILES = 4
_files: OrderedDict[tuple[object, ...], Any] = OrderedDict()
_lock = threading.Lock()


def member_pixels(path: str, member: int) -> npt.NDArray[np.uint8]:
    """Row ``member`` of the array in an HDF5 file, shape (H, W, 3), uint8.

    Raises
    ------
    ImageError
        There is no such file, array or row, or its bytes are broken.
    """
    with _lock:
        try:
            pixels = _array(path, member)[member]
        except OSError as error:
            raise _image_error(error) from error
    return np.ascontiguousarray(pixels)


def member_size(path: str, member: int) -> tuple[int, int]:
    """(width, height) of `member_pixels`."""
    with _lock:
        height, width = _array(path, member).shape[1:3]
    return int(width), int(height)


def _array(path: str, member: int) -> Any:
    """The array of an open file; files stay open, for opening costs more than reading a row."""
    try:
        state = os.stat(path)  # noqa: PTH116
        # Keyed by process: a handle must not be used on both sides of a fork.
        key = (os.getpid(), path, state.st_ino, state.st_size, state.st_mtime_ns)
        if key not in _files:
            _files[key] = h5py.File(path, "r", locking=False)
            if len(_files) > _OPEN_FILES:
                _files.popitem(last=False)[1].close()
        _files.move_to_end(key)
        array = _files[key][KEY]
    except FileNotFoundError as error:
        raise ImageError("the file is not there") from error
    except OSError as error:
        raise _image_error(error) from error
    except KeyError as error:
        raise ImageError(f"the HDF5 file has no array {KEY!r}") from error
    if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8:
        raise ImageError(f"the array {KEY!r} is not (N, H, W, 3) of uint8 but {array.shape} of {array.dtype}")
    if member >= len(array):
        raise ImageError(f"there is no row {member}: the array has {len(array)}")
    return array


def _image_error(error: OSError) -> ImageError:
    """An `ImageError` for broken bytes; the system's own errors (which h5py writes into its text) are raised on."""
    number = re.search(r"errno = (\d+)", str(error))
    code = int(number.group(1)) if number else error.errno
    if code not in (None, 0, errno.EINVAL):
        raise OSError(code, os.strerror(code)) from error
    return ImageError("the HDF5 file cannot be read: " + " ".join(str(error).split())[:120])
