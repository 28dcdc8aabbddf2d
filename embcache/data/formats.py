"""What file formats need beside Pillow: refusals at first sight, sizes from headers, TIFF, and depth.

Of TIFF, Pillow decodes what has a mode in Pillow: up to 8 bits, unsigned. All else is put together here, from segments
that Pillow's libtiff or zlib unpack: deeper, signed and floating-point samples, for which Pillow has no mode, or one
that forgets the interpretation or cuts 16 bits to 8.
"""

from __future__ import annotations

import functools
import io
import math
import os
import struct
import zlib
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from embcache.data.budget import Decoding, broken, unsupported
from embcache.errors import ImageError

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
def _readable_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(format for format in Image.ID if format in FORMATS)


def open_image(file: IO[bytes]) -> Image.Image:
    """Pillow's image of a file, its header read; `ImageError` for a format that is not read.

    As `PIL.Image.open`, which raises or warns of the size by filters and a limit that belong to the whole process.
    """
    prefix = file.read(16)
    for format in _readable_formats():
        factory, accept = Image.OPEN[format]
        try:
            if accept is not None and accept(prefix) is not True:
                continue
            file.seek(0)
            image: Image.Image = factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # these mean: another format
            continue
        return image
    raise unsupported("not an image that Pillow reads")


def refuse_at_sight(data: bytes) -> None:
    """Raise `ImageError` for files that only look like images, and for those made to keep a decoder busy."""
    for starts, reason in _REFUSED:
        if data.startswith(starts):
            raise unsupported(reason)
    # In what is compressed a byte FF is followed by 00 or D0 to D7, so that FF DA is a scan, or of a small preview.
    if data.startswith(b"\xff\xd8") and (scans := data.count(b"\xff\xda")) > MOST_SCANS:
        raise unsupported(f"a JPEG of {scans:,} scans: at most {MOST_SCANS} are decoded")


# Sizes from headers

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEAD = 1 << 10  # bytes read at first
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
_MOST_HEAD = 1 << 18  # and at most: a JPEG may begin with profiles and previews
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}  # JPEG markers that give a size; F7: JPEG-LS
_BARE = frozenset(range(0xD0, 0xD8)) | {0x01}  # JPEG markers without a length
_SCAN = 0xDA


def is_square_of(path: str, side: int) -> bool:
    """Whether the header says ``side`` × ``side`` pixels, for sure: in microseconds, as there may be a million files.

    Only squares: their size does not depend on an orientation.
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


# TIFF

_TYPES = {1: "u1", 2: "u1", 3: "u2", 4: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 13: "u4", 16: "u8", 17: "i8"}
# Size, depth, compression, interpretation, segments, planes, predictor, colors, extra channels, NODATA.
_TAGS = {254, *range(256, 260), 262, 266, 273, 274, 277, 278, 279, 284, 317, 320, *range(322, 326), 338, 339, 42113}
_MOST_VALUES = 1 << 22  # of one tag: strips of an image at the limit, one row each, are far fewer
_MOST_PAGES = 64  # looked through for one that is no thumbnail
_MOST_SAMPLES = 64
_REDUCED_OR_MASK = 1 | 4
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE = range(4)
_NONE, _PACKED = 1, frozenset((5, 8, 32773, 32946, 34925, 50000))  # LZW, deflate, PackBits, LZMA, Zstandard: any bytes
_DEFLATE = frozenset((8, 32946))
_NAMES = {6: "old JPEG", 7: "JPEG", 34712: "JPEG 2000", 34887: "LERC", 50001: "WebP", 50002: "JPEG XL"}
_REVERSED = np.packbits(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)[:, ::-1], axis=1)[:, 0]
_PREDICTORS = {1: "uifb", 2: "ui", 3: "f"}


class Page:
    """What the tags say of the page that is decoded.

    Of its samples ``kind`` is "u", "i" or "f", or "?" for such as are not decoded; ``pages`` is how many are as much an
    image as it is; ``segment`` the width and height of its tiles or strips.
    """

    def __init__(self, tags: dict[int, npt.NDArray[Any]], number: int, pages: int, big_endian: bool) -> None:
        def many(tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
            found = tags.get(tag)
            return default if found is None or not len(found) else tuple(found[:_MOST_SAMPLES].tolist())

        def one(tag: int, default: int) -> int:
            return many(tag, (default,))[0]

        self.number, self.pages, self.big_endian = number, pages, big_endian
        self.width, self.height, self.samples = one(256, 0), one(257, 0), one(277, 1)
        self.photometric, self.compression, self.predictor = one(262, -1), one(259, 1), one(317, 1)
        self.reversed_bits, self.orientation = one(266, 1) == 2, one(274, 1)
        self.planar, self.extra = one(284, 1) == 2 and self.samples > 1, many(338)
        if not 1 <= self.samples <= _MOST_SAMPLES:
            raise unsupported(f"a TIFF of {self.samples} samples per pixel: 1 to {_MOST_SAMPLES} are decoded")
        bits, formats = set(many(258, (1,))), set(many(339, (1,)))
        self.bits, alike = max(bits), len(formats) == len(bits) == 1
        kind = {1: "u", 2: "i", 3: "f", 4: "u"}.get(next(iter(formats)), "?") if alike else "?"
        known = self.bits in (16, 32, 64) if kind == "f" else 1 <= self.bits <= 32 or self.bits == 64
        self.kind = kind if known else "?"
        self.tiled = 322 in tags
        rows = min(one(278, self.height) or self.height, self.height)
        self.segment = (one(322, 0), one(323, 0)) if self.tiled else (self.width, rows)
        if self.width and self.height and min(self.segment) < 1:
            raise broken("a TIFF with strips or tiles of no size")
        empty = np.zeros(0, np.int64)
        places, sizes = (tags.get(tag) for tag in ((324, 325) if self.tiled else (273, 279)))
        self.offsets = (tags.get(273, empty) if places is None else places).astype(np.int64)
        self.counts = (tags.get(279, empty) if sizes is None else sizes).astype(np.int64)
        self.colors = tags.get(320, empty).astype(np.int64)
        text = tags.get(42113, empty).astype(np.uint8).tobytes()[:64].split(b"\0")[0].decode("ascii", "replace").strip()
        try:
            self.nodata = float(text) if text else None
        except ValueError:
            raise broken(f"a TIFF with a NODATA value that is no number: {text[:20]!r}") from None

    @property
    def deep(self) -> bool:
        """Whether samples are scaled by the image's own range: all but unsigned ones of up to 8 bits."""
        return self.bits > 8 or self.kind != "u"

    @property
    def own_segments(self) -> bool:
        """Whether its strips or tiles are unpacked here, and hold colors rather than what a codec makes of them."""
        return self.photometric in (0, 1, 2) and (self.compression == _NONE or self.compression in _PACKED)

    @property
    def need(self) -> int:
        """Bytes that decoding takes, at most."""
        item = max(1, 1 << math.ceil(math.log2(max(1, self.bits / 8))))
        unpacked = 0 if self.bits in (8, 16, 32, 64) else 8 * item
        segment = self.segment[0] * self.segment[1] * self.samples * (2 * item + unpacked)
        return self.width * self.height * (min(4, self.samples) * (item + 1) + 8) + segment


def is_tiff(data: bytes) -> bool:
    """Whether a file's first bytes are a TIFF's, classic or big."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_page(file: IO[bytes], decoding: Decoding) -> Page:
    """Tags of the first page that is neither a reduced image nor a mask, else of the first."""
    chosen, number, pages = None, 0, 0
    for index, tags in enumerate(_directories(file)):
        full = not int(tags.get(254, [0])[0]) & _REDUCED_OR_MASK
        if chosen is None or (full and not pages):
            chosen, number = tags, index
        pages += full
    if chosen is None:
        raise broken("a TIFF without a page")
    file.seek(0)
    page = Page(chosen, number, pages, file.read(2) != b"II")
    if min(page.width, page.height) < 1:
        raise broken("a TIFF with an image of no pixels")
    decoding.check_size(page.width, page.height)
    decoding.check_size(*page.segment)
    return page


def decode_page(data: bytes, page: Page) -> npt.NDArray[np.uint8]:
    """Gray or RGB of a page, not turned yet.

    Shapes: returns (H, W).
    """
    _refuse(page)
    own = page.compression == _NONE or page.compression in _PACKED
    values = _assemble(data, page) if own else _whole(data, page)
    colors = 3 if page.photometric == _RGB else 1
    alpha = values[..., colors] if values.shape[2] > colors and page.extra[:1] == (1,) else None
    values = values[..., :colors] if colors > 1 else values[..., 0]
    absent = _absent(values, page.nodata)
    if alpha is not None and page.kind == "u":  # colors were multiplied by alpha
        most = np.float64((1 << page.bits) - 1)
        share = np.maximum(alpha, 1).astype(np.float64)
        share = share[..., None] if colors > 1 else share
        values = np.minimum(np.rint(values * most / share), most).astype(values.dtype)
    if page.photometric == _PALETTE:
        table = page.colors.reshape(3, -1).T >> 8
        if len(table) != 1 << page.bits:
            raise broken(f"a TIFF with a palette of {len(table)} colors for samples of {page.bits} bits")
        return np.asarray(table[values].astype(np.uint8))
    inverted = page.photometric == _WHITE_IS_ZERO
    if page.deep:
        return scale_to_bytes(values, absent=absent, inverted=inverted)
    shades = widen_to_bytes(values, page.bits)
    shades = 255 - shades if inverted else shades
    if absent is not None:
        shades[absent] = 0
    return shades


def pillow_page(data: bytes, page: Page) -> Image.Image | None:
    """The page as Pillow has it, its pixels not loaded; None where Pillow has no mode for it."""
    try:
        image = open_image(io.BytesIO(data))
        if page.number:
            image.seek(page.number)
    except (ImageError, SyntaxError):
        return None
    return image if image.format == "TIFF" else None


def _refuse(page: Page) -> None:
    if page.kind == "?":
        raise unsupported("a TIFF with samples that are complex numbers, or differ in depth or format")
    if page.photometric not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE):
        space = f"in color space {page.photometric}" if page.photometric >= 0 else "does not say what 0 means: it"
        raise unsupported(f"a TIFF of {page.bits} bits per sample {space} is not decoded")
    colors = 3 if page.photometric == _RGB else 1
    if page.samples < colors or (colors == 1 and page.samples > 1 and page.extra[:1] not in ((1,), (2,))):
        raise unsupported(f"a TIFF of {page.samples} gray channels: it does not say which of them is the image")
    if page.photometric == _PALETTE and (page.kind != "u" or page.bits > 16):
        raise unsupported("a TIFF with a palette for samples that cannot index one")


def _absent(values: npt.NDArray[Any], nodata: float | None) -> npt.NDArray[np.bool_] | None:
    if nodata is None or math.isnan(nodata):
        return None
    kind = values.dtype
    if kind.kind != "f" and not (nodata.is_integer() and np.iinfo(kind).min <= nodata <= np.iinfo(kind).max):
        return None
    with np.errstate(over="ignore"):
        same = values == (kind.type(nodata) if kind.kind == "f" else kind.type(int(nodata)))
    return np.asarray(same if same.ndim == 2 else same.all(axis=2))


def _whole(data: bytes, page: Page) -> npt.NDArray[Any]:
    """Samples as Pillow's libtiff has them, where it unpacks what cannot be unpacked apart (12-bit JPEG)."""
    if page.samples == 1 and (page.bits, page.kind) in ((12, "u"), (16, "u")):
        image = pillow_page(data, page)
        if image is not None and image.mode.startswith("I;16"):
            image.load()
            return np.asarray(image)[..., None]
    name = _NAMES.get(page.compression, f"number {page.compression}")
    raise unsupported(f"a TIFF of {page.bits}-bit samples compressed as {name} is not decoded")


def _assemble(data: bytes, page: Page) -> npt.NDArray[Any]:
    """Samples (H, W, channels) from strips or tiles; no more channels than are needed."""
    if page.kind not in _PREDICTORS.get(page.predictor, "") or (page.predictor > 1 and page.bits % 8):
        raise unsupported(f"a TIFF with the predictor {page.predictor} for such samples is not decoded")
    wide, high = page.segment
    across, down = -(-page.width // wide), -(-page.height // high)
    planes = page.samples if page.planar else 1
    if min(len(page.offsets), len(page.counts)) < across * down * planes:
        raise broken("a TIFF that does not say where its strips or tiles are")
    wanted = min(page.samples, 4 if page.photometric == _RGB else 2)
    out = None
    for plane in range(min(planes, wanted)):
        for index in range(across * down):
            top, left = index // across * high, index % across * wide
            rows = high if page.tiled else min(high, page.height - top)
            at = plane * across * down + index
            start, count = int(page.offsets[at]), int(page.counts[at])
            if start < 0 or count < 1 or start + count > len(data):
                raise broken("a TIFF with strips or tiles that are missing, or beyond the end of the file")
            channels = 1 if page.planar else page.samples
            part = _samples(data[start : start + count], page, rows, wide, channels)
            if out is None:
                out = np.zeros((page.height, page.width, wanted), part.dtype.newbyteorder("="))
            part = part[: page.height - top, : page.width - left]
            if page.planar:
                out[top : top + rows, left : left + wide, plane] = part[..., 0]
            else:
                out[top : top + rows, left : left + wide] = part[..., :wanted]
    assert out is not None
    return out


def _samples(packed: bytes, page: Page, rows: int, columns: int, channels: int) -> npt.NDArray[Any]:
    per_row = -(-columns * channels * page.bits // 8)
    raw = _unpacked(packed, page, rows * per_row)
    if len(raw) < rows * per_row:
        raise broken("a TIFF with a strip or tile that is cut short")
    table = np.frombuffer(raw, np.uint8, rows * per_row).reshape(rows, per_row)
    shape, order = (rows, columns, channels), ">" if page.big_endian else "<"
    if page.predictor == 3:
        item = page.bits // 8
        steps = np.cumsum(table.reshape(rows, -1, channels), axis=1, dtype=np.uint8).reshape(rows, item, -1)
        return np.ascontiguousarray(steps.transpose(0, 2, 1)).view(f">f{item}").reshape(shape)
    if page.bits in (8, 16, 32, 64):
        values = table.view(f"{order}{page.kind}{page.bits // 8}").reshape(shape)
        same = values.dtype.newbyteorder("=")
        return np.cumsum(values, axis=1, dtype=same) if page.predictor == 2 else values
    if page.bits == 24 and not page.big_endian:
        table = table.reshape(rows, -1, 3)[..., ::-1].reshape(rows, -1)
    bits = np.unpackbits(table, axis=1)[:, : columns * channels * page.bits].reshape(rows, -1, page.bits)
    whole = np.zeros(bits.shape[:2], np.uint8 if page.bits < 8 else np.uint16 if page.bits < 16 else np.uint32)
    for place in range(page.bits):
        whole = whole << 1 | bits[..., place]
    values = whole.reshape(shape)
    if page.predictor == 2:  # of whole bytes: 24 bits
        values = np.cumsum(values, axis=1, dtype=np.uint32) & 0xFFFFFF
    half = 1 << (page.bits - 1)
    return (values.astype(np.int64) ^ half) - half if page.kind == "i" else values


def _unpacked(packed: bytes, page: Page, size: int) -> bytes:
    if page.compression == _NONE:
        return _REVERSED[np.frombuffer(packed, np.uint8)].tobytes() if page.reversed_bits else packed
    if page.compression in _DEFLATE and not page.reversed_bits:
        return zlib.decompressobj().decompress(packed, size)
    # libtiff unpacks bytes whatever they mean: one row of 8-bit gray in a file of its own.
    order = 2 if page.reversed_bits else 1
    tags = {256: size, 257: 1, 258: 8, 259: page.compression, 262: 1, 266: order, 278: 1}
    image = open_image(io.BytesIO(one_strip(packed, tags)))
    image.load()
    return bytes(image.tobytes())


def one_strip(packed: bytes, tags: dict[int, int]) -> bytes:
    """A TIFF of one gray strip, whose bytes and tags are given: libtiff then unpacks what no library unpacks alone."""
    entries = sorted({**tags, 273: 8, 277: 1, 279: len(packed)}.items())
    body = packed + b"\0" * (len(packed) % 2)
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, n) for tag, n in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory + bytes(4)


def _directories(file: IO[bytes]) -> Iterator[dict[int, npt.NDArray[Any]]]:
    """Known tags of each page, as arrays of values; what a count claims is never more than the file holds."""
    size = file.seek(0, os.SEEK_END)

    def read(at: int, count: int) -> bytes:
        file.seek(min(at, size))
        return file.read(count)

    head = read(0, 16)
    order, endian = ("<", "little") if head[:2] == b"II" else (">", "big")
    big = head[2:4] in (b"+\0", b"\0+")
    entry, field, width = (20, 8, 8) if big else (12, 2, 4)
    if len(head) < (16 if big else 8):
        raise broken("a TIFF cut short in its header")

    def number(raw: bytes) -> int:
        return int.from_bytes(raw, endian)  # type: ignore[arg-type]

    at, seen = number(head[8:16] if big else head[4:8]), set[int]()
    while at and at not in seen and len(seen) < _MOST_PAGES:
        seen.add(at)
        entries = number(read(at, field))
        if entries > 4096 or at + field > size:
            raise broken("a TIFF with a broken list of tags")
        table, tags = read(at + field, entries * entry + width), {}
        for k in range(min(entries, len(table) // entry)):
            tag, kind = struct.unpack_from(order + "HH", table, k * entry)
            if tag in _TAGS and kind in _TYPES:
                dtype, body = np.dtype(order + _TYPES[kind]), table[k * entry + 4 : (k + 1) * entry]
                count = min(number(body[:width]), _MOST_VALUES)
                inline, there = body[width:], count * dtype.itemsize
                raw = inline if there <= width else read(number(inline), there)
                tags[tag] = np.frombuffer(raw, dtype, min(count, len(raw) // dtype.itemsize))
        yield tags
        at = number(table[entries * entry :])


# Values of any depth to 8 bits, by rules that depend on the image alone

_BLOCK = 1 << 20  # values converted at a time: what is made of an image at the limit must not take gigabytes


def gray_as_rgb(gray: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Gray (H, W) seen three times, (H, W, 3): a view. By its last stride of 0 a transform resizes it once."""
    return np.broadcast_to(gray[..., None], (*gray.shape, 3))


def scale_to_bytes(
    values: npt.NDArray[Any], *, absent: npt.NDArray[np.bool_] | None = None, inverted: bool = False
) -> npt.NDArray[np.uint8]:
    """Scale an image by its own range: its smallest finite value becomes 0, its largest 255, a constant 0.

    Shapes: values (H, W); absent (H, W).
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    absent = np.zeros(1, bool) if absent is None else absent
    gone = np.broadcast_to(absent.reshape(-1, 1), (absent.size, flat.size // max(1, absent.size))).reshape(-1)
    parts = [slice(start, start + _BLOCK) for start in range(0, flat.size, _BLOCK)]
    low, high = np.inf, -np.inf
    for part in parts:
        finite = flat[part][np.isfinite(flat[part]) & ~gone[part]]
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
