"""What every backbone promises, checked for each kind of network and of weights.

Weights that would be downloaded are made on the spot in their published layout; the EfficientNet-Lites' are real.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from embcache.backbones.catalog import Backbone, LoadedBackbone, backbones, find_backbone, load_backbone, weights_status
from embcache.backbones.transforms import Transform
from embcache.data.dataset import load_dataset
from embcache.errors import UsageError
from embcache.extract.extract import extract_features
from embcache.extract.recipes import recipe_network
from embcache.store.feature_store import FeatureStore, open_store
from embcache.testing import check_backbone
from tests.extract import published
from tests.extract.conftest import images
from tests.refusal import refused

__all__ = ["images"]

TIMM = "timm:resnet10t"
NAMES = ("random:1", "swav_fb", "dino", "effnet_lite1", TIMM)  # each kind of network and of weights


def _save_timm(path: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        safetensors.torch.save_file(timm.create_model("resnet10t", pretrained=False).state_dict(), path)
    return path


# The published layout of each file that this machine may lack.
MAKE: dict[str, Callable[[Path], Path]] = {
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


@pytest.mark.parametrize("name", NAMES)
def test_a_backbone_keeps_every_promise(load: Callable[[str], LoadedBackbone], name: str) -> None:
    loaded = load(name)
    assert loaded.spec == find_backbone(name)
    check_backbone(loaded)


class Small(nn.Module):
    """A network of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 7, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.net(images).flatten(1)
        return features


def small() -> Backbone:
    """Named ``tests.contracts.test_backbones:small`` on the command line."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Backbone.from_module(Small(), name="small", dim=8)


PLACE = f"{__name__}:small"


def test_a_module_of_ones_own_is_a_backbone_by_name_and_as_an_object(images: Path, home: Path) -> None:
    check_backbone(PLACE)
    check_backbone(small())
    dataset = load_dataset("folder", images)
    stores = extract_features([small(), PLACE], dataset)
    assert isinstance(stores, dict)
    assert stores.keys() == {"small", PLACE}
    assert np.array_equal(stores["small"].features[:], stores[PLACE].features[:])
    assert open_store(PLACE, dataset).row_shape == (8,)
    module = small().module
    assert module is not None
    assert all(parameter.requires_grad for parameter in module.parameters())
    with refused(UsageError, "backbone-not-imported"):  # a saved recipe imports no code
        recipe_network(stores[PLACE].recipe)
    with refused(UsageError, "backbone-in-process"):
        extract_features(small(), dataset, device="cpu,cpu")
    with refused(UsageError, "backbone-takes-no-weights"):
        extract_features(PLACE, dataset, weights="some.pth")


def test_another_version_or_other_tensors_are_another_recipe(images: Path, home: Path) -> None:
    dataset = load_dataset("folder", images)
    own = Transform("own", (32, 32), None, (32, 32), "bilinear", (0.5,) * 3, (0.5,) * 3)
    module = small().module
    assert module is not None
    torch.manual_seed(7)
    more = [Backbone.from_module(module, name="small", dim=8, version="2"),
            Backbone.from_module(module, name="small", dim=8, transform=own),
            Backbone.from_module(Small(), name="small", dim=8)]  # fmt: skip
    paths = {
        store.path for each in (small(), *more) if isinstance(store := extract_features(each, dataset), FeatureStore)
    }
    assert len(paths) == 4


def test_a_registered_backbone_is_known_by_its_name() -> None:
    backbones.register("tiny_one")(small)
    try:
        assert find_backbone("tiny_one").name == "tiny_one"
        with refused(UsageError, "registry-taken"):
            backbones.register("tiny_one")
    finally:
        del backbones._objects["tiny_one"]
    with refused(UsageError, "unknown-backbone"):
        find_backbone("tiny_one")
    with refused(UsageError, "import-failed"):
        find_backbone("no_such_module:small")
    with refused(UsageError, "backbone-type"):
        find_backbone(f"{__name__}:Small")


def test_a_broken_promise_is_named() -> None:
    class Drifting(Small):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) + torch.rand(1)

    with pytest.raises(AssertionError, match="second time"):
        check_backbone(Backbone.from_module(Drifting(), name="drifting", dim=8))
    with pytest.raises(AssertionError, match="shape"):
        check_backbone(Backbone.from_module(Small(), name="wide", dim=9))


def test_a_module_is_copied_and_frozen_in_eval_mode() -> None:
    module = nn.Sequential(Small(), nn.BatchNorm1d(8), nn.Dropout(0.5))
    module(torch.randn(4, 3, 40, 40))  # moves the running statistics
    loaded = load_backbone(Backbone.from_module(module, name="training", dim=8))
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert not any(part.training for part in loaded.module.modules())
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    x = torch.randn(2, 3, 40, 40)
    with torch.inference_mode():
        before = loaded.module(x)
        assert torch.equal(before, module.eval()(x))
        module.load_state_dict({name: torch.ones_like(value) for name, value in module.state_dict().items()})
        assert torch.equal(loaded.module(x), before)


class Wrong(Small):
    """Returns what ``change`` makes of its features."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.change = change

    def forward(self, images: Tensor) -> Any:
        return self.change(super().forward(images))


def fail(features: Tensor) -> Tensor:
    raise ValueError("a fault in it")


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: Wrong(lambda x: {"features": x}), "'dict'"),
        (lambda: Wrong(lambda x: (x,)), "'tuple'"),
        (lambda: Wrong(lambda x: x[:, :, None, None]), "(2, 8, 1, 1)"),
        (lambda: Wrong(lambda x: x[0]), "(8,)"),
        (lambda: Wrong(lambda x: x[:, :5]), "(2, 5)"),
        (lambda: Wrong(fail), "a fault in it"),
        (lambda: Small().double(), "double"),
        (lambda: Small().half(), "Half"),
    ],
)
def test_what_makes_no_vectors_is_one_message(
    make: Callable[[], nn.Module], found: str, images: Path, home: Path
) -> None:
    with refused(UsageError, "backbone-output") as caught:
        extract_features(Backbone.from_module(make(), name="wrong", dim=8), load_dataset("folder", images))
    assert found in str(caught.value.found)
    assert not home.exists()


def test_what_is_no_module_of_tensors_is_one_message() -> None:
    class Derived(Small):
        def __init__(self) -> None:
            super().__init__()
            self.smaller = next(self.net.parameters()) / 2  # a tensor with a history, which Python cannot copy

    for module in (Small().to("meta"), Derived()):
        with refused(UsageError, "backbone-module"):
            load_backbone(Backbone.from_module(module, name="empty", dim=8))
    wrong: Any = Small().forward
    with refused(UsageError, "backbone-type"):
        Backbone.from_module(wrong, name="function", dim=8)
    with refused(UsageError, "backbone-type"):
        find_backbone(f"{__name__}:with_a_word")
    with refused(UsageError, "backbone-function"):
        find_backbone(f"{__name__}:fail")


def with_a_word() -> Backbone:
    word: Any = "imagenet"
    return Backbone.from_module(Small(), name="word", dim=8, transform=word)
