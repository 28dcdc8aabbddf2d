"""The section of a task: tables and charts as plain data, which the template lays out.

The best model is chosen on validation; the test set only says how good it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embcache.config import DatasetRef
from embcache.data.groups import hash_order
from embcache.errors import EmbcacheError
from embcache.log import log
from embcache.probe.metrics import confusion, find_metric, has_order, is_loss, metric_title, per_class_auc
from embcache.probe.predictions import Predictions, group_ensemble
from embcache.probe.statistics import RESAMPLES
from embcache.probe.summary import load_validation, training_notes
from embcache.report.charts import SHOWN, Chart, Series, learning_curves, line_chart, paper_table
from embcache.report.collect import Choice, Part, Rival, Task, hidden_columns, secret_words, shown_columns
from embcache.results.advice import BackboneAdvice, advise_curve
from embcache.results.compare import INTERVALS, SPEAKS_OF, Difference, Tested, subgroups
from embcache.results.curves import curve_table
from embcache.results.decisions import (
    GRID,
    Value,
    against_rest,
    agreement_of,
    calibration,
    mean_curve,
    operating_points,
)
from embcache.results.layout import Table, bounds, score, signed
from embcache.runs.result import Estimate

NEW_MODEL = "new patients, a newly trained model"
THESE_MODELS = "new patients, these models"
_NEW, _THESE = f"95 %: {NEW_MODEL}", f"95 %: {THESE_MODELS}"
_ENSEMBLE = "ensemble, which predict uses"
_MOST_COLUMNS = 8  # of a dataset's table that make subgroups
_MOST_CLASSES = 6  # of more than two whose calibration is shown: those of most test images
_OTHERS = ("auc", "accuracy", "balanced_accuracy", "auprc", "f1", "mcc", "brier", "log_loss")
"""Metrics of the chosen model in addition to the one that chose it, where no others are named."""
_GRADES = ("kappa", "mae")
_MOST_POINTS = 5_000  # of a chart of numbers

Picture = tuple[Chart, str]  # with its caption


def task_section(
    task: Task, part: Part, choices: Sequence[Choice], id: str, *, ids: bool = True, ref: DatasetRef | None = None
) -> dict[str, Any]:
    """All that the template shows of a task: the sizes with the most labels first."""
    several = (c for c in reversed(choices) if len({rival.result.backbones for rival in c.rivals}) > 1)
    advice = next((choice.advice for choice in several), None)
    labels, _ = advise_curve(task.models, advice, part.home, RESAMPLES)
    sizes = []
    for place, choice in reversed([*enumerate(choices)]):
        log.info(f"{task.title}: {size_words(choice)}")
        sizes.append(_size(task, part, choice, f"{id}-{place}") | {"place": len(choices) - 1 - place})
    curves = learning_curves(task, part, f"{id}-curves")
    return {
        "task": task,
        "id": id,
        "choices": choices,
        "headline": headline(task, choices, advice),
        # Which backbone to take is the headline.
        "advice": [labels.text] if labels is not None and len(labels.sizes) > 1 else [],
        "curves": curves,
        "numbers": curve_table(task.results),
        "paper": paper_table(task, part),
        "sizes": sizes,
        "subgroups": _subgroups(task, part, choices, ids, ref or DatasetRef()),
        "charts": [curves, *(chart for size in sizes for chart, _ in size["pictures"])],
    }


def headline(task: Task, choices: Sequence[Choice], advice: BackboneAdvice | None) -> str:
    """One sentence: which backbone to take, or what the only one reaches, at the most labels that allow it."""
    title = task.title + (" (synthetic images)" if any(result.synthetic for result in task.results) else "")
    if not choices:
        return f"{title}: no results that can be ranked."
    if advice is not None:
        return f"{title}: {advice.text}"
    last, e = choices[-1], choices[-1].chosen.row.estimate
    best = " is best on validation and" if len(last.rivals) > 1 else ""
    which = THESE_MODELS if e.new_model is None else NEW_MODEL
    interval = f" ({bounds(e.interval)}: {which})" if e.interval is not None else f" ({e.why})" * bool(e.why)
    return (
        f"{title}: {last.chosen.name}{best} reaches a test {metric_title(task.metric, e.positive)} of "
        f"{signed(e.mean, 3)} with {last.n_train:,} training labels{interval}."
    )


def size_words(choice: Choice) -> str:
    """``S: 50 training labels (1,093 with validation)``."""
    name = "" if choice.subset.isdigit() else f"{choice.subset}: "
    return f"{name}{choice.n_train:,} training labels ({choice.labels_used:,} with validation)"


def change_words(d: Difference | None, loss: bool) -> str:
    """The difference between two sizes: ``+0.033 (−0.010 to +0.076): no gain shown``."""
    if d is None:
        return ""
    if d.interval is None:
        return f"{signed(d.difference, 3, plus=True)}: {d.why}"
    low, high = (-d.interval[1], -d.interval[0]) if loss else d.interval
    verdict = "better" if low > 0 else "worse" if high < 0 else "no gain shown"
    these = "" if d.trained else ", these models"
    return f"{signed(d.difference, 3, plus=True)} ({bounds(d.interval, plus=True)}{these}): {verdict}"


def p_words(p: float | None) -> str:
    """``0.012``, or ``< 0.001``; nothing of none."""
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _table(name: str, title: str, rows: Sequence[Mapping[str, str]], notes: Sequence[str] = ()) -> Table:
    """A table from rows that map headers to cells, all the same."""
    return Table(name, title, tuple(rows[0]) if rows else ("",), tuple(tuple(r.values()) for r in rows), tuple(notes))


def _intervals(e: Estimate) -> dict[str, str]:
    return {_NEW: bounds(e.new_model) or "–", _THESE: bounds(e.these_models) or "–"}


def _bounded(text: str, interval: tuple[float, float] | None, why: str, reasons: dict[str, None]) -> str:
    """A score with its interval behind it; why there is none goes into ``reasons``, for the notes of the table."""
    if interval is None and why:
        reasons[f"no interval: {why}"] = None
    return text if interval is None else f"{text} ({bounds(interval)})"


def _estimated(e: Estimate | None, reasons: dict[str, None]) -> str:
    if e is None:
        return ""
    return _bounded(score(e.mean, e.std) if math.isfinite(e.mean) else "–", e.interval, e.why, reasons)


def _value(v: Value, why: dict[str, None]) -> str:
    if v.value is None:
        why |= {f"no value: {v.why}": None} if v.why else {}
        return "–"
    return _bounded(signed(v.value, 3), v.interval, v.why, why)


def _header(best: Rival, metric: str) -> str:
    """The metric, of which class, and for accuracy what always predicting the commonest class would reach."""
    majority = best.result.majority if metric == "accuracy" else None
    names = best.result.class_names
    positive = best.result.positive if find_metric(metric, best.result.task).asymmetric and len(names) == 2 else ""
    return metric_title(metric, positive) + ("" if majority is None else f" (always {majority[0]}: {majority[1]:.3f})")


def summary_table(sections: Sequence[dict[str, Any]]) -> Table:
    """The first table of the page: one row per size, what is best on validation, its test score and intervals."""
    chosen = [(section["task"], choice) for section in sections for choice in section["choices"]]
    titles = list(dict.fromkeys(_header(choice.chosen, task.metric) for task, choice in chosen))
    change = "change: of the same model's expected test score from the size before, with its 95 % interval"
    rows, notes = [], {change: None}
    for task, choice in chosen:
        best, e = choice.chosen, choice.chosen.row.estimate
        why = [e.why] if e.new_model is None and e.why else []
        notes |= dict.fromkeys(f"{choice.n_train:,} labels: {note}" for note in (*why, *training_notes(best.result)))
        dataset = {"dataset": f"{task.title} ({metric_title(task.metric)})"} if len(sections) > 1 else {}
        loss, validation = is_loss(task.metric), choice.labels_used - choice.n_train
        rows.append({
            **dataset, "training labels (+ validation)": f"{choice.n_train:,} (+ {validation:,})",
            "best on validation": best.name,
            f"test {titles[0] if len(titles) == 1 else 'score'}, mean ± sd over folds": score(e.mean, e.std),
            **_intervals(e), _ENSEMBLE: _estimated(best.result.estimates.get("ensemble"), {}),
            "change from the size before": change_words(choice.change, loss),
        })  # fmt: skip
    return _table("summary", "Best on validation at each number of labels", rows, [*notes])


def _size(task: Task, part: Part, choice: Choice, id: str) -> dict[str, Any]:
    best = choice.chosen
    notes = [f"{rival.name}: {note}" for rival in choice.rivals[1:] for note in training_notes(rival.result)]
    if choice.apart:
        apart = "; ".join(choice.apart)
        notes.append(f"Not ranked here, because trained, validated or tested on other images: {apart}.")
    notes += [f"Left out: {problem}." for problem in choice.problems]
    made: dict[str, Any] = {"decided": {}, "confusion": []}
    if task.of.kind == "number":
        made |= {"pictures": _number_charts(best, id), "classes": None}
    else:
        decided = decide(best.tested, part.run_folder(best.result), f"{id}-calibration")
        caption = f"Calibration of the ensemble of {best.name}: share observed over mean probability, in bins of equal "
        caption += "numbers of images; the tooltip and the bins below have the numbers."
        table = finding_table if task.of.kind == "findings" else class_table
        made |= {"pictures": [_roc(task, choice, f"{id}-roc"), (decided["chart"], caption)], "decided": decided}
        made["classes"] = table(best.tested, best.name)
    if task.of.kind not in ("findings", "number"):
        counts = confusion(best.tested.labels, best.tested.predictions.ensemble().logits[0])
        # One row per true class: its name, and count and share of each predicted class.
        made["confusion"] = [
            (name, [(f"{n:,}", n / max(1, int(line.sum()))) for n in line.tolist()])
            for name, line in zip(best.result.class_names, counts, strict=True)
        ]
    return made | {
        "title": size_words(choice),
        "choice": choice,
        "remarks": training_notes(best.result),
        "ranking": _ranking(task, choice),
        "ways": _ways(task, best),
        "others": _others(task, best),
        "notes": notes,
        "chosen": best.name,
    }


def _ranking(task: Task, choice: Choice) -> Table:
    """One row per model: its scores, and how far it is from the chosen one."""
    best, rows, reasons = choice.chosen, [], dict[str, None]()
    metric = metric_title(task.metric, best.row.estimate.positive)
    differences = [r.row.difference for r in choice.rivals if r.row.difference is not None]
    for r in choice.rivals:
        row, d = {"model": r.name, f"validation {metric}": signed(r.validated, 3)}, r.row.difference
        row |= {f"test {_header(best, task.metric)}": score(r.row.mean, r.row.std), **_intervals(r.row.estimate)}
        row[_ENSEMBLE] = _estimated(r.result.estimates.get("ensemble"), {})
        if differences:
            row |= {
                "difference": "" if d is None else signed(d.difference, 3, plus=True),
                "its 95 % interval": "" if d is None else bounds(d.interval, plus=True) or d.why,
                "p (Holm)": p_words(r.row.p_holm),
                "detectable": "" if d is None or d.smallest is None else f"{d.smallest:.3f}",
            }
        rows.append(
            row | {_header(best, m): _estimated(r.tested.predictions.estimate(m), reasons) for m in task.others}
        )
    notes = ["in the order of the validation score, which alone chooses"]
    if differences:
        which = sorted({d.trained for d in differences})
        notes.append("differences are from the first row; " + "; ".join(SPEAKS_OF[trained] for trained in which))
        notes.append("detectable: the smallest difference that would have been found, with 80 % power at p < 0.05")
    why = dict.fromkeys(r.row.estimate.why for r in choice.rivals if r.row.estimate.why) | reasons
    return _table("ranking", f"Models at {size_words(choice)}", rows, [*notes, *why])


def _ways(task: Task, best: Rival) -> Table:
    """The chosen model in four ways: mean over folds and ensemble, by image and by patient."""
    result, models = best.result, len(best.tested.predictions.logits)
    rows = []
    for name, e in result.estimates.items():
        one, by = name.endswith("ensemble"), "by patient" if name.startswith("by patient") else "by image"
        if models > 1 or not one:
            number = (
                f"{result.by_group.get('groups', 0):,} patients" if by == "by patient" else f"{result.n_test:,} images"
            )
            rows.append({
                "scored": f"{by}, " + ("ensemble: what predict uses" if one else f"mean of {models} models"),
                "on": number, f"test {_header(best, task.metric)}": score(e.mean, e.std),
                _NEW: bounds(e.new_model) or "–", _THESE: bounds(e.these_models) or e.why,
            })  # fmt: skip
    why = result.by_group.get("why")
    mean, mixed = f"by patient: {task.of.group_words}", result.by_group.get("mixed", 0)
    mean += f"; {mixed:,} with images of several classes left out" if mixed else ""
    notes = [f"not by patient: {why}" if why is not None else mean] if result.by_group else []
    return _table("ways", f"{best.name}: as a mean of models, and as what predict uses", rows, notes)


def _others(task: Task, best: Rival) -> Table:
    """The chosen model by other metrics; each score with the interval that tables show."""
    predictions, why = best.tested.predictions, dict[str, None]()
    ways = {"mean of models": predictions}
    if len(predictions.logits) > 1:
        ways[_ENSEMBLE] = predictions.ensemble()
    if "groups" in best.result.by_group:
        ways["by patient, ensemble"] = group_ensemble(predictions)
    usual = [{"auc": "macro_auc"}.get(m, m) if len(task.class_names) > 2 else m for m in _OTHERS]
    if len(usual) > 2 and len(task.class_names) > 2 and has_order(task.class_names):
        usual = [*_GRADES, *usual]
    known = best.result.baseline
    rows = []
    for m in task.others or task.of.metrics or usual:
        if m == task.metric and m not in known:
            continue
        row = {"metric": _header(best, m), **{name: _estimated(p.estimate(m), why) for name, p in ways.items()}}
        if known:
            value = known.get(m)
            row["without features"] = "–" if value is None else signed(value, 3)
        rows.append(row)
    first = {
        "number": "without features: the mean of the training images, always",
        "findings": "means over findings, micro: all values as one set; F1 and balanced accuracy at P > 0.5; "
        "without features: the shares in training",
    }.get(task.of.kind, "accuracy, F1 and MCC of the most probable class")
    grades = ["MAE: of the most probable grade, in grades"] * any(row["metric"] == "MAE" for row in rows)
    notes = (first, *(grades if task.of.kind != "number" else ()), INTERVALS, *why)
    return _table("others", f"{best.name} by other metrics", rows, notes)


def _roc(task: Task, choice: Choice, id: str) -> Picture:
    """Of two classes the curves of models; of more those of the chosen model's classes, or findings, each by itself."""
    best = choice.chosen
    predictions, name = best.tested.predictions, best.name
    lines: list[tuple[str, Rival, int, Predictions, int]] = []  # name, model, number, models and class of the curve
    if task.of.kind == "findings":
        for c, finding in enumerate(task.class_names):
            if c not in task.of.absent(best.tested.labels):
                lines.append((finding, best, c, predictions.finding(finding), 1))
        alt = "ROC curves of the findings under the best model; the legend has the AUCs."
        caption = f"ROC curves of {name}, each finding on the images of which it is known, mean over folds"
    elif len(task.class_names) == 2:
        c = predictions.positive
        lines = [(r.name, r, c, r.tested.predictions, c) for r in choice.rivals]
        alt = f"ROC curves of {len(lines)} models, mean over folds; the legend has the AUCs."
        caption = f"ROC curves of P({task.class_names[c]}), each model’s mean over folds"
    else:
        there = [c for c in range(len(task.class_names)) if (best.tested.labels == c).any()]
        lines = [(task.class_names[c], best, c, predictions, c) for c in there]
        alt = "ROC curves of the classes under the best model, each against all others; the legend has the AUCs."
        caption = f"ROC curves of {name}, each class against the rest, mean over folds"
    series = []
    for place, (name, rival, of_class, models, c) in enumerate(lines):
        mean, sd = mean_curve(models.labels, models.logits, c)
        aucs = [f.metrics["per_class_auc"][of_class] for f in rival.result.folds if f.metrics]
        parts = GRID, mean, (mean - sd).clip(0, 1), (mean + sd).clip(0, 1)
        x, y, low, high = (np.round(values, 5).tolist() for values in parts)
        label = f"{name} (AUC {sum(aucs) / len(aucs):.3f})"
        series.append(Series(label, x, y, low, high, points=False, shown=place < SHOWN))
    axes = ("false positive rate", "true positive rate")
    chart = line_chart(id, series, alt=alt, axes=axes, square=True, digits=(2, 3))
    return chart, f"{caption}; bands are ± one standard deviation over folds."


def _number_charts(best: Rival, id: str) -> list[Picture]:
    """Predicted over true numbers, and errors over predictions, of the chosen model's ensemble."""
    one = best.tested.predictions.ensemble()
    name, y, predicted = one.class_names[0], one.labels, one.p[0, :, 0]
    mean, low, high = agreement_of(predicted - y)
    spread = float(np.ptp(np.concatenate([y, predicted]))) or 1.0
    places = min(6, max(0, 3 - math.floor(math.log10(spread))))
    kept = np.arange(len(y))
    if len(y) > _MOST_POINTS:
        kept = np.sort(hash_order(0, "report", one.ids.tolist())[:_MOST_POINTS])
    words = f" {len(kept):,} of {len(y):,} test images, drawn at random." if len(kept) < len(y) else ""

    def points(*of: NDArray[np.float64]) -> Series:
        x, z = (np.round(values[kept], places + 2).tolist() for values in of)
        return Series("test images", x, z, line=False)

    def level(label: str, ends: Sequence[float], at: Sequence[float]) -> Series:
        return Series(label, list(ends), list(at), points=False, dashed=label != "mean")

    true = [float(min(y.min(), predicted.min())), float(max(y.max(), predicted.max()))]
    ends = [float(predicted.min()), float(predicted.max())]
    scatter = [points(y, predicted), level("identity", true, true)]
    lines = [("mean", mean), ("mean − 1.96 sd", low), ("mean + 1.96 sd", high)]
    errors = [points(predicted, predicted - y), *(level(label, ends, [at, at]) for label, at in lines)]
    shown = f"of {len(kept):,} test images"
    limits = f"{signed(low, places)} to {signed(high, places)} (mean ± 1.96 sd, Bland and Altman)"
    charts = [
        line_chart(f"{id}-scatter", scatter, axes=("true", "predicted"), digits=(places, places),
                   alt=f"Predicted over true numbers {shown}; on the identity they are right."),
        line_chart(f"{id}-residual", errors, axes=("predicted", "error"), digits=(places, places),
                   alt=f"Errors over predictions {shown}, with their mean and limits of agreement."),
    ]  # fmt: skip
    captions = [
        f"{name}: predicted by the ensemble of {best.name} over true; on the line they are equal.{words}",
        "Error, predicted − true, over predicted. Lines: the mean error of "
        f"{signed(mean, places, plus=True)} and the limits of agreement, {limits}.",
    ]
    return [*zip(charts, captions, strict=True)]


def decide(t: Tested, run: Path, id: str) -> dict[str, Any]:
    """Operating points and calibration of one result; ``run`` is its folder, ``id`` that of the chart."""
    names, positive, why, task = t.result.class_names, t.predictions.positive, dict[str, None](), t.predictions.task
    of, findings = [positive], task.kind == "findings"
    if len(names) > 2 or findings:
        counts, absent = np.array(task.counts(t.labels)), task.absent(t.labels)
        of = sorted(np.argsort(-counts, kind="stable")[:_MOST_CLASSES].tolist())
        of = [c for c in of if c not in absent and (findings or counts[c] < len(t.labels))]
    two = {names[c]: t.predictions.finding(names[c]) if findings else against_rest(t.predictions, c) for c in of}
    found = {name: calibration(one) for name, one in two.items()}
    bins = {name: each[-1].bins for name, each in found.items()}
    series = [
        Series(name, [round(b.predicted, 4) for b in own], [round(b.observed, 4) for b in own],
               counts=[b.images for b in own])
        for name, own in bins.items()
    ]  # fmt: skip
    with_it = "with a finding" if findings else "of a class"
    alt = f"Reliability curves: the share of images {with_it} over its mean probability; on the diagonal "
    axes = ("mean probability", "share observed")
    chart = line_chart(id, series, axes=axes, square=True, digits=(3, 3), alt=alt + "probabilities are right.")
    rows = [
        {"probability": f"P({name})", "from – to": f"{b.low:.3f} to {b.high:.3f}", "mean": f"{b.predicted:.3f}",
         "share observed": f"{b.observed:.3f}", "images": f"{b.images:,}",
         "with it" if findings else "of the class": f"{b.positives:,}"}
        for name, own in bins.items() for b in own
    ]  # fmt: skip
    calibrated = [
        {"probability": f"P({name})", "of": c.models, "intercept": _value(c.intercept, why),
         "slope": _value(c.slope, why), "Brier score": _value(c.brier, why), "ECE, debiased": f"{c.ece:.3f}"}
        for name, each in found.items() for c in (each if len(found) == 1 else each[-1:])
    ]  # fmt: skip
    notes = (
        "intercept: 0 is right, below 0 probabilities are too high; slope: 1 is right, below 1 they are too extreme",
        "ECE: root mean square over bins of the gap to the share observed, less what chance adds",
        "intercept and slope: 95 % intervals for new patients, these models",
        *why,
    )
    if findings and len(of) < len(names):
        notes = (f"the {len(of)} findings of most test images", *notes)
    one_positive = not findings and (len(names) == 2 or t.result.positive)
    return {
        "points": _points(t, run, positive) if one_positive else None,
        "calibration": _table("calibration", "Calibration", calibrated, notes),
        "bins": _table("bins", "Bins of the reliability curve", rows),
        "chart": chart,
    }


def _points(t: Tested, run: Path, positive: int) -> Table:
    try:
        held = [against_rest(v, positive) for v in load_validation(t.result, run)]
        points = operating_points(against_rest(t.predictions, positive), held)
    except EmbcacheError as error:
        return Table("points", "Operating points", ("",), (), (f"not made: {error.problem}",))
    name, why, rows = t.result.class_names[positive], dict[str, None](), []
    for p in points:
        ends = dict.fromkeys(f"{end:.3f}" for end in (min(p.thresholds), max(p.thresholds)))
        values = {"sensitivity": p.sensitivity, "specificity": p.specificity, "PPV": p.ppv, "NPV": p.npv}
        words = {"rule": p.rule, "of": p.models, f"P({name}) above": " to ".join(ends)}
        rows.append(words | {rate: _value(v, why) for rate, v in values.items()})
    chosen = {p.models: p.chosen_on for p in points if p.chosen_on}
    notes = [f"{models}: threshold from {on.removeprefix('threshold from ')}" for models, on in chosen.items()]
    notes += ["predictive values are at the prevalence of the test set", f"positive: {name}; {INTERVALS}", *why]
    return _table("points", f"Operating points of P({name})", rows, notes)


def class_table(t: Tested, model: str) -> Table:
    """Scores of every class of a result, one against all others, mean over fold models."""

    def mean(values: Sequence[float]) -> str:
        return f"{np.mean(values):.3f}" if values else "–"

    aucs, rows = [per_class_auc(t.labels, z) for z in t.predictions.logits], []
    predicted = t.predictions.logits.argmax(2)  # (K, n)
    for c, name in enumerate(t.result.class_names):
        own = t.labels == c
        values = [float(value) for auc in aucs if (value := auc[c]) is not None]
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        rows.append({
            "class": name, "test images": f"{own.sum():,}", "patients": f"{len(set(t.groups[own])):,}",
            "AUC against the rest": score(float(np.mean(values)), std) if values else "–",
            "sensitivity": mean([float((q[own] == c).mean()) for q in predicted] if own.any() else []),
            "PPV": mean([float(own[q == c].mean()) for q in predicted if (q == c).any()]),
        })  # fmt: skip
    note = "means over fold models; sensitivity and PPV of the most probable class"
    return _table("classes", f"Classes under {model}", rows, [note])


def finding_table(t: Tested, model: str) -> Table:
    """Scores of every finding of a result, on the test images of which it is known; means over fold models."""
    rows, absent = [], t.predictions.task.absent(t.labels)
    for c, name in enumerate(t.result.class_names):
        two = t.predictions.finding(name)
        own = two.labels == 1
        row = {"finding": name, "test images": f"{len(own):,}", "with it": f"{own.sum():,}",
               "patients with it": f"{len(set(two.groups[own])):,}"}  # fmt: skip
        for metric in ("auc", "auprc"):
            title, value = metric_title(metric), "–"
            if c not in absent:
                e = two.estimate(metric)
                words = f" ({e.why})" if e.interval is None and e.why else ""
                value = _estimated(e, {}) + words
            row[title] = value
        rows.append(row)
    lacking = ", ".join(t.result.class_names[c] for c in absent)
    notes = [f"no test images with, or none without: {lacking}"] if absent else []
    notes = ["mean ± sd over fold models", INTERVALS, *notes]
    return _table("classes", f"Findings under {model}", rows, notes)


def _subgroups(task: Task, part: Part, choices: Sequence[Choice], ids: bool, ref: DatasetRef) -> Table | None:
    if part.dataset is None or not choices:
        return None
    best, notes = choices[-1].chosen, hidden_columns(part.dataset)
    shown, own = shown_columns(part.dataset, secret_words(part, ids=ids)), best.result.target.split(", ")
    names = [c.name for c in shown if len(c.values) > 1 and c.name not in own]
    if not names:
        return None
    if len(names) > _MOST_COLUMNS:
        notes.append("not shown: " + ", ".join(names[_MOST_COLUMNS:]))
    how: dict[str, Any] = {"metrics": [task.metric], "home": part.home, "ref": ref}
    try:
        scored, remarks = subgroups([best.result.id], names[:_MOST_COLUMNS], **how)
    except EmbcacheError as error:
        return Table("subgroups", "Subgroups", ("",), (), (f"not made: {error.problem}",))
    metric = metric_title(task.metric, best.row.estimate.positive)
    rows = [
        {"column": s.column or "all", "value": s.value, "images": f"{s.n_images:,}", "patients": f"{s.n_groups:,}",
         f"test {metric}": f"no {', '.join(s.lacks)}" if s.mean is None else score(s.mean, s.std),
         "95 % interval": bounds(s.interval) or s.why}
        for s in scored
    ]  # fmt: skip
    notes += [note for note in remarks if note not in best.result.left_out] + [INTERVALS]
    return _table("subgroups", f"Subgroups of the test set under {best.name}, {size_words(choices[-1])}", rows, notes)
