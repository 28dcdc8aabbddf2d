"""Self-attention over tokens of dimension one, exactly or in time linear in the number of tokens.

The paper's listing feeds the 1536 components of the meta-embedding as tokens of one number each (Listing 1), so query,
key and value are scalars and the scale 1/√dim is 1. The output of token i is F(q_i) with one function per image,
F(t) = Σ_j w_j(t) v_j, w_j(t) = e^(t k_j) / Z(t), Z(t) = Σ_j e^(t k_j). The fast way evaluates F at M nodes and
interpolates it to the N queries; the exact way evaluates all N² scores, which at 1536 tokens takes most of the time of
a fused probe (`benchmarks/attention.py`).

The keys are moved to M nodes too: e^(t k) is all but a polynomial of k, so Σ_j e^(t k_j) is a sum over the nodes, each
with a number such that sums of polynomials stay what they are. Then only M² scores are left, and what is done with N
tokens is sums and values of polynomials. Where queries are a linear function of keys, as those of one embedding are,
both have the same ones. How many polynomials e^(t k) needs follows from the largest score alone (`_REACHES`).

F is analytic wherever Z has no zero: in a strip of half-width π / range(k) about the real axis, and, since far from
t = 0 only the keys next to the largest weigh, in a cone that opens as |t| grows (a zero t + iy needs keys that are
π / 2y below the largest to weigh as much as it: N e^(-|t| π / 2y) ≥ 1). So beyond `_EVEN` nodes they are Chebyshev's in
the variable u of t = b sinh(u), b = 8 / range(k): evenly dense where the strip is narrow, ever sparser where the cone
is wide.

Keys in two heaps need up to three times the nodes of a normal sample. A row starts with the count of the latter; where
the tail of the Chebyshev coefficients of F or F', and where values are not the keys of the mean key or the weights of
the outermost keys, is above the tolerance, it is done again with twice the nodes. The decision needs the row alone, and
so does the rounding: no product is of several rows.

The gradient of q_i is g_i F'(q_i), F' = E[kv] - E[k] E[v], interpolated from its own values at the nodes: the
derivative of the interpolant of F would lose digits. Those of k and v are sums over queries of g_i q_i w_j(q_i)
(v_j - F(q_i)) and of g_i w_j(q_i); interpolating these makes them sums over nodes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
_EVEN = 64  # nodes up to which they need not be sparser anywhere, and queries may share the keys' polynomials
_MARGIN = 0.1  # coefficients behind the tail that is looked at add up to several times it
_NOISE = 2e-6  # of float32 sums over keys, relative to the largest term: no tail falls below it
_PARTS = 8  # of all keys, each counted in float32 and these sums in float64: a key far from all others may weigh most
_CELLS = 1 << 22  # numbers of a block that is worked on at a time: 16 MiB
_KEEP = 1 << 24  # numbers of a group that are kept for the way back rather than computed again: 64 MiB, twice
_COUNTS = (8, 16, 32, 64, 128, MOST_NODES)
_SCORES = (2.0, 20.0, 45.0, 110.0, 3000.0)
"""range(q) range(k) up to which each count but the last is tried first: most normal samples need no more."""

_REACHES = (0.55, 4.6, 24.0, 105.0, 430.0, 1740.0)
"""max |t| range(k) / 2 up to which the polynomials of k beyond each count add less than 1e-9 to the largest e^(t k)."""

_BREAK_EVEN = 6  # nodes on N tokens cost less than N² scores up to N / 6 of them (`benchmarks/attention.py`)
_MAP_CELLS = 1 << 24  # of all maps, or factors of maps, held at a time: 64 MiB in float32


def attend(q: Tensor, k: Tensor, v: Tensor, kind: str = "auto") -> Tensor:
    """``out_i = Σ_j softmax_j(q_i k_j) v_j`` for every row.

    ``exact`` evaluates all N² scores, block by block (but in float64 on CUDA, for which torch has no such kernel).
    ``fast`` interpolates from as many nodes as the tolerance needs, `MOST_NODES` or N - 1 at most; ``auto`` does so
    where it costs less. A row that would need more nodes is computed exactly in either case. Outputs and gradients
    agree to `TOLERANCE`. How a row is computed depends on that row alone, so it has the same result in any batch, to
    the bit on a CPU. Values that are the very tensor of keys cost less.

    Shapes: q, k, v (..., N), of which half precision is computed in float32; returns (..., N) of the dtype of ``q``.
    """
    if kind not in ATTENTIONS:
        raise ValueError(f"attention is one of {ATTENTIONS}, not {kind!r}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    with plain_arithmetic(q):
        q_rows, k_rows = (t.reshape(-1, q.shape[-1]).to(dtype) for t in (q, k))
        v_rows = k_rows if v is k else v.reshape(k_rows.shape).to(dtype)
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

    A row's map is Pᵀ C P' with M polynomials of its queries and of its keys (M, N) and a matrix C of coefficients, so
    the sum over rows is one product of P and C P' of all rows, side by side, summed over parts first.
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
            matrix = _chebyshev(group.t.shape[1], q.device)[2]
            for block in _blocks(len(group.t), tokens * len(matrix), _MAP_CELLS):
                between = matrix @ (_weights(group.scores[block]) * group.inverse[block, :, None]) @ matrix.T
                ours, theirs = (in_parts(p.products(block), 2) for p in (group.queries, group.keys))
                total += ours.flatten(0, 1).T @ torch.bmm(between.to(dtype), theirs).flatten(0, 1)
        for some in torch.split(left, max(1, _MAP_CELLS // tokens**2)):
            exact = (q[some, :, None] * k[some, None]).softmax(-1)
            total += in_parts(in_parts(exact, 2), 1).sum(0, dtype=torch.float64)
    return total


def _fast(q: Tensor, k: Tensor, v: Tensor, most: int) -> Tensor:
    """Attention of rows (R, N), by nodes where ``most`` of them are enough."""
    groups, left = place_nodes(q, k, v, most)
    if not groups:
        return _exact(q, k, v)
    given = None if v is k else v
    if len(groups) == 1 and not len(left):  # the usual case: no row is moved
        out: Tensor = _Interpolate.apply(q, k, given, groups[0])
        return out
    parts = [_Interpolate.apply(q[g.rows], k[g.rows], None if v is k else v[g.rows], g) for g in groups]
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


class _Products:
    """M polynomials at x (R, N): T_0 … T_(A-1) times T_0, T_A, T_2A …, where T_n are Chebyshev's.

    With the factors kept apart, sums and values of all M take memory and time of A + M / A.
    """

    def __init__(self, x: Tensor, count: int):
        self.x, self.count = x, count
        # Few factors, rather of the first kind: the others are multiplied one at a time.
        self.factors = next(a for a in range(1, count + 1) if count % a == 0 and a * a >= 2 * count)
        cells = (self.factors + count // self.factors) * x.shape[1]
        self._slices = list(_blocks(len(x), cells, _CELLS))
        self._kept = [self._at(x[rows]) for rows in self._slices] if len(x) * cells <= _KEEP else None

    def __getitem__(self, rows: Tensor) -> _Products:
        return _Products(self.x[rows], self.count)

    def _at(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = _polynomials(x, self.factors + 1)
        return first[:, :-1], _polynomials(first[:, -1], self.count // self.factors)

    def _blocks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        for number, rows in enumerate(self._slices):
            yield rows, *(self._at(self.x[rows]) if self._kept is None else self._kept[number])

    def products(self, rows: slice) -> Tensor:
        """All of some rows, (R, M, N)."""
        first, second = self._at(self.x[rows])
        return (second[:, :, None] * first[:, None]).flatten(1, 2)

    def interpolate(self, values: Tensor) -> Tensor:
        """Functions (R, functions, M), known at the nodes, at x: (R, functions, N)."""
        matrix = _chebyshev(self.count, values.device)[2].T
        coefficients = _bmm(values, _of_each(matrix, values)).to(self.x.dtype)
        coefficients = coefficients.view(len(values), -1, self.factors)  # (R, functions × M / A, A)
        out = self.x.new_empty(*values.shape[:2], self.x.shape[1])
        for rows, first, second in self._blocks():
            parts = _bmm(coefficients[rows], first).view(-1, *out.shape[1:2], *second.shape[1:])
            total = parts[:, :, 0]
            for n in range(1, second.shape[1]):
                total.addcmul_(parts[:, :, n], second[:, None, n])
            out[rows] = total
        return out

    def at_nodes(self, numbers: Tensor | None) -> Tensor:
        """For numbers (R, N), or ones, at x those at the nodes (R, M) that have the same sum with each polynomial."""
        sums = torch.zeros(len(self.x), self.count, dtype=torch.float64, device=self.x.device)
        for rows, first, second in self._blocks():
            given = second if numbers is None else second * numbers[rows, None]
            parts = _PARTS if numbers is None else 1
            for one, other in zip(given.chunk(parts, 2), first.chunk(parts, 2), strict=True):
                sums[rows] += _bmm(one, other.to(one.dtype).mT).flatten(1)
        return _bmm(sums[:, None], _of_each(_chebyshev(self.count, sums.device)[2], sums))[:, 0]


@dataclass(frozen=True, eq=False)
class NodeGroup:
    """Rows that have equally many nodes, M."""

    rows: Tensor  # (R,); their places, ascending
    queries: _Products
    keys: _Products  # those of the queries where these are a linear function of keys
    t: Tensor  # (R, M); nodes of queries
    k: Tensor  # (R, M); nodes of keys, less the mean key
    scores: Tensor  # (R, M); t times half the range of keys
    inverse: Tensor  # (R, M); 1 / sum over all N keys of e^(t k), that of the largest 1
    values: Tensor  # (R, 2, M); F less the mean of the row's ``v``, and F', at the nodes
    mean: Tensor  # (R, 1); of ``v``


@torch.no_grad()
def place_nodes(q: Tensor, k: Tensor, v: Tensor, most: int = MOST_NODES) -> tuple[list[NodeGroup], Tensor]:
    """Choose nodes for every row of q, k and v (R, N) and evaluate F there; also rows that need more than ``most``."""
    counts = [n for n in _COUNTS if n <= most]
    every = torch.arange(len(q), device=q.device)
    if not counts or not q.numel():
        return [], every
    y, half, _ = _within_one(k)
    mean = k.mean(1, keepdim=True)
    low, high = q.amin(1, keepdim=True), q.amax(1, keepdim=True)
    largest = torch.maximum(high, -low)
    # Queries that are a linear function of keys, but for rounding, differ from ``slope`` y by a number.
    slope = (high - low) / 2 * ((q - low) * (k - mean)).sum(1, keepdim=True).sign()
    rest = torch.addcmul(q, y, slope, value=-1)
    lowest, highest = rest.amin(1, keepdim=True), rest.amax(1, keepdim=True)
    rounding = 8 * torch.finfo(q.dtype).eps * largest + _MARGIN * TOLERANCE * (high - low)
    linear = (highest - lowest <= rounding)[:, 0].tolist()
    # The last place is for rows beyond every limit and for those that are not finite.
    tried = [(2 * (high - low) * half, _SCORES), (largest * half, _REACHES)]
    places = [torch.bucketize(size[:, 0], size.new_tensor(limits)) for size, limits in tried]
    waiting: list[list[int]] = [[] for _ in range(len(_COUNTS) + 1)]
    for row, place in enumerate(torch.maximum(*places).tolist()):
        waiting[place].append(row)
    groups = []
    for place, count in enumerate(counts):
        nodes = _chebyshev(count, q.device)[0]
        for even in (True, False):
            chosen = sorted(row for row in waiting[place] if even == (linear[row] and count <= _EVEN))
            if not chosen:
                continue
            rows = torch.tensor(chosen, device=q.device)
            some = slice(None) if len(rows) == len(q) else rows  # where it is all of them, nothing is moved
            keys = queries = _Products(y[some], count)
            if even:
                t = ((lowest + highest) / 2)[some].double() + slope[some].double() * nodes
            else:
                bend = _BEND / (2 * half[some]).clamp_min(1e-30)
                x, wide, middle = _within_one(_asinh(q[some] / bend))
                queries = _Products(x, count)
                t = bend.double() * torch.sinh(middle.double() + wide.double() * nodes)
            values = (mean[some], None) if v is k else (v[some].mean(1, keepdim=True), v[some])
            group, good = _evaluate(rows, queries, keys, t, half[some].double(), *values)
            passed = good.tolist()
            if not all(passed):
                waiting[place + 1] += rows[~good].tolist()
                fine = {name: value[good] for name, value in vars(group).items() if name != "queries"}
                group = NodeGroup(**fine, queries=fine["keys"] if even else group.queries[good])
            if any(passed):
                groups.append(group)
    left = sorted(row for rows in waiting[len(counts) :] for row in rows)
    return groups, torch.tensor(left, dtype=torch.int64, device=q.device)


def _evaluate(
    rows: Tensor, queries: _Products, keys: _Products, t: Tensor, half: Tensor, mean: Tensor, v: Tensor | None
) -> tuple[NodeGroup, Tensor]:
    """F and F' at given nodes, and whether these are enough, bool (R,); ``v`` is None where it is the keys.

    Keys range over twice ``half``. Here that is 2, and the largest value 1.
    """
    nodes, matrix, _ = _chebyshev(t.shape[1], t.device)
    scores = t * half  # of a key of 1
    number = keys.at_nodes(None if v is None else torch.ones_like(v, dtype=torch.float64))
    k = nodes - (number * nodes).sum(1, keepdim=True) / keys.x.shape[1]  # less the mean
    if v is None:
        scale, value = half, number * k
    else:
        v = v.double() - mean
        scale = v.abs().amax(1, keepdim=True).clamp_min(1e-30)
        value = keys.at_nodes(v) / scale
    terms = torch.stack([number, number * k, value, value * k], 2)
    sums = torch.cat([_bmm(_weights(scores[some]), terms[some]) for some in _blocks(len(t), len(nodes) ** 2, _CELLS)])
    inverse = 1 / sums[:, :, 0]
    mean_k, mean_v, mean_kv = (sums[:, :, 1:] * inverse[:, :, None]).unbind(2)  # (R, M) each
    values = torch.stack([mean_v, mean_kv - mean_k * mean_v], 1)
    watched = values
    if v is not None:
        outermost = torch.stack([mean_k, *(inverse * torch.exp(2 * s.clamp(max=0)) for s in (scores, -scores))], 1)
        watched = torch.cat([values, outermost / outermost.abs().amax(-1, keepdim=True)], 1)
    tail = _bmm(watched, _of_each(matrix[-(2 + len(nodes) // 8) :].T, watched)).abs().amax(-1)
    noise = _NOISE if mean.dtype == torch.float32 else _NOISE * 1e-6
    good = (tail <= _MARGIN * TOLERANCE * (watched.amax(-1) - watched.amin(-1)) + noise).all(1)
    values *= torch.stack([scale, scale * half], 1)
    return NodeGroup(rows, queries, keys, t, half * k, scores, inverse, values, mean), good


def _weights(scores: Tensor) -> Tensor:
    """e^(t k) at the nodes of keys, (R, M, M), 1 for the largest key of all, from ``scores`` of a group."""
    nodes = _chebyshev(scores.shape[1], scores.device)[0]
    return torch.addcmul(-scores.abs()[:, :, None], scores[:, :, None], nodes).exp_()


class _Interpolate(torch.autograd.Function):
    """Attention (R, N) of the rows of a group; ``v`` is None where values are the keys."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor | None, group: NodeGroup) -> Tensor:
        values = group.values if any(ctx.needs_input_grad) else group.values[:, :1]
        found = group.queries.interpolate(values)
        ctx.save_for_backward(v, found[:, -1])
        ctx.group = group
        return found[:, 0] + group.mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        v, slope = ctx.saved_tensors
        group: NodeGroup = ctx.group
        with plain_arithmetic(slope):
            # What the queries add up to at each node, Σ_i g_i share_m(q_i), over the node's Z: (R, M).
            pull = group.queries.at_nodes(upstream) * group.inverse
            pulled = pull * group.t
            terms = torch.stack([pull, pulled, pulled * group.values[:, 0]], 1)
            blocks = _blocks(len(terms), terms.shape[2] ** 2, _CELLS)
            sums = torch.cat([_bmm(terms[some], _weights(group.scores[some])) for some in blocks])
            of_1, of_v, less = sums.unbind(1)
            if v is None:
                grad = group.keys.interpolate((of_1 + group.k * of_v - less)[:, None])[:, 0]
                return upstream * slope, grad, None, None
            of_1, of_v, less = group.keys.interpolate(sums).unbind(1)
            return upstream * slope, (v - group.mean) * of_v - less, of_1, None


def _polynomials(x: Tensor, count: int) -> Tensor:
    """Chebyshev polynomials T_0 … T_(count-1) at x (R, N), (R, count, N), with the signs + + - - + + - - ….

    With these signs the recurrence is a sum, done in one pass.
    """
    out = x.new_empty(len(x), count, x.shape[1])
    each = out.unbind(1)
    each[0].fill_(1)
    if count > 1:
        each[1].copy_(x)
    for n in range(2, count):
        torch.addcmul(each[n - 2], each[n - 1], x, value=2 if n % 2 else -2, out=each[n])
    return out


@functools.cache
def _chebyshev(count: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Chebyshev's points (M,) and matrices (M, M) from values there to coefficients of T_n and of `_Products`."""
    n = torch.arange(count, dtype=torch.float64)
    angles = (n + 0.5) * (math.pi / count)
    matrix = torch.cos(n[:, None] * angles) * (2 / count)
    matrix[0] /= 2
    points = angles.cos()
    products = _Products(points[None], count).products(slice(1))[0]  # (products, points)
    return points.to(device), matrix.to(device), torch.linalg.inv(products).T.to(device)


def _bmm(one: Tensor, other: Tensor) -> Tensor:
    """Products of rows (R, …), with equal rounding in any batch: for a single one torch would use all threads."""
    if len(one) > 1:
        return torch.bmm(one, other)
    return torch.bmm(one.expand(2, -1, -1), other.expand(2, -1, -1))[:1]


def _of_each(matrix: Tensor, rows: Tensor) -> Tensor:
    """One matrix for a product with each of the rows: one product of all would be rounded by how many they are."""
    return matrix.expand(len(rows), -1, -1)


def _within_one(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (R, N) moved and scaled to [-1, 1], half their range and its middle, (R, 1)."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    half, middle = (high - low) / 2, (high + low) / 2
    return torch.sub(x, middle).div_(torch.where(half > 0, half, 1)).clamp_(-1, 1), half, middle


def _asinh(x: Tensor) -> Tensor:
    """The inverse of sinh; torch's own takes five times as long on a CPU."""
    squared = x * x
    root = torch.add(squared, 1).sqrt_().add_(1)
    return squared.div_(root).add_(x.abs()).log1p_().copysign_(x)


def _blocks(rows: int, cells: int, most: int) -> Iterator[slice]:
    """Slices of so many rows that their ``cells`` each are ``most`` in all."""
    step = max(1, most // cells)
    return (slice(start, start + step) for start in range(0, rows, step))
