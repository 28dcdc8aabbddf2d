"""Adam, written out for stacked parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # torch.optim.Adam's defaults


def adam_step(
    p: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    steps: Sequence[int],
    lrs: Sequence[float],
) -> None:
    """One step of Adam (torch's arithmetic, no weight decay) in place, each head with its own step count and rate.

    Written out because ``torch.optim.Adam`` knows one rate a tensor, and its first step imports torch's compiler.
    """
    shape = (-1,) + (1,) * (p.dim() - 1)

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=p.dtype, device=p.device).view(shape)

    first.lerp_(gradient, 1 - BETA1)
    second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
    update = second.sqrt()
    update.div_(column([math.sqrt(1 - BETA2**t) for t in steps])).add_(EPSILON)
    torch.div(first, update, out=update)
    p.addcmul_(update, column([-lr / (1 - BETA1**t) for lr, t in zip(lrs, steps, strict=True)]))
