"""Initial weights must not depend on the machine: their digest is part of a store's name."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from embcache.backbones.normal import PortableNormal, fill_normal

DIGEST = "from embcache.backbones import checkpoints, networks; print(checkpoints.hash_state(networks.resnet50(3)))"


def test_weights_are_the_same_whatever_instructions_the_processor_has() -> None:
    digests = set()
    for simplest in (True, False):
        environment = {**os.environ, "OMP_NUM_THREADS": "1" if simplest else "2"}
        if simplest:
            environment["ATEN_CPU_CAPABILITY"] = "default"
        else:
            environment.pop("ATEN_CPU_CAPABILITY", None)
        done = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True
        )
        digests.add(done.stdout.strip())
    # The digest itself: that of another machine, and of versions to come.
    assert digests == {"3a386ec95d9d37e626aa113b41c9b045e33246ebf24632d603ac74b745bbfdb5"}


@pytest.mark.parametrize("size", [16, 48, 64 * 3 * 7 * 7, 2048 * 16 * 2 + 16])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.0, 0.02), (3.0, 0.5)])
def test_values_are_those_of_torch_and_use_up_as_many_draws(size: int, mean: float, std: float) -> None:
    mine, theirs = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    found = fill_normal(torch.empty(size), mean, std, generator=mine)
    expected = torch.empty(size).normal_(mean, std, generator=theirs)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6 * std)
    assert torch.equal(torch.rand(8, generator=mine), torch.rand(8, generator=theirs))


def test_values_follow_the_formula_of_box_and_muller_correctly_rounded() -> None:
    draws = torch.rand(4096, generator=torch.Generator().manual_seed(1)).double().numpy().reshape(-1, 2, 8)
    radius, angle = np.sqrt(-2 * np.log1p(-draws[:, 0])), 2 * np.pi * draws[:, 1]
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
    found = fill_normal(torch.empty(4096), generator=torch.Generator().manual_seed(1)).double().numpy()
    assert np.allclose(found, expected, rtol=2**-24 * 1.001, atol=1e-15)


def test_only_normal_draws_inside_the_block_are_replaced() -> None:
    def draw() -> list[torch.Tensor]:
        torch.manual_seed(0)
        return [torch.empty(32).normal_(), torch.empty(32).uniform_(), torch.ones(2) + 1]

    with torch.random.fork_rng(devices=[]):
        plain = draw()
        with PortableNormal():
            replaced = draw()
        assert all(map(torch.equal, draw(), plain))
        assert torch.equal(replaced[0], fill_normal(torch.empty(32), generator=torch.Generator().manual_seed(0)))
        assert all(map(torch.equal, replaced[1:], plain[1:]))


def test_a_size_whose_draws_torch_would_take_otherwise_is_refused() -> None:
    with pytest.raises(RuntimeError):
        fill_normal(torch.empty(15))
