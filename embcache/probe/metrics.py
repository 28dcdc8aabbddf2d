"""Metrics of predicted classes: one row of `METRICS` each, in a weighted form that resampling and training share.

Every metric reads logits, never saturated probabilities: classes are ranked by their log odds, which softmax would
round to ties. Pairs and cells are counted in whole numbers, so that models that rank alike have equal scores.
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

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
# From row weights of shape (B, n) to B values; nan where they are not defined.
Weighted = Callable[[FloatArray], FloatArray]
# From labels (n,), logits (n, C) and the positive class to the weighted form.
Form = Callable[[IntArray, FloatArray, int], Weighted]
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
    ratio: Ratio | None = None  # of a proportion

    def of(self, positive: int) -> Metric:
        """The same metric, always of one positive class: what a training that chooses by it is given."""
        return replace(self, form=lambda y, z, _: self.form(y, z, positive))


def has_order(class_names: Sequence[str]) -> bool:
    """Whether classes have an order: there are two, they are whole numbers, or they do not stand as in the alphabet."""
    numbers = all(name.removeprefix("-").isdecimal() for name in class_names)
    return len(class_names) == 2 or numbers or list(class_names) != sorted(class_names)


def check_order(metric: Metric, class_names: Sequence[str]) -> None:
    """Refuse a metric of grades for classes whose order is that of the alphabet."""
    if metric.ordered and not has_order(class_names):
        raise ProtocolError(
            f"{metric.title} weighs errors by their distance, and the order of these classes is not known",
            code="metric-needs-order", found=", ".join(class_names), expected="grades as whole numbers: 0, 1, 2, …",
            fix="number the grades in the table, or --metric balanced_accuracy",
        )  # fmt: skip


def softmax(logits: ArrayLike) -> FloatArray:
    """Class probabilities in float64, of logits of shape (..., C)."""
    z = np.asarray(logits, dtype=np.float64)
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def log_odds(logits: ArrayLike) -> FloatArray:
    """log(p / (1 − p)) of each class, of logits of shape (..., C): ranks as p does, without its ties near 0 and 1."""
    z = np.asarray(logits, dtype=np.float64)
    if z.shape[-1] == 2:
        difference = z[..., 1] - z[..., 0]
        return np.stack([-difference, difference], axis=-1)
    # In ascending order, so that images whose other logits are the same in another order tie.
    order, columns = np.argsort(z, axis=-1), []
    ranked = np.take_along_axis(z, order, -1)
    for c in range(z.shape[-1]):
        others = np.delete(ranked, c, axis=-1)
        top = others[..., -1:]
        columns.append(ranked[..., c] - top[..., 0] - np.log(np.exp(others - top).sum(axis=-1)))
    return np.take_along_axis(np.stack(columns, axis=-1), np.argsort(order, axis=-1), -1)


def log_probabilities(logits: ArrayLike) -> FloatArray:
    """Log p of each class, of logits of shape (..., C): exact near p = 1 too, so that it can be used as logits."""
    return np.asarray(-np.logaddexp(0.0, -log_odds(logits)))


def mean_logits(logits: ArrayLike, axis: int = 0) -> FloatArray:
    """Logits of the mean of probabilities over an axis, by log-mean-exp: what an ensemble predicts."""
    log_p = log_probabilities(logits)
    top = log_p.max(axis=axis, keepdims=True)
    mean = np.log(np.exp(log_p - top).mean(axis=axis, keepdims=True)) + top
    return np.asarray(mean.squeeze(axis))


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


def find_metric(name: str | Metric, n_classes: int) -> Metric:
    """The metric of a name, for so many classes: ``auc`` of more than two is ``macro_auc``, and the reverse.

    In addition to registered names, ``sensitivity_at_95_specificity`` and its reverse take any number of percent, and
    ``module:name`` is imported and registered under its key; no name that a file gives has a colon.
    """
    if isinstance(name, Metric):
        return name
    key = name.strip().lower().replace("-", "_").replace(" ", "_")
    if key in ("auc", "macro_auc"):
        key = "auc" if n_classes == 2 else "macro_auc"
    at = re.fullmatch(r"(sensitivity|specificity)_at_(\d{1,2}(?:\.\d+)?)_(sensitivity|specificity)", key)
    if key in METRICS:
        metric = METRICS[key]
        if key == "brier" and n_classes == 2:  # of one probability; of more classes it is a sum
            metric = replace(metric, high=1.0)
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
    if metric.binary and n_classes != 2:
        raise ProtocolError(
            f"the metric {metric.key} is for two classes", code="metric-for-two-classes", found=f"{n_classes} classes",
            fix="--metric " + ("balanced_accuracy" if metric.key != "auc" else "macro_auc"),
        )  # fmt: skip
    return metric


def score(metric: str | Metric, y: ArrayLike, logits: ArrayLike, positive: int = 1) -> float:
    """One number for labels (n,) and logits (n, C)."""
    z = np.asarray(logits, dtype=np.float64)
    if not np.isfinite(z).all():
        found = f"{int((~np.isfinite(z)).any(-1).sum()):,} rows without"
        raise ProtocolError("a score needs predictions that are numbers", code="predictions-not-finite", found=found)
    labels = _two_classes(y)
    return float(find_metric(metric, z.shape[1]).form(labels, z, positive)(np.ones((1, len(labels))))[0])


def known(value: float | None) -> float | None:
    """A score, or None where it is not defined (a PPV where nothing is called positive)."""
    return float(value) if value is not None and np.isfinite(value) else None


def scorer(metric: str | Metric, y: ArrayLike, n_classes: int) -> Callable[[ArrayLike], float]:
    """`score` on one set of labels, as a function of finite logits (n, C), higher is better: what training calls.

    Losses are negated, and a score that is not defined counts as the worst there is.
    """
    labels, found = _two_classes(y), find_metric(metric, n_classes)
    once = np.ones((1, len(labels)))
    sign, worst = (-1.0, found.high) if found.loss else (1.0, found.low)

    def value(z: ArrayLike) -> float:
        defined = known(found.form(labels, np.asarray(z, dtype=np.float64), 1)(once)[0])
        return sign * (worst if defined is None else defined)

    return value


def _two_classes(y: ArrayLike) -> IntArray:
    labels = np.asarray(y, dtype=np.int64)
    if (present := len(np.unique(labels))) < 2:
        found = f"{len(labels)} images of {present} class"
        raise ProtocolError("a score needs images of two classes", code="one-class", found=found)
    return labels


def per_class_auc(y: ArrayLike, logits: ArrayLike) -> list[float | None]:
    """One-vs-rest AUC of each class; None for a class that does not occur in ``y``, as for `score`."""
    labels, odds = np.asarray(y), log_odds(logits)
    once = np.ones((1, len(labels)))
    return [
        float(_auc(labels == c, odds[:, c])(once)[0]) if 0 < (labels == c).sum() < len(labels) else None
        for c in range(odds.shape[1])
    ]


def evaluate(metric: str, y: ArrayLike, logits: ArrayLike, positive: int = 1) -> dict[str, Any]:
    """All that is reported of one model's predictions; parameters as of `score`."""
    labels, z = np.asarray(y, dtype=np.int64), np.asarray(logits, dtype=np.float64)
    n_classes = z.shape[1]
    fitting = [m for m in METRICS.values() if not (m.binary and n_classes != 2)]
    values = {m.key: score(m.key, labels, z, positive) for m in fitting}
    values["auc"] = values["macro_auc"]
    if n_classes == 2:
        del values["macro_auc"]
    return {
        "score": known(score(metric, labels, z, positive)),
        **{key: known(value) for key, value in values.items()},
        "per_class_auc": per_class_auc(labels, z),
        "absent_classes": [c for c in range(n_classes) if c not in labels],
        "predicted": np.bincount(z.argmax(1), minlength=n_classes).tolist(),
    }


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


def _proportion(key: str, title: str, ratio: Ratio, **traits: bool) -> Metric:
    def form(y: IntArray, z: FloatArray, positive: int) -> Weighted:
        numerator, denominator = ratio(y, z, positive)
        return lambda w: _ratio(w @ (numerator & denominator).astype(np.float64), w @ denominator.astype(np.float64))

    return Metric(key, title, form, "proportion", ratio=ratio, **traits)


_TWO = {"asymmetric": True, "binary": True}

METRICS: Mapping[str, Metric] = {
    metric.key: metric
    for metric in (
        Metric("auc", "AUC", _one_vs_rest(_auc), "auc", per_class=True, binary=True),
        Metric("macro_auc", "macro AUC", _one_vs_rest(_auc), "auc", per_class=True),
        Metric("kappa", "kappa", _of_confusion(_kappa), low=-1.0, ordered=True),
        Metric("auprc", "AUPRC", _one_vs_rest(_average_precision), per_class=True, asymmetric=True),
        _proportion("accuracy", "accuracy", lambda y, z, _: (z.argmax(1) == y, np.ones(len(y), dtype=bool))),
        Metric("balanced_accuracy", "balanced accuracy", _of_confusion(_recalls), per_class=True),
        Metric("f1", "F1", _of_confusion(_f1), per_class=True, asymmetric=True),
        Metric("mcc", "MCC", _of_confusion(_mcc), low=-1.0),
        Metric("brier", "Brier score", _mean_of(_brier), high=2.0, loss=True),
        Metric("log_loss", "log loss", _mean_of(_log_loss), high=np.inf, loss=True),
        _proportion("sensitivity", "sensitivity", lambda y, z, c: (z.argmax(1) == c, y == c), per_class=True, **_TWO),
        _proportion("specificity", "specificity", lambda y, z, c: (z.argmax(1) != c, y != c), per_class=True, **_TWO),
        _proportion("ppv", "PPV", lambda y, z, c: (y == c, z.argmax(1) == c), **_TWO),
        _proportion("npv", "NPV", lambda y, z, c: (y != c, z.argmax(1) != c), **_TWO),
        _at("sensitivity", 95),
        _at("specificity", 95),
    )
}  # fmt: skip
"""Every metric of this package by its key. A new metric is one row."""

metrics: Registry[Metric] = Registry("metric", METRICS)  # these and those that other packages register


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
