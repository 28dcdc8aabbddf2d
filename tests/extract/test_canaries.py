"""A network that departs from what its store was begun with is refused; one that has not changed never is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import embcache.extract.extract as extracting
import embcache.extract.recipes as run
from embcache.backbones.catalog import Backbone, LoadedBackbone, find_backbone
from embcache.backbones.transforms import choose_transform
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.errors import CorruptStoreError, RecipeError, UsageError
from embcache.extract.canaries import draw_canaries
from embcache.extract.extract import extract_features
from embcache.extract.pixels import cache_pixels
from embcache.maintain.gc import collect
from embcache.maintain.repair import Rebuild, check_sample, repair_store
from embcache.maintain.verify import verify_store
from embcache.probe.probe import probe_features
from embcache.results.predict import predict
from embcache.sealed import seal, unseal
from embcache.store.feature_store import FeatureStore
from embcache.store.reading import read_canaries
from tests.extract.conftest import draw
from tests.extract.tiny import DIM, load_tiny, run_extraction
from tests.maintain.conftest import damage
from tests.refusal import refused

FILE = "canaries.json"


def drift(by: float) -> Callable[..., LoadedBackbone]:
    """A loader of the tiny network, the code of which has changed: its features are larger by a factor."""

    def load(name: str, **_: object) -> LoadedBackbone:
        loaded = load_tiny(name)
        return replace(loaded, module=nn.Sequential(loaded.module, Scaled(1 + by)))

    return load


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features * self.factor


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "load_backbone", load_tiny)
    monkeypatch.setitem(extracting.ROWS_PER_SHARD, "cpu", 8)


@pytest.fixture
def ds(images: Path, home: Path) -> ImageDataset:
    return load_dataset("folder", images)


def stored(ds: ImageDataset, **options: Any) -> FeatureStore:
    return run_extraction(["random"], ds, **options)[0].store


def grow(images: Path) -> ImageDataset:
    draw(images / "benign" / "99.png", 99)
    return load_dataset("folder", images)


def test_the_drawn_images_are_the_same_everywhere() -> None:
    pixels = draw_canaries((6, 8))
    assert (pixels.shape, str(pixels.dtype)) == ((2, 6, 8, 3), "uint8")
    assert pixels[0, :, :, 0].tolist() == [[0, 36, 72, 109, 145, 182, 218, 255]] * 6
    assert pixels[1, 5, 7].tolist() == [(49 + 25 + 70) // 32, (49 + 50 + 35) // 32, (49 + 75) // 32]
    assert len({image.tobytes() for image in draw_canaries((224, 224))}) == 2
    assert draw_canaries((1, 1)).shape == (2, 1, 1, 3)


@pytest.mark.parametrize("options", [{}, {"views": 3}, {"format": "hdf5"}, {"feature_dtype": "float16"}])
def test_a_store_keeps_what_its_network_makes_of_two_images(ds: ImageDataset, options: dict[str, Any]) -> None:
    store = stored(ds, **options)
    kept = read_canaries(store.path)
    spec = load_tiny("random")
    size = tuple(store.recipe.transform["size"])
    pixels = torch.from_numpy(draw_canaries(size)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(store.recipe.transform[name]).view(3, 1, 1) for name in ("mean", "std"))
    expected = spec.module((pixels - mean) / std).numpy()
    assert kept is not None
    assert kept.shape == (2, DIM)
    assert np.allclose(kept, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert store.provenance["device"] == "cpu"
    assert {"torch", "timm", "embcache"} <= set(store.provenance)
    assert not verify_store(store.path).damage
    assert collect(store.path).freed == 0
    assert (store.path / FILE).is_file()


def test_going_on_with_a_network_that_has_changed_is_refused(
    ds: ImageDataset, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stored(ds)
    monkeypatch.setattr(run, "load_backbone", drift(1e-6))
    assert len(stored(grow(images))) == 21  # within the tolerance
    monkeypatch.setattr(run, "load_backbone", drift(1e-2))
    assert len(stored(load_dataset("folder", images))) == 21  # complete: the network is not used
    draw(images / "benign" / "98.png", 98)
    with refused(RecipeError, "canaries-depart") as caught:
        stored(load_dataset("folder", images))
    assert caught.value.where == store.path
    assert f"torch {torch.__version__}" in str(caught.value.found)
    (store.path / FILE).unlink()  # as in stores of earlier versions
    assert len(stored(load_dataset("folder", images))) == 22


def test_the_message_names_versions_and_devices_that_differ(
    ds: ImageDataset, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stored(ds).path
    header = unseal((path / "recipe.json").read_bytes(), path, "")
    header["provenance"] |= {"timm": "0.9.1", "device": "cuda:0"}
    (path / "recipe.json").write_bytes(seal(header))
    monkeypatch.setattr(run, "load_backbone", drift(1e-2))
    with refused(RecipeError, "canaries-depart") as caught:
        stored(grow(images))
    told = str(caught.value)
    assert "pip install timm==0.9.1" in told
    assert "--device cuda:0" in told
    assert "mv " in told


def test_repair_and_sample_need_the_same_network(ds: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stored(ds).path
    file = path / "shards" / "000001" / "commit.json"
    monkeypatch.setattr(run, "load_backbone", drift(1e-2))
    with refused(RecipeError, "canaries-depart"):
        check_sample(path, ds, 4)
    damage(file, "flip")
    with refused(RecipeError, "canaries-depart"):
        repair_store(verify_store(path), lambda: ds)
    monkeypatch.setattr(run, "load_backbone", load_tiny)
    assert not repair_store(verify_store(path), lambda: ds, Rebuild()).damage
    assert check_sample(path, ds, 4).ok


@pytest.mark.parametrize("how", ["flip", "cut", "empty"])
def test_damaged_canaries_are_found_and_repaired_by_leaving_them_out(ds: ImageDataset, images: Path, how: str) -> None:
    path = stored(ds).path
    damage(path / FILE, how)
    (found,) = verify_store(path).damage
    assert (found.kind, found.path.name) == ("canaries", FILE)
    with refused(CorruptStoreError, "file-damaged"):
        stored(grow(images))
    done = list[str]()
    assert not repair_store(verify_store(path), lambda: ds, done=done).damage
    assert FILE in done[0]
    assert len(stored(load_dataset("folder", images))) == 21


def test_canaries_that_mean_something_else_are_damage(ds: ImageDataset) -> None:
    path = stored(ds).path
    for content in ({"shape": [2, 6]}, {"shape": [3, 6], "features": "00" * 48}, {"shape": "x", "features": "zz"}):
        (path / FILE).write_bytes(seal(content, indent=None))
        with refused(CorruptStoreError, "file-foreign"):
            read_canaries(path)


def test_predicting_with_a_network_that_has_changed_is_refused(
    ds: ImageDataset, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stored(ds)
    result = probe_features(ds, ["random"], head="logreg", subset="F", folds=2)
    assert len(predict(result.id, [images]).images) == 20
    monkeypatch.setattr(run, "load_backbone", drift(1e-2))
    with refused(RecipeError, "canaries-depart"):
        predict(result.id, [images])
    (store.path / FILE).unlink()
    assert len(predict(result.id, [images]).images) == 20


def test_pixels_have_no_canaries(ds: ImageDataset) -> None:
    store = cache_pixels(ds, choose_transform(find_backbone("random"), "paper", {(40, 40)}))
    assert not (store.path / FILE).exists()


class Odd(nn.Module):
    """A network of a user's own with a fault."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = images.mean((2, 3))
        if self.fault == "raises":
            raise KeyError("no such thing")
        if self.fault == "one for all":
            return features.mean(0, keepdim=True)
        return features * (torch.nan if self.fault == "not finite" else 1)


@pytest.mark.parametrize(
    ("fault", "dim", "code"),
    [("raises", 3, "backbone-output"), ("one for all", 3, "backbone-output"), ("", 4, "backbone-output"),
     ("not finite", 3, "backbone-not-finite")],
)  # fmt: skip
def test_a_network_with_a_fault_is_refused_before_an_image_is_read(
    ds: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch, fault: str, dim: int, code: str
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("EMBCACHE_HOME", str(home))
    monkeypatch.setattr("embcache.extract.worker.compute_shard", None)
    with refused(UsageError, code):
        extract_features(Backbone.from_module(Odd(fault), name="odd", dim=dim), ds, home=home)
    assert not list(home.rglob("recipe.json"))


def test_the_file_is_sealed_json(ds: ImageDataset) -> None:
    path = stored(ds).path / FILE
    content = json.loads(path.read_text())
    assert content["shape"] == [2, DIM]
    assert len(content["features"]) == 2 * DIM * 8


class Patches(nn.Module):
    """One vector for each patch of 8 × 8 pixels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(images, 8).flatten(2).transpose(1, 2)


def test_features_of_patches_have_canaries(
    ds: ImageDataset, images: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    spec = Backbone.from_module(Patches(), name="patches", dim=3, patch=8, patches=1, pooling="patches")
    store = extract_features(spec, ds, home=home)
    assert isinstance(store, FeatureStore)
    kept = read_canaries(store.path)
    assert kept is not None
    assert kept.shape == (2, 25, 3)
    assert len(extract_features(spec, grow(images), home=home)) == 21
