"""What is refused of an image file by its first look, before a decoder that it could keep busy sees it."""

from __future__ import annotations

import functools

from PIL import Image

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
def readable_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has, in the order in which Pillow tries them."""
    Image.init()
    return tuple(format for format in Image.ID if format in FORMATS)


def refuse_at_sight(data: bytes) -> None:
    """Raise `ImageError` for files that are no images but can look like some, and for those made to keep one busy."""
    for starts, reason in _REFUSED:
        if data.startswith(starts):
            raise ImageError(reason)
    # In what is compressed a byte FF is followed by 00 or D0 to D7, so that FF DA is a scan, or of a small preview.
    if data.startswith(b"\xff\xd8") and (scans := data.count(b"\xff\xda")) > MOST_SCANS:
        raise ImageError(f"a JPEG of {scans:,} scans: at most {MOST_SCANS} are decoded")
