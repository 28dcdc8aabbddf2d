"""Small image files for tests."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (12, 8)) -> np.ndarray:
    """Write a random RGB image of (width, height) and return its pixels; two seeds never give the same file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    """The bytes of an image file."""
    sink = io.BytesIO()
    image.save(sink, format, **options)
    return sink.getvalue()
