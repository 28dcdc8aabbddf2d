"""Heads that are trained: layers on the features of one backbone, and fusions of several.

``dvme``, the paper's Dynamic Visual Meta-Embedding (Section 5.6), is Listing 1 to the letter. Choices where it is
silent: one attention head, biases on query, key and value, and the output projection of timm's ``Attention`` (a
Linear(1, 1)).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from embcache.errors import check_choice, check_number
from embcache.probe.heads import ATTENTIONS
from embcache.probe.heads.scalar_attention import attend
from embcache.probe.layers import Params, Tensors, affine, init_linear, layer_norm, standardize
from embcache.probe.stack import TrainedHead


@dataclass(frozen=True)
class LinearHead(TrainedHead):
    """Logits ``W x + b`` on the raw features of one backbone."""

    name = "linear"
    summary = "one linear layer on the features of one backbone (Section 5.5)"

    def init(self, generator: torch.Generator, dims: Mapping[str, int], n_classes: int) -> Params:
        """``classifier.weight`` of shape (C, D) and ``classifier.bias`` of shape (C,)."""
        (dim,) = dims.values()
        return init_linear(generator, "classifier", dim, n_classes)

    def apply(self, params: Params, x: Tensors, masks: Tensors | None = None) -> Tensor:
        """Logits (K, B, C) from features (K, B, D)."""
        (features,) = x.values()
        return affine(params, "classifier", features)


@dataclass(frozen=True)
class ConcatHead(TrainedHead):
    """One linear layer on the concatenation of standardized embeddings, so that no backbone outweighs another."""

    name = "concat"
    summary = "fuses backbones: one linear layer on their standardized features side by side"
    fuses = True
    standardized = True

    def init(self, generator: torch.Generator, dims: Mapping[str, int], n_classes: int) -> Params:
        """``classifier`` of shape (C, ΣD); columns in the order of ``dims``."""
        return init_linear(generator, "classifier", sum(dims.values()), n_classes)

    def apply(self, params: Params, x: Tensors, masks: Tensors | None = None) -> Tensor:
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
        hidden = init_linear(generator, "hidden", dim, self.hidden)
        return hidden | init_linear(generator, "classifier", self.hidden, n_classes)

    def apply(self, params: Params, x: Tensors, masks: Tensors | None = None) -> Tensor:
        """Logits (K, B, C) from features (K, B, D)."""
        (features,) = x.values()
        out = affine(params, "hidden", features).relu()
        return affine(params, "classifier", out if masks is None else out * masks["hidden"])

    def dropouts(self) -> Mapping[str, tuple[int, float]]:
        """One mask after the hidden layer."""
        return {"hidden": (self.hidden, self.dropout)}


@dataclass(frozen=True)
class Fusion(TrainedHead):
    """A Linear per backbone, concatenation, mixing (by subclasses), LayerNorm, Linear, ReLU, dropout, classifier."""

    proj_dim: int = 512  # width of each projection and of the last hidden layer
    dropout: float = 0.2  # rate before the classifier

    fuses = True

    def __post_init__(self) -> None:
        check_number("--head-option proj_dim", self.proj_dim, 1, 100_000)
        check_number("--head-option dropout", self.dropout, 0.0, 0.999)

    @abstractmethod
    def init_mixing(self, generator: torch.Generator) -> Params:
        """Parameters of the mixing of one head."""

    @abstractmethod
    def mix(self, params: Params, meta: Tensor) -> Tensor:
        """The meta-embedding (K, B, ``proj_dim`` × backbones), mixed; same shape."""

    def init(self, generator: torch.Generator, dims: Mapping[str, int], n_classes: int) -> Params:
        """Parameters named as the listing's layers; ``project.<backbone>`` stands for ``simclr_head`` and its like."""
        total = self.proj_dim * len(dims)
        return {
            **_init_projections(generator, dims, self.proj_dim),
            **self.init_mixing(generator),
            "normlayer.weight": torch.ones(total),
            "normlayer.bias": torch.zeros(total),
            **init_linear(generator, "proj_head", total, self.proj_dim),
            **init_linear(generator, "classifier", self.proj_dim, n_classes),
        }

    def embed(self, params: Params, x: Tensors) -> Tensor:
        """The fused embedding (K, B, ``proj_dim``): the hidden layer after ReLU, before dropout and classifier."""
        mixed = self.mix(params, project(params, x))
        return affine(params, "proj_head", layer_norm(params, "normlayer", mixed)).relu()

    def apply(self, params: Params, x: Tensors, masks: Tensors | None = None) -> Tensor:
        """Logits (K, B, C) from features (K, B, D) of each backbone."""
        out = self.embed(params, x)
        return affine(params, "classifier", out if masks is None else out * masks["hidden"])

    def dropouts(self) -> Mapping[str, tuple[int, float]]:
        """One mask before the classifier."""
        return {"hidden": (self.proj_dim, self.dropout)}


def _init_projections(generator: torch.Generator, dims: Mapping[str, int], width: int) -> Params:
    params: Params = {}
    for backbone, dim in dims.items():
        params |= init_linear(generator, f"project.{backbone}", dim, width)
    return params


def project(params: Params, x: Tensors) -> Tensor:
    """The meta-embedding: every backbone projected to one width, concatenated; (K, B, width × backbones)."""
    return torch.cat([affine(params, f"project.{backbone}", features) for backbone, features in x.items()], dim=-1)


@dataclass(frozen=True)
class DVME(Fusion):
    """Listing 1: attention over the components of the concatenation, ``proj_dim`` × backbones tokens of dimension 1."""

    attention: str = "auto"  # how it is computed, not what

    name = "dvme"
    summary = "fuses backbones: projections, attention over their components, hidden layer (Listing 1)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("--attention", self.attention, ATTENTIONS)

    def init_mixing(self, generator: torch.Generator) -> Params:
        """``attn.qkv``, a Linear(1, 3), and ``attn.proj``, a Linear(1, 1)."""
        return {**init_linear(generator, "attn.qkv", 1, 3), **init_linear(generator, "attn.proj", 1, 1)}

    def mix(self, params: Params, meta: Tensor) -> Tensor:
        """Self-attention of the components (K, B, N)."""
        weight, bias = params["attn.qkv.weight"], params["attn.qkv.bias"]  # (K, 3, 1), (K, 3)
        (w_q, w_k, w_v), (b_q, _, b_v) = weight.unsqueeze(3).unbind(1), bias[:, :, None, None].unbind(1)
        # Weights do not change with the bias of keys; their weight may be the queries', and that of values come last.
        attended = attend(meta * (w_k * w_q) + w_k * b_q, meta, meta, self.attention)
        scale = params["attn.proj.weight"]
        return attended * (scale * w_v) + (scale * b_v + params["attn.proj.bias"][:, :, None])


@dataclass(frozen=True)
class DVMEIdentity(Fusion):
    """`DVME` with the attention replaced by the identity and all else kept."""

    name = "dvme-identity"
    summary = "dvme without its attention and with all the rest"

    def init_mixing(self, generator: torch.Generator) -> Params:
        """None."""
        return {}

    def mix(self, params: Params, meta: Tensor) -> Tensor:
        """The identity."""
        return meta


@dataclass(frozen=True)
class DVMENoAttention(TrainedHead):
    """The ablation of Section 6.2: "the meta-embedding is directly connected to the linear classifier"."""

    proj_dim: int = 512  # width of each projection

    name = "dvme-noattn"
    summary = "fuses backbones: projections, concatenation, classifier (the ablation of Section 6.2)"
    fuses = True

    def __post_init__(self) -> None:
        check_number("--head-option proj_dim", self.proj_dim, 1, 100_000)

    def init(self, generator: torch.Generator, dims: Mapping[str, int], n_classes: int) -> Params:
        """``project.<backbone>`` and ``classifier``."""
        params = _init_projections(generator, dims, self.proj_dim)
        return params | init_linear(generator, "classifier", self.proj_dim * len(dims), n_classes)

    def apply(self, params: Params, x: Tensors, masks: Tensors | None = None) -> Tensor:
        """Logits (K, B, C) from features (K, B, D) of each backbone."""
        return affine(params, "classifier", project(params, x))


@dataclass(frozen=True)
class DVMEToken(Fusion):
    """timm's ``Attention(dim=proj_dim, num_heads=1, qkv_bias=True)`` over one token per backbone, then as `DVME`."""

    name = "dvme-token"
    summary = "dvme with attention over one token per backbone (Section 5.6 as its text reads)"

    def init_mixing(self, generator: torch.Generator) -> Params:
        """``attn.qkv``, a Linear(D, 3D), and ``attn.proj``, a Linear(D, D), for tokens of D = ``proj_dim`` numbers."""
        width = self.proj_dim
        qkv = init_linear(generator, "attn.qkv", width, 3 * width)
        return qkv | init_linear(generator, "attn.proj", width, width)

    def mix(self, params: Params, meta: Tensor) -> Tensor:
        """Self-attention of the tokens that lie one after the other in (K, B, D × backbones)."""
        heads, batch, total = meta.shape
        width = self.proj_dim
        # One affine map for all tokens of all rows: (K, B × backbones, D) to (K, B × backbones, 3D).
        qkv = affine(params, "attn.qkv", meta.reshape(heads, -1, width)).view(heads, batch, -1, 3, width)
        q, k, v = qkv.unbind(3)  # (K, B, backbones, D)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(width)).softmax(-1)  # (K, B, backbones, backbones)
        attended = (weights @ v).reshape(heads, -1, width)
        return affine(params, "attn.proj", attended).view(heads, batch, total)
