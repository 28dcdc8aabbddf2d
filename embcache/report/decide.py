"""Operating points and calibration of the chosen model: tables and a chart of `embcache.results.decisions`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embcache.errors import EmbcacheError
from embcache.probe.summary import load_validation
from embcache.report.charts import Chart, Series, line_chart
from embcache.report.words import bounded
from embcache.results.compare import INTERVALS, Tested
from embcache.results.decisions import (
    Bin,
    Calibration,
    OperatingPoint,
    Value,
    against_rest,
    calibration,
    operating_points,
)
from embcache.results.layout import Table, signed

MOST_CLASSES = 6
"""Classes of more than two whose calibration is shown: those of most test images."""


@dataclass(frozen=True, eq=False)
class Decided:
    """What is shown of one model's probabilities."""

    points: Table | None  # of two classes, or where a positive one was asked for
    calibration: Table
    bins: Table
    chart: Chart

    @property
    def charts(self) -> list[Chart]:
        """The chart, as a list."""
        return [self.chart]


def decide(t: Tested, run: Path, id: str) -> Decided:
    """Operating points and calibration of one result; ``run`` is its folder, ``id`` that of the chart."""
    names, positive = t.result.class_names, t.predictions.positive
    of = [positive]
    if len(names) > 2:
        counts = np.bincount(t.labels, minlength=len(names))
        of = sorted(np.argsort(-counts, kind="stable")[:MOST_CLASSES].tolist())
        of = [c for c in of if 0 < counts[c] < len(t.labels)]
    found = [(names[c], calibration(against_rest(t.predictions, c))) for c in of]
    single = [(name, each[-1]) for name, each in found]
    series = [
        Series(
            name,
            tuple(round(b.predicted, 4) for b in c.bins),
            tuple(round(b.observed, 4) for b in c.bins),
            counts=tuple(b.images for b in c.bins),
        )
        for name, c in single
    ]
    chart = line_chart(
        id, series, axes=("mean probability", "share observed"), square=True, digits=(3, 3),
        alt="Reliability curves: the share of images of a class over its mean probability, in bins; on the diagonal "
        "probabilities are right.",
    )  # fmt: skip
    points = _points(t, run, positive) if len(names) == 2 or t.result.positive else None
    return Decided(points, _calibration(found), _bins(single), chart)


def _points(t: Tested, run: Path, positive: int) -> Table:
    try:
        held = [against_rest(v, positive) for v in load_validation(t.result, run)]
        points = operating_points(against_rest(t.predictions, positive), held)
    except EmbcacheError as error:
        return Table("points", "Operating points", ("",), (), (f"not made: {error.problem}",))
    name = t.result.class_names[positive]
    why = dict[str, None]()
    rows = [
        (p.rule, p.models, _thresholds(p), *(_value(v, why) for v in (p.sensitivity, p.specificity, p.ppv, p.npv)))
        for p in points
    ]
    headers = ("rule", "of", f"P({name}) above", "sensitivity", "specificity", "PPV", "NPV")
    chosen = {p.models: p.chosen_on for p in points if p.chosen_on}
    notes = [f"{models}: threshold from {on.removeprefix('threshold from ')}" for models, on in chosen.items()]
    notes += ["predictive values are at the share of the test set", f"positive: {name}; {INTERVALS}"]
    return Table("points", f"Operating points of P({name})", headers, tuple(rows), (*notes, *why))


def _thresholds(p: OperatingPoint) -> str:
    low, high = min(p.thresholds), max(p.thresholds)
    return f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f} to {high:.3f}"


def _calibration(found: Sequence[tuple[str, Sequence[Calibration]]]) -> Table:
    why = dict[str, None]()
    rows = [
        (f"P({name})", c.models, *(_value(v, why) for v in (c.intercept, c.slope, c.brier)), f"{c.ece:.3f}")
        for name, each in found
        for c in (each if len(found) == 1 else each[-1:])
    ]
    headers = ("probability", "of", "intercept", "slope", "Brier score", "ECE, debiased")
    notes = (
        "intercept: 0 is right, below 0 probabilities are too high; slope: 1 is right, below 1 they are too extreme",
        "ECE: root mean square over bins of the gap to the share observed, less what chance adds",
        "intercept and slope: 95 % intervals for new patients, these models",
        *why,
    )
    return Table("calibration", "Calibration", headers, tuple(rows), notes)


def _bins(single: Sequence[tuple[str, Calibration]]) -> Table:
    def row(name: str, b: Bin) -> tuple[str, ...]:
        return (f"P({name})", f"{b.low:.3f} to {b.high:.3f}", f"{b.predicted:.3f}", f"{b.observed:.3f}",
                f"{b.images:,}", f"{b.positives:,}")  # fmt: skip

    headers = ("probability", "from – to", "mean", "share observed", "images", "of the class")
    return Table("bins", "Bins of the reliability curve", headers, tuple(row(n, b) for n, c in single for b in c.bins))


def _value(v: Value, why: dict[str, None]) -> str:
    if v.value is None:
        why |= {f"no value: {v.why}": None} if v.why else {}
        return "–"
    return bounded(signed(v.value, 3), v.interval, v.why, why)
