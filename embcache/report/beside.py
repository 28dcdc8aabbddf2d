"""Results beside the paper's values, and as learning curves."""

from __future__ import annotations

from collections.abc import Sequence

from embcache.probe.inputs import PAPER_SET
from embcache.probe.metrics import metric_title, metrics
from embcache.report.charts import Chart, Series, line_chart
from embcache.report.collect import Part, Task
from embcache.results.paper import PAPER_TEST, Cell, Grid, Model, compare_with_paper, trained_by
from embcache.results.layout import Table, lay_out
from embcache.results.paper import PAPER_NAMES, PaperValue, find_value, named_subset, paper_tables
from embcache.runs.folders import Result

_METRIC = {"pneumonia": "auc", "nih": "macro_auc", "patchcam": "auc", "aptos": "kappa"}
_THEIRS = ", the paper's"
_NOT_HERE = "not made here"
_SHOWN = 6  # curves that are shown at first: more hide each other; the legend shows them


def paper_name(kind: str, head: str, backbones: tuple[str, ...]) -> str:
    """The paper's name for a model; empty where it has no such model."""
    if kind not in ("probe", "finetune"):
        return ""
    if head == "linear" and len(backbones) == 1 and backbones[0] in PAPER_NAMES:
        return backbones[0]
    return head if kind == "probe" and head in ("dvme", "dvme-noattn") and set(backbones) == set(PAPER_SET) else ""


def paper_value(dataset: str, kind: str, name: str, subset: str) -> PaperValue | None:
    """The paper's value of one of its own models at a subset: from Tables B and C, which have every size."""
    wanted = "finetune" if kind == "finetune" else "probe"
    for table in paper_tables().values():
        if name and table.kind == wanted and table.name[0] in "BC":
            value = find_value(table.name, dataset, name, named_subset(dataset, subset))
            if value is not None:
                return value
    return None


def _has_paper(task: Task, part: Part) -> bool:
    """Whether the paper has this dataset and its labels, and these are not other images under the same name."""
    layout = part.dataset.layout if part.dataset is not None else task.dataset
    return (
        not task.target
        and layout == task.dataset
        and task.dataset in PAPER_TEST
        and task.metric == _METRIC[task.dataset]
    )


def paper_table(task: Task, part: Part) -> Table | None:
    """One row per model and one column per size, with the paper's value and the difference below where there is one.

    The paper's own models without results of ours are listed last. None where the paper has nothing on the task.
    """
    sizes = _sizes(task)
    subsets = sorted(sizes, key=lambda name: sizes[name])
    if not _has_paper(task, part) or not subsets:
        return None
    models, cells = [], []
    for name, members in task.models.items():
        first = members[0]
        kind = _kind(first)
        own = paper_name(kind, first.head, first.backbones)
        model = Model(name, first.kind, first.head, first.backbones, paper=own)
        models.append(model)
        at = {named_subset(r.dataset, r.subset): r for r in members}
        for subset in subsets:
            value, reason = paper_value(task.dataset, kind, own, subset), "" if subset in at else "no saved result"
            cells.append(compare_with_paper(Cell(task.dataset, model, subset, at.get(subset), reason, value)))
    there = {model.paper for model in models if model.kind == "probe"}
    for name, label in PAPER_NAMES.items():
        values = {subset: paper_value(task.dataset, "probe", name, subset) for subset in subsets}
        if name not in there and any(values.values()) and name != "dvme-noattn":
            head, backbones = ("linear", (name,)) if not name.startswith("dvme") else (name, PAPER_SET)
            model = Model(f"{label}{_THEIRS}", "probe", head, backbones, paper=name)
            models.append(model)
            cells += [Cell(task.dataset, model, s, None, _NOT_HERE, value) for s, value in values.items()]
    grid = Grid(
        task.title, f"test {metric_title(task.metric)}", (task.dataset,), tuple(models), tuple(subsets), "subsets"
    )
    return _trimmed(lay_out(grid, cells), {note for result in task.results for note in result.notes})


def _trimmed(table: Table, elsewhere: set[str]) -> Table:
    """Without the column of the dataset, our empty row of models that are the paper's, and notes that are elsewhere."""
    rows: list[tuple[str, ...]] = []
    label = ""
    for row in (row[1:] for row in table.rows):
        if row[0].endswith(_THEIRS) and row[1] == "ours":
            label = row[0]
        else:
            rows.append((label, *row[1:]) if label else row)
            label = ""
    notes = tuple(note for note in table.notes if not note.endswith(f"] {_NOT_HERE}") and note not in elsewhere)
    return Table(table.name, table.title, table.headers[1:], tuple(rows), notes, table.records)


def _kind(result: Result) -> str:
    """Probe or finetune; of a leaderboard's result, that of the run that was submitted."""
    return str((trained_by(result) or {}).get("kind", result.kind))


def _sizes(task: Task) -> dict[str, int]:
    """Training labels by subset, named ``S`` or ``M`` where a number is what the paper calls so."""
    return {named_subset(r.dataset, r.subset): r.n_train for r in task.results}


def learning_curves(task: Task, part: Part, id: str) -> Chart:
    """One curve per model with its interval; the paper's linear models dashed, and hidden at first."""
    metric = metric_title(task.metric)
    sign = -1 if task.metric in metrics and metrics.get(task.metric).loss else 1
    ordered = sorted(task.models.items(), key=lambda pair: -max(sign * (r.val_mean or 0.0) for r in pair[1]))
    series = [_curve(name, members, place < _SHOWN) for place, (name, members) in enumerate(ordered)]
    for name, label in PAPER_NAMES.items() if _has_paper(task, part) else ():
        found = [(float(n), paper_value(task.dataset, "probe", name, s)) for s, n in _sizes(task).items()]
        points = sorted((n, value.mean) for n, value in found if value is not None and value.mean is not None)
        if points and name != "dvme-noattn":
            x, y = zip(*points, strict=True)
            series.append(Series(f"{label}{_THEIRS}", x, y, dashed=True, shown=False))
    ticks: list[float] = []  # with room for their labels: none within a third of the next one
    for tick in sorted({float(r.n_train) for r in task.results}, reverse=True):
        if not ticks or tick < ticks[-1] / 1.35:
            ticks.append(tick)
    return line_chart(
        id, series, axes=("training labels of a fold", f"test {metric}"), log_ticks=ticks,
        alt=f"Learning curves: test {metric} over numbers of training labels, {len(ordered)} models; the table "
        "below has the numbers.",
    )  # fmt: skip


def _curve(name: str, members: Sequence[Result], shown: bool) -> Series:
    points = sorted(members, key=lambda r: r.n_train)
    means = [float(r.mean or 0.0) for r in points]
    bounds = [r.interval or (mean, mean) for r, mean in zip(points, means, strict=True)]
    low, high = zip(*bounds, strict=True)
    return Series(name, [float(r.n_train) for r in points], means, low, high, shown=shown)
