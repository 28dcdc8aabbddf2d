"""A hidden layer between features and logits: what a linear probe cannot separate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from numpy.typing import ArrayLike

from embcache.errors import check_number
from embcache.probe.layers import affine, init_linear
from embcache.probe.train import FittedHead, fit

Params = dict[str, torch.Tensor]


@dataclass(frozen=True)
class MLP:
    """Linear, ReLU, dropout, Linear on the raw features of one backbone."""

    hidden: int = 512  # width of the hidden layer (choice: as DVME's)
    dropout: float = 0.2  # rate before the last layer (choice: as DVME's)

    name: ClassVar[str] = "mlp"
    summary: ClassVar[str] = "one hidden layer on the features of one backbone"
    fuses: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("--head-option hidden", self.hidden, 1, 100_000)
        check_number("--head-option dropout", self.dropout, 0.0, 0.999)

    def init(self, generator: torch.Generator, dims: Mapping[str, int], n_classes: int) -> Params:
        """``hidden`` (D to ``hidden``) and ``classifier`` (``hidden`` to C), each a weight and a bias."""
        (dim,) = dims.values()
        return {
            **init_linear(generator, "hidden", dim, self.hidden),
            **init_linear(generator, "classifier", self.hidden, n_classes),
        }

    def apply(
        self, params: Params, x: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Logits (K, B, C) from features (K, B, D)."""
        (features,) = x.values()
        out = affine(params, "hidden", features).relu()
        if masks is not None:
            out = out * masks["hidden"]
        return affine(params, "classifier", out)

    def dropouts(self) -> Mapping[str, tuple[int, float]]:
        """One mask after the hidden layer."""
        return {"hidden": (self.hidden, self.dropout)}

    def fit(self, x: Mapping[str, ArrayLike], y: ArrayLike, **kwargs: Any) -> FittedHead:
        """Train on arrays; keywords as `embcache.probe.train.fit`."""
        return fit(self, x, y, **kwargs)


HEADS = (MLP,)
