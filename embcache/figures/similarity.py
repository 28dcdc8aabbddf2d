"""How alike the embeddings of two backbones are, on the same images: linear CKA and mutual nearest neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
from numpy.typing import NDArray

from embcache.data.dataset import ImageDataset
from embcache.errors import ProtocolError, UsageError
from embcache.figures.pool import drawn, open_pool
from embcache.paths import PathLike
from embcache.probe.standard import standard_directions
from embcache.store.feature_store import extract_command

Array = NDArray[np.float64]

NEIGHBOURS = 10
"""Nearest neighbours of an image that are compared."""

_BLOCK = 1024  # images whose neighbours are looked for at a time


@dataclass(frozen=True, eq=False)
class Similarity:
    """Similarity of every pair of backbones; the matrices are symmetric with ones on the diagonal."""

    dataset: str
    backbones: tuple[str, ...]
    n: int  # images that were compared
    cka: Array  # (B, B)
    cka_biased: Array  # (B, B)
    neighbours: Array  # (B, B); mean share of an image's ``k`` nearest images that are the same in both
    k: int
    notes: tuple[str, ...] = ()  # what a reader of the figures must know


def similarity(
    ds: ImageDataset,
    backbones: Sequence[str] | None = None,
    *,
    home: PathLike | None = None,
    recipe: str | None = None,
    seed: int = 0,
) -> Similarity:
    """Compare two or more cached backbones on the images of `open_pool`, at most `MOST` drawn by ``seed``."""
    pool = open_pool(ds, backbones, home=home, recipe=recipe, seed=seed)
    names, rows = list(pool.stores), drawn(pool, seed)
    if len(names) < 2:
        raise UsageError(
            "similarity compares backbones",
            expected="two at least",
            found=", ".join(names),
            fix=extract_command("NAME", ds, home),
        )
    if len(rows) < 4:
        raise ProtocolError("too few images to compare embeddings on", expected="at least 4", found=str(len(rows)))
    k = min(NEIGHBOURS, len(rows) - 1)
    features = {name: pool.features(name, rows).numpy() for name in names}
    centred = {name: _centred(x) for name, x in features.items()}
    near = {name: nearest_neighbours(x, k) for name, x in features.items()}
    shape = (len(names), len(names))
    biased, unbiased, shared = (np.zeros(shape) for _ in range(3))
    for i, j in combinations_with_replacement(range(len(names)), 2):
        a, b = names[i], names[j]
        biased[i, j], unbiased[i, j] = biased[j, i], unbiased[j, i] = _hsic(centred[a], centred[b])
        shared[i, j] = shared[j, i] = shared_neighbours(near[a], near[b])
    notes = list(pool.sides.notes)
    if len(rows) < len(pool.rows):
        notes.append(f"{len(rows):,} of {len(pool.rows):,} training images, drawn at random")
    return Similarity(
        ds.name, tuple(names), len(rows), _normalised(unbiased), _normalised(biased), shared, k, tuple(notes)
    )


def linear_cka(x: NDArray[np.floating], y: NDArray[np.floating], *, debiased: bool = True) -> float:
    """Linear centred kernel alignment of two embeddings of the same images.

    ``‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖)`` of centred X and Y (Kornblith et al. 2019, eq. 6); debiased, each of the three is
    replaced by the unbiased estimator of HSIC (Song et al. 2012, eq. 5), which leaves out each image's similarity with
    itself. Without that, embeddings with more dimensions than images are alike whatever they are.

    Shapes: x, y (n, D).
    """
    parts = [_centred(x), _centred(y)]
    values = np.array([[_hsic(a, b)[int(debiased)] for b in parts] for a in parts])
    return float(_normalised(values)[0, 1])


def nearest_neighbours(x: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """Rows of the ``k`` nearest other images of each, int64 (n, k): by cosine on standardised features, as ``knn``."""
    z = standard_directions(x)
    near = np.empty((len(z), k), dtype=np.int64)
    for start in range(0, len(z), _BLOCK):
        cosines = z[start : start + _BLOCK] @ z.T
        own = np.arange(len(cosines))
        cosines[own, start + own] = -np.inf
        near[start : start + _BLOCK] = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
    return near


def shared_neighbours(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    """Mean share of neighbours (n, k) that two embeddings have in common (Huh et al. 2024, mutual k-NN)."""
    both = np.sort(np.concatenate([a, b], axis=1), axis=1)  # a row that is in both stands twice
    return float((both[:, 1:] == both[:, :-1]).sum() / a.size)


def _centred(x: NDArray[np.floating]) -> Array:
    wide = np.asarray(x, dtype=np.float64)
    return np.asarray(wide - wide.mean(axis=0))


def _hsic(x: Array, y: Array) -> tuple[float, float]:
    """HSIC of centred X and Y with linear kernels, biased and unbiased, each but for a factor that only n sets.

    For K = XXᵀ and L = YYᵀ with their diagonals set to 0, a_i = ‖x_i‖² and b_i = ‖y_i‖²: tr(KL) = ‖XᵀY‖² − Σ a_i b_i,
    and K1 = −a because rows sum to 0 with the diagonal.
    """
    n = len(x)
    a, b = (x**2).sum(1), (y**2).sum(1)
    biased = _alignment(x, y)
    unbiased = biased - a @ b + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a @ b)
    return biased, float(unbiased)


def _normalised(hsic: Array) -> Array:
    """A matrix of HSIC divided by the roots of its diagonal; NaN where that is not positive."""
    own = np.where(np.diag(hsic) > 0, np.diag(hsic), np.nan)
    return np.asarray(hsic / np.sqrt(np.outer(own, own)))


def _alignment(x: Array, y: Array) -> float:
    """``‖XᵀY‖²``, by the smaller of the two ways to it."""
    if len(x) < min(x.shape[1], y.shape[1]):
        return float(((x @ x.T) * (y @ y.T)).sum())
    return float(((x.T @ y) ** 2).sum())
