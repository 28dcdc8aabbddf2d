"""DINO's features against a ViT written out from the mathematics, on the same weights.

The oracle shares no code with the network: matrix products in float64 over unfolded patches, one head at a time, and
a bicubic kernel of its own for the position embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import timm
import torch
from torch import Tensor

from embcache.backbones.checkpoints import load_strictly
from embcache.backbones.networks import LastClassTokens, interpolate_positions
from tests.extract import published

PATCH, HEADS, DEPTH, WIDTH, EPSILON = 8, 6, 12, 384, 1e-6


def cubic(distance: float, a: float = -0.75) -> float:
    """Keys' cubic convolution kernel with the a of PyTorch and OpenCV."""
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def resampling_matrix(source: int, target: int) -> Tensor:
    """(target, source): output samples as weights on the input, borders repeated, scaled by (target + 0.1)/source."""
    scale = (target + 0.1) / source
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for row in range(target):
        center = (row + 0.5) / scale - 0.5
        first = math.floor(center) - 1
        for column in range(first, first + 4):
            matrix[row, min(max(column, 0), source - 1)] += cubic(center - column)
    return matrix


def positions(embedding: Tensor, rows: int, columns: int) -> Tensor:
    side = math.isqrt(embedding.shape[1] - 1)
    if (rows, columns) == (side, side):
        return embedding[0]
    grid = embedding[0, 1:].reshape(side, side, -1)
    vertical, horizontal = resampling_matrix(side, rows), resampling_matrix(side, columns)
    resampled = torch.einsum("ri,ijd,cj->rcd", vertical, grid, horizontal)
    return torch.cat([embedding[0, :1], resampled.reshape(rows * columns, -1)])


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centerd = x - x.mean(1, keepdim=True)
    return centerd / (centerd.square().mean(1, keepdim=True) + EPSILON).sqrt() * weight + bias


def attention(x: Tensor, p: Mapping[str, Tensor], block: str) -> Tensor:
    width = WIDTH // HEADS
    qkv = x @ p[block + "attn.qkv.weight"].T + p[block + "attn.qkv.bias"]
    outputs = []
    for head in range(HEADS):
        q, k, v = (qkv[:, part * WIDTH + head * width :][:, :width] for part in range(3))
        scores = (q @ k.T / math.sqrt(width)).exp()
        outputs.append(scores / scores.sum(1, keepdim=True) @ v)
    return torch.cat(outputs, 1) @ p[block + "attn.proj.weight"].T + p[block + "attn.proj.bias"]


def perceptron(x: Tensor, p: Mapping[str, Tensor], block: str) -> Tensor:
    hidden = x @ p[block + "mlp.fc1.weight"].T + p[block + "mlp.fc1.bias"]
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return hidden @ p[block + "mlp.fc2.weight"].T + p[block + "mlp.fc2.bias"]


def dino_features(image: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """(3, H, W) → (1536,): class tokens of blocks 9 to 12, each after the final norm, earliest first."""
    p = {key: value.double() for key, value in state.items()}
    _, height, width = image.shape
    rows, columns = height // PATCH, width // PATCH
    patches = image.double().reshape(3, rows, PATCH, columns, PATCH).permute(1, 3, 0, 2, 4).reshape(rows * columns, -1)
    embedded = patches @ p["patch_embed.proj.weight"].reshape(WIDTH, -1).T + p["patch_embed.proj.bias"]
    x = torch.cat([p["cls_token"][0], embedded]) + positions(p["pos_embed"], rows, columns)
    tokens = []
    for index in range(DEPTH):
        block = f"blocks.{index}."
        x = x + attention(norm(x, p[block + "norm1.weight"], p[block + "norm1.bias"]), p, block)
        x = x + perceptron(norm(x, p[block + "norm2.weight"], p[block + "norm2.bias"]), p, block)
        if index >= DEPTH - 4:
            tokens.append(norm(x[:1], p["norm.weight"], p["norm.bias"])[0])
    return torch.cat(tokens)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return published.vit_state()


@pytest.fixture(scope="module")
def network(state: dict[str, Tensor]) -> LastClassTokens:
    network = LastClassTokens()
    load_strictly(network, state)
    return network.eval()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("size", [(64, 160)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_features_equal_the_written_out_transformer(
    network: LastClassTokens, state: dict[str, Tensor], size: tuple[int, int]
) -> None:
    count = 2
    images = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        features = network(images)
    assert features.shape == (count, 1536)
    assert features.dtype == torch.float32
    for image, found in zip(images, features, strict=True):
        expected = dino_features(image, state)
        assert relative_error(found, expected) <= 1e-4


def test_features_at_224_equal_timms_own_intermediate_layers(
    network: LastClassTokens, state: dict[str, Tensor]
) -> None:
    model = timm.create_model("vit_small_patch8_224.dino", pretrained=False, num_classes=0).eval()
    model.load_state_dict(state, strict=True)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        layers = model.get_intermediate_layers(images, n=4, norm=True, return_prefix_tokens=True)
        expected = torch.cat([prefix[:, 0] for _, prefix in layers], dim=1)
        torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(8, 20), (28, 27), (40, 40), (1, 1)])
def test_positions_are_resampled_as_the_dino_repository_does(grid: tuple[int, int]) -> None:
    embedding = torch.randn(1, 785, 16, generator=torch.Generator().manual_seed(3))
    found = interpolate_positions(embedding, grid)
    assert found.shape == (1, 1 + grid[0] * grid[1], 16)
    assert torch.equal(found[:, 0], embedding[:, 0])
    assert relative_error(found[0], positions(embedding.double(), *grid)) < 1e-5
