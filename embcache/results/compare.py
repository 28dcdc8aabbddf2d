"""Two or more results on the same test images: differences with intervals, Holm over one family.

Folds are no paired samples (their training sets overlap), so nothing is tested over folds alone: a difference has the
variance of the test groups, which both results share, and that of training, which their folds show
(`embcache.results.comparisons.compare`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from embcache.errors import ProtocolError, UsageError
from embcache.paths import PathLike
from embcache.probe.metrics import FloatArray, IntArray
from embcache.probe.predictions import Predictions
from embcache.probe.statistics import RESAMPLES, Scores
from embcache.probe.statistics import estimate as estimate_scores
from embcache.probe.summary import load_run_predictions
from embcache.results.comparisons import Difference, compare, holm
from embcache.runs.folders import ProbeResult, find_run_anywhere
from embcache.runs.result import Estimate

if TYPE_CHECKING:
    from embcache.results.subgroups import Subgroup

INTERVALS = (
    "95 % interval: for new patients and a newly trained model, where folds show how much training varies; else for "
    "new patients and these models"
)
SPEAKS_OF = {
    True: "the difference is one of procedures, trained anew on other images of this kind",
    False: "the difference is one of these trained models: how much training varies is not in it",
}


@dataclass(frozen=True, eq=False)
class Tested:
    """A result and its predictions of labeled test images, sorted by id."""

    __test__ = False  # not a test case of pytest

    result: ProbeResult
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
    def labels(self) -> IntArray:
        """Of the images, (n,)."""
        return self.predictions.labels

    @property
    def p(self) -> FloatArray:
        """Class probabilities (K, n, C) by every fold that has a model."""
        return self.predictions.p


@dataclass(frozen=True)
class Comparison:
    """One result beside the reference."""

    run: str
    dataset: str
    backbones: tuple[str, ...]
    head: str
    subset: str
    metric: str
    estimate: Estimate  # mean over the folds, sd and both intervals
    difference: Difference | None = None  # mean less that of the reference; None for the reference
    p_holm: float | None = None  # its p after Holm's correction for all results compared with the reference
    notes: tuple[str, ...] = ()  # what the result says of its test groups, on which all the rest depends
    labels_used: int = 0  # of a fold, training and validation

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

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, every field by its name."""
        return asdict(self)


def compare_runs(
    runs: Sequence[str],
    *,
    reference: str | None = None,
    metrics: Sequence[str] = (),
    margin: float | None = None,
    home: PathLike | None = None,
    resamples: int = RESAMPLES,
) -> list[Comparison]:
    """Compare results with one reference on the same test images."""
    if margin is not None and not margin > 0:
        raise UsageError("a margin is a difference above 0", found=f"{margin:g}", where="--margin", fix="--margin 0.02")
    first = None if reference is None else find_run_anywhere(reference, home)
    found = [find_run_anywhere(run, home) for run in runs]
    ordered = {path: result for result, path in ([first] if first else []) + found}  # a run named twice counts once
    if len(ordered) < 2:
        raise UsageError(
            "a comparison needs two runs" + (", and these names are all of one" if len(found) > 1 else ""),
            found=", ".join(result.id for result in ordered.values()) or "none",
            fix="embcache compare RUN RUN …   (embcache results lists them)",
        )
    tested = [load_tested(result, path) for path, result in ordered.items()]
    return compare_tested(tested, metrics=metrics, margin=margin, resamples=resamples)


def compare_tested(
    tested: Sequence[Tested],
    *,
    metrics: Sequence[str] = (),
    margin: float | None = None,
    resamples: int = RESAMPLES,
) -> list[Comparison]:
    """Compare results whose predictions are read already with the first of them; p of all metrics are one family."""
    for other in tested[1:]:
        _check_same_test(tested[0], other, bool(metrics))
    # One positive class for all: that of the reference.
    positive = tested[0].predictions.positive
    rows = []
    for metric in metrics or (tested[0].result.metric,):
        scores = [replace(t.predictions, positive=positive).scores(metric, resamples) for t in tested]
        rows.append(_row(tested[0], scores[0]))
        for t, s in zip(tested[1:], scores[1:], strict=True):
            rows.append(replace(_row(t, s), difference=difference(tested[0], scores[0], t, s, margin)))
    return corrected(rows)


Row = TypeVar("Row", "Comparison", "Subgroup")


def corrected(rows: Sequence[Row]) -> list[Row]:
    """The rows with Holm's correction of all their differences as one family."""
    known = [row.difference.p for row in rows if row.difference is not None and row.difference.p is not None]
    adjusted = iter(holm(known))
    return [
        row if row.difference is None or row.difference.p is None else replace(row, p_holm=next(adjusted))
        for row in rows
    ]


def difference(
    reference: Tested, against: Scores, t: Tested, scores: Scores, margin: float | None = None
) -> Difference:
    """Of a result from a reference, by scores on the same test rows."""
    overlaps = [x.predictions.overlap for x in (t, reference)]
    shared = None if overlaps[0] is None or overlaps[1] is None else (overlaps[0], overlaps[1])
    return compare(scores, against, overlap=shared, folds=t.predictions.folds, margin=margin)


def same_test(a: Tested, b: Tested) -> bool:
    """Whether two results were tested on the same images, labels and groups."""
    return all(np.array_equal(x, y) for x, y in ((a.ids, b.ids), (a.labels, b.labels), (a.groups, b.groups)))


def load_tested(result: ProbeResult, path: Path) -> Tested:
    """Predictions of a run on its labeled test images."""
    if result.kind == "kaggle" or result.mean is None:
        raise ProtocolError(
            f"the test labels of run {result.id} are not known, so its predictions cannot be scored",
            expected="a run with --test local, or on a dataset whose test labels are public",
            found=f"{result.kind} on {result.dataset}, test set {result.test_set}",
            fix=f"embcache probe --test local --dataset {result.dataset} --head {result.head} --subset {result.subset}",
        )
    return Tested(result, load_run_predictions(result, path))


def _check_same_test(a: Tested, b: Tested, other_metric: bool) -> None:
    words = {"dataset": "datasets", "target": "targets", "metric": "metrics", "class_names": "classes"}
    if other_metric:
        del words["metric"]
    for what, several in words.items():
        mine, theirs = getattr(a.result, what), getattr(b.result, what)
        if mine != theirs:
            raise ProtocolError(
                f"runs of different {several} cannot be compared",
                found=f"{a.result.id}: {_told(mine)}\n{b.result.id}: {_told(theirs)}",
                fix="embcache results",
            )
    apart = set(a.ids) ^ set(b.ids)
    frames = [pd.DataFrame({"id": t.ids, "label": t.labels, "group": t.groups}) for t in (a, b)]
    if not apart and not frames[0].equals(frames[1]):
        apart = set(frames[0]["id"][(frames[0] != frames[1]).any(axis=1)])
    if apart:
        raise ProtocolError(
            "the runs were not tested on the same images, labels and groups",
            expected=f"{len(a.ids):,} test images of {a.result.id} ({a.result.test_set})",
            found=f"{len(b.ids):,} of {b.result.id} ({b.result.test_set}); {len(apart):,} differ: {min(apart)!r} …",
            fix="probe both again: embcache probe --again …, with the same --test and --splits",
        )


def _told(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value) or "the labels"


def _row(t: Tested, scores: Scores) -> Comparison:
    result = t.result
    return Comparison(
        run=result.id,
        dataset=result.dataset,
        backbones=result.backbones,
        head=result.head,
        subset=result.subset,
        metric=scores.metric.key,
        estimate=estimate_scores(scores, t.predictions.overlap, t.predictions.folds),
        notes=(
            *(note for note in result.notes if note.startswith("ungrouped")),
            *result.left_out,
            *_baseline(t, scores),
        ),
        labels_used=result.labels_used,
    )


def _baseline(t: Tested, scores: Scores) -> list[str]:
    if scores.metric.key != "accuracy" or t.result.majority is None:
        return []
    name, share = t.result.majority
    return [f"always predicting {name!r} has an accuracy of {share:.4f} on these test images"]
