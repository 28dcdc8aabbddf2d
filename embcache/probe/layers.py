"""Layers as functions of stacked parameters: a leading axis of K heads on parameters and activations alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_NARROW = 64  # outputs up to which the weights go first in the product


def plain_arithmetic(like: torch.Tensor) -> AbstractContextManager[Any]:
    """No autocast, which would compute the products in half precision."""
    if not torch.is_autocast_enabled(like.device.type):
        return nullcontext()  # to enter torch's takes as long as a small product
    return torch.autocast(like.device.type, enabled=False)


def init_linear(generator: torch.Generator, name: str, fan_in: int, fan_out: int) -> dict[str, torch.Tensor]:
    """Initialize as torch's ``nn.Linear``: weight (fan_out, fan_in) and bias uniform within ±1/√fan_in."""
    bound = 1 / math.sqrt(fan_in)
    weight = torch.empty(fan_out, fan_in).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(fan_out).uniform_(-bound, bound, generator=generator)
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def affine(params: Mapping[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    """``x @ W.T + b`` for every head: (K, B, fan_in) to (K, B, fan_out)."""
    out: torch.Tensor = _Affine.apply(x, params[f"{name}.weight"], params[f"{name}.bias"])
    return out


class _Affine(torch.autograd.Function):
    """A stacked linear layer whose gradient is computed with the weights' long side along memory.

    What autograd makes of ``baddbmm`` multiplies (fan_in, B) by (B, fan_out), which for the two outputs of a linear
    probe takes fifteen times as long as (fan_out, B) by (B, fan_in).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        with plain_arithmetic(x):
            if weight.shape[1] <= _NARROW:
                return torch.baddbmm(bias[:, :, None], weight, x.transpose(1, 2)).transpose(1, 2).contiguous()
            return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (out,) = gradients
        of_x, of_weight, of_bias = ctx.needs_input_grad
        with plain_arithmetic(x):
            return (
                torch.bmm(out, weight) if of_x else None,
                torch.bmm(out.transpose(1, 2).contiguous(), x) if of_weight else None,
                out.sum(1) if of_bias else None,
            )


def layer_norm(params: Mapping[str, torch.Tensor], name: str, x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """``nn.LayerNorm`` over the last axis of (K, B, width), each head with its own gain and bias."""
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(params[f"{name}.bias"][:, None], normed, params[f"{name}.weight"][:, None])
