"""What the class token of a vision transformer's last block looks at, per head, over the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from embcache.backbones.catalog import LoadedBackbone, find_backbone, load_backbone
from embcache.backbones.transforms import Transform, choose_transform, normalize
from embcache.data.images import read_image
from embcache.errors import UsageError
from embcache.paths import PathLike


@dataclass(frozen=True, eq=False)
class ClassAttention:
    """Attention of the class token of one image."""

    backbone: str
    pixels: NDArray[np.uint8]  # (H, W, 3); what the network was given, before normalisation
    heads: NDArray[np.float32]  # (heads, rows, columns)
    patch: int  # pixels of a patch's side


def image_attention(
    image: PathLike,
    backbone: str = "dino",
    *,
    weights: PathLike | None = None,
    transform: str | None = None,
    home: PathLike | None = None,
) -> ClassAttention:
    """Attention of the last block's class token to the patches of one image file."""
    path = Path(image).expanduser()
    if not path.is_file():
        raise UsageError("there is no such image", expected="an image file", found=str(image), fix="--image FILE")
    pixels, _ = read_image(path.resolve().parent, path.name)
    spec = find_backbone(backbone)
    chosen = choose_transform(spec, transform, {(pixels.shape[1], pixels.shape[0])})
    loaded = load_backbone(backbone, weights=weights, home=home, image_size=chosen.size)
    return class_attention(loaded, chosen, chosen.geometry(pixels))


@torch.no_grad()
def class_attention(loaded: LoadedBackbone, transform: Transform, pixels: NDArray[np.uint8]) -> ClassAttention:
    """As `image_attention`, of pixels (H, W, 3) at the transform's size."""
    module: Any = loaded.module
    attention = _last_attention(module, loaded.spec.name)
    seen: list[Tensor] = []
    was_fused = getattr(attention, "fused_attn", False)
    # The fused path never forms the weights; the plain one gives them to the dropout after the softmax.
    attention.fused_attn = False
    hook = attention.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        module(normalize(torch.from_numpy(pixels[None]), transform, "cpu"))
    finally:
        hook.remove()
        attention.fused_attn = was_fused
    weights = seen[-1][0].float()  # (heads, tokens, tokens)
    patch = loaded.spec.patch
    grid = (pixels.shape[0] // patch, pixels.shape[1] // patch)
    before = weights.shape[-1] - math.prod(grid)  # class token and registers
    if before < 1:
        raise _no_class_token(loaded.spec.name)
    heads = weights[:, 0, before:].reshape(-1, *grid)
    return ClassAttention(loaded.spec.name, pixels, np.asarray(heads.numpy(), dtype=np.float32), patch)


def _last_attention(module: Any, name: str) -> Any:
    blocks = getattr(module, "blocks", None)
    last = blocks[-1] if isinstance(blocks, nn.Sequential | nn.ModuleList) and len(blocks) else None
    attention = getattr(last, "attn", None)
    if attention is None or not isinstance(getattr(attention, "attn_drop", None), nn.Module):
        raise _no_class_token(name)
    if getattr(module, "cls_token", None) is None:
        raise _no_class_token(name)
    return attention


def _no_class_token(name: str) -> UsageError:
    return UsageError(
        f"{name} has no class token whose attention could be shown",
        expected="dino, or a vision transformer of timm with a class token",
        fix="embcache attention --image FILE --backbone dino",
    )
