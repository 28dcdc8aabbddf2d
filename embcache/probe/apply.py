"""Logits of heads over many rows of features: what training validates by and prediction asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from embcache.probe.rows import FeatureRows, as_rows

Params = dict[str, torch.Tensor]

# Rows are cut alike however many heads are scored, as the products of a part are rounded by its length: a head's
# logits, and so its best epoch, are those it has alone.
_ROWS = 512
_HEADS = 4


class Applicable(Protocol):
    """What prediction needs of a head, trained or solved."""

    def apply(
        self, params: Params, x: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor] | None
    ) -> torch.Tensor:
        """Logits of shape (K, B, C) from parameters (K, …), features (K, B, D) each and dropout masks (K, B, width)."""
        ...


def predict_logits(
    head: Applicable, params: Params, x: Mapping[str, torch.Tensor] | FeatureRows, rows: torch.Tensor
) -> NDArray[np.float32]:
    """Logits of one head, shape (len(rows), C); ``params`` without the stacking axis; of views the first."""
    (logits,) = logits_of_sets(head, [{name: p[None] for name, p in params.items()}], x, [rows])
    return np.asarray(logits[0])


@torch.no_grad()
def logits_of_sets(
    head: Applicable,
    params: Sequence[Params],
    x: Mapping[str, torch.Tensor] | FeatureRows,
    sets: Sequence[torch.Tensor],
) -> list[NDArray[np.float32]]:
    """Logits of several stacks of heads, each over a set of rows of its own; every row is read once a set.

    Parameters
    ----------
    head : Applicable
        What all of them are.
    params : sequence of Params
        For each set the parameters (K, …) of the heads that are asked.
    x : mapping of backbone to Tensor, or FeatureRows
        Features; of views the first.
    sets : sequence of int64 Tensor of shape (m,)
        Rows.

    Returns
    -------
    list of float32 array of shape (K, m, C)
        Of shape (K, 0, 0) for a set without rows.
    """
    widths = [len(next(iter(p.values()))) for p in params]
    found = [np.zeros((width, 0, 0), np.float32) for width in widths]
    for chunk in as_rows(x).chunks(sets):
        k, width = chunk.number, widths[chunk.number]
        for first in range(0, width, _HEADS):
            heads = slice(first, min(first + _HEADS, width))
            asked = {name: p[heads] for name, p in params[k].items()}
            for start in range(0, len(chunk.places), _ROWS):
                part = slice(start, start + _ROWS)
                shared = {b: f[None, part].expand(heads.stop - first, -1, -1) for b, f in chunk.x.items()}
                logits = head.apply(asked, shared, None).float().cpu().numpy()
                if not found[k].size:
                    found[k] = np.empty((width, len(sets[k]), logits.shape[-1]), np.float32)
                found[k][heads, chunk.places[part].numpy()] = logits
    return found
