"""Bootstrap of the metrics that are reported beside a dataset's own, as weighted counts of many resamples at once.

`embcache.probe.metrics.bootstrap` does AUC, macro AUC and kappa; here are the others that
`embcache.probe.metrics.evaluate` gives, on the same resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embcache.probe.metrics import BOOTSTRAP_SEED, METRIC_NAMES, RESAMPLES, bootstrap, log_odds, resample_weights

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Scorer = Callable[[FloatArray], FloatArray]


def bootstrap_metric(
    metric: str,
    y: ArrayLike,
    p: ArrayLike,
    groups: Sequence[str] | NDArray[np.object_],
    *,
    resamples: int = RESAMPLES,
    seed: int = BOOTSTRAP_SEED,
) -> FloatArray:
    """As `embcache.probe.metrics.bootstrap`, for any number that `embcache.probe.metrics.evaluate` reports.

    Parameters
    ----------
    metric : str
        ``auc`` (macro one-vs-rest for more than two classes), ``macro_auc``, ``kappa``, ``auprc``, ``accuracy``,
        ``balanced_accuracy`` or ``sensitivity_at_95_specificity``.
    y : array-like of int, shape (n,)
        True labels, of two classes at least.
    p : array-like of float, shape (K, n, C)
        Class probabilities by each of K models.
    groups : sequence of str, length n
        Patient, slide … of each image.
    resamples, seed : int
        As there.

    Returns
    -------
    float64 array of shape (resamples,)
    """
    labels, models = np.asarray(y, dtype=np.int64), np.asarray(p, dtype=np.float64)
    if metric == "auc" and models.shape[2] > 2:
        metric = "macro_auc"
    if metric in METRIC_NAMES:
        return bootstrap(metric, labels, models, groups, resamples=resamples, seed=seed)
    scorers = [_SCORERS[metric](labels, q) for q in models]
    blocks = [
        np.mean([scorer(weights) for scorer in scorers], axis=0)
        for weights in resample_weights(labels, groups, resamples, seed)
    ]
    return np.asarray(np.concatenate(blocks))


def _accuracy(y: IntArray, p: FloatArray) -> Scorer:
    right = (p.argmax(1) == y).astype(np.float64)
    return lambda w: np.asarray(w @ right / w.sum(1))


def _balanced_accuracy(y: IntArray, p: FloatArray) -> Scorer:
    right = p.argmax(1) == y
    of_class = [(y == c) for c in np.unique(y)]
    return lambda w: np.asarray(np.mean([w @ (c & right) / (w @ c.astype(np.float64)) for c in of_class], axis=0))


def _one_vs_rest(y: IntArray, p: FloatArray, of_curve: Callable[[FloatArray, FloatArray], FloatArray]) -> Scorer:
    """Mean over the classes that occur (class 1 alone of two) of a number read off the counts above each threshold."""
    sides = [(y == 1, log_odds(p))] if p.shape[1] == 2 else [(y == c, p[:, c]) for c in np.unique(y)]
    curves = [_counts(positive, scores) for positive, scores in sides]
    return lambda w: np.asarray(np.mean([of_curve(*curve(w)) for curve in curves], axis=0))


def _counts(positive: NDArray[np.bool_], scores: FloatArray) -> Callable[[FloatArray], tuple[FloatArray, FloatArray]]:
    """Positives and negatives at or above each distinct score, from the highest; (B, distinct) of weights (B, n)."""
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))
    sign = positive[order]

    def counts(weights: FloatArray) -> tuple[FloatArray, FloatArray]:
        w = weights[:, order]
        return (
            np.cumsum(np.add.reduceat(w * sign, starts, axis=1), axis=1),
            np.cumsum(np.add.reduceat(w * ~sign, starts, axis=1), axis=1),
        )

    return counts


def _average_precision(tp: FloatArray, fp: FloatArray) -> FloatArray:
    """Σ (recallₙ − recallₙ₋₁) precisionₙ, as scikit-learn defines it."""
    steps = np.diff(tp, axis=1, prepend=0) / tp[:, -1:]
    precision = np.divide(tp, tp + fp, out=np.zeros_like(tp), where=tp + fp > 0)
    return np.asarray((steps * precision).sum(1))


def _sensitivity_at_95(tp: FloatArray, fp: FloatArray) -> FloatArray:
    """Highest sensitivity among the thresholds whose specificity is at least 0.95."""
    allowed = fp / fp[:, -1:] <= 0.05 + 1e-12
    return np.asarray(np.where(allowed, tp / tp[:, -1:], 0.0).max(1))


_SCORERS: Mapping[str, Callable[[IntArray, FloatArray], Scorer]] = {
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
    "auprc": lambda y, p: _one_vs_rest(y, p, _average_precision),
    "sensitivity_at_95_specificity": lambda y, p: _one_vs_rest(y, p, _sensitivity_at_95),
}
