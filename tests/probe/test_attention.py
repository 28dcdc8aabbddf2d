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


def test_zeros_added_to_every_token_change_nothing() -> None:
    """What CUDA's fused kernels are given: tokens of dimension 8, seven of them zero."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 1, 50, 1, generator=generator) for _ in range(3))
    padded = (torch.nn.functional.pad(t, (0, 7)) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(*padded, scale=1.0)[..., 0]
    assert torch.allclose(out[:, 0], attend(q[:, 0, :, 0], k[:, 0, :, 0], v[:, 0, :, 0]), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_validation_chunk_fits_a_gpu_without_all_scores() -> None:
    q, k, v = (torch.randn(1024, 1536, device="cuda") for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    attend(q, k, v)
    assert torch.cuda.max_memory_allocated() < 1024 * 1536 * 1536  # bytes: a quarter of one float32 score tensor
