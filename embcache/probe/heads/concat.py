"""The plainest fusion: a linear probe on all embeddings side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from numpy.typing import ArrayLike

from embcache.probe.layers import affine, init_linear
from embcache.probe.standard import StandardizedHead, standardise
from embcache.probe.train import FittedHead, fit

Params = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Concat(StandardizedHead):
    """One linear layer on the concatenation of standardised embeddings.

    Every feature has mean 0 and variance 1 over the fold's training rows, so that no backbone outweighs another by
    its scale; the statistics are constants of the head.
    """

    name: ClassVar[str] = "concat"
    summary: ClassVar[str] = "fuses backbones: one linear layer on their standardised features side by side"
    fuses: ClassVar[bool] = True

    def init(self, generator: torch.Generator, dims: Mapping[str, int], n_classes: int) -> Params:
        """``classifier`` of shape (C, ΣD); columns in the order of ``dims``."""
        return init_linear(generator, "classifier", sum(dims.values()), n_classes)

    def apply(
        self, params: Params, x: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Logits (K, B, C) from features (K, B, D) of each backbone; ``params`` with the `constants`."""
        together = torch.cat([standardise(params, backbone, features) for backbone, features in x.items()], dim=-1)
        return affine(params, "classifier", together)

    def dropouts(self) -> Mapping[str, tuple[int, float]]:
        """None."""
        return {}

    def fit(self, x: Mapping[str, ArrayLike], y: ArrayLike, **kwargs: Any) -> FittedHead:
        """Train on arrays; keywords as `embcache.probe.train.fit`."""
        return fit(self, x, y, **kwargs)


HEADS = (Concat,)
