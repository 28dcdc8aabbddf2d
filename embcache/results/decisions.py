"""What one run's saved predictions show: one class against the rest as curves, operating points, calibration.

Operating points are chosen on validation images and measured on the test set. The ensemble is the mean of the models'
probabilities, which is what ``predict`` uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from embcache.errors import EmbcacheError, ProtocolError, StoreError, UsageError, first_few
from embcache.probe.metrics import (
    METRICS,
    FloatArray,
    IntArray,
    Weighted,
    check_order,
    confusion,
    find_metric,
    has_order,
    log_odds,
    positive_class,
    roc_counts,
    softmax,
)
from embcache.probe.predictions import Adjust, Adjustment, Predictions, all_estimates, row_weights
from embcache.probe.statistics import RESAMPLES, estimate, sample, t_quantile
from embcache.probe.summary import adjust_models, load_run_predictions, load_validation
from embcache.runs.result import Estimate, Result

GRID = np.linspace(0, 1, 201)
"""False positive rates, or recalls, at which the curves of models are averaged."""

BINS = 10
"""Most bins of a reliability curve: equal numbers of images in each, at least `_FEWEST_IN_BIN`."""

_FEWEST_IN_BIN = 5

EACH_FOLD = "each fold's own validation images"
POOLED = "threshold from pooled out-of-fold predictions of single models"


@dataclass(frozen=True)
class Value:
    """A number with its 95 % intervals, as `embcache.probe.statistics.Estimate` has them."""

    value: float | None  # none where it is not defined
    these_models: tuple[float, float] | None = None  # for new patients and these models
    new_model: tuple[float, float] | None = None  # for new patients and a newly trained model
    why: str = ""  # why a number or an interval is missing; empty where none is

    @property
    def interval(self) -> tuple[float, float] | None:
        """The one that tables show."""
        return self.new_model or self.these_models

    @classmethod
    def of(cls, found: Estimate) -> Value:
        """The mean of an estimate with its intervals."""
        return cls(found.mean if math.isfinite(found.mean) else None, found.these_models, found.new_model, found.why)


def against_rest(predictions: Predictions, positive: int) -> Predictions:
    """The same models as models of two classes: ``positive`` and the rest, which are 1 and 0 of the new labels.

    With two classes nothing but their order changes; P(positive) is the same in any case.
    """
    odds = log_odds(predictions.logits)[..., positive]
    names = predictions.class_names
    rest = names[1 - positive] if len(names) == 2 else f"not {names[positive]}"
    return replace(
        predictions,
        labels=(predictions.labels == positive).astype(np.int64),
        logits=np.stack([np.zeros_like(odds), odds], axis=-1),
        class_names=(rest, names[positive]),
        positive=1,
        target=None,
    )


# Curves.


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
    labels: IntArray, logits: FloatArray, of_class: int, at: Callable[[ArrayLike, ArrayLike], FloatArray] = roc_at
) -> tuple[FloatArray, FloatArray]:
    """Mean and sd over models of a class's curve at each value of `GRID`; labels (n,), logits (K, n, C)."""
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
        predictions.class_names[of_class], int(own.sum()), len(np.unique(two.groups[own])), float(own.mean()), mean, sd,
        x, y, two.estimate(metric), one.estimate(metric),
    )  # fmt: skip


def agreement_of(errors: FloatArray) -> tuple[float, float, float]:
    """Mean of the errors of a number (n,), and the 95 % limits of agreement: mean ± 1.96 sd (Bland and Altman 1986)."""
    mean, sd = float(errors.mean()), float(errors.std(ddof=1)) if len(errors) > 1 else math.nan
    return mean, mean - 1.96 * sd, mean + 1.96 * sd


# Operating points.


@dataclass(frozen=True)
class Rule:
    """How a threshold is chosen on validation rows."""

    title: str
    reach: Literal["youden", "sensitivity", "specificity"] | None
    least: float = 0.0


RULES = (
    Rule("P > 0.5", None),
    Rule("Youden", "youden"),
    Rule("sensitivity ≥ 0.90", "sensitivity", 0.90),
    Rule("sensitivity ≥ 0.95", "sensitivity", 0.95),
    Rule("specificity ≥ 0.90", "specificity", 0.90),
    Rule("specificity ≥ 0.95", "specificity", 0.95),
)


@dataclass(frozen=True)
class OperatingPoint:
    """What a threshold that was chosen on validation does on the test set."""

    rule: str  # title of a `Rule`
    models: str
    chosen_on: str  # which predictions chose the threshold; empty for P > 0.5
    thresholds: tuple[float, ...]
    sensitivity: Value
    specificity: Value
    ppv: Value
    npv: Value


def choose_threshold(positive: NDArray[np.bool_], odds: FloatArray, rule: Rule) -> float:
    """The threshold on log odds (n,) by a rule; a row is called positive above it.

    Candidates lie halfway between neighboring values, just below the lowest value and at the highest.
    """
    if rule.reach is None:
        return 0.0
    if positive.all() or not positive.any():
        raise ProtocolError("an operating point needs validation images of both classes", code="one-class",
                            found=f"{len(positive)} images of one class")  # fmt: skip
    values = np.unique(odds)
    middle = np.minimum(values[:-1] + np.diff(values) / 2, np.nextafter(values[1:], -np.inf))
    thresholds = np.concatenate([[np.nextafter(values[0], -np.inf)], middle, [values[-1]]])
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    above, false = (np.append(0, counts)[::-1] for counts in roc_counts(positive, odds))  # by ascending threshold
    hits, passed = above, n_negative - false
    if rule.reach == "youden":
        return float(thresholds[np.argmax(hits * n_negative + passed * n_positive)])
    if rule.reach == "sensitivity":
        most = passed[np.flatnonzero(hits >= rule.least * n_positive - 1e-9)[-1]]
        return float(thresholds[np.flatnonzero(passed == most)[0]])
    most = hits[np.flatnonzero(passed >= rule.least * n_negative - 1e-9)[0]]
    return float(thresholds[np.flatnonzero(hits == most)[-1]])


def operating_points(
    test: Predictions, validation: Sequence[Predictions], prevalence: float | None = None
) -> list[OperatingPoint]:
    """Choose thresholds on validation rows and measure them on the test set."""
    points = []
    sides = [(v.labels == 1, v.logits[0, :, 1] - v.logits[0, :, 0]) for v in validation]
    pooled = [np.concatenate(parts) for parts in zip(*sides, strict=True)]
    for rule in RULES:
        if rule.reach is not None and not sides:
            continue
        own = [choose_threshold(positive, odds, rule) for positive, odds in sides] or [0.0] * len(test.logits)
        points.append(_point(rule, "mean of the models", EACH_FOLD, test, own, prevalence))
        if len(test.logits) > 1:
            together = [choose_threshold(pooled[0], pooled[1], rule) if pooled else 0.0]
            points.append(_point(rule, "ensemble", POOLED, test.ensemble(), together, prevalence))
    return points


def _point(
    rule: Rule, models: str, chosen_on: str, test: Predictions, thresholds: Sequence[float], prevalence: float | None
) -> OperatingPoint:
    shifted = test.logits.copy()
    shifted[..., 1] -= shifted[..., 0] + np.asarray(thresholds)[:, None]  # above 0 exactly where called positive
    shifted[..., 0] = 0.0
    called = replace(test, logits=shifted)
    found = {key: Value.of(called.estimate(key)) for key in ("sensitivity", "specificity")}
    if prevalence is None:
        positive = shifted[..., 1] > 0
        for key, some in (("ppv", positive.any(1)), ("npv", (~positive).any(1))):
            found[key] = Value.of(called.estimate(key)) if some.all() else Value(None, why="no image called")
    else:
        hit, passed = found["sensitivity"], found["specificity"]
        found["ppv"] = _predictive_value(hit, passed, prevalence)
        found["npv"] = _predictive_value(passed, hit, 1 - prevalence)
    p = tuple(float(softmax([0.0, t])[1]) for t in thresholds)
    return OperatingPoint(rule.title, models, chosen_on if rule.reach else "", p, **found)


def _predictive_value(own: Value, other: Value, share: float) -> Value:
    """PPV from sensitivity, specificity and prevalence; NPV from specificity, sensitivity and 1 − prevalence.

    How far either rate's own interval moves it is squared and added, for each side.
    """

    def of(rate: float, other_rate: float) -> float:
        called = share * rate + (1 - share) * (1 - other_rate)
        return share * rate / called if called > 0 else math.nan

    a, b = own.value, other.value
    center = math.nan if a is None or b is None else of(a, b)
    if a is None or b is None or math.isnan(center):
        return Value(None, why=own.why or other.why if a is None or b is None else "no image called")

    def bounds(ends: tuple[float, float] | None, other_ends: tuple[float, float] | None) -> tuple[float, float] | None:
        if ends is None or other_ends is None:
            return None
        moved = [(of(ends[k], b) - center, of(a, other_ends[k]) - center) for k in (0, 1)]
        low, high = (math.sqrt(sum(d * d for d in side if not math.isnan(d))) for side in moved)
        return max(0.0, center - low), min(1.0, center + high)

    these, new = bounds(own.these_models, other.these_models), bounds(own.new_model, other.new_model)
    return Value(center, these, new, own.why or other.why)


# Calibration.


@dataclass(frozen=True)
class Bin:
    """Test images of similar P(positive)."""

    low: float
    high: float
    predicted: float
    observed: float
    images: int
    positives: int


@dataclass(frozen=True)
class Calibration:
    """How well P(positive) agrees with what was observed."""

    models: str
    intercept: Value  # calibration in the large, on the log odds scale
    slope: Value  # of a logistic regression of the labels on the log odds
    brier: Value  # mean squared error of P(positive)
    ece: float  # calibration error: root mean square over the bins, debiased (see `calibration_error`)
    bins: tuple[Bin, ...] = ()  # of the ensemble, or of a single model


def calibration(test: Predictions, weights: FloatArray | None = None, resamples: int = RESAMPLES) -> list[Calibration]:
    """Calibration of P(positive), as a mean over the models and of the ensemble (of one model: only that).

    ``test`` has two classes (`against_rest`). ``weights`` (n,) let classes count as at some prevalence
    (`embcache.probe.predictions.row_weights`). Intervals of intercept and slope are for new patients and these models:
    sandwich variance, residuals summed by group (patient), t quantiles; those of the Brier score are bootstrapped.
    """
    w = np.ones(len(test.labels)) if weights is None else weights
    found = [_calibration("mean of the models", test, w, resamples)]
    return found if len(test.logits) == 1 else [*found, _calibration("ensemble", test.ensemble(), w, resamples)]


def _calibration(name: str, test: Predictions, w: FloatArray, resamples: int) -> Calibration:
    y = (test.labels == 1).astype(np.float64)
    odds = test.logits[..., 1] - test.logits[..., 0]
    p = softmax(test.logits)[..., 1]
    fits = [(recalibration_intercept(y, x, w), recalibration_slope(y, x, w)) for x in odds]
    brier = replace(METRICS["brier"], form=_weighted_brier(w), high=1.0)
    squared = estimate(sample(brier, test.test, test.logits, resamples=resamples), test.overlap, test.folds)
    error = float(np.mean([calibration_error(y, q, w, test.groups) for q in p]))
    bins = [
        Bin(float(p[0, rows].min()), float(p[0, rows].max()), float(np.average(p[0, rows], weights=w[rows])),
            float(np.average(y[rows], weights=w[rows])), len(rows), int(y[rows].sum()))
        for rows in (_equal_bins(p[0]) if len(p) == 1 else ())
    ]  # fmt: skip
    intercept, slope = (_wald([fit[k] for fit in fits], test) for k in (0, 1))
    return Calibration(name, intercept, slope, Value.of(squared), error, tuple(bins))


def _weighted_brier(w: FloatArray) -> Callable[[IntArray, FloatArray, int], Weighted]:
    def form(y: IntArray, z: FloatArray, positive: int) -> Weighted:
        values = w * (softmax(z)[:, positive] - (y == positive)) ** 2
        return lambda drawn: np.asarray((drawn @ values) / (drawn @ w))

    return form


def _wald(fits: Sequence[tuple[float | None, FloatArray]], test: Predictions) -> Value:
    """The mean over models of fitted numbers, with the interval that their influence values (n,) give."""
    values = [value for value, _ in fits if value is not None]
    if len(values) < len(fits):
        return Value(None, why="a threshold divides the classes without an error")
    mean = float(np.mean(values))
    why = test.test.too_few(METRICS["auc"])
    if why:
        return Value(mean, why=why)
    names, group = np.unique(test.groups.astype(str), return_inverse=True)
    moves = np.bincount(group.reshape(-1), np.mean([influence for _, influence in fits], axis=0))
    half = t_quantile(0.95, len(names) - 1) * math.sqrt(len(names) / (len(names) - 1) * float((moves**2).sum()))
    return Value(mean, (mean - half, mean + half))


def recalibration_intercept(y: FloatArray, odds: FloatArray, w: FloatArray) -> tuple[float, FloatArray]:
    """Intercept of a logistic regression of labels y (n,), with log odds as offset; its influence values (n,)."""
    from scipy.optimize import brentq

    reach = float(np.abs(odds).max()) + math.log(1e9)  # a root lies within: the sum falls as the intercept rises
    intercept = float(brentq(lambda b: (w * (y - expit(odds + b))).sum(), -reach, reach, xtol=1e-14, rtol=1e-14))
    p = expit(odds + intercept)
    return intercept, w * (y - p) / max(float((w * p * (1 - p)).sum()), 1e-300)


def recalibration_slope(y: FloatArray, odds: FloatArray, w: FloatArray) -> tuple[float | None, FloatArray]:
    """Slope of a logistic regression of labels y (n,) on the log odds; also its influence values (n,).

    None where a threshold divides the classes without an error (the slope has no bound) or the odds do not vary.
    """
    positive, negative = odds[y == 1], odds[y == 0]
    if positive.min() >= negative.max() or positive.max() <= negative.min():
        return None, np.zeros(len(y))
    scale = float(odds.std())
    x = np.stack([np.ones(len(y)), (odds - odds.mean()) / scale], axis=1)
    beta = np.zeros(2)

    def loss(b: FloatArray) -> float:
        eta = x @ b
        return float((w * (np.logaddexp(0.0, eta) - y * eta)).sum())

    for _ in range(100):  # Newton's steps, halved where they would go too far
        p = expit(x @ beta)
        step, size = np.linalg.solve((x * (w * p * (1 - p))[:, None]).T @ x, x.T @ (w * (y - p))), 1.0
        while size > 1e-6 and loss(beta + size * step) > loss(beta):
            size /= 2
        beta = beta + size * step
        if np.abs(step).max() < 1e-10:
            break
    p = expit(x @ beta)
    hessian = (x * (w * p * (1 - p))[:, None]).T @ x
    influence = (x * (w * (y - p))[:, None]) @ np.linalg.inv(hessian)[:, 1]
    return float(beta[1]) / scale, influence / scale


def calibration_error(y: FloatArray, p: FloatArray, w: FloatArray, groups: NDArray[np.object_]) -> float:
    """Root mean square over bins of the gap between mean P(positive) and the share of positives, debiased.

    After Kumar, Liang and Ma (2019): from each squared gap the variance that it has by chance is subtracted, so that
    the mean square is not above 0 for a calibrated model. The variance is that of residuals summed by group (patient).
    """
    total = 0.0
    for rows in _equal_bins(p):
        part = w[rows]
        residuals = p[rows] - y[rows]
        gap = float(np.average(residuals, weights=part))
        _, group = np.unique(groups[rows].astype(str), return_inverse=True)
        summed = np.bincount(group.reshape(-1), part * (residuals - gap)) / part.sum()
        chance = float((summed**2).sum()) * len(summed) / (len(summed) - 1) if len(summed) > 1 else gap * gap
        total += part.sum() / w.sum() * (gap * gap - chance)
    return math.sqrt(max(0.0, total))


def _equal_bins(p: FloatArray) -> list[NDArray[np.int64]]:
    """Rows of each bin, by ascending p: equal numbers but for ties, which stay together."""
    bins = max(1, min(BINS, len(p) // _FEWEST_IN_BIN))
    edges = np.unique(np.quantile(p, np.arange(1, bins) / bins, method="lower"))
    of = np.searchsorted(edges, p, side="left")
    return [np.flatnonzero(of == b) for b in np.unique(of)]


# A run in full.

USUAL = ("auc", "kappa", "mae", "auprc", "accuracy", "balanced_accuracy", "f1", "mcc", "brier", "log_loss")
"""Scores that are shown in addition to the run's own; `auc` is the macro one for more than two classes."""


@dataclass(frozen=True, eq=False)
class Described:
    """Everything that is measured on a run's saved predictions."""

    result: Result  # with the chosen positive class
    scores: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    confusion: Sequence[Sequence[int]] = ()
    findings: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)  # AUC and AUPRC of each
    prevalence: float | None = None  # of the positive class, for PPV, NPV and calibration
    operating_points: Sequence[OperatingPoint] = ()
    calibration: Sequence[Calibration] = ()
    adjustments: Sequence[Adjustment] = ()  # of each model, to another prevalence or by a temperature
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data, every field by its name."""
        data = {**asdict(self), "result": self.result.to_json()}
        return data if self.findings else {key: value for key, value in data.items() if key != "findings"}


def describe(
    result: Result, folder: Path, *, metrics: Sequence[str] = (), positive: str | None = None, adjust: Adjust = Adjust()
) -> Described:
    """Measure a run's saved predictions; nothing is trained and the run is not changed."""
    names, chosen = result.class_names, positive or result.positive or None
    number = positive_class(names, chosen)
    has_positive = chosen is not None or (len(names) == 2 and not result.task.metrics)
    result = replace(result, positive=names[number] if has_positive else "")
    if adjust and result.task.metrics:
        raise UsageError(
            f"--prevalence and --calibrate are for classes, and run {result.id} predicts {result.task.nouns}",
            code="not-classes", found=first_few(names), fix="leave them out",
        )  # fmt: skip
    if result.mean is None or result.kind == "kaggle":
        return Described(result, notes=["the labels of the test images are not known, so nothing can be measured"])
    test = replace(load_run_predictions(result, folder), positive=number)
    asked, unknown = [*metrics], list[str]()
    if not metrics:
        try:
            asked = [find_metric(result.metric, result.task).key, *USUAL]
        except EmbcacheError as error:  # its package may be gone
            asked, unknown = [*USUAL], [f"the run's own score was not measured again: {error.problem}"]
    kind = result.task.kind
    if result.task.metrics and not metrics:
        asked = [*asked[:1], *result.task.metrics]
    measures = [find_metric(m, result.task) for m in asked]
    for measure in measures if metrics else ():
        check_order(measure, result.task)
    if not metrics:
        ordered = has_order(names) or kind != "classes"
        measures = [m for m in measures if ordered or not m.ordered]
        measures = [m for m in measures if m.key != "mae" or len(names) != 2]
    keys = dict.fromkeys(m.key for m in measures)
    found = Described(
        result,
        scores={key: all_estimates(test, key) for key in keys},
        confusion=[] if result.task.metrics else confusion(test.labels, test.ensemble().logits[0]).tolist(),
        findings=each_finding(test) if kind == "findings" else {},
        notes=unknown + ([f"no scores by patient: {result.by_group['why']}"] if "why" in result.by_group else []),
    )
    if kind == "number":
        return found
    if not has_positive:
        what = (
            "one finding: --positive FINDING"
            if kind == "findings"
            else "one class against the others: --positive CLASS"
        )
        note = f"operating points and calibration are of {what}"
        return replace(found, notes=[*found.notes, note])
    try:
        validation = load_validation(result, folder)
    except StoreError as error:
        if adjust.calibrate:
            raise
        note = f"no operating points but P > 0.5: the run kept no predictions of validation images ({error.fix})"
        validation, found = [], replace(found, notes=[*found.notes, note])
    models = adjust_models(result, folder, adjust) if adjust else []
    prevalence, weights = None, None
    if models:
        test = replace(test, logits=np.stack([m.logits(z) for m, z in zip(models, test.logits, strict=True)]))
        pairs = zip(models, validation, strict=True) if validation else ()
        validation = [replace(v, logits=model.logits(v.logits)) for model, v in pairs]
    if adjust.prevalence is not None:
        prevalence = models[0].prevalence[number]
        weights = row_weights(test.labels, np.array(models[0].prevalence))
    one = names[number] if kind == "findings" else ""
    two = test.finding(one) if one else against_rest(test, number)
    held = [v.finding(one) if one else against_rest(v, number) for v in validation]
    return replace(
        found,
        prevalence=float(two.labels.mean()) if prevalence is None else prevalence,
        operating_points=operating_points(two, held, prevalence),
        calibration=calibration(two, weights),
        adjustments=models,
        notes=[*found.notes, *_notes(two, adjust, models, names)],
    )


def each_finding(test: Predictions, resamples: int = RESAMPLES) -> dict[str, dict[str, Estimate]]:
    """AUC and AUPRC of each finding that has images with and without it, as means over the models."""
    names = [name for c, name in enumerate(test.class_names) if c not in test.task.absent(test.labels)]
    return {name: {key: test.finding(name).estimate(key, resamples) for key in ("auc", "auprc")} for name in names}


def _notes(two: Predictions, adjust: Adjust, models: Sequence[Adjustment], names: Sequence[str]) -> list[str]:
    positive, own = two.class_names[1], float(two.labels.mean())
    notes = ["one model: its numbers are those of the ensemble"] if len(two.logits) == 1 else []
    if adjust:
        notes.append("scores and confusion matrix are of the models' own probabilities; what is below is adjusted")
    if adjust.prevalence is None:
        notes.append(
            f"PPV, NPV and calibration are at the test set's prevalence of {positive}, {own:.3f}; where it is another, "
            "--prevalence P"
        )
    else:
        shares = ", ".join(f"{name}={share:.4g}" for name, share in zip(names, models[0].prevalence, strict=True))
        notes.append(f"PPV, NPV and calibration are at the prevalence {shares}")
        if len(names) > 2:
            notes.append("specificity, and so PPV and NPV, take the other classes as they are in the test set")
    return notes
