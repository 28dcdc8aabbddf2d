"""Forty small images of two classes, and two tiny networks whose weights lie in the weights folder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from embcache.data.dataset import ImageDataset, load_dataset

RESNET, VIT = "timm:test_resnet", "timm:test_vit"
# Two folds, few epochs, images as they are.
QUICK = {
    "subset": 16,
    "folds": 2,
    "val": "matched",
    "max_epochs": 2,
    "transform": "paper",
    "workers": 2,
    "batch_size": 8,
}


def draw(path: Path, seed: int, light: int, size: int = 32) -> None:
    """Write one image; the classes differ in lightness, but not in every image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 200, (5, 5, 3)) + light
    Image.fromarray(coarse.astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the weights of two tiny networks, drawn from a seed."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("test_resnet", "test_vit"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = timm.create_model(name, pretrained=False, num_classes=0)
        save_file(model.state_dict(), folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the images: sixty, of which one in five is of the test split."""
    root = tmp_path_factory.mktemp("pictures") / "lesions"
    for index in range(60):
        split = "test" if index % 5 == 0 else "train"
        name = "benign" if index % 2 else "malignant"
        draw(root / split / name / f"{index:02}.png", index, 35 * (index % 2))
    return root


@pytest.fixture
def ds(pictures: Path, networks: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> ImageDataset:
    """The dataset, with an empty home and the weights of the networks."""
    monkeypatch.setenv("EMBCACHE_WEIGHTS", os.fspath(networks))
    return load_dataset("folder", pictures)
