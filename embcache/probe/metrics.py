"""Metrics: one row of `METRICS` each, in a weighted form that resampling and training share.

Every metric reads logits, never saturated probabilities: classes are ranked by their log odds, which softmax would
round to ties. Pairs and cells are counted in whole numbers, so that models that rank alike have equal scores. Of
findings, metrics of two classes are the mean over findings, each on the images of which it is known.
scikit-learn is not called: its import takes longer than most probes train, and its input checks longer than an epoch.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from embcache.errors import ProtocolError, UsageError
from embcache.registry import Registry
from embcache.targets import Target, as_target
from embcache.targets.labels import log_odds as log_odds
from embcache.targets.labels import log_probabilities as log_probabilities
from embcache.targets.labels import mean_logits as mean_logits
from embcache.targets.labels import softmax as softmax
from embcache.targets.target import BoolArray as BoolArray
from embcache.targets.target import FloatArray as FloatArray
from embcache.targets.target import IntArray as IntArray

# From row weights of shape (B, n) to B values; nan where they are not defined.
Weighted = Callable[[FloatArray], FloatArray]
# From values (n,) or (n, L), logits (n, C) and the positive class to the weighted form.
Form = Callable[[NDArray[Any], FloatArray, int], Weighted]
# From the same to numerator and denominator of each row, boolean (n,).
Ratio = Callable[[IntArray, FloatArray, int], tuple[BoolArray, BoolArray]]

# Class names that mean "without disease", in addition to those that begin with ``no`` and a separator.
NEGATIVE_NAMES = ("normal", "benign", "healthy", "negative", "control", "0", "false")


@dataclass(frozen=True)
class Metric:
    """One metric; `embcache.testing.check_metric` checks it."""

    key: str  # as options name it
    title: str  # as tables print it
    form: Form
    interval: Literal["auc", "proportion", "bootstrap"] = "bootstrap"  # how it is made: `embcache.probe.statistics`
    low: float = 0.0  # its range
    high: float = 1.0
    loss: bool = False  # lower is better
    per_class: bool = False  # scores every class by itself, so that an interval needs enough groups of each
    asymmetric: bool = False  # with two classes its value depends on which of them is positive
    binary: bool = False  # for two classes only
    ordered: bool = False  # distances between classes count, so that their order must be known
    fits: tuple[str, ...] = ("classes", "ordinal")  # kinds of targets
    ratio: Ratio | None = None  # of a proportion

    def of(self, positive: int) -> Metric:
        """The same metric, always of one positive class: what a training that chooses by it is given."""
        return replace(self, form=lambda y, z, _: self.form(y, z, positive))


def has_order(class_names: Sequence[str]) -> bool:
    """Whether classes have an order: there are two, they are whole numbers, or they do not stand as in the alphabet."""
    numbers = all(name.removeprefix("-").isdecimal() for name in class_names)
    return len(class_names) == 2 or numbers or list(class_names) != sorted(class_names)


def check_order(metric: Metric, of: Target | Sequence[str]) -> None:
    """Refuse a metric of grades for classes whose order is that of the alphabet."""
    class_names = of.names if isinstance(of, Target) else of
    stated = isinstance(of, Target) and of.kind != "classes"
    if metric.ordered and not stated and not has_order(class_names):
        raise ProtocolError(
            f"{metric.title} weighs errors by their distance, and the order of these classes is not known",
            code="metric-needs-order", found=", ".join(class_names), expected="grades as whole numbers: 0, 1, 2, …",
            fix="number the grades in the table, --task ordinal if their order is meant, or --metric balanced_accuracy",
        )  # fmt: skip


def positive_class(class_names: Sequence[str], name: str | None = None) -> int:
    """Number of the positive class: the named one, else the one not named like a negative, else the second.

    Frequencies are never looked at.
    """
    if name is not None:
        if name not in class_names:
            plain = {known.casefold(): known for known in class_names}
            near = difflib.get_close_matches(name.casefold(), plain, n=1)
            raise UsageError(
                "there is no such class to be the positive one", code="unknown-class", expected=", ".join(class_names),
                found=name, where="--positive", fix=f"--positive {shlex.quote(plain[near[0]]) if near else 'CLASS'}",
            )  # fmt: skip
        return list(class_names).index(name)
    plain_names = [each.strip().casefold() for each in class_names]
    negative = [each in NEGATIVE_NAMES or bool(re.match(r"(no|non|not)[ _-]", each)) for each in plain_names]
    return negative.index(False) if len(class_names) == 2 and sum(negative) == 1 else min(1, len(class_names) - 1)


def asymmetry(metric: Metric, class_names: Sequence[str], positive: str | None) -> dict[str, str]:
    """What a request holds of the positive class: nothing where choosing epochs by the metric does not depend on it."""
    if not metric.asymmetric or len(class_names) != 2:
        return {}
    return {"positive": class_names[positive_class(class_names, positive)]}


def find_metric(name: str | Metric, of: int | Target) -> Metric:
    """The metric of a name, for a target or so many classes: ``auc`` of two classes is else ``macro_auc``.

    In addition to registered names, ``sensitivity_at_95_specificity`` and its reverse take any number of percent, and
    ``module:name`` is imported and registered under its key; no name that a file gives has a colon.
    """
    target = as_target(of)
    if isinstance(name, Metric):
        return _fitting(name, target)
    key = name.strip().lower().replace("-", "_").replace(" ", "_")
    if key in ("auc", "macro_auc") and target.kind != "number":
        key = "auc" if target.outputs == 2 and target.kind != "findings" else "macro_auc"
    at = re.fullmatch(r"(sensitivity|specificity)_at_(\d{1,2}(?:\.\d+)?)_(sensitivity|specificity)", key)
    if key in _BUILTIN:
        metric = _BUILTIN[key]
        if key == "brier" and (target.outputs == 2 or target.kind == "findings"):
            metric = replace(metric, high=1.0)  # of one probability; of more classes it is a sum
    elif at and at[1] != at[3]:
        metric = _at(at[1], float(at[2]))
    elif name in metrics or ":" in name:
        metric = metrics.get(name)
        if not isinstance(metric, Metric):
            raise UsageError(
                "this is not a metric", code="not-a-metric", expected="an embcache.probe.metrics.Metric",
                found=f"{name}: {metric!r}"[:80], where="--metric",
            )  # fmt: skip
        if metric.key not in metrics or metrics.get(metric.key) is not metric:
            metrics.register(metric.key)(metric)
    else:
        near = difflib.get_close_matches(key, metrics, n=1)
        raise UsageError(
            f"there is no such metric: {name}", code="unknown-metric", expected=", ".join(metrics), where="--metric",
            fix=f"--metric {near[0]}" if near else None,
        )  # fmt: skip
    return _fitting(metric, target)


def _fitting(metric: Metric, target: Target) -> Metric:
    """The metric in the form that a target needs; `ProtocolError` where it does not fit it."""
    if target.kind not in metric.fits:
        what = f"a target of kind {target.kind} ({', '.join(target.names[:3])})"
        raise ProtocolError(
            f"the metric {metric.key} does not fit {what}", code="metric-does-not-fit",
            expected=", ".join(key for key, known in _BUILTIN.items() if target.kind in known.fits),
            fix=f"--metric {target.metric}",
        )  # fmt: skip
    if metric.binary and target.kind != "findings" and target.outputs != 2:
        raise ProtocolError(
            f"the metric {metric.key} is for two classes", code="metric-for-two-classes",
            found=f"{target.outputs} classes",
            fix="--metric " + ("balanced_accuracy" if metric.key != "auc" else "macro_auc"),
        )  # fmt: skip
    if target.kind != "findings" or metric.fits == ("findings",):
        return metric
    return replace(
        metric, form=_over_findings(metric.form), fits=("findings",), ratio=None, asymmetric=False, binary=False,
        per_class=True, interval="auc" if metric.interval == "auc" else "bootstrap",
    )  # fmt: skip


def _over_findings(form: Form) -> Form:
    """The mean over findings of a metric of two classes, of those that have images with and without it."""

    def over(y: NDArray[Any], z: FloatArray, positive: int) -> Weighted:
        parts = []
        for value, odds in zip(y.T, z.T, strict=True):
            known = np.flatnonzero(value >= 0)
            if len(np.unique(value[known])) == 2:
                two = np.stack([np.zeros(len(known)), odds[known]], axis=1)
                parts.append((known, form(value[known], two, 1)))
        return lambda w: _mean_of_known(np.stack([np.full(len(w), np.nan), *(p(w[:, k]) for k, p in parts)]), 0)

    return over


def score(metric: str | Metric, y: ArrayLike, logits: ArrayLike, positive: int = 1, of: Target | None = None) -> float:
    """One number for values (n,) or (n, L) and logits (n, C); without a target, of C classes."""
    z = np.asarray(logits, dtype=np.float64)
    if not np.isfinite(z).all():
        found = f"{int((~np.isfinite(z)).any(-1).sum()):,} rows without"
        raise ProtocolError("a score needs predictions that are numbers", code="predictions-not-finite", found=found)
    target = of or as_target(z.shape[1])
    values = _scorable(y, target)
    return float(find_metric(metric, target).form(values, z, positive)(np.ones((1, len(values))))[0])


def known(value: float | None) -> float | None:
    """A score, or None where it is not defined (a PPV where nothing is called positive)."""
    return float(value) if value is not None and np.isfinite(value) else None


def scorer(metric: str | Metric, y: ArrayLike, of: int | Target) -> Callable[[ArrayLike], float]:
    """`score` on one set of values, as a function of finite logits (n, C), higher is better: what training calls.

    Losses are negated, and a score that is not defined counts as the worst there is.
    """
    target = as_target(of)
    values, found = _scorable(y, target), find_metric(metric, target)
    once = np.ones((1, len(values)))
    sign, worst = (-1.0, found.high) if found.loss else (1.0, found.low)

    def value(z: ArrayLike) -> float:
        defined = known(found.form(values, np.asarray(z, dtype=np.float64), 1)(once)[0])
        return sign * (worst if defined is None else defined)

    return value


def _scorable(y: ArrayLike, target: Target) -> NDArray[Any]:
    values = np.asarray(y) if target.kind == "number" else np.asarray(y, dtype=np.int64)
    if alike(values, target):
        found = f"{len(values)} images of {len(np.unique(values))} {target.noun}"
        raise ProtocolError(
            f"a score needs images of two {target.nouns}", code="one-class",
            found=found if values.ndim == 1 else f"{len(values)} images, none of them with and without a finding",
        )  # fmt: skip
    return values


def alike(values: NDArray[Any], target: Target) -> bool:
    """Whether nothing can be ranked: no image of two classes, or none with and without a finding."""
    return len(target.absent(values)) == len(target.names) or (values.ndim == 1 and len(np.unique(values)) < 2)


def per_class_auc(y: ArrayLike, logits: ArrayLike) -> list[float | None]:
    """One-vs-rest AUC of each class, or of each finding; None for one that does not occur in ``y``, as for `score`."""
    return _of_each(_auc, y, logits)


def _of_each(of_side: Callable[[BoolArray, FloatArray], Weighted], y: ArrayLike, logits: ArrayLike) -> list[Any]:
    return [
        float(of_side(positive, scores)(np.ones((1, len(positive))))[0]) if 0 < positive.sum() < len(positive) else None
        for positive, scores in sides_of(np.asarray(y), np.asarray(logits, dtype=np.float64))
    ]


def sides_of(y: NDArray[Any], logits: FloatArray) -> list[tuple[BoolArray, FloatArray]]:
    """Of each class against the rest, or each finding on the images of which it is known: positives, and scores."""
    if y.ndim == 2:
        return [(value[value >= 0] == 1, z[value >= 0]) for value, z in zip(y.T, logits.T, strict=True)]
    odds = log_odds(logits)
    return [(y == c, odds[:, c]) for c in range(odds.shape[1])]


def evaluate(
    metric: str, y: ArrayLike, logits: ArrayLike, positive: int = 1, of: Target | None = None
) -> dict[str, Any]:
    """All that is reported of one model's predictions; parameters as of `score`."""
    z = np.asarray(logits, dtype=np.float64)
    target = of or as_target(z.shape[1])
    values = _scorable(y, target)
    of_more = target.kind != "findings" and target.outputs != 2
    fitting = [m for m in _BUILTIN.values() if target.kind in m.fits and not (m.binary and of_more)]
    fitting = [m for m in fitting if m.key != "mae" or target.kind != "classes"]
    found = {m.key: known(score(m.key, values, z, positive, target)) for m in fitting}
    found = {"score": known(score(metric, values, z, positive, target)), **found}
    if target.kind == "number":
        return found
    found["auc"] = found["macro_auc"]
    more: dict[str, Any] = {"per_class_auc": per_class_auc(values, z), "absent_classes": target.absent(values)}
    if target.kind == "findings":
        return found | more | {"per_class_auprc": _of_each(_average_precision, values, z)}
    if target.outputs == 2:
        del found["macro_auc"]
    return found | more | {"predicted": np.bincount(z.argmax(1), minlength=target.outputs).tolist()}


def auc_placements(positive: BoolArray, scores: FloatArray) -> FloatArray:
    """DeLong's placement values (n,): the share of the other class that a row is ranked right with; ties count half."""
    below = np.empty(len(scores))
    for of, others in ((positive, np.sort(scores[~positive])), (~positive, np.sort(scores[positive]))):
        left, right = (np.searchsorted(others, scores[of], side) for side in ("left", "right"))
        below[of] = (left + right) / 2 / len(others)
    return np.where(positive, below, 1 - below)


def _run_sums(values: FloatArray, starts: IntArray) -> FloatArray:
    return values if len(starts) == values.shape[1] else np.add.reduceat(values, starts, axis=1)


def _ratio(above: FloatArray, below: FloatArray) -> FloatArray:
    empty = np.full(np.broadcast(above, below).shape, np.nan)
    return np.asarray(np.divide(above, below, out=empty, where=below > 0))


def _mean_of_known(values: FloatArray, axis: int) -> FloatArray:
    there = np.isfinite(values)
    return _ratio(np.where(there, values, 0.0).sum(axis), there.sum(axis).astype(np.float64))


def _one_vs_rest(of_side: Callable[[BoolArray, FloatArray], Weighted]) -> Form:
    """Of the positive class of two; of more the mean over the classes that occur, in each resample."""

    def form(y: IntArray, z: FloatArray, positive: int) -> Weighted:
        odds = log_odds(z)
        classes = [positive] if z.shape[1] == 2 else np.unique(y)
        parts = [of_side(y == c, odds[:, c]) for c in classes]
        return lambda weights: _mean_of_known(np.stack([part(weights) for part in parts]), 0)

    return form


def above_thresholds(positive: BoolArray, scores: FloatArray) -> Callable[[FloatArray], tuple[FloatArray, FloatArray]]:
    """From row weights (B, n) to positives and negatives (B, distinct scores) at or above each score, highest first."""
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))  # first row of each run of equal scores
    sign = positive[order]

    def counts(weights: FloatArray) -> tuple[FloatArray, FloatArray]:
        w = weights[:, order]
        tp = np.cumsum(_run_sums(w * sign, starts), axis=1)
        return tp, np.cumsum(_run_sums(w, starts), axis=1) - tp

    return counts


def roc_counts(positive: ArrayLike, scores: ArrayLike) -> tuple[IntArray, IntArray]:
    """`above_thresholds` of single rows: int64, (distinct scores,) each."""
    side, values = np.asarray(positive, dtype=bool), np.asarray(scores, dtype=np.float64)
    tp, fp = above_thresholds(side, values)(np.ones((1, len(values))))
    return tp[0].astype(np.int64), fp[0].astype(np.int64)


def _curve(positive: BoolArray, scores: FloatArray, read: Callable[[FloatArray, FloatArray], FloatArray]) -> Weighted:
    """A number read off `above_thresholds`; nan where a side is empty."""
    counts = above_thresholds(positive, scores)

    def form(weights: FloatArray) -> FloatArray:
        tp, fp = counts(weights)
        return np.where((tp[:, -1] > 0) & (fp[:, -1] > 0), read(tp, fp), np.nan)

    return form


def _auc(positive: BoolArray, scores: FloatArray) -> Weighted:
    """The Mann-Whitney statistic, ties counting half."""

    def read(tp: FloatArray, fp: FloatArray) -> FloatArray:
        pos, neg = (np.diff(counts, axis=1, prepend=0) for counts in (tp, fp))
        return _ratio((pos * (fp[:, -1:] - fp + neg / 2)).sum(1), tp[:, -1] * fp[:, -1])

    return _curve(positive, scores, read)


def _average_precision(positive: BoolArray, scores: FloatArray) -> Weighted:
    """Σ (recallₙ − recallₙ₋₁) precisionₙ, as scikit-learn defines it."""

    def read(tp: FloatArray, fp: FloatArray) -> FloatArray:
        steps = np.diff(tp, axis=1, prepend=0) / np.maximum(tp[:, -1:], 1e-300)
        return np.asarray((steps * np.nan_to_num(_ratio(tp, tp + fp))).sum(1))

    return _curve(positive, scores, read)


def _at(what: str, percent: float) -> Metric:
    """Highest sensitivity among the thresholds of at least some specificity, or the reverse."""

    def read(tp: FloatArray, fp: FloatArray) -> FloatArray:
        sensitivity, specificity = (
            np.hstack([np.zeros((len(tp), 1)), x / np.maximum(x[:, -1:], 1e-300)]) for x in (tp, fp)
        )
        specificity = 1 - specificity
        wanted, given = (sensitivity, specificity) if what == "sensitivity" else (specificity, sensitivity)
        return np.asarray(np.where(given >= percent / 100 - 1e-12, wanted, 0.0).max(1))

    other = "specificity" if what == "sensitivity" else "sensitivity"
    return Metric(
        f"{what}_at_{percent:g}_{other}", f"{what} at {percent:g} % {other}",
        _one_vs_rest(lambda positive, scores: _curve(positive, scores, read)), per_class=True, asymmetric=True,
        fits=_ANY,
    )  # fmt: skip


def _confusion(y: IntArray, z: FloatArray) -> Weighted:
    """Weighted confusion matrices (B, C, C), rows true and columns predicted."""
    n = z.shape[1]
    cells = y * n + z.argmax(1)
    return lambda w: np.asarray([np.bincount(cells, row, n * n) for row in w], dtype=np.float64).reshape(len(w), n, n)


def confusion(labels: IntArray, logits: FloatArray) -> IntArray:
    """Images of each true class (rows) that logits (n, C) call each class (columns); int64 of shape (C, C)."""
    return np.asarray(_confusion(labels, logits)(np.ones((1, len(labels))))[0].astype(np.int64))


def _of_confusion(read: Callable[[FloatArray, int], FloatArray]) -> Form:
    def form(y: IntArray, z: FloatArray, positive: int) -> Weighted:
        tables = _confusion(y, z)
        return lambda w: read(tables(w), positive)

    return form


def _kappa(table: FloatArray, positive: int) -> FloatArray:
    n = table.shape[1]
    distance = np.subtract.outer(np.arange(n), np.arange(n)) ** 2.0
    table = table / table.sum((1, 2), keepdims=True)
    chance = table.sum(2)[:, :, None] * table.sum(1)[:, None, :]
    return np.asarray(1 - _ratio((distance * table).sum((1, 2)), (distance * chance).sum((1, 2))))


def _f1(table: FloatArray, positive: int) -> FloatArray:
    hits = np.diagonal(table, axis1=1, axis2=2)
    true, called = table.sum(2), table.sum(1)
    each = np.where(true > 0, _ratio(2 * hits, true + called), np.nan)  # (B, C), of the classes that occur
    return np.asarray(each[:, positive]) if table.shape[1] == 2 else _mean_of_known(each, 1)


def _recalls(table: FloatArray, positive: int) -> FloatArray:
    return _mean_of_known(_ratio(np.diagonal(table, axis1=1, axis2=2), table.sum(2)), 1)


def _mcc(table: FloatArray, positive: int) -> FloatArray:
    """Matthews's correlation (Gorodkin's for more classes); 0 where all are called, or are, one class."""
    true, called, n = table.sum(2), table.sum(1), table.sum((1, 2))
    covariance = np.trace(table, axis1=1, axis2=2) * n - (true * called).sum(1)
    spread = np.sqrt((n**2 - (called**2).sum(1)) * (n**2 - (true**2).sum(1)))
    return np.asarray(np.divide(covariance, spread, out=np.zeros_like(covariance), where=spread > 1e-9 * n**2))


def _mean_of(each: Callable[[IntArray, FloatArray, int], FloatArray]) -> Form:
    def form(y: IntArray, z: FloatArray, positive: int) -> Weighted:
        values = each(y, z, positive)
        return lambda w: _ratio(w @ values, w.sum(1))

    return form


def _brier(y: IntArray, z: FloatArray, positive: int) -> FloatArray:
    """Squared error of P(positive) of two classes; of more the sum over classes."""
    p = softmax(z)
    if z.shape[1] == 2:
        return np.asarray((p[:, positive] - (y == positive)) ** 2)
    return np.asarray(((p - np.eye(z.shape[1])[y]) ** 2).sum(1))


def _log_loss(y: IntArray, z: FloatArray, positive: int) -> FloatArray:
    return np.asarray(-log_probabilities(z)[np.arange(len(y)), y])


def _micro(of_side: Callable[[BoolArray, FloatArray], Weighted]) -> Form:
    """Of all known values of all findings as one set."""

    def form(y: NDArray[Any], z: FloatArray, positive: int) -> Weighted:
        rows, columns = np.nonzero(y >= 0)
        part = of_side(y[rows, columns] == 1, z[rows, columns])
        return lambda w: part(w[:, rows])

    return form


# Of numbers.


def _mae(y: NDArray[Any], z: FloatArray, positive: int) -> Weighted:
    """Mean absolute error: of numbers, or of the most probable grade in grades."""
    distance = np.abs(y - (z[:, 0] if z.shape[1] == 1 else z.argmax(1)))
    return lambda w: _ratio(w @ distance, w.sum(1))


def _rmse(y: NDArray[Any], z: FloatArray, positive: int) -> Weighted:
    squared = (y - z[:, 0]) ** 2
    return lambda w: np.sqrt(_ratio(w @ squared, w.sum(1)))


def _r2(y: NDArray[Any], z: FloatArray, positive: int) -> Weighted:
    """1 − Σ (y − ŷ)² / Σ (y − ȳ)²."""
    squared, middle = (y - z[:, 0]) ** 2, y - y.mean()  # about the mean, so that large numbers keep their digits

    def value(w: FloatArray) -> FloatArray:
        total = w.sum(1)
        spread = w @ middle**2 - (w @ middle) ** 2 / np.maximum(total, 1e-300)
        return 1 - _ratio(w @ squared, np.where(spread > 1e-12 * (w @ middle**2), spread, 0.0))

    return value


def _correlation(w: FloatArray, a: FloatArray, b: FloatArray) -> FloatArray:
    """Weighted Pearson correlation of values (n,) or (B, n); nan where either does not vary."""
    total = w.sum(1, keepdims=True)
    a, b = (x - (w * x).sum(1, keepdims=True) / np.maximum(total, 1e-300) for x in (a, b))
    squares = [(w * x * x).sum(1) for x in (a, b)]
    least = [1e-24 * np.maximum(1.0, (w * x**2).max(1)) for x in (a, b)]
    there = (squares[0] > least[0]) & (squares[1] > least[1])
    return _ratio((w * a * b).sum(1), np.where(there, np.sqrt(squares[0] * squares[1]), 0.0)).clip(-1, 1)


def _pearson(y: NDArray[Any], z: FloatArray, positive: int) -> Weighted:
    a, b = (x - x.mean() for x in (y, z[:, 0]))
    return lambda w: _correlation(w, a / (np.abs(a).max() or 1.0), b / (np.abs(b).max() or 1.0))


def _spearman(y: NDArray[Any], z: FloatArray, positive: int) -> Weighted:
    """Pearson's of ranks, in each resample anew; ties have their mean rank."""
    orders = [np.unique(x, return_inverse=True)[1].reshape(-1) for x in (y, z[:, 0])]

    def ranks(w: FloatArray, of: IntArray) -> FloatArray:
        tied = np.array([np.bincount(of, row) for row in w])
        return np.asarray((np.cumsum(tied, axis=1) - (tied - 1) / 2)[:, of] / len(of))

    return lambda w: _correlation(w, *(ranks(w, of) for of in orders))


def _proportion(key: str, title: str, ratio: Ratio, **traits: Any) -> Metric:
    def form(y: IntArray, z: FloatArray, positive: int) -> Weighted:
        numerator, denominator = ratio(y, z, positive)
        return lambda w: _ratio(w @ (numerator & denominator).astype(np.float64), w @ denominator.astype(np.float64))

    return Metric(key, title, form, "proportion", ratio=ratio, **traits)


_TWO = {"asymmetric": True, "binary": True}
_ANY = ("classes", "ordinal", "findings")
_NUMBER = ("number",)

METRICS: Mapping[str, Metric] = {
    metric.key: metric
    for metric in (
        Metric("auc", "AUC", _one_vs_rest(_auc), "auc", per_class=True, binary=True),
        Metric("macro_auc", "macro AUC", _one_vs_rest(_auc), "auc", per_class=True, fits=_ANY),
        Metric("kappa", "kappa", _of_confusion(_kappa), low=-1.0, ordered=True),
        Metric("auprc", "AUPRC", _one_vs_rest(_average_precision), per_class=True, asymmetric=True, fits=_ANY),
        _proportion("accuracy", "accuracy", lambda y, z, _: (z.argmax(1) == y, np.ones(len(y), bool)), fits=_ANY),
        Metric("balanced_accuracy", "balanced accuracy", _of_confusion(_recalls), per_class=True, fits=_ANY),
        Metric("f1", "F1", _of_confusion(_f1), per_class=True, asymmetric=True, fits=_ANY),
        Metric("mcc", "MCC", _of_confusion(_mcc), low=-1.0, fits=_ANY),
        Metric("brier", "Brier score", _mean_of(_brier), high=2.0, loss=True, fits=_ANY),
        Metric("log_loss", "log loss", _mean_of(_log_loss), high=np.inf, loss=True, fits=_ANY),
        _proportion(
            "sensitivity", "sensitivity", lambda y, z, c: (z.argmax(1) == c, y == c), per_class=True, fits=_ANY, **_TWO
        ),
        _proportion(
            "specificity", "specificity", lambda y, z, c: (z.argmax(1) != c, y != c), per_class=True, fits=_ANY, **_TWO
        ),
        _proportion("ppv", "PPV", lambda y, z, c: (y == c, z.argmax(1) == c), **_TWO),
        _proportion("npv", "NPV", lambda y, z, c: (y != c, z.argmax(1) != c), **_TWO),
        _at("sensitivity", 95),
        _at("specificity", 95),
    )
}  # fmt: skip
"""Metrics of classes by their keys, some of findings too. A new metric is one row."""

OTHERS: Mapping[str, Metric] = {
    metric.key: metric
    for metric in (
        Metric("micro_auc", "micro AUC", _micro(_auc), fits=("findings",)),
        Metric("micro_auprc", "micro AUPRC", _micro(_average_precision), fits=("findings",)),
        Metric("mae", "MAE", _mae, high=np.inf, loss=True, ordered=True, fits=("classes", "ordinal", "number")),
        Metric("rmse", "RMSE", _rmse, high=np.inf, loss=True, fits=_NUMBER),
        Metric("r2", "R²", _r2, low=-np.inf, fits=_NUMBER),
        Metric("pearson", "Pearson's r", _pearson, low=-1.0, fits=_NUMBER),
        Metric("spearman", "Spearman's ρ", _spearman, low=-1.0, fits=_NUMBER),
    )
}
"""Metrics of grades, findings and numbers."""

_BUILTIN = {**METRICS, **OTHERS}

metrics: Registry[Metric] = Registry("metric", _BUILTIN)  # and those that other packages register


def metric_title(name: str, positive: str = "") -> str:
    """A metric as tables print it: with the class that an asymmetric one is of, and where a threshold comes from."""
    found = _registered(name)
    title = re.sub(r"_(\d[\d.]*)_", r" \1 % ", name).replace("_", " ") if found is None else found.title
    read_off = ", threshold read off the test set" if "_at_" in name else ""
    return title + (f" of {positive}" if positive else "") + read_off


def merit(name: str, value: float | None) -> float:
    """A score as a choice between models ranks it: higher is better, a loss negated; −inf for none."""
    if value is None:
        return -np.inf
    return -value if is_loss(name) else value


def is_loss(name: str) -> bool:
    """Whether lower is better; not where the metric of a saved result is not to be had here."""
    found = _registered(name)
    return found is not None and found.loss


def _registered(name: str) -> Metric | None:
    try:
        found = metrics.get(name) if name in metrics else None
    except UsageError:  # a package that cannot be imported
        return None
    return found if isinstance(found, Metric) else None
