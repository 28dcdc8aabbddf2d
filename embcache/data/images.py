"""Image files to ``uint8`` RGB arrays: the decoder, whose version is part of every recipe.

One file gives the same pixels on every machine as far as Pillow and its codecs do; samples deeper than 8 bits are
scaled by the image's own range. What cannot be decoded raises `ImageError` with a reason of one line, without the path,
that can be kept in a store.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from embcache.data.budget import MAX_PIXELS, MOST_PIXELS, Decoding, broken, quiet, too_large, unsupported
from embcache.data.containers.array_rows import place_pixels, place_size
from embcache.data.dicom import decode_dicom, dicom_size, is_dicom
from embcache.data.files import is_inside, refuse_outside
from embcache.data.formats import (
    SIGNATURE,
    decode_deep,
    decode_jpeg,
    deep_channels,
    readable_formats,
    refuse_at_sight,
    scale_to_bytes,
    without_ancillary,
    without_applications,
)  # fmt: skip
from embcache.data.tiff import Page, decode_page, is_tiff, read_page
from embcache.errors import EmbcacheError, ImageError

if TYPE_CHECKING:
    import pandas as pd

DECODER_VERSION = "pillow-2"

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
_WIDE_GRAY = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_BLOCK = 1 << 22  # pixels converted at a time: what is made of an image at the limit must not take gigabytes
_PER_PIXEL = 30  # bytes, at most: 16-bit PNG; of a progressive JPEG coefficients, Pillow's pixels, turned ones and ours
_LARGE_FILE, _LARGEST_FILE = 1 << 26, 1 << 32
_FIRST = "the first of several frames or pages is used"


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One image to read: its id, its path relative to the dataset's root, its place in a container (else empty)."""

    id: str
    path: str
    place: str


def image_refs(table: pd.DataFrame) -> list[ImageRef]:
    """Where the images of a dataset's table, or of some of its rows, are; in their order."""
    columns = [table[name].tolist() for name in ("id", "path", "place")]
    # Where the path is the id, one string serves as both: there may be millions.
    return [ImageRef(id_, id_ if path == id_ else path, place) for id_, path, place in zip(*columns, strict=True)]


def image_refs_of(table: pd.DataFrame, ids: Sequence[str]) -> list[ImageRef]:
    """Where the images with these ids are; the path of one that is not in the table is empty."""
    known = {source.id: source for source in image_refs(table)}
    return [known.get(id_, ImageRef(id_, "", "")) for id_ in ids]


def decode_image(data: bytes, *, name: str = "", decoding: Decoding | None = None) -> npt.NDArray[np.uint8]:
    """Decode a file's bytes.

    The first frame, or the first page of a TIFF that is neither a thumbnail nor a mask, turned upright by its EXIF
    orientation. Palette, CMYK and other color spaces become RGB as Pillow converts them. Alpha and further channels are
    dropped, the colors stay as stored.

    - Unsigned samples of up to 8 bits keep their meaning: the largest value of the depth becomes 255.
    - Deeper, signed and floating-point samples (gray, gray with alpha, RGB, RGBA; PNG and TIFF, and gray of other
      formats) are scaled so that the image's own minimum becomes 0 and its maximum 255, in one range for all colors; a
      constant image becomes 0. Of other formats, deeper color is cut to 8 bits by the depth that it states.
    - White is 255: a TIFF of photometric interpretation 0 is inverted.
    - Pixels of a TIFF that have the file's NODATA value, and those that are not a number, are outside the range, and 0.

    Shapes: returns (H, W, 3).
    """
    decoding = decoding or Decoding()
    if not data:
        raise broken("the file is empty")
    if is_dicom(data, name):
        with _reasons():
            return decode_dicom(data, name, decoding)
    refuse_at_sight(data)
    with _reasons(), quiet(r"PIL\."):
        if is_tiff(data):
            return _decode_tiff(data, name, decoding)
        turned = True
        if data.startswith(SIGNATURE):
            data, turned = without_ancillary(data)
        image = _open_with_less(io.BytesIO(data))
        decoding.check_size(*image.size)
        with decoding.hold(_PER_PIXEL * image.width * image.height):
            orientation = _orientation(image) if turned else 1
            pixels = decode_jpeg(data, image) if orientation == 1 else None
            if pixels is not None:
                return pixels
            if image.format == "PNG" and (channels := deep_channels(data)):
                values = decode_deep(data, channels, _open)
                return _to_rgb(Image.fromarray(scale_to_bytes(values)), orientation)
            image.load()
            pixels = _to_rgb(image, orientation)
            if image.format in ("GIF", "PNG", "WEBP", "AVIF") and _animated(image):
                decoding.note(_FIRST, name)
            return pixels


def read_image(
    dataset_root: Path | str, path: str, place: str = "", decoding: Decoding | None = None
) -> tuple[npt.NDArray[np.uint8], str]:
    """Read and decode one image of a dataset.

    Shapes: returns (H, W, 3).
    """
    decoding = decoding or Decoding()
    real = _resolve(dataset_root, path)
    if place:
        pixels = place_pixels(real, place, decoding)
        return pixels, hashlib.sha256(pixels.tobytes()).hexdigest()
    with _open_file(real) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _LARGE_FILE:
            return _decode_and_hash(file.read(), path, decoding)
        if size > _LARGEST_FILE:
            raise too_large(f"too large: a file of {size:,} bytes, more than {_LARGEST_FILE:,}: cut it into tiles")
        with decoding.budget.hold():
            return _decode_and_hash(file.read(), path, decoding)


def _decode_and_hash(data: bytes, path: str, decoding: Decoding) -> tuple[npt.NDArray[np.uint8], str]:
    digest = hashlib.sha256(data).hexdigest()
    try:
        return decode_image(data, name=path, decoding=decoding), digest
    except ImageError as error:  # so that it is known whether the file is another one later
        error.digest = digest
        raise


def read_size(dataset_root: Path | str, path: str, place: str = "") -> tuple[int, int]:
    """(width, height) that `read_image` will give, from the header alone.

    Whatever the limit on pixels: a transform that is chosen by sizes must not depend on it. Above `MOST_PIXELS`, which
    no limit allows, it raises as `read_image` does otherwise.
    """
    decoding = Decoding(MOST_PIXELS)
    real = _resolve(dataset_root, path)
    if place:
        return place_size(real, place, decoding)
    with _open_file(real) as file:
        head = file.read(132)
        if not head:
            raise broken("the file is empty")
        refuse_at_sight(head)
        file.seek(0)
        with _reasons(), quiet(r"PIL\."):
            if is_dicom(head, path):
                return dicom_size(file, path, decoding)
            if is_tiff(head):
                page = read_page(file, decoding)
                width, height, orientation = page.width, page.height, page.orientation
            elif head.startswith(SIGNATURE):  # an orientation may follow the pixels
                data, turned = without_ancillary(file.read())
                image = _open(io.BytesIO(data))
                (width, height), orientation = image.size, 1
                decoding.check_size(width, height)
                # Finding it decodes the pixels: of larger images none is looked for, as no choice hangs on it.
                turned &= width != height and width * height <= MAX_PIXELS
                orientation = _orientation(image) if turned else 1
            else:
                image = _open_with_less(file)
                (width, height), orientation = image.size, _orientation(image)
            decoding.check_size(width, height)
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def _resolve(dataset_root: Path | str, path: str) -> str:
    real = os.path.realpath(os.path.join(dataset_root, path))  # noqa: PTH118
    if not is_inside(dataset_root, real):
        raise refuse_outside(path, where=dataset_root)
    return real


def _open_file(real: str) -> IO[bytes]:
    try:
        if not stat.S_ISREG(os.stat(real).st_mode):  # noqa: PTH116
            raise ImageError("not a regular file", code="image-missing")
        return open(real, "rb")  # noqa: PTH123
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError("the file is not there", code="image-missing") from error


def _open(file: IO[bytes]) -> Image.Image:
    """Pillow's image of a file, its header read.

    As `PIL.Image.open`, which raises or warns of the size by filters and a limit that belong to the whole process.
    """
    prefix = file.read(16)
    for format in readable_formats():
        factory, accept = Image.OPEN[format]
        try:
            if accept is not None and accept(prefix) is not True:
                continue
            file.seek(0)
            image: Image.Image = factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # these mean: another format
            continue
        return image
    raise UnidentifiedImageError


def _open_with_less(file: IO[bytes]) -> Image.Image:
    """As `_open`; a JPEG whose application segments Pillow stumbles over is opened without them."""
    try:
        return _open(file)
    except UnidentifiedImageError:
        file.seek(0)
        less = without_applications(file.read())
        if less is None:
            raise
        return _open(io.BytesIO(less))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, still to be applied."""
    if image.format == "PNG":
        # Its EXIF block may follow the pixels, so that getexif() decodes them, and what is broken in them must not be
        # taken for a broken block: loaded a second time, Pillow returns what it has got so far.
        image.load()
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block does not make the pixels unreadable
        return 1
    return orientation if orientation in _TRANSPOSE else 1


def _decode_tiff(data: bytes, name: str, decoding: Decoding) -> npt.NDArray[np.uint8]:
    page = read_page(io.BytesIO(data), decoding)
    with decoding.hold(page.need):
        if page.pages > 1:
            decoding.note(_FIRST, name)
        # Of planes, and of gray with alpha, Pillow forgets some.
        own = page.deep or (page.own_segments and (page.planar or page.samples == 2))
        image = None if own and page.photometric in (0, 1, 2, 3) else _pillow_page(data, page)
        if image is None or (page.nodata is not None and page.own_segments):
            return _to_rgb(
                Image.fromarray(decode_page(data, page, lambda part: _open(io.BytesIO(part)))), page.orientation
            )
        if page.nodata is not None:
            decoding.note("a NODATA value that a lossy compression or color space leaves without meaning", name)
        image.load()  # turned by Pillow
        return _to_rgb(image, 1)


def _pillow_page(data: bytes, page: Page) -> Image.Image | None:
    """The page as Pillow has it, its pixels not loaded; None where Pillow has no mode for it."""
    try:
        image = _open(io.BytesIO(data))
        if page.number:
            image.seek(page.number)
    except (UnidentifiedImageError, SyntaxError):
        return None
    return image if image.format == "TIFF" else None


def _animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # something broken follows the first frame
        return True


def _to_rgb(image: Image.Image, orientation: int) -> npt.NDArray[np.uint8]:
    if image.mode in _WIDE_GRAY:
        image = Image.fromarray(scale_to_bytes(np.asarray(image)))
    if orientation in _TRANSPOSE:
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


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn whatever a decoder raises on broken bytes into an `ImageError`; trouble of the machine passes."""
    try:
        yield
    except (EmbcacheError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise unsupported("not an image that Pillow reads") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        text = re.sub(r"<[^<>]* object at 0x[0-9a-fA-F]+>", "", str(error))  # addresses differ from run to run
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())[:160]
        raise broken(f"cannot be decoded: {text or type(error).__name__}") from error
