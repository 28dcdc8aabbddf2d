"""Maps of embeddings in the plane (the paper's Figures 2, D1, D2), their scores, and their cached coordinates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from sklearn.metrics import pairwise_distances_chunked

from embcache.cores import usable_cores
from embcache.errors import ProtocolError, StoreError, UsageError, check_choice, check_number
from embcache.io import keep_file
from embcache.probe.layers import standardized
from embcache.sealed import read_sealed, seal

METHODS = {"tsne": "openTSNE", "umap": "umap-learn", "pca": "scikit-learn"}
"""Methods, each with the package that it is from."""

PERPLEXITY = 30.0
NEIGHBORS = 10
"""Of an image, wherever neighborhoods are looked at."""

MAP_VERSION = 3
"""Raised whenever `embed_map` would give other coordinates of the same features: cached ones are then computed anew."""

_COMPONENTS = 50
_ALONE = 2_000  # images up to which further threads gain nothing
_DISTANCES = 256  # MiB of distances held at a time
_FEW = 10_000  # images up to which exact neighbors and Barnes-Hut are faster (docs/log.md)


def embed_map(
    features: ArrayLike, method: str = "tsne", *, seed: int = 0, perplexity: float = PERPLEXITY
) -> NDArray[np.float32]:
    """Two-dimensional map of standardized features (n, D) → (n, 2); the same for the same seed."""
    check_choice("--method", method, METHODS)
    check_number("--perplexity", perplexity, 1.0, 1000.0)
    check_number("--seed", seed, 0, 2**32 - 1)
    X = np.asarray(features, dtype=np.float32)
    if len(X) < 4:
        raise ProtocolError("too few images for a map", code="too-few-images", expected="at least 4",
                            found=str(len(X)))  # fmt: skip
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

    start, few = X[:, :2], len(X) <= _FEW
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


def _umap(X: NDArray[np.float32], seed: int, neighbors: int) -> NDArray[np.float32]:
    try:
        from umap import UMAP
    except ImportError as error:
        raise UsageError("UMAP is not installed", code="missing-package", expected="the package umap-learn",
                         fix='pip install "embcache[umap]"') from error  # fmt: skip
    # One job: with a seed umap-learn takes no more, and warns about more.
    mapped = UMAP(n_neighbors=neighbors, random_state=seed, n_jobs=1).fit_transform(X)
    return np.asarray(mapped, dtype=np.float32)


def cached_map(
    folder: Path,
    source: Mapping[str, Any],
    ids: Sequence[str],
    features: NDArray[np.float32],
    method: str,
    *,
    seed: int,
    perplexity: float,
) -> NDArray[np.float32]:
    """`embed_map` of features (n, D), read where the same map was computed before; ``source`` names their origin."""
    try:
        package = version(METHODS[method]) if method in METHODS else ""
    except PackageNotFoundError:
        package = ""
    key = {
        "source": dict(source),
        "images": hashlib.sha256("\0".join(ids).encode("utf-8")).hexdigest(),
        "features": hashlib.sha256(np.ascontiguousarray(features).tobytes()).hexdigest(),
        "method": method,
        "seed": seed,
        "perplexity": perplexity,
        "map": MAP_VERSION,
        "version": package,
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode("utf-8")).hexdigest()[:16]
    path = folder / f"{method}-{name}.json"
    try:
        kept = read_sealed(path, "")
        coordinates = np.asarray(kept["coordinates"], dtype=np.float32)
        if kept["key"] == key and coordinates.shape == (len(ids), 2) and np.isfinite(coordinates).all():
            return coordinates
    except (OSError, StoreError, KeyError, ValueError, TypeError):
        pass  # missing, or not as it was written: it only saves work
    coordinates = embed_map(features, method, seed=seed, perplexity=perplexity)
    keep_file(path, seal({"key": key, "coordinates": coordinates.tolist()}))
    return coordinates


@dataclass(frozen=True)
class MapScores:
    """Scores of an embedding and of its map, over the images shown."""

    silhouette: float | None  # mean silhouette of the classes in the standardized embedding, −1 … 1
    knn_accuracy: float | None  # `neighbor_accuracy` in the embedding, not in its map
    trustworthiness: float


def decimals(score: float | None, places: int) -> str:
    """A score as text; a dash where there is none."""
    return "–" if score is None else f"{score:.{places}f}"


def score_map(
    features: ArrayLike, coordinates: ArrayLike, labels: NDArray[np.int64], groups: Sequence[str]
) -> MapScores:
    """Scores of an embedding (n, D) and of its map (n, 2), with the class and the group of each image shown."""
    X = standardized(features)
    silhouette, accuracy = _scores_among_groups(X, labels, groups, NEIGHBORS)
    k = max(1, min(NEIGHBORS, (len(X) - 1) // 2))
    return MapScores(silhouette, accuracy, float(trustworthiness(X, np.asarray(coordinates), n_neighbors=k)))


def neighbor_accuracy(
    features: ArrayLike, labels: NDArray[np.int64], groups: Sequence[str], k: int = NEIGHBORS
) -> float | None:
    """Balanced accuracy of the majority class among each image's k nearest images of other groups.

    A patient's other images say nothing about the class, however near they are. Ties go to the nearer neighbors.
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
    right, voted = votes.argmax(1) == y, votes.any(1)
    recalls = [right[voted & (y == c)].mean() for c in np.unique(y[voted])]  # balanced accuracy is their mean
    means = np.divide(sums, counts, out=np.full_like(sums, np.inf), where=counts > 0)
    rows = np.arange(len(x))
    within = means[rows, y]
    means[rows, y] = np.inf
    between = means.min(1)
    known = np.isfinite(within) & np.isfinite(between)
    silhouettes = np.zeros(len(x))  # 0 where there is nothing to compare, as in scikit-learn
    within, between = within[known], between[known]
    silhouettes[known] = (between - within) / np.maximum(np.maximum(within, between), 1e-30)
    return float(silhouettes.mean()) if known.any() else None, float(np.mean(recalls)) if recalls else None
