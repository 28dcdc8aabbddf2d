"""ROC and precision–recall curves of saved predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from embcache.probe.metrics import FloatArray, IntArray, log_odds, roc_counts
from embcache.probe.predictions import Predictions
from embcache.results.decisions import against_rest
from embcache.runs.result import Estimate

GRID = np.linspace(0, 1, 201)
"""False positive rates, or recalls, at which the curves of models are averaged."""


def roc_points(positive: ArrayLike, scores: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """False and true positive rates at every distinct threshold, from (0, 0) to (1, 1)."""
    true, false = roc_counts(positive, scores)
    return np.append(0.0, false / false[-1]), np.append(0.0, true / true[-1])


def precision_recall_points(positive: ArrayLike, scores: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Each recall above 0, ascending, and the precision at the highest threshold that reaches it.

    Precision is constant from one recall to the next, as scikit-learn's average precision takes it to be: lines that
    join the points would promise precisions that no threshold has.
    """
    true, false = roc_counts(positive, scores)
    reached = np.flatnonzero(np.diff(true, prepend=0))
    return true[reached] / true[-1], true[reached] / (true + false)[reached]


def roc_at(positive: ArrayLike, scores: ArrayLike) -> FloatArray:
    """The highest true positive rate at each false positive rate of `GRID`; a step up ends where the next begins."""
    false, true = roc_points(positive, scores)
    curve = np.interp(GRID, false, true)
    curve[0] = true[false == 0].max()
    return curve


def precision_at(positive: ArrayLike, scores: ArrayLike) -> FloatArray:
    """Precision at the highest threshold that reaches each recall of `GRID`; its mean is close to the AUPRC."""
    recall, precision = precision_recall_points(positive, scores)
    return precision[np.searchsorted(recall, GRID - 1e-12)]  # the first is above 0, and the last is 1


def mean_curve(
    labels: IntArray,
    logits: FloatArray,
    of_class: int,
    at: Callable[[ArrayLike, ArrayLike], FloatArray] = roc_at,
) -> tuple[FloatArray, FloatArray]:
    """Mean and standard deviation over models of a class's curve at each value of `GRID`.

    Shapes: labels (n,); logits (K, n, C); returns (201,).
    """
    curves = np.stack([at(labels == of_class, odds) for odds in log_odds(logits)[..., of_class]])
    return curves.mean(0), curves.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(GRID))


@dataclass(frozen=True, eq=False)
class Rates:
    """One class against the rest: the curve of the models and of their ensemble."""

    name: str  # of the class
    images: int
    groups: int
    share: float  # of the class among the test images
    mean: FloatArray
    sd: FloatArray
    x: FloatArray
    y: FloatArray
    estimate: Estimate
    ensemble: Estimate


def class_rates(predictions: Predictions, of_class: int, metric: str) -> Rates:
    """ROC (``metric="auc"``) or precision–recall curves (``"auprc"``) of a class that occurs, as do others."""
    at, points = (roc_at, roc_points) if metric == "auc" else (precision_at, precision_recall_points)
    mean, sd = mean_curve(predictions.labels, predictions.logits, of_class, at)
    two = against_rest(predictions, of_class)
    own, one = two.labels == 1, two.ensemble()
    x, y = points(own, one.logits[0, :, 1] - one.logits[0, :, 0])
    if metric == "auprc":
        x, y = np.append(0.0, np.repeat(x, 2)[:-1]), np.repeat(y, 2)  # as steps
    return Rates(
        name=predictions.class_names[of_class],
        images=int(own.sum()),
        groups=len(np.unique(two.groups[own])),
        share=float(own.mean()),
        mean=mean,
        sd=sd,
        x=x,
        y=y,
        estimate=two.estimate(metric),
        ensemble=one.estimate(metric),
    )
