"""How far a score may be off: intervals for new patients, for a newly trained model, and comparisons of two.

The scores of K fold models on one test set have one covariance matrix, which says how they move together with the choice
of test groups (patients). It comes from influence values summed by group (AUC, proportions) or from a bootstrap of groups
(everything else), and everything here is read off it::

    test variance of the mean over models      the mean of all entries
    test noise between models                  mean diagonal − mean off the diagonal
    variance of training, σ²                   (variance between the models' scores − that noise) / (1 − overlap)

``overlap`` is the share of training rows that two models have in common. ``benchmarks/statistics.py`` measures what the
intervals cover in simulated worlds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embcache.probe.metrics import FloatArray, IntArray, Metric, auc_placements, log_odds

RESAMPLES = 2000
BOOTSTRAP_SEED = 20_210_823
"""One seed for all results, so that two rows on the same test set are compared on the same resamples."""

FEWEST_GROUPS = 5
"""With fewer groups (of a class, for metrics that score each class) there is no interval."""

LARGEST_OVERLAP = 0.9
"""Above it, models that share training rows say too little about a newly trained one."""

_BLOCK = 100  # resamples drawn and scored at a time


@dataclass(frozen=True, eq=False)
class TestSet:
    """Labels and groups of the rows that models are scored on.

    Attributes
    ----------
    labels : int64 array of shape (n,)
    groups : array of shape (n,)
        Patient, slide … of each row.
    class_names : tuple of str
    positive : int
        Class that asymmetric metrics of two classes are of.
    """

    __test__ = False  # not a test case of pytest

    labels: IntArray
    groups: NDArray[Any]
    class_names: tuple[str, ...]
    positive: int = 1

    def too_few(self, metric: Metric) -> str:
        """Why there is no interval: depends on counts of groups alone. Empty where there is one."""
        if metric.per_class:
            present = np.unique(self.labels).tolist()
            counts = {self.class_names[c]: len(np.unique(self.groups[self.labels == c])) for c in present}
            few = [f"{count} of {name}" for name, count in counts.items() if count < FEWEST_GROUPS]
        else:
            few = [str(count)] if (count := len(np.unique(self.groups))) < FEWEST_GROUPS else []
        return f"too few patients: {', '.join(few)}, {FEWEST_GROUPS} needed" if few else ""


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of K models on one test set, and how they move with its groups.

    Attributes
    ----------
    metric : Metric
    test : TestSet
    values : float64 array of shape (K,)
    moves : float64 array of shape (K, M)
        Influence of each group, scaled so that ``moves @ moves.T`` is the covariance; of a bootstrap, the resamples'
        deviations from their mean, scaled the same way.
    df : float
        Degrees of freedom of the covariance.
    draws : float64 array of shape (K, B), optional
        Of a bootstrap.
    lost : float
        Share of resamples without one of the classes.
    sizes : (float, float), optional
        Of an AUC of two classes: effective numbers of positive and negative rows.
    """

    metric: Metric
    test: TestSet
    values: FloatArray
    moves: FloatArray
    df: float
    draws: FloatArray | None = None
    lost: float = 0.0
    sizes: tuple[float, float] | None = None

    @property
    def mean(self) -> float:
        """Over the models."""
        return float(self.values.mean())


@dataclass(frozen=True)
class Estimate:
    """A score with its two 95 % intervals.

    Attributes
    ----------
    metric : str
    positive : str
        The class that an asymmetric metric is of; else empty.
    mean : float
        Over the models.
    std : float or None
        Over the models, ddof 1.
    these_models : (float, float) or None
        For new patients and these models.
    new_model : (float, float) or None
        For new patients and a newly trained model; None with one model, or where models share too many training rows.
    why : str
        Why an interval is missing; empty where none is.
    groups : int
        Of the test set.
    test_variance, training_variance : float
        Of the mean over models; σ² of one training.
    overlap : float or None
        Mean share of training rows that two models have in common.
    lost : float
        Share of bootstrap resamples without one of the classes: they were scored on the classes present.
    """

    metric: str
    positive: str
    mean: float
    std: float | None
    these_models: tuple[float, float] | None
    new_model: tuple[float, float] | None
    why: str
    groups: int
    test_variance: float
    training_variance: float | None
    overlap: float | None
    lost: float

    @property
    def interval(self) -> tuple[float, float] | None:
        """The one that tables show: for a newly trained model where there is one, else for these models."""
        return self.new_model or self.these_models

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, every field by its name."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]  # as it reads back: lists, no tuples

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Estimate:
        """The inverse of `to_json`."""
        pairs = {name: None if data[name] is None else tuple(data[name]) for name in ("these_models", "new_model")}
        return cls(**{**data, **pairs})


@dataclass(frozen=True)
class Difference:
    """Of two procedures' expected scores, or of these models' scores, on the same test groups.

    Attributes
    ----------
    difference : float
    interval : (float, float) or None
        95 %.
    p : float or None
        Two-sided, of no difference.
    smallest : float or None
        The smallest difference that this test set could have shown: 80 % power at 5 %.
    p_margin : float or None
        Of two one-sided tests that the difference is at least the margin.
    trained : bool
        The variance of training is in it: it speaks of the procedures, else of these models.
    why : str
        Why there is no interval.
    """

    difference: float
    interval: tuple[float, float] | None
    p: float | None
    smallest: float | None
    p_margin: float | None
    trained: bool
    why: str = ""


def sample(
    metric: Metric,
    test: TestSet,
    logits: ArrayLike,
    *,
    resamples: int = RESAMPLES,
    seed: int = BOOTSTRAP_SEED,
) -> Scores:
    """Score K models on one test set and find how the scores move with its groups.

    Parameters
    ----------
    metric : Metric
        See `embcache.probe.metrics.find_metric`.
    test : TestSet
        Labels of two classes at least, and groups.
    logits : array-like of float, shape (K, n, C)
        By each model.
    resamples, seed : int
        Of the bootstrap. The same groups, resamples and seed give the same resamples, whatever the predictions.
    """
    z = np.asarray(logits, dtype=np.float64)
    forms = [metric.form(test.labels, q, test.positive) for q in z]
    values = np.array([form(np.ones((1, len(test.labels))))[0] for form in forms])
    names, group = np.unique(np.asarray(test.groups), return_inverse=True)
    group = group.reshape(-1)
    if metric.interval == "auc":
        influence = np.stack([_auc_influence(test, q, metric) for q in z])
        return _from_influence(metric, test, values, influence, group, test.labels)
    if metric.interval == "proportion":
        assert metric.ratio is not None
        parts = [metric.ratio(test.labels, q, test.positive) for q in z]
        influence = np.stack([
            np.where(below, above - np.nan_to_num(value), 0.0) / max(1, below.sum())
            for (above, below), value in zip(parts, values, strict=True)
        ])  # fmt: skip
        counted = np.any([below for _, below in parts], axis=0)
        return _from_influence(metric, test, values, influence, group, np.where(counted, 0, -1))
    draws, lost = [], 0
    present = np.stack([test.labels == c for c in np.unique(test.labels)], axis=1).astype(np.float64)
    rng = np.random.Generator(np.random.PCG64(seed))
    for start in range(0, resamples, _BLOCK):
        drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=_BLOCK)
        weights = drawn[: resamples - start, group].astype(np.float64)
        lost += int((weights @ present == 0).any(axis=1).sum())
        draws.append(np.stack([form(weights) for form in forms]))
    every = np.concatenate(draws, axis=1)
    there = every[:, np.isfinite(every).all(axis=0)]
    moves = (there - there.mean(axis=1, keepdims=True)) / math.sqrt(max(1, there.shape[1] - 1))
    return Scores(metric, test, values, moves, max(1.0, len(names) - 1.0), every, lost / resamples)


def _auc_influence(test: TestSet, z: FloatArray, metric: Metric) -> FloatArray:
    """Influence of each row on the (macro) AUC; sums to 0 within the classes of a two-class AUC."""
    odds = log_odds(z)
    classes = [test.positive] if metric.key == "auc" else np.unique(test.labels)
    total = np.zeros(len(test.labels))
    for c in classes:
        positive = test.labels == c
        placed = auc_placements(positive, odds[:, c])
        centered = placed - placed[positive].mean()
        total += np.where(positive, centered / positive.sum(), centered / (~positive).sum()) / len(classes)
    return total


def _from_influence(
    metric: Metric, test: TestSet, values: FloatArray, influence: FloatArray, group: IntArray, part: IntArray
) -> Scores:
    """Sum influence by group. Parts (classes) have their own small-sample factor and degrees of freedom."""
    moves = np.zeros((len(values), int(group.max()) + 1))
    variances, dfs = [], []
    for c in np.unique(part[part >= 0]):
        rows = part == c
        n_groups = len(np.unique(group[rows]))
        factor = math.sqrt(n_groups / max(1, n_groups - 1))
        summed = np.stack([np.bincount(group[rows], q[rows], moves.shape[1]) for q in influence]) * factor
        moves += summed
        variances.append(float((summed.mean(0) ** 2).sum()))
        dfs.append(max(1, n_groups - 1))
    total = sum(variances)
    df = total**2 / sum(v**2 / d for v, d in zip(variances, dfs, strict=True)) if total > 0 else float(min(dfs))
    sizes = _effective_sizes(test, influence.mean(0), moves.mean(0)) if metric.key == "auc" else None
    return Scores(metric, test, values, moves, df, sizes=sizes)


def _effective_sizes(test: TestSet, influence: FloatArray, moves: FloatArray) -> tuple[float, float]:
    """Rows of each class, divided by the clustered design effect, between groups and images.

    Obuchowski's (1997) clustered variance over DeLong's plain one; where nothing varies, as many as there are groups.
    """
    positive = test.labels == test.positive
    sides = (positive, ~positive)
    plain = sum(float((influence[side] ** 2).sum()) * side.sum() / max(1, side.sum() - 1) for side in sides)
    effect = float((moves**2).sum()) / plain if plain > 0 else math.inf
    return tuple(
        float(np.clip(side.sum() / effect if effect > 0 else side.sum(), len(np.unique(test.groups[side])), side.sum()))
        for side in sides
    )  # type: ignore[return-value]


def estimate(scores: Scores, overlap: float | None = None, folds: int | None = None, level: float = 0.95) -> Estimate:
    """The mean over models with its intervals.

    Parameters
    ----------
    scores : Scores
        Of K models.
    overlap : float, optional
        Mean share of training rows that two models have in common; without it there is only the first interval.
    folds : int, optional
        Folds of one repeat, whose number less one are the degrees of freedom of training; default K.
    level : float
        Of the intervals.
    """
    metric, test, values, mean = scores.metric, scores.test, scores.values, scores.mean
    k, covariance = len(values), scores.moves @ scores.moves.T
    v_test = float(covariance.mean())
    why, first, second, sigma2 = test.too_few(metric), None, None, None
    if not why and not np.isfinite(mean):
        why = "no value"
    if not why:
        first = _first_interval(scores, v_test, level)
        if k == 1 or overlap is None:
            why = "one model" if k == 1 else ""
        elif overlap > LARGEST_OVERLAP:
            why = f"models share {overlap:.0%} of their training images: no interval for a newly trained model"
        else:
            sigma2 = _training_variance(values, covariance, overlap)
            extra = sigma2 * (1 / k + (1 - 1 / k) * overlap) + sigma2
            second = _widened(scores, first, v_test, extra, (folds or k) - 1, level)
    return Estimate(
        metric=metric.key,
        positive=test.class_names[test.positive] if metric.asymmetric and len(test.class_names) == 2 else "",
        mean=mean,
        std=float(values.std(ddof=1)) if k > 1 else None,
        these_models=first,
        new_model=second,
        why=why,
        groups=len(np.unique(test.groups)),
        test_variance=v_test,
        training_variance=sigma2,
        overlap=overlap,
        lost=scores.lost,
    )


def _training_variance(values: FloatArray, covariance: FloatArray, overlap: float) -> float:
    """σ²: the variance between models' scores beyond the test noise between them, as if they shared no rows."""
    k = len(values)
    noise = (np.trace(covariance) - covariance.sum() / k) / (k - 1)
    return max(0.0, float(values.var(ddof=1)) - float(noise)) / (1 - overlap)


def _first_interval(scores: Scores, v: float, level: float) -> tuple[float, float]:
    metric, mean, z = scores.metric, scores.mean, NormalDist().inv_cdf((1 + level) / 2)
    if scores.sizes is not None:
        return newcombe_auc(mean, *scores.sizes, level)
    if metric.interval == "auc":
        return _logit_interval(mean, v, _t(level, scores.df), scores)
    if metric.interval == "proportion":
        return wilson(mean, _effective_n(scores, v), level)
    assert scores.draws is not None
    draws = scores.draws.mean(axis=0)
    low, high = np.quantile(draws[np.isfinite(draws)], [(1 - level) / 2, (1 + level) / 2])
    del z
    return float(low), float(high)


def _effective_n(scores: Scores, v: float) -> float:
    """N = p(1 − p)/V; the number of groups counted where nothing varies."""
    p = scores.mean
    counted = int((np.abs(scores.moves) > 0).any(axis=0).sum())
    if v > 0 and 0 < p < 1:
        return p * (1 - p) / v
    assert scores.metric.ratio is not None
    return max(counted, _groups_counted(scores))


def _groups_counted(scores: Scores) -> int:
    test, metric = scores.test, scores.metric
    side = {"sensitivity": test.labels == test.positive, "specificity": test.labels != test.positive}
    return len(np.unique(test.groups[side.get(metric.key, np.ones(len(test.labels), dtype=bool))]))


def newcombe_auc(auc: float, n_positive: float, n_negative: float, level: float = 0.95) -> tuple[float, float]:
    """Score interval of an AUC with the Hanley–McNeil variance at its own ends (Newcombe 2006, method 5)."""
    z, n_star = NormalDist().inv_cdf((1 + level) / 2), (n_positive + n_negative) / 2

    def beyond(a: float) -> float:
        v = a * (1 - a) * (1 + (n_star - 1) * ((1 - a) / (2 - a) + a / (1 + a))) / (n_positive * n_negative)
        return abs(auc - a) - z * math.sqrt(max(v, 0.0))

    def solve(inside: float, outside: float) -> float:
        if beyond(outside) <= 0:
            return outside
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if beyond(middle) <= 0 else (inside, middle)
        return (inside + outside) / 2

    return solve(auc, 0.0), solve(auc, 1.0)


def wilson(p: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion with an effective number of trials."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _logit_interval(mean: float, v: float, t: float, scores: Scores) -> tuple[float, float]:
    """On the logit scale; a perfect macro AUC has the interval of as many pairs as its rarest class has groups."""
    if not 0 < mean < 1 or v == 0:
        few = min(len(np.unique(scores.test.groups[scores.test.labels == c])) for c in np.unique(scores.test.labels))
        return newcombe_auc(mean, few, len(np.unique(scores.test.groups)) - few or few)
    center, half = math.log(mean / (1 - mean)), t * math.sqrt(v) / (mean * (1 - mean))
    low, high = (1 / (1 + math.exp(-(center + side * half))) for side in (-1, 1))
    return low, high


def _widened(
    scores: Scores, first: tuple[float, float], v_test: float, extra: float, df_training: int, level: float
) -> tuple[float, float]:
    """The first interval with the variance of training added to each of its sides (square and add)."""
    t = _t(level, _satterthwaite((v_test, scores.df), (extra, df_training)))
    z, mean = NormalDist().inv_cdf((1 + level) / 2), scores.mean
    low, high = (t * math.sqrt(((mean - end) / z) ** 2 + extra) for end in first)
    return max(scores.metric.low, mean - low), min(scores.metric.high, mean + high)


def _satterthwaite(*parts: tuple[float, float]) -> float:
    total = sum(v for v, _ in parts)
    return total**2 / sum(v**2 / df for v, df in parts) if total > 0 else parts[0][1]


def _t(level: float, df: float) -> float:
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    return float(stdtrit(df, (1 + level) / 2))


def compare(
    one: Scores,
    other: Scores,
    *,
    overlap: float | None = None,
    folds: int | None = None,
    margin: float | None = None,
    level: float = 0.95,
) -> Difference:
    """Difference ``one`` − ``other`` of scores by the same metric on the same test set.

    Parameters
    ----------
    one, other : Scores
        As `sample` makes them, with the same resamples.
    overlap : float, optional
        Mean share of training rows that two models have in common. With it, and with the same number of models on both
        sides, the difference is one of the procedures (a model trained anew on other rows), else of these models.
    folds : int, optional
        Folds of one repeat; default the number of models.
    margin : float, optional
        Test equivalence: that the difference is smaller than this on either side.
    level : float
        Of the interval.
    """
    from scipy.special import stdtr

    difference = one.mean - other.mean
    moves = _joined(one, other)
    k, k_other = len(one.values), len(other.values)
    contrast = np.r_[np.full(k, 1 / k), np.full(k_other, -1 / k_other)]
    v = v_test = float(((contrast @ moves) ** 2).sum())
    df = df_test = _difference_df(one, other, contrast, moves)
    trained = k == k_other > 1 and overlap is not None and overlap <= LARGEST_OVERLAP
    if trained:
        assert overlap is not None
        apart = moves[:k] - moves[k:]
        sigma2 = _training_variance(one.values - other.values, apart @ apart.T, overlap)
        extra = sigma2 * (1 / k + (1 - 1 / k) * overlap)
        v += extra
        df = _satterthwaite((v_test, df_test), (extra, (folds or k) - 1))
    why = one.test.too_few(one.metric)
    if not why and (v == 0 or not np.isfinite(difference)) and difference != 0:
        why = "no variation among the test groups"
    if why:
        return Difference(difference, None, None, None, None, trained, why)
    error, t = math.sqrt(v), _t(level, df)

    def two_sided(x: float) -> float:
        return float(2 * stdtr(df, -abs(x) / error)) if error > 0 else 1.0

    p_margin = None
    if margin is not None:
        p_margin = float(stdtr(df, -(margin - abs(difference)) / error)) if error > 0 else 0.0
    return Difference(
        difference,
        (difference - t * error, difference + t * error),
        two_sided(difference),
        (t + float(_t(0.6, df))) * error,  # the 0.8 quantile
        p_margin,
        trained,
    )


def _joined(one: Scores, other: Scores) -> FloatArray:
    """Moves of both sides' models over the same groups or resamples."""
    if one.draws is None or other.draws is None:
        return np.concatenate([one.moves, other.moves])
    both = np.concatenate([one.draws, other.draws])
    both = both[:, np.isfinite(both).all(axis=0)]
    return (both - both.mean(axis=1, keepdims=True)) / math.sqrt(max(1, both.shape[1] - 1))


def _difference_df(one: Scores, other: Scores, contrast: FloatArray, moves: FloatArray) -> float:
    """Degrees of freedom of a difference's test variance."""
    if one.draws is not None or one.metric.interval == "proportion":
        return min(one.df, other.df)
    test = one.test
    apart, names = contrast @ moves, np.unique(np.asarray(test.groups))
    variances, dfs = [], []
    for c in np.unique(test.labels):
        own = np.isin(names, test.groups[test.labels == c])
        variances.append(float((apart[own] ** 2).sum()))
        dfs.append(max(1.0, own.sum() - 1.0))
    total = sum(variances)
    return total**2 / sum(v**2 / d for v, d in zip(variances, dfs, strict=True)) if total > 0 else min(dfs)


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


def training_overlap(parts: Sequence[IntArray]) -> float | None:
    """Mean over pairs of models of the share of training rows that both have; None of a single model."""
    sets = [set(part.tolist()) for part in parts]
    shares = [
        2 * len(a & b) / (len(a) + len(b)) for i, a in enumerate(sets) for b in sets[:i]
    ]  # of equal sizes: |a ∩ b| / |a|
    return float(np.mean(shares)) if shares else None
