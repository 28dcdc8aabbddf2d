"""The sections of a page as plain data for its template: what is said, laid out and drawn of each task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from embcache.data.columns import column_values, columns
from embcache.errors import EmbcacheError
from embcache.paths import PathLike
from embcache.probe.metrics import metric_title
from embcache.report.curves import curve_table
from embcache.report.layout import Table, signed
from embcache.report.page.beside import learning_curves, paper_table
from embcache.report.page.charts import Chart, Series, line_chart
from embcache.report.page.choice import Choice, Rival, beyond
from embcache.report.page.collect import Part, Task
from embcache.report.page.numbers import GRID, Calibration, calibrate, class_scores, confusion, mean_roc
from embcache.report.page.warn import secret_words
from embcache.report.page.words import headline, p_words, sentences, size_words
from embcache.report.subgroups import score_subgroups

MOST_LINES = 6
"""Models drawn in a chart of one size: the best on validation."""

MOST_COLUMNS = 8
"""Columns of a dataset's table that make subgroups."""


@dataclass(frozen=True, eq=False)
class Size:
    """One number of training labels.

    Attributes
    ----------
    title : str
    sentences : list of str
    ranking : Table
    roc, reliability : Chart
    confusion : list of (str, list of (str, float))
        A row a true class: of each predicted class the images in words, and their share of the true class.
    classes : Table
    notes : list of str
    chosen : str
    place : int
        Of its predictions among those of the map.
    """

    title: str
    sentences: list[str]
    ranking: Table
    roc: Chart
    reliability: Chart
    confusion: list[tuple[str, list[tuple[str, float]]]]
    classes: Table
    notes: list[str]
    chosen: str
    place: int


@dataclass(frozen=True, eq=False)
class TaskSection:
    """One task: its headline, curves, tables, and what each size says, the most labels first."""

    task: Task
    headline: str
    winners: Table
    curves: Chart
    numbers: Table
    paper: Table | None
    sizes: list[Size]
    subgroups: Table | None

    @property
    def charts(self) -> list[Chart]:
        """All charts of the section."""
        return [self.curves, *(chart for size in self.sizes for chart in (size.roc, size.reliability))]


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
    """Lay out one task.

    Parameters
    ----------
    task, part
        The task and its dataset.
    choices : sequence of Choice
        Ascending by labels, as `embcache.report.page.choice.choose` gives them.
    id : str
        Begins the ids of its charts.
    ids : bool
        Whether subgroups may be named by values that also name images.
    data_root : path, optional
        As for `embcache.report.subgroups.score_subgroups`.
    say : callable
        Told what is being computed.
    """
    total = len(choices)
    sizes = [
        _size(task, choice, f"{id}-{place}", total - 1 - place) for place, choice in reversed([*enumerate(choices)])
    ]
    say(f"{task.title}: subgroups")
    return TaskSection(
        task, headline(task, choices), _winners(task, choices), learning_curves(task, f"{id}-curves"),
        curve_table(task.results),
        paper_table(task), sizes, _subgroups(task, part, choices, ids, data_root),
    )  # fmt: skip


def _winners(task: Task, choices: Sequence[Choice]) -> Table:
    """A row a size: what is best on validation, its scores, and how far the next best is."""
    metric = metric_title(task.metric)
    rows = []
    for choice in choices:
        best, others = choice.chosen, choice.rivals[1:]
        beside = ("", "", "")
        if others:
            row = others[0].row
            apart = "beyond" if beyond(row) else "within"
            assert row.difference is not None
            beside = (others[0].name, signed(row.difference.difference, 4, plus=True), apart)
        rows.append(
            (
                f"{choice.subset}: {choice.n_train:,} + {choice.labels_used - choice.n_train:,}", best.name,
                signed(best.validated, 4), _spread(best.row.mean, best.row.std), _bounds(best.row.interval) or best.row.estimate.why, *beside,
            )
        )  # fmt: skip
    headers = (
        "labels: training + validation", "best on validation", f"validation {metric}", f"its test {metric}",
        "95 % interval", "next on validation", "its difference on test", "the interval",
    )  # fmt: skip
    return Table("winners", f"{task.title}: best on validation at each size", headers, tuple(rows))


def _size(task: Task, choice: Choice, id: str, place: int) -> Size:
    calibrations = {rival.name: calibrate(rival.tested.labels, rival.tested.p) for rival in choice.rivals}
    drawn = choice.rivals[:MOST_LINES]
    best = choice.chosen
    notes = []
    if len(drawn) < len(choice.rivals):
        notes.append(f"Charts show the {MOST_LINES} models that are best on validation.")
    if choice.apart:
        notes.append(
            "Not ranked here, for they were trained, validated or tested on other images: "
            + "; ".join(choice.apart) + "."
        )  # fmt: skip
    notes += [f"Left out: {problem}." for problem in choice.problems]
    return Size(
        title=size_words(choice),
        sentences=sentences(task, choice),
        ranking=_ranking(task, choice, calibrations),
        roc=_roc(task, choice, drawn, f"{id}-roc"),
        reliability=_reliability(drawn, calibrations, f"{id}-reliability"),
        confusion=_confusion(best),
        classes=_classes(best),
        notes=notes,
        chosen=best.name,
        place=place,
    )


def _ranking(task: Task, choice: Choice, calibrations: dict[str, Calibration]) -> Table:
    metric = metric_title(task.metric)
    headers = (
        "model", f"validation {metric}", f"test {metric}", "95 % interval", "difference", "95 % interval", "p (Holm)",
        "accuracy", "balanced accuracy", "sensitivity at 95 % specificity", "ECE",
    )  # fmt: skip
    rows = []
    for rival in choice.rivals:
        row, calibration = rival.row, calibrations[rival.name]
        rows.append(
            (
                rival.name,
                signed(rival.validated, 4),
                _spread(row.mean, row.std),
                _bounds(row.interval) or row.estimate.why,
                "best on validation" if row.difference is None else signed(row.difference.difference, 4, plus=True),
                "" if row.difference is None else _bounds(row.difference.interval, plus=True) or row.difference.why,
                "" if row.p_holm is None else p_words(row.p_holm).removeprefix("= "),
                *(_fold_mean(rival, key) for key in ("accuracy", "balanced_accuracy", "sensitivity_at_95_specificity")),
                f"{calibration.ece:.3f} ± {calibration.ece_std:.3f}",
            )
        )
    notes = (
        "in the order of the validation score, which alone chooses; differences are from the first row, on the same "
        "resamples of test groups",
        "ECE: expected calibration error of the predicted class, ten equal bins, mean ± sd over fold models; 0 is best",
    )
    return Table("ranking", f"Models at {size_words(choice)}", headers, tuple(rows), notes)


def _fold_mean(rival: Rival, key: str) -> str:
    values = [float(f.metrics[key]) for f in rival.result.folds if f.metrics.get(key) is not None]
    return f"{sum(values) / len(values):.3f}" if values else ""


def _roc(task: Task, choice: Choice, drawn: Sequence[Rival], id: str) -> Chart:
    """Of two classes the curves of models; of more those of the chosen model's classes, one against all others."""
    series = []
    if len(task.class_names) == 2:
        for rival in drawn:
            series.append(_roc_series(rival.name, rival, 1, band=rival is drawn[0]))
        alt = f"ROC curves of {len(drawn)} models, mean over folds; the AUCs are in the table above."
    else:
        best = choice.chosen
        present = set(best.tested.labels.tolist())
        for c, name in enumerate(task.class_names):
            if c in present:
                series.append(_roc_series(name, best, c, band=len(present) <= MOST_LINES))
        alt = "ROC curves of the classes under the best model, each against all others; AUCs are in the table beneath."
    return line_chart(
        id, series, alt=alt, axes=("false positive rate", "true positive rate"), square=True, diagonal=True,
        digits=(2, 3),
    )  # fmt: skip


def _roc_series(name: str, rival: Rival, of_class: int, *, band: bool) -> Series:
    mean, sd = mean_roc(rival.tested.labels, rival.tested.predictions.logits, of_class)
    low, high = (mean - sd).clip(0, 1), (mean + sd).clip(0, 1)
    return Series(
        name, _tuple(GRID), _tuple(mean), _tuple(low) if band else (), _tuple(high) if band else (), points=False
    )


def _reliability(drawn: Sequence[Rival], calibrations: dict[str, Calibration], id: str) -> Chart:
    series = []
    for rival in drawn:
        c = calibrations[rival.name]
        series.append(Series(f"{rival.name} (ECE {c.ece:.3f})", _tuple(c.confidence), _tuple(c.accuracy)))
    return line_chart(
        id, series, axes=("confidence in the predicted class", "accuracy"), square=True, diagonal=True, digits=(3, 3),
        alt="Reliability curves: accuracy over confidence in ten bins; on the diagonal confidence is accuracy.",
    )  # fmt: skip


def _confusion(best: Rival) -> list[tuple[str, list[tuple[str, float]]]]:
    counts = confusion(best.tested.labels, best.tested.p)
    rows = []
    for name, line in zip(best.result.class_names, counts, strict=True):
        total = float(line.sum())
        rows.append((name, [(f"{v:,.1f}", float(v) / total if total else 0.0) for v in line]))
    return rows


def _classes(best: Rival) -> Table:
    rows = [
        (
            s.name, f"{s.n_images:,}", f"{s.n_groups:,}",
            "–" if s.auc is None else _spread(s.auc, s.auc_std), _or_dash(s.sensitivity), _or_dash(s.precision),
        )
        for s in class_scores(best.tested)
    ]  # fmt: skip
    return Table(
        "classes", f"Classes under {best.name}",
        ("class", "test images", "test groups", "AUC against the rest", "sensitivity", "precision"), tuple(rows),
        ("means over fold models; sensitivity and precision of the most probable class",),
    )  # fmt: skip


def _subgroups(
    task: Task, part: Part, choices: Sequence[Choice], ids: bool, data_root: PathLike | None
) -> Table | None:
    if part.ds is None or not choices:
        return None
    best, notes, names = choices[-1].chosen, [], []
    secret = set() if ids else secret_words(part)
    for name in columns(part.ds):
        try:
            column = column_values(part.ds, name)
        except EmbcacheError:
            continue  # a column of text with too many values, or without any
        if len(column.values) > 1 and not secret & set(column.values):
            names.append(name)
    if len(names) > MOST_COLUMNS:
        notes.append("not shown: " + ", ".join(names[MOST_COLUMNS:]))
    if not names:
        return None
    try:
        scored, told = score_subgroups([best.result.id], names[:MOST_COLUMNS], home=part.home, data_root=data_root)
    except EmbcacheError as error:
        return Table("subgroups", "Subgroups", ("",), (), (f"not made: {error.problem}",))
    rows = [
        (
            s.column or "all", s.value, f"{s.n_images:,}", f"{s.n_groups:,}",
            f"too few: no {', '.join(s.lacks)}" if s.mean is None else _spread(s.mean, s.std),
            _bounds(s.interval) or s.why,
        )
        for s in scored
    ]  # fmt: skip
    metric = metric_title(task.metric)
    return Table(
        "subgroups", f"Subgroups of the test set under {best.name}, {choices[-1].subset}",
        ("column", "value", "images", "groups", f"test {metric}", "95 % interval"), tuple(rows), (*notes, *told),
    )  # fmt: skip


def _spread(mean: float, std: float | None) -> str:
    return signed(mean, 4) + ("" if std is None else f" ± {std:.4f}")


def _bounds(bounds: tuple[float, float] | None, plus: bool = False) -> str:
    return " to ".join(signed(bound, 4, plus=plus) for bound in bounds or ())


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _tuple(values: Any) -> tuple[float, ...]:
    return tuple(round(float(v), 5) for v in values)
