"""Stacked layers where autocast would have them in half precision."""

from __future__ import annotations

import pytest
import torch

from embcache.probe.layers import affine


@pytest.mark.parametrize("outputs", [2, 100])  # either order of the product
@pytest.mark.parametrize("back_too", [False, True])
def test_autocast_changes_nothing(outputs: int, back_too: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((3, 4, 16), (3, outputs, 16), (3, outputs))
    )
    params = {"a.weight": weight, "a.bias": bias}
    plain = affine(params, "a", x)
    expected = torch.autograd.grad(plain.square().sum(), (x, weight, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = affine(params, "a", x)
        loss = out.square().sum()
        found = torch.autograd.grad(loss, (x, weight, bias)) if back_too else None
    found = found or torch.autograd.grad(loss, (x, weight, bias))
    assert torch.equal(out, plain)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
