"""``embcache results RUN``: everything that one run's saved predictions tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from embcache.commands.options import plain, write_json
from embcache.commands.output import echo
from embcache.commands.table import bounds, print_table, spread
from embcache.errors import StoreError
from embcache.probe.metrics import confusion, find_metric, metric_title, positive_class
from embcache.probe.predictions import Predictions, all_estimates
from embcache.probe.prevalence import Adjust, Adjustment, row_weights
from embcache.probe.summary import adjust_models, load_run_predictions, load_validation
from embcache.results.compare import INTERVALS
from embcache.results.decisions import Calibration, OperatingPoint, Value, against_rest, calibration, operating_points
from embcache.runs.folders import find_run_anywhere
from embcache.runs.result import Estimate, ProbeResult

USUAL = ("auc", "kappa", "auprc", "accuracy", "balanced_accuracy", "f1", "mcc", "brier", "log_loss")
"""Scores that are shown besides the run's own; `auc` is the macro one for more than two classes."""


@dataclass(frozen=True, eq=False)
class Described:
    """What is printed of a run."""

    result: ProbeResult  # with the positive class that was asked for
    scores: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    confusion: Sequence[Sequence[int]] = ()
    prevalence: float | None = None  # of the positive class, for PPV, NPV and calibration
    operating_points: Sequence[OperatingPoint] = ()
    calibration: Sequence[Calibration] = ()
    adjustments: Sequence[Adjustment] = ()  # of each model, where another prevalence or a temperature was asked for
    notes: Sequence[str] = ()  # what a reader must know

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, every field by its name; None for what is not a number."""
        data = {name: value for name, value in vars(self).items() if name != "result"}
        return {"result": self.result.to_json(), **{name: plain(value) for name, value in data.items()}}


def describe(
    result: ProbeResult,
    folder: Path,
    *,
    metrics: Sequence[str] = (),
    positive: str | None = None,
    adjust: Adjust = Adjust(),
) -> Described:
    """Everything that is measured on a run's saved predictions; nothing is trained and the run is not changed."""
    names, chosen = result.class_names, positive or result.positive or None
    number = positive_class(names, chosen)
    has_positive = len(names) == 2 or chosen is not None
    result = replace(result, positive=names[number] if has_positive else "")
    if result.mean is None or result.kind == "kaggle":
        return Described(result, notes=["the labels of the test images are not here, so nothing can be measured"])
    test = replace(load_run_predictions(result, folder), positive=number)
    keys = dict.fromkeys(find_metric(m, len(names)).key for m in metrics or [result.metric, *USUAL])
    found = Described(
        result,
        scores={key: all_estimates(test, key) for key in keys},
        confusion=confusion(test.labels, test.ensemble().logits[0]).tolist(),
        notes=[f"no scores by patient: {result.by_group['why']}"] if "why" in result.by_group else [],
    )
    if not has_positive:
        note = "operating points and calibration are of one class against the others: --positive CLASS"
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
    two = against_rest(test, number)
    return replace(
        found,
        prevalence=float(two.labels.mean()) if prevalence is None else prevalence,
        operating_points=operating_points(two, [against_rest(v, number) for v in validation], prevalence),
        calibration=calibration(two, weights),
        adjustments=models,
        notes=[*found.notes, *_notes(two, adjust, models, names)],
    )


def show_run(
    run: str,
    *,
    metrics: Sequence[str],
    positive: str | None,
    adjust: Adjust,
    home: Path | None,
    json: str | None,
) -> None:
    """Print one run in full, or write it as JSON; ``run`` is its id or the beginning of it, the rest as `describe`."""
    result, folder = find_run_anywhere(run, home)
    found = describe(result, folder, metrics=metrics, positive=positive, adjust=adjust)
    if json:
        write_json(found.to_json(), json)
    if json != "-":
        _print(found)


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
        notes.append(f"PPV, NPV and calibration are at the prevalence {shares_in_words(models[0], names)}")
        if len(names) > 2:
            notes.append("specificity, and so PPV and NPV, take the other classes as they are in the test set")
    return notes


def shares_in_words(model: Adjustment, names: Sequence[str]) -> str:
    """``a=0.1, b=0.9``: the prevalence that probabilities are adjusted to."""
    return ", ".join(f"{name}={share:.4g}" for name, share in zip(names, model.prevalence, strict=True))


# Printing.


def _print(found: Described) -> None:
    result = found.result
    models = sum(not fold.failed for fold in result.folds)
    counts = ", ".join(f"{n:,} {name}" for n, name in zip(result.test_counts, result.class_names, strict=False))
    target = f", column {result.target}" if result.target else ""
    for line in (
        f"{result.id}: {' + '.join(result.backbones)}, {result.head} ({result.kind}) on {result.dataset}{target}",
        f"subset {result.subset}: {result.n_train:,} training + {result.n_val:,} validation = {result.labels_used:,} "
        f"labels of a fold; {models} models",
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
        _title("Confusion matrix of the ensemble: true classes in rows, predicted classes in columns")
        rows = [[name, *map(str, row)] for name, row in zip(result.class_names, found.confusion, strict=True)]
        print_table(["", *result.class_names], rows)
    echo("")
    for note in [*found.notes, *result.notes, *([INTERVALS] if found.scores else [])]:
        echo(f"· {note}")


def _title(text: str) -> None:
    echo(f"\n{text}")


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
    _title("Scores with 95 % intervals")
    print_table(["", "", "mean ± sd", "new patients, these models", "new patients, a newly trained model"], rows)


def _print_operating_points(found: Described) -> None:
    rows = []
    for point in found.operating_points:
        ends = dict.fromkeys(map(_probability, (min(point.thresholds), max(point.thresholds))))
        values = (point.sensitivity, point.specificity, point.ppv, point.npv)
        rows.append([point.rule, point.models, " – ".join(ends), *map(_value, values)])
    _title(
        f"Operating points: thresholds on P({found.result.positive}) chosen on validation images, rates on the test set"
    )
    chosen = dict.fromkeys(f"{p.models}: {p.chosen_on}" for p in found.operating_points if p.chosen_on)
    print_table(["", "", "threshold", "sensitivity", "specificity", "PPV", "NPV"], rows, notes=list(chosen))


def _print_calibration(found: Described) -> None:
    _title(f"Calibration of P({found.result.positive})")
    rows = [
        [c.models, _value(c.intercept), _value(c.slope), _value(c.brier), f"{c.ece:.4f}"] for c in found.calibration
    ]
    print_table(["", "intercept (0)", "slope (1)", "Brier score", "calibration error"], rows, notes=[
        "intercept and slope: intervals for new patients and these models",
        "calibration error: root mean square over the bins, debiased (Kumar, Liang and Ma 2019)",
    ])  # fmt: skip
    last = found.calibration[-1]
    _title(f"Reliability of the {last.models.removeprefix('mean of the ')}")
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
