"""Attention over scalar tokens against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embcache.probe.attention import ATTENTIONS, attend


def by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q.double()[..., :, None] * k.double()[..., None, :]
    return (torch.softmax(scores, dim=-1) * v.double()[..., None, :]).sum(-1)


@pytest.mark.parametrize("kind", ATTENTIONS)
@settings(max_examples=40)
@given(
    shape=st.sampled_from([(1, 1), (2, 7), (3, 64), (2, 3, 33)]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 10.0]),
    seed=st.integers(0, 1000),
    outlier=st.booleans(),
)
def test_output_and_gradients_are_those_of_the_definition(
    kind: str, shape: tuple[int, ...], spread: float, seed: int, outlier: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=generator) * s for s in (spread, spread, 1.0))
    if outlier:
        k[..., 0] = 50.0
    inputs = [t.requires_grad_() for t in (q, k, v)]
    upstream = torch.randn(shape, generator=generator)
    out, exact = attend(*inputs, kind=kind), by_definition(*inputs)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
    for mine, truth in zip(
        torch.autograd.grad((out * upstream).sum(), inputs),
        torch.autograd.grad((exact * upstream).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, truth, rtol=2e-3, atol=2e-3 * float(truth.abs().max()) + 1e-5)


def test_a_single_token_attends_to_itself() -> None:
    v = torch.randn(4, 1)
    torch.testing.assert_close(attend(torch.randn(4, 1), torch.randn(4, 1), v), v)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="attention is one of"):
        attend(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2), kind="magic")
