"""Transferability of embeddings: how well features serve a task, from the features and the labels alone."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.covariance import ledoit_wolf

from embcache.cores import threads_for
from embcache.data.groups import IntArray
from embcache.probe.layers import standardized

Array = NDArray[np.float64]


def logme(x: NDArray[np.floating], y: IntArray) -> float:
    """Logarithm of maximum evidence (You et al. 2021): how well features explain labels by Bayesian linear regression.

    For each class, 0/1 targets are regressed on the features with a Gaussian prior of precision α and noise of
    precision β; the log evidence per image, at the α and β that maximize it, is averaged over classes. The authors
    iterate a fixed point; here β is solved for and λ = α/β searched, which finds the same maximum also where there are
    fewer images than features and the iteration breaks down.

    Shapes: x (n, D); y (n,).
    """
    X = np.asarray(x, dtype=np.float64)
    n = len(X)
    targets = (np.asarray(y)[:, None] == np.unique(y)).astype(np.float64)  # (n, classes)
    with threads_for(X.size):
        s2, projected = _spectrum(X, targets)
    values = []
    for c in range(targets.shape[1]):
        rest = max(float(targets[:, c].sum() - (projected[:, c] ** 2).sum()), 0.0)  # outside the features' span
        values.append(_max_evidence(s2, projected[:, c] ** 2, rest, n))
    return float(np.mean(values))


def h_score(x: NDArray[np.floating], y: IntArray) -> float:
    """Regularized H-score (Ibrahim et al. 2021): between-class variance in units of the features' covariance.

    ``tr(Σ_α⁻¹ (1 − α) Σ_z)``, with Σ_α the Ledoit-Wolf estimate of the covariance, α its shrinkage, and Σ_z the
    covariance of the features replaced by their class means (both divided by n). Between 0 and the number of classes
    less one.

    Shapes: x (n, D); y (n,).
    """
    X, y = np.asarray(x, dtype=np.float64), np.asarray(y)
    X = X - X.mean(axis=0)
    if not X.any():
        return 0.0
    with threads_for(X.size):
        covariance, shrinkage = ledoit_wolf(X, assume_centered=True)
        classes, counts = np.unique(y, return_counts=True)
        means = np.stack([X[y == c].mean(axis=0) for c in classes])  # (classes, D)
        if shrinkage > 0:
            solved = scipy.linalg.cho_solve(scipy.linalg.cho_factor(covariance), means.T)  # (D, classes)
        else:  # nothing was shrunk, so that there may be no inverse
            solved = np.linalg.pinv(covariance, hermitian=True) @ means.T
    return float((1 - shrinkage) * (counts / len(X) * np.einsum("cd,dc->c", means, solved)).sum())


def centroid_logits(x: NDArray[np.floating], y: IntArray, held: NDArray[np.floating], n_classes: int) -> Array:
    """Nearest class centroid on features standardized by the training rows, as logits.

    Shapes: x, held (n, D); y (n,); returns (m, C).
    """
    z, h = (standardized(rows, by=x).astype(np.float64) for rows in (x, held))
    centroids = np.stack([z[y == c].mean(axis=0) for c in range(n_classes)])  # (C, D)
    squared = (h**2).sum(1)[:, None] - 2 * h @ centroids.T + (centroids**2).sum(1)
    return np.asarray(-0.5 * squared / x.shape[1])


def _spectrum(x: Array, targets: Array) -> tuple[Array, Array]:
    """Squared singular values (r,) of X above rounding, and the targets along its left singular vectors, (r, c)."""
    if len(x) <= x.shape[1]:
        values, left = np.linalg.eigh(x @ x.T)
        kept = values > values[-1] * len(x) * np.finfo(np.float64).eps
        return values[kept], left[:, kept].T @ targets
    values, right = np.linalg.eigh(x.T @ x)
    kept = values > values[-1] * x.shape[1] * np.finfo(np.float64).eps
    return values[kept], (right[:, kept].T @ (x.T @ targets)) / np.sqrt(values[kept])[:, None]


def _max_evidence(s2: Array, t2: Array, rest: float, n: int) -> float:
    """Log evidence per image at its maximum over α and β.

    With λ = α/β the targets are N(0, (I + XXᵀ/λ)/β), so the best 1/β is ``q(λ)/n``, q = rest + Σ t² λ/(λ + s²).
    """
    if not len(s2):
        s2, t2 = np.ones(1), np.zeros(1)  # features that are all zero explain nothing

    def loss(log_lambda: float) -> float:
        shrunk = s2 / np.exp(log_lambda)
        q = max(rest + float((t2 / (1 + shrunk)).sum()), np.finfo(np.float64).tiny)
        return float(np.log(q / n) + np.log1p(shrunk).sum() / n)

    # The loss can have more than one minimum: a grid finds the neighborhood of the lowest, then it is refined.
    grid = np.log(s2.max()) + np.linspace(-30.0, 30.0, 121)
    best = int(np.argmin([loss(point) for point in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    least = min(loss(grid[best]), float(minimize_scalar(loss, bounds=(low, high), method="bounded").fun))
    return float(-0.5 * (np.log(2 * np.pi) + 1 + least))
