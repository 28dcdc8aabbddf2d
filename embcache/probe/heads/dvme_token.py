"""DVME as Section 5.6 reads in words: attention over the backbones, one token each.

The listing reshapes the meta-embedding to (batch, components, 1), so its tokens are single numbers. The text speaks of
attention between embeddings; this head does that, and keeps the rest of the listing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from embcache.probe.fusion import Fusion, Params
from embcache.probe.layers import affine, init_linear


@dataclass(frozen=True)
class DVMEToken(Fusion):
    """Self-attention over one token of ``proj_dim`` numbers per backbone, one attention head, then as `DVME`.

    The layer is timm's ``Attention(dim=proj_dim, num_heads=1, qkv_bias=True)``. Attributes as
    `embcache.probe.fusion.Fusion`.
    """

    name: ClassVar[str] = "dvme-token"
    summary: ClassVar[str] = "dvme with attention over one token per backbone (Section 5.6 as its text reads)"

    def init_mixing(self, generator: torch.Generator) -> Params:
        """``attn.qkv``, a Linear(D, 3D), and ``attn.proj``, a Linear(D, D), for tokens of D = ``proj_dim`` numbers."""
        width = self.proj_dim
        return {
            **init_linear(generator, "attn.qkv", width, 3 * width),
            **init_linear(generator, "attn.proj", width, width),
        }

    def mix(self, params: Params, meta: torch.Tensor) -> torch.Tensor:
        """Self-attention of the tokens that lie one after the other in (K, B, D × backbones)."""
        heads, batch, total = meta.shape
        width = self.proj_dim
        # One affine map for all tokens of all rows: (K, B × backbones, D) to (K, B × backbones, 3D).
        qkv = affine(params, "attn.qkv", meta.reshape(heads, -1, width)).view(heads, batch, -1, 3, width)
        q, k, v = qkv.unbind(3)  # (K, B, backbones, D)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(width)).softmax(-1)  # (K, B, backbones, backbones)
        attended = (weights @ v).reshape(heads, -1, width)
        return affine(params, "attn.proj", attended).view(heads, batch, total)


HEADS = (DVMEToken,)
