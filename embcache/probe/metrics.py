"""Scores of predicted probabilities, and bootstrap intervals over groups.

scikit-learn does the arithmetic of every test score; the bootstrap repeats the datasets' own metrics for thousands of
resamples at once, as weighted counts, and tests hold these against scikit-learn with ``sample_weight``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embcache.errors import ProtocolError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

METRIC_NAMES: Mapping[str, str] = {"auc": "AUC", "macro_auc": "macro AUC", "kappa": "kappa"}
"""The metrics that a dataset can have, as tables name them."""

RESAMPLES = 2000
BOOTSTRAP_SEED = 20_210_823
"""One seed for all results, so that two rows on the same test set are compared on the same resamples."""

_BLOCK = 50  # resamples drawn and scored at a time; part of the random stream, so a constant


def _sklearn() -> Any:
    """scikit-learn's metrics, imported when a model is tested: training comes first and does without them."""
    import sklearn.metrics

    return sklearn.metrics


def softmax(logits: ArrayLike) -> FloatArray:
    """Class probabilities in float64: float32 would round confident ones to ties at 1.

    Parameters
    ----------
    logits : array-like of float, shape (..., C)
        Unnormalised log probabilities.

    Returns
    -------
    float64 array of shape (..., C)
    """
    z = np.asarray(logits, dtype=np.float64)
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def score(metric: str, y: ArrayLike, p: ArrayLike) -> float:
    """One number for predictions; higher is better.

    Parameters
    ----------
    metric : {"auc", "macro_auc", "kappa"}
        Area under the ROC curve of class 1; mean one-vs-rest AUC over the classes that occur in ``y`` (choice);
        quadratic weighted kappa of the most probable class.
    y : array-like of int, shape (n,)
        True labels.
    p : array-like of float, shape (n, C)
        Class probabilities.

    Raises
    ------
    ProtocolError
        ``y`` holds fewer than two classes, or ``metric`` is unknown or does not fit the number of classes.
    """
    labels, probabilities = _checked(metric, y, p)
    if metric == "kappa":
        return _kappa(labels, probabilities)
    if metric == "auc":
        return float(_sklearn().roc_auc_score(labels, log_odds(probabilities)))
    values = [value for value in per_class_auc(labels, probabilities) if value is not None]
    return float(np.mean(values))


def selection_score(metric: str, y: ArrayLike, p: ArrayLike) -> float:
    """`score`, counted instead of integrated: what training compares epochs by.

    Parameters and errors as of `score`; see `selection_scorer`.
    """
    return selection_scorer(metric, y, np.shape(p)[1])(np.asarray(p, dtype=np.float64))


def selection_scorer(metric: str, y: ArrayLike, n_classes: int) -> Callable[[FloatArray], float]:
    """A function of probabilities (n, C) that scores them on one set of labels, again and again.

    Pairs and cells are counted in whole numbers, so that two epochs that rank all images alike have exactly equal
    scores (ties keep the earliest epoch), and without scikit-learn's input checks, which cost more than an epoch does.
    The value is that of `score` to rounding.

    Parameters
    ----------
    metric : {"auc", "macro_auc", "kappa"}
        As for `score`.
    y : array-like of int, shape (n,)
        True labels.
    n_classes : int
        C.

    Raises
    ------
    ProtocolError
        As of `score`.
    """
    labels, _ = _checked(metric, y, np.zeros((0, n_classes)))
    if metric == "kappa":
        once = np.ones((1, len(labels)))
        return lambda p: float(_weighted_kappa(labels, p)(once)[0])
    if metric == "auc":
        positive = labels == 1
        return lambda p: _counted_auc(positive, log_odds(p))
    sides = [(int(c), labels == c) for c in np.unique(labels)]
    return lambda p: float(np.mean([_counted_auc(positive, p[:, c]) for c, positive in sides]))


def _counted_auc(positive: NDArray[np.bool_], scores: FloatArray) -> float:
    """Share of the pairs of a positive and a negative row that are ranked rightly, ties counting half."""
    order = np.argsort(scores)
    ranked, negative = scores[order], ~positive[order]
    below = np.cumsum(negative, dtype=np.float64)  # negatives up to here: below a positive, where none is equal
    starts = np.flatnonzero(ranked[1:] != ranked[:-1]) + 1
    if len(starts) + 1 < len(ranked):
        edges = np.concatenate([[0], starts, [len(ranked)]])
        before, upto = np.concatenate([[0.0], below])[edges[:-1]], below[edges[1:] - 1]
        below = np.repeat((before + upto) / 2, np.diff(edges))
    n_negative = int(negative.sum())
    return float(below[~negative].sum() / (n_negative * (len(ranked) - n_negative)))


def per_class_auc(y: ArrayLike, p: ArrayLike) -> list[float | None]:
    """One-vs-rest AUC of each class; None for a class that does not occur in ``y``.

    Parameters
    ----------
    y : array-like of int, shape (n,)
        True labels, of two classes at least.
    p : array-like of float, shape (n, C)
        Class probabilities.
    """
    labels, probabilities = np.asarray(y), np.asarray(p)
    one_vs_rest = [labels == c for c in range(probabilities.shape[1])]
    return [
        float(_sklearn().roc_auc_score(positive, probabilities[:, c])) if 0 < positive.sum() < len(labels) else None
        for c, positive in enumerate(one_vs_rest)
    ]


def evaluate(metric: str, y: ArrayLike, p: ArrayLike) -> dict[str, Any]:
    """All that is reported of one model's predictions.

    Parameters
    ----------
    metric : {"auc", "macro_auc", "kappa"}
        The dataset's own metric.
    y : array-like of int, shape (n,)
        True labels.
    p : array-like of float, shape (n, C)
        Class probabilities.

    Returns
    -------
    dict
        ``score`` (the dataset's metric), ``auc`` (macro one-vs-rest for more than two classes), ``auprc``,
        ``accuracy``, ``balanced_accuracy``, ``sensitivity_at_95_specificity`` (the last and ``auprc`` of class 1, or
        averaged one-vs-rest over the classes that occur), ``kappa`` (quadratic), ``per_class_auc`` (a list, None for an
        absent class) and ``absent_classes`` (their numbers).
    """
    sk = _sklearn()
    labels, probabilities = _checked(metric, y, p)
    n_classes = probabilities.shape[1]
    present = sorted(set(labels.tolist()))
    predicted = probabilities.argmax(1)
    if n_classes == 2:
        sides = [(labels == 1, log_odds(probabilities))]
    else:
        sides = [(labels == c, probabilities[:, c]) for c in present]
    return {
        "score": score(metric, labels, probabilities),
        "auc": float(np.mean([sk.roc_auc_score(positive, s) for positive, s in sides])),
        "auprc": float(np.mean([sk.average_precision_score(positive, s) for positive, s in sides])),
        "accuracy": float(sk.accuracy_score(labels, predicted)),
        # recall averaged over the classes that occur: balanced accuracy, which would warn of absent ones
        "balanced_accuracy": float(
            sk.recall_score(labels, predicted, labels=present, average="macro", zero_division=0.0)
        ),
        "sensitivity_at_95_specificity": float(np.mean([_sensitivity(positive, s, 0.95) for positive, s in sides])),
        "kappa": _kappa(labels, probabilities),
        "per_class_auc": per_class_auc(labels, probabilities),
        "absent_classes": [c for c in range(n_classes) if c not in present],
    }


def bootstrap(
    metric: str,
    y: ArrayLike,
    p: ArrayLike,
    groups: Sequence[str] | NDArray[np.object_],
    *,
    resamples: int = RESAMPLES,
    seed: int = BOOTSTRAP_SEED,
) -> FloatArray:
    """Metric on resampled test groups, averaged over the fold models on each resample.

    Groups are drawn with replacement within strata, as many as the stratum has. A stratum is the groups that hold the
    same classes (for groups of one class: the class), so that no resample loses a class.

    Parameters
    ----------
    metric : {"auc", "macro_auc", "kappa"}
        What is computed on each resample.
    y : array-like of int, shape (n,)
        True labels.
    p : array-like of float, shape (K, n, C)
        Class probabilities by each of K models.
    groups : sequence of str, length n
        Patient, slide … of each image.
    resamples : int
        How many.
    seed : int
        The same seed, labels and groups give the same resamples, whatever the predictions.

    Returns
    -------
    float64 array of shape (resamples,)
    """
    models = np.asarray(p, dtype=np.float64)
    labels, _ = _checked(metric, y, models[0])
    scorers = [_SCORERS[metric](labels, q) for q in models]
    blocks = [
        np.mean([scorer(weights) for scorer in scorers], axis=0)
        for weights in resample_weights(labels, groups, resamples, seed)
    ]
    return np.asarray(np.concatenate(blocks))


def interval(samples: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap samples, shape (B,)."""
    low, high = np.quantile(np.asarray(samples, dtype=np.float64), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _checked(metric: str, y: ArrayLike, p: ArrayLike) -> tuple[IntArray, FloatArray]:
    labels, probabilities = np.asarray(y, dtype=np.int64), np.asarray(p, dtype=np.float64)
    if metric not in METRIC_NAMES:
        raise ProtocolError("unknown metric", expected=", ".join(METRIC_NAMES), found=repr(metric))
    if metric == "auc" and probabilities.shape[1] != 2:
        raise ProtocolError(
            "the AUC is for two classes", found=f"{probabilities.shape[1]} classes", fix="use the metric macro_auc"
        )
    if len(np.unique(labels)) < 2:
        raise ProtocolError(
            "a score needs images of two classes", found=f"{len(labels)} images of {len(np.unique(labels))} class"
        )
    return labels, probabilities


def log_odds(p: FloatArray) -> FloatArray:
    """Ranks by the probability of class 1, without the ties that rounding makes near 1; shape (n,)."""
    tiny = np.finfo(np.float64).tiny
    return np.asarray(np.log(np.maximum(p[:, 1], tiny)) - np.log(np.maximum(p[:, 0], tiny)))


def _kappa(y: IntArray, p: FloatArray) -> float:
    return float(_sklearn().cohen_kappa_score(y, p.argmax(1), labels=np.arange(p.shape[1]), weights="quadratic"))


def _sensitivity(positive: NDArray[np.bool_], scores: FloatArray, specificity: float) -> float:
    """Highest sensitivity among the thresholds whose specificity is at least the asked one."""
    fpr, tpr, _ = _sklearn().roc_curve(positive, scores, drop_intermediate=False)
    return float(tpr[fpr <= 1 - specificity + 1e-12].max())


def resample_weights(
    y: IntArray, groups: Sequence[str] | NDArray[np.object_], resamples: int, seed: int
) -> Iterator[FloatArray]:
    """How often each image is drawn, in blocks of shape (≤ _BLOCK, n)."""
    names, group = np.unique(np.asarray(groups, dtype=object), return_inverse=True)
    group = group.reshape(-1)
    holds = np.zeros((len(names), int(y.max()) + 1), dtype=bool)  # which classes each group holds
    holds[group, y] = True
    stratum = np.unique(holds, axis=0, return_inverse=True)[1].reshape(-1)
    members = [np.flatnonzero(stratum == c) for c in np.unique(stratum)]
    rng = np.random.Generator(np.random.PCG64(seed))
    for start in range(0, resamples, _BLOCK):
        block = min(_BLOCK, resamples - start)
        drawn = np.zeros((_BLOCK, len(names)), dtype=np.float64)
        for stratum_groups in members:
            picks = stratum_groups[rng.integers(0, len(stratum_groups), size=(_BLOCK, len(stratum_groups)))]
            np.add.at(drawn, (np.arange(_BLOCK)[:, None], picks), 1.0)
        yield drawn[:block, group]


def _weighted_auc(positive: NDArray[np.bool_], scores: FloatArray) -> Callable[[FloatArray], FloatArray]:
    """AUC under row weights of shape (B, n): the Mann-Whitney statistic, ties counting half."""
    _, rank = np.unique(scores, return_inverse=True)
    order = np.argsort(rank.reshape(-1), kind="stable")
    starts = np.flatnonzero(np.diff(rank.reshape(-1)[order], prepend=-1))  # first row of each run of equal scores
    sign = positive[order]

    def auc(weights: FloatArray) -> FloatArray:
        w = weights[:, order]
        pos = np.add.reduceat(w * sign, starts, axis=1)  # (B, distinct scores)
        neg = np.add.reduceat(w * ~sign, starts, axis=1)
        below = np.cumsum(neg, axis=1) - neg
        return np.asarray((pos * (below + neg / 2)).sum(1) / (pos.sum(1) * neg.sum(1)))

    return auc


def _weighted_macro_auc(y: IntArray, p: FloatArray) -> Callable[[FloatArray], FloatArray]:
    parts = [_weighted_auc(y == c, p[:, c]) for c in np.unique(y)]
    return lambda weights: np.asarray(np.mean([part(weights) for part in parts], axis=0))


def _weighted_kappa(y: IntArray, p: FloatArray) -> Callable[[FloatArray], FloatArray]:
    """Quadratic weighted kappa under row weights of shape (B, n), from weighted confusion matrices."""
    n_classes = p.shape[1]
    cell = np.zeros((len(y), n_classes * n_classes))
    cell[np.arange(len(y)), y * n_classes + p.argmax(1)] = 1.0
    distance = np.subtract.outer(np.arange(n_classes), np.arange(n_classes)) ** 2.0

    def kappa(weights: FloatArray) -> FloatArray:
        table = (weights @ cell).reshape(-1, n_classes, n_classes)
        table /= table.sum((1, 2), keepdims=True)
        chance = table.sum(2)[:, :, None] * table.sum(1)[:, None, :]
        return np.asarray(1 - (distance * table).sum((1, 2)) / (distance * chance).sum((1, 2)))

    return kappa


_SCORERS: Mapping[str, Callable[[IntArray, FloatArray], Callable[[FloatArray], FloatArray]]] = {
    "auc": lambda y, p: _weighted_auc(y == 1, log_odds(p)),
    "macro_auc": _weighted_macro_auc,
    "kappa": _weighted_kappa,
}
