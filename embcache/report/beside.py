"""Results beside the paper's values, and as learning curves."""

from __future__ import annotations

from collections.abc import Sequence

from embcache.probe.inputs import PAPER_SET
from embcache.probe.metrics import METRICS, metric_title
from embcache.report.charts import Chart, Series, line_chart
from embcache.report.collect import Part, Task
from embcache.results.grid import PAPER_TEST, Cell, Grid, Model, compare_with_paper, trained_by
from embcache.results.layout import Table, lay_out
from embcache.results.paper import PAPER_NAMES, PaperValue, find_value, named_subset, paper_tables
from embcache.runs.folders import ProbeResult

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
    """What the paper prints for a model of its own at a subset: from Tables B and C, which have every size."""
    if not name:
        return None
    wanted = "finetune" if kind == "finetune" else "probe"
    for table in paper_tables().values():
        if table.kind == wanted and table.name[0] in "BC":
            value = find_value(table.name, dataset, name, named_subset(dataset, subset))
            if value is not None:
                return value
    return None


def has_paper(task: Task, part: Part) -> bool:
    """Whether the paper is of this dataset and its labels, and not of one's own images under the same name."""
    kind = part.ds.layout if part.ds is not None else task.dataset
    return not task.target and kind == task.dataset and task.dataset in PAPER_TEST and task.metric == _METRIC[kind]


def paper_table(task: Task, part: Part) -> Table | None:
    """A row a model, a column a size, the paper's value and the difference beneath where the paper has one.

    The paper's own linear models stand below without results of ours, for comparison. None where the paper says nothing
    of the task (`has_paper`).
    """
    subsets = _sizes(task)
    if not has_paper(task, part) or not subsets:
        return None
    models, cells = [], []
    for name, members in task.models.items():
        first = members[0]
        own = paper_name(_kind(first), first.head, first.backbones)
        model = Model(name, first.kind, first.head, first.backbones, paper=own)
        models.append(model)
        at = {subsets_name(r): r for r in members}
        for subset in subsets:
            value = paper_value(task.dataset, _kind(first), own, subset)
            reason = "" if subset in at else "no saved result"
            cells.append(compare_with_paper(Cell(task.dataset, model, subset, at.get(subset), reason, value)))
    there = {model.paper for model in models if model.kind == "probe"}
    for name, label in PAPER_NAMES.items():
        values = {subset: paper_value(task.dataset, "probe", name, subset) for subset in subsets}
        if name not in there and any(values.values()) and name != "dvme-noattn":
            head, backbones = ("linear", (name,)) if not name.startswith("dvme") else (name, PAPER_SET)
            model = Model(f"{label}{_THEIRS}", "probe", head, backbones, paper=name)
            models.append(model)
            cells += [Cell(task.dataset, model, s, None, _NOT_HERE, value) for s, value in values.items()]
    metric = metric_title(task.metric)
    grid = Grid(f"{task.title}", f"test {metric}", (task.dataset,), tuple(models), tuple(subsets), "subsets")
    told = {note for result in task.results for note in result.notes}
    return _trimmed(lay_out(grid, cells), {model.label for model in models if model.label.endswith(_THEIRS)}, told)


def _trimmed(table: Table, theirs: set[str], told: set[str]) -> Table:
    """The table without its first column, the dataset, our empty row of models that are the paper's, and notes told."""
    rows: list[tuple[str, ...]] = []
    label = ""
    for row in (row[1:] for row in table.rows):
        if row[0] in theirs and row[1] == "ours":
            label = row[0]
        else:
            rows.append((label, *row[1:]) if label else row)
            label = ""
    notes = tuple(note for note in table.notes if not note.endswith(f"] {_NOT_HERE}") and note not in told)
    return Table(table.name, table.title, table.headers[1:], tuple(rows), notes, table.records)


def _kind(result: ProbeResult) -> str:
    """What was trained: of a leaderboard's result, the kind of the run handed in."""
    return str((trained_by(result) or {}).get("kind", result.kind))


def subsets_name(result: ProbeResult) -> str:
    """The subset, ``S`` or ``M`` where a number is what the paper calls so."""
    return named_subset(result.dataset, result.subset)


def _sizes(task: Task) -> list[str]:
    """Names of subsets by their number of training labels."""
    sizes = {subsets_name(r): r.n_train for r in task.results}
    return sorted(sizes, key=lambda name: sizes[name])


def learning_curves(task: Task, part: Part, id: str) -> Chart:
    """One curve a model with its interval; the paper's linear models dashed, and shown when asked for."""
    metric = metric_title(task.metric)
    loss = METRICS[task.metric].loss if task.metric in METRICS else False
    ordered = sorted(task.models.items(), key=lambda pair: -max((-1) ** loss * (r.val_mean or 0.0) for r in pair[1]))
    series = [_curve(name, members, place < _SHOWN) for place, (name, members) in enumerate(ordered)]
    series += _paper_curves(task) if has_paper(task, part) else []
    ticks = [float(r.n_train) for r in task.results]
    return line_chart(
        id, series, axes=("training labels of a fold", f"test {metric}"), log_x=True, ticks=_apart(ticks),
        alt=f"Learning curves: test {metric} over numbers of training labels, {len(ordered)} models; the table "
        "beneath has the numbers.",
    )  # fmt: skip


def _curve(name: str, members: Sequence[ProbeResult], shown: bool) -> Series:
    points = sorted(members, key=lambda r: r.n_train)
    bounds = [r.interval or (r.mean or 0.0, r.mean or 0.0) for r in points]
    return Series(
        name,
        tuple(float(r.n_train) for r in points),
        tuple(float(r.mean or 0.0) for r in points),
        tuple(low for low, _ in bounds),
        tuple(high for _, high in bounds),
        shown=shown,
    )


def _paper_curves(task: Task) -> list[Series]:
    sizes = {subsets_name(r): float(r.n_train) for r in task.results}
    series = []
    for name, label in PAPER_NAMES.items():
        found = [(n, paper_value(task.dataset, "probe", name, subset)) for subset, n in sizes.items()]
        points = sorted((n, value.mean) for n, value in found if value is not None and value.mean is not None)
        if points and name != "dvme-noattn":
            x, y = zip(*points, strict=True)
            series.append(Series(f"{label}{_THEIRS}", x, y, dashed=True, shown=False))
    return series


def _apart(ticks: Sequence[float]) -> list[float]:
    """Ticks that leave room for their labels on a logarithmic axis: none within a third of one before it."""
    kept: list[float] = []
    for tick in sorted(set(ticks), reverse=True):
        if not kept or tick < kept[-1] / 1.35:
            kept.append(tick)
    return kept
