"""What the heads that fuse by Listing 1 share: projections, something that mixes them, and the end of the listing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from numpy.typing import ArrayLike

from embcache.errors import check_number
from embcache.probe.layers import affine, init_linear, layer_norm
from embcache.probe.train import FittedHead, fit

Params = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Fusion(ABC):
    """A Linear per backbone, concatenation, mixing, LayerNorm, Linear, ReLU, dropout, classifier.

    A head says how it mixes by `init_mixing` and `mix`; all else is here.

    Attributes
    ----------
    proj_dim : int
        Width of each projection and of the last hidden layer.
    dropout : float
        Rate before the classifier.
    """

    proj_dim: int = 512
    dropout: float = 0.2

    name: ClassVar[str]
    summary: ClassVar[str]
    fuses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("--head-option proj_dim", self.proj_dim, 1, 100_000)
        check_number("--head-option dropout", self.dropout, 0.0, 0.999)

    @abstractmethod
    def init_mixing(self, generator: torch.Generator) -> Params:
        """Parameters of the mixing of one head."""

    @abstractmethod
    def mix(self, params: Params, meta: torch.Tensor) -> torch.Tensor:
        """The meta-embedding (K, B, ``proj_dim`` × backbones), mixed; same shape."""

    def init(self, generator: torch.Generator, dims: Mapping[str, int], n_classes: int) -> Params:
        """Parameters named as the listing's layers; ``project.<backbone>`` stands for ``simclr_head`` and its like."""
        total = self.proj_dim * len(dims)
        return {
            **init_projections(generator, dims, self.proj_dim),
            **self.init_mixing(generator),
            "normlayer.weight": torch.ones(total),
            "normlayer.bias": torch.zeros(total),
            **init_linear(generator, "proj_head", total, self.proj_dim),
            **init_linear(generator, "classifier", self.proj_dim, n_classes),
        }

    def embed(self, params: Params, x: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The fused embedding (K, B, ``proj_dim``): the hidden layer after ReLU, before dropout and classifier."""
        mixed = self.mix(params, project(params, x))
        return affine(params, "proj_head", layer_norm(params, "normlayer", mixed)).relu()

    def apply(
        self, params: Params, x: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Logits (K, B, C) from features (K, B, D) of each backbone."""
        out = self.embed(params, x)
        if masks is not None:
            out = out * masks["hidden"]
        return affine(params, "classifier", out)

    def dropouts(self) -> Mapping[str, tuple[int, float]]:
        """One mask before the classifier."""
        return {"hidden": (self.proj_dim, self.dropout)}

    def fit(self, x: Mapping[str, ArrayLike], y: ArrayLike, **kwargs: Any) -> FittedHead:
        """Train on arrays; keywords as `embcache.probe.train.fit`."""
        return fit(self, x, y, **kwargs)


def init_projections(generator: torch.Generator, dims: Mapping[str, int], width: int) -> Params:
    """``project.<backbone>``: a Linear from each backbone's features to ``width``."""
    params: Params = {}
    for backbone, dim in dims.items():
        params |= init_linear(generator, f"project.{backbone}", dim, width)
    return params


def project(params: Params, x: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The meta-embedding: every backbone projected to one width, concatenated; (K, B, width × backbones)."""
    return torch.cat([affine(params, f"project.{backbone}", features) for backbone, features in x.items()], dim=-1)
