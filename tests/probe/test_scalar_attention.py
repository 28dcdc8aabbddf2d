"""Attention over scalar tokens against its definition in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embcache.probe.heads import ATTENTIONS, make_head
from embcache.probe.heads.scalar_attention import attend, most_nodes, place_nodes, sum_attention
from embcache.probe.schedule import Schedule
from embcache.probe.stack import Job, train_heads


def weights_by_definition(q: torch.Tensor, k: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.softmax(q.to(dtype)[..., :, None] * k.to(dtype)[..., None, :], dim=-1)


def by_definition(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    return (weights_by_definition(q, k, dtype) * v.to(dtype)[..., None, :]).sum(-1)


ALLOWED = 5e-5  # of a row's spread; all but a few keys with an outlier keep to a fifth of it
KEYS: dict[str, Any] = {
    "normal": lambda shape, g: torch.randn(shape, generator=g),
    "uniform": lambda shape, g: torch.rand(shape, generator=g),
    "two heaps": lambda shape, g: torch.randint(2, shape, generator=g).float(),
    "heavy tails": lambda shape, g: torch.randn(shape, generator=g) / torch.rand(shape, generator=g).clamp(min=0.02),
    "one outlier": lambda shape, g: torch.cat(
        [torch.full((*shape[:-1], 1), 50.0), 0.1 * torch.randn(*shape[:-1], shape[-1] - 1, generator=g)], -1
    ),
    "all equal": lambda shape, g: torch.full(shape, 0.7),
}


def example(kind: str, shape: tuple[int, ...], scores: float, shift: float, seed: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values with range(q) · range(k) about ``scores`` in every row, and a gradient from above."""
    g = torch.Generator().manual_seed(seed)
    k = KEYS[kind](shape, g)
    q = torch.randn(shape, generator=g)
    width = (q.amax(-1) - q.amin(-1)) * (k.amax(-1) - k.amin(-1))
    q = q * (scores / width.clamp(min=1e-3)).clamp(max=1e3)[..., None] + shift
    return q, k, torch.randn(shape, generator=g), torch.randn(shape, generator=g)


def with_gradients(
    inputs: tuple[torch.Tensor, ...], upstream: torch.Tensor, attention: Callable[..., torch.Tensor]
) -> list[torch.Tensor]:
    """Output and gradients of q, k and v, in float64."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = attention(*leaves)
    gradients = torch.autograd.grad((out * upstream.to(out.dtype)).sum(), leaves)
    return [t.detach().double() for t in (out, *gradients)]


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, upstream: torch.Tensor, kind: str) -> None:
    """Output and all gradients are those of the definition, row by row.

    On top of the tolerance each row may have a few times the error that the definition itself has in float32, and some
    units in the last place of the largest terms: that error can happen to be none. Rows without nodes get what torch's
    kernel rounds, 6e-8 of a score, for it keeps no weights but computes them again from scores less their logarithm.
    """
    found = with_gradients((q, k, v), upstream, lambda *t: attend(*t, kind=kind))
    truth = with_gradients((q.double(), k.double(), v.double()), upstream, by_definition)
    own = with_gradients((q, k, v), upstream, lambda *t: by_definition(*t, dtype=torch.float32))
    g, weights, largest_v = upstream.abs().double(), weights_by_definition(q, k), v.abs().amax(-1).double()
    _, left = place_nodes(*(t.reshape(-1, t.shape[-1]) for t in (q, k, v)), most_nodes(q.shape[-1], kind))
    units = torch.full(q.shape[:-1], 2e-6, dtype=torch.float64)
    units.view(-1)[left] += 2e-7 * (q.abs().amax(-1) * k.abs().amax(-1)).double().view(-1)[left]
    terms = (
        largest_v,
        g.amax(-1) * k.abs().amax(-1) * largest_v,
        ((g * q.abs())[..., None] * weights).sum(-2).amax(-1) * largest_v,
        (g[..., None] * weights).sum(-2).amax(-1),
    )
    for name, mine, theirs, plain, term in zip(("out", "q", "k", "v"), found, truth, own, terms, strict=True):
        error, rounding = ((t - theirs).abs().amax(-1) for t in (mine, plain))
        spread = theirs.amax(-1) - theirs.amin(-1)
        allowed = ALLOWED * spread + 4 * rounding + units * term
        assert (error <= allowed + 1e-12).all(), f"{name}: {float((error / allowed).max()):.1f} times what is allowed"


@pytest.mark.parametrize("kind", ATTENTIONS)
@settings(max_examples=15)
@given(
    keys=st.sampled_from(sorted(KEYS)),
    shape=st.sampled_from([(1, 2), (2, 7), (3, 64), (2, 3, 33), (4, 400)]),
    scores=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 5.0, 20.0, 60.0, 300.0, 1e4]),
    shift=st.sampled_from([0.0, 1.0, -20.0]),
    seed=st.integers(0, 1000),
)
def test_output_and_gradients_are_those_of_the_definition(
    kind: str, keys: str, shape: tuple[int, ...], scores: float, shift: float, seed: int
) -> None:
    check(*example(keys, shape, scores, shift, seed), kind=kind)


@pytest.mark.parametrize("scores", [0.05, 30.0, 1e4])
@pytest.mark.parametrize("keys", ["normal", "two heaps", "one outlier"])
def test_1536_tokens_as_the_listing_has_them(keys: str, scores: float) -> None:
    check(*example(keys, (3, 1536), scores, 0.3, 0), kind="fast")


def test_keys_gradients_where_far_queries_have_none() -> None:
    """Values that tell the heap of a key: beyond a few queries, v_j - F is 0 or has no weight."""
    q, k, _, upstream = example("two heaps", (3, 1536), 1e3, 0.3, 0)
    check(q, k, k.clone(), upstream, "fast")


@pytest.mark.parametrize("kind", ATTENTIONS)
@settings(max_examples=15)
@given(
    keys=st.sampled_from(sorted(KEYS)),
    shape=st.sampled_from([(2, 64), (2, 3, 99), (4, 400)]),
    scores=st.sampled_from([0.0, 1e-3, 0.1, -1.0, 5.0, -20.0, 60.0, 300.0, -1e4]),
    shift=st.sampled_from([0.0, 1.0, -20.0]),
    seed=st.integers(0, 1000),
)
def test_tokens_that_are_keys_and_values_and_give_the_queries(
    kind: str, keys: str, shape: tuple[int, ...], scores: float, shift: float, seed: int
) -> None:
    """As in a head: queries are a linear function of tokens, falling where ``scores`` is negative."""
    _, tokens, _, upstream = example(keys, shape, 1.0, 0.0, seed)
    slope = scores / (tokens.amax(-1) - tokens.amin(-1)).clamp(min=1e-2)[..., None] ** 2

    def mixed(m: torch.Tensor, attention: Callable[..., torch.Tensor]) -> torch.Tensor:
        return attention(m * slope.to(m.dtype) + shift, m, m)

    found = with_gradients((tokens,), upstream, lambda m: mixed(m, lambda *t: attend(*t, kind=kind)))
    truth = with_gradients((tokens.double(),), upstream, lambda m: mixed(m, by_definition))
    own = with_gradients((tokens,), upstream, lambda m: mixed(m, lambda *t: by_definition(*t, dtype=torch.float32)))
    q, g, largest = tokens * slope + shift, upstream.abs(), tokens.abs().amax(-1)
    weights = weights_by_definition(q, tokens)
    of_key = (
        g.amax(-1) * largest * slope[..., 0].abs() + ((g * q.abs())[..., None] * weights).sum(-2).amax(-1)
    ) * largest
    terms = (largest, of_key + (g[..., None] * weights).sum(-2).amax(-1))
    for mine, theirs, plain, term in zip(found, truth, own, terms, strict=True):
        error, rounding = ((t - theirs).abs().amax(-1) for t in (mine, plain))
        allowed = ALLOWED * (theirs.amax(-1) - theirs.amin(-1)) + 4 * rounding + 2e-6 * term
        assert (error <= allowed + 1e-12).all(), f"{float((error / allowed).max()):.1f} times what is allowed"


def test_queries_that_are_a_linear_function_of_keys_share_their_polynomials() -> None:
    k = torch.randn(4, 400, generator=torch.Generator().manual_seed(0))
    slope = torch.tensor([[0.3], [-0.3], [1e-9], [10.0]])
    q = k * slope + 0.1
    for given_, shared in ((q, {0, 1, 2}), (q + 1e-4 * torch.rand(4, 400), set())):
        groups, left = place_nodes(given_, k, k)
        assert not len(left)
        assert {int(row) for group in groups if group.queries is group.keys for row in group.rows} == shared


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_equal_queries_and_equal_keys(kind: str) -> None:
    k, v = torch.randn(2, 40), torch.randn(2, 40)
    same = torch.full((2, 40), 1.5)
    for q, keys in ((same, k), (k, same), (same, same), (torch.zeros(2, 40), k)):
        check(q, keys, v, torch.randn(2, 40), kind)
    empty = torch.zeros(0, 40)
    assert attend(empty, empty, empty, kind).shape == (0, 40)


def test_rows_that_need_too_many_nodes_are_exact_and_the_others_are_not() -> None:
    q, k, v, upstream = example("normal", (4, 400), 1.0, 0.0, 0)
    k[1, 0] = 1e4  # an outlier that needs more nodes than are worth while
    groups, left = place_nodes(q, k, v, most_nodes(400, "auto"))
    assert left.tolist() == [1]
    assert sorted(int(row) for group in groups for row in group.rows) == [0, 2, 3]
    out = attend(q, k, v)
    assert torch.equal(out[1], attend(q, k, v, "exact")[1])
    check(q[[0, 2, 3]], k[[0, 2, 3]], v[[0, 2, 3]], upstream[[0, 2, 3]], "auto")


@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("scores", [0.3, 30.0])
def test_a_row_is_computed_alike_in_any_batch(scores: float, kind: str) -> None:
    *inputs, upstream = example("normal", (64, 300), scores, 0.0, 1)

    def rows(part: slice) -> list[torch.Tensor]:
        return with_gradients(tuple(t[part] for t in inputs), upstream[part], lambda *t: attend(*t, kind=kind))

    whole = rows(slice(None))
    for part in (slice(0, 1), slice(63, 64), slice(10, 20), slice(30, 56)):
        for all_rows, some in zip(whole, rows(part), strict=True):
            assert torch.equal(all_rows[part], some)


LAWS: dict[str, Callable[[np.random.Generator, tuple[int, int]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "heaped": lambda rng, shape: np.sign(rng.normal(size=shape)) + 0.1 * rng.normal(size=shape),
    "skewed": lambda rng, shape: np.exp(0.5 * rng.normal(size=shape)),
    "lognormal": lambda rng, shape: np.exp(1.5 * rng.normal(size=shape)),
}


def batch(law: str, rows: int, tokens: int, unlike: float, seed: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values and a gradient from above; the scales of rows differ by a factor of about e^``unlike``."""
    rng = np.random.default_rng(seed)
    of_row = rng.choice(sorted(LAWS), rows) if law == "mixed" else [law] * rows
    k = np.concatenate([LAWS[name](rng, (1, tokens)) for name in of_row])
    k *= np.exp(1.2 * rng.normal() + unlike * rng.normal(size=(rows, 1)))
    q = rng.normal(size=(rows, tokens)) * np.exp(0.7 * rng.normal() + unlike / 2 * rng.normal(size=(rows, 1)))
    v, upstream = (rng.normal(size=(rows, tokens)) for _ in range(2))
    return tuple(torch.from_numpy(a.astype(np.float32)) for a in (q, k, v, upstream))


@settings(max_examples=40)
@given(
    law=st.sampled_from(["mixed", *LAWS]),
    kind=st.sampled_from(["auto", "fast"]),
    rows=st.integers(1, 6) | st.integers(1, 30),
    unlike=st.sampled_from([0.0, 0.3, 1.2]),
    seed=st.integers(0, 10_000),
    data=st.data(),
)
def test_every_row_of_a_batch_is_its_own_in_any_order(
    law: str, kind: str, rows: int, unlike: float, seed: int, data: st.DataObject
) -> None:
    *inputs, upstream = batch(law, rows, 160, unlike, seed)
    check(*inputs, upstream, kind)
    given_order = with_gradients(tuple(inputs), upstream, lambda *t: attend(*t, kind=kind))
    order = torch.tensor(data.draw(st.permutations(range(rows))))
    turned = with_gradients(tuple(t[order] for t in inputs), upstream[order], lambda *t: attend(*t, kind=kind))
    for one, other in zip(given_order, turned, strict=True):
        assert torch.equal(one[order], other)


@pytest.mark.parametrize(("law", "rows", "seed"), [("heaped", 3, 8), ("skewed", 2, 10)])
def test_rows_that_were_once_exchanged(law: str, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    k = (LAWS[law](rng, (rows, 1536)) * np.exp(1.2 * rng.normal(size=(rows, 1)))).astype(np.float32)
    q = (rng.normal(size=(rows, 1536)) * np.exp(0.7 * rng.normal(size=(rows, 1)))).astype(np.float32)
    queries, keys = torch.from_numpy(q), torch.from_numpy(k)
    right = by_definition(queries.double(), keys.double(), keys.double() / 2)
    for order in itertools.permutations(range(rows)):
        turned = list(order)
        error = (attend(queries[turned], keys[turned], keys[turned] / 2) - right[turned]).abs().amax(1)
        assert (error / right[turned].std(1) < 2e-5).all()


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_half_precision_is_computed_in_float32(kind: str) -> None:
    dtype = torch.bfloat16
    q, k, v = (t.to(dtype) for t in example("normal", (3, 200), 10.0, 0.0, 0)[:3])
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out = attend(*inputs, kind=kind)
    assert out.dtype == dtype
    assert torch.equal(out, attend(q.float(), k.float(), v.float(), kind).to(dtype))
    assert all(g.dtype == dtype for g in torch.autograd.grad(out.float().sum(), inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attend(q, k, v, kind), out)


def test_float64_is_computed_in_float64() -> None:
    q, k, v = (t.double() for t in example("normal", (3, 300), 5.0, 0.0, 0)[:3])
    out = attend(q, k, v, "fast")
    assert out.dtype == torch.float64
    assert (out - by_definition(q, k, v)).abs().max() < 2e-6


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_what_is_not_finite_stays_so(kind: str) -> None:
    """Training tells by it that it diverged."""
    q, k, v, _ = example("normal", (2, 100), 1.0, 0.0, 0)
    v[0, 3] = float("inf")
    out = attend(q, k, v, kind)
    assert not torch.isfinite(out[0]).any()
    assert torch.isfinite(out[1]).all()
    k[1, 5] = float("nan")
    assert not torch.isfinite(attend(q, k, v, kind)).any()


def test_the_way_back_can_be_gone_twice() -> None:
    q, k, v, _ = example("normal", (3, 100), 5.0, 0.0, 0)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out = attend(*inputs, kind="fast").sum()
    first = torch.autograd.grad(out, inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(out, inputs), strict=True):
        assert torch.equal(a, b)


def test_what_is_not_kept_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    *given_, upstream = example("normal", (7, 100), 5.0, 0.0, 0)
    inputs = [t.requires_grad_() for t in given_]

    def both() -> tuple[torch.Tensor, ...]:
        out = attend(*inputs, kind="fast")
        return (out, *torch.autograd.grad((out * upstream).sum(), inputs))

    kept = both()
    monkeypatch.setattr("embcache.probe.heads.scalar_attention._KEEP", 0)
    monkeypatch.setattr("embcache.probe.heads.scalar_attention._CELLS", 2000)  # a row or two at a time
    for a, b in zip(kept, both(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("parts", [1, 3, 60])
def test_sums_of_maps(kind: str, parts: int) -> None:
    q, k, _, _ = example("normal", (5, 60), 8.0, 0.0, 0)
    k[2, 0] = 1e5
    maps = weights_by_definition(q, k).sum(0)
    expected = maps.view(parts, 60 // parts, parts, 60 // parts).sum((1, 3))
    torch.testing.assert_close(sum_attention(q, k, parts, kind), expected, rtol=1e-4, atol=1e-5)


def test_training_is_the_same_by_nodes_and_by_all_scores() -> None:
    rng = np.random.default_rng(0)
    y = torch.from_numpy(rng.integers(0, 3, size=200))
    x = {
        b: torch.from_numpy((rng.normal(size=(200, d)) + 0.3 * rng.normal(size=(3, d))[y]).astype(np.float32))
        for b, d in {"a": 40, "b": 30}.items()
    }
    job = Job(torch.arange(150), torch.arange(150, 200), "3\0fold", 1e-3)
    runs = {
        kind: train_heads(
            make_head("dvme", proj_dim=64, attention=kind), x, y, [job], 3, "macro_auc", Schedule(max_epochs=4)
        )[0]
        for kind in ATTENTIONS
    }
    for kind in ("auto", "fast"):
        np.testing.assert_allclose(runs[kind].losses, runs["exact"].losses, rtol=1e-3)
        np.testing.assert_allclose(runs[kind].val_scores, runs["exact"].val_scores, atol=5e-3)
        assert runs[kind].losses != runs["exact"].losses or kind == "auto"  # it was another way


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_a_validation_chunk_fits_a_gpu_without_all_scores(kind: str) -> None:
    q, k, v = (torch.randn(1024, 1536, device="cuda") for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    attend(q, k, v, kind)
    assert torch.cuda.max_memory_allocated() < 1024 * 1536 * 1536  # bytes: a quarter of one float32 score tensor


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    *given_, upstream = example("normal", (5, 700), 20.0, 0.0, 0)
    found = []
    for device in ("cpu", "cuda"):
        inputs = [t.to(device).requires_grad_() for t in given_]
        out = attend(*inputs, kind="fast")
        found.append([out, *torch.autograd.grad((out * upstream.to(device)).sum(), inputs)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-4, atol=1e-4 * float(a.abs().max()))


def test_a_row_has_the_same_bits_alone_on_two_threads() -> None:
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(12, 1536, generator=generator) for _ in range(2))

    def both(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = x[rows].clone().requires_grad_()
        attend(25 * tokens, tokens, tokens).backward(upstream[rows])
        assert tokens.grad is not None
        return attend(25 * tokens, tokens, tokens).detach(), tokens.grad

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = both(slice(0, 12))
        for row in range(12):
            for whole, alone in zip(together, both(slice(row, row + 1)), strict=True):
                torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)
