"""What file formats need beside Pillow: refusals at first sight, sizes from headers, clean PNG, fast JPEG, depth."""

from __future__ import annotations

import functools
import io
import os
import re
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

from embcache.data.budget import unsupported

try:
    import simplejpeg
except ImportError:  # a platform without a wheel: Pillow decodes everything
    simplejpeg = None

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "DIB", "GIF", "WEBP", "AVIF", "TGA", "JPEG2000", "PPM", "PCX")
"""What Pillow may try. Others of its readers are for games, icons and office files: some decode in Python at minutes an
image, some run programs (EPS), some only know how to ask other packages."""

MOST_SCANS = 500
"""Progressive JPEGs have about ten; each goes over the whole image again, however little it holds."""

_REFUSED = (
    ((b"%!PS", b"\xc5\xd0\xd3\xc6"), "PostScript is not decoded: it would run a program"),
    ((b"%PDF",), "a PDF is not an image"),
)


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has, in the order in which Pillow tries them."""
    Image.init()
    return tuple(format for format in Image.ID if format in FORMATS)


def refuse_at_sight(data: bytes) -> None:
    """Raise `ImageError` for files that only look like images, and for those made to keep a decoder busy."""
    for starts, reason in _REFUSED:
        if data.startswith(starts):
            raise unsupported(reason)
    # In what is compressed a byte FF is followed by 00 or D0 to D7, so that FF DA is a scan, or of a small preview.
    if data.startswith(b"\xff\xd8") and (scans := data.count(b"\xff\xda")) > MOST_SCANS:
        raise unsupported(f"a JPEG of {scans:,} scans: at most {MOST_SCANS} are decoded")


# Sizes from headers

_HEAD = 1 << 10  # bytes read at first
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
_MOST_HEAD = 1 << 18  # and at most: a JPEG may begin with profiles and previews
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}  # JPEG markers that give a size; F7: JPEG-LS
_BARE = frozenset(range(0xD0, 0xD8)) | {0x01}  # JPEG markers without a length
_SCAN = 0xDA


def is_square_of(path: str, side: int) -> bool:
    """Whether the header of the file says ``side`` × ``side`` pixels; False where that is not sure.

    Takes microseconds, to compare a million images with one whose size is known. Only squares: their size does not
    depend on an orientation.
    """
    descriptor = os.open(path, _FLAGS)
    try:
        head = os.read(descriptor, _HEAD)
        if head.startswith(SIGNATURE):
            return head[8:24] == b"\0\0\0\rIHDR" + struct.pack(">II", side, side)
        if head.startswith(b"\xff\xd8\xff"):
            frame = jpeg_frame(head)
            if frame is None and len(head) == _HEAD:
                frame = jpeg_frame(head + os.read(descriptor, _MOST_HEAD - _HEAD))
            return frame is not None and frame[:2] == (side, side)
        if head[:4] in (b"II*\0", b"MM\0*"):
            return _tiff_size(descriptor, head) == (side, side)
        return False
    finally:
        os.close(descriptor)


def jpeg_frame(data: bytes) -> tuple[int, int, int, int, int] | None:
    """Width, height, bits per sample, components and marker of the only frame that a JPEG announces, if sure."""
    frame, place = None, 2
    while place + 9 <= len(data):
        if data[place] != 0xFF:
            return None
        marker = data[place + 1]
        if marker == 0xFF:  # padding
            place += 1
        elif marker in _BARE:
            place += 2
        elif marker == _SCAN:
            return frame
        else:
            if marker in _FRAMES:
                if frame is not None or place + 10 > len(data):
                    return None
                bits, height, width, components = struct.unpack_from(">BHHB", data, place + 4)
                frame = (width, height, bits, components, marker)
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def codestream_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) that a JPEG, JPEG-LS or JPEG 2000 codestream states for itself; None where not sure."""
    if data.startswith(b"\xff\xd8"):
        frame = jpeg_frame(data)
        return frame and frame[:2]
    start = data.find(b"\xff\x4f\xff\x51", 0, 1 << 16)  # some wrap the codestream in a JP2 file
    if start < 0 or start + 24 > len(data):
        return None
    right, bottom, left, top = struct.unpack_from(">IIII", data, start + 8)
    return right - left, bottom - top


def _tiff_size(descriptor: int, head: bytes) -> tuple[int, int] | None:
    """(width, height) of a TIFF's first page; None where not sure."""
    order = "<" if head[:2] == b"II" else ">"
    if len(head) < 8:
        return None
    (start,) = struct.unpack_from(order + "I", head, 4)
    os.lseek(descriptor, start, os.SEEK_SET)
    page = os.read(descriptor, _HEAD)
    if len(page) < 2:
        return None
    found: dict[int, int] = {}
    for number in range(min(struct.unpack_from(order + "H", page)[0], (len(page) - 2) // 12)):
        tag, kind, count = struct.unpack_from(order + "HHI", page, 2 + 12 * number)
        if tag in (256, 257):
            if kind not in (3, 4) or count != 1 or tag in found:
                return None
            (found[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), page, 10 + 12 * number)
    return (found[256], found[257]) if len(found) == 2 else None


# PNG

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_KEPT = frozenset((b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT"))
_TEXTS = frozenset((b"tEXt", b"zTXt", b"iTXt"))
_TURNING = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # keywords of texts that can hold an orientation
_ORIENTATION = re.compile(rb"tiff:Orientation(=\"|>)([0-9])")
_MOST_TEXT = 1 << 26  # bytes of a text that are looked through for an orientation
_SMALL = 1 << 12  # a chunk that Pillow may have: of no size, packed or unpacked, that it refuses


def without_ancillary(data: bytes) -> tuple[bytes, bool]:
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
    found = _ORIENTATION.search(rest[:_MOST_TEXT])
    if not found:
        return b""
    body = keyword + b"\0" + found[0]
    return struct.pack(">I", len(body)) + b"tEXt" + body + struct.pack(">I", zlib.crc32(b"tEXt" + body))


def deep_channels(data: bytes) -> int:
    """How many channels a PNG of 16 bits per channel has, where they are 2 (gray, alpha), 3 or 4; else 0."""
    return {4: 2, 2: 3, 6: 4}.get(data[25], 0) if data[24:25] == b"\x10" and len(data) > 25 else 0


def decode_deep(data: bytes, channels: int, open_png: Any) -> npt.NDArray[np.uint16]:
    """Color of a PNG of 16 bits per channel, which Pillow cuts to 8: gray (H, W) or RGB (H, W, 3), without alpha.

    Pillow's unpackers take the upper or the lower byte of each value, so that two readings have both.
    """
    mode = "RGB" if channels == 3 else "RGBA"
    # Two channels of 16 bits are laid out as four of 8 are.
    raws = ("RGBA",) if channels == 2 else (f"{mode};16B", f"{mode};16L")
    halves = []
    for raw in raws:
        image = open_png(io.BytesIO(data))
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


def decode_jpeg(data: bytes, image: Image.Image) -> npt.NDArray[np.uint8] | None:
    """Decode a JPEG file as Pillow would, or None where Pillow must.

    Shapes: returns (H, W, 3).
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or not _same_pixels():
        return None
    pixels = _decode(data)
    return pixels if pixels is not None and pixels.shape == (image.height, image.width, 3) else None


def without_applications(data: bytes) -> bytes | None:
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


def _decode(data: bytes) -> npt.NDArray[np.uint8] | None:
    try:
        # Strict: at the first thing that libjpeg warns of, Pillow shall say whether the file is broken.
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return None
    return pixels


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
        found = _decode(file.getvalue())
        if found is None or not np.array_equal(found, np.array(Image.open(file).convert("RGB"))):
            return False
    return True


# Values of any depth to 8 bits, by rules that depend on the image alone

_BLOCK = 1 << 20  # values converted at a time: what is made of an image at the limit must not take gigabytes


def scale_to_bytes(
    values: npt.NDArray[Any], *, absent: npt.NDArray[np.bool_] | None = None, inverted: bool = False
) -> npt.NDArray[np.uint8]:
    """Scale an image by its own range: its smallest finite value becomes 0, its largest 255, a constant 0.

    Shapes: values (H, W); absent (H, W).
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    gone = None if absent is None else np.repeat(absent.reshape(-1), values.size // max(1, absent.size))
    parts = [slice(start, start + _BLOCK) for start in range(0, flat.size, _BLOCK)]
    low, high = np.inf, -np.inf
    for part in parts:
        used = np.isfinite(flat[part]) if gone is None else np.isfinite(flat[part]) & ~gone[part]
        finite = flat[part][used]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    scaled = np.zeros(flat.shape, dtype=np.uint8)
    if high > low:
        # Differences of the largest doubles overflow, and 255 over the smallest.
        unit = 0.25 if high / 2 - low / 2 > 1e307 else 2.0**600 if high - low < 1e-300 else 1.0
        low, high = low * unit, high * unit
        for part in parts:
            x = np.nan_to_num(flat[part].astype(np.float64) * unit, nan=low, posinf=high, neginf=low)
            levels = np.rint((np.clip(x, low, high) - low) * (255.0 / (high - low)))
            scaled[part] = 255.0 - levels if inverted else levels
            if gone is not None:
                scaled[part][gone[part]] = 0
            if inverted and flat.dtype.kind == "f":
                scaled[part][np.isnan(flat[part])] = 0
    return scaled.reshape(values.shape)


def widen_to_bytes(values: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Unsigned values of up to 8 bits to the whole of 0 … 255, as Pillow does: white is white at any depth."""
    if bits == 8:
        return values.astype(np.uint8, copy=False)
    levels = np.rint(np.arange(1 << bits) * (255.0 / ((1 << bits) - 1))).astype(np.uint8)
    return np.asarray(levels[values])
