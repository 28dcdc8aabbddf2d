"""PNG files: without the chunks that are no part of the picture, and with all 16 bits of each channel."""

from __future__ import annotations

import io
import re
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import PngImagePlugin

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
    return _chunk(b"tEXt", keyword + b"\0" + found[0]) if found else b""


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


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
