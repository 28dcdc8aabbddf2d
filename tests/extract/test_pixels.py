"""Cached pixels are the decoded ones, follow the files, and save an extraction the decoding."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import embcache.extract.extract as extracting
import embcache.extract.pixels as pixels
import embcache.extract.recipes as run
import embcache.extract.worker as batching
from embcache.backbones.catalog import find_backbone
from embcache.backbones.transforms import Transform, center, choose_transform, frame
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.errors import DatasetNotFoundError, UsageError
from embcache.extract.extract import extract_features
from embcache.extract.pixels import cache_pixels
from embcache.log import shown
from embcache.store.feature_store import FeatureStore
from tests.extract.conftest import draw
from tests.extract.tiny import load_tiny, run_extraction
from tests.refusal import refused
from tests.store.build import quick_disk

__all__ = ["quick_disk"]

pytestmark = pytest.mark.usefixtures("quick_disk")

AS_IS = choose_transform(find_backbone("random"), "paper", {(40, 40)})
PAPER = choose_transform(find_backbone("random"), "paper", {(300, 200)})


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shards, a small network."""
    monkeypatch.setattr(run, "load_backbone", load_tiny)
    monkeypatch.setitem(extracting.ROWS_PER_SHARD, "cpu", 8)
    monkeypatch.setattr(pixels, "MAX_ROWS", 6)


@pytest.fixture
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the images that are decoded, as it happens."""
    paths: list[str] = []
    original = batching.read_image

    def count(root: Path, path: str, place: str, *more: object) -> object:
        paths.append(path)
        return original(root, path, place, *more)

    monkeypatch.setattr(batching, "read_image", count)
    return paths


def load(root: Path) -> ImageDataset:
    return load_dataset("folder", root)


def spoil(root: Path) -> None:
    """One image cut short, one empty."""
    path = root / "benign" / "01.png"
    path.write_bytes(path.read_bytes()[:100])
    (root / "benign" / "03.png").write_bytes(b"")


def contents(store: FeatureStore) -> tuple[object, ...]:
    return store.ids.tolist(), store.features[:].tobytes(), store.digests, store.quarantined


def shard_files(store: FeatureStore) -> dict[str, bytes]:
    files = (path for path in (store.path / "shards").rglob("*") if path.is_file())
    return {path.relative_to(store.path).as_posix(): path.read_bytes() for path in files}


@settings(max_examples=20)
@given(height=st.integers(60, 400), width=st.integers(60, 400), crop=st.integers(20, 60), seed=st.integers(0, 99))
def test_the_centre_of_a_frame_is_the_transform(height: int, width: int, crop: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    normal = ((0.0,) * 3, (1.0,) * 3)
    for resize in ((64, 71), 64):
        transform = Transform("paper", resize, (crop, crop), (crop, crop), "bilinear", *normal)
        framed = frame(transform)
        assert frame(framed) == framed
        assert np.array_equal(center(framed.geometry(image), transform.size), transform.geometry(image))
    assert frame(Transform("paper", (64, 71), (crop, crop), (crop, crop), "bilinear", *normal)).size == (64, 71)


@pytest.mark.parametrize("format", ["zarr"])
def test_pixels_are_those_of_the_decoded_and_resized_images(images: Path, home: Path, format: str) -> None:
    draw(images / "benign" / "wide.png", 5, size=90)
    spoil(images)
    ds = load(images)
    said: list[str] = []
    with shown(said.append):
        store = cache_pixels(ds, PAPER, format=format)
    assert (store.row_shape, store.dtype, store.format, store.holds_pixels) == ((256, 256, 3), np.uint8, format, True)
    assert store.path == home / ds.name / f"pixels-{store.recipe.fingerprint[:12]}"
    good = ds.table[ds.table["id"].isin(store.ids)]
    assert store.ids.tolist() == good["id"].tolist()
    assert len(store.quarantined) == 2
    assert len(store) == 19
    assert len(said) == 1
    assert "21 images" in said[0]
    assert "256×256" in said[0]
    for path, row in zip(good["path"], store.features[:], strict=True):
        image = Image.open(images / path).convert("RGB").resize((256, 256), Image.Resampling.BILINEAR)
        assert np.array_equal(row, np.asarray(image))


def test_what_is_cached_is_not_decoded_again(images: Path, home: Path, decoded: list[str]) -> None:
    ds = load(images)
    some = ds.table["id"].tolist()[3:10]
    assert cache_pixels(ds, AS_IS, ids=some).ids.tolist() == some
    assert len(decoded) == 7
    whole = cache_pixels(ds, AS_IS)
    assert len(decoded) == 20
    assert whole.ids.tolist() == ds.table["id"].tolist()
    draw(images / "benign" / "new.png", 99)
    assert len(cache_pixels(load(images), AS_IS)) == 21
    assert len(decoded) == 21
    assert decoded[-1] == "benign/new.png"


@pytest.mark.parametrize(("format", "views"), [("zarr", 1), ("hdf5", 3)])
def test_an_extraction_from_pixels_equals_one_that_decodes(
    images: Path, home: Path, tmp_path: Path, decoded: list[str], format: str, views: int
) -> None:
    spoil(images)
    draw(images / "benign" / "large.png", 7, size=100)  # so that all are resized, and cropped from a frame
    ds = load(images)
    direct = extract_features("random", ds, home=tmp_path / "direct", views=views, max_bad=2)
    assert isinstance(direct, FeatureStore)
    cache_pixels(ds, PAPER, format=format)
    decoded.clear()
    said: list[str] = []
    (done,) = run_extraction(["random"], ds, views=views, say=said.append, workers=1, max_bad=2)
    assert contents(done.store) == contents(direct)
    assert shard_files(done.store) == shard_files(direct)
    assert done.store.recipe == direct.recipe
    assert sorted(decoded) == ["benign/01.png", "benign/03.png"]  # unreadable ones are looked at again
    assert any("pixels of 19 images are cached" in line for line in said)


def test_pixels_that_are_staged_first_give_the_same_features(
    images: Path, home: Path, tmp_path: Path, decoded: list[str]
) -> None:
    spoil(images)
    ds = load(images)
    direct = extract_features("random", ds, home=tmp_path / "direct", max_bad=2)
    assert isinstance(direct, FeatureStore)
    decoded.clear()
    (done,) = run_extraction(["random"], ds, stage="pixels", max_bad=2)
    assert shard_files(done.store) == shard_files(direct)
    assert sorted(decoded) == sorted(
        [*ds.table["path"], "benign/01.png", "benign/03.png"]
    )  # once, unreadable ones again
    assert done.quarantined == dict(direct.quarantined)
    decoded.clear()
    (again,) = run_extraction(["random"], ds, stage="pixels", max_bad=2)
    assert (again.computed, decoded) == (0, [])


def test_a_changed_image_is_not_served_from_its_old_pixels(
    images: Path, home: Path, tmp_path: Path, decoded: list[str]
) -> None:
    cache_pixels(load(images), AS_IS)
    draw(images / "benign" / "05.png", 77)
    os.utime(images / "benign" / "07.png", (1, 1))  # touched: the same bytes
    (images / "benign" / "09.png").unlink()
    ds = load(images)
    decoded.clear()
    store = extract_features("random", ds)
    assert isinstance(store, FeatureStore)
    assert decoded == ["benign/05.png"]
    direct = extract_features("random", ds, home=tmp_path / "direct")
    assert contents(store) == contents(direct)  # type: ignore[arg-type]
    decoded.clear()
    again = cache_pixels(ds, AS_IS)
    assert decoded == ["benign/05.png"]
    row = again.ids.tolist().index(next(id_ for id_ in ds.table["id"] if "05" in id_))
    assert np.array_equal(again.features[row], np.asarray(Image.open(images / "benign" / "05.png")))


def test_bad_requests_get_one_clear_message(images: Path, home: Path) -> None:
    with pytest.raises(UsageError, match="npz"):
        cache_pixels(load(images), AS_IS, format="npz")
    with refused(UsageError, "option-bounds"):
        cache_pixels(load(images), AS_IS, workers=0)
    ds = load(images)
    for path in images.rglob("*.png"):
        path.write_bytes(b"no image")
    with refused(DatasetNotFoundError, "no-readable-image"):
        cache_pixels(ds, AS_IS)
    assert not home.exists()
