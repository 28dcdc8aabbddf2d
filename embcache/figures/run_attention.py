"""The attention of a saved DVME run over its test images (the paper's Figure F1), in numbers and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from embcache.data.dataset import ImageDataset
from embcache.errors import ProtocolError, UsageError
from embcache.figures.mean_attention import mass_table, mean_attention, mean_mass
from embcache.figures.shown import Shown, shown_images
from embcache.paths import PathLike
from embcache.probe.heads.dvme import project
from embcache.probe.inputs import load_features, open_stores
from embcache.runs.folders import ProbeResult, load_heads

_IMAGES = 16  # whose weights are looked at together
_GRID = 129  # queries at which an entropy is computed, at least
_PER_SCORE = 4  # and so many more for each unit that scores range over
_MOST = 10  # components that are named

Params = Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class RunAttention:
    """Attention of a run, averaged over its test images and folds."""

    result: ProbeResult
    shown: Shown  # the test images
    weights: NDArray[np.float32]  # (N, N); row *i*: how much token *i* takes from each token; rows sum to 1
    mass: NDArray[np.float64]
    mass_std: NDArray[np.float64]
    by_class: Mapping[str, NDArray[np.float64]]  # (B, B); of the test images of each class alone
    entropy: float
    entropy_std: float
    received: tuple[tuple[str, int, float], ...]
    folds: int  # that have a model


def run_attention(
    ds: ImageDataset, result: ProbeResult, run: Path, *, home: PathLike | None = None, recipe: str | None = None
) -> RunAttention:
    """Attention of a run of ``dvme`` or ``dvme-token`` over the labelled test images of its protocol."""
    if result.dataset != ds.name:
        raise UsageError("a run of another dataset", expected=ds.name, found=f"{result.id} of {result.dataset}")
    stores = open_stores(ds, [list(result.backbones)], home, recipe)
    asked = {key: result.request[key] for key in ("seed", "test") if key in result.request}
    shown = shown_images(ds, list(stores.values()), **asked)
    x = {name: load_features(stores[name], ds, shown.ids) for name in result.backbones}
    heads = [params for params in load_heads(run) if params]
    if not heads:
        raise ProtocolError("no fold of this run has a model", found=result.id, where=run)
    weights: NDArray[np.float64] = np.zeros((0, 0))
    for params in heads:  # one map at a time, however many folds there are
        one = mean_attention(params, x).astype(np.float64) / len(heads)
        weights = weights + one if weights.size else one
    present, counts = np.unique(shown.labels, return_counts=True)
    each = np.stack([_by_class(heads, x, shown.labels == label) for label in present])  # (classes, folds, B, B)
    masses = np.einsum("c,cfij->fij", counts / counts.sum(), each)  # of all images, each counted once
    entropies = np.array([mean_entropy(params, x) for params in heads])
    several = len(heads) > 1
    return RunAttention(
        result=result,
        shown=shown,
        weights=weights.astype(np.float32),
        mass=masses.mean(0),
        mass_std=masses.std(0, ddof=1) if several else np.full_like(masses[0], np.nan),
        by_class={ds.class_names[label]: mass.mean(0) for label, mass in zip(present.tolist(), each, strict=True)},
        entropy=float(entropies.mean()),
        entropy_std=float(entropies.std(ddof=1)) if several else math.nan,
        received=_received(weights, result.backbones),
        folds=len(heads),
    )


def _by_class(heads: Sequence[Params], x: Mapping[str, torch.Tensor], chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mass of some images under each head, (folds, B, B)."""
    rows = torch.from_numpy(np.flatnonzero(chosen))
    part = {name: features[rows] for name, features in x.items()}
    return np.stack([mean_mass(params, part) for params in heads])


@torch.no_grad()
def mean_entropy(params: Params, x: Mapping[str, torch.Tensor]) -> float:
    """Mean over images and tokens of the entropy of a token's attention, as a share of log N.

    Where a token is one number its entropy is a smooth function of its query: it is computed at some queries of each
    image, the more the further scores range, and interpolated linearly (to 1e-4; a test compares it with all N).

    Shapes: x (n, D).
    """
    stacked = {name: p[None].float() for name, p in params.items()}
    weight, bias = params["attn.qkv.weight"].float(), params["attn.qkv.bias"].float()
    width = weight.shape[1]
    total, n, tokens = 0.0, len(next(iter(x.values()))), 0
    for rows in torch.split(torch.arange(n), _IMAGES):
        meta = project(stacked, {name: features[rows].to(weight)[None] for name, features in x.items()})[0]
        meta = meta.view(len(rows), -1, width)
        tokens = meta.shape[1]
        q, k = (meta @ weight[i * width : (i + 1) * width].T + bias[i * width : (i + 1) * width] for i in (0, 1))
        total += float(_entropies(q, k).sum())
    return total / (n * tokens * math.log(tokens)) if tokens > 1 else 1.0


def _entropies(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Entropy of each token's weights: queries and keys (images, N, d) → (images, N)."""
    tokens, width = q.shape[1:]
    low, high = q.amin(1, keepdim=True), q.amax(1, keepdim=True)
    reach = float(((high - low) * (k.amax(1, keepdim=True) - k.amin(1, keepdim=True))).max()) if width == 1 else 0.0
    grid = _GRID + math.ceil(_PER_SCORE * min(reach, tokens))
    few = width == 1 and tokens > 2 * grid
    asked = low + (high - low) * torch.linspace(0, 1, grid).to(q)[None, :, None] if few else q
    log_p = (torch.bmm(asked, k.transpose(1, 2)) / math.sqrt(width)).log_softmax(-1)  # (images, asked, N)
    found = -(log_p.exp() * log_p).sum(-1)
    if not few:
        return found
    place = ((q - low) / (high - low).clamp_min(1e-30)).squeeze(-1) * (grid - 1)
    below = place.long().clamp(0, grid - 2)
    share = place - below
    return found.gather(1, below) * (1 - share) + found.gather(1, below + 1) * share


def _received(weights: NDArray[np.floating], backbones: tuple[str, ...]) -> tuple[tuple[str, int, float], ...]:
    shares = np.asarray(weights, dtype=np.float64).mean(0)  # a token's share of what all tokens give; sums to 1
    each = len(shares) // len(backbones)
    order = np.argsort(-shares, kind="stable")[: min(_MOST, len(shares))]
    return tuple((backbones[int(i) // each], int(i) % each, float(shares[i])) for i in order)


def draw_attention(found: RunAttention, synthetic: bool, target: Path) -> Path:
    """Draw the mean map and the table of masses, PNG, SVG or PDF by the target's suffix."""
    from embcache.figures.plots import AttentionPanel, plot_attention

    r = found.result
    title = f"{r.dataset}{' (synthetic)' if synthetic else ''}, {found.folds} folds trained on {r.subset}"
    panel = AttentionPanel(title, r.backbones, found.weights, mass_table(found.weights, len(r.backbones)))
    return plot_attention([panel], f"attention of {r.head}, mean over {len(found.shown.ids):,} test images", target)
