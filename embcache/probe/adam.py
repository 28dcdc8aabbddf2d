"""Adam, written out for stacked parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # torch.optim.Adam's defaults


def adam_step(
    params: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    first: Sequence[torch.Tensor],
    second: Sequence[torch.Tensor],
    steps: Sequence[int],
    lrs: Sequence[float],
) -> None:
    """One step of Adam (torch's arithmetic, no weight decay) in place, each head with its own step count and rate.

    Written out because ``torch.optim.Adam`` knows one rate a tensor, and its first step imports torch's compiler.

    Parameters
    ----------
    params, gradients, first, second : sequence of Tensor of shape (K, …)
        Parameters of one dtype and device, their gradients and their moments.
    steps, lrs : sequence, length K
        Steps that each head has made, this one included, and its learning rate.
    """
    scales = [
        [math.sqrt(1 - BETA2**t) for t in steps],
        [-lr / (1 - BETA1**t) for lr, t in zip(lrs, steps, strict=True)],
    ]
    roots, rates = torch.tensor(scales, dtype=params[0].dtype, device=params[0].device)
    for p, gradient, m, v in zip(params, gradients, first, second, strict=True):
        column = (-1,) + (1,) * (p.dim() - 1)
        m.lerp_(gradient, 1 - BETA1)
        v.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
        update = v.sqrt()
        update.div_(roots.view(column)).add_(EPSILON)
        torch.div(m, update, out=update)
        p.addcmul_(update, rates.view(column))
