"""Dynamic Visual Meta-Embedding: the paper's fusion of several backbones (Section 5.6, Listing 1), and two ablations.

``dvme`` is the listing to the letter. Choices where it is silent: one attention head, biases on query, key and value,
and the output projection of timm's ``Attention`` (a Linear(1, 1)).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from numpy.typing import ArrayLike

from embcache.errors import check_choice, check_number
from embcache.probe.attention import attend
from embcache.probe.fusion import Fusion, Params, init_projections, project
from embcache.probe.layers import affine, init_linear
from embcache.probe.train import FittedHead, fit
from embcache.probe.usage import ATTENTIONS


@dataclass(frozen=True)
class DVME(Fusion):
    """Listing 1: attention over the scalar components of the concatenation.

    ``proj_dim`` × backbones tokens of dimension 1.

    Attributes
    ----------
    proj_dim, dropout
        As `embcache.probe.fusion.Fusion`.
    attention : {"auto", "exact", "fast"}
        As `embcache.probe.attention.attend`. ``auto`` gives what ``exact`` gives, to a tolerance of 1e-5 of how much
        the components of an image vary (5e-5 was seen in gradients where one key is far from all others); how the same
        numbers are computed is no property of a head. So it is not among the hyperparameters that a request hashes, and
        a run made by exact attention answers for it. Whoever asks for one way wants to know about that way: the request
        says so, and the result is a run of its own.
    """

    attention: str = field(default="auto", metadata={"implicit": True})  # how it is computed, not what

    name: ClassVar[str] = "dvme"
    summary: ClassVar[str] = "fuses backbones: projections, attention over their components, hidden layer (Listing 1)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("--attention", self.attention, ATTENTIONS)

    def init_mixing(self, generator: torch.Generator) -> Params:
        """``attn.qkv``, a Linear(1, 3), and ``attn.proj``, a Linear(1, 1)."""
        return {**init_linear(generator, "attn.qkv", 1, 3), **init_linear(generator, "attn.proj", 1, 1)}

    def mix(self, params: Params, meta: torch.Tensor) -> torch.Tensor:
        """Self-attention of the components (K, B, N)."""
        weight, bias = params["attn.qkv.weight"], params["attn.qkv.bias"]  # (K, 3, 1), (K, 3)
        q, k, v = (meta * weight[:, i, :, None] + bias[:, i, None, None] for i in range(3))
        attended = attend(q, k, v, self.attention)
        return attended * params["attn.proj.weight"] + params["attn.proj.bias"][:, :, None]


@dataclass(frozen=True)
class DVMEIdentity(Fusion):
    """`DVME` with the attention replaced by the identity and all else kept. Attributes as there."""

    name: ClassVar[str] = "dvme-identity"
    summary: ClassVar[str] = "dvme without its attention and with all the rest"

    def init_mixing(self, generator: torch.Generator) -> Params:
        """None."""
        return {}

    def mix(self, params: Params, meta: torch.Tensor) -> torch.Tensor:
        """The identity."""
        return meta


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

    def __post_init__(self) -> None:
        check_number("--head-option proj_dim", self.proj_dim, 1, 100_000)

    def init(self, generator: torch.Generator, dims: Mapping[str, int], n_classes: int) -> Params:
        """``project.<backbone>`` and ``classifier``."""
        return {
            **init_projections(generator, dims, self.proj_dim),
            **init_linear(generator, "classifier", self.proj_dim * len(dims), n_classes),
        }

    def apply(
        self, params: Params, x: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Logits (K, B, C) from features (K, B, D) of each backbone."""
        return affine(params, "classifier", project(params, x))

    def dropouts(self) -> Mapping[str, tuple[int, float]]:
        """None."""
        return {}

    def fit(self, x: Mapping[str, ArrayLike], y: ArrayLike, **kwargs: Any) -> FittedHead:
        """Train on arrays; keywords as `embcache.probe.train.fit`."""
        return fit(self, x, y, **kwargs)


HEADS = (DVME, DVMENoAttention, DVMEIdentity)
