"""Results on the same test images: differences with intervals, Holm's correction, scores within subgroups.

Folds are not paired samples (their training sets overlap), so nothing is tested over folds alone. A difference has the
variance of the test groups, which both results share, and that of training, which the folds show (`compare_scores`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from embcache.config import DatasetRef
from embcache.data.columns import column_values
from embcache.data.dataset import find_dataset
from embcache.errors import ProtocolError, StoreError, UsageError, check_choice, first_few
from embcache.paths import PathLike
from embcache.probe.metrics import FloatArray
from embcache.probe.predictions import Predictions
from embcache.probe.statistics import (
    LARGEST_OVERLAP,
    NOTHING,
    RESAMPLES,
    Scores,
    deviations,
    estimate,
    satterthwaite,
    t_quantile,
    training_variance_of,
    wilson,
)
from embcache.probe.summary import load_run_predictions
from embcache.runs.folders import Result, find_run_anywhere
from embcache.runs.result import Estimate
from embcache.sealed import Plain

INTERVALS = (
    "95 % interval: for new patients and a newly trained model, where folds show how much training varies; else for "
    "new patients and these models"
)
SPEAKS_OF = {
    True: "the difference is one of procedures, trained anew on other images like these",
    False: "the difference is one of these trained models and does not include how much training varies",
}
NO_VALUE = "(no value)"
_MANY = {"dataset": "datasets", "target": "targets", "metric": "metrics", "class_names": "classes"}


@dataclass(frozen=True)
class Difference:
    """Of two procedures' expected scores, or of these models' scores, on the same test groups."""

    difference: float
    interval: tuple[float, float] | None  # 95 %
    p: float | None  # two-sided, of no difference
    smallest: float | None  # smallest difference that this test set could have shown: 80 % power at 5 %
    p_margin: float | None  # of two one-sided tests that the difference is at least the margin
    trained: bool  # the variance of training is included: of the procedures, else of these models
    why: str = ""  # why there is no interval


@dataclass(frozen=True, eq=False)
class Tested:
    """A result and its predictions of labeled test images, sorted by ID."""

    __test__ = False  # not a test case of pytest

    result: Result
    predictions: Predictions

    @property
    def ids(self) -> NDArray[np.object_]:
        """Of the images, (n,)."""
        return self.predictions.ids

    @property
    def groups(self) -> NDArray[np.object_]:
        """Of the images, (n,)."""
        return self.predictions.groups

    @property
    def labels(self) -> NDArray[Any]:
        """Of the images, (n,), or (n, L) of findings."""
        return self.predictions.labels


@dataclass(frozen=True)
class Comparison(Plain):
    """One result beside the reference."""

    run: str
    dataset: str
    backbones: tuple[str, ...]
    head: str
    subset: str
    metric: str
    estimate: Estimate  # mean over the folds, sd and both intervals
    difference: Difference | None = None  # mean minus that of the reference; None for the reference
    p_holm: float | None = None  # its p after Holm's correction for all results compared with the reference
    notes: tuple[str, ...] = ()  # what the result says about its test groups, on which everything else depends
    labels_used: int = 0  # per fold, training and validation

    @property
    def mean(self) -> float:
        """Over the folds."""
        return self.estimate.mean

    @property
    def std(self) -> float | None:
        """Over the folds, ddof 1."""
        return self.estimate.std

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %, as tables show it."""
        return self.estimate.interval


@dataclass(frozen=True)
class Subgroup(Plain):
    """One run within one subgroup of its test images."""

    run: str
    metric: str
    column: str
    value: str
    n_images: int
    n_groups: int
    mean: float | None
    std: float | None
    interval: tuple[float, float] | None  # 95 %, as tables show it; None with the reason in ``why``
    lacks: tuple[str, ...] = ()  # classes of the test set without an image here: too small to be scored
    labels_used: int = 0  # per fold of the run, training and validation
    why: str = ""  # why there is no interval
    positive: str = ""  # the class that an asymmetric metric is of
    difference: Difference | None = None
    p_holm: float | None = None  # its p, corrected for all runs, metrics and subgroups


def compare(
    runs: Sequence[str],
    *,
    reference: str | None = None,
    metrics: Sequence[str] = (),
    margin: float | None = None,
    level: str = "image",
    home: PathLike | None = None,
    resamples: int = RESAMPLES,
) -> list[Comparison]:
    """Compare saved results, by ID or a unique prefix, with a reference (the first) on the same test images.

    ``level="group"`` scores groups (patients): the mean of their images' probabilities or numbers, the maximum of
    findings. ``metrics`` replace the runs' own; a ``margin`` also tests equivalence: that a difference is smaller than
    this on either side; ``resamples`` are of the bootstrap, for metrics that need it.

    Returns one row per run and metric, the reference first; p-values are corrected by Holm as one family. Raises a
    `UsageError` for fewer than two runs, a `ProtocolError` for runs of different tasks or test images.
    """
    if margin is not None and not margin > 0:
        raise UsageError("a margin is a difference above 0", code="option-bounds", found=f"{margin:g}",
                         where="--margin", fix="--margin 0.02")  # fmt: skip
    first = [] if reference is None else [find_run_anywhere(reference, home)]
    found = [find_run_anywhere(run, home) for run in runs]
    ordered = {path: result for result, path in first + found}  # a run that is named twice counts once
    if len(ordered) < 2:
        raise UsageError(
            "a comparison needs two runs" + (", and all of these names mean one run" if len(found) > 1 else ""),
            code="too-few-runs", found=", ".join(result.id for result in ordered.values()) or "none",
            fix="embcache compare RUN RUN …   (embcache results lists them)",
        )  # fmt: skip
    tested = [load_tested(result, path, level) for path, result in ordered.items()]
    return compare_tested(tested, metrics=metrics, margin=margin, resamples=resamples)


def compare_tested(
    tested: Sequence[Tested], *, metrics: Sequence[str] = (), margin: float | None = None, resamples: int = RESAMPLES
) -> list[Comparison]:
    """Compare results whose predictions are read already with the first of them; p of all metrics are one family."""
    for other in tested[1:]:
        _check_same_test(tested[0], other, bool(metrics))
    positive = tested[0].predictions.positive  # one positive class for all: that of the reference
    rows = []
    for metric in metrics or (tested[0].result.metric,):
        scores = [replace(t.predictions, positive=positive).scores(metric, resamples) for t in tested]
        for t, s in zip(tested, scores, strict=True):
            apart = None if t is tested[0] else difference(tested[0], scores[0], t, s, margin)
            rows.append(replace(_row(t, s), difference=apart))
    return _corrected(rows)


Row = TypeVar("Row", Comparison, Subgroup)


def _corrected(rows: Sequence[Row]) -> list[Row]:
    """The rows with Holm's correction of all their differences as one family."""
    p = [None if row.difference is None else row.difference.p for row in rows]
    adjusted = iter(holm([value for value in p if value is not None]))
    return [row if value is None else replace(row, p_holm=next(adjusted)) for row, value in zip(rows, p, strict=True)]


def difference(
    reference: Tested, against: Scores, t: Tested, scores: Scores, margin: float | None = None
) -> Difference:
    """Of a result from a reference, by scores on the same test rows."""
    overlaps = [x.predictions.overlap for x in (t, reference)]
    shared = None if overlaps[0] is None or overlaps[1] is None else (overlaps[0], overlaps[1])
    return compare_scores(scores, against, overlap=shared, folds=t.predictions.folds, margin=margin)


def same_test(a: Tested, b: Tested) -> bool:
    """Whether two results were tested on the same images, labels and groups."""
    return all(np.array_equal(x, y) for x, y in ((a.ids, b.ids), (a.labels, b.labels), (a.groups, b.groups)))


LEVELS = ("image", "group")


def load_tested(result: Result, path: Path, level: str = "image") -> Tested:
    """Predictions of a run on its labeled test images, or on its groups."""
    check_choice("--level", level, LEVELS)
    if result.kind == "kaggle" or result.mean is None:
        raise ProtocolError(
            f"the test labels of run {result.id} are not known, so its predictions cannot be scored",
            code="no-test-labels",
            expected="a run with --test local, or on a dataset with public test labels",
            found=f"{result.kind} on {result.dataset}, test set {result.test_set}",
            fix=f"embcache probe --test local --dataset {result.dataset} --head {result.head} --subset {result.subset}",
        )
    predictions = load_run_predictions(result, path)
    if level == "image":
        return Tested(result, predictions)
    groups = predictions.by_group()
    total = len(set(predictions.groups.tolist()))
    if (mixed := total - len(groups.ids)) and result.task.kind not in ("findings", "number"):
        raise ProtocolError(
            f"{mixed:,} of {total:,} test groups of run {result.id} hold images of several classes",
            code="mixed-groups", expected="one class per group",
            found=first_few(sorted(set(predictions.groups) - set(groups.ids)), 3), fix="--level image",
        )  # fmt: skip
    return Tested(result, groups)


def _check_same_test(a: Tested, b: Tested, other_metric: bool) -> None:
    one, other = vars(a.result), vars(b.result)
    for name in [name for name in _MANY if name != "metric" or not other_metric]:
        if one[name] != other[name]:
            found = [f"{r['id']}: {r[name] if name != 'class_names' else ', '.join(r[name])}" for r in (one, other)]
            raise ProtocolError(
                f"runs of different {_MANY[name]} cannot be compared", code="different-tasks", found="\n".join(found),
                fix="embcache results",
            )  # fmt: skip
    if not same_test(a, b):
        apart = set(a.ids) ^ set(b.ids) or set(a.ids[(a.labels != b.labels) | (a.groups != b.groups)])
        raise ProtocolError(
            "the runs were not tested on the same images, labels and groups", code="different-test-sets",
            expected=f"{len(a.ids):,} test images of {a.result.id} ({a.result.test_set})",
            found=f"{len(b.ids):,} of {b.result.id} ({b.result.test_set}); {len(apart):,} differ: {min(apart)!r} …",
            fix="probe both again: embcache probe --again …, with the same --test and --splits",
        )  # fmt: skip


def _row(t: Tested, scores: Scores) -> Comparison:
    r = t.result
    notes = [*(note for note in r.notes if note.startswith("ungrouped")), *r.left_out]
    if scores.metric.key == "accuracy" and r.majority is not None:
        notes.append(f"always predicting {r.majority[0]!r} has an accuracy of {r.majority[1]:.4f} on these test images")
    found = estimate(scores, t.predictions.overlap, t.predictions.folds)
    return Comparison(
        r.id, r.dataset, r.backbones, r.head, r.subset, scores.metric.key, found, notes=tuple(notes),
        labels_used=r.labels_used,
    )  # fmt: skip


# Within subgroups.


def subgroups(
    runs: Sequence[str],
    by: Sequence[str],
    *,
    metrics: Sequence[str] = (),
    ref: DatasetRef = DatasetRef(),
    home: PathLike | None = None,
    resamples: int = RESAMPLES,
) -> tuple[list[Subgroup], list[str]]:
    """Score runs within the subgroups that the columns ``by`` of the dataset's table make of the test images.

    Ages come in bands, other numbers in quarters. Each run is also compared with the first, where both have the same
    test images. ``ref`` says where the dataset is; the other arguments are those of `compare`.

    Returns one row per run, metric and subgroup, and notes. Raises a `UsageError` for no run, no column or an unknown
    one, a `StoreError` where test images of a run are no longer in the dataset.
    """
    if not runs or not by:
        raise UsageError("subgroups need runs and columns", code="nothing-named",
                         fix="embcache subgroups RUN --by sex,age")  # fmt: skip
    rows: list[Subgroup] = []
    first: Tested | None = None
    notes: dict[str, None] = {}
    for run in runs:
        tested = load_tested(*find_run_anywhere(run, home))
        dataset, _ = find_dataset(tested.result.dataset, ref, home=home)
        place = pd.Index(dataset.ids).get_indexer(pd.Index(tested.ids))
        if gone := tested.ids[place < 0].tolist():
            raise StoreError(
                f"{len(gone):,} test images of run {tested.result.id} are no longer in {dataset.name}",
                code="images-gone", found=first_few(gone), where=dataset.root,
                fix="name the folder that the run was made from with --data-root",
            )  # fmt: skip
        first = first or tested
        against = first if tested is not first and same_test(first, tested) else None
        notes |= dict.fromkeys(tested.result.left_out)
        parts: list[tuple[str, str, NDArray[np.bool_]]] = [("", "all", np.ones(len(place), dtype=bool))]
        for name in by:
            column = column_values(dataset, name)
            notes |= dict.fromkeys(column.notes)
            values = {value: np.asarray(column.of[place] == value, dtype=bool) for value in (*column.values, "")}
            parts += [(column.name, value or NO_VALUE, members) for value, members in values.items() if members.any()]
        for metric in metrics or (tested.result.metric,):
            for column_name, value, members in parts:
                row = _score_part(tested, metric, members, against, resamples)
                rows.append(replace(row, column=column_name, value=value))
    return _corrected(rows), list(notes)


def _score_part(t: Tested, metric: str, members: NDArray[np.bool_], against: Tested | None, resamples: int) -> Subgroup:
    """One row; without scores where a class of the test set is missing, since that is another task."""
    found, task = t.predictions.take(members), t.result.task
    missing = set(task.absent(found.labels)) - set(task.absent(t.labels))
    lacks = tuple(t.result.class_names[c] for c in sorted(missing))
    counts = len(found.ids), len(set(found.groups))
    row = Subgroup(t.result.id, metric, "", "", *counts, None, None, None, lacks, t.result.labels_used)
    if lacks:
        return row
    scores = found.scores(metric, resamples)
    e = estimate(scores, found.overlap, found.folds)
    apart = None
    if against is not None:
        other = replace(against.predictions, positive=found.positive).take(members).scores(metric, resamples)
        apart = difference(against, other, t, scores)
    return replace(row, metric=e.metric, mean=e.mean, std=e.std, interval=e.interval, why=e.why, positive=e.positive,
                   difference=apart)  # fmt: skip


# The statistics of one difference.


def compare_scores(
    one: Scores,
    other: Scores,
    *,
    overlap: float | tuple[float, float] | None = None,
    folds: int | None = None,
    margin: float | None = None,
) -> Difference:
    """Difference ``one`` − ``other`` of scores by the same metric on the same test set, with the same resamples.

    ``overlap`` is the mean share of training rows that two models have in common, perhaps one for each side. With it,
    and with as many models on both sides, the difference is one of procedures (a model trained anew), else of these
    models. ``folds`` are those of one repeat, default the number of models. ``margin`` tests equivalence.
    """
    difference = one.mean - other.mean
    why = one.test.too_few(one.metric) or ("" if math.isfinite(difference) else "no value")
    if why:
        return judge(difference, 0.0, math.inf, trained=False, why=why)
    moves = _joined(one, other)
    k, k_other = len(one.values), len(other.values)
    contrast = np.r_[np.full(k, 1 / k), np.full(k_other, -1 / k_other)]
    v, df = float(((contrast @ moves) ** 2).sum()), _difference_df(one, other, contrast, moves)
    if v <= NOTHING:  # all groups agree: no less than what a share of disagreeing images of that many groups could be
        v, df = _unseen(one), math.inf
    shares = overlap if isinstance(overlap, tuple) else (math.inf if overlap is None else overlap,) * 2
    trained = k == k_other > 1 and max(shares) <= LARGEST_OVERLAP
    if trained:
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
    return judge(difference, v, df, trained=trained, margin=margin)


def judge(
    value: float, variance: float, df: float, *, trained: bool, why: str = "", margin: float | None = None
) -> Difference:
    """Interval and p of a difference by Student's t, or why there are none."""
    from scipy.special import stdtr  # scipy.stats takes a second to import

    why = why or ("" if variance else "no variation among the test groups")
    if why:
        return Difference(value, None, None, None, None, trained, why)
    error, t = math.sqrt(variance), t_quantile(0.95, df)
    p, smallest = float(2 * stdtr(df, -abs(value) / error)), (t + t_quantile(0.6, df)) * error  # 0.8 quantile
    p_margin = None if margin is None else float(stdtr(df, (abs(value) - margin) / error))
    return Difference(value, (value - t * error, value + t * error), p, smallest, p_margin, trained)


def _joined(one: Scores, other: Scores) -> FloatArray:
    """Moves of both sides' models over the same groups or resamples."""
    if one.draws is None or other.draws is None:
        return np.concatenate([one.moves, other.moves])
    return deviations(np.concatenate([one.draws, other.draws]), min(one.df, other.df))


def _unseen(scores: Scores) -> float:
    """Squared standard error of a share of 0 among the images that would remain if those of a group were alike."""
    metric, test = scores.metric, scores.test
    if not math.isfinite(metric.high - metric.low):
        return 0.0
    share = wilson(0.0, test.alike(metric))[1] / t_quantile(0.95, math.inf)
    return ((metric.high - metric.low) * share) ** 2


def _difference_df(one: Scores, other: Scores, contrast: FloatArray, moves: FloatArray) -> float:
    """Degrees of freedom of a difference's test variance."""
    if one.draws is not None or one.metric.interval == "proportion":
        return min(one.df, other.df)
    test = one.test
    apart, names = contrast @ moves, np.unique(np.asarray(test.groups))
    if test.labels.ndim == 2:  # all rows are one part
        return max(1.0, len(names) - 1.0)
    parts = []
    for c in np.unique(test.labels):
        own = np.isin(names, test.groups[test.labels == c])
        parts.append((float((apart[own] ** 2).sum()), max(1.0, own.sum() - 1.0)))
    return satterthwaite(*parts)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction of one family, in the order given: the k-th smallest of m times m − k + 1."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()
