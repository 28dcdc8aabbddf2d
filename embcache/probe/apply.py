"""Logits of one head over many rows of features: what training validates by and prediction asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

Params = dict[str, torch.Tensor]

_CHUNK = 1024  # rows scored at a time


class Applicable(Protocol):
    """What prediction needs of a head, trained or solved."""

    def apply(
        self, params: Params, x: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor] | None
    ) -> torch.Tensor:
        """Logits of shape (K, B, C) from parameters (K, …), features (K, B, D) each and dropout masks (K, B, width)."""
        ...


def predict_logits(
    head: Applicable, params: Params, x: Mapping[str, torch.Tensor], rows: torch.Tensor
) -> NDArray[np.float32]:
    """Logits of one head, shape (len(rows), C); ``params`` without the stacking axis; of views the first."""
    return stacked_logits(head, {name: p[None] for name, p in params.items()}, x, rows)


def plain_view(features: torch.Tensor) -> torch.Tensor:
    """Features (N, D) of the images as they are: those given, or the first of their views (N, V, D)."""
    return features if features.dim() == 2 else features[:, 0]


@torch.no_grad()
def stacked_logits(
    head: Applicable, params: Params, x: Mapping[str, torch.Tensor], rows: torch.Tensor
) -> NDArray[np.float32]:
    """Logits of a stack of one head, shape (len(rows), C); ``params`` with their leading axis."""
    if not len(rows):
        return np.zeros((0, 0), np.float32)
    device = next(iter(params.values())).device
    parts = [
        head.apply(params, {b: (f[chunk] if f.dim() == 2 else f[chunk, 0])[None] for b, f in x.items()}, None)[0]
        for chunk in torch.split(rows.to(device), _CHUNK)
    ]
    return np.asarray(torch.cat(parts).float().cpu().numpy())
