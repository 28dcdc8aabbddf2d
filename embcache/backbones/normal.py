"""Normal random numbers that are the same on every machine, for networks that are nothing but their initialization.

torch's ``normal_`` takes logarithms and cosines from whatever vector instructions the processor has. A third of its
values then differ in their last bits, those near zero by several percent, so that no rounding would make them equal;
the digest of such a network, and with it the store of its features, would depend on the machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_AT_ONCE = 2048  # sixteens whose intermediate results stay in the processor's cache
_Floats = np.ndarray[Any, np.dtype[np.float64]]


class PortableNormal(TorchFunctionMode):
    """Inside a ``with``, replaces ``Tensor.normal_`` by :func:`fill_normal`, and leaves all else to torch."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        call = fill_normal if func is Tensor.normal_ else func
        return call(*args, **(kwargs or {}))


def fill_normal(
    tensor: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: torch.Generator | None = None
) -> Tensor:
    """Fill a float32 tensor with normal values, equal bit for bit on every machine.

    The same draws become the same values as in torch's ``normal_`` for a CPU (``normal_fill``, which pairs the first
    with the second eight of every sixteen), up to about 1e-7. The draws are multiples of 2⁻²⁴ on every processor;
    what follows in float64 is only what IEEE 754 rounds in one way: additions, products, quotients and square roots.
    """
    draws = torch.rand(tensor.numel(), generator=generator).view(-1, 2, 8)  # [0, 1)
    for part, target in zip(torch.split(draws, _AT_ONCE), torch.split(tensor.view(-1, 2, 8), _AT_ONCE), strict=True):
        first, second = part.double().numpy().transpose(1, 0, 2)  # (≤ _AT_ONCE, 8) each
        radius = np.sqrt(-2 * _log(1 - first)) * std
        cosine, sine = _cos_sin(second)
        target.copy_(torch.from_numpy(np.stack([radius * cosine + mean, radius * sine + mean], axis=1)))
    return tensor


def _log(values: _Floats) -> _Floats:
    """Natural logarithm of positive numbers: log(f·2ᵉ) = e·log 2 + 2·artanh((f - 1)/(f + 1)), f in [1/√2, √2)."""
    fraction, exponent = np.frexp(values)
    small = fraction < math.sqrt(0.5)
    fraction, exponent = np.where(small, 2 * fraction, fraction), exponent - small
    ratio = (fraction - 1) / (fraction + 1)  # at most 0.172, so that twelve terms of the series reach float64
    series = _polynomial(ratio * ratio, [1 / (2 * n + 1) for n in range(12)])
    logarithm: _Floats = exponent * 0.6931471805599453 + 2 * ratio * series
    return logarithm


def _cos_sin(turns: _Floats) -> tuple[_Floats, _Floats]:
    """Cosine and sine of angles in [0, 1) whole turns, from Taylor's series within an eighth of a turn."""
    quarter = np.rint(4 * turns)
    angle = (turns - quarter / 4) * (2 * math.pi)  # the difference is exact; [-π/4, π/4]
    square = angle * angle
    cosine = _polynomial(square, [(-1) ** n / math.factorial(2 * n) for n in range(9)])
    sine = angle * _polynomial(square, [(-1) ** n / math.factorial(2 * n + 1) for n in range(9)])
    odd = quarter % 2 == 1
    cosine, sine = np.where(odd, sine, cosine), np.where(odd, cosine, sine)
    # With every quarter turn the cosine runs through cos, -sin, -cos, sin, and the sine through sin, cos, -sin, -cos.
    cosine = np.where((quarter == 1) | (quarter == 2), -cosine, cosine)
    return cosine, np.where((quarter == 2) | (quarter == 3), -sine, sine)


def _polynomial(x: _Floats, coefficients: Sequence[float]) -> _Floats:
    """Evaluate c₀ + c₁x + c₂x² + … by Horner's rule, a rounding after every step."""
    result = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = result * x + coefficient
    return result
