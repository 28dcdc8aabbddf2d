"""Charts by Bokeh, as JSON data that its script draws in the page; results beside the paper's values.

No text of a user goes into a chart: Bokeh reads titles, labels and tooltips as HTML or TeX where they look like it.
Legends and tooltips are the page's own HTML, filled as text; a chart holds numbers, and names of its own making.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bokeh.core.types import ID
from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, NumeralTickFormatter, Range1d, TapTool
from bokeh.plotting import figure
from bokeh.resources import Resources

from embcache.probe.inputs import PAPER_SET
from embcache.probe.metrics import is_loss, metric_title
from embcache.report.collect import Part, Task
from embcache.results.layout import Table, lay_out
from embcache.results.paper import (
    PAPER_NAMES,
    Cell,
    Grid,
    Model,
    PaperValue,
    compare_with_paper,
    find_value,
    named_subset,
    paper_tables,
    trained_by,
)
from embcache.runs.folders import Result

# Distinct with every common kind of color vision (after Okabe and Ito, 2008), and visible on white and on black.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8A8A8A", "#A6761D")
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "plus", "star", "hex")
GLYPHS = ("●", "■", "▲", "◆", "▼", "✚", "★", "⬢")
_DASHES = ("solid", "dotted", "dotdash")
SHOWN = 6  # lines that are shown at first, the best on validation: more hide each other; the legend shows them
_TOOLS: dict[str, Any] = {
    "sizing_mode": "stretch_width", "tools": "pan,box_zoom,wheel_zoom,reset,save", "toolbar_location": "above",
    "active_scroll": None, "active_drag": None, "background_fill_color": None, "border_fill_color": None,
    "min_border_left": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One line with a band."""

    name: str  # in the legend
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dashed: bool = False  # for reference
    shown: bool = True  # at first; the legend toggles it
    points: bool = True  # whether its points are marked
    line: bool = True  # whether they are joined
    counts: Sequence[int] = ()  # images behind each point, for the tooltip; empty for none


@dataclass(frozen=True)
class Chart:
    """A chart for the page."""

    id: str  # of the element that it is drawn in
    alt: str  # what it shows, for readers who cannot see it
    item: dict[str, Any]  # Bokeh's document and roots, as JSON data
    legend: tuple[tuple[str, str, str, bool], ...]  # name, color, glyph, whether it is shown at first
    axes: tuple[str, str] = ("", "")  # names of x and y, for the page's own tooltip
    kind: str = "line"
    digits: tuple[int, int] = (0, 3)

    def data(self) -> dict[str, Any]:
        """What the page's script needs."""
        series = [{"name": name, "shown": shown} for name, _, _, shown in self.legend]
        return {name: vars(self)[name] for name in ("id", "item", "kind", "axes", "digits")} | {"series": series}


def _style(place: int) -> tuple[str, int]:
    """Color and number of the marker of the n-th series: another shape when colors repeat."""
    return COLORS[place % len(COLORS)], (place + place // len(COLORS)) % len(MARKERS)


def line_chart(
    id: str, series: Sequence[Series], *, alt: str, axes: tuple[str, str], log_ticks: Sequence[float] = (),
    square: bool = False, digits: tuple[int, int] = (0, 3),
) -> Chart:  # fmt: skip
    """Lines with bands over one x axis; ``log_ticks`` make it logarithmic, ``square`` is for shares from 0 to 1."""
    ranges: dict[str, Any] = {"x_range": (-0.01, 1.01), "y_range": (-0.01, 1.01)} if square else {}
    plot: Any = figure(
        height=360 if square else 340, x_axis_type="log" if log_ticks else "auto", x_axis_label=axes[0],
        y_axis_label=axes[1], **ranges, **_TOOLS,
    )  # fmt: skip
    plot.toolbar.logo = None
    if log_ticks:
        plot.xaxis.ticker = FixedTicker(ticks=sorted(set(log_ticks)))
        plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    if square:
        plot.line([0, 1], [0, 1], line_color="#8A8A8A", line_dash="dashed", line_width=1, name="diagonal")
    legend, hoverable = [], []
    for place, one in enumerate(series):
        color, marker = _style(place)
        dash = "dashed" if one.dashed else _DASHES[place // len(COLORS) % len(_DASHES)]
        x, y = list(one.x), list(one.y)
        common: dict[str, Any] = {"name": f"s{place}", "visible": one.shown}
        if one.low:
            plot.varea(x, list(one.low), list(one.high), fill_color=color, fill_alpha=0.13, **common)
        line: Any = None
        if one.line:
            line = plot.line(
                x, y, line_color=color, line_dash=dash, line_width=2, line_alpha=0.7 if one.dashed else 1, **common
            )
        if one.points:
            counts = {"n": list(one.counts)} if one.counts else {}
            line = plot.scatter(
                "x", "y", source=ColumnDataSource({"x": x, "y": y, **counts}), marker=MARKERS[marker],
                size=8 if one.line else 5, color=color, fill_alpha=0.3 if one.dashed else 1 if one.line else 0.5,
                line_alpha=1 if one.line else 0.5, **common,
            )  # fmt: skip
        hoverable.append(line)
        legend.append((one.name, color, GLYPHS[marker] if one.points else "━", one.shown))
    plot.add_tools(HoverTool(tooltips=None, renderers=hoverable, mode="mouse", line_policy="nearest"))
    return Chart(id, alt, dict(json_item(plot, ID(id))), tuple(legend), axes, digits=digits)


def map_chart(id: str, class_names: Sequence[str], count: int) -> Chart:
    """A map of ``count`` images: a renderer per class, a ring for the selected one; the page's script adds points."""
    size = 7 if count < 1500 else 5 if count < 4000 else 4
    plot: Any = figure(height=520, x_range=Range1d(start=0, end=1), y_range=Range1d(start=0, end=1), **_TOOLS)
    plot.toolbar.logo = None
    plot.axis.visible = plot.grid.visible = False
    legend, renderers = [], []
    for c, name in enumerate(class_names):
        color, marker = _style(c)
        points: Any = plot.scatter(
            "x", "y", source=ColumnDataSource({"x": [], "y": [], "k": []}), marker=MARKERS[marker], size=size,
            name=f"s{c}", fill_color=color, fill_alpha=0.65,
            line_color=None if MARKERS[marker] != "plus" else color,
        )  # fmt: skip
        points.nonselection_glyph = points.selection_glyph = None
        renderers.append(points)
        legend.append((name, color, GLYPHS[marker], True))
    plot.scatter(
        "x", "y", source=ColumnDataSource({"x": [], "y": [], "k": []}), size=16, fill_color=None, line_color="#D55E00",
        line_width=3, name="ring",
    )  # fmt: skip
    tap = TapTool(renderers=renderers)
    plot.add_tools(HoverTool(tooltips=None, renderers=renderers), tap)
    plot.toolbar.active_tap = tap
    alt = "Map of embeddings: one point per image, colored by its class. The search below reaches every point."
    return Chart(id, alt, dict(json_item(plot, ID(id))), tuple(legend), kind="map")


def bokeh_script() -> str:
    """Bokeh's own script, some 1.3 MB, which draws the charts."""
    return "\n".join(Resources(mode="inline", components=["bokeh"], minified=True, log_level="error").js_raw)


# Learning curves, and results beside the paper's values.

_METRIC = {"pneumonia": "auc", "nih": "macro_auc", "patchcam": "auc", "aptos": "kappa"}
_THEIRS = ", the paper's"
_NOT_HERE = "not made here"


def _paper_name(kind: str, head: str, backbones: tuple[str, ...]) -> str:
    """The paper's name for a model; empty where it has no such model."""
    if kind in ("probe", "finetune") and head == "linear" and len(backbones) == 1 and backbones[0] in PAPER_NAMES:
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
    return not task.target and layout == task.dataset and task.metric == _METRIC.get(task.dataset)


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
        kind = str(
            (trained_by(first) or {}).get("kind", first.kind)
        )  # of a leaderboard's result: of what was submitted
        own = _paper_name(kind, first.head, first.backbones)
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
    title = f"test {metric_title(task.metric)}"
    grid = Grid(task.title, title, (task.dataset,), tuple(models), tuple(subsets), "subsets")
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


def _sizes(task: Task) -> dict[str, int]:
    """Training labels by subset, named ``S`` or ``M`` where a number is what the paper calls so."""
    return {named_subset(r.dataset, r.subset): r.n_train for r in task.results}


def learning_curves(task: Task, part: Part, id: str) -> Chart:
    """One curve per model with its interval; the paper's linear models dashed, and hidden at first."""
    metric = metric_title(task.metric)
    sign = -1 if is_loss(task.metric) else 1
    ordered = sorted(task.models.items(), key=lambda pair: -max(sign * (r.val_mean or 0.0) for r in pair[1]))
    series = [_curve(name, members, place < SHOWN) for place, (name, members) in enumerate(ordered)]
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
    alt = f"Learning curves: test {metric} over numbers of training labels, {len(ordered)} models; the table below has "
    axes = ("training labels of a fold", f"test {metric}")
    return line_chart(id, series, axes=axes, log_ticks=ticks, alt=alt + "the numbers.")


def _curve(name: str, members: Sequence[Result], shown: bool) -> Series:
    points = sorted(members, key=lambda r: r.n_train)
    means = [float(r.mean or 0.0) for r in points]
    bounds = [r.interval or (mean, mean) for r, mean in zip(points, means, strict=True)]
    low, high = zip(*bounds, strict=True)
    return Series(name, [float(r.n_train) for r in points], means, low, high, shown=shown)
