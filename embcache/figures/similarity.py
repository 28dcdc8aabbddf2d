"""How similar the embeddings of two backbones are on the same images: linear CKA and mutual nearest neighbors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embcache.data.dataset import ImageDataset
from embcache.errors import ProtocolError, UsageError
from embcache.figures.shown import open_pool
from embcache.paths import PathLike
from embcache.probe.layers import standard_directions
from embcache.store.feature_store import extract_command

Array = NDArray[np.float64]

NEIGHBORS = 10
"""Nearest neighbors of an image that are compared."""

_BLOCK = 1024  # images whose neighbors are looked for at a time


@dataclass(frozen=True, eq=False)
class Similarity:
    """Similarity of every pair of backbones; the matrices are symmetric with ones on the diagonal."""

    dataset: str
    backbones: tuple[str, ...]
    n: int  # images that were compared
    cka: Array  # (B, B)
    cka_biased: Array  # (B, B)
    neighbors: Array  # (B, B); mean share of an image's ``k`` nearest images that are the same in both
    k: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, every field by its name."""
        matrices = {"cka": self.cka, "cka_biased": self.cka_biased, "neighbors": self.neighbors}
        return {**vars(self), **{name: matrix.tolist() for name, matrix in matrices.items()}}


def similarity(
    ds: ImageDataset,
    backbones: Sequence[str] = (),
    *,
    home: PathLike | None = None,
    recipe: str | None = None,
    seed: int = 0,
) -> Similarity:
    """Compare the embeddings of two or more cached backbones, all by default, on the same training images.

    Parameters
    ----------
    ds : ImageDataset
        The dataset.
    backbones : sequence of str, optional
        Backbones with cached features.
    home : path, optional
        Folder of stores and runs.
    recipe : str, optional
        First digits of the fingerprint, where several recipes are cached.
    seed : int
        Of the images that are drawn where there are more than 5,000.

    Returns
    -------
    Similarity
        Matrices (B, B), each symmetric with ones on the diagonal.

    Raises
    ------
    UsageError
        There are fewer than two backbones.
    """
    pool = open_pool(ds, backbones, home=home, recipe=recipe, seed=seed)
    names, rows = list(pool.stores), pool.drawn(seed)
    if len(names) < 2:
        raise UsageError("similarity compares backbones", code="too-few-backbones", expected="at least two",
                         found=", ".join(names), fix=extract_command("NAME", ds, home))  # fmt: skip
    if len(rows) < 4:
        raise ProtocolError("too few images to compare embeddings on", code="too-few-images", expected="at least 4",
                            found=str(len(rows)))  # fmt: skip
    k = min(NEIGHBORS, len(rows) - 1)
    features = {name: pool.features(name, rows).numpy() for name in names}
    centered = {name: _centered(x) for name, x in features.items()}
    near = {name: nearest_neighbors(x, k) for name, x in features.items()}
    shape = (len(names), len(names))
    biased, unbiased, shared = (np.zeros(shape) for _ in range(3))
    for i, j in combinations_with_replacement(range(len(names)), 2):
        a, b = names[i], names[j]
        biased[i, j], unbiased[i, j] = biased[j, i], unbiased[j, i] = _hsic(centered[a], centered[b])
        shared[i, j] = shared[j, i] = shared_neighbors(near[a], near[b])
    notes = list(pool.sides.notes)
    if len(rows) < len(pool.rows):
        notes.append(f"{len(rows):,} of {len(pool.rows):,} training images, drawn at random")
    return Similarity(
        ds.name, tuple(names), len(rows), _normalized(unbiased), _normalized(biased), shared, k, tuple(notes)
    )


def linear_cka(x: NDArray[np.floating], y: NDArray[np.floating], *, debiased: bool = True) -> float:
    """Linear centered kernel alignment of two embeddings of the same images.

    ``‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖)`` of centered X and Y (Kornblith et al. 2019, eq. 6); debiased, each of the three is
    replaced by the unbiased estimator of HSIC (Song et al. 2012, eq. 5), which leaves out each image's similarity with
    itself. Without that, embeddings with more dimensions than images are alike whatever they are.

    Shapes: x, y (n, D).
    """
    parts = [_centered(x), _centered(y)]
    values = np.array([[_hsic(a, b)[int(debiased)] for b in parts] for a in parts])
    return float(_normalized(values)[0, 1])


def nearest_neighbors(x: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """Rows of the ``k`` nearest other images of each, int64 (n, k): by cosine on standardized features, as ``knn``."""
    z = standard_directions(x)
    near = np.empty((len(z), k), dtype=np.int64)
    for start in range(0, len(z), _BLOCK):
        cosines = z[start : start + _BLOCK] @ z.T
        own = np.arange(len(cosines))
        cosines[own, start + own] = -np.inf
        near[start : start + _BLOCK] = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
    return near


def shared_neighbors(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    """Mean share of neighbors (n, k) that two embeddings have in common (Huh et al. 2024, mutual k-NN)."""
    both = np.sort(np.concatenate([a, b], axis=1), axis=1)  # a row that is in both stands twice
    return float((both[:, 1:] == both[:, :-1]).sum() / a.size)


def _centered(x: NDArray[np.floating]) -> Array:
    wide = np.asarray(x, dtype=np.float64)
    return np.asarray(wide - wide.mean(axis=0))


def _hsic(x: Array, y: Array) -> tuple[float, float]:
    """HSIC of centered X and Y with linear kernels, biased and unbiased, each but for a factor that only n sets.

    For K = XXᵀ and L = YYᵀ with their diagonals set to 0, a_i = ‖x_i‖² and b_i = ‖y_i‖²: tr(KL) = ‖XᵀY‖² − Σ a_i b_i,
    and K1 = −a because rows sum to 0 with the diagonal.
    """
    n = len(x)
    a, b = (x**2).sum(1), (y**2).sum(1)
    biased = _alignment(x, y)
    unbiased = biased - a @ b + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a @ b)
    return biased, float(unbiased)


def _normalized(hsic: Array) -> Array:
    """A matrix of HSIC divided by the roots of its diagonal; NaN where that is not positive."""
    own = np.where(np.diag(hsic) > 0, np.diag(hsic), np.nan)
    return np.asarray(hsic / np.sqrt(np.outer(own, own)))


def _alignment(x: Array, y: Array) -> float:
    """``‖XᵀY‖²``, by the smaller of the two ways to it."""
    if len(x) < min(x.shape[1], y.shape[1]):
        return float(((x @ x.T) * (y @ y.T)).sum())
    return float(((x.T @ y) ** 2).sum())
