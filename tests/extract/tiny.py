"""A network small enough to extract in a moment, in place of a published one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from embcache.backbones.catalog import LoadedBackbone, find_backbone
from embcache.config import ExtractConfig
from embcache.data.dataset import ImageDataset
from embcache.extract.extract import Extraction, extract
from embcache.log import shown

DIM = 6


def load_tiny(name: str, **_: object) -> LoadedBackbone:
    """Stands for ``embcache.extract.recipes.load_backbone``: six features of an image, at any size."""
    spec = dataclasses.replace(find_backbone(name), dim=DIM)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3 + (spec.seed or 0))  # random:1 has other weights
        module = nn.Sequential(
            nn.Conv2d(3, 12, 5, stride=2), nn.ReLU(), nn.Conv2d(12, DIM, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
    return LoadedBackbone(spec, module.eval().requires_grad_(False), "ab" * 32, "made up")


def run_extraction(
    backbones: Sequence[str],
    dataset: ImageDataset,
    *,
    home: Path | None = None,
    say: Callable[[str], object] | None = None,
    **options: object,
) -> list[Extraction]:
    """Extract with some options; ``say`` is called with every message."""
    with shown(say) if say else nullcontext():
        return extract(dataset, backbones, ExtractConfig.make(options=options), home=home)
