"""Layers as functions of stacked parameters: a leading axis of K heads on parameters and activations alike."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch


def init_linear(generator: torch.Generator, name: str, fan_in: int, fan_out: int) -> dict[str, torch.Tensor]:
    """Initialise as torch's ``nn.Linear``: weight (fan_out, fan_in) and bias uniform within ±1/√fan_in."""
    bound = 1 / math.sqrt(fan_in)
    weight = torch.empty(fan_out, fan_in).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(fan_out).uniform_(-bound, bound, generator=generator)
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def affine(params: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """``x @ W.T + b`` for every head: (K, B, fan_in) to (K, B, fan_out)."""
    return torch.baddbmm(params[f"{name}.bias"][:, None], x, params[f"{name}.weight"].transpose(1, 2))


def layer_norm(params: Mapping[str, torch.Tensor], name: str, x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """``nn.LayerNorm`` over the last axis of (K, B, width), each head with its own gain and bias."""
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(params[f"{name}.bias"][:, None], normed, params[f"{name}.weight"][:, None])
