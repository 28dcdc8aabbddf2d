"""Patients with a known law: small test sets for the tests of statistics."""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp

from embcache.probe.metrics import find_metric
from embcache.probe.statistics import Scores, TestSet, sample

FEW = 100  # resamples, where only their number changes


def patients(
    seed: int, n_groups: int = 24, n_classes: int = 2, models: int = 3, gain: float = 1.5
) -> tuple[TestSet, np.ndarray]:
    """Patients of one class each, with one to three images."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_groups), rng.integers(1, 4, n_groups))
    labels = groups % n_classes
    z = gain * np.eye(n_classes)[labels] + rng.normal(size=(n_groups, n_classes))[groups]
    names = tuple("abcdefgh"[:n_classes])
    return TestSet(labels, groups.astype(str), names), z + 0.6 * rng.normal(size=(models, len(labels), n_classes))


def lesions(seed: int, n_groups: int = 30, n_classes: int = 6, images: int = 3) -> tuple[TestSet, np.ndarray]:
    """Patients with images of different classes: most sets of classes occur in one patient."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([rng.choice(n_classes, images, replace=False) for _ in range(n_groups)])
    groups = np.repeat(np.arange(n_groups), images)
    z = np.eye(n_classes)[labels] + 0.8 * rng.normal(size=(n_groups, n_classes))[groups]
    names = tuple("abcdefgh"[:n_classes])
    return TestSet(labels, groups.astype(str), names), z + rng.normal(size=(2, len(labels), n_classes))


def scored(key: str, test: TestSet, z: np.ndarray, resamples: int = FEW) -> Scores:
    return sample(find_metric(key, len(test.class_names)), test, z, resamples=resamples)


def width(interval: tuple[float, float] | None) -> float:
    assert interval is not None
    return interval[1] - interval[0]


def odds_of(z: np.ndarray, c: int) -> np.ndarray:
    return z[:, c] - logsumexp(np.delete(z, c, 1), axis=1)


def components(positive: np.ndarray, s: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """DeLong's structural components, pair by pair."""
    v10 = np.array([np.mean([(x > y) + (x == y) / 2 for y in s[~positive]]) for x in s[positive]])
    v01 = np.array([np.mean([(x > y) + (x == y) / 2 for x in s[positive]]) for y in s[~positive]])
    return float(v10.mean()), v10, v01
