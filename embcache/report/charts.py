"""Charts by Bokeh, as JSON data that its script draws in the page.

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

# Distinct with every common kind of color vision (after Okabe and Ito, 2008), and visible on white and on black.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8A8A8A", "#A6761D")
MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "plus", "star", "hex")
GLYPHS = ("●", "■", "▲", "◆", "▼", "✚", "★", "⬢")
_DASHES = ("solid", "dotted", "dotdash")
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
        return {
            "id": self.id, "item": self.item, "kind": self.kind, "axes": list(self.axes), "digits": list(self.digits),
            "series": [{"name": name, "shown": shown} for name, _, _, shown in self.legend],
        }  # fmt: skip


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
        line: Any = plot.line(
            x, y, line_color=color, line_dash=dash, line_width=2, line_alpha=0.7 if one.dashed else 1, **common
        )
        if one.points:
            counts = {"n": list(one.counts)} if one.counts else {}
            line = plot.scatter(
                "x", "y", source=ColumnDataSource({"x": x, "y": y, **counts}), marker=MARKERS[marker], size=8,
                color=color, fill_alpha=0.3 if one.dashed else 1, **common,
            )  # fmt: skip
        hoverable.append(line)
        legend.append((one.name, color, GLYPHS[marker] if one.points else "━", one.shown))
    plot.add_tools(HoverTool(tooltips=None, renderers=hoverable, mode="mouse", line_policy="nearest"))
    return Chart(id, alt, dict(json_item(plot, ID(id))), tuple(legend), axes, digits=digits)


def map_chart(id: str, class_names: Sequence[str], count: int, *, alt: str) -> Chart:
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
    return Chart(id, alt, dict(json_item(plot, ID(id))), tuple(legend), kind="map")


def bokeh_script() -> str:
    """Bokeh's own script, some 1.3 MB, which draws the charts."""
    return "\n".join(Resources(mode="inline", components=["bokeh"], minified=True, log_level="error").js_raw)
