"""Dynamic Visual Meta-Embedding: the paper's fusion of several backbones (Section 5.6, Listing 1), and two ablations.

``dvme`` is the listing to the letter. Choices where it is silent: one attention head, biases on query, key and value,
and the output projection of timm's ``Attention`` (a Linear(1, 1)).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from numpy.typing import ArrayLike

from embcache.probe.attention import attend
from embcache.probe.layers import affine, init_linear, layer_norm
from embcache.probe.train import FittedHead, fit

Params = dict[str, torch.Tensor]


@dataclass(frozen=True)
class DVME:
    """Listing 1: a Linear per backbone, concatenation, attention, LayerNorm, Linear, ReLU, dropout, classifier.

    Attention runs over the scalar components of the concatenation: ``proj_dim`` × backbones tokens of dimension 1.

    Attributes
    ----------
    proj_dim : int
        Width of each projection and of the last hidden layer.
    dropout : float
        Rate before the classifier.
    """

    proj_dim: int = 512
    dropout: float = 0.2

    name: ClassVar[str] = "dvme"
    summary: ClassVar[str] = "fuses backbones: projections, attention over their components, hidden layer (Listing 1)"
    fuses: ClassVar[bool] = True

    def init(self, generator: torch.Generator, dims: Mapping[str, int], n_classes: int) -> Params:
        """Parameters named as the listing's layers; ``project.<backbone>`` stands for ``simclr_head`` and its like."""
        return {
            **_init_projections(generator, dims, self.proj_dim),
            **init_linear(generator, "attn.qkv", 1, 3),
            **init_linear(generator, "attn.proj", 1, 1),
            **_init_hidden(generator, self.proj_dim, len(dims), n_classes),
        }

    def apply(
        self, params: Params, x: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Logits (K, B, C) from features (K, B, D) of each backbone."""
        tokens = _project(params, x)  # (K, B, N): N = proj_dim × backbones tokens of dimension 1
        weight, bias = params["attn.qkv.weight"], params["attn.qkv.bias"]  # (K, 3, 1), (K, 3)
        q, k, v = (tokens * weight[:, i, :, None] + bias[:, i, None, None] for i in range(3))
        attended = attend(q, k, v)
        attended = attended * params["attn.proj.weight"] + params["attn.proj.bias"][:, :, None]
        return _hidden(params, attended, masks)

    def dropouts(self) -> Mapping[str, tuple[int, float]]:
        """One mask before the classifier."""
        return {"hidden": (self.proj_dim, self.dropout)}

    def fit(self, x: Mapping[str, ArrayLike], y: ArrayLike, **kwargs: Any) -> FittedHead:
        """Train on arrays; keywords as `embcache.probe.train.fit`."""
        return fit(self, x, y, **kwargs)


@dataclass(frozen=True)
class DVMEIdentity:
    """`DVME` with the attention replaced by the identity and all else kept.

    Attributes
    ----------
    proj_dim : int
        Width of each projection and of the last hidden layer.
    dropout : float
        Rate before the classifier.
    """

    proj_dim: int = 512
    dropout: float = 0.2

    name: ClassVar[str] = "dvme-identity"
    summary: ClassVar[str] = "dvme without its attention and with all the rest"
    fuses: ClassVar[bool] = True

    def init(self, generator: torch.Generator, dims: Mapping[str, int], n_classes: int) -> Params:
        """As `DVME.init`, without ``attn``."""
        return {
            **_init_projections(generator, dims, self.proj_dim),
            **_init_hidden(generator, self.proj_dim, len(dims), n_classes),
        }

    def apply(
        self, params: Params, x: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Logits (K, B, C) from features (K, B, D) of each backbone."""
        return _hidden(params, _project(params, x), masks)

    def dropouts(self) -> Mapping[str, tuple[int, float]]:
        """One mask before the classifier."""
        return {"hidden": (self.proj_dim, self.dropout)}

    def fit(self, x: Mapping[str, ArrayLike], y: ArrayLike, **kwargs: Any) -> FittedHead:
        """Train on arrays; keywords as `embcache.probe.train.fit`."""
        return fit(self, x, y, **kwargs)


@dataclass(frozen=True)
class DVMENoAttention:
    """The ablation of Section 6.2: "the meta-embedding is directly connected to the linear classifier".

    Attributes
    ----------
    proj_dim : int
        Width of each projection.
    """

    proj_dim: int = 512

    name: ClassVar[str] = "dvme-noattn"
    summary: ClassVar[str] = "fuses backbones: projections, concatenation, classifier (the ablation of Section 6.2)"
    fuses: ClassVar[bool] = True

    def init(self, generator: torch.Generator, dims: Mapping[str, int], n_classes: int) -> Params:
        """``project.<backbone>`` and ``classifier``."""
        return {
            **_init_projections(generator, dims, self.proj_dim),
            **init_linear(generator, "classifier", self.proj_dim * len(dims), n_classes),
        }

    def apply(
        self, params: Params, x: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Logits (K, B, C) from features (K, B, D) of each backbone."""
        return affine(params, "classifier", _project(params, x))

    def dropouts(self) -> Mapping[str, tuple[int, float]]:
        """None."""
        return {}

    def fit(self, x: Mapping[str, ArrayLike], y: ArrayLike, **kwargs: Any) -> FittedHead:
        """Train on arrays; keywords as `embcache.probe.train.fit`."""
        return fit(self, x, y, **kwargs)


def _init_projections(generator: torch.Generator, dims: Mapping[str, int], width: int) -> Params:
    params: Params = {}
    for backbone, dim in dims.items():
        params |= init_linear(generator, f"project.{backbone}", dim, width)
    return params


def _init_hidden(generator: torch.Generator, width: int, n_backbones: int, n_classes: int) -> Params:
    total = width * n_backbones
    return {
        "normlayer.weight": torch.ones(total),
        "normlayer.bias": torch.zeros(total),
        **init_linear(generator, "proj_head", total, width),
        **init_linear(generator, "classifier", width, n_classes),
    }


def _project(params: Params, x: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The meta-embedding: every backbone projected to one width, concatenated; (K, B, width × backbones)."""
    return torch.cat([affine(params, f"project.{backbone}", features) for backbone, features in x.items()], dim=-1)


def _hidden(params: Params, meta: torch.Tensor, masks: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    """LayerNorm, Linear, ReLU, dropout, classifier: the end of the listing."""
    out = affine(params, "proj_head", layer_norm(params, "normlayer", meta)).relu()
    if masks is not None:
        out = out * masks["hidden"]
    return affine(params, "classifier", out)


HEADS = (DVME, DVMENoAttention, DVMEIdentity)
