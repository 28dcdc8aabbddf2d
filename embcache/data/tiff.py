"""TIFF files by their own tags: depth, sign, photometric interpretation, byte order, planes, pages, NODATA.

Pillow decodes what has a mode in Pillow: up to 8 bits, unsigned. All else is put together here, from segments that
Pillow's libtiff or zlib unpack: deeper, signed and floating-point samples, for which Pillow has no mode, or one that
forgets the interpretation or cuts 16 bits to 8.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from PIL import UnidentifiedImageError

from embcache.data.budget import Decoding, broken, unsupported
from embcache.data.formats import scale_to_bytes, widen_to_bytes

_TYPES = {1: "u1", 2: "u1", 3: "u2", 4: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 13: "u4", 16: "u8", 17: "i8"}
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


@dataclass(frozen=True)
class Page:
    """What the tags say of the page that is decoded."""

    number: int
    pages: int  # there are so many that are as much an image as it is; counted to a limit
    big_endian: bool
    width: int
    height: int
    bits: int
    kind: str  # "u", "i", "f" of the samples, "?" of none that is decoded
    photometric: int
    samples: int
    extra: tuple[int, ...]
    planar: bool
    compression: int
    predictor: int
    reversed_bits: bool
    orientation: int
    segment: tuple[int, int]  # width and height of a tile or strip
    tiled: bool
    offsets: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    colors: npt.NDArray[np.int64]
    nodata: float | None

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
        segment = self.segment[0] * self.segment[1] * self.samples * (2 * item + (8 * item if self.bits % 8 else 0))
        return self.width * self.height * (min(4, self.samples) * (item + 1) + 8) + segment


def is_tiff(data: bytes) -> bool:
    """Whether a file's first bytes are a TIFF's, classic or big."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_page(file: IO[bytes], decoding: Decoding) -> Page:
    """Tags of the first page that is neither a reduced image nor a mask, else of the first."""
    reader = _Reader(file)
    chosen, number, pages = None, 0, 0
    for index, tags in enumerate(reader.directories()):
        full = not int(tags.get(254, [0])[0]) & _REDUCED_OR_MASK
        if chosen is None or (full and not pages):
            chosen, number = tags, index
        pages += full
    if chosen is None:
        raise broken("a TIFF without a page")
    page = _page(chosen, number, pages, reader.order == ">")
    if min(page.width, page.height) < 1:
        raise broken("a TIFF whose image has no pixels")
    decoding.check_size(page.width, page.height)
    decoding.check_size(*page.segment)
    return page


def decode_page(data: bytes, page: Page, open_page: Callable[[bytes], Any]) -> npt.NDArray[np.uint8]:
    """Gray or RGB of a page, not turned yet.

    Shapes: returns (H, W).
    """
    _refuse(page)
    if page.compression == _NONE or page.compression in _PACKED:
        values = _assemble(data, page, open_page)
    else:
        values = _whole(data, page, open_page)
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
            raise broken(f"a TIFF whose palette has {len(table)} colors for samples of {page.bits} bits")
        return np.asarray(table[values].astype(np.uint8))
    inverted = page.photometric == _WHITE_IS_ZERO
    if page.deep:
        return scale_to_bytes(values, absent=absent, inverted=inverted)
    shades = widen_to_bytes(values, page.bits)
    shades = 255 - shades if inverted else shades
    if absent is not None:
        shades[absent] = 0
    return shades


def _refuse(page: Page) -> None:
    """Raise `ImageError` for samples whose picture cannot be known."""
    if page.kind == "?":
        raise unsupported("a TIFF whose samples are complex numbers, or differ in depth or format")
    if page.photometric not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE):
        raise unsupported(
            "a TIFF that does not say whether 0 is black or white"
            if page.photometric < 0
            else f"a TIFF of {page.bits} bits per sample in color space {page.photometric} is not decoded"
        )
    colors = 3 if page.photometric == _RGB else 1
    if page.samples < colors or (colors == 1 and page.samples > 1 and page.extra[:1] not in ((1,), (2,))):
        raise unsupported(f"a TIFF of {page.samples} gray channels: it does not say which of them is the image")
    if page.photometric == _PALETTE and (page.kind != "u" or page.bits > 16):
        raise unsupported("a TIFF with a palette for samples that cannot index one")


def _absent(values: npt.NDArray[Any], nodata: float | None) -> npt.NDArray[np.bool_] | None:
    """Pixels of which every color is the file's NODATA value."""
    if nodata is None or math.isnan(nodata):
        return None
    kind = values.dtype
    if kind.kind != "f" and not (nodata.is_integer() and np.iinfo(kind).min <= nodata <= np.iinfo(kind).max):
        return None
    with np.errstate(over="ignore"):
        same = values == (kind.type(nodata) if kind.kind == "f" else kind.type(int(nodata)))
    return np.asarray(same if same.ndim == 2 else same.all(axis=2))


def _whole(data: bytes, page: Page, open_page: Callable[[bytes], Any]) -> npt.NDArray[Any]:
    """Samples as Pillow's libtiff has them, where it unpacks what cannot be unpacked apart (12-bit JPEG)."""
    if page.samples == 1 and (page.bits, page.kind) in ((12, "u"), (16, "u")):
        with suppress(UnidentifiedImageError):
            image = open_page(data)
            if image.mode.startswith("I;16"):
                image.load()
                return np.asarray(image)[..., None]
    name = _NAMES.get(page.compression, f"number {page.compression}")
    raise unsupported(f"a TIFF of {page.bits}-bit samples compressed as {name} is not decoded")


def _assemble(data: bytes, page: Page, open_page: Callable[[bytes], Any]) -> npt.NDArray[Any]:
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
                raise broken("a TIFF whose strips or tiles are missing, or beyond the end of the file")
            channels = 1 if page.planar else page.samples
            part = _samples(data[start : start + count], page, rows, wide, channels, open_page)
            if out is None:
                out = np.zeros((page.height, page.width, wanted), part.dtype.newbyteorder("="))
            part = part[: page.height - top, : page.width - left]
            if page.planar:
                out[top : top + rows, left : left + wide, plane] = part[..., 0]
            else:
                out[top : top + rows, left : left + wide] = part[..., :wanted]
    assert out is not None
    return out


def _samples(
    packed: bytes, page: Page, rows: int, columns: int, channels: int, open_page: Callable[[bytes], Any]
) -> npt.NDArray[Any]:
    """Samples (rows, columns, channels) of one segment."""
    per_row = -(-columns * channels * page.bits // 8)
    raw = _unpacked(packed, page, rows * per_row, open_page)
    if len(raw) < rows * per_row:
        raise broken("a TIFF whose strip or tile is cut short")
    table = np.frombuffer(raw, np.uint8, rows * per_row).reshape(rows, per_row)
    shape, order = (rows, columns, channels), ">" if page.big_endian else "<"
    if page.predictor == 3:
        item = page.bits // 8
        steps = np.cumsum(table.reshape(rows, -1, channels), axis=1, dtype=np.uint8).reshape(rows, item, -1)
        return np.ascontiguousarray(steps.transpose(0, 2, 1)).view(f">f{item}").reshape(shape)
    if page.bits in (8, 16, 32, 64):
        values = table.view(f"{order}{page.kind}{page.bits // 8}").reshape(shape)
    elif page.bits == 24:
        parts = table.reshape(*shape, 3).astype(np.uint32)
        parts = parts if page.big_endian else parts[..., ::-1]
        values = parts[..., 0] << 16 | parts[..., 1] << 8 | parts[..., 2]
        if page.predictor == 2:
            values = np.cumsum(values, axis=1, dtype=np.uint32) & 0xFFFFFF
        values = _signed(values, page)
    else:
        bits = np.unpackbits(table, axis=1)[:, : columns * channels * page.bits].reshape(rows, -1, page.bits)
        whole = np.zeros(bits.shape[:2], np.uint8 if page.bits < 8 else np.uint16 if page.bits < 16 else np.uint32)
        for place in range(page.bits):
            whole = whole << 1 | bits[..., place]
        values = _signed(whole.reshape(shape), page)
    if page.predictor == 2 and page.bits != 24:
        values = np.cumsum(values, axis=1, dtype=values.dtype.newbyteorder("="))
    return values


def _signed(values: npt.NDArray[Any], page: Page) -> npt.NDArray[Any]:
    if page.kind != "i":
        return values
    half = 1 << (page.bits - 1)
    return (values.astype(np.int64) ^ half) - half


def _unpacked(packed: bytes, page: Page, size: int, open_page: Callable[[bytes], Any]) -> bytes:
    """Bytes of a segment, no more than ``size``."""
    if page.compression == _NONE:
        return _REVERSED[np.frombuffer(packed, np.uint8)].tobytes() if page.reversed_bits else packed
    if page.compression in _DEFLATE and not page.reversed_bits:
        return zlib.decompressobj().decompress(packed, size)
    # libtiff unpacks bytes whatever they mean: one row of 8-bit gray in a file of its own.
    order = 2 if page.reversed_bits else 1
    image = open_page(one_strip(packed, {256: size, 257: 1, 258: 8, 259: page.compression, 262: 1, 266: order, 278: 1}))
    image.load()
    return bytes(image.tobytes())


def one_strip(packed: bytes, tags: dict[int, int]) -> bytes:
    """A TIFF of one gray strip, whose bytes and tags are given: libtiff then unpacks what no library unpacks alone."""
    entries = sorted({**tags, 273: 8, 277: 1, 279: len(packed)}.items())
    body = packed + b"\0" * (len(packed) % 2)
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, 4, 1, n) for tag, n in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory + bytes(4)


class _Reader:
    """Directories of tags, as far as they are asked for; what a count claims is never more than the file holds."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._size = file.seek(0, os.SEEK_END)
        head = self._read(0, 16)
        self.order = "<" if head[:2] == b"II" else ">"
        self._big = head[2:4] in (b"+\0", b"\0+")
        if len(head) < 8 or (self._big and len(head) < 16):
            raise broken("a TIFF cut short in its header")
        self._first = self._int(head[8:16] if self._big else head[4:8])

    def directories(self) -> Iterator[dict[int, npt.NDArray[Any]]]:
        """Tags of each page, as arrays of values."""
        at, seen = self._first, set[int]()
        entry, count = (20, 8) if self._big else (12, 2)
        width = 8 if self._big else 4
        while at and at not in seen and len(seen) < _MOST_PAGES:
            seen.add(at)
            number = self._int(self._read(at, count))
            if number > 4096 or at + count > self._size:
                raise broken("a TIFF whose list of tags is broken")
            table = self._read(at + count, number * entry + width)
            tags = {}
            for k in range(len(table) // entry if len(table) < number * entry else number):
                tag, kind = struct.unpack_from(self.order + "HH", table, k * entry)
                body = table[k * entry + 4 : (k + 1) * entry]
                if kind in _TYPES:
                    tags[tag] = self._values(np.dtype(self.order + _TYPES[kind]), body, width)
            yield tags
            at = self._int(table[number * entry :])

    def _values(self, dtype: np.dtype[Any], body: bytes, width: int) -> npt.NDArray[Any]:
        number, inline = self._int(body[:width]), body[width:]
        size = min(number, _MOST_VALUES) * dtype.itemsize
        raw = inline if size <= width else self._read(self._int(inline), size)
        return np.frombuffer(raw, dtype, min(number, len(raw) // dtype.itemsize))

    def _read(self, at: int, size: int) -> bytes:
        self._file.seek(min(at, self._size))
        return self._file.read(size)

    def _int(self, raw: bytes) -> int:
        return int.from_bytes(raw, "little" if self.order == "<" else "big")


def _page(tags: dict[int, npt.NDArray[Any]], number: int, pages: int, big_endian: bool) -> Page:
    def many(tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        found = tags.get(tag)
        return default if found is None or not len(found) else tuple(found[:_MOST_SAMPLES].tolist())

    def one(tag: int, default: int) -> int:
        return many(tag, (default,))[0]

    width, height, samples = one(256, 0), one(257, 0), one(277, 1)
    bits, formats = set(many(258, (1,))), set(many(339, (1,)))
    if not 1 <= samples <= _MOST_SAMPLES:
        raise unsupported(f"a TIFF of {samples} samples per pixel: 1 to {_MOST_SAMPLES} are decoded")
    depth = max(bits)
    kind = {1: "u", 2: "i", 3: "f", 4: "u"}.get(next(iter(formats)), "?") if len(formats) == len(bits) == 1 else "?"
    if not 1 <= depth <= 64 or (kind == "f" and depth not in (16, 32, 64)) or (kind != "?" and 32 < depth < 64):
        kind = "?"
    tiled = 322 in tags
    rows = min(one(278, height) or height, height)
    segment = (one(322, 0), one(323, 0)) if tiled else (width, rows)
    if width and height and min(segment) < 1:
        raise broken("a TIFF whose strips or tiles have no size")
    places, sizes = (324, 325) if tiled else (273, 279)
    places, sizes = (places if places in tags else 273), (sizes if sizes in tags else 279)
    empty = np.zeros(0, np.int64)
    text = tags.get(42113, empty).astype(np.uint8).tobytes()[:64].split(b"\0")[0].decode("ascii", "replace").strip()
    try:
        nodata = float(text) if text else None
    except ValueError:
        raise broken(f"a TIFF whose NODATA value is no number: {text[:20]!r}") from None
    return Page(
        number, pages, big_endian, width, height, depth, kind, one(262, -1), samples, many(338),
        one(284, 1) == 2 and samples > 1, one(259, 1), one(317, 1), one(266, 1) == 2, one(274, 1), segment, tiled,
        tags.get(places, empty).astype(np.int64), tags.get(sizes, empty).astype(np.int64),
        tags.get(320, empty).astype(np.int64), nodata,
    )  # fmt: skip
