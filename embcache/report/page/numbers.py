"""What is counted from saved predictions: ROC curves, calibration, confusion, scores of each class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embcache.probe.metrics import log_odds, per_class_auc
from embcache.report.compare import Tested

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

BINS = 10
"""Equal bins of confidence, 0 … 1, of the reliability curve and the calibration error."""

GRID = np.linspace(0, 1, 101)
"""False positive rates at which ROC curves of folds are averaged."""


def roc_points(positive: ArrayLike, scores: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """False and true positive rates at every distinct threshold, from (0, 0) to (1, 1).

    Parameters
    ----------
    positive : array-like of bool, shape (n,)
        With rows of both kinds.
    scores : array-like of float, shape (n,)
        Higher for positive.
    """
    side, values = np.asarray(positive, dtype=bool), np.asarray(scores, dtype=np.float64)
    order = np.argsort(-values, kind="stable")
    last = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)
    true = np.cumsum(side[order])[last]
    false = last + 1 - true
    return (
        np.concatenate([[0.0], false / max(int(false[-1]), 1)]),
        np.concatenate([[0.0], true / max(int(true[-1]), 1)]),
    )


def mean_roc(labels: IntArray, logits: FloatArray, of_class: int) -> tuple[FloatArray, FloatArray]:
    """Mean and standard deviation over fold models of the true positive rate at each rate of `GRID`.

    Parameters
    ----------
    labels : int64 array (n,)
        True classes.
    logits : float64 array (K, n, C)
        By each of K fold models.
    of_class : int
        Against all others.

    Returns
    -------
    mean, sd : float64 arrays of shape (101,)
    """
    curves = []
    for z in logits:
        false, true = roc_points(labels == of_class, log_odds(z)[:, of_class])
        # The highest rate reached at each false positive rate: a step up ends where the next begins.
        curve = np.interp(GRID, false, true)
        curve[0] = true[false == 0].max()
        curves.append(curve)
    stacked = np.stack(curves)
    return stacked.mean(0), stacked.std(0, ddof=1) if len(stacked) > 1 else np.zeros(len(GRID))


@dataclass(frozen=True, eq=False)
class Calibration:
    """How far confidence is accuracy.

    Attributes
    ----------
    confidence, accuracy : float64 arrays
        Means in each bin that has predictions, over all fold models together.
    share : float64 array
        Of all predictions that are in the bin.
    ece, ece_std : float
        Expected calibration error (Guo et al., 2017): mean over fold models, and standard deviation (0 of one).
    """

    confidence: FloatArray
    accuracy: FloatArray
    share: FloatArray
    ece: float
    ece_std: float


def calibrate(labels: IntArray, p: FloatArray) -> Calibration:
    """Reliability of the probability of the predicted class.

    Parameters
    ----------
    labels : int64 array (n,)
        True classes.
    p : float64 array (K, n, C)
        Class probabilities by each of K fold models.
    """
    confidence, right = p.max(2), p.argmax(2) == labels
    errors = [_gap(*_binned(c, r)) for c, r in zip(confidence, right, strict=True)]
    mean_confidence, accuracy, share = _binned(confidence.ravel(), right.ravel())
    spread = float(np.std(errors, ddof=1)) if len(errors) > 1 else 0.0
    return Calibration(mean_confidence, accuracy, share, float(np.mean(errors)), spread)


def _binned(confidence: FloatArray, right: NDArray[np.bool_]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mean confidence, accuracy and share of the bins that are not empty; a bin holds its upper bound, the first 0."""
    bins = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence)
    counts = np.bincount(bins, minlength=BINS).astype(np.float64)
    some = counts > 0
    total = np.where(some, counts, 1)
    means = np.bincount(bins, confidence, BINS) / total, np.bincount(bins, right.astype(np.float64), BINS) / total
    return means[0][some], means[1][some], (counts / len(confidence))[some]


def _gap(confidence: FloatArray, accuracy: FloatArray, share: FloatArray) -> float:
    return float((share * np.abs(accuracy - confidence)).sum())


def confusion(labels: IntArray, p: FloatArray) -> FloatArray:
    """Images of each true class (rows) predicted as each class (columns), mean over fold models; (C, C)."""
    n_classes = p.shape[2]
    cells = labels * n_classes + p.argmax(2)  # (K, n)
    counts = np.bincount(cells.ravel(), minlength=n_classes * n_classes).reshape(n_classes, n_classes)
    return np.asarray(counts / len(p), dtype=np.float64)


@dataclass(frozen=True)
class ClassScore:
    """One class under one model, means over fold models; None where it does not occur or is never predicted.

    Attributes
    ----------
    name : str
    n_images, n_groups : int
        In the test set.
    auc, auc_std, sensitivity, precision : float or None
    """

    name: str
    n_images: int
    n_groups: int
    auc: float | None
    auc_std: float | None
    sensitivity: float | None
    precision: float | None


def class_scores(t: Tested) -> list[ClassScore]:
    """Scores of every class of a result, one against all others."""
    aucs = [per_class_auc(t.labels, z) for z in t.predictions.logits]
    predicted = t.predictions.logits.argmax(2)  # (K, n)
    rows = []
    for c, name in enumerate(t.result.class_names):
        own = t.labels == c
        values = [float(value) for auc in aucs if (value := auc[c]) is not None]
        hits = [float((q[own] == c).mean()) for q in predicted] if own.any() else []
        purity = [float(own[q == c].mean()) for q in predicted if (q == c).any()]
        rows.append(
            ClassScore(
                name,
                int(own.sum()),
                len(set(t.groups[own])),
                _mean(values),
                float(np.std(values, ddof=1)) if len(values) > 1 else None,
                _mean(hits),
                _mean(purity),
            )
        )
    return rows


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
