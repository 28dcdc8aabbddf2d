"""Self-attention over tokens of dimension one, exactly or in time linear in the number of tokens.

The paper's listing feeds the 1536 components of the meta-embedding as 1536 tokens of one number each (Listing 1), so
query, key and value of a token are scalars and the usual scale 1/√dim is 1. Then the output of token i is F(q_i) with
one function of one variable per image, F(t) = Σ_j e^(t k_j) v_j / Σ_j e^(t k_j). The fast way evaluates F at a few
nodes and interpolates it to the N queries (`attention_nodes`); the exact way evaluates all N² scores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from embcache.probe.heads.attention_nodes import MOST_NODES, interpolate, node_maps, place_nodes, plain_arithmetic
from embcache.probe.usage import ATTENTIONS

_PAD = 7

_BREAK_EVEN = 6
"""Nodes on N tokens cost less than N² scores up to N / 6 of them (`benchmarks/attention.py`)."""

_MAP_CELLS = 1 << 24  # of all maps, or factors of maps, held at a time: 64 MiB in float32


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kind: str = "auto") -> torch.Tensor:
    """``out_i = Σ_j softmax_j(q_i k_j) v_j`` for every row.

    Parameters
    ----------
    q, k, v : Tensor of shape (..., N), floating
        Scalar query, key and value of each of N tokens. Half precision is computed in float32.
    kind : {"auto", "exact", "fast"}
        ``exact`` evaluates all N² scores, block by block, without holding them at once (but in float64 on CUDA, for
        which torch has no such kernel). ``fast`` interpolates from as
        many nodes as the tolerance needs, `MOST_NODES` or N - 1 at most. ``auto`` does so where it costs less. A row
        that would need more nodes is computed exactly in either case.

    Returns
    -------
    Tensor of shape (..., N), of the dtype of ``q``

    Raises
    ------
    ValueError
        Unknown ``kind``.

    Notes
    -----
    Outputs and gradients of the three agree to `attention_nodes.TOLERANCE`, relative to how much they
    vary within a row, and to a few times what float32 rounds in either. With one key far from all others gradients of
    q and v were seen up to 5e-5 off. How a row is computed depends on that row alone, so it has the same result in any
    batch, to the bit on a CPU.
    """
    if kind not in ATTENTIONS:
        raise ValueError(f"attention is one of {ATTENTIONS}, not {kind!r}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    with plain_arithmetic(q):
        q_rows, k_rows, v_rows = (t.reshape(-1, q.shape[-1]).to(dtype) for t in (q, k, v))
        if kind == "exact":
            out = _exact(q_rows, k_rows, v_rows)
        else:
            out = _fast(q_rows, k_rows, v_rows, most_nodes(q.shape[-1], kind))
    return out.reshape(q.shape).to(q.dtype)


def most_nodes(tokens: int, kind: str) -> int:
    """How many nodes a row of so many tokens may have before it is computed exactly."""
    return {"exact": 0, "auto": min(MOST_NODES, tokens // _BREAK_EVEN), "fast": min(MOST_NODES, tokens - 1)}[kind]


@torch.no_grad()
def sum_attention(q: torch.Tensor, k: torch.Tensor, parts: int, kind: str = "auto") -> torch.Tensor:
    """Attention from each part of the tokens to each other part, summed over rows; no row's map is formed from nodes.

    A row's map is Sᵀ W with the shares S (M, N) that nodes have in queries and the weights W (M, N) that they give to
    tokens, so the sum over rows is one product of S and W of all rows, side by side. Both are summed over the tokens of
    a part first: with few parts the map is never formed at all.

    Shapes: q, k (R, N); returns (parts, parts).
    """
    tokens = q.shape[1]

    def in_parts(t: torch.Tensor, dim: int) -> torch.Tensor:
        each = tokens // parts
        return t if each == 1 else t.reshape(*t.shape[:dim], parts, each, *t.shape[dim + 1 :]).sum(dim + 1)

    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(dtype), k.to(dtype)
    total = torch.zeros(parts, parts, dtype=torch.float64, device=q.device)
    with plain_arithmetic(q):
        groups, left = place_nodes(q, k, k, most_nodes(tokens, kind))
        for group in groups:
            keys = k[group.rows]
            step = max(1, _MAP_CELLS // (tokens * group.t.shape[1]))
            for start in range(0, len(keys), step):
                shares, weights = (
                    in_parts(t, 2).flatten(0, 1) for t in node_maps(keys, group, slice(start, start + step))
                )
                total += shares.T @ weights
        for some in torch.split(left, max(1, _MAP_CELLS // tokens**2)):
            maps = (q[some, :, None] * k[some, None]).softmax(-1)
            total += in_parts(in_parts(maps, 2), 1).sum(0, dtype=torch.float64)
    return total


def _fast(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, most: int) -> torch.Tensor:
    """Attention of rows (R, N), by nodes where ``most`` of them are enough."""
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    groups, left = place_nodes(q, k, v, most, keep)
    if len(groups) == 1 and not len(left):  # the usual case: no row is moved
        return interpolate(q, k, v, groups[0])
    if not groups:
        return _exact(q, k, v)
    parts = [interpolate(q[g.rows], k[g.rows], v[g.rows], g) for g in groups]
    if len(left):
        parts.append(_exact(q[left], k[left], v[left]))
    order = torch.cat([*(g.rows for g in groups), left])
    return torch.cat(parts)[order.argsort()]


def _exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of rows (R, N) by all scores."""
    # (rows, 1 head, N tokens, dimension 1)
    q, k, v = (t[:, None, :, None] for t in (q, k, v))
    if q.device.type != "cpu":
        # CUDA's fused kernels want a dimension that divides by 8, and what is not fused holds all N² scores: zeros
        # add nothing to a score, and the values they make are dropped.
        q, k, v = (F.pad(t, (0, _PAD)) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[:, 0, :, 0]
