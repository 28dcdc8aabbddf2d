"""Attention in one image, against the formula on the last block's own inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from embcache.backbones.catalog import find_backbone, load_backbone
from embcache.backbones.transforms import choose_transform, normalize
from embcache.data.images import read_image
from embcache.errors import UsageError
from embcache.figures.attention import class_attention, image_attention
from embcache.figures.plots import plot_heads
from tests.refusal import refused

NAME = "timm:test_vit"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 180, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_is_the_softmax_of_the_last_blocks_queries_and_keys(weights: Path) -> None:
    transform = choose_transform(find_backbone(NAME), None, {(200, 180)})
    loaded = load_backbone(NAME, weights=weights)
    pixels = np.random.default_rng(1).integers(0, 256, (*transform.size, 3), dtype=np.uint8)
    module = loaded.module.double()
    block = module.blocks[-1]
    seen: list[torch.Tensor] = []
    hook = block.norm1.register_forward_hook(lambda m, given, out: seen.append(out))
    with torch.no_grad():
        module(normalize(torch.from_numpy(pixels[None]), transform, "cpu").double())
        hook.remove()
        tokens = seen[-1][0]  # (T, D)
        heads, width = block.attn.num_heads, tokens.shape[1] // block.attn.num_heads
        qkv = (tokens @ block.attn.qkv.weight.T + block.attn.qkv.bias).view(len(tokens), 3, heads, width)
        q, k = (block.attn.q_norm(qkv[:, 0]), block.attn.k_norm(qkv[:, 1]))
        scores = torch.einsum("hd,thd->ht", q[0], k) / width**0.5
        expected = scores.softmax(-1)[:, module.num_prefix_tokens :]
    module.float()
    fused = block.attn.fused_attn
    found = class_attention(loaded, transform, pixels)
    assert block.attn.fused_attn == fused
    rows, columns = (side // found.patch for side in transform.size)
    assert found.heads.shape == (heads, rows, columns)
    np.testing.assert_allclose(found.heads.reshape(heads, -1), expected.numpy(), rtol=1e-3, atol=1e-6)
    assert (found.heads.sum((1, 2)) < 1).all()  # the rest goes to the class token itself


def test_an_image_file_is_seen_as_extraction_sees_it(weights: Path, image: Path, tmp_path: Path) -> None:
    found = image_attention(image, NAME, weights=weights)
    transform = choose_transform(find_backbone(NAME), None, {(180, 200)})
    assert found.pixels.shape == (*transform.size, 3)
    np.testing.assert_array_equal(found.pixels, transform.geometry(read_image(image.parent, image.name)[0]))
    target = plot_heads(found.pixels, found.heads, "title", tmp_path / "heads.png")
    with Image.open(target) as figure:
        assert figure.size[0] > 500


@pytest.mark.parametrize("name", ["random", "timm:test_resnet", "timm:mixer_s32_224"])
def test_networks_without_a_class_token_are_refused(name: str, image: Path, tmp_path: Path) -> None:
    weights = None
    if name.startswith("timm:"):
        weights = tmp_path / "weights.pth"
        torch.save(timm.create_model(name.partition(":")[2], num_classes=0).state_dict(), weights)
    with refused(UsageError, "no-class-token"):
        image_attention(image, name, weights=weights)
