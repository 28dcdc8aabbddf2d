"""JPEG pixels from simplejpeg, twice as fast as Pillow, wherever the two give the same bytes.

Both are libjpeg-turbo, each with a copy of its own. Whatever is not a plain, whole file in RGB or grey is Pillow's.
"""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

try:
    import simplejpeg
except ImportError:  # a platform without a wheel: Pillow decodes everything
    simplejpeg = None


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


@cache
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
