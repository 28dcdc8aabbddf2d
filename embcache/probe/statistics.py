"""How far a score may be off: intervals for new patients, and for a newly trained model.

The scores of K fold models on one test set have one covariance matrix, which says how they move together with the
choice of test groups (patients). It comes from influence values summed by group (AUC, proportions) or from a bootstrap
of groups (everything else); everything here and in `embcache.results.compare` is read off it::

    test variance of the mean over models      the mean of all entries
    test noise between models                  mean diagonal − mean off the diagonal
    variance of training, σ²                   (variance between the models' scores − that noise) / (1 − overlap)

``overlap`` is the share of training rows that two models have in common. ``benchmarks/statistics.py`` measures what the
intervals cover in simulated worlds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embcache.errors import check_number
from embcache.probe.metrics import FloatArray, IntArray, Metric, Weighted, auc_placements, log_odds
from embcache.runs.result import Estimate
from embcache.targets import Target, make_target
from embcache.targets.target import BoolArray

RESAMPLES = 2000
BOOTSTRAP_SEED = 20_210_823  # one for all results: two rows on the same test set are compared on the same resamples

FEWEST_GROUPS = 5  # with fewer (of a class, for metrics that score each class) there is no interval
LARGEST_OVERLAP = 0.9  # above it, models that share training rows say too little about a newly trained one
NOTHING = 1e-24  # a variance that is rounding
_LEAST, _VALUES = 200, 200_000_000  # resamples of large sets of findings; values of findings that are resampled in all
_WIDEST = 50.0  # of half an interval on a log scale, so that R² of a few groups overflows nothing
_JACKKNIFE = 2000  # groups up to which it is looked for a few that make up the variance of a number's score
_BLOCK, _CELLS = 100, 20_000_000  # resamples drawn and scored at a time; weights of values that are held


@dataclass(frozen=True, eq=False)
class TestSet:
    """Values and groups of the rows that models are scored on."""

    __test__ = False  # not a test case of pytest

    labels: NDArray[Any]  # (n,), or (n, L) of findings
    groups: NDArray[Any]  # (n,); patient, slide … of each row
    class_names: tuple[str, ...]
    positive: int = 1  # class that asymmetric metrics of two classes are of
    target: Target | None = None  # by default classes

    @property
    def task(self) -> Target:
        """What is predicted."""
        return self.target or make_target("classes", self.class_names)

    def too_few(self, metric: Metric) -> str:
        """Why there is no interval: depends on counts of groups alone. Empty where there is one."""
        sides = self.sides(metric)
        few = [
            f"{count}{name}" for (name, _), count in zip(sides, self._groups(sides), strict=True)
            if count < FEWEST_GROUPS
        ]  # fmt: skip
        if few:
            return f"too few patients: {', '.join(few)}, {FEWEST_GROUPS} needed"
        one_sided = metric.per_class and len(sides) == 1 and metric.ratio is None
        return f"only images{sides[0][0]}" if one_sided else ""

    def _groups(self, sides: Sequence[tuple[str, BoolArray]]) -> list[int]:
        return [len(np.unique(self.groups[rows])) for _, rows in sides]

    def sides(self, metric: Metric) -> list[tuple[str, BoolArray]]:
        """Rows that need enough groups each, in words: of each class, with and without each finding; or all."""
        names, y = self.class_names, self.labels
        if not metric.per_class or y.dtype.kind == "f":
            return [("", np.ones(len(y), dtype=bool))]
        if y.ndim == 2:
            words = {1: "with", 0: "without"}
            scored = [(name, of) for name, of in zip(names, y.T, strict=True) if {0, 1} <= set(of.tolist())]
            return [(f" {words[v]} {name}", of == v) for name, of in scored for v in (1, 0)]
        if metric.key in ("sensitivity", "specificity"):
            classes = [self.positive if metric.key == "sensitivity" else 1 - self.positive]
        else:
            classes = [0, 1] if len(names) == 2 else np.unique(y).tolist()
        return [(f" of {names[c]}", y == c) for c in classes]

    def df(self, metric: Metric) -> float:
        """Degrees of freedom of a bootstrap: Satterthwaite's of a variance 1/n from each side's n groups."""
        n = np.maximum(2.0, self._groups(self.sides(metric)))
        return float((1 / n).sum() ** 2 / (1 / (n**2 * (n - 1))).sum())

    def alike(self, metric: Metric) -> float:
        """(Σm)²/Σm² for groups of m images: how many images there are if those of a group are alike; the fewest."""
        return min(alike_images(self.groups[rows]) for _, rows in self.sides(metric))


def alike_images(groups: NDArray[Any]) -> float:
    """`TestSet.alike` of the groups of some images."""
    return _alike(np.unique(groups, return_counts=True)[1])


def _alike(images: NDArray[Any]) -> float:
    return float(images.sum() ** 2 / (images**2).sum()) if images.any() else 1.0


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of K models on one test set, and how they move with its groups."""

    metric: Metric
    test: TestSet
    values: FloatArray  # (K,)
    moves: FloatArray  # (K, M)
    df: float  # degrees of freedom of the covariance
    draws: FloatArray | None = None  # (K, B); of a bootstrap
    lost: float = 0.0  # share of resamples without one of the classes
    null: Callable[[float], float] | None = None  # of AUC, proportions and a perfect macro AUC
    effect: float = 1.0  # the design effect that this variance is multiplied with

    @property
    def mean(self) -> float:
        """Over the models."""
        return float(self.values.mean())


def sample(metric: Metric, test: TestSet, logits: ArrayLike, *, resamples: int = RESAMPLES) -> Scores:
    """Score K models on one test set and find how the scores move with its groups; logits (K, n, C)."""
    z = np.asarray(logits, dtype=np.float64)
    forms = [metric.form(test.labels, q, test.positive) for q in z]
    values = np.array([form(np.ones((1, len(test.labels))))[0] for form in forms])
    names, group = np.unique(np.asarray(test.groups), return_inverse=True)
    group = group.reshape(-1)
    if metric.interval == "auc":
        return _auc_scores(metric, test, values, z, group)
    if metric.interval == "proportion":
        return _proportion_scores(metric, test, values, z, group)
    draws, lost = [], 0
    if test.task.kind in ("findings", "number"):
        present = np.stack([rows for _, rows in test.sides(metric)], axis=1).astype(np.float64)
    else:
        present = np.stack([test.labels == c for c in np.unique(test.labels)], axis=1).astype(np.float64)
    block = max(1, min(_BLOCK, _CELLS // max(1, test.labels.size)))
    rng = np.random.Generator(np.random.PCG64(BOOTSTRAP_SEED))
    check_number("resamples", resamples, 1, 1_000_000)
    if test.labels.ndim == 2:  # ten seconds rather than five minutes for 14 findings of 25,000 images
        resamples = min(resamples, max(_LEAST, _VALUES // z.size))
    for start in range(0, resamples, block):
        drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=block)
        weights = drawn[: resamples - start, group].astype(np.float64)
        lost += int((weights @ present == 0).any(axis=1).sum())
        draws.append(np.stack([form(weights) for form in forms]))
    every, df = np.concatenate(draws, axis=1), test.df(metric)
    if test.labels.dtype.kind == "f" and 2 < len(names) <= _JACKKNIFE:
        df = min(df, _df_of_few(_without_each(forms, group) - values.mean()))
    return Scores(metric, test, values, deviations(every, df), df, every, lost / resamples)


def _without_each(forms: Sequence[Weighted], group: IntArray) -> FloatArray:
    """The mean score over models without each of the groups, (groups,)."""
    found = []
    for numbers in np.array_split(np.arange(group.max() + 1), -(-(group.max() + 1) // _BLOCK)):
        weights = (group != numbers[:, None]).astype(np.float64)
        found.append(np.mean([form(weights) for form in forms], axis=0))
    moves = np.concatenate(found)
    return np.asarray(np.where(np.isfinite(moves), moves, 0.0))


def deviations(draws: FloatArray, df: float) -> FloatArray:
    """Moves of a bootstrap; its variance is too small by n/(n − 1), as those of n drawn values are."""
    there = draws[:, np.isfinite(draws).all(axis=0)]
    if there.shape[1] < 2:
        return np.zeros((len(draws), 1))
    return np.asarray((there - there.mean(axis=1, keepdims=True)) * math.sqrt((df + 1) / df / (there.shape[1] - 1)))


def _auc_scores(metric: Metric, test: TestSet, values: FloatArray, z: FloatArray, group: IntArray) -> Scores:
    """(Macro) AUC: DeLong's placement values summed by group, and the Hanley–McNeil variance of each class's AUC."""
    findings = test.labels.ndim == 2
    every = np.arange(len(test.labels))
    if findings:
        parts = [(np.flatnonzero(y >= 0), y == 1, z[:, :, c]) for c, y in enumerate(test.labels.T)]
    else:
        odds, present = log_odds(z), np.unique(test.labels).tolist()
        classes = [test.positive] if metric.key == "auc" else present
        parts = [(every, test.labels == c, odds[:, :, c]) for c in classes]
    parts = [(rows, positive, scores) for rows, positive, scores in parts if 0 < positive[rows].sum() < len(rows)]
    scored = len(parts) if findings else len(classes)
    influence, plain, sizes = np.zeros(z.shape[:2]), 0.0, []
    for rows, side, scores in parts:
        positive = side[rows]
        m, n = int(positive.sum()), int((~positive).sum())
        placed = np.stack([auc_placements(positive, some) for some in scores[:, rows]])
        own = (placed - placed[:, positive].mean(1, keepdims=True)) / np.where(positive, m, n) / scored
        influence[:, rows] += own
        for part in (positive, ~positive):
            plain += float((own.mean(0)[part] ** 2).sum()) * part.sum() / max(1, part.sum() - 1)
        sizes.append((m, n))

    def null(auc: float) -> float:
        return sum(hanley_mcneil(auc, m, n) for m, n in sizes) / max(1, scored) ** 2

    # The rows of a finding are of both sides of others, so that all are one part.
    moves, df = _by_group(influence, group, np.zeros(len(group), dtype=np.int64) if findings else test.labels)
    v, usual = float((moves.mean(0) ** 2).sum()), min(plain, null(float(values.mean()))) if sizes else 0.0
    if metric.key != "auc" and usual > 0 and not (findings and len(parts) == 1):  # of one finding it is an AUC
        return Scores(metric, test, values, moves, min(df, _df_of_few(moves.mean(0))))
    sides = [rows[positive[rows] == v] for rows, positive, _ in parts for v in (True, False)] if findings else [
        np.flatnonzero(test.labels == c) for c in present
    ]  # fmt: skip
    alike = max((len(rows) / alike_images(test.groups[rows]) for rows in sides), default=1.0)
    # DeLong's variance vanishes at a perfect score, Hanley and McNeil's is wrong for scores of unequal spread.
    return Scores(metric, test, values, moves, df, null=null, effect=max(1.0, v / usual) if usual > 0 else alike)


def _df_of_few(moves: FloatArray) -> float:
    """Degrees of freedom of Σ moves², 2n/(kurtosis − 1): where few of n groups make up the variance, as few."""
    n, v = int((moves != 0).sum()), float((moves**2).sum())
    return max(2.0, 2 * n / max(1.0, n * float((moves**4).sum()) / v**2 - 1)) if v > 0 else math.inf


def _proportion_scores(metric: Metric, test: TestSet, values: FloatArray, z: FloatArray, group: IntArray) -> Scores:
    assert metric.ratio is not None
    parts = [metric.ratio(test.labels, q, test.positive) for q in z]
    influence = np.stack([
        np.where(below, above - np.nan_to_num(value), 0.0) / max(1, below.sum())
        for (above, below), value in zip(parts, values, strict=True)
    ])  # fmt: skip
    counted = np.mean([below for _, below in parts], axis=0)
    n = max(1e-300, float(counted.sum()))

    def null(p: float) -> float:
        return p * (1 - p) / n

    moves, df = _by_group(influence, group, np.where(counted > 0, 0, -1))
    usual, clustered = null(float(values.mean())), float((moves.mean(0) ** 2).sum())
    # Where no group differs from another (all perfect, or each half right) there are as many images as groups.
    effect = clustered / usual if clustered > NOTHING else n / _alike(np.bincount(group, counted))
    return Scores(metric, test, values, moves, df, null=null, effect=max(1.0, effect))


def _by_group(influence: FloatArray, group: IntArray, part: IntArray) -> tuple[FloatArray, float]:
    """Influence summed by group, and its degrees of freedom. Parts (classes) have their own small-sample factor."""
    moves = np.zeros((len(influence), int(group.max()) + 1))
    parts = []
    for c in np.unique(part[part >= 0]):
        rows = part == c
        n_groups = len(np.unique(group[rows]))
        factor = math.sqrt(n_groups / max(1, n_groups - 1))
        summed = np.stack([np.bincount(group[rows], q[rows], moves.shape[1]) for q in influence]) * factor
        moves += summed
        parts.append((float((summed.mean(0) ** 2).sum()), max(1.0, n_groups - 1.0)))
    return moves, satterthwaite(*parts) if parts else 1.0


def estimate(scores: Scores, overlap: float | None = None, folds: int | None = None) -> Estimate:
    """The mean over models with its 95 % intervals."""
    metric, test, values, mean = scores.metric, scores.test, scores.values, scores.mean
    k, covariance = len(values), scores.moves @ scores.moves.T
    v_test = float(covariance.mean())
    why, first, second, sigma2 = test.too_few(metric), None, None, None
    if not why and not np.isfinite(mean):
        why = "no value"
    if not why and (first := _first_interval(scores, v_test)) is None:
        why = "no variation among the test groups"
    if first:
        if k == 1 or overlap is None:
            why = "one model" if k == 1 else ""
        elif overlap > LARGEST_OVERLAP:
            why = f"models share {overlap:.0%} of their training images: no interval for a newly trained model"
        else:
            sigma2, before = training_variance_of(values, covariance, overlap)
            share = 1 / k + (1 - 1 / k) * overlap + 1
            second = _widened(scores, first, (share * sigma2, share * before), (folds or k) - 1)
    return Estimate(
        metric=metric.key,
        positive=test.class_names[test.positive] if metric.asymmetric and len(test.class_names) == 2 else "", mean=mean,
        std=float(values.std(ddof=1)) if k > 1 else None, these_models=first, new_model=second, why=why,
        groups=len(np.unique(test.groups)), test_variance=v_test, training_variance=sigma2, overlap=overlap,
        lost=scores.lost,
    )  # fmt: skip


def training_variance_of(values: FloatArray, covariance: FloatArray, overlap: float) -> tuple[float, float]:
    """σ²: variance between models' scores as if they shared no rows, beyond test noise; and s²/(1 − overlap)."""
    k = len(values)
    noise = float(np.trace(covariance) - covariance.sum() / k) / (k - 1)
    s2 = float(values.var(ddof=1))
    return max(0.0, s2 - noise) / (1 - overlap), s2 / (1 - overlap)


def _first_interval(scores: Scores, v: float) -> tuple[float, float] | None:
    """Of AUC and proportions a score interval; else on the logit scale of the range, or the log scale if it is open."""
    mean, low, high, t = scores.mean, scores.metric.low, scores.metric.high, t_quantile(0.95, scores.df)
    if scores.null is not None:
        null, effect = scores.null, scores.effect
        return _score_interval(mean, lambda true: effect * null(true), t)
    if not math.isfinite(high - low):
        bound, sign = (low, 1.0) if math.isfinite(low) else (high, -1.0)  # from the bound that there is
        if v <= NOTHING or mean == bound:
            return None
        half = min(sign * t * math.sqrt(v) / (mean - bound), _WIDEST)
        return bound + (mean - bound) * math.exp(-half * sign), bound + (mean - bound) * math.exp(half * sign)
    share = (mean - low) / (high - low)
    if 0 < share < 1 and v > NOTHING:
        center, half = math.log(share / (1 - share)), t * math.sqrt(v) / (high - low) / (share * (1 - share))
        ends = tuple(1 / (1 + math.exp(-center - side * half)) for side in (-1, 1))
    else:  # no resample differs: as wide as that of a proportion of the fewest groups' images that are all alike
        n = scores.test.alike(scores.metric)
        ends = _score_interval(share, lambda true: true * (1 - true) / n, t)
    return low + (high - low) * ends[0], low + (high - low) * ends[1]


def _score_interval(value: float, variance: Callable[[float], float], quantile: float) -> tuple[float, float]:
    """True scores whose own standard error, times the quantile, reaches the value."""

    def beyond(true: float) -> bool:
        return abs(value - true) > quantile * math.sqrt(max(0.0, variance(true)))

    def end(outside: float) -> float:
        inside = value
        for _ in range(60 if beyond(outside) else 0):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if beyond(middle) else (middle, outside)
        return (inside + outside) / 2 if beyond(outside) else outside

    return end(0.0), end(1.0)


def hanley_mcneil(auc: float, n_positive: float, n_negative: float) -> float:
    """Variance of an AUC for negative exponential scores, both classes alike (Newcombe 2006, method 5)."""
    n = (n_positive + n_negative) / 2
    return auc * (1 - auc) * (1 + (n - 1) * ((1 - auc) / (2 - auc) + auc / (1 + auc))) / (n_positive * n_negative)


def wilson(p: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion with an effective number of trials."""
    return _score_interval(p, lambda true: true * (1 - true) / n, t_quantile(0.95, math.inf))


def _widened(
    scores: Scores, first: tuple[float, float], training: tuple[float, float], df_training: int
) -> tuple[float, float]:
    """The first interval with the variance of training added to each of its sides (square and add).

    Satterthwaite's degrees of freedom, those of training at least, count its variance before test noise was taken off.
    """
    t, mean, sides = t_quantile(0.95, scores.df), scores.mean, []
    extra, before = training
    for end in first:
        side = ((mean - end) / t) ** 2
        v, uncertain = side + extra, side**2 / scores.df + before**2 / df_training
        df = max(df_training, v**2 / uncertain) if uncertain > 0 else scores.df
        sides.append(t_quantile(0.95, df) * math.sqrt(v))
    return max(scores.metric.low, mean - sides[0]), min(scores.metric.high, mean + sides[1])


def satterthwaite(*parts: tuple[float, float]) -> float:
    """Degrees of freedom of a sum of variances, each with its own; the fewest where all are 0."""
    total, spread = sum(v for v, _ in parts), sum(v**2 / df for v, df in parts)
    if total == 0:
        return min(df for _, df in parts)
    return total**2 / spread if spread > 0 else math.inf


def t_quantile(level: float, df: float) -> float:
    """Student's t that a share ``level`` lies within on both sides."""
    from scipy.special import stdtrit  # scipy.stats takes a second to import

    return float(stdtrit(df, (1 + level) / 2))


def training_overlap(parts: Sequence[IntArray]) -> float | None:
    """Mean over pairs of models of the share of training rows that both have; None of a single model."""
    if len(parts) < 2:
        return None
    rows = np.unique(np.concatenate(parts))
    holds = np.stack([np.isin(rows, part, kind="sort") for part in parts]).astype(np.float32)
    common, sizes = holds @ holds.T, holds.sum(1)
    pairs = np.triu_indices(len(parts), 1)
    return float((2 * common / (sizes[:, None] + sizes))[pairs].mean())  # of equal sizes: |a ∩ b| / |a|
