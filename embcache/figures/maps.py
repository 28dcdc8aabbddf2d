"""Maps of embeddings in the plane (the paper's Figures 2, D1, D2), and how far a map or an embedding can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from sklearn.metrics import pairwise_distances_chunked

from embcache.cores import usable_cores
from embcache.errors import ProtocolError, UsageError, check_choice, check_number
from embcache.probe.standard import standardized

METHODS = ("tsne", "umap", "pca")
PERPLEXITY = 30.0
NEIGHBOURS = 10
"""Of an image, wherever neighbourhoods are looked at."""

MAP_VERSION = 3
"""Raised whenever `embed_map` would give other coordinates of the same features: those kept are then made anew."""

_COMPONENTS = 50
_ALONE = 2_000  # images up to which further threads gain nothing
_DISTANCES = 256  # MiB of distances held at a time
_FEW = 10_000  # images up to which exact neighbours and Barnes-Hut are the faster way (docs/log.md)


def embed_map(
    features: ArrayLike, method: str = "tsne", *, seed: int = 0, perplexity: float = PERPLEXITY
) -> NDArray[np.float32]:
    """Two-dimensional map of standardised features; the same for the same seed.

    Shapes: features (n, D); returns (n, 2).
    """
    check_choice("--method", method, METHODS)
    check_number("--perplexity", perplexity, 1.0, 1000.0)
    check_number("--seed", seed, 0, 2**32 - 1)
    X = np.asarray(features, dtype=np.float32)
    if len(X) < 4:
        raise ProtocolError("too few images for a map", expected="at least 4", found=str(len(X)))
    X = standardized(X)
    if method == "umap":
        return _umap(X, seed, max(2, min(round(perplexity / 2), len(X) - 1)))
    if method == "pca":
        return _principal(X, seed, 2)
    return _tsne(_principal(X, seed, _COMPONENTS), seed, min(perplexity, (len(X) - 1) / 3))


def _principal(X: NDArray[np.float32], seed: int, most: int) -> NDArray[np.float32]:
    """The first principal components, (n, 2 … most)."""
    if X.shape[1] == 1:
        return np.column_stack([X, np.zeros_like(X)])
    found = PCA(min(most, *X.shape), svd_solver="auto", random_state=seed).fit_transform(X)
    return np.asarray(found, dtype=np.float32)


def _tsne(X: NDArray[np.float32], seed: int, perplexity: float) -> NDArray[np.float32]:
    from openTSNE import TSNE

    start = X[:, :2]
    few = len(X) <= _FEW
    tsne = TSNE(
        perplexity=perplexity,
        neighbors="exact" if few else "auto",
        negative_gradient_method="bh" if few else "fft",
        # Scaled as openTSNE does itself: the deviation of the first axis is 1e-4.
        initialization=(start / max(float(start[:, 0].std()), 1e-12) * 1e-4).astype(np.float64),
        random_state=seed,
        n_jobs=usable_cores() if len(X) > _ALONE else 1,
    )
    return np.asarray(tsne.fit(X), dtype=np.float32)


def _umap(X: NDArray[np.float32], seed: int, neighbours: int) -> NDArray[np.float32]:
    try:
        from umap import UMAP
    except ImportError as error:
        raise UsageError(
            "UMAP is not installed", expected="the package umap-learn", fix='pip install "embcache[umap]"'
        ) from error
    # One job: with a seed umap-learn takes no more, and warns if more are asked for.
    mapped = UMAP(n_neighbors=neighbours, random_state=seed, n_jobs=1).fit_transform(X)
    return np.asarray(mapped, dtype=np.float32)


@dataclass(frozen=True)
class MapScores:
    """Scores of an embedding and of its map, over the images shown."""

    silhouette: float | None  # mean silhouette of the classes in the standardized embedding, −1 … 1
    knn_accuracy: float | None  # `neighbour_accuracy` in the embedding, not in its map
    trustworthiness: float


def decimals(score: float | None, places: int) -> str:
    """A score as text; a dash where there is none."""
    return "–" if score is None else f"{score:.{places}f}"


def score_map(
    features: ArrayLike, coordinates: ArrayLike, labels: NDArray[np.int64], groups: Sequence[str]
) -> MapScores:
    """Scores of an embedding (n, D) and of its map (n, 2), with the class and the group of each image shown."""
    X = standardized(features)
    silhouette, accuracy = _scores_among_groups(X, labels, groups, NEIGHBOURS)
    k = max(1, min(NEIGHBOURS, (len(X) - 1) // 2))
    trust = float(trustworthiness(X, np.asarray(coordinates), n_neighbors=k))
    return MapScores(silhouette, accuracy, trust)


def neighbour_accuracy(
    features: ArrayLike, labels: NDArray[np.int64], groups: Sequence[str], k: int = NEIGHBOURS
) -> float | None:
    """Balanced accuracy of the majority class among each image's k nearest images of other groups.

    A patient's other images say nothing about the class, however near they are. Ties go to the nearer neighbors.

    Shapes: features (n, D); labels (n,).
    """
    return _scores_among_groups(standardized(features), labels, groups, k)[1]


def _scores_among_groups(
    x: NDArray[np.float32], labels: NDArray[np.int64], groups: Sequence[str], k: int
) -> tuple[float | None, float | None]:
    """Silhouette and balanced accuracy of neighbors, in one pass over the distances between images of other groups."""
    classes, y = np.unique(labels, return_inverse=True)
    group = np.unique(np.asarray(groups, dtype=object).astype(str), return_inverse=True)[1]
    one_hot = np.eye(len(classes))[y]  # (n, C)
    own_group = np.zeros((group.max() + 1, len(classes)))
    np.add.at(own_group, group, one_hot)
    counts = one_hot.sum(0) - own_group[group]  # (n, C) of images of other groups
    k = min(k, len(x) - 1)
    weights = 1 + np.arange(k, 0, -1) * 1e-6

    def summarize(distances: NDArray[np.floating], start: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        same = group[start : start + len(distances), None] == group
        sums = np.where(same, 0, distances) @ one_hot
        distances[same] = np.inf
        near = np.argpartition(distances, k - 1, axis=1)[:, :k]
        far = np.take_along_axis(distances, near, axis=1)
        order = np.argsort(far, axis=1, kind="stable")
        near, known = np.take_along_axis(near, order, axis=1), np.isfinite(np.take_along_axis(far, order, axis=1))
        return sums, ((known * weights)[:, :, None] * one_hot[near]).sum(1)

    parts = pairwise_distances_chunked(x, reduce_func=summarize, working_memory=_DISTANCES)
    sums, votes = (np.concatenate(part) for part in zip(*parts, strict=True))
    rows = np.arange(len(x))
    right = votes.argmax(1) == y
    voted = votes.any(1)
    # Balanced accuracy: the mean recall of the classes that are there.
    recalls = [right[voted & (y == c)].mean() for c in np.unique(y[voted])]
    means = np.divide(sums, counts, out=np.full_like(sums, np.inf), where=counts > 0)
    within = means[rows, y]
    means[rows, y] = np.inf
    between = means.min(1)
    known = np.isfinite(within) & np.isfinite(between)
    silhouettes = np.zeros(len(x))  # as scikit-learn has it where there is nothing to compare
    within, between = within[known], between[known]
    silhouettes[known] = (between - within) / np.maximum(np.maximum(within, between), 1e-30)
    return float(silhouettes.mean()) if known.any() else None, float(np.mean(recalls)) if recalls else None
