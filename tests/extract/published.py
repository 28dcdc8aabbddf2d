"""Checkpoints in the layouts that their authors publish, made on the spot from random weights."""

from __future__ import annotations

import argparse
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor

from embcache.backbones.networks import LastClassTokens

State = Mapping[str, Tensor]


def resnet_state(seed: int = 7) -> dict[str, Tensor]:
    """A whole torchvision ResNet-50, ``fc`` included, whose batch norms have statistics as if it had been trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = torchvision.models.resnet50(weights=None).state_dict()
        for key, value in state.items():
            if key.endswith("running_mean"):
                value.normal_(0, 0.1)
            elif key.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.ndim == 1 and value.is_floating_point():
                value += torch.randn_like(value) * 0.1
    return state


def trunk(state: State) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith("fc.")}


def vit_state(seed: int = 7) -> dict[str, Tensor]:
    """DINO's ViT-S/8 under its published names, random enough that attention, norms and positions all matter."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in LastClassTokens().state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        scale = {"pos_embed": 0.5, "cls_token": 0.5}.get(key, 0.3 if value.ndim == 1 else 0.06)
        state[key] = noise * scale + (1.0 if "norm" in key and key.endswith("weight") else 0.0)
    return state


def heads() -> dict[str, Tensor]:
    """What SwAV's file holds in addition to the trunk."""
    return {
        "projection_head.0.weight": torch.randn(4, 8),
        "projection_head.0.bias": torch.randn(4),
        "prototypes.weight": torch.randn(5, 4),
    }


def prefixed(state: State, prefix: str) -> OrderedDict[str, Tensor]:
    return OrderedDict((prefix + key, value) for key, value in state.items())


def vissl(state: State) -> dict[str, object]:
    """VISSL's training state: the trunk deep inside, numpy scalars and plain values all around it."""
    return {
        "phase_idx": 799,
        "iteration": 250_000,
        "loss": {"name": "swav", "value": np.float64(4.2)},
        "classy_state_dict": {
            "train": True,
            "base_model": {
                "model": {"trunk": prefixed(trunk(state), "_feature_blocks."), "heads": heads()},
                "meta": {},
            },
            "optimizer": {"optim": {"param_groups": [{"lr": np.float64(0.3), "params": [0, 1]}]}},
            "losses": [np.float32(1.5), 2.5],
            "hooks": {},
        },
    }


def swav(state: State) -> OrderedDict[str, Tensor]:
    return prefixed({**trunk(state), **heads()}, "module.")


def dino_full(state: State) -> dict[str, object]:
    """DINO's training state: the teacher's backbone and head, the student's, the arguments and the optimizer's."""
    head = {"head.mlp.0.weight": torch.randn(4, 8), "head.last_layer.weight_g": torch.ones(5, 1)}
    return {
        "student": prefixed(
            {**prefixed({key: value + 1 for key, value in state.items()}, "backbone."), **head}, "module."
        ),
        "teacher": {**prefixed(state, "module.backbone."), **prefixed(head, "module.")},
        "optimizer": {"param_groups": [{"lr": np.float64(1e-6), "weight_decay": np.float64(0.4), "params": [0]}]},
        "epoch": 800,
        "args": argparse.Namespace(arch="vit_small", patch_size=8, lr=np.float64(5e-4)),
        "dino_loss": {"center": torch.zeros(1, 5)},
    }


def save(path: Path, content: object, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def rezip(source: Path, target: Path, change: Mapping[bytes, bytes], *, compress: bool = False) -> Path:
    """Copy a PyTorch zip file, replacing bytes in its pickle; checksums are made anew."""
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for record in old.infolist():
            data = old.read(record)
            if record.filename.endswith("/data.pkl"):
                for before, after in change.items():
                    assert before in data
                    data = data.replace(before, after)
            new.writestr(record.filename, data)
    return target
