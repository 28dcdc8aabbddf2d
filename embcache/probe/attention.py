"""Self-attention over tokens of dimension one: scores are products of scalars.

The paper's listing feeds the 1536 components of the meta-embedding as 1536 tokens of one number each (Listing 1), so
query, key and value of a token are scalars and the usual scale 1/√dim is 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_PAD = 7

ATTENTIONS = ("exact",)
"""How attention can be computed."""


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kind: str = "exact") -> torch.Tensor:
    """``out_i = Σ_j softmax_j(q_i k_j) v_j`` for every row.

    Parameters
    ----------
    q, k, v : Tensor of shape (..., N), floating
        Scalar query, key and value of each of N tokens.
    kind : {"exact"}
        ``exact`` evaluates all N² scores, block by block, never holding them at once.

    Returns
    -------
    Tensor of shape (..., N)

    Raises
    ------
    ValueError
        Unknown ``kind``.
    """
    if kind != "exact":
        raise ValueError(f"attention is one of {ATTENTIONS}, not {kind!r}")
    shape = q.shape
    # (rows, 1 head, N tokens, dimension 1)
    q, k, v = (t.reshape(-1, 1, shape[-1], 1) for t in (q, k, v))
    if q.device.type != "cpu":
        # CUDA's fused kernels want a dimension that divides by 8, and what is not fused holds all N² scores: zeros
        # add nothing to a score, and the values they make are dropped.
        q, k, v = (F.pad(t, (0, _PAD)) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., 0].reshape(shape)
