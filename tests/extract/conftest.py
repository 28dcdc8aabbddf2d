"""A small folder of real PNG files, different from each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def draw(path: Path, seed: int, size: int = 40) -> None:
    """Write one noisy but smooth image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Folder with two classes of ten 40×40 images."""
    root = tmp_path / "images"
    for index in range(20):
        draw(root / ("benign" if index % 2 else "malignant") / f"{index:02}.png", index)
    return root
