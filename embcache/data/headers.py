"""Whether a file's first bytes say that it is a square image of a given side: without a decoder, in microseconds.

For who knows the size of one image and asks whether a million others have it too. True is certain; False only means
that the decoder must be asked. Squares alone: no orientation in the file changes their size.
"""

from __future__ import annotations

import os
import struct

_HEAD = 1 << 10  # bytes read at first
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
_MOST = 1 << 18  # and at most: a JPEG may begin with profiles and previews
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}  # JPEG markers that give a size; F7: JPEG-LS
_BARE = frozenset(range(0xD0, 0xD8)) | {0x01}  # JPEG markers without a length
_SCAN = 0xDA


def is_square_of(path: str, side: int) -> bool:
    """Whether the header of the file says ``side`` × ``side`` pixels; False where that is not sure."""
    descriptor = os.open(path, _FLAGS)
    try:
        head = os.read(descriptor, _HEAD)
        if head.startswith(b"\x89PNG\r\n\x1a\n"):
            return head[8:24] == b"\0\0\0\rIHDR" + struct.pack(">II", side, side)
        if head.startswith(b"\xff\xd8\xff"):
            size = jpeg_size(head)
            if size is None and len(head) == _HEAD:
                size = jpeg_size(head + os.read(descriptor, _MOST - _HEAD))
            return size == (side, side)
        if head[:4] in (b"II*\0", b"MM\0*"):
            return _tiff_size(descriptor, head) == (side, side)
        return False
    finally:
        os.close(descriptor)


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of the only frame that a JPEG's markers announce before its pixels; None where not sure."""
    frame = jpeg_frame(data)
    return None if frame is None else frame[:2]


def jpeg_frame(data: bytes) -> tuple[int, int, int, int, int] | None:
    """As `jpeg_size`: (width, height, bits of a sample, components, marker)."""
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
        return jpeg_size(data)
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
