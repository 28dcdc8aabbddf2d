"""Sprite sheets: within their budget, each image in its place, nothing of a file but its pixels."""

from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from embcache.data.dataset import ImageDataset
from embcache.report.embedding import ACROSS, make_sheets


@pytest.fixture(scope="module")
def ds(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    """300 images of noise under a level of their own, the fourth of them no image."""
    rng, tmp_path = np.random.default_rng(0), tmp_path_factory.mktemp("noise")
    for k in range(300):
        pixels = (rng.integers(0, 40, (80, 80)) + (k % 200)).astype(np.uint8)
        exif = Image.Exif()
        exif[0x010E] = "Mrs Jones"
        Image.fromarray(pixels).save(tmp_path / f"{k}.jpg", exif=exif)
    (tmp_path / "3.jpg").write_bytes(b"no image")
    names = [f"i{k}" for k in range(300)]
    table = pd.DataFrame(
        {"id": names, "path": [f"{k}.jpg" for k in range(300)], "place": "", "label": 0, "group": names,
         "split": "test"}
    )  # fmt: skip
    return ImageDataset("noise", tmp_path, ("a", "b"), "auc", "generic", table)


def _open(sheet: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(sheet)))


def test_every_image_is_at_its_place(ds: ImageDataset) -> None:
    order = [f"i{k}" for k in reversed(range(300))]
    found = make_sheets(ds, order)
    assert found is not None
    assert len(found["sheets"]) == 2
    assert found["place"][-4] == -1  # what cannot be read has no thumbnail, and no place is lost to it
    assert sorted(p for p in found["place"] if p >= 0) == list(range(299))
    for k in (0, 2, 4, 150, 299):
        number = found["place"][299 - k]
        sheet = np.asarray(_open(found["sheets"][number // ACROSS**2]).convert("L"), dtype=float)
        row, column = divmod(number % ACROSS**2, ACROSS)
        side = found["side"]
        own = sheet[row * side : (row + 1) * side, column * side : (column + 1) * side]
        assert own.mean() == pytest.approx(k % 200 + 19.5, abs=4)


@pytest.mark.parametrize("budget", [40_000, 1_000_000])
def test_the_budget_is_kept_by_smaller_thumbnails(ds: ImageDataset, budget: int) -> None:
    found = make_sheets(ds, ds.table["id"].tolist(), budget)
    assert found is not None
    assert sum(map(len, found["sheets"])) <= budget
    assert len(found["place"]) == 300


def test_no_metadata_is_taken_along(ds: ImageDataset) -> None:
    found = make_sheets(ds, ["i0", "i1"])
    assert found is not None
    assert b"Jones" not in base64.b64decode(found["sheets"][0])
    assert not _open(found["sheets"][0]).getexif()
