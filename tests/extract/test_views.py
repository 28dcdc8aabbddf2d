"""Augmented views: the first is the plain image, the others do not depend on how or when they are computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import embcache.extract.extract as extracting
import embcache.extract.recipes as run
from embcache.backbones.catalog import find_backbone
from embcache.backbones.transforms import augmentation, choose_transform, normalize
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.extract.extract import extract_features
from embcache.store.feature_store import FeatureStore
from tests.extract.conftest import draw
from tests.extract.tiny import DIM, load_tiny, run_extraction
from tests.store.build import quick_disk

__all__ = ["quick_disk"]

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small shards, a small network."""
    monkeypatch.setattr(run, "load_backbone", load_tiny)
    monkeypatch.setitem(extracting.ROWS_PER_SHARD, "cpu", 8)


@pytest.fixture
def framed(images: Path) -> ImageDataset:
    """Images of two sizes, which are resized to a frame and cropped."""
    draw(images / "benign" / "large.png", 7, size=100)
    return load_dataset("folder", images)


def extract(dataset: ImageDataset, **keywords: object) -> FeatureStore:
    store = extract_features("random", dataset, **keywords)  # type: ignore[arg-type]
    assert isinstance(store, FeatureStore)
    return store


def test_the_first_view_is_the_plain_image_bit_for_bit(framed: ImageDataset, home: Path) -> None:
    plain, viewed = extract(framed), extract(framed, views=3)
    assert plain.path != viewed.path
    assert (plain.row_shape, viewed.row_shape, viewed.views) == ((DIM,), (3, DIM), 3)
    assert plain.ids.tolist() == viewed.ids.tolist()
    assert np.array_equal(viewed.features[:][:, 0], plain.features[:])
    rest = viewed.features[:][:, 1:]
    assert np.abs(rest - plain.features[:][:, None]).max(axis=2).min() > 0


def test_a_view_is_what_the_augmentation_makes_of_the_frame(framed: ImageDataset, home: Path) -> None:
    store = extract(framed, views=3)
    transform = choose_transform(find_backbone("random"), "paper", {(40, 40), (100, 100)})
    augment = augmentation(framed.augment, (256, 256), (224, 224))
    assert store.recipe.transform["augment"] == augment.describe()
    network = load_tiny("random").module
    rows = dict(zip(store.ids.tolist(), store.features[:], strict=True))
    for id_, path in zip(framed.table["id"][:3], framed.table["path"][:3], strict=True):
        image = Image.open(framed.root / path).convert("RGB")  # type: ignore[operator]
        frame = np.asarray(image.resize((256, 256), Image.Resampling.BILINEAR))
        for view in (1, 2):
            pixels = torch.from_numpy(augment(frame, f"view {view} of {id_}"))[None]
            with torch.inference_mode():
                expected = network(normalize(pixels, transform, "cpu"))[0].numpy()
            assert np.abs(rows[id_][view] - expected).max() <= 1e-5 * np.abs(expected).max()


def test_views_are_the_same_however_they_are_computed(images: Path, home: Path, tmp_path: Path) -> None:
    dataset = load_dataset("folder", images)
    first = extract(dataset, views=3, home=tmp_path / "a", workers=1)
    again = extract(dataset, views=3, home=tmp_path / "b", workers=5, format="hdf5")
    assert first.recipe == again.recipe
    assert np.array_equal(first.features[:], again.features[:])
    # Another order and other batches, and more views: the same rows but for the last bits.
    table = dataset.table.iloc[::-1]
    turned = ImageDataset(dataset.name, dataset.root, dataset.class_names, dataset.metric, dataset.augment, table)
    other = extract(turned, views=4, home=tmp_path / "c", batch_size=3)
    assert other.ids.tolist() == first.ids.tolist()[::-1]
    difference = np.abs(other.features[:][::-1, :3] - first.features[:]).max()
    assert difference <= 1e-5 * np.abs(first.features[:]).max()


def test_one_view_is_the_recipe_that_there_always_was(images: Path, home: Path) -> None:
    dataset = load_dataset("folder", images)
    plain, one = run_extraction(["random"], dataset)[0], run_extraction(["random"], dataset, views=1)[0]
    assert plain.store.path == one.store.path
    assert (one.computed, one.cached) == (0, 20)
    assert set(plain.store.recipe.transform) == {"kind", "resize", "crop", "size", "interpolation", "mean", "std"}
    said: list[str] = []
    two = run_extraction(["random"], dataset, views=2, say=said.append)[0].store.recipe
    assert not any("another recipe" in line for line in said)
    assert set(two.differences(plain.store.recipe)) == {"transform.views", "transform.augment"}
