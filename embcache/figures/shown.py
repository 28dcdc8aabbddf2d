"""The images that a figure shows, and their embeddings: cached features, or what a fused head makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embcache.data.dataset import ImageDataset
from embcache.data.draws import hash_order
from embcache.errors import ProtocolError, UsageError, check_choice
from embcache.probe.heads import make_head
from embcache.probe.heads.dvme import Fusion
from embcache.probe.inputs import divide_for
from embcache.runs.folders import ProbeResult, load_heads
from embcache.store.feature_store import FeatureStore

LIMIT = 2000
"""Images of a map in a figure of the paper: beyond it points hide each other."""

ROWS = ("test", "train", "all")

_CHUNK = 128  # images embedded at a time


@dataclass(frozen=True, eq=False)
class Shown:
    """Labelled images of a figure."""

    ids: list[str]
    labels: NDArray[np.int64]  # (n,)
    groups: list[str]  # of each image; identical images are of one group
    remark: str  # which rows these are, in words


def shown_images(
    ds: ImageDataset,
    stores: Sequence[FeatureStore],
    *,
    rows: str = "test",
    most: int | None = None,
    **protocol: Any,
) -> Shown:
    """The labelled images that the protocol tests on, or trains and validates on, or both; readable in every store.

    No folds are drawn, so any number of images of a class can be shown.
    """
    check_choice("--rows", rows, ROWS)
    sides = divide_for(ds, stores, **protocol)
    pool = np.union1d(sides.pool, sides.own_val)
    parts = {"test": sides.test, "train": pool, "all": np.union1d(sides.test, pool)}
    chosen = parts[rows]
    chosen = chosen[sides.labels[chosen] >= 0]
    if not len(chosen):
        raise ProtocolError(
            f"the labels of the {rows} images of {ds.name} are not known: there is nothing to colour by",
            fix=("--test local", "--rows all"),
        )
    words = {"test": f"{sides.test_set} test set", "train": "training and validation images", "all": "all images"}
    remark = words[rows]
    if most is not None and len(chosen) > most:
        remark += f", {most:,} drawn of {len(chosen):,} images"
        chosen = np.sort(chosen[hash_order(0, "figure", [str(i) for i in sides.ids[chosen]])[:most]])
    return Shown([str(i) for i in sides.ids[chosen]], sides.labels[chosen], sides.groups[chosen].tolist(), remark)


@torch.no_grad()
def fused_features(
    result: ProbeResult, run: Path, features: Mapping[str, NDArray[np.float32]]
) -> tuple[int, NDArray[np.float32]]:
    """The embedding that a run of ``dvme`` makes of cached features, by its first fold that has a model.

    Shapes: features (n, D).
    """
    head = make_head(**result.request["head"])
    if not isinstance(head, Fusion):
        raise UsageError(
            f"a run of {result.head} has no fused embedding", expected="a run of dvme", found=result.id,
            fix="embcache results",
        )  # fmt: skip
    heads = load_heads(run)
    place = next((place for place, params in enumerate(heads) if params), None)
    if place is None:
        raise ProtocolError("no fold of this run has a model", found=result.id, where=run, fix="embcache probe --again")
    params = {name: p[None] for name, p in heads[place].items()}
    x = {name: torch.from_numpy(features[name]) for name in result.backbones}
    n = len(next(iter(x.values())))
    parts = [
        head.embed(params, {name: f[start : start + _CHUNK][None] for name, f in x.items()})[0]
        for start in range(0, n, _CHUNK)
    ]
    return result.folds[place].fold, np.asarray(torch.cat(parts).float().numpy())
