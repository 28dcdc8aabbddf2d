"""``embcache results RUN``: what one run's saved predictions show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from embcache.commands.options import write_json
from embcache.commands.output import bounds, echo, print_table, spread
from embcache.probe.metrics import metric_title
from embcache.probe.prevalence import Adjust
from embcache.results.compare import INTERVALS
from embcache.results.decisions import Value
from embcache.results.describe import Described, describe
from embcache.runs.folders import find_run_anywhere


def show_run(
    run: str, *, metrics: Sequence[str], positive: str | None, adjust: Adjust, home: Path | None, json: str | None
) -> None:
    """Print one run in full, or write it as JSON."""
    found = describe(*find_run_anywhere(run, home), metrics=metrics, positive=positive, adjust=adjust)
    if json:
        write_json(found.to_json(), json)
    if json != "-":
        _print(found)


def _print(found: Described) -> None:
    result = found.result
    models = sum(not fold.failed for fold in result.folds)
    counts = ", ".join(f"{n:,} {name}" for n, name in zip(result.test_counts, result.class_names, strict=False))
    target = f", column {result.target}" if result.target else ""
    for line in (
        f"{result.id}: {' + '.join(result.backbones)}, {result.head} ({result.kind}) on {result.dataset}{target}",
        f"subset {result.subset}: {result.n_train:,} training + {result.n_val:,} validation = {result.labels_used:,} "
        f"labels per fold; {models} models",
        f"test set: {result.test_set}, {result.n_test:,} images" + (f" ({counts})" if counts else ""),
        *([f"positive class: {result.positive}"] if result.positive else []),
    ):
        echo(line)
    if found.scores:
        _print_scores(found)
    if found.operating_points:
        _print_operating_points(found)
    if found.calibration:
        _print_calibration(found)
    if found.confusion:
        echo("\nConfusion matrix of the ensemble: true classes in rows, predicted classes in columns")
        rows = [[name, *map(str, row)] for name, row in zip(result.class_names, found.confusion, strict=True)]
        print_table(["", *result.class_names], rows)
    echo("")
    for note in [*found.notes, *result.notes, *([INTERVALS] if found.scores else [])]:
        echo(f"· {note}")


def _print_scores(found: Described) -> None:
    rows = []
    for key, estimates in found.scores.items():
        for name, e in estimates.items():
            title = "" if name else metric_title(key, e.positive)
            first, second = bounds(e.these_models), bounds(e.new_model)
            alone = "not known of one model" if e.why == "one model" else e.why
            missing = [e.why, ""] if not first else [first, second or alone]
            rows.append([title, name or "mean of the models", spread(e.mean, e.std), *missing])
        if key == "accuracy" and found.result.majority is not None:
            rows.append(["", f"always {found.result.majority[0]}", f"{found.result.majority[1]:.4f}", "", ""])
    echo("\nScores with 95 % intervals")
    print_table(["", "", "mean ± sd", "new patients, these models", "new patients, a newly trained model"], rows)


def _print_operating_points(found: Described) -> None:
    rows = []
    for point in found.operating_points:
        ends = dict.fromkeys(map(_probability, (min(point.thresholds), max(point.thresholds))))
        values = (point.sensitivity, point.specificity, point.ppv, point.npv)
        rows.append([point.rule, point.models, " – ".join(ends), *map(_value, values)])
    echo(
        f"\nOperating points: thresholds on P({found.result.positive}) chosen on validation images, rates on the test "
        "set"
    )
    chosen = dict.fromkeys(f"{p.models}: {p.chosen_on}" for p in found.operating_points if p.chosen_on)
    print_table(["", "", "threshold", "sensitivity", "specificity", "PPV", "NPV"], rows, notes=list(chosen))


def _print_calibration(found: Described) -> None:
    echo(f"\nCalibration of P({found.result.positive})")
    rows = [
        [c.models, _value(c.intercept), _value(c.slope), _value(c.brier), f"{c.ece:.4f}"] for c in found.calibration
    ]
    print_table(["", "intercept (0)", "slope (1)", "Brier score", "calibration error"], rows, notes=[
        "intercept and slope: intervals for new patients and these models",
        "calibration error: root mean square over the bins, debiased (Kumar, Liang and Ma 2019)",
    ])  # fmt: skip
    last = found.calibration[-1]
    echo(f"\nReliability of the {last.models.removeprefix('mean of the ')}")
    bins = [
        [f"{b.low:.4f} – {b.high:.4f}", f"{b.predicted:.4f}", f"{b.observed:.4f}", f"{b.images:,}", f"{b.positives:,}"]
        for b in last.bins
    ]
    print_table([f"P({found.result.positive})", "mean", "observed", "images", found.result.positive], bins)


def _probability(p: float) -> str:
    return f"{p:.4f}" if 1e-4 <= p <= 1 - 1e-4 else f"{p:.1e}" if p < 0.5 else f"1 − {1 - p:.1e}"


def _value(v: Value) -> str:
    if v.value is None:
        return v.why or "–"
    return f"{v.value:.4f}" + (f" ({bounds(v.interval)})" if v.interval else "")
