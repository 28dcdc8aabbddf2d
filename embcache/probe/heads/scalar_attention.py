"""Self-attention over tokens of dimension one, exactly or in time linear in the number of tokens.

The paper's listing feeds the 1536 components of the meta-embedding as tokens of one number each (Listing 1), so query,
key and value are scalars and the scale 1/√dim is 1. The output of token i is F(q_i) with one function per image,
F(t) = Σ_j w_j(t) v_j, w_j(t) = e^(t k_j) / Z(t), Z(t) = Σ_j e^(t k_j). The fast way evaluates F at a few nodes and
interpolates it to the N queries; the exact way evaluates all N² scores, which at 1536 tokens takes most of the time of
a fused probe (`benchmarks/attention.py`).

F is analytic wherever Z has no zero: in a strip of half-width π / range(k) about the real axis, and, since far from
t = 0 only the keys next to the largest weigh, in a cone that opens as |t| grows (a zero t + iy needs keys that are
π / 2y below the largest to weigh as much as it: N e^(-|t| π / 2y) ≥ 1). So the nodes are Chebyshev's in the variable u
of t = b sinh(u), b = 8 / range(k): evenly dense where the strip is narrow, ever sparser where the cone is wide.

Keys in two heaps need up to three times the nodes of a normal sample. A row starts with the count of the latter; where
the tail of the Chebyshev coefficients of F, its slope, the mean key or the weights of the outermost keys is above the
tolerance, it is done again with twice the nodes. The decision needs the row alone, and so does the rounding: no product
is of several rows.

The gradient of q_i is g_i F'(q_i), F' = E[kv] - E[k] E[v], interpolated from its own values at the nodes: the
derivative of the interpolant of F would lose digits. Those of k and v are sums over queries of g_i q_i w_j(q_i)
(v_j - F(q_i)) and of g_i w_j(q_i); interpolating these makes them sums over nodes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from embcache.probe.heads import ATTENTIONS
from embcache.probe.layers import plain_arithmetic

TOLERANCE = 1e-5
"""Error of fast attention, relative to how much outputs, or a gradient, vary within a row; on top of float32's own.

The tail is an estimate, no bound: with a key far from all others 5e-5 was seen.
"""

MOST_NODES = 256  # beyond it float32 loses more in the recurrence than further nodes would win

_BEND = 8.0  # range(k) times the t where nodes begin to be sparser; found best, or nearly so, for seven kinds of keys
_MARGIN = 0.1  # coefficients behind the tail that is looked at add up to several times it
_NOISE = 1e-6  # of float32 sums over keys, relative to the largest term: no tail falls below it
_FLOOR = -60.0  # e^-60 of the largest weight is none; results below float32's normal range take ten times as long
_CELLS = 1 << 22  # numbers of a block that is worked on at a time: 16 MiB
_KEEP = 1 << 24  # numbers of a group that are kept for the way back rather than computed again: 64 MiB, twice
_COUNTS = (6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, MOST_NODES)
_WIDTHS = (0.05, 0.18, 0.9, 1.6, 2.6, 3.4, 4.8, 6.4, 9.0, 12.0, 16.0)
"""Width in u up to which each count but the last is tried first: nine in ten normal samples need no more."""

_BREAK_EVEN = 6  # nodes on N tokens cost less than N² scores up to N / 6 of them (`benchmarks/attention.py`)
_MAP_CELLS = 1 << 24  # of all maps, or factors of maps, held at a time: 64 MiB in float32


def attend(q: Tensor, k: Tensor, v: Tensor, kind: str = "auto") -> Tensor:
    """``out_i = Σ_j softmax_j(q_i k_j) v_j`` for every row.

    ``exact`` evaluates all N² scores, block by block (but in float64 on CUDA, for which torch has no such kernel).
    ``fast`` interpolates from as many nodes as the tolerance needs, `MOST_NODES` or N - 1 at most; ``auto`` does so
    where it costs less. A row that would need more nodes is computed exactly in either case. Outputs and gradients
    agree to `TOLERANCE`. How a row is computed depends on that row alone, so it has the same result in any batch, to
    the bit on a CPU.

    Shapes: q, k, v (..., N), of which half precision is computed in float32; returns (..., N) of the dtype of ``q``.
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
def sum_attention(q: Tensor, k: Tensor, parts: int, kind: str = "auto") -> Tensor:
    """Attention from each part of the tokens to each other part, summed over rows; (R, N) each to (parts, parts).

    A row's map is Sᵀ W with the shares S (M, N) that nodes have in queries and the weights W (M, N) that they give to
    tokens, so the sum over rows is one product of S and W of all rows, side by side, summed over parts first.
    """
    tokens = q.shape[1]

    def in_parts(t: Tensor, dim: int) -> Tensor:
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
                maps = _node_maps(keys, group, slice(start, start + step))
                shares, weights = (in_parts(t, 2).flatten(0, 1) for t in maps)
                total += shares.T @ weights
        for some in torch.split(left, max(1, _MAP_CELLS // tokens**2)):
            exact = (q[some, :, None] * k[some, None]).softmax(-1)
            total += in_parts(in_parts(exact, 2), 1).sum(0, dtype=torch.float64)
    return total


def _fast(q: Tensor, k: Tensor, v: Tensor, most: int) -> Tensor:
    """Attention of rows (R, N), by nodes where ``most`` of them are enough."""
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    groups, left = place_nodes(q, k, v, most, keep)
    if len(groups) == 1 and not len(left):  # the usual case: no row is moved
        out: Tensor = _Interpolate.apply(q, k, v, groups[0])
        return out
    if not groups:
        return _exact(q, k, v)
    parts = [_Interpolate.apply(q[g.rows], k[g.rows], v[g.rows], g) for g in groups]
    if len(left):
        parts.append(_exact(q[left], k[left], v[left]))
    order = torch.cat([*(g.rows for g in groups), left])
    return torch.cat(parts)[order.argsort()]


def _exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # (rows, 1 head, N tokens, dimension 1)
    q, k, v = (t[:, None, :, None] for t in (q, k, v))
    if q.device.type != "cpu":
        # CUDA's fused kernels want a dimension that divides by 8, and what is not fused holds all N² scores: zeros
        # add nothing to a score, and the values they make are dropped.
        q, k, v = (F.pad(t, (0, 7)) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[:, 0, :, 0]


@dataclass(frozen=True, eq=False)
class NodeGroup:
    """Rows that have equally many nodes, M."""

    rows: Tensor  # (R,); their places, ascending
    x: Tensor  # (R, N); queries in the variable of interpolation, within [-1, 1]
    t: Tensor  # (R, M); nodes, as queries
    inverse: Tensor  # (R, M); 1 / Σ_j e^(t k_j - max_j t k_j)
    values: Tensor  # (R, 2, M); F less the mean of the row's ``v``, and F', at the nodes
    weights: Tensor | None  # (R, M, N)


@torch.no_grad()
def place_nodes(
    q: Tensor, k: Tensor, v: Tensor, most: int = MOST_NODES, keep: bool = False
) -> tuple[list[NodeGroup], Tensor]:
    """Choose nodes for every row of q, k and v (R, N) and evaluate F there; also rows that need more than ``most``."""
    counts = [n for n in _COUNTS if n <= most]
    every = torch.arange(len(q), device=q.device)
    if not counts or not q.numel():
        return [], every
    k, v = _centered(k), _centered(v)
    smallest, largest = k.amin(1, keepdim=True), k.amax(1, keepdim=True)
    bend = _BEND / (largest - smallest).clamp_min(1e-30)
    u = _asinh(q / bend)
    low, high = u.amin(1, keepdim=True), u.amax(1, keepdim=True)
    half, middle = (high - low) / 2, (high + low) / 2
    x = u.sub_(middle).div_(torch.where(half > 0, half, 1)).clamp_(-1, 1)
    # The last place is for rows beyond every width and for those that are not finite.
    limits = torch.tensor(_WIDTHS, dtype=q.dtype, device=q.device)
    first = torch.bucketize((2 * half)[:, 0], limits).tolist()
    waiting: list[list[int]] = [[] for _ in range(len(_COUNTS) + 1)]
    for row, place in enumerate(first):
        waiting[place].append(row)
    groups = []
    for place, count in enumerate(counts):
        if not waiting[place]:
            continue
        waiting[place].sort()  # rows that were tried with fewer nodes came behind the others
        rows = torch.tensor(waiting[place], device=q.device)
        some = slice(None) if len(rows) == len(q) else rows  # where it is all of them, nothing is moved
        t = bend[some] * torch.sinh(middle[some] + half[some] * _chebyshev(count, q.dtype, q.device)[0])
        group, good = _evaluate(rows, x[some], t, k[some], v[some], keep)
        passed = good.tolist()
        if not all(passed):
            # Again with twice the count, with the last one, or not by nodes.
            again = min(place + 2, len(counts) - 1) if place < len(counts) - 1 else len(counts)
            waiting[again] += [row for row, fine in zip(waiting[place], passed, strict=True) if not fine]
            group = NodeGroup(*(None if t is None else t[good] for t in vars(group).values()))  # type: ignore[arg-type]
        if len(group.rows):
            groups.append(group)
    left = sorted(row for rows in waiting[len(counts) :] for row in rows)
    return groups, torch.tensor(left, dtype=torch.int64, device=q.device)


def _evaluate(rows: Tensor, x: Tensor, t: Tensor, k: Tensor, v: Tensor, keep: bool) -> tuple[NodeGroup, Tensor]:
    """F and F' at given nodes, and whether these are enough, bool (R,); ``k`` and ``v`` are centered."""
    keys, low, high = _from_extremes(k)
    terms = k.new_empty(len(k), 4, k.shape[1])
    terms[:, 0], terms[:, 1], terms[:, 2] = 1, v, k
    torch.mul(k, v, out=terms[:, 3])
    sums = t.new_empty(len(t), 4, t.shape[1])
    weights = _exponentials(t, keys) if keep and t.numel() * k.shape[1] <= _KEEP else None
    for block in _blocks(len(t), t.shape[1] * k.shape[1]):
        some = _exponentials(t[block], keys[block]) if weights is None else weights[block]
        torch.bmm(terms[block], some.mT, out=sums[block])
    inverse = 1 / sums[:, :1]
    mean_v, mean_k, mean_kv = (sums[:, 1:] * inverse).unbind(1)  # (R, M) each
    slope = mean_kv - mean_k * mean_v
    inverse = inverse[:, 0]
    span = high - low
    # Weights of the largest and of the smallest key.
    outermost = [inverse * torch.exp(t.clamp(max=0) * span), inverse * torch.exp(-t.clamp(min=0) * span)]
    watched = torch.stack([mean_v, slope, mean_k, *outermost], 1)  # (R, 5, M)
    largest_k, largest_v = torch.maximum(high, -low), v.abs().amax(1, keepdim=True)
    size = torch.cat([largest_v, largest_k * largest_v, largest_k, *(torch.zeros_like(high) for _ in outermost)], 1)
    return NodeGroup(rows, x, t, inverse, torch.stack([mean_v, slope], 1), weights), _resolved(watched, size)


def _resolved(values: Tensor, size: Tensor) -> Tensor:
    """Whether functions (R, functions, M) end in negligible Chebyshev coefficients; ``size``: their largest terms."""
    count = values.shape[-1]
    tail = _coefficients(values)[..., -(2 + count // 8) :].abs().amax(-1)
    spread = values.amax(-1) - values.amin(-1)
    noise = _NOISE if values.dtype == torch.float32 else _NOISE * 1e-6
    return (tail <= _MARGIN * TOLERANCE * spread + noise * (size + values.abs().amax(-1))).all(1)


class _Interpolate(torch.autograd.Function):
    """Attention (R, N) of the rows of a group; the way back needs nothing that is larger than the queries."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: NodeGroup) -> Tensor:
        count = group.t.shape[1]
        coefficients = _coefficients(group.values)  # (R, 2, M)
        both = q.new_empty(len(q), 2, q.shape[1])  # F and F' at the queries
        kept = _polynomials(group.x, count) if group.weights is not None else None
        for block in _blocks(len(q), count * q.shape[1]):
            some = _polynomials(group.x[block], count) if kept is None else kept[block]
            torch.bmm(coefficients[block], some, out=both[block])
        ctx.save_for_backward(k, v, both[:, 1])
        ctx.group, ctx.polynomials = group, kept
        return both[:, 0] + v.mean(1, keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        k, v, slope = ctx.saved_tensors
        with plain_arithmetic(k):
            grad_k, grad_v = _gradients(upstream, k, v, ctx.group, ctx.polynomials)
        return upstream * slope, grad_k, grad_v, None


def _gradients(
    upstream: Tensor, k: Tensor, v: Tensor, group: NodeGroup, polynomials: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of keys, Σ_i g_i q_i w_j(q_i) (v_j - F(q_i)), and of values, Σ_i g_i w_j(q_i); (R, N) each."""
    k, v, count = _centered(k), _centered(v), group.t.shape[1]
    keys = None if group.weights is not None else _from_extremes(k)[0]
    cosines = _chebyshev(count, k.dtype, k.device)[1]
    grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
    for block in _blocks(len(k), count * k.shape[1]):
        t, values = group.t[block], group.values[block]
        basis = _polynomials(group.x[block], count) if polynomials is None else polynomials[block]
        # (R, M, N), times Z
        weights = _exponentials(t, keys[block]) if keys is not None else cast("Tensor", group.weights)[block]
        # What the queries say together at each node, Σ_i g_i share_m(q_i), over the node's Z: (R, M).
        pull = torch.bmm(torch.bmm(upstream[block, None], basis.mT), _of_each(cosines, t))[:, 0] * group.inverse[block]
        # Term by term: where one key has all the weight, v_j - F is exactly 0, and t may be large.
        pulled = (v[block, None] - values[:, 0, :, None]).mul_(weights)
        # Σ_j w_j (v_j - F) is 0: what it is instead is the rounding of F, which t multiplies.
        missing = pulled.sum(-1) * group.inverse[block]
        both = torch.bmm(torch.stack([pull, pull * t * missing], 1), weights)
        grad_v[block] = both[:, 0]
        torch.baddbmm(both[:, 1:], (pull * t)[:, None], pulled, beta=-1, out=grad_k[block, None])
    return grad_k, grad_v


def _node_maps(k: Tensor, group: NodeGroup, block: slice) -> tuple[Tensor, Tensor]:
    """Attention of some rows of a group as two factors (rows, M, N); ``k`` (R, N) holds the keys of all of its rows."""
    count = group.t.shape[1]
    basis = _polynomials(group.x[block], count)
    shares = torch.bmm(_of_each(_chebyshev(count, k.dtype, k.device)[1].T, basis), basis)
    weights = _exponentials(group.t[block], _from_extremes(_centered(k[block]))[0])
    return shares, weights * group.inverse[block, :, None]


def _exponentials(t: Tensor, keys: Tensor) -> Tensor:
    """e^(t k - max t k), (R, M, N), of nodes (R, M) and keys (R, 2, N); one of the two products is 0: one rounding."""
    return torch.bmm(torch.stack([t.clamp(min=0), t.clamp(max=0)], 2), keys).clamp_(min=_FLOOR).exp_()


def _from_extremes(k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (R, N) less the largest and less the smallest, (R, 2, N), and the smallest and the largest, (R, 1)."""
    low, high = k.amin(1, keepdim=True), k.amax(1, keepdim=True)
    keys = k.new_empty(len(k), 2, k.shape[1])
    torch.sub(k, high, out=keys[:, 0])
    torch.sub(k, low, out=keys[:, 1])
    return keys, low, high


def _polynomials(x: Tensor, count: int) -> Tensor:
    """Chebyshev polynomials T_0 … T_(count-1) at x (R, N), (R, count, N), with the signs + + - - + + - - ….

    With these signs, which the matrix of `_chebyshev` has too, the recurrence is a sum, done in one pass.
    """
    out = x.new_empty(len(x), count, x.shape[1])
    out[:, 0], out[:, 1] = 1, x
    twice = 2 * x
    for n in range(2, count):
        torch.addcmul(out[:, n - 2], out[:, n - 1], twice, value=1 if n % 2 else -1, out=out[:, n])
    return out


@functools.cache
def _chebyshev(count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Chebyshev's points (M,) and the matrix (M, M) from values there to coefficients of `_polynomials`."""
    n = torch.arange(count, dtype=torch.float64)
    angles = (n + 0.5) * (math.pi / count)
    matrix = torch.cos(n[:, None] * angles) * (2 / count)
    matrix[0] /= 2
    matrix[(n % 4) >= 2] *= -1
    return angles.cos().to(device, dtype), matrix.to(device, dtype)


def _coefficients(values: Tensor) -> Tensor:
    """Chebyshev coefficients, in `_polynomials`, of functions (R, functions, M) known at the nodes; same shape."""
    return torch.bmm(values, _of_each(_chebyshev(values.shape[-1], values.dtype, values.device)[1].T, values))


def _of_each(matrix: Tensor, rows: Tensor) -> Tensor:
    """One matrix for a product with each of the rows: one product of all would be rounded by how many they are."""
    return matrix.expand(len(rows), -1, -1)


def _asinh(x: Tensor) -> Tensor:
    """The inverse of sinh; torch's own takes five times as long on a CPU."""
    squared = x * x
    root = torch.add(squared, 1).sqrt_().add_(1)
    return squared.div_(root).add_(x.abs()).log1p_().copysign_(x)


def _centered(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def _blocks(rows: int, cells: int) -> Iterator[slice]:
    """Slices of so many rows that their ``cells`` each stay in a core's cache."""
    step = max(1, _CELLS // cells)
    return (slice(start, start + step) for start in range(0, rows, step))
