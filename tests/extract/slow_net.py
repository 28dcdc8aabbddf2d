"""``tests.extract.slow_net:slow``: a small network for processes that cannot be patched.

``EMBCACHE_SLOW_SECONDS``: each batch takes so long. ``EMBCACHE_SLOW_SEED``: the weights.
"""

from __future__ import annotations

import os
import time

import torch
from torch import Tensor, nn

from embcache.backbones.catalog import Backbone
from tests.extract.tiny import DIM


class Slow(nn.Module):
    """Six features of an image, in a time of one's choice."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(os.environ.get("EMBCACHE_SLOW_SEED", "3")))
            self.net = nn.Sequential(nn.Conv2d(3, 12, 5, stride=2), nn.ReLU(), nn.Conv2d(12, DIM, 3))

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(float(os.environ.get("EMBCACHE_SLOW_SECONDS", "0")))
        features: Tensor = self.net(images).mean(dim=(2, 3))
        return features


def slow() -> Backbone:
    """The network as a backbone of your own."""
    return Backbone.from_module(Slow().eval(), name="slow", dim=DIM)
