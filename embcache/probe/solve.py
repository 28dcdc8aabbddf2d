"""Heads that are solved instead of trained: no epochs, no learning rate, no random stream.

A solved head gives all that its ``apply`` needs as tensors, so that a saved head,
an exported one and one that predicts are the same thing whichever way they came about.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeGuard

import torch

from embcache.probe.metrics import Metric

Params = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Solved:
    """A solved head."""

    params: Params  # all that ``apply`` needs, without the stacking axis, on the device of the features
    chosen: dict[str, Any] = field(default_factory=dict)  # what validation chose, as JSON data


class SolvedHead(ABC):
    """A head that is solved; see `embcache.probe.heads` for the whole contract."""

    weighs: ClassVar[bool]
    """Whether classes weigh alike in training where they are not balanced."""

    @abstractmethod
    def solve(
        self,
        x: Mapping[str, torch.Tensor],
        y: torch.Tensor,
        x_val: Mapping[str, torch.Tensor] | None,
        y_val: torch.Tensor | None,
        n_classes: int,
        metric: str | Metric,
    ) -> Solved:
        """Solve one head.

        Parameters
        ----------
        x, x_val : mapping of backbone to float32 Tensor of shape (n, D), (m, D)
            Features that train and that validate; the latter None where there are none.
        y, y_val : int64 Tensor of shape (n,), (m,)
            Labels, 0 … ``n_classes`` − 1.
        n_classes : int
            C, the width of the logits.
        metric : str or Metric
            By which validation chooses; see `embcache.probe.metrics.score`.
        """

    @abstractmethod
    def apply(
        self, params: Params, x: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Logits of shape (K, B, C) from parameters (K, …) and features (K, B, D) each."""


def is_solved(head: object) -> TypeGuard[SolvedHead]:
    """Whether a head, or a class of heads, is solved, not trained."""
    return issubclass(head if isinstance(head, type) else type(head), SolvedHead)
