"""Initial weights must not depend on the machine: their digest is part of a store's name."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
import torch

from embcache.backbones.checkpoints import hash_state
from embcache.backbones.networks import fill_normal, resnet50

SCRIPT = """
import hashlib, torch
from embcache.backbones.networks import fill_normal
values = fill_normal(torch.empty(1 << 15), generator=torch.Generator().manual_seed(3))
print(hashlib.sha256(values.numpy().tobytes()).hexdigest())
"""


def test_weights_are_the_same_whatever_instructions_the_processor_has() -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    values = fill_normal(torch.empty(1 << 15), generator=torch.Generator().manual_seed(3))
    assert done.stdout.strip() == hashlib.sha256(values.numpy().tobytes()).hexdigest()
    # The digest itself: that of another machine, and of versions to come.
    assert hash_state(resnet50(3)) == "3a386ec95d9d37e626aa113b41c9b045e33246ebf24632d603ac74b745bbfdb5"


@pytest.mark.parametrize("size", [16, 64 * 3 * 7 * 7, 2048 * 16 * 2 + 16])
def test_values_are_those_of_torch_and_use_up_as_many_draws(size: int) -> None:
    mean, std = 3.0, 0.5
    mine, theirs = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    found = fill_normal(torch.empty(size), mean, std, generator=mine)
    expected = torch.empty(size).normal_(mean, std, generator=theirs)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6 * std)
    assert torch.equal(torch.rand(8, generator=mine), torch.rand(8, generator=theirs))
