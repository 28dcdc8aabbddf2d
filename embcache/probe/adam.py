"""Adam for stacked parameters, each head with its own step count and rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # torch.optim.Adam's defaults

_LARGE = 1 << 16
"""Numbers of one head's tensor from which a pass over memory costs more than a call. Of a head, not of a stack: what a
head learns does not depend on how many train beside it."""


def adam_step(tensors: Iterable[Parts], steps: Sequence[int], lrs: Sequence[float]) -> None:
    """One step of Adam (torch's arithmetic, no weight decay) in place, each head with its own step count and rate.

    Not ``torch.optim.Adam``, which knows one rate a tensor and whose first step imports torch's compiler. Large tensors
    go through its fused kernel, head by head: one pass over memory instead of nine.

    Parameters
    ----------
    tensors : iterable of four Tensors of shape (K, …)
        Of each parameter of K heads: itself, its gradient, its first and its second moment.
    steps : sequence of int, length K
        How many steps each head has taken, this one included.
    lrs : sequence of float, length K
        Learning rates.
    """
    rows: torch.Tensor | None = None
    for p, gradient, first, second in tensors:
        if p[0].numel() >= _LARGE and p.device.type in ("cpu", "cuda"):
            for k, (step, lr) in enumerate(zip(steps, lrs, strict=True)):
                _fused_step(p[k], gradient[k], first[k], second[k], step, lr)
            continue
        if rows is None:
            corrections = [math.sqrt(1 - BETA2**t) for t in steps]
            rates = [-lr / (1 - BETA1**t) for lr, t in zip(lrs, steps, strict=True)]
            rows = torch.tensor([corrections, rates], dtype=p.dtype, device=p.device)
        _stacked_step(p, gradient, first, second, rows.view(2, -1, *[1] * (p.dim() - 1)))


def _fused_step(
    p: torch.Tensor, gradient: torch.Tensor, first: torch.Tensor, second: torch.Tensor, step: int, lr: float
) -> None:
    """What ``torch.optim.Adam(fused=True)`` calls."""
    count = torch.tensor(float(step), device=p.device)
    torch._fused_adam_(
        [p],
        [gradient.contiguous()],
        [first],
        [second],
        [],
        [count],
        lr=lr,
        beta1=BETA1,
        beta2=BETA2,
        weight_decay=0.0,
        eps=EPSILON,
        amsgrad=False,
        maximize=False,
    )


def _stacked_step(
    p: torch.Tensor, gradient: torch.Tensor, first: torch.Tensor, second: torch.Tensor, rows: torch.Tensor
) -> None:
    """All heads in one go, pass by pass; ``rows`` holds their bias corrections and their rates."""
    first.lerp_(gradient, 1 - BETA1)
    second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
    update = second.sqrt().div_(rows[0]).add_(EPSILON)
    p.addcmul_(torch.div(first, update, out=update), rows[1])
