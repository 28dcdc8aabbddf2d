"""Folding changes no feature, and leaves alone what only looks like a pair."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from timm.layers import StdConv2d
from torch import Tensor, nn

from embcache.backbones.networks import fold_norms, to_bfloat16

SIZE = (64, 64)


def random_norms(module: nn.Module) -> nn.Module:
    """Statistics and parameters as no initialization has them."""
    generator = torch.Generator().manual_seed(1)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low, high in (
                (layer.running_mean, -0.5, 0.5),
                (layer.running_var, 0.5, 2.0),
                (layer.weight.data, 0.5, 1.5),
                (layer.bias.data, -0.5, 0.5),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return module.eval().requires_grad_(False)


def build(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "torchvision":
            return random_norms(torchvision.models.resnet50(weights=None, num_classes=10))
        return random_norms(timm.create_model(name, pretrained=False, num_classes=0))


def norms(module: nn.Module) -> int:
    return sum(isinstance(layer, nn.BatchNorm2d) for layer in module.modules())


def batch() -> Tensor:
    return torch.randn((3, 3, *SIZE), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", ["torchvision", "tf_efficientnet_lite0"])
def test_a_folded_network_gives_the_same_features_without_norms(name: str) -> None:
    module = build(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    folded = fold_norms(module, SIZE)
    assert norms(module) > 0
    assert norms(folded) == 0
    expected, found = module(batch()), folded(batch())
    assert not torch.equal(expected, found)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert not any(layer.training for layer in folded.modules())


@pytest.mark.parametrize("name", ["convnext_atto"])
def test_a_network_without_batch_norms_is_left_as_it_is(name: str) -> None:
    module = timm.create_model(name, pretrained=False, num_classes=0, **({"img_size": 64} if "vit" in name else {}))
    assert fold_norms(module.eval(), SIZE) is module


class Pair(nn.Module):
    """A convolution and a norm, joined in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x).flatten(2).mean(-1)

    def join(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class CalledTwice(Pair):
    def join(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv(x + 1)


class SharedWeight(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 8, 3)
        self.other.weight = self.conv.weight

    def join(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.other(x)


@pytest.mark.parametrize("made", [CalledTwice, SharedWeight])
def test_what_is_not_a_pair_is_not_folded(made: type[Pair]) -> None:
    module = random_norms(made())
    folded = fold_norms(module, SIZE)
    assert folded is module
    assert norms(folded) == 1


def test_a_plain_pair_is_folded() -> None:
    module = random_norms(Pair())
    folded = fold_norms(module, SIZE)
    assert norms(folded) == 0
    torch.testing.assert_close(folded(batch()), module(batch()))


def test_weights_that_are_standardised_when_used_are_not_scaled() -> None:
    module = Pair()
    module.conv = StdConv2d(3, 8, 3)
    assert fold_norms(random_norms(module), SIZE) is module


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_bfloat16_takes_and_gives_float32(name: str) -> None:
    module = build(name) if "vit" not in name else timm.create_model(name, num_classes=0, img_size=64).eval()
    reduced = to_bfloat16(fold_norms(module, SIZE))
    with torch.inference_mode():
        expected, found = module(batch()), reduced(batch())
    assert found.dtype == torch.float32
    assert any(parameter.dtype == torch.bfloat16 for parameter in reduced.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    assert torch.cosine_similarity(found, expected).min() >= 0.999
