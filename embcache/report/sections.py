"""The section of a task: sentences, tables and charts as plain data, which the template lays out.

The best model is chosen on validation; the test set only says how good it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embcache.config import DatasetRef
from embcache.errors import EmbcacheError
from embcache.log import log
from embcache.probe.metrics import confusion, find_metric, metric_title, metrics, per_class_auc
from embcache.probe.summary import load_validation, training_notes
from embcache.report.beside import learning_curves, paper_table
from embcache.report.charts import Chart, Series, line_chart
from embcache.report.collect import Choice, Part, Rival, Task, hidden_columns, secret_words, shown_columns
from embcache.results.advice import Advice, Contender, advise
from embcache.results.compare import INTERVALS, SPEAKS_OF, Difference, Tested, subgroups
from embcache.results.curves import curve_table
from embcache.results.decisions import (
    GRID,
    Calibration,
    OperatingPoint,
    Value,
    against_rest,
    calibration,
    mean_curve,
    operating_points,
)
from embcache.results.layout import Table, bounds, score, signed
from embcache.runs.result import Estimate

NEW_MODEL = "new patients, a newly trained model"
THESE_MODELS = "new patients, these models"
RULE = (
    "The best model is the one with the best mean validation score over folds; the test set plays no part in the "
    f"choice. Every interval is a 95 % interval. “{THESE_MODELS}” is the uncertainty of the score of the trained "
    f"models, for other patients of this kind; “{NEW_MODEL}” adds how much a model varies when it is trained again on "
    "other images, and is given where the folds show it. p is two-sided and corrected by Holm for all models compared "
    "at one size."
)
_MOST_NAMES = 4  # in a list
_MOST_LINES = 6  # of a chart that are shown at first: the best on validation; the legend shows the others
_MOST_COLUMNS = 8  # of a dataset's table that make subgroups
_MOST_CLASSES = 6  # of more than two whose calibration is shown: those of most test images
_OTHERS = ("auc", "accuracy", "balanced_accuracy", "auprc", "f1", "mcc", "brier", "log_loss")
"""Metrics of the chosen model in addition to the one that chose it, where no others are named."""


def task_section(
    task: Task, part: Part, choices: Sequence[Choice], id: str, *, ids: bool = True, ref: DatasetRef | None = None
) -> dict[str, Any]:
    """All that the template shows of a task: the sizes with the most labels first."""
    advice = next(iter(advise(task.results, home=part.home)), None)
    labels = advice.labels if advice is not None else None
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


def headline(task: Task, choices: Sequence[Choice], advice: Advice | None) -> str:
    """One sentence: which backbone to take, or what the only one reaches, at the most labels that allow it."""
    title = task.title + (" (synthetic images)" if any(result.synthetic for result in task.results) else "")
    if not choices:
        return f"{title}: no results that can be ranked."
    if advice is not None and advice.backbone is not None:
        return f"{title}: {advice.backbone.text}"
    last, e = choices[-1], choices[-1].chosen.row.estimate
    best = " is best on validation and" if len(last.rivals) > 1 else ""
    return (
        f"{title}: {last.chosen.name}{best} reaches a test {_title(task, last)} of {signed(e.mean, 3)} with "
        f"{last.n_train:,} training labels{_interval(e)}."
    )


def size_words(choice: Choice) -> str:
    """``S: 50 training labels (1,093 with validation)``."""
    name = "" if choice.subset.isdigit() else f"{choice.subset}: "
    return f"{name}{choice.n_train:,} training labels ({choice.labels_used:,} with validation)"


def sentences(task: Task, choice: Choice) -> list[str]:
    """The results of one size, as sentences of plain text."""
    metric, best, others = _title(task, choice), choice.chosen, choice.advice.rivals
    of = f"the best of {len(choice.rivals)} models on validation" if others else "the only model"
    lines = [
        f"{best.name} is {of} ({metric} {signed(best.validated, 3)}). On the test set it reaches "
        f"{score(best.row.mean, best.row.std)}{_interval(best.row.estimate)}."
    ]
    worse, better, alike, unknown = (
        [r for r in others if r.verdict == verdict] for verdict in ("worse", "better", "undecided", "unknown")
    )
    these = "" if all(r.difference.trained for r in others) else ", of these trained models"
    if worse:
        lines.append(f"It is better than {_listed(worse)} (Holm-corrected p < 0.05{these}).")
    if better:
        lines.append(
            f"{_listed(better)} scored higher on the test set (Holm-corrected p < 0.05{these}), which plays no part in "
            "the choice."
        )
    lines += [_not_shown(r.name, r.difference) for r in alike[:_MOST_NAMES]]
    if len(alike) > _MOST_NAMES:
        lines.append(f"Nor was a difference shown from {len(alike) - _MOST_NAMES} more models.")
    if unknown:
        lines.append(f"There are too few patients to compare it with {_listed(unknown)}.")
    if task.metric == "accuracy" and best.result.majority is not None:
        name, share = best.result.majority
        lines.append(f"Always predicting {name!r} has an accuracy of {share:.3f}.")
    return lines + [f"In this model, {note}." for note in training_notes(best.result)]


def _not_shown(name: str, d: Difference) -> str:
    """What may be said where no difference was shown: its interval, and which one would have been found."""
    line = f"No difference from {name} was shown{'' if d.trained else ', of these trained models'}"
    if d.interval is None:
        return f"{line}: {d.why}."
    line += f": {signed(d.difference, 3, plus=True)} ({bounds(d.interval, plus=True)})"
    if d.smallest is None:
        return line + "."
    return f"{line}; one of {d.smallest:.3f} or more would have been found with 80 % power."


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


def p_words(p: float) -> str:
    """``0.012``, or ``< 0.001``."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _title(task: Task, choice: Choice) -> str:
    return metric_title(task.metric, choice.chosen.row.estimate.positive)


def _interval(estimate: Estimate) -> str:
    if estimate.interval is None:
        return f" ({estimate.why})" if estimate.why else ""
    return f" ({bounds(estimate.interval)}: {THESE_MODELS if estimate.new_model is None else NEW_MODEL})"


def _listed(rivals: Sequence[Contender]) -> str:
    names = [r.name for r in rivals[:_MOST_NAMES]]
    return "; ".join(names) + (f"; and {len(rivals) - _MOST_NAMES} more" if len(rivals) > _MOST_NAMES else "")


def _bounded(text: str, interval: tuple[float, float] | None, why: str, reasons: dict[str, None]) -> str:
    """A score with its interval behind it; why there is none goes into ``reasons``, for the notes of the table."""
    if interval is None and why:
        reasons[f"no interval: {why}"] = None
    return text if interval is None else f"{text} ({bounds(interval)})"


def _estimated(e: Estimate, reasons: dict[str, None]) -> str:
    return _bounded(score(e.mean, e.std) if math.isfinite(e.mean) else "–", e.interval, e.why, reasons)


def _ensemble(rival: Rival) -> str:
    """The score of what predict uses, with the interval that tables show."""
    e = rival.result.estimates.get("ensemble")
    return "" if e is None else _estimated(e, {})


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
    several = len(sections) > 1
    rows, notes = [], dict[str, None]()
    for task, choice in chosen:
        best, e = choice.chosen, choice.chosen.row.estimate
        why = [e.why] if e.new_model is None and e.why else []
        notes |= dict.fromkeys(f"{choice.n_train:,} labels: {note}" for note in (*why, *training_notes(best.result)))
        rows.append(
            (
                *([f"{task.title} ({metric_title(task.metric)})"] if several else []),
                f"{choice.n_train:,} (+ {choice.labels_used - choice.n_train:,})", best.name, score(e.mean, e.std),
                bounds(e.new_model) or "–", bounds(e.these_models) or "–", _ensemble(best),
                change_words(choice.change, task.metric in metrics and metrics.get(task.metric).loss),
            )
        )  # fmt: skip
    headers = (
        *(["dataset"] if several else []), "training labels (+ validation)", "best on validation",
        f"test {titles[0] if len(titles) == 1 else 'score'}, mean ± sd over folds", f"95 %: {NEW_MODEL}",
        f"95 %: {THESE_MODELS}", "ensemble, which predict uses", "change from the size before",
    )  # fmt: skip
    change = "change: of the same model's expected test score from the size before, with its 95 % interval"
    return Table("summary", "Best on validation at each number of labels", headers, tuple(rows), (change, *notes))


def _size(task: Task, part: Part, choice: Choice, id: str) -> dict[str, Any]:
    """All that the template shows of one number of training labels."""
    best = choice.chosen
    notes = [f"{rival.name}: {note}" for rival in choice.rivals[1:] for note in training_notes(rival.result)]
    if choice.apart:
        apart = "; ".join(choice.apart)
        notes.append(f"Not ranked here, because trained, validated or tested on other images: {apart}.")
    notes += [f"Left out: {problem}." for problem in choice.problems]
    counts = confusion(best.tested.labels, best.tested.predictions.ensemble().logits[0])
    return {
        "title": size_words(choice),
        "sentences": sentences(task, choice),
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
    best, differences = choice.chosen, [r.row.difference for r in choice.rivals if r.row.difference is not None]
    metric, reasons = metric_title(task.metric, best.row.estimate.positive), dict[str, None]()
    columns: dict[str, Callable[[Rival], str]] = {
        "model": lambda r: r.name,
        f"validation {metric}": lambda r: signed(r.validated, 3),
        f"test {_header(best, task.metric)}": lambda r: score(r.row.mean, r.row.std),
        f"95 %: {NEW_MODEL}": lambda r: bounds(r.row.estimate.new_model) or "–",
        f"95 %: {THESE_MODELS}": lambda r: bounds(r.row.estimate.these_models) or "–",
        "ensemble, which predict uses": _ensemble,
    }
    notes = ["in the order of the validation score, which alone chooses"]
    if differences:

        def of(read: Callable[[Difference], str]) -> Callable[[Rival], str]:
            return lambda r: "" if r.row.difference is None else read(r.row.difference)

        columns |= {
            "difference": of(lambda d: signed(d.difference, 3, plus=True)),
            "its 95 % interval": of(lambda d: bounds(d.interval, plus=True) or d.why),
            "p (Holm)": lambda r: "" if r.row.p_holm is None else p_words(r.row.p_holm),
            "detectable": of(lambda d: "" if d.smallest is None else f"{d.smallest:.3f}"),
        }
        which = sorted({d.trained for d in differences})
        notes.append("differences are from the first row; " + "; ".join(SPEAKS_OF[trained] for trained in which))
        notes.append("detectable: the smallest difference that would have been found, with 80 % power at p < 0.05")
    for m in task.others:
        columns[_header(best, m)] = lambda r, m=m: _estimated(r.tested.predictions.estimate(m), reasons)  # type: ignore[misc]
    rows = tuple(tuple(cell(rival) for cell in columns.values()) for rival in choice.rivals)
    why = dict.fromkeys(r.row.estimate.why for r in choice.rivals if r.row.estimate.why) | reasons
    return Table("ranking", f"Models at {size_words(choice)}", tuple(columns), rows, (*notes, *why))


def _ways(task: Task, best: Rival) -> Table:
    """The chosen model in four ways: mean over folds and ensemble, by image and by patient."""
    result, models = best.result, len(best.tested.predictions.logits)
    patients = f"{result.by_group.get('groups', 0):,} patients"
    ways = {
        "": (f"by image, mean of {models} models", f"{result.n_test:,} images"),
        "ensemble": ("by image, ensemble: what predict uses", f"{result.n_test:,} images"),
        "by patient": (f"by patient, mean of {models} models", patients),
        "by patient, ensemble": ("by patient, ensemble: what predict uses", patients),
    }
    rows = [
        (*ways[name], score(e.mean, e.std), bounds(e.new_model) or "–", bounds(e.these_models) or e.why)
        for name, e in result.estimates.items()
        if models > 1 or not name.endswith("ensemble")
    ]
    notes = []
    if result.by_group:
        why = result.by_group.get("why")
        mean = "by patient: the mean of the probabilities of a patient's images"
        notes = [f"not by patient: {why}" if why is not None else mean]
    headers = ("scored", "on", f"test {_header(best, task.metric)}", f"95 %: {NEW_MODEL}", f"95 %: {THESE_MODELS}")
    title = f"{best.name}: as a mean of models, and as what predict uses"
    return Table("ways", title, headers, tuple(rows), tuple(notes))


def _others(task: Task, best: Rival) -> Table:
    """The chosen model by other metrics; each score with the interval that tables show."""
    predictions, n_classes = best.tested.predictions, len(task.class_names)
    ways = {"mean of models": predictions}
    if len(predictions.logits) > 1:
        ways["ensemble, which predict uses"] = predictions.ensemble()
    if "groups" in best.result.by_group:
        ways["by patient, ensemble"] = predictions.by_group().ensemble()
    usual = [{"auc": "macro_auc"}.get(m, m) if n_classes > 2 else m for m in _OTHERS]
    metrics = [m for m in task.others or usual if m != task.metric]
    why = dict[str, None]()
    rows = [(_header(best, m), *(_estimated(p.estimate(m), why) for p in ways.values())) for m in metrics]
    notes = ("accuracy, F1 and MCC of the most probable class", INTERVALS, *why)
    return Table("others", f"{best.name} by other metrics", ("metric", *ways), tuple(rows), notes)


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
        x, y, low, high = (
            np.round(values, 5).tolist() for values in (GRID, mean, (mean - sd).clip(0, 1), (mean + sd).clip(0, 1))
        )
        label = f"{name} (AUC {sum(aucs) / len(aucs):.3f})"
        series.append(Series(label, x, y, low, high, points=False, shown=place < _MOST_LINES))
    axes = ("false positive rate", "true positive rate")
    return line_chart(id, series, alt=alt, axes=axes, square=True, digits=(2, 3))


def decide(t: Tested, run: Path, id: str) -> dict[str, Any]:
    """Operating points and calibration of one result; ``run`` is its folder, ``id`` that of the chart."""
    names, positive = t.result.class_names, t.predictions.positive
    of = [positive]
    if len(names) > 2:
        counts = np.bincount(t.labels, minlength=len(names))
        of = sorted(np.argsort(-counts, kind="stable")[:_MOST_CLASSES].tolist())
        of = [c for c in of if 0 < counts[c] < len(t.labels)]
    found = {names[c]: calibration(against_rest(t.predictions, c)) for c in of}
    series = [
        Series(
            name, [round(b.predicted, 4) for b in each[-1].bins], [round(b.observed, 4) for b in each[-1].bins],
            counts=[b.images for b in each[-1].bins],
        )
        for name, each in found.items()
    ]  # fmt: skip
    chart = line_chart(
        id, series, axes=("mean probability", "share observed"), square=True, digits=(3, 3),
        alt="Reliability curves: the share of images of a class over its mean probability, in bins; on the diagonal "
        "probabilities are right.",
    )  # fmt: skip
    rows = tuple(
        (f"P({name})", f"{b.low:.3f} to {b.high:.3f}", f"{b.predicted:.3f}", f"{b.observed:.3f}", f"{b.images:,}",
         f"{b.positives:,}")
        for name, each in found.items() for b in each[-1].bins
    )  # fmt: skip
    headers = ("probability", "from – to", "mean", "share observed", "images", "of the class")
    return {
        "points": _points(t, run, positive) if len(names) == 2 or t.result.positive else None,
        "calibration": _calibration(found),
        "bins": Table("bins", "Bins of the reliability curve", headers, rows),
        "chart": chart,
    }


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
    notes += ["predictive values are at the prevalence of the test set", f"positive: {name}; {INTERVALS}"]
    return Table("points", f"Operating points of P({name})", headers, tuple(rows), (*notes, *why))


def _thresholds(p: OperatingPoint) -> str:
    low, high = f"{min(p.thresholds):.3f}", f"{max(p.thresholds):.3f}"
    return low if low == high else f"{low} to {high}"


def _calibration(found: Mapping[str, Sequence[Calibration]]) -> Table:
    why = dict[str, None]()
    rows = [
        (f"P({name})", c.models, *(_value(v, why) for v in (c.intercept, c.slope, c.brier)), f"{c.ece:.3f}")
        for name, each in found.items()
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


def _value(v: Value, why: dict[str, None]) -> str:
    if v.value is None:
        why |= {f"no value: {v.why}": None} if v.why else {}
        return "–"
    return _bounded(signed(v.value, 3), v.interval, v.why, why)


def class_table(t: Tested, model: str) -> Table:
    """Scores of every class of a result, one against all others, mean over fold models."""

    def mean(values: Sequence[float]) -> str:
        return f"{np.mean(values):.3f}" if values else "–"

    aucs = [per_class_auc(t.labels, z) for z in t.predictions.logits]
    predicted = t.predictions.logits.argmax(2)  # (K, n)
    rows = []
    for c, name in enumerate(t.result.class_names):
        own = t.labels == c
        values = [float(value) for auc in aucs if (value := auc[c]) is not None]
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        sensitivity = [float((q[own] == c).mean()) for q in predicted] if own.any() else []
        ppv = [float(own[q == c].mean()) for q in predicted if (q == c).any()]
        auc = score(float(np.mean(values)), std) if values else "–"
        rows.append((name, f"{own.sum():,}", f"{len(set(t.groups[own])):,}", auc, mean(sensitivity), mean(ppv)))
    headers = ("class", "test images", "patients", "AUC against the rest", "sensitivity", "PPV")
    note = "means over fold models; sensitivity and PPV of the most probable class"
    return Table("classes", f"Classes under {model}", headers, tuple(rows), (note,))


def _subgroups(task: Task, part: Part, choices: Sequence[Choice], ids: bool, ref: DatasetRef) -> Table | None:
    if part.dataset is None or not choices:
        return None
    best, notes = choices[-1].chosen, hidden_columns(part.dataset)
    names = [c.name for c in shown_columns(part.dataset, secret_words(part, ids=ids)) if len(c.values) > 1]
    if len(names) > _MOST_COLUMNS:
        notes.append("not shown: " + ", ".join(names[_MOST_COLUMNS:]))
    if not names:
        return None
    try:
        scored, remarks = subgroups(
            [best.result.id], names[:_MOST_COLUMNS], metrics=[task.metric], home=part.home, ref=ref
        )
    except EmbcacheError as error:
        return Table("subgroups", "Subgroups", ("",), (), (f"not made: {error.problem}",))
    notes += [note for note in remarks if note not in best.result.left_out]
    rows = [
        (
            s.column or "all", s.value, f"{s.n_images:,}", f"{s.n_groups:,}",
            f"no {', '.join(s.lacks)}" if s.mean is None else score(s.mean, s.std), bounds(s.interval) or s.why,
        )
        for s in scored
    ]  # fmt: skip
    metric = metric_title(task.metric, best.row.estimate.positive)
    return Table(
        "subgroups", f"Subgroups of the test set under {best.name}, {size_words(choices[-1])}",
        ("column", "value", "images", "patients", f"test {metric}", "95 % interval"), tuple(rows), (*notes, INTERVALS),
    )  # fmt: skip
