"""The section of a task: tables and charts as plain data, which the template lays out.

The best model is chosen on validation; the test set only says how good it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embcache.config import DatasetRef
from embcache.errors import EmbcacheError
from embcache.log import log
from embcache.probe.metrics import confusion, find_metric, is_loss, metric_title, per_class_auc
from embcache.probe.statistics import RESAMPLES
from embcache.probe.summary import load_validation, training_notes
from embcache.report.charts import SHOWN, Chart, Series, learning_curves, line_chart, paper_table
from embcache.report.collect import Choice, Part, Rival, Task, hidden_columns, secret_words, shown_columns
from embcache.results.advice import BackboneAdvice, advise_curve
from embcache.results.compare import INTERVALS, SPEAKS_OF, Difference, Tested, subgroups
from embcache.results.curves import curve_table
from embcache.results.decisions import GRID, Value, against_rest, calibration, mean_curve, operating_points
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
        "charts": [curves, *(chart for size in sizes for chart in (size["roc"], size["decided"]["chart"]))],
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
    positive = best.result.positive if find_metric(metric, len(names)).asymmetric and len(names) == 2 else ""
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
    counts = confusion(best.tested.labels, best.tested.predictions.ensemble().logits[0])
    return {
        "title": size_words(choice),
        "choice": choice,
        "remarks": training_notes(best.result),
        "ranking": _ranking(task, choice),
        "ways": _ways(task, best),
        "others": _others(task, best),
        "roc": _roc(task, choice, f"{id}-roc"),
        "decided": decide(best.tested, part.run_folder(best.result), f"{id}-calibration"),
        # One row per true class: its name, and count and share of each predicted class.
        "confusion": [
            (name, [(f"{n:,}", n / max(1, int(line.sum()))) for n in line.tolist()])
            for name, line in zip(best.result.class_names, counts, strict=True)
        ],
        "classes": class_table(best.tested, best.name),
        "notes": notes,
        "chosen": best.name,
        "positive": task.class_names[best.tested.predictions.positive] if len(task.class_names) == 2 else "",
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
    mean = "by patient: the mean of the probabilities of a patient's images"
    notes = [f"not by patient: {why}" if why is not None else mean] if result.by_group else []
    return _table("ways", f"{best.name}: as a mean of models, and as what predict uses", rows, notes)


def _others(task: Task, best: Rival) -> Table:
    """The chosen model by other metrics; each score with the interval that tables show."""
    predictions, why = best.tested.predictions, dict[str, None]()
    ways = {"mean of models": predictions}
    if len(predictions.logits) > 1:
        ways[_ENSEMBLE] = predictions.ensemble()
    if "groups" in best.result.by_group:
        ways["by patient, ensemble"] = predictions.by_group().ensemble()
    usual = [{"auc": "macro_auc"}.get(m, m) if len(task.class_names) > 2 else m for m in _OTHERS]
    rows = [
        {"metric": _header(best, m), **{name: _estimated(p.estimate(m), why) for name, p in ways.items()}}
        for m in task.others or usual
        if m != task.metric
    ]
    notes = ("accuracy, F1 and MCC of the most probable class", INTERVALS, *why)
    return _table("others", f"{best.name} by other metrics", rows, notes)


def _roc(task: Task, choice: Choice, id: str) -> Chart:
    """Of two classes the curves of models; of more those of the chosen model's classes, one against all others."""
    best = choice.chosen
    if len(task.class_names) == 2:
        lines = [(r.name, r, best.tested.predictions.positive) for r in choice.rivals]
        alt = f"ROC curves of {len(lines)} models, mean over folds; the legend has the AUCs."
    else:
        lines = [(name, best, c) for c, name in enumerate(task.class_names) if (best.tested.labels == c).any()]
        alt = "ROC curves of the classes under the best model, each against all others; the legend has the AUCs."
    series = []
    for place, (name, rival, of_class) in enumerate(lines):
        mean, sd = mean_curve(rival.tested.labels, rival.tested.predictions.logits, of_class)
        aucs = [f.metrics["per_class_auc"][of_class] for f in rival.result.folds if f.metrics]
        parts = GRID, mean, (mean - sd).clip(0, 1), (mean + sd).clip(0, 1)
        x, y, low, high = (np.round(values, 5).tolist() for values in parts)
        label = f"{name} (AUC {sum(aucs) / len(aucs):.3f})"
        series.append(Series(label, x, y, low, high, points=False, shown=place < SHOWN))
    axes = ("false positive rate", "true positive rate")
    return line_chart(id, series, alt=alt, axes=axes, square=True, digits=(2, 3))


def decide(t: Tested, run: Path, id: str) -> dict[str, Any]:
    """Operating points and calibration of one result; ``run`` is its folder, ``id`` that of the chart."""
    names, positive, why = t.result.class_names, t.predictions.positive, dict[str, None]()
    of = [positive]
    if len(names) > 2:
        counts = np.bincount(t.labels, minlength=len(names))
        of = sorted(np.argsort(-counts, kind="stable")[:_MOST_CLASSES].tolist())
        of = [c for c in of if 0 < counts[c] < len(t.labels)]
    found = {names[c]: calibration(against_rest(t.predictions, c)) for c in of}
    bins = {name: each[-1].bins for name, each in found.items()}
    series = [
        Series(name, [round(b.predicted, 4) for b in own], [round(b.observed, 4) for b in own],
               counts=[b.images for b in own])
        for name, own in bins.items()
    ]  # fmt: skip
    alt = "Reliability curves: the share of images of a class over its mean probability, in bins; on the diagonal "
    axes = ("mean probability", "share observed")
    chart = line_chart(id, series, axes=axes, square=True, digits=(3, 3), alt=alt + "probabilities are right.")
    rows = [
        {"probability": f"P({name})", "from – to": f"{b.low:.3f} to {b.high:.3f}", "mean": f"{b.predicted:.3f}",
         "share observed": f"{b.observed:.3f}", "images": f"{b.images:,}", "of the class": f"{b.positives:,}"}
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
    return {
        "points": _points(t, run, positive) if len(names) == 2 or t.result.positive else None,
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


def _subgroups(task: Task, part: Part, choices: Sequence[Choice], ids: bool, ref: DatasetRef) -> Table | None:
    if part.dataset is None or not choices:
        return None
    best, notes = choices[-1].chosen, hidden_columns(part.dataset)
    names = [c.name for c in shown_columns(part.dataset, secret_words(part, ids=ids)) if len(c.values) > 1]
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
