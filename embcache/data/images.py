"""Image files to ``uint8`` RGB arrays: the decoder, whose version is part of every recipe.

One file gives the same pixels on every machine as far as Pillow and its codecs do; samples deeper than 8 bits are
scaled by the image's own range. What cannot be decoded raises `ImageError` with a reason of one line, without the path,
that can be kept in a store.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

from embcache.data.budget import MAX_PIXELS, MOST_PIXELS, Decoding, broken, quiet, reasons
from embcache.data.containers import place_pixels, place_size
from embcache.data.dicom import decode_dicom, dicom_size, is_dicom
from embcache.data.files import (
    LARGE_FILE,
    LARGEST_FILE,
    file_too_large,
    is_object,
    open_file,
    resolve_inside,
)
from embcache.data.formats import (
    SIGNATURE,
    decode_page,
    gray_as_rgb,
    is_tiff,
    open_image,
    pillow_page,
    read_page,
    refuse_at_sight,
    scale_to_bytes,
)  # fmt: skip
from embcache.errors import DatasetError, ImageError

if TYPE_CHECKING:
    import pandas as pd

try:
    import simplejpeg
except ImportError:  # a platform without a wheel: Pillow decodes everything
    simplejpeg = None

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
_BLOCK = 1 << 22  # pixels converted at a time: what is made of an image at the limit must not take gigabytes
_PER_PIXEL = 30  # bytes, at most: 16-bit PNG; of a progressive JPEG coefficients, Pillow's pixels, turned ones and ours
_FIRST = "the first of several frames or pages is used"
_FAILED = "cannot be decoded"


Least = tuple[int, int] | int | None  # what an image will be resized to: (height, width), or its shorter side


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


def decode_image(
    data: bytes, *, name: str = "", decoding: Decoding | None = None, least: Least = None
) -> npt.NDArray[np.uint8]:
    """Decode a file's bytes; a JPEG's at the smallest scale (1/2, 1/4, 1/8) that leaves twice ``least``, if one does.

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
        with reasons(_FAILED):
            return decode_dicom(data, name, decoding)
    refuse_at_sight(data)
    with reasons(_FAILED), quiet(r"PIL\."):
        if is_tiff(data):
            return _decode_tiff(data, name, decoding)
        turned = True
        if data.startswith(SIGNATURE):
            data, turned = _without_ancillary(data)
        image = _open_with_less(io.BytesIO(data))
        decoding.check_size(*image.size)
        with decoding.hold(_PER_PIXEL * image.width * image.height):
            orientation = _orientation(image) if turned else 1
            scale = _scale(least, image.size, orientation) if image.format == "JPEG" else 1
            pixels = _decode_jpeg(data, image, scale) if orientation == 1 else None
            if pixels is not None:
                return pixels
            if scale > 1:
                image.draft(None, (image.width // scale, image.height // scale))
            if image.format == "PNG" and (channels := _deep_channels(data)):
                return _to_rgb(Image.fromarray(scale_to_bytes(_decode_deep(data, channels))), orientation)
            image.load()
            pixels = _to_rgb(image, orientation)
            if image.format in ("GIF", "PNG", "WEBP", "AVIF") and _animated(image):
                decoding.note(_FIRST, name)
            return pixels


def read_image(
    dataset_root: Path | str, path: str, place: str = "", decoding: Decoding | None = None, least: Least = None
) -> tuple[npt.NDArray[np.uint8], str]:
    """Read and decode (`decode_image`) an image of a dataset; the sha256 of the file, or of the pixels at a place.

    Shapes: returns (H, W, 3).
    """
    decoding = decoding or Decoding()
    if place:
        pixels = place_pixels(_resolve(dataset_root, path), place, decoding)
        return pixels, hashlib.sha256(pixels.tobytes()).hexdigest()
    with _open_file(dataset_root, path, decoding) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size > LARGEST_FILE:
            raise file_too_large(f"{size:,} bytes")
        with decoding.budget.hold() if size > LARGE_FILE else contextlib.nullcontext():
            data = file.read()
            digest = hashlib.sha256(data).hexdigest()
            try:
                return decode_image(data, name=path, decoding=decoding, least=least), digest
            except ImageError as error:  # so that it is known whether the file is another one later
                error.digest = digest
                raise


def read_size(dataset_root: Path | str, path: str, place: str = "") -> tuple[int, int]:
    """(width, height) that `read_image` will give, from the header alone.

    Whatever the limit on pixels: a transform that is chosen by sizes must not depend on it. Above `MOST_PIXELS`, which
    no limit allows, it raises as `read_image` does otherwise.
    """
    decoding = Decoding(MOST_PIXELS)
    if place:
        return place_size(_resolve(dataset_root, path), place, decoding)
    with _open_file(dataset_root, path, decoding) as file:
        head = file.read(132)
        if not head:
            raise broken("the file is empty")
        refuse_at_sight(head)
        file.seek(0)
        with reasons(_FAILED), quiet(r"PIL\."):
            if is_dicom(head, path):
                return dicom_size(file, path, decoding)
            if is_tiff(head):
                page = read_page(file, decoding)
                width, height, orientation = page.width, page.height, page.orientation
            elif head.startswith(SIGNATURE):  # an orientation may follow the pixels
                data, turned = _without_ancillary(file.read())
                image = open_image(io.BytesIO(data))
                width, height = image.size
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
    if is_object(path):
        raise DatasetError(
            "images within a file are read from disk only", code="container-remote", expected="a file below the root",
            found=path, fix="copy the file to a disk, or store each image as an object of its own",
        )  # fmt: skip
    return resolve_inside(dataset_root, path)


@contextlib.contextmanager
def _open_file(dataset_root: Path | str, path: str, decoding: Decoding) -> Iterator[IO[bytes]]:
    with contextlib.ExitStack() as opened:
        try:
            if is_object(path):
                file = opened.enter_context(open_file(Path(), path, decoding.budget))
            else:
                real = _resolve(dataset_root, path)
                if not stat.S_ISREG(os.stat(real).st_mode):  # noqa: PTH116
                    raise ImageError("not a regular file", code="image-missing")
                file = opened.enter_context(open(real, "rb"))  # noqa: PTH123
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ImageError("the file is not there", code="image-missing") from error
        yield file


def _open_with_less(file: IO[bytes]) -> Image.Image:
    """As `open_image`; a JPEG whose application segments Pillow stumbles over is opened without them."""
    try:
        return open_image(file)
    except ImageError:
        file.seek(0)
        less = _without_applications(file.read())
        if less is None:
            raise
        return open_image(io.BytesIO(less))


def _orientation(image: Image.Image) -> int:
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
        image = None if own and page.photometric in (0, 1, 2, 3) else pillow_page(data, page)
        if image is None or (page.nodata is not None and page.own_segments):
            return _to_rgb(Image.fromarray(decode_page(data, page)), page.orientation)
        if page.nodata is not None:
            decoding.note("a NODATA value that a lossy compression or color space leaves without meaning", name)
        image.load()  # turned by Pillow
        return _to_rgb(image, 1)


def _animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # something broken follows the first frame
        return True


def _to_rgb(image: Image.Image, orientation: int) -> npt.NDArray[np.uint8]:
    if image.mode in ("I", "F", "I;16", "I;16L", "I;16B", "I;16N"):
        image = Image.fromarray(scale_to_bytes(np.asarray(image)))
    if orientation in _TRANSPOSE:
        image = image.transpose(_TRANSPOSE[orientation])
    if image.mode == "L":
        return gray_as_rgb(np.asarray(image))
    width, height = image.size
    rows = max(1, _BLOCK // max(1, width))
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        part = image.crop((0, top, width, min(top + rows, height))) if rows < height else image
        # Palettes straight to RGB would warn of transparency.
        part = part.convert("RGBA") if part.mode in ("P", "PA") else part
        pixels[top : top + rows] = np.asarray(part if part.mode == "RGB" else part.convert("RGB"))
    return pixels


# PNG

_KEPT = frozenset((b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT"))
_TEXTS = frozenset((b"tEXt", b"zTXt", b"iTXt"))
_TURNING = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # keywords of texts that can hold an orientation
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(=\"|>)([0-9])")
_MOST_TEXT = 1 << 26  # bytes of a text that are looked through for an orientation
_SMALL = 1 << 12  # a chunk that Pillow may have: of no size, packed or unpacked, that it refuses


def _without_ancillary(data: bytes) -> tuple[bytes, bool]:
    """The file without profiles, texts and private chunks, whose damage or size says nothing about the pixels."""
    parts, at, start, turned = [], 8, 0, False
    while at + 12 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + size
        if end > len(data):
            break
        turned |= kind == b"eXIf"
        if kind[0] & 0x20 and kind not in _KEPT:  # lower case: ancillary
            parts.append(data[start:at])
            start = end
            if kind in _TEXTS and data.startswith(_TURNING, at + 8):
                text = _turning_text(data[at:end], kind, data[at + 8 : at + 8 + size])
                turned |= bool(text)
                parts.append(text)
        at = end
        if kind == b"IEND":
            break
    return (b"".join([*parts, data[start:]]) if parts else data), turned


def _turning_text(chunk: bytes, kind: bytes, body: bytes) -> bytes:
    """A text that can hold an orientation: as it is where it is small, else a text of the orientation alone."""
    if kind == b"tEXt" and len(body) <= _SMALL:
        return chunk
    keyword, _, rest = body.partition(b"\0")
    packed = kind == b"zTXt" or (kind == b"iTXt" and rest[:1] == b"\1")
    if packed:
        skipped = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
        try:
            rest = zlib.decompressobj().decompress(skipped, _MOST_TEXT)
        except zlib.error:
            return b""
    if keyword == b"Raw profile type exif":
        return chunk if packed and len(rest) <= PngImagePlugin.MAX_TEXT_CHUNK // 2 else b""
    found = _XMP_ORIENTATION.search(rest[:_MOST_TEXT])
    if not found:
        return b""
    body = keyword + b"\0" + found[0]
    return struct.pack(">I", len(body)) + b"tEXt" + body + struct.pack(">I", zlib.crc32(b"tEXt" + body))


def _deep_channels(data: bytes) -> int:
    """How many channels a PNG of 16 bits per channel has, where they are 2 (gray, alpha), 3 or 4; else 0."""
    return {4: 2, 2: 3, 6: 4}.get(data[25], 0) if data[24:25] == b"\x10" and len(data) > 25 else 0


def _decode_deep(data: bytes, channels: int) -> npt.NDArray[np.uint16]:
    """Color of a PNG of 16 bits per channel, which Pillow cuts to 8: gray (H, W) or RGB (H, W, 3), without alpha.

    Pillow's unpackers take the upper or the lower byte of each value, so that two readings have both.
    """
    mode = "RGB" if channels == 3 else "RGBA"
    # Two channels of 16 bits are laid out as four of 8 are.
    raws = ("RGBA",) if channels == 2 else (f"{mode};16B", f"{mode};16L")
    halves = []
    for raw in raws:
        image: Any = open_image(io.BytesIO(data))
        image._mode = mode
        image.tile = [tile._replace(args=raw) for tile in image.tile]
        image.load()
        halves.append(np.asarray(image))
    if channels == 2:
        return np.asarray(halves[0][..., 0].astype(np.uint16) << 8 | halves[0][..., 1])
    return np.asarray(halves[0][..., :3].astype(np.uint16) << 8 | halves[1][..., :3])


# JPEG: simplejpeg is twice as fast as Pillow. Both are libjpeg-turbo, each with a copy of its own; whatever is not a
# plain, whole file in RGB or gray is Pillow's.

_PIXELS = (0xDA, 0xFF)
_MEANING = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"Adobe\0d")


def _scale(least: Least, size: tuple[int, int], orientation: int) -> int:
    """By what the sides of a JPEG are divided in decoding, of size (width, height) before it is turned upright."""
    if least is None:
        return 1
    height, width = size if orientation >= 5 else size[::-1]
    ratio = min(height, width) / least if isinstance(least, int) else min(height / least[0], width / least[1])
    return next((scale for scale in (8, 4, 2) if ratio >= 2 * scale), 1)


def _decode_jpeg(data: bytes, image: Image.Image, scale: int = 1) -> npt.NDArray[np.uint8] | None:
    """Decode a JPEG file as Pillow would, its sides divided by a scale and rounded up, or None where Pillow must.

    Shapes: returns (H, W, 3).
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or not _same_pixels():
        return None
    shape = (-(-image.height // scale), -(-image.width // scale), 3)
    pixels = _strict_jpeg(data, image.mode, shape, scale)
    return pixels if pixels is not None and pixels.shape == shape else None


def _without_applications(data: bytes) -> bytes | None:
    """A JPEG without its application segments but EXIF and Adobe's, which say what the pixels are; None for others."""
    if not data.startswith(b"\xff\xd8\xff"):
        return None
    parts, at = [data[:2]], 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] not in _PIXELS:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        kept = data.startswith(_MEANING, at + 4) or not 0xE0 <= data[at + 1] <= 0xEF
        parts += [data[at:end]] * kept
        at = end
    return b"".join([*parts, data[at:]])


def _strict_jpeg(data: bytes, mode: str, shape: tuple[int, ...], scale: int) -> npt.NDArray[np.uint8] | None:
    least = {"min_height": shape[0], "min_width": shape[1], "min_factor": scale}
    try:
        # Strict by default: at the first thing that libjpeg warns of, Pillow shall say whether the file is broken.
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "GRAY" if mode == "L" else mode, **least)
    except ValueError:
        return None
    return gray_as_rgb(pixels[..., 0]) if mode == "L" else pixels


@functools.cache
def _same_pixels() -> bool:
    """Whether both decoders give the same pixels here; a Pillow built with another libjpeg may not."""
    if simplejpeg is None:
        return False
    values = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    picture = Image.fromarray(values).resize((93, 77), Image.Resampling.BICUBIC)
    for mode, subsampling, progressive in (("RGB", 0, False), ("RGB", 1, False), ("RGB", 2, True), ("L", 0, False)):
        file = io.BytesIO()
        picture.convert(mode).save(file, "JPEG", quality=75, subsampling=subsampling, progressive=progressive)
        for scale in (1, 2):
            drafted = Image.open(file)
            drafted.draft(None, (93 // scale, 77 // scale))
            found, expected = _strict_jpeg(file.getvalue(), mode, drafted.size[::-1], scale), drafted.convert("RGB")
            if found is None or not np.array_equal(found, np.array(expected)):
                return False
    return True
