"""The sections of a page as plain data for its template: what is said, laid out and drawn of each task."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embcache.config import DatasetRef
from embcache.errors import EmbcacheError
from embcache.paths import PathLike
from embcache.probe.metrics import METRICS, confusion, find_metric, metric_title
from embcache.probe.summary import training_notes
from embcache.report.beside import learning_curves, paper_table
from embcache.report.charts import Chart, Series, line_chart
from embcache.report.choice import Choice, Rival
from embcache.report.collect import Part, Task
from embcache.report.decide import Decided, decide
from embcache.report.numbers import class_scores
from embcache.report.warn import hidden_columns, secret_words, told_columns
from embcache.report.words import (
    NEW_MODEL,
    THESE_MODELS,
    bounded,
    change_words,
    headline,
    p_words,
    sentences,
    size_words,
)
from embcache.results.advice import Advice, advise
from embcache.results.compare import INTERVALS, SPEAKS_OF, Difference, subgroups
from embcache.results.curves import curve_table
from embcache.results.decisions import GRID, mean_curve
from embcache.results.layout import Table, bounds, score, signed
from embcache.runs.result import Estimate

MOST_LINES = 6
"""Lines of a chart that are shown at first: of models the best on validation. The legend shows the others."""

MOST_COLUMNS = 8
"""Columns of a dataset's table that make subgroups."""

OTHERS = ("auc", "accuracy", "balanced_accuracy", "auprc", "f1", "mcc", "brier", "log_loss")
"""Metrics of the chosen model besides the one that chose it, unless others are asked for."""


@dataclass(frozen=True, eq=False)
class Size:
    """One number of training labels."""

    title: str
    sentences: list[str]
    ranking: Table  # the models
    ways: Table  # the chosen model's mean over folds and its ensemble, by image and by patient
    others: Table  # the chosen model by other metrics
    roc: Chart
    decided: Decided  # operating points and calibration of the chosen model
    confusion: list[tuple[str, list[tuple[str, float]]]]  # A row a true class
    classes: Table
    notes: list[str]
    chosen: str
    positive: str  # the positive class of two; of more classes empty
    place: int  # of its predictions among those of the map


@dataclass(frozen=True, eq=False)
class TaskSection:
    """One task: its headline, curves, tables, and what each size says, the most labels first."""

    task: Task
    choices: Sequence[Choice]
    headline: str
    advice: list[str]
    curves: Chart
    numbers: Table
    paper: Table | None
    sizes: list[Size]
    subgroups: Table | None

    @property
    def charts(self) -> list[Chart]:
        """All charts of the section."""
        return [self.curves, *(chart for size in self.sizes for chart in (size.roc, *size.decided.charts))]


def task_section(
    task: Task,
    part: Part,
    choices: Sequence[Choice],
    id: str,
    *,
    ids: bool = True,
    data_root: PathLike | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> TaskSection:
    """Lay out one task."""
    found = advise(task.results, home=part.home)
    advice: Advice | None = found[0] if found else None
    total = len(choices)
    sizes = []
    for place, choice in reversed([*enumerate(choices)]):
        say(f"{task.title}: {size_words(choice)}")
        sizes.append(_size(task, part, choice, f"{id}-{place}", total - 1 - place))
    say(f"{task.title}: subgroups")
    return TaskSection(
        task, choices, headline(task, choices, advice), _labels_help(advice),
        learning_curves(task, part, f"{id}-curves"), curve_table(task.results), paper_table(task, part), sizes,
        _subgroups(task, part, choices, ids, data_root),
    )  # fmt: skip


def summary_table(sections: Sequence[TaskSection]) -> Table:
    """What the page opens with: a row a size, what is best on validation, its test score and intervals."""
    titles = list(dict.fromkeys(_header(c.chosen, s.task.metric) for s in sections for c in s.choices))
    metrics = {s.task.title: metric_title(s.task.metric) for s in sections}
    several = len(sections) > 1
    rows, notes = [], dict[str, None]()
    for section in sections:
        loss = METRICS[section.task.metric].loss if section.task.metric in METRICS else False
        for choice in section.choices:
            best, e = choice.chosen, choice.chosen.row.estimate
            why = [e.why] if e.new_model is None and e.why else []
            notes |= dict.fromkeys(
                f"{choice.n_train:,} labels: {note}" for note in (*why, *training_notes(best.result))
            )
            rows.append(
                (
                    *([f"{section.task.title} ({metrics[section.task.title]})"] if several else []),
                    _labels(choice), best.name, score(e.mean, e.std), bounds(e.new_model) or "–",
                    bounds(e.these_models) or "–", _ensemble(best), change_words(choice.change, loss),
                )
            )  # fmt: skip
    headers = (
        *(["dataset"] if several else []), "training labels (+ validation)", "best on validation",
        f"test {titles[0] if len(titles) == 1 else 'score'}, mean ± sd over folds", f"95 %: {NEW_MODEL}",
        f"95 %: {THESE_MODELS}", "ensemble, which predict uses", "change from the size before",
    )  # fmt: skip
    told = ("change: of the same model's expected test score from the size before, with its 95 % interval", *notes)
    return Table("summary", "Best on validation at each number of labels", headers, tuple(rows), told)


def _labels_help(advice: Advice | None) -> list[str]:
    """Whether more labels help; which backbone to take is the headline."""
    return [] if advice is None or advice.labels is None or len(advice.labels.sizes) < 2 else [advice.labels.text]


def _labels(choice: Choice) -> str:
    return f"{choice.n_train:,} (+ {choice.labels_used - choice.n_train:,})"


def _ensemble(rival: Rival) -> str:
    """The score of what predict uses, with the interval that tables show."""
    e = rival.result.estimates.get("ensemble")
    return "" if e is None else _told(e, {})


def _told(e: Estimate, why: dict[str, None]) -> str:
    return bounded(score(e.mean, e.std) if math.isfinite(e.mean) else "–", e.interval, e.why, why)


def _size(task: Task, part: Part, choice: Choice, id: str, place: int) -> Size:
    best = choice.chosen
    notes = [f"{rival.name}: {note}" for rival in choice.rivals[1:] for note in training_notes(rival.result)]
    if choice.apart:
        notes.append(
            "Not ranked here, for they were trained, validated or tested on other images: "
            + "; ".join(choice.apart) + "."
        )  # fmt: skip
    notes += [f"Left out: {problem}." for problem in choice.problems]
    return Size(
        title=size_words(choice),
        sentences=sentences(task, choice),
        ranking=_ranking(task, choice),
        ways=_ways(task, best),
        others=_others(task, best),
        roc=_roc(task, choice, f"{id}-roc"),
        decided=decide(best.tested, part.run_folder(best.result), f"{id}-calibration"),
        confusion=_confusion(best),
        classes=_classes(best),
        notes=notes,
        chosen=best.name,
        positive=task.class_names[best.tested.predictions.positive] if len(task.class_names) == 2 else "",
        place=place,
    )


def _ranking(task: Task, choice: Choice) -> Table:
    """A row a model: its scores, and how far it is from the chosen one."""
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
        columns |= {
            "difference": lambda r: _of(r, lambda d: signed(d.difference, 3, plus=True)),
            "its 95 % interval": lambda r: _of(r, lambda d: bounds(d.interval, plus=True) or d.why),
            "p (Holm)": lambda r: "" if r.row.p_holm is None else p_words(r.row.p_holm),
            "detectable": lambda r: _of(r, lambda d: "" if d.smallest is None else f"{d.smallest:.3f}"),
        }
        speaks = sorted({d.trained for d in differences})
        notes.append("differences are from the first row; " + "; ".join(SPEAKS_OF[which] for which in speaks))
        notes.append("detectable: the smallest difference that would have been found, with 80 % power at p < 0.05")
    for m in task.others:
        columns[_header(best, m)] = lambda r, m=m: _told(r.tested.predictions.estimate(m), reasons)  # type: ignore[misc]
    rows = tuple(tuple(cell(rival) for cell in columns.values()) for rival in choice.rivals)
    why = dict.fromkeys(r.row.estimate.why for r in choice.rivals if r.row.estimate.why) | reasons
    return Table("ranking", f"Models at {size_words(choice)}", tuple(columns), rows, (*notes, *why))


def _of(rival: Rival, read: Callable[[Difference], str]) -> str:
    return "" if rival.row.difference is None else read(rival.row.difference)


def _header(best: Rival, metric: str) -> str:
    """The metric, of which class, and for accuracy what always predicting the commonest class would reach."""
    majority = best.result.majority if metric == "accuracy" else None
    names = best.result.class_names
    positive = best.result.positive if find_metric(metric, len(names)).asymmetric and len(names) == 2 else ""
    return metric_title(metric, positive) + ("" if majority is None else f" (always {majority[0]}: {majority[1]:.3f})")


def _ways(task: Task, best: Rival) -> Table:
    """The chosen model in four ways: mean over folds and ensemble, by image and by patient."""
    result, models = best.result, len(best.tested.predictions.logits)
    names = {
        "": f"by image, mean of {models} models",
        "ensemble": "by image, ensemble: what predict uses",
        "by patient": f"by patient, mean of {models} models",
        "by patient, ensemble": "by patient, ensemble: what predict uses",
    }
    units = {name: f"{result.by_group.get('groups', 0):,} patients" for name in names if name.startswith("by")}
    rows, notes = [], ["by patient: the mean of the probabilities of a patient's images"]
    for name, e in result.estimates.items():
        if models > 1 or not name.endswith("ensemble"):
            cells = (bounds(e.new_model) or "–", bounds(e.these_models) or e.why)
            rows.append((names[name], units.get(name, f"{result.n_test:,} images"), score(e.mean, e.std), *cells))
    if not result.by_group:
        notes = []
    elif "why" in result.by_group:
        notes = [f"not by patient: {result.by_group['why']}"]
    headers = ("scored", "on", f"test {_header(best, task.metric)}", f"95 %: {NEW_MODEL}", f"95 %: {THESE_MODELS}")
    return Table("ways", f"{best.name}: as a mean of models, and as what predict uses", headers, tuple(rows),
                 tuple(notes))  # fmt: skip


def _others(task: Task, best: Rival) -> Table:
    """The chosen model by other metrics; each score with the interval that tables show."""
    predictions, n_classes = best.tested.predictions, len(task.class_names)
    ways = [("mean of models", predictions)]
    if len(predictions.logits) > 1:
        ways.append(("ensemble, which predict uses", predictions.ensemble()))
    if "groups" in best.result.by_group:
        ways.append(("by patient, ensemble", predictions.by_group().ensemble()))
    usual = [{"auc": "macro_auc"}.get(m, m) if n_classes > 2 else m for m in OTHERS]
    metrics = [m for m in task.others or usual if m != task.metric]
    why = dict[str, None]()
    rows = [(_header(best, m), *(_told(p.estimate(m), why) for _, p in ways)) for m in metrics]
    return Table(
        "others", f"{best.name} by other metrics", ("metric", *(name for name, _ in ways)), tuple(rows),
        ("accuracy, F1 and MCC of the most probable class", INTERVALS, *why),
    )  # fmt: skip


def _roc(task: Task, choice: Choice, id: str) -> Chart:
    """Of two classes the curves of models; of more those of the chosen model's classes, one against all others."""
    best = choice.chosen
    if len(task.class_names) == 2:
        positive = best.tested.predictions.positive
        series = [_roc_series(r.name, r, positive, k < MOST_LINES) for k, r in enumerate(choice.rivals)]
        alt = f"ROC curves of {len(series)} models, mean over folds; the legend has the AUCs."
    else:
        present = [c for c in range(len(task.class_names)) if (best.tested.labels == c).any()]
        series = [_roc_series(task.class_names[c], best, c, k < MOST_LINES) for k, c in enumerate(present)]
        alt = "ROC curves of the classes under the best model, each against all others; the legend has the AUCs."
    return line_chart(
        id, series, alt=alt, axes=("false positive rate", "true positive rate"), square=True,
        digits=(2, 3),
    )  # fmt: skip


def _roc_series(name: str, rival: Rival, of_class: int, shown: bool) -> Series:
    mean, sd = mean_curve(rival.tested.labels, rival.tested.predictions.logits, of_class)
    low, high = (mean - sd).clip(0, 1), (mean + sd).clip(0, 1)
    aucs = [f.metrics["per_class_auc"][of_class] for f in rival.result.folds if f.metrics]
    name = f"{name} (AUC {sum(aucs) / len(aucs):.3f})"
    return Series(name, _tuple(GRID), _tuple(mean), _tuple(low), _tuple(high), points=False, shown=shown)


def _confusion(best: Rival) -> list[tuple[str, list[tuple[str, float]]]]:
    counts = confusion(best.tested.labels, best.tested.predictions.ensemble().logits[0])
    return [
        (name, [(f"{n:,}", n / max(1, int(line.sum()))) for n in line.tolist()])
        for name, line in zip(best.result.class_names, counts, strict=True)
    ]


def _classes(best: Rival) -> Table:
    rows = [
        (
            s.name, f"{s.n_images:,}", f"{s.n_groups:,}",
            "–" if s.auc is None else score(s.auc, s.auc_std), _or_dash(s.sensitivity), _or_dash(s.ppv),
        )
        for s in class_scores(best.tested)
    ]  # fmt: skip
    return Table(
        "classes", f"Classes under {best.name}",
        ("class", "test images", "patients", "AUC against the rest", "sensitivity", "PPV"), tuple(rows),
        ("means over fold models; sensitivity and PPV of the most probable class",),
    )  # fmt: skip


def _subgroups(
    task: Task, part: Part, choices: Sequence[Choice], ids: bool, data_root: PathLike | None
) -> Table | None:
    if part.ds is None or not choices:
        return None
    best, notes = choices[-1].chosen, hidden_columns(part.ds)
    names = [c.name for c in told_columns(part.ds, secret_words(part, ids=ids)) if len(c.values) > 1]
    if len(names) > MOST_COLUMNS:
        notes.append("not shown: " + ", ".join(names[MOST_COLUMNS:]))
    if not names:
        return None
    try:
        scored, told = subgroups(
            [best.result.id], names[:MOST_COLUMNS], metrics=[task.metric], home=part.home,
            ref=DatasetRef(data_root=None if data_root is None else Path(data_root)),
        )  # fmt: skip
    except EmbcacheError as error:
        return Table("subgroups", "Subgroups", ("",), (), (f"not made: {error.problem}",))
    told = [note for note in told if note not in best.result.left_out]
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
        ("column", "value", "images", "patients", f"test {metric}", "95 % interval"), tuple(rows),
        (*notes, *told, INTERVALS),
    )  # fmt: skip


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _tuple(values: Any) -> tuple[float, ...]:
    return tuple(round(float(v), 5) for v in values)
