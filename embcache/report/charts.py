"""Charts by Bokeh, as data that its script draws in the page.

No text of a user goes into a chart: Bokeh reads titles, labels and tooltips as HTML or TeX where they look like it.
Legends and tooltips are the page's own HTML, filled as text; a chart holds numbers, and names of its own making.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bokeh.core.types import ID
from bokeh.embed import json_item
from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, NumeralTickFormatter, Range1d, TapTool
from bokeh.plotting import figure
from bokeh.resources import Resources

# Told apart with every common kind of color vision (after Okabe and Ito, 2008), and visible on white and on black.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8A8A8A", "#A6761D")
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "plus", "star", "hex")
GLYPHS = ("●", "■", "▲", "◆", "▼", "✚", "★", "⬢")
_DASHES = ("solid", "dotted", "dotdash")


@dataclass(frozen=True)
class Series:
    """One line with a band."""

    name: str  # in the legend
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    dashed: bool = False  # for reference
    shown: bool = True  # at first; the legend toggles it
    points: bool = True  # whether its points are marked
    counts: tuple[int, ...] = ()  # images behind each point, for the tooltip; empty for none


@dataclass(frozen=True)
class Key:
    """One entry of a legend: its text, color, a glyph in that color, whether it is shown at first."""

    name: str
    color: str
    glyph: str
    shown: bool = True


@dataclass(frozen=True)
class Chart:
    """A chart for the page."""

    id: str  # of the element that it is drawn in
    alt: str  # what it shows, for who cannot see it
    item: dict[str, Any]  # bokeh's document and roots, as JSON data
    legend: tuple[Key, ...]
    axes: tuple[str, str]  # names of x and y, for the page's own tooltip
    kind: str = "line"
    digits: tuple[int, int] = field(default=(0, 3))

    def data(self) -> dict[str, Any]:
        """What the page's script needs."""
        return {
            "id": self.id, "item": self.item, "kind": self.kind, "axes": list(self.axes), "digits": list(self.digits),
            "series": [{"name": key.name, "shown": key.shown} for key in self.legend],
        }  # fmt: skip


def line_chart(
    id: str,
    series: Sequence[Series],
    *,
    alt: str,
    axes: tuple[str, str],
    log_x: bool = False,
    ticks: Sequence[float] = (),
    square: bool = False,
    digits: tuple[int, int] = (0, 3),
) -> Chart:
    """Lines with bands over one x axis."""
    ranges: dict[str, Any] = {"x_range": (-0.01, 1.01), "y_range": (-0.01, 1.01)} if square else {}
    plot: Any = figure(
        height=360 if square else 340, sizing_mode="stretch_width", x_axis_type="log" if log_x else "auto",
        x_axis_label=axes[0], y_axis_label=axes[1], **ranges,
        tools="pan,box_zoom,wheel_zoom,reset,save", toolbar_location="above", active_scroll=None, active_drag=None,
    )  # fmt: skip
    plot.toolbar.logo = None
    if ticks:
        plot.xaxis.ticker = FixedTicker(ticks=sorted(set(ticks)))
        plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    if square:
        plot.line([0, 1], [0, 1], line_color="#8A8A8A", line_dash="dashed", line_width=1, name="diagonal")
    keys: list[Key] = []
    hoverable: list[Any] = []
    for place, one in enumerate(series):
        color = COLORS[place % len(COLORS)]
        marker = (place + place // len(COLORS)) % len(MARKERS)  # another shape when colors come again
        dash = "dashed" if one.dashed else _DASHES[place // len(COLORS) % len(_DASHES)]
        name, x, y = f"s{place}", list(one.x), list(one.y)
        if one.low:
            plot.varea(
                x, list(one.low), list(one.high), fill_color=color, fill_alpha=0.13, name=name, visible=one.shown
            )
        line: Any = plot.line(
            x, y, line_color=color, line_dash=dash, line_width=2, name=name, visible=one.shown,
            line_alpha=0.7 if one.dashed else 1,
        )  # fmt: skip
        if one.points:
            own = _source({"x": x, "y": y, **({"n": list(one.counts)} if one.counts else {})})
            line = plot.scatter(
                "x", "y", source=own, marker=MARKERS[marker], size=8, color=color, name=name, visible=one.shown,
                fill_alpha=0.3 if one.dashed else 1,
            )  # fmt: skip
        hoverable.append(line)
        keys.append(Key(one.name, color, GLYPHS[marker] if one.points else "━", one.shown))
    plot.add_tools(HoverTool(tooltips=None, renderers=hoverable, mode="mouse", line_policy="nearest"))
    return Chart(id, alt, _item(plot, id), tuple(keys), axes, digits=digits)


def map_chart(id: str, class_names: Sequence[str], count: int, *, alt: str) -> Chart:
    """A map of ``count`` images, a renderer a class and a ring for what is picked; the page's script puts points in."""
    size = 7 if count < 1500 else 5 if count < 4000 else 4
    plot: Any = figure(
        height=520, sizing_mode="stretch_width", tools="pan,box_zoom,wheel_zoom,reset,save", toolbar_location="above",
        active_scroll=None, active_drag=None, x_range=Range1d(start=0, end=1), y_range=Range1d(start=0, end=1),
    )  # fmt: skip
    plot.toolbar.logo = None
    plot.axis.visible = False
    plot.grid.visible = False
    keys: list[Key] = []
    renderers: list[Any] = []
    for c, name in enumerate(class_names):
        shape = (c + c // len(COLORS)) % len(MARKERS)  # another one when colors come again
        color, marker = COLORS[c % len(COLORS)], MARKERS[shape]
        points = plot.scatter(
            "x", "y", source=_source({"x": [], "y": [], "k": []}), marker=marker, size=size, name=f"s{c}",
            fill_color=color, fill_alpha=0.65, line_color=None if marker != "plus" else color,
        )  # fmt: skip
        points.nonselection_glyph = None
        points.selection_glyph = None
        renderers.append(points)
        keys.append(Key(name, color, GLYPHS[shape]))
    plot.scatter(
        "x",
        "y",
        source=_source({"x": [], "y": [], "k": []}),
        size=16,
        fill_color=None,
        line_color="#D55E00",
        line_width=3,
        name="ring",
    )
    tap = TapTool(renderers=renderers)
    plot.add_tools(HoverTool(tooltips=None, renderers=renderers), tap)
    plot.toolbar.active_tap = tap
    return Chart(id, alt, _item(plot, id), tuple(keys), ("", ""), kind="map")


def _source(columns: dict[str, Any]) -> Any:
    return ColumnDataSource(columns)


def _item(plot: Any, id: str) -> dict[str, Any]:
    plot.background_fill_color = None
    plot.border_fill_color = None
    plot.min_border_left = 8
    return dict(json_item(plot, ID(id)))


def bokeh_script() -> str:
    """Bokeh's own script, some 1.3 MB: what draws the charts."""
    return "\n".join(Resources(mode="inline", components=["bokeh"], minified=True, log_level="error").js_raw)
