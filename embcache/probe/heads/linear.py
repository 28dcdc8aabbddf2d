"""The linear probe of Section 5.5: one affine map from a backbone's features to class logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from numpy.typing import ArrayLike

from embcache.probe.layers import affine, init_linear
from embcache.probe.train import FittedHead, fit


@dataclass(frozen=True)
class Linear:
    """Logits ``W x + b`` on the raw features of one backbone; trained as `embcache.probe.schedule` says."""

    name: ClassVar[str] = "linear"
    summary: ClassVar[str] = "one linear layer on the features of one backbone (Section 5.5)"
    fuses: ClassVar[bool] = False

    def init(self, generator: torch.Generator, dims: Mapping[str, int], n_classes: int) -> dict[str, torch.Tensor]:
        """``classifier.weight`` of shape (C, D) and ``classifier.bias`` of shape (C,)."""
        (dim,) = dims.values()
        return init_linear(generator, "classifier", dim, n_classes)

    def apply(
        self,
        params: dict[str, torch.Tensor],
        x: Mapping[str, torch.Tensor],
        masks: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Logits (K, B, C) from features (K, B, D)."""
        (features,) = x.values()
        return affine(params, "classifier", features)

    def dropouts(self) -> Mapping[str, tuple[int, float]]:
        """None."""
        return {}

    def fit(self, x: Mapping[str, ArrayLike], y: ArrayLike, **kwargs: Any) -> FittedHead:
        """Train on arrays; keywords as `embcache.probe.train.fit`."""
        return fit(self, x, y, **kwargs)


HEADS = (Linear,)
