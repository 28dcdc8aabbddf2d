"""What every backbone promises, checked for each row of the table, a second seed and a timm model.

Weights that would be downloaded are made on the spot in their published layout; the EfficientNet-Lites' are real.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from embcache.backbones.catalog import BACKBONES, LoadedBackbone, find_backbone, load_backbone, weights_status
from embcache.backbones.checkpoints import hash_state
from embcache.backbones.transforms import choose_transform
from embcache.data.images import ImageRef
from embcache.extract.worker import compute_shard, freeze
from tests.extract import published

TIMM = "timm:resnet10t"
NAMES = (*BACKBONES, "random:1", TIMM)
KINDS = ("random", "dino", "effnet_lite0", TIMM)  # one of each architecture
SIZES = {"native": (224, 224), "patchcam": (96, 96)}


def _save_timm(path: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        safetensors.torch.save_file(timm.create_model("resnet10t", pretrained=False).state_dict(), path)
    return path


# The published layout of each file that this machine may lack.
MAKE: dict[str, Callable[[Path], Path]] = {
    "supervised": lambda path: published.save(path, published.resnet_state()),
    "swav": lambda path: published.save(path, published.vissl(published.resnet_state()), legacy=True),
    "simclr": lambda path: published.save(path, published.vissl(published.resnet_state())),
    "swav_fb": lambda path: published.save(path, published.swav(published.resnet_state())),
    "dino": lambda path: published.save(path, published.vit_state()),
    TIMM: _save_timm,
}


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedBackbone]:
    @cache
    def load_once(name: str) -> LoadedBackbone:
        if name not in MAKE:
            if weights_status(name).startswith("not here"):
                pytest.skip(f"the weights of {name} are {weights_status(name)}")
            return load_backbone(name, allow_download=False)
        path = MAKE[name](tmp_path_factory.mktemp("weights") / "weights.pth")
        try:
            return load_backbone(name, weights=path, allow_download=False)
        finally:
            path.unlink()

    return load_once


def pixels(count: int, size: tuple[int, int], seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    factor = (size[0] // 4, size[1] // 4)
    return coarse.repeat(factor[0], axis=1).repeat(factor[1], axis=2)


@pytest.mark.parametrize("name", NAMES)
def test_the_row_tells_the_truth_about_the_network(load: Callable[[str], LoadedBackbone], name: str) -> None:
    loaded = load(name)
    spec = loaded.spec
    assert spec == find_backbone(name)
    assert spec.name == name
    assert sum(parameter.numel() for parameter in loaded.module.parameters()) == spec.parameters
    assert spec.network
    assert spec.licence
    assert spec.source
    assert len(loaded.weights_sha256) == 64
    assert loaded.weights_source


@pytest.mark.parametrize(("name", "size"), [(name, size) for name in KINDS for size in SIZES])
def test_features_are_finite_vectors_that_tell_images_apart(
    load: Callable[[str], LoadedBackbone], name: str, size: str
) -> None:
    loaded = load(name)
    network = freeze(loaded, choose_transform(loaded.spec, "paper", {SIZES[size]}), "cpu", "fp32")
    features = network.features(pixels(2, SIZES[size]))
    assert features.shape == (2, loaded.spec.dim)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    assert np.abs(features[0] - features[1]).max() > 1e-3 * np.abs(features).max()


@pytest.mark.parametrize("name", KINDS)
def test_frozen_means_frozen(load: Callable[[str], LoadedBackbone], name: str) -> None:
    loaded = load(name)
    assert not any(module.training for module in loaded.module.modules())
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    before = hash_state(loaded.module)
    network = freeze(loaded, choose_transform(loaded.spec, "paper", {(96, 96)}), "cpu", "fp32")
    first = network.features(pixels(3, (96, 96)))
    second = network.features(pixels(3, (96, 96)))
    assert hash_state(loaded.module) == before
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", KINDS)
def test_features_do_not_depend_on_the_rest_of_the_batch(load: Callable[[str], LoadedBackbone], name: str) -> None:
    loaded = load(name)
    network = freeze(loaded, choose_transform(loaded.spec, "paper", {(96, 96)}), "cpu", "fp32")
    batch = pixels(4, (96, 96))
    together = network.features(batch)
    for order in ([0], [3, 1, 2]):
        alone = network.features(np.ascontiguousarray(batch[order]))
        assert np.abs(alone - together[order]).max() <= 1e-5 * np.abs(together).max()


@pytest.mark.parametrize("name", KINDS)
def test_reduced_precision_is_near_full_precision(load: Callable[[str], LoadedBackbone], name: str) -> None:
    loaded = load(name)
    transform = choose_transform(loaded.spec, "paper", {(96, 96)})
    batch = pixels(2, (96, 96))
    full = freeze(loaded, transform, "cpu", "fp32").features(batch)
    reduced = freeze(loaded, transform, "cpu", "bf16").features(batch)
    assert reduced.dtype == np.float32
    assert not np.array_equal(full, reduced)
    cosines = (full * reduced).sum(1) / np.linalg.norm(full, axis=1) / np.linalg.norm(reduced, axis=1)
    assert cosines.min() >= 0.999


@pytest.mark.parametrize("name", KINDS)
def test_the_first_of_several_views_is_the_plain_row(
    load: Callable[[str], LoadedBackbone], name: str, tmp_path: Path
) -> None:
    loaded = load(name)
    for index, image in enumerate(pixels(3, (96, 96))):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    sources = [ImageRef(str(index), f"{index}.png", "") for index in range(3)]
    transform = choose_transform(loaded.spec, "paper", {(96, 96)})
    with ThreadPoolExecutor(1) as pool:
        plain, viewed = (
            compute_shard(tmp_path, sources, [network], batch_size=2, pool=pool)[0]
            for network in (
                freeze(loaded, transform, "cpu", "fp32"),
                freeze(loaded, transform, "cpu", "fp32", views=2, augment="patch"),
            )
        )
    assert plain.features.shape == (3, loaded.spec.dim)
    assert viewed.features.shape == (3, 2, loaded.spec.dim)
    np.testing.assert_array_equal(viewed.features[:, 0], plain.features)
    assert plain.digests == viewed.digests
