"""What the attention of a DVME head looks at, averaged over images (the paper's Figure F1)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from embcache.errors import UsageError
from embcache.probe.heads.dvme import project
from embcache.probe.heads.scalar_attention import sum_attention

_IMAGES = 256  # looked at together


@torch.no_grad()
def mean_attention(
    params: Mapping[str, torch.Tensor], x: Mapping[str, torch.Tensor], kind: str = "auto"
) -> NDArray[np.float32]:
    """Mean over images of the attention weights of a ``dvme`` or ``dvme-token`` head; no map is kept per image.

    Shapes: x (n, D); returns (N, N).
    """
    n, tokens = _count(params, x)
    total = _sum_attention(params, x, tokens, kind)
    return np.asarray((total / n).float().cpu().numpy())


@torch.no_grad()
def mean_mass(
    params: Mapping[str, torch.Tensor], x: Mapping[str, torch.Tensor], kind: str = "auto"
) -> NDArray[np.float64]:
    """`mass_table` of `mean_attention`, in time linear in the number of tokens: the map is never formed.

    Parameters, return value and errors as there, one row and column for each backbone.
    """
    n, tokens = _count(params, x)
    return np.asarray((_sum_attention(params, x, len(x), kind) / (n * tokens / len(x))).cpu().numpy())


def _count(params: Mapping[str, torch.Tensor], x: Mapping[str, torch.Tensor]) -> tuple[int, int]:
    """Images, and tokens of each."""
    if "attn.qkv.weight" not in params:
        raise UsageError(
            "this head has no attention",
            expected="a head trained with dvme or dvme-token",
            found=", ".join(sorted(params)) or "no parameters",
            fix="embcache probe --head dvme",
        )
    n = len(next(iter(x.values()))) if x else 0
    if n == 0:
        raise UsageError("attention is averaged over images", expected="one at least", found="none")
    return n, sum(params[f"project.{backbone}.weight"].shape[0] for backbone in x) // params["attn.qkv.weight"].shape[1]


def _sum_attention(
    params: Mapping[str, torch.Tensor], x: Mapping[str, torch.Tensor], parts: int, kind: str
) -> torch.Tensor:
    """Attention from each part of the tokens to each other, summed over images and a part's tokens; (parts, parts)."""
    n, tokens = _count(params, x)
    stacked = {name: p[None].float() for name, p in params.items()}
    weight, bias = params["attn.qkv.weight"].float(), params["attn.qkv.bias"].float()  # (3d, d), (3d,)
    width = weight.shape[1]  # numbers a token holds
    total = torch.zeros(parts, parts, dtype=torch.float64, device=weight.device)
    for rows in torch.split(torch.arange(n), _IMAGES):
        part = {backbone: features[rows].to(weight)[None] for backbone, features in x.items()}
        meta = project(stacked, part)[0].view(len(rows), tokens, width)
        q, k = (meta @ weight[:width].T + bias[:width], meta @ weight[width : 2 * width].T + bias[width : 2 * width])
        if width == 1:
            total += sum_attention(q[..., 0], k[..., 0], parts, kind)
        else:
            weights = (torch.bmm(q, k.transpose(1, 2)) / math.sqrt(width)).softmax(-1)  # (images, N, N)
            total += weights.sum(0, dtype=torch.float64)  # a token is a backbone: N parts either way
    return total


def mass_table(mean_map: NDArray[np.floating], n_backbones: int) -> NDArray[np.float64]:
    """How much attention the tokens of each backbone give to those of each other.

    Shapes: mean_map (N, N); returns (B, B).
    """
    n = len(mean_map)
    if n_backbones < 1 or n % n_backbones or mean_map.shape != (n, n):
        raise ValueError(f"a map of shape {mean_map.shape} is not one of {n_backbones} backbones")
    each = n // n_backbones
    blocks = np.asarray(mean_map, dtype=np.float64).reshape(n_backbones, each, n_backbones, each)
    return np.asarray(blocks.sum(3).mean(1))
