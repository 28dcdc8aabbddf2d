"""Ordered classes, such as grades: classes whose distance counts, by softmax or by cumulative logits.

Cumulative logits are the proportional odds model (McCullagh 1980): one score s per image and C − 1 ascending cuts,
P(y ≤ c) = σ(cut_c − s).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from embcache.targets.labels import Classes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ordinal(Classes):
    """Classes in the order of their names."""

    kind = "ordinal"
    losses = ("softmax", "cumulative")
    metric = "kappa"

    @property
    def width(self) -> int:
        """One score, for cumulative logits."""
        return 1 if self.loss == "cumulative" else self.outputs

    def init(self) -> dict[str, Tensor]:
        """``target.first``, the first cut, and ``target.gaps``, the logarithms of the gaps between cuts.

        The cuts of classes that are equally frequent, at a score of 0.
        """
        import torch

        if self.loss != "cumulative":
            return {}
        n = self.outputs
        cuts = torch.logit(torch.arange(1, n, dtype=torch.float64) / n)
        first = {"target.first": cuts[:1].float()}
        return first | ({"target.gaps": cuts.diff().log().float()} if n > 2 else {})
