"""What is counted from saved predictions: ROC curves, confusion, scores of each class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embcache.probe.metrics import log_odds, per_class_auc
from embcache.report.compare import Tested

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

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
        Against all others, ranked by its log odds.

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


def confusion(labels: IntArray, logits: FloatArray) -> IntArray:
    """Images of each true class (rows) predicted as each class (columns) by logits (n, C); (C, C)."""
    n_classes = logits.shape[1]
    return np.bincount(labels * n_classes + logits.argmax(1), minlength=n_classes**2).reshape(n_classes, n_classes)


@dataclass(frozen=True)
class ClassScore:
    """How well one class is told from the others, mean over fold models.

    Attributes
    ----------
    name : str
    n_images, n_groups : int
        In the test set.
    auc, auc_std, sensitivity, ppv : float or None
    """

    name: str
    n_images: int
    n_groups: int
    auc: float | None
    auc_std: float | None
    sensitivity: float | None
    ppv: float | None


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
