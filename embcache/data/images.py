"""Image files to ``uint8`` RGB arrays: the decoder, whose version is part of every recipe.

One file gives the same pixels on every machine as far as Pillow and its codecs do; grey levels above 8 bits are scaled
by the image's own range. What cannot be decoded raises `ImageError` with a reason of one line, without the path, that
can be kept in a store.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from embcache.data.arrays import member_pixels, member_size
from embcache.data.checks import refuse_outside
from embcache.data.dicom import decode_dicom, dicom_size, is_dicom
from embcache.data.files import is_inside
from embcache.data.guards import readable_formats, refuse_at_sight
from embcache.data.jpeg import decode_jpeg
from embcache.data.quiet import quiet
from embcache.errors import EmbcacheError, ImageError

DECODER_VERSION = "pillow-1"

_ORIENTATION = 0x0112  # the EXIF tag
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WIDE_GREY = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_BLOCK = 1 << 22  # pixels converted at a time: what is made of an image at the limit must not take gigabytes


def decode_image(data: bytes, *, name: str = "") -> npt.NDArray[np.uint8]:
    """Decode a file's bytes.

    The first frame, turned upright by its EXIF orientation. Palette, CMYK and other colour spaces become RGB as Pillow
    converts them; alpha is dropped, the colours stay as stored; grey of 16 or 32 bits or floating point is scaled so
    that its own minimum becomes 0 and its maximum 255 (a constant image becomes 0).

    Parameters
    ----------
    data : bytes
        The whole file.
    name : str
        File name, by whose suffix DICOM files without their usual preamble are known.

    Returns
    -------
    ndarray of shape (H, W, 3), uint8

    Raises
    ------
    ImageError
        Empty, truncated, broken, too large (Pillow's limit on pixels) or not an image.
    DatasetError
        A DICOM file, and what decodes it is not installed.
    """
    if not data:
        raise ImageError("the file is empty")
    if is_dicom(data, name):
        with _reasons():
            return decode_dicom(data, name)
    refuse_at_sight(data)
    with _reasons():
        image, orientation = _open(io.BytesIO(data))
        pixels = decode_jpeg(data, image) if orientation == 1 else None
        if pixels is not None:
            return pixels
        with quiet(r"PIL\."):
            image.load()
        return _to_rgb(image, orientation)


def read_image(dataset_root: Path | str, path: str, member: int = -1) -> tuple[npt.NDArray[np.uint8], str]:
    """Read and decode one image of a dataset.

    Parameters
    ----------
    dataset_root, path, member
        The root, and the row's ``path`` and ``member``.

    Returns
    -------
    pixels : ndarray of shape (H, W, 3), uint8
    digest : str
        sha256 (hex) of the file's bytes; of the pixels' bytes for a member of an array file.

    Raises
    ------
    ImageError
        The image is not there or cannot be decoded.
    DatasetError
        The path leads out of the root, or what decodes the file is not installed.
    OSError
        The file cannot be read for now (no permission, a stale mount, a failing disk): not the image's fault.
    """
    real = _resolve(dataset_root, path)
    if member >= 0:
        pixels = member_pixels(real, member)
        return pixels, hashlib.sha256(pixels.tobytes()).hexdigest()
    with _open_file(real) as file:
        data = file.read()
    return decode_image(data, name=path), hashlib.sha256(data).hexdigest()


def read_size(dataset_root: Path | str, path: str, member: int = -1) -> tuple[int, int]:
    """(width, height) that `read_image` will give, from the header alone. Raises as `read_image` does."""
    real = _resolve(dataset_root, path)
    if member >= 0:
        return member_size(real, member)
    with _open_file(real) as file:
        head = file.read(132)
        if not head:
            raise ImageError("the file is empty")
        refuse_at_sight(head)
        file.seek(0)
        with _reasons():
            if is_dicom(head, path):
                return dicom_size(file, path)
            image, orientation = _open(file)
            width, height = image.size
    return (height, width) if orientation >= 5 else (width, height)


def _resolve(dataset_root: Path | str, path: str) -> str:
    real = os.path.realpath(os.path.join(dataset_root, path))  # noqa: PTH118
    if not is_inside(dataset_root, real):
        raise refuse_outside(path, where=dataset_root)
    return real


def _open_file(real: str) -> IO[bytes]:
    try:
        if not stat.S_ISREG(os.stat(real).st_mode):  # noqa: PTH116
            raise ImageError("not a regular file")
        return open(real, "rb")  # noqa: PTH123
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError("the file is not there") from error


def _open(file: IO[bytes]) -> tuple[Image.Image, int]:
    """Open an image, its header read, and the EXIF orientation (1 to 8) still to be applied."""
    with quiet(r"PIL\.", fatal=Image.DecompressionBombWarning):
        image = Image.open(file, formats=readable_formats())
        if image.format == "TIFF":  # Pillow turns these itself
            return image, 1
        if image.format == "PNG":
            # Its EXIF block may follow the pixels, so that getexif() decodes them, and what is broken in them must not
            # be taken for a broken block: loaded a second time, Pillow returns what it has got so far.
            image.load()
        try:
            orientation = image.getexif().get(_ORIENTATION, 1)
        except Exception:  # a broken EXIF block does not make the pixels unreadable
            orientation = 1
    return image, orientation if orientation in _TRANSPOSE else 1


def _to_rgb(image: Image.Image, orientation: int) -> npt.NDArray[np.uint8]:
    if image.mode in _WIDE_GREY:
        image = Image.fromarray(scale_to_bytes(np.asarray(image)))
    if orientation != 1:
        image = image.transpose(_TRANSPOSE[orientation])
    width, height = image.size
    rows = max(1, _BLOCK // max(1, width))
    if rows >= height:
        return np.array(_opaque(image))
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = np.asarray(_opaque(image.crop((0, top, width, bottom))))
    return pixels


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # straight to RGB would warn of transparent palettes
    return image if image.mode == "RGB" else image.convert("RGB")


def scale_to_bytes(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Scale an array by its own finite range to 0 … 255; not-a-number becomes 0, infinities the ends."""
    flat = np.ascontiguousarray(values).reshape(-1)
    parts = [slice(start, start + _BLOCK) for start in range(0, flat.size, _BLOCK)]
    low, high = np.inf, -np.inf
    for part in parts:
        finite = flat[part][np.isfinite(flat[part])]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    scaled = np.zeros(flat.shape, dtype=np.uint8)
    if high > low:
        for part in parts:
            x = np.nan_to_num(flat[part].astype(np.float64), nan=low, posinf=high, neginf=low)
            scaled[part] = np.rint((x - low) * (255.0 / (high - low))).astype(np.uint8)
    return scaled.reshape(values.shape)


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn whatever a decoder raises on broken bytes into an `ImageError`; trouble of the machine passes."""
    try:
        yield
    except (EmbcacheError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = Image.MAX_IMAGE_PIXELS
        raise ImageError(f"too large: more than {limit:,} pixels" if limit else "too large") from error
    except UnidentifiedImageError as error:
        raise ImageError("not an image that Pillow reads") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise ImageError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    text = re.sub(r"<[^<>]* object at 0x[0-9a-fA-F]+>", "", str(error))  # addresses differ from run to run
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())[:160]
    return f"cannot be decoded: {text or type(error).__name__}"
