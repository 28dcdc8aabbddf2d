"""LogME, H-score and nearest centroid against transcriptions of their papers' code, scipy and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler

from embcache.figures.rank import centroid_logits, h_score, logme


def draw(n: int, dim: int, n_classes: int, shift: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, n_classes, n)
    y[:n_classes] = np.arange(n_classes)
    mixing = rng.normal(size=(dim, dim)) / np.sqrt(dim)
    x = (rng.normal(size=(n, dim)) + shift * rng.normal(size=(n_classes, dim))[y]) @ mixing
    return x.astype(np.float32), y


def published_logme(f: np.ndarray, y: np.ndarray) -> float:
    """The fixed point of You et al. (2021), Algorithm 1, for more images than features; iterated to rest."""
    f = f.astype(np.float64)
    n, d = f.shape
    _, s, vh = np.linalg.svd(f, full_matrices=True)
    sigma = s**2
    evidences = []
    for c in range(int(y.max()) + 1):
        target = (y == c).astype(np.float64)
        alpha, beta = 1.0, 1.0
        for _ in range(5000):
            gamma = (beta * sigma / (alpha + beta * sigma)).sum()
            m = vh.T @ (beta * (vh @ (f.T @ target)) / (alpha + beta * sigma))
            residual = ((target - f @ m) ** 2).sum()
            alpha, beta, before = gamma / (m @ m), (n - gamma) / residual, alpha / beta
            if abs(alpha / beta - before) < 1e-10 * before:
                break
        m = vh.T @ (beta * (vh @ (f.T @ target)) / (alpha + beta * sigma))
        residual = ((target - f @ m) ** 2).sum()
        log_det = np.log(alpha + beta * sigma).sum()
        evidence = n / 2 * np.log(beta) + d / 2 * np.log(alpha) - n / 2 * np.log(2 * np.pi)
        evidences.append((evidence - beta / 2 * residual - alpha / 2 * (m @ m) - log_det / 2) / n)
    return float(np.mean(evidences))


@pytest.mark.parametrize(("n", "dim", "n_classes"), [(300, 20, 2), (200, 60, 4)])
def test_logme_is_the_published_fixed_point(n: int, dim: int, n_classes: int) -> None:
    x, y = draw(n, dim, n_classes)
    assert logme(x, y) == pytest.approx(published_logme(x, y), rel=1e-5)


@pytest.mark.parametrize(("n", "dim"), [(20, 60), (40, 8), (30, 30)])
def test_logme_is_the_largest_evidence_of_the_gaussian_it_describes(n: int, dim: int) -> None:
    x, y = draw(n, dim, 2, 0.5)
    wide = x.astype(np.float64)

    def negative(logs: np.ndarray, target: np.ndarray) -> float:
        alpha, beta = np.exp(logs)
        covariance = np.eye(n) / beta + wide @ wide.T / alpha
        return -float(multivariate_normal(np.zeros(n), covariance).logpdf(target)) / n

    best = []
    for c in (0, 1):
        target = (y == c).astype(np.float64)
        starts = [np.array([a, b]) for a in (-2.0, 2.0, 6.0) for b in (0.0, 3.0)]
        bounds = [(-12, 12)] * 2
        best.append(min(minimize(negative, s, args=(target,), method="L-BFGS-B", bounds=bounds).fun for s in starts))
    assert logme(x, y) == pytest.approx(-np.mean(best), abs=1e-4)


def test_logme_prefers_features_that_tell_the_classes_apart() -> None:
    values = [logme(*draw(200, 30, 3, shift)) for shift in (0.0, 1.0, 3.0)]
    assert values == sorted(values)
    assert np.isfinite(logme(np.zeros((10, 3)), np.arange(10) % 2))


def published_h_score(features: np.ndarray, labels: np.ndarray) -> float:
    """Ibrahim et al. (2021): Ledoit-Wolf covariance of the features, covariance of their class means."""
    f = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    estimate = LedoitWolf(assume_centered=False).fit(f)
    g = np.zeros_like(f)
    for c in np.unique(labels):
        g[labels == c] = f[labels == c].mean(axis=0)
    between = np.cov(g, rowvar=False, bias=True)
    inverse = np.linalg.pinv(estimate.covariance_, rcond=1e-15)
    return float(np.trace(inverse @ ((1 - estimate.shrinkage_) * between)))


@pytest.mark.parametrize(("n", "dim", "n_classes"), [(300, 20, 2), (30, 60, 3), (200, 60, 4)])
def test_h_score_is_the_published_one(n: int, dim: int, n_classes: int) -> None:
    x, y = draw(n, dim, n_classes)
    x[:, 3] = 7.0  # a feature that never varies
    assert h_score(x, y) == pytest.approx(published_h_score(x, y), rel=1e-6)
    assert 0 < h_score(x, y) < n_classes - 1


def test_h_score_of_degenerate_features_is_a_number() -> None:
    assert h_score(np.ones((10, 4)), np.arange(10) % 2) == 0
    assert h_score(np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([0, 1])) == pytest.approx(1)


@pytest.mark.parametrize("n_classes", [2, 5])
def test_nearest_centroid_is_scikit_learns(n_classes: int) -> None:
    x, y = draw(100, 12, n_classes)
    held, _ = draw(60, 12, n_classes, seed=1)
    scaler = StandardScaler().fit(x.astype(np.float64))
    theirs = NearestCentroid().fit(scaler.transform(x), y)
    logits = centroid_logits(x, y, held, n_classes)
    z = scaler.transform(held.astype(np.float64))
    np.testing.assert_array_equal(logits.argmax(1), theirs.predict(z))
    distances = ((z[:, None] - theirs.centroids_) ** 2).mean(-1)
    np.testing.assert_allclose(logits, -distances / 2, rtol=1e-5)
