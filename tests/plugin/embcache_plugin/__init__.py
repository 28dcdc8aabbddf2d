"""One backbone, one head, one dataset and one metric, announced by the entry points of this package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from embcache.backbones.catalog import Backbone
from embcache.data.dataset import ImageDataset
from embcache.errors import DatasetNotFoundError
from embcache.probe.layers import affine, init_linear
from embcache.probe.metrics import Metric
from embcache.probe.stack import TrainedHead


def tiny() -> Backbone:
    """A backbone from a network of your own: normalized images (B, 3, H, W) to features (B, 12)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convolution = nn.Conv2d(3, 12, 7, stride=4)
    network = nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Backbone.from_module(network, name="tiny", dim=12, license="Apache-2.0")


@dataclass(frozen=True)
class Bottleneck(TrainedHead):
    """A linear classifier of low rank; its fields are hyperparameters: ``--head-option rank=2``."""

    rank: int = 4

    name = "bottleneck"
    summary = "a linear classifier of low rank on the features of one backbone"

    def init(self, generator: torch.Generator, dims: Mapping[str, int], n_classes: int) -> dict[str, torch.Tensor]:
        """Parameters of one head."""
        (dim,) = dims.values()
        down = init_linear(generator, "down", dim, self.rank)
        return down | init_linear(generator, "classifier", self.rank, n_classes)

    def apply(self, params: dict[str, torch.Tensor], x: Mapping[str, torch.Tensor], masks: Any = None) -> torch.Tensor:
        """Logits (K, B, C) from features (K, B, D) and parameters (K, …) of K heads."""
        (features,) = x.values()
        return affine(params, "classifier", affine(params, "down", features))


CLASSES = ("benign", "malignant")


def read_lesions(root: Path, name: str) -> ImageDataset:
    """Read ``labels.csv`` (``image,diagnosis,patient,split``): one row per image, whether or not its file is there."""
    if not (root / "labels.csv").is_file():
        raise DatasetNotFoundError(
            "this is not the layout of lesions", code="dataset-layout", expected="labels.csv, images/*.png", where=root
        )
    labels = pd.read_csv(root / "labels.csv", dtype=str)
    table = pd.DataFrame(
        {
            "id": labels["image"],
            "path": "images/" + labels["image"] + ".png",  # relative to root
            "place": "",  # where in a container such as an array file; empty for files
            "label": [CLASSES.index(d) if d in CLASSES else -1 for d in labels["diagnosis"]],
            "group": labels["patient"],  # folds never divide one
            "split": labels["split"],
        }
    )
    return ImageDataset(
        name, root, CLASSES, metric="auc", augment="generic", table=table, subset_sizes={"S": 12, "M": 24}
    )


def _youden(y: np.ndarray, logits: np.ndarray, positive: int) -> Any:
    """From labels (n,) and logits (n, C) to a function of row weights (B, n), which resampling uses, to values (B,)."""
    true, called = y == positive, logits.argmax(1) == positive

    def weighted(w: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # nan where no weight is left in a class
            return (w @ (called & true)) / (w @ true) - (w @ (called & ~true)) / (w @ ~true)

    return weighted


YOUDEN = Metric("youden", "Youden's J", _youden, low=-1.0, asymmetric=True, binary=True, per_class=True)
