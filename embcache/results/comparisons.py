"""Two results on one test set: how far apart their scores are, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embcache.probe.metrics import FloatArray
from embcache.probe.statistics import (
    LARGEST_OVERLAP,
    NOTHING,
    Scores,
    deviations,
    satterthwaite,
    t_quantile,
    training_variance_of,
    wilson,
)


@dataclass(frozen=True)
class Difference:
    """Of two procedures' expected scores, or of these models' scores, on the same test groups."""

    difference: float
    interval: tuple[float, float] | None  # 95 %
    p: float | None  # two-sided, of no difference
    smallest: float | None  # the smallest difference that this test set could have shown: 80 % power at 5 %
    p_margin: float | None  # of two one-sided tests that the difference is at least the margin
    trained: bool  # the variance of training is in it: it speaks of the procedures, else of these models
    why: str = ""  # why there is no interval


def compare(
    one: Scores,
    other: Scores,
    *,
    overlap: float | tuple[float, float] | None = None,
    folds: int | None = None,
    margin: float | None = None,
    level: float = 0.95,
) -> Difference:
    """Difference ``one`` − ``other`` of scores by the same metric on the same test set.

    Parameters
    ----------
    one, other : Scores
        As `sample` makes them, with the same resamples.
    overlap : float or (float, float), optional
        Mean share of training rows that two models have in common. With it, and with the same number of models on both
        sides, the difference is one of the procedures (a model trained anew on other rows), else of these models. Of
        two different numbers (training sets of two sizes, say) each side has its own variance of training.
    folds : int, optional
        Folds of one repeat; default the number of models.
    margin : float, optional
        Test equivalence: that the difference is smaller than this on either side.
    level : float
        Of the interval.
    """
    from scipy.special import stdtr

    difference, why = one.mean - other.mean, one.test.too_few(one.metric)
    if not why and not math.isfinite(difference):
        why = "no value"
    if why:
        return Difference(difference, None, None, None, None, False, why)
    moves = _joined(one, other)
    k, k_other = len(one.values), len(other.values)
    contrast = np.r_[np.full(k, 1 / k), np.full(k_other, -1 / k_other)]
    v, df = float(((contrast @ moves) ** 2).sum()), _difference_df(one, other, contrast, moves)
    if v <= NOTHING:  # all groups agree: no less than what a share of disagreeing images of that many groups could be
        v, df = _unseen(one), math.inf
    shares = overlap if isinstance(overlap, tuple) else None if overlap is None else (overlap, overlap)
    trained = k == k_other > 1 and shares is not None and max(shares) <= LARGEST_OVERLAP
    if trained:
        assert shares is not None
        a, b = moves[:k], moves[k:]
        if abs(shares[0] - shares[1]) > 0.01:
            sides = [(one.values, a, shares[0]), (other.values, b, shares[1])]
        else:  # of paired folds
            sides = [(one.values - other.values, a - b, sum(shares) / 2)]
        parts = []
        for values, own, share in sides:
            sigma2, _ = training_variance_of(values, own @ own.T, share)
            parts.append((sigma2 * (1 / k + (1 - 1 / k) * share), (folds or k) - 1.0))
        df = satterthwaite((v, df), *parts)
        v += sum(extra for extra, _ in parts)
    if v == 0:
        return Difference(difference, None, None, None, None, trained, "no variation among the test groups")
    error, t = math.sqrt(v), t_quantile(level, df)
    return Difference(
        difference,
        (difference - t * error, difference + t * error),
        float(2 * stdtr(df, -abs(difference) / error)),
        (t + float(t_quantile(0.6, df))) * error,  # the 0.8 quantile
        None if margin is None else float(stdtr(df, (abs(difference) - margin) / error)),
        trained,
    )


def _joined(one: Scores, other: Scores) -> FloatArray:
    """Moves of both sides' models over the same groups or resamples."""
    if one.draws is None or other.draws is None:
        return np.concatenate([one.moves, other.moves])
    return deviations(np.concatenate([one.draws, other.draws]), min(one.df, other.df))


def _unseen(scores: Scores) -> float:
    """Squared standard error of a share of 0 among the images that would remain if those of a group were alike."""
    metric, test = scores.metric, scores.test
    if not math.isfinite(metric.high):
        return 0.0
    share = wilson(0.0, min(test.alike(test.scored(metric))))[1] / t_quantile(0.95, math.inf)
    return ((metric.high - metric.low) * share) ** 2


def _difference_df(one: Scores, other: Scores, contrast: FloatArray, moves: FloatArray) -> float:
    """Degrees of freedom of a difference's test variance."""
    if one.draws is not None or one.metric.interval == "proportion":
        return min(one.df, other.df)
    test = one.test
    apart, names = contrast @ moves, np.unique(np.asarray(test.groups))
    parts = []
    for c in np.unique(test.labels):
        own = np.isin(names, test.groups[test.labels == c])
        parts.append((float((apart[own] ** 2).sum()), max(1.0, own.sum() - 1.0)))
    return satterthwaite(*parts)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the m p-values of one family, adjusted, in the order given.

    The k-th smallest is multiplied by m − k + 1; none becomes smaller than one before it, or more than 1.
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]
