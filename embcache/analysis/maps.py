"""Maps of embeddings in the plane (the paper's Figures 2, D1, D2), and how far a map or an embedding can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from embcache.cores import usable_cores
from embcache.errors import ProtocolError, UsageError
from embcache.probe.standard import standardized

METHODS = ("tsne", "umap", "pca")
PERPLEXITY = 30.0
NEIGHBOURS = 10
"""Of an image, wherever neighbourhoods are looked at."""

MAP_VERSION = 3
"""Raised whenever `embed_map` would give other coordinates of the same features: those kept are then made anew."""

_COMPONENTS = 50
_ALONE = 2_000  # images up to which further threads gain nothing
_FEW = 10_000  # images up to which exact neighbours and Barnes-Hut are the faster way (docs/log.md)


def embed_map(
    features: ArrayLike, method: str = "tsne", *, seed: int = 0, perplexity: float = PERPLEXITY
) -> NDArray[np.float32]:
    """Two-dimensional map of standardised features; the same for the same seed.

    Parameters
    ----------
    features : array-like of shape (n, D)
        Standardised here, each component.
    method : {"tsne", "umap", "pca"}
        t-SNE by openTSNE (Poličar et al., 2019) of the first 50 principal components, from the first two of them
        (Kobak and Berens, 2019); UMAP by umap-learn (extra ``umap``), with as many neighbours as half the perplexity;
        the first two principal components.
    seed : int
        Of the optimisation.
    perplexity : float
        Of t-SNE; lowered to a third of the neighbours there are where images are few.

    Returns
    -------
    ndarray of shape (n, 2), float32

    Raises
    ------
    ProtocolError
        Fewer than four images: there is no neighbourhood to keep.
    UsageError
        There is no such method, or what computes it is not installed.
    """
    if method not in METHODS:
        raise UsageError("there is no such method", expected=", ".join(METHODS), found=method, fix="--method tsne")
    if not 1 <= perplexity <= 1000:
        raise UsageError("not a perplexity", expected="1 to 1000", found=str(perplexity), fix="--perplexity 30")
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
    """What is printed under a map.

    Attributes
    ----------
    silhouette : float or None
        Mean silhouette of the classes in the standardised embedding, −1 … 1; None with a single class.
    knn_accuracy : float
        `neighbour_accuracy` in the embedding, not in its map.
    trustworthiness : float
        How far neighbours in the map are neighbours in the embedding (Venna and Kaski, 2001), 0 … 1.
    """

    silhouette: float | None
    knn_accuracy: float
    trustworthiness: float


def score_map(features: ArrayLike, coordinates: ArrayLike, labels: NDArray[np.int64]) -> MapScores:
    """Scores of an embedding (n, D) and of its map (n, 2), on the images shown."""
    X = standardized(features)
    classes = len(np.unique(labels))
    silhouette = float(silhouette_score(X, labels)) if 1 < classes < len(X) else None
    k = max(1, min(NEIGHBOURS, (len(X) - 1) // 2))
    trust = float(trustworthiness(X, np.asarray(coordinates), n_neighbors=k))
    return MapScores(silhouette, _neighbour_accuracy(X, labels, NEIGHBOURS), trust)


def neighbour_accuracy(features: NDArray[np.float32], labels: NDArray[np.int64], k: int = NEIGHBOURS) -> float:
    """Balanced accuracy of the majority class among each image's k nearest others, ties to the nearer neighbours.

    Parameters
    ----------
    features : float32 array of shape (n, D)
        Standardised here.
    labels : int64 array of shape (n,)
        0 … C − 1.
    k : int
        Lowered to the others there are.
    """
    return _neighbour_accuracy(standardized(features), labels, k)


def _neighbour_accuracy(x: NDArray[np.float32], labels: NDArray[np.int64], k: int) -> float:
    k = min(k, len(x) - 1)
    near = NearestNeighbors(n_neighbors=k).fit(x).kneighbors(return_distance=False)  # (n, k), an image never its own
    votes = np.zeros((len(x), int(labels.max()) + 1))
    for rank in range(k):
        votes[np.arange(len(x)), labels[near[:, rank]]] += 1 + (k - rank) * 1e-6
    # Balanced accuracy: the mean recall of the classes that are there (scikit-learn warns of a single one).
    right = votes.argmax(1) == labels
    return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))
