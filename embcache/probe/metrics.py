"""Scores of predicted probabilities, and bootstrap intervals over groups.

Pairs and cells are counted in whole numbers, so that two models that rank all images alike have exactly equal scores;
the bootstrap repeats the datasets' own metrics for thousands of resamples at once, as weighted counts. Tests hold every
score against scikit-learn, with ``sample_weight`` too. scikit-learn itself is not called: its import takes longer than
most probes train, and its input checks longer than an epoch.
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
    return scorer(metric, labels, probabilities.shape[1])(probabilities)


def scorer(metric: str, y: ArrayLike, n_classes: int) -> Callable[[FloatArray], float]:
    """`score` on one set of labels, as a function of finite float64 probabilities (n, C): what training calls.

    Ties between epochs keep the earliest: equal rankings have equal scores, to the last bit.

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
        return lambda p: _auc(positive, log_odds(p))
    sides = [(int(c), labels == c) for c in np.unique(labels)]
    return lambda p: float(np.mean([_auc(positive, p[:, c]) for c, positive in sides]))


def _auc(positive: NDArray[np.bool_], scores: FloatArray) -> float:
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
        _auc(positive, probabilities[:, c]) if 0 < positive.sum() < len(labels) else None
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
        "auc": float(np.mean([_auc(positive, s) for positive, s in sides])),
        "auprc": float(np.mean([_average_precision(positive, s) for positive, s in sides])),
        "accuracy": float((labels == predicted).mean()),
        "balanced_accuracy": float(np.mean([(predicted[labels == c] == c).mean() for c in present])),
        "sensitivity_at_95_specificity": float(np.mean([_sensitivity(positive, s, 0.95) for positive, s in sides])),
        "kappa": scorer("kappa", labels, n_classes)(probabilities),
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
    if not np.isfinite(probabilities).all():
        raise ProtocolError(
            "a score needs probabilities that are numbers",
            found=f"{int((~np.isfinite(probabilities)).any(-1).sum()):,} rows without",
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


def _curve(positive: NDArray[np.bool_], scores: FloatArray) -> tuple[IntArray, IntArray]:
    """True and false positives at every distinct threshold, from the highest to the lowest."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    last = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)  # of each run of equal scores
    true = np.cumsum(positive[order])[last]
    return true, last + 1 - true


def _average_precision(positive: NDArray[np.bool_], scores: FloatArray) -> float:
    """Precision at each threshold, weighted by the recall it adds: no interpolation, as scikit-learn has it."""
    true, false = _curve(positive, scores)
    return float((np.diff(true, prepend=0) / true[-1] * (true / (true + false))).sum())


def _sensitivity(positive: NDArray[np.bool_], scores: FloatArray, specificity: float) -> float:
    """Highest sensitivity among the thresholds whose specificity is at least the asked one."""
    true, false = _curve(positive, scores)
    allowed = false / false[-1] <= 1 - specificity + 1e-12
    return float((true[allowed] / true[-1]).max(initial=0.0))


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
    cell = y * n_classes + p.argmax(1)
    distance = np.subtract.outer(np.arange(n_classes), np.arange(n_classes)) ** 2.0

    def kappa(weights: FloatArray) -> FloatArray:
        table = np.stack([np.bincount(cell, w, n_classes * n_classes) for w in weights])
        table = (table / table.sum(1, keepdims=True)).reshape(-1, n_classes, n_classes)
        chance = table.sum(2)[:, :, None] * table.sum(1)[:, None, :]
        return np.asarray(1 - (distance * table).sum((1, 2)) / (distance * chance).sum((1, 2)))

    return kappa


_SCORERS: Mapping[str, Callable[[IntArray, FloatArray], Callable[[FloatArray], FloatArray]]] = {
    "auc": lambda y, p: _weighted_auc(y == 1, log_odds(p)),
    "macro_auc": _weighted_macro_auc,
    "kappa": _weighted_kappa,
}
