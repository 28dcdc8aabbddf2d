"""Layers and standardization as functions of stacked parameters: a leading axis of K heads everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Params = dict[str, Tensor]
Tensors = Mapping[str, Tensor]
Tensors = Tensors

_NARROW = 64  # outputs up to which the weights go first in the product


def plain_arithmetic(like: Tensor) -> AbstractContextManager[Any]:
    """No autocast, which would compute the products in half precision."""
    if not torch.is_autocast_enabled(like.device.type):
        return nullcontext()  # to enter torch's takes as long as a small product
    return torch.autocast(like.device.type, enabled=False)


def init_linear(generator: torch.Generator, name: str, fan_in: int, fan_out: int) -> Params:
    """Initialize as torch's ``nn.Linear``: weight (fan_out, fan_in) and bias uniform within ±1/√fan_in."""
    bound = 1 / math.sqrt(fan_in)
    weight = torch.empty(fan_out, fan_in).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(fan_out).uniform_(-bound, bound, generator=generator)
    return {f"{name}.weight": weight, f"{name}.bias": bias}


def _aligned(x: Tensor) -> Tensor:
    """Zeros beside the last axis, to multiples of four values.

    On AMD processors the last bits of MKL's products depend on where rows lie, which is another place in a stack.
    """
    return F.pad(x, (0, -x.shape[-1] % 4)) if x.shape[-1] % 4 else x


def affine(params: Tensors, name: str, x: Tensor) -> Tensor:
    """``x @ W.T + b`` for every head: (K, B, fan_in) to (K, B, fan_out)."""
    out: Tensor = _Affine.apply(x, params[f"{name}.weight"], params[f"{name}.bias"])
    return out


class _Affine(torch.autograd.Function):
    """A stacked linear layer whose gradient is computed with the weights' long side along memory.

    Autograd's product of (fan_in, B) and (B, fan_out) takes fifteen times as long for the two outputs of a probe.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        rows, x, weight = x.shape[1], _aligned(x), _aligned(weight)
        if rows == 1:  # a product with one row sums in another order for one head than for several
            x = F.pad(x, (0, 0, 0, 1))
        with plain_arithmetic(x):
            if weight.shape[1] <= _NARROW:
                out = torch.baddbmm(bias[:, :, None], weight, x.transpose(1, 2)).transpose(1, 2)
            else:
                out = torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
        return out[:, :rows].contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (out,) = gradients
        of_x, of_weight, of_bias = ctx.needs_input_grad
        width = x.shape[-1]
        # Of one output bmm sums in an order that depends on the number of heads, so zeros go beside it.
        wide = F.pad(out, (0, 1)) if out.shape[-1] == 1 else out
        with plain_arithmetic(x):
            return (
                torch.bmm(out, _aligned(weight))[..., :width] if of_x else None,
                torch.bmm(wide.transpose(1, 2).contiguous(), _aligned(x))[:, : out.shape[-1], :width]
                if of_weight else None,
                out.sum(1) if of_bias else None,
            )  # fmt: skip


def layer_norm(params: Tensors, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    """``nn.LayerNorm`` over the last axis of (K, B, width), each head with its own gain and bias."""
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(params[f"{name}.bias"][:, None], normed, params[f"{name}.weight"][:, None])


class Standard:
    """Mean and scale of every feature, as scikit-learn's ``StandardScaler``, from rows that come in parts."""

    def __init__(self) -> None:
        self._n = 0
        self._mean: Params = {}
        self._squares: Params = {}  # sum of squared deviations from the mean

    def add(self, x: Tensors) -> None:
        """Add float32 rows (n, D)."""
        n = len(next(iter(x.values())))
        if not n:
            return
        before, self._n = self._n, self._n + n
        for backbone, features in x.items():
            wide = features.double()
            mean = wide.mean(0)
            squares = wide.var(0, correction=0) * n
            if before:  # moments of two parts make those of the whole (Chan, Golub and LeVeque)
                apart = mean - self._mean[backbone]
                squares += self._squares[backbone] + apart * apart * (before * n / self._n)
                mean = self._mean[backbone] + apart * (n / self._n)
            self._mean[backbone], self._squares[backbone] = mean, squares

    def params(self) -> Params:
        """``standard.<backbone>.mean`` and ``standard.<backbone>.scale``, float32 of shape (D,).

        The scale is the standard deviation (divided by n), 1 where a feature does not vary.
        """
        params: Params = {}
        for backbone, mean in self._mean.items():
            scale = (self._squares[backbone] / self._n).sqrt()
            # What rounding leaves of a constant feature is no variation.
            constant = scale <= 10 * torch.finfo(torch.float64).eps * mean.abs()
            params[f"standard.{backbone}.mean"] = mean.float()
            params[f"standard.{backbone}.scale"] = scale.masked_fill(constant, 1.0).float()
        return params


def standard_params(x: Tensors) -> Params:
    """Mean and scale (D,) of every feature over rows (n, D); see `Standard.params`."""
    standard = Standard()
    standard.add(x)
    return standard.params()


def standardize(params: Tensors, backbone: str, x: Tensor) -> Tensor:
    """Features (K, B, D) of a backbone by the means and scales (K, D) of each head."""
    return (x - params[f"standard.{backbone}.mean"][:, None]) / params[f"standard.{backbone}.scale"][:, None]


def standard_rows(params: Tensors, x: Tensors) -> NDArray[np.float64]:
    """Features (n, D) of one backbone by the means and scales (D,) of one head, in memory."""
    ((backbone, features),) = x.items()
    stacked = {name: p[None] for name, p in params.items()}
    return np.asarray(standardize(stacked, backbone, features[None])[0].cpu().double().numpy())


def standardized(x: ArrayLike, by: ArrayLike | None = None) -> NDArray[np.float32]:
    """Features (n, D) of which each is standardized by the rows ``by`` (m, D), by default by ``x`` itself."""
    rows, known = (torch.from_numpy(np.require(a, np.float32, ["C", "W"])) for a in (x, x if by is None else by))
    standard = Standard()
    for part in torch.split(known, 8192):  # rows that are float64 at a time
        standard.add({"": part})
    params = {name: p[None] for name, p in standard.params().items()}
    return np.asarray(standardize(params, "", rows[None])[0].numpy())


def standard_directions(x: ArrayLike, by: ArrayLike | None = None) -> NDArray[np.float32]:
    """Features as `standardized`, each row then scaled to length 1: their products are cosines."""
    return np.asarray(F.normalize(torch.from_numpy(standardized(x, by)), dim=-1).numpy())
