"""Heads of affine layers: the linear probe of Section 5.5, its fusion of several backbones, and one hidden layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from embcache.errors import check_number
from embcache.probe.layers import affine, init_linear
from embcache.probe.stack import TrainedHead
from embcache.probe.standard import Params, standardize


@dataclass(frozen=True)
class LinearHead(TrainedHead):
    """Logits ``W x + b`` on the raw features of one backbone."""

    name = "linear"
    summary = "one linear layer on the features of one backbone (Section 5.5)"

    def init(self, generator: torch.Generator, dims: Mapping[str, int], n_classes: int) -> Params:
        """``classifier.weight`` of shape (C, D) and ``classifier.bias`` of shape (C,)."""
        (dim,) = dims.values()
        return init_linear(generator, "classifier", dim, n_classes)

    def apply(
        self, params: Params, x: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Logits (K, B, C) from features (K, B, D)."""
        (features,) = x.values()
        return affine(params, "classifier", features)


@dataclass(frozen=True)
class ConcatHead(TrainedHead):
    """One linear layer on the concatenation of standardized embeddings: the plainest fusion.

    Every feature has mean 0 and variance 1 over the fold's training rows, so that no backbone outweighs another by
    its scale.
    """

    name = "concat"
    summary = "fuses backbones: one linear layer on their standardized features side by side"
    fuses = True
    standardized = True

    def init(self, generator: torch.Generator, dims: Mapping[str, int], n_classes: int) -> Params:
        """``classifier`` of shape (C, ΣD); columns in the order of ``dims``."""
        return init_linear(generator, "classifier", sum(dims.values()), n_classes)

    def apply(
        self, params: Params, x: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Logits (K, B, C) from features (K, B, D) of each backbone."""
        together = torch.cat([standardize(params, backbone, features) for backbone, features in x.items()], dim=-1)
        return affine(params, "classifier", together)


@dataclass(frozen=True)
class MLPHead(TrainedHead):
    """Linear, ReLU, dropout, Linear on the raw features of one backbone."""

    hidden: int = 512  # width of the hidden layer (choice: as DVME's)
    dropout: float = 0.2  # rate before the last layer (choice: as DVME's)

    name = "mlp"
    summary = "one hidden layer on the features of one backbone"

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
