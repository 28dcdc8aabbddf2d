"""All drawing, the only module that imports matplotlib: figures, and their text with fonts, widths and legends."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager, get_font
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from numpy.typing import NDArray

from embcache.io import write_output
from embcache.log import log

# Okabe and Ito's colors (2008) differ under every common kind of color vision; markers serve print in gray.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_MARKS = 2 * len(_COLORS) * len(_MARKERS)  # filled and outlined
Line = str | tuple[int, tuple[int, ...]]  # a line style of matplotlib
Style = tuple[str, str, Line]  # color, marker and line style of a curve
_LINES: tuple[Line, ...] = ("-", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))  # "--": the paper
_BANDS = 6  # curves of a panel up to which bands can be distinguished
_NUMBERED = 40  # classes up to which the cells of a confusion matrix have room for numbers
_MARGIN = 0.15  # inches at either side of a figure that text keeps free
_ROWS = 24  # of a legend of classes


@dataclass(frozen=True)
class Map:
    """One panel: a title, coordinates (n, 2), classes or numbers (n,), and what is written under it."""

    title: str
    coordinates: NDArray[np.float32]
    labels: NDArray[Any]
    caption: str = ""


@dataclass(frozen=True)
class Curve:
    """One line: x values, y values and a band of the same length (nan: none); dashed and without one for reference.

    Curves of one ``family`` (backbones) share their color, those of one ``method`` (head and kind) their marker.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    dashed: bool = False
    family: str = ""
    method: str = ""


@dataclass(frozen=True)
class CurvePanel:
    """One panel of learning curves: a title, the name of the metric and the lines."""

    title: str
    metric: str
    curves: tuple[Curve, ...]


def _grid(n: int, most: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure with n panels of a size in inches, at most so many per row; and its axes."""
    columns = min(n, most)
    rows = -(-n // columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[n:]:
        axis.set_axis_off()
    return figure, axes[:n]


def plot_maps(maps: Sequence[Map], class_names: Sequence[str], title: str, target: Path) -> Path:
    """Draw maps side by side with one legend; the format follows the target's suffix (PNG, SVG, PDF).

    The legend has the classes that are shown; where there is no room for all, those of most images. Numbers have one
    scale for all panels, without the outermost two percent on either side.
    """
    if maps[0].labels.dtype.kind == "f":
        return _plot_numbered(maps, class_names[0], title, target)
    counts = np.bincount(np.concatenate([panel.labels for panel in maps]), minlength=len(class_names))
    shown = np.flatnonzero(counts).tolist()
    size, least = (9.0, 4.6) if len(shown) <= 8 else (8.0, 6.0) if len(shown) <= 24 else (6.5, 7.5)
    side = max(3.0, least / min(len(maps), 4))  # inches of a panel
    figure, axes = _grid(len(maps), 4, side, side + 0.1)
    handles = {}
    for axis, panel in zip(axes, maps, strict=True):
        for label in shown:
            points = panel.coordinates[panel.labels == label]
            handles[class_names[label]] = axis.scatter(points[:, 0], points[:, 1], s=14, alpha=0.8, **class_mark(label))
        axis.set_title(wrap(panel.title, 10, side - 0.2), fontsize=10)
        axis.set_xlabel(panel.caption, fontsize=7)
        axis.set(xticks=[], yticks=[])
    weights = {class_names[label]: int(counts[label]) for label in shown}
    note = f"Marks come again after {_MARKS} classes." if max(shown) >= _MARKS else ""
    add_legend(figure, handles, size, note, weights)
    add_title(figure, title, 11)
    return _save(figure, target)


def _plot_numbered(maps: Sequence[Map], name: str, title: str, target: Path) -> Path:
    side = max(3.0, 4.6 / min(len(maps), 4))
    figure, axes = _grid(len(maps), 4, side, side + 0.1)
    low, high = np.quantile(np.concatenate([panel.labels for panel in maps]), (0.02, 0.98))
    for axis, panel in zip(axes, maps, strict=True):
        points = axis.scatter(
            *panel.coordinates.T, c=panel.labels, cmap="viridis", vmin=low, vmax=high, s=14, alpha=0.8, linewidths=0
        )
        axis.set_title(wrap(panel.title, 10, side - 0.2), fontsize=10)
        axis.set_xlabel(panel.caption, fontsize=7)
        axis.set(xticks=[], yticks=[])
    figure.colorbar(points, ax=list(axes), shrink=0.7, extend="both").set_label(shorten(name, 8, 3.0), fontsize=8)
    add_title(figure, title, 11)
    return _save(figure, target)


def class_mark(label: int) -> dict[str, Any]:
    """Color and marker of a class: eight pairs that differ in both, then 56 other pairs, then 64 of outlines."""
    turn, place = divmod(label, len(_COLORS))
    color, marker = _COLORS[place], _MARKERS[(place + turn) % len(_MARKERS)]
    if turn // len(_MARKERS) % 2:
        return {"facecolors": "none", "edgecolors": color, "linewidths": 0.8, "marker": marker}
    return {"color": color, "linewidths": 0, "marker": marker}


def plot_curves(panels: Sequence[CurvePanel], title: str, target: Path, *, bands: str = "95 % interval") -> Path:
    """Draw learning curves over a logarithmic axis of training labels, a panel beside the other, one legend beneath.

    ``bands`` says what they show. A panel of more than six curves has thin bars in place of bands.
    """
    styles = curve_styles(panels)
    many = [sum(not curve.dashed for curve in panel.curves) > _BANDS for panel in panels]
    width = max(5.2, 7.2 / min(len(panels), 3) if len(styles) > _BANDS else 0.0)  # inches of a panel
    figure, axes = _grid(len(panels), 3, width, 3.6)
    handles = {}
    for axis, panel, bare in zip(axes, panels, many, strict=True):
        for curve in panel.curves:
            color, marker, line = styles[curve.label]
            size = {"linewidth": 1.2, "markersize": 3} if curve.dashed else {"linewidth": 1.5, "markersize": 5}
            (handles[curve.label],) = axis.plot(
                curve.x, curve.y, color=color, marker=marker, linestyle=line, label=curve.label, **size
            )
            if curve.dashed:
                continue
            if len(curve.x) > 1 and not bare:
                axis.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)
            _bars(axis, curve, color, **({"lw": 0.5, "alpha": 0.5, "capsize": 0} if bare else {}))
        ticks: list[float] = []  # those far enough apart to be labeled
        for x in sorted({x for curve in panel.curves for x in curve.x}):
            if not ticks or x / ticks[-1] > 1.35:
                ticks.append(x)
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{x:,.0f}" for x in ticks], fontsize=8)
        axis.minorticks_off()
        axis.set_xlabel("training labels per fold", fontsize=9)
        axis.set_ylabel(panel.metric, fontsize=9)
        axis.set_title(wrap(panel.title, 10, width - 0.6), fontsize=10)
        axis.grid(alpha=0.25)
    if any(many):
        bands += f"; bands only in panels of up to {_BANDS} curves"
    add_legend(figure, {label: handles[label] for label in styles}, 8, f"bars: {bands}")
    add_title(figure, title, 11)
    return _save(figure, target)


def _bars(axis: Any, curve: Curve, color: str, **style: Any) -> None:
    """The intervals of a curve's points as thin bars."""
    errors = np.clip([np.subtract(curve.y, curve.low), np.subtract(curve.high, curve.y)], 0, None)
    axis.errorbar(curve.x, curve.y, yerr=errors, fmt="none", ecolor=color, **{"lw": 0.8, "capsize": 2, **style})


def curve_styles(panels: Sequence[CurvePanel]) -> dict[str, Style]:
    """Color, marker and line style by label, each once in a figure and the same in all of its panels.

    The color shows the backbones, the marker (with more than eight the line style, too) head and kind; in a figure of
    one family or one method the color distinguishes curves. The paper's curve has our one's color and marker, dashed.
    """
    curves = {curve.label: curve for panel in panels for curve in panel.curves}
    ours = {label: label.removesuffix(", paper") for label in curves}
    own = [curve for label, curve in curves.items() if not curve.dashed or ours[label] not in curves]
    families = list(dict.fromkeys(curve.family or curve.label for curve in own))
    methods = list(dict.fromkeys(curve.method for curve in own))
    styles: dict[str, Style] = {}
    for k, curve in enumerate(own):
        family, method = families.index(curve.family or curve.label), methods.index(curve.method)
        if len(families) == 1 or len(methods) == 1:
            family = method = k
        lines: tuple[Line, ...] = ("--",) if curve.dashed else _LINES
        line = lines[method // len(_MARKERS) % len(lines)]
        wanted = (_COLORS[family % len(_COLORS)], _MARKERS[method % len(_MARKERS)], line)
        # Of one family and method (two recipes, or a ninth color): the same marker on another line, then any.
        places = sorted(product(lines, _MARKERS), key=lambda place: place[1] != wanted[1])
        others = ((color, marker, line) for color in (wanted[0], *_COLORS) for line, marker in places)
        taken = set(styles.values())
        styles[curve.label] = next((style for style in (wanted, *others) if style not in taken), wanted)
    return {label: styles.get(label) or (*styles[ours[label]][:2], "--") for label in curves}


def plot_attention(
    weights: NDArray[np.float32], mass: NDArray[np.float64], names: Sequence[str], titles: tuple[str, str], target: Path
) -> Path:
    """Draw a mean attention map (N, N) above its sums by backbone (B, B); rows attend to columns.

    ``titles`` are those of the map and of the figure.
    """
    figure = Figure(figsize=(4.8, 7.4), layout="constrained")
    above, below = figure.subplots(2, 1)
    n, each = len(weights), len(weights) // len(names)
    # Nearly all of 1536 × 1536 weights lie close to 1/1536 and a few far off: the scale leaves out the outermost
    # half percent on either side, so that the pattern is seen; the sums below have the whole scale.
    low, high = np.quantile(weights, (0.005, 0.995))
    image = above.imshow(weights, cmap="viridis", vmin=float(low), vmax=float(high))
    figure.colorbar(image, ax=above, shrink=0.7, extend="both")
    for edge in range(each, n, each):
        above.axhline(edge - 0.5, color="white", lw=0.6)
        above.axvline(edge - 0.5, color="white", lw=0.6)
    figure.colorbar(below.imshow(mass, cmap="viridis", vmin=0.0, vmax=1.0), ax=below, shrink=0.7)
    for (row, column), value in np.ndenumerate(mass):
        color = "white" if value < 0.6 else "black"
        below.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize=9)
    short = [shorten(name, 8, 1.3) for name in names]
    for axis, places in ((above, np.arange(len(names)) * each + each / 2 - 0.5), (below, np.arange(len(names)))):
        axis.set_xticks(places, short, fontsize=8, rotation=30, ha="right")
        axis.set_yticks(places, short, fontsize=8)
    above.set_title(wrap(titles[0], 9, 2.6), fontsize=9)
    below.set_title(wrap("attention of a row's tokens to a column's, summed", 8, 2.4), fontsize=8)
    add_title(figure, titles[1], 11)
    return _save(figure, target)


@dataclass(frozen=True)
class Picture:
    """One image of a contact sheet: uint8 (H, W, 3) or None where it is missing, the text under it, a mark."""

    pixels: NDArray[np.uint8] | None
    caption: str
    marked: bool = False


def plot_sheet(rows: Sequence[tuple[str, Sequence[Picture]]], title: str, target: Path) -> Path:
    """Draw rows of images, each row with its name; marked images have a colored frame."""
    columns = max(len(cells) for _, cells in rows)
    figure = Figure(figsize=(1.5 * columns + 0.4, 1.95 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, cells) in zip(axes, rows, strict=True):
        for axis in line:
            axis.set(xticks=[], yticks=[])
        for axis, cell in zip(line, cells, strict=False):
            if cell.pixels is None:
                axis.text(0.5, 0.5, "missing", ha="center", va="center", fontsize=8, transform=axis.transAxes)
            else:
                axis.imshow(cell.pixels)
            caption = "\n".join(shorten(line, 6, 1.4) for line in cell.caption.split("\n"))
            axis.set_xlabel(caption, fontsize=6)
            for spine in axis.spines.values():
                spine.set_color(_COLORS[5] if cell.marked else "0.7")
                spine.set_linewidth(2.5 if cell.marked else 0.8)
        line[0].set_ylabel(wrap(name, 8, 1.4), fontsize=8)
        for axis in line[len(cells) :]:
            axis.set_axis_off()
    add_title(figure, title, 10)
    return _save(figure, target)


def plot_rates(
    curves: Sequence[Curve],
    title: str,
    target: Path,
    *,
    axes: tuple[str, str],
    reference: float | Literal["diagonal"] | None = None,
    points: bool = False,
    counts: Sequence[int] = (),
    note: str = "",
) -> Path:
    """Draw curves over the unit square, a legend of their labels beneath."""
    labels = [wrap(curve.label, 8, 5.7) for curve in curves if curve.label]
    note = wrap(note, 8, 6.1)
    lines = sum(label.count("\n") + 1 for label in labels) + 1 + note.count("\n")
    figure = Figure(figsize=(6.4, 5.9 + 0.17 * lines + (1.0 if counts else 0.0)), layout="constrained")
    ratios = (5.2, 1.0) if counts else (1.0,)
    above, *below = figure.subplots(len(ratios), 1, squeeze=False, height_ratios=ratios, sharex=True)[:, 0]
    families = list(dict.fromkeys(curve.family for curve in curves))
    if reference is not None:
        ends = (0, 1) if reference == "diagonal" else (reference, reference)
        above.plot((0, 1), ends, color="0.6", linewidth=0.8, zorder=1)
    handles = []
    for curve in curves:
        place = families.index(curve.family)
        color = _COLORS[place % len(_COLORS)]
        line = "--" if curve.dashed else _LINES[place // len(_COLORS) % len(_LINES)]
        width = 1.8 if curve.label else 0.9
        marker = {"marker": _MARKERS[place % len(_MARKERS)], "markersize": 4.5} if points and curve.label else {}
        (handle,) = above.plot(curve.x, curve.y, color=color, linestyle=line, linewidth=width, **marker)
        handles += [handle] if curve.label else []
        if not np.isfinite(curve.low).any():
            continue
        if points:
            _bars(above, curve, color)
        else:
            above.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.15, linewidth=0)
    above.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal" if not counts else "auto")
    above.set_ylabel(axes[1], fontsize=9)
    above.grid(alpha=0.25)
    for strip in below:
        edges = np.linspace(0, 1, len(counts) + 1)
        bars = strip.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color="0.75", edgecolor="white")
        strip.bar_label(bars, [f"{count:,}" if count else "" for count in counts], fontsize=7)
        strip.set_ylabel("images", fontsize=8)
        strip.set_ylim(0, max(counts) * 1.35)
        strip.tick_params(axis="y", labelsize=7)
    (below or [above])[-1].set_xlabel(axes[0], fontsize=9)
    above.set_title(wrap(title, 10, 5.6), fontsize=10)
    figure.legend(
        handles, labels, loc="outside lower center", ncols=1, frameon=False, fontsize=8, title=note or None,
        title_fontsize=8, alignment="left",
    )  # fmt: skip
    return _save(figure, target)


def plot_numbers(
    y: NDArray[np.float64], predicted: NDArray[np.float64], name: str, words: str, title: str, target: Path,
    agreement: Sequence[float] | None = None, *, note: str = "",
) -> Path:  # fmt: skip
    """Draw predictions over true numbers (n,) with the identity; with mean and limits of errors, these instead."""
    words, note = wrap(words, 8, 5.7), wrap(note, 8, 6.1)
    figure = Figure(figsize=(6.4, 5.9 + 0.17 * (words.count("\n") + note.count("\n") + 2)), layout="constrained")
    axis = figure.subplots()
    x, values = (y, predicted) if agreement is None else (predicted, predicted - y)
    size, alpha = (14, 0.6) if len(y) < 1_000 else (6, 0.35)
    points = axis.scatter(x, values, s=size, alpha=alpha, color=_COLORS[0], linewidths=0, rasterized=len(y) > 5_000)
    if agreement is None:
        ends = min(y.min(), predicted.min()), max(y.max(), predicted.max())
        axis.plot(ends, ends, color="0.4", linewidth=1.0)
        axis.set(aspect="equal")
    else:
        for level, line in zip(agreement, ("-", "--", "--"), strict=True):
            axis.axhline(level, color=_COLORS[5], linestyle=line, linewidth=1.2)
        axis.axhline(0.0, color="0.6", linewidth=0.8, zorder=0)
    short = shorten(name, 9, 3.0)
    labels = (f"{short}, true", f"{short}, predicted")
    axis.set_xlabel(labels[agreement is not None], fontsize=9)
    axis.set_ylabel(labels[1] if agreement is None else "error: predicted − true", fontsize=9)
    axis.grid(alpha=0.25)
    axis.set_title(wrap(title, 10, 5.6), fontsize=10)
    figure.legend(
        [points], [words], loc="outside lower center", frameon=False, fontsize=8, title=note or None, title_fontsize=8,
        alignment="left",
    )  # fmt: skip
    return _save(figure, target)


def plot_confusion(
    counts: NDArray[np.int64], names: Sequence[str], title: str, target: Path, columns: Sequence[str] = ()
) -> Path:
    """Draw a confusion matrix (C, C), rows true: counts, and shares of their row, which color the cells too.

    With ``columns`` those of findings (L, 4): of images with and without each, shares of either.
    """
    n, across = len(names), columns or names
    each = 0.85 if n <= 10 else 0.6 if n <= 20 else 0.42 if n <= _NUMBERED else 0.14
    wide = max(each, 0.85) if columns else each
    size = 5.5 if each < 0.5 else 7 if n > 10 else 9
    small = 8 if n <= 20 else 6 if n <= _NUMBERED else 4
    shown, above = ([shorten(name, small, 1.6) for name in of] for of in (names, across))
    room = max(text_width(name, small) for name in (*shown, *above))  # inches of names beside and below
    figure = Figure(
        figsize=(max(4.2, wide * len(across) + 1.9 + room), max(3.6, each * n + 1.2 + room)), layout="constrained"
    )
    axis = figure.subplots()
    sides = counts.reshape(n, 2 if columns else 1, -1)
    rows = sides.sum(2, keepdims=True)
    shares = (sides / np.maximum(rows, 1)).reshape(counts.shape)
    image = axis.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto" if columns else "equal")
    word = "share of those with or without it" if columns else "share of the row"
    figure.colorbar(image, ax=axis, shrink=0.7).set_label(word, fontsize=8)
    if n <= _NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            there = rows[row, column // sides.shape[2], 0]
            share = f"\n{shares[row, column]:.0%}".replace("%", " %") if there else ""
            color = "white" if shares[row, column] > 0.55 else "black"
            axis.text(column, row, f"{count:,}{share}", ha="center", va="center", color=color, fontsize=size)
    turned: dict[str, Any] = {"rotation": 40, "ha": "right"} if n <= _NUMBERED else {"rotation": 90, "ha": "center"}
    axis.set_xticks(range(len(across)), above, fontsize=small, **turned)
    labels = [f"{name} ({int(n_of):,})" for name, n_of in zip(shown, rows[:, 0, 0], strict=True)]
    axis.set_yticks(range(n), labels, fontsize=small)
    axis.set_xlabel("" if columns else "predicted class", fontsize=9)
    axis.set_ylabel("finding (test images with it)" if columns else "true class (test images)", fontsize=9)
    add_title(figure, title, 10)
    return _save(figure, target)


def plot_heads(pixels: NDArray[np.uint8], heads: NDArray[np.float32], title: str, target: Path) -> Path:
    """Draw an image, the mean of attention maps (heads, rows, columns), and each of them over the image."""
    maps = [("the image", None), ("mean", heads.mean(0)), *((f"head {h}", one) for h, one in enumerate(heads))]
    figure, axes = _grid(len(maps), 4, 1.9, 2.1)
    height, width = pixels.shape[:2]
    for axis, (name, values) in zip(axes, maps, strict=True):
        axis.set_axis_off()
        axis.imshow(pixels)
        if values is not None:
            # Each on a scale of its own up to its 99.5th percentile: heads differ in how sharp they look.
            axis.imshow(
                values, cmap="inferno", alpha=0.65, extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                vmin=0.0, vmax=float(max(np.quantile(values, 0.995), 1e-12)), interpolation="nearest",
            )  # fmt: skip
        axis.set_title(name, fontsize=8)
    add_title(figure, title, 9)
    return _save(figure, target)


def _save(figure: Figure, target: Path) -> Path:
    """Write a figure in the format of the target's suffix, whole or not at all."""
    drawn = BytesIO()
    use_fonts(figure)
    with no_warnings():
        figure.savefig(drawn, dpi=300, format=target.suffix.lstrip(".").lower() or None)
    return write_output(target, drawn.getvalue(), parents=True)


# Text


@contextmanager
def no_warnings() -> Iterator[None]:
    """Silence matplotlib: `use_fonts` says what is missing."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def use_fonts(figure: Figure) -> None:
    """Set fonts that have the characters of each text; log one line where no installed font has some of them."""
    texts = figure.findobj(Text)
    for text in texts:
        text.set_fontfamily(_families(text.get_text()))
        text.set_parse_math(False)  # a dollar sign in a name is one
    missing = {c for text in texts for c in text.get_text() if _foreign(c) and _family_with(c) is None}
    if missing:
        _warn_of_missing("".join(sorted(missing)))


def text_width(text: str, size: float) -> float:
    """Inches that the longest line of a text takes at a size in points."""
    font = FontProperties(family=_families(text), size=size)
    with no_warnings():
        widths = [text_to_path.get_text_width_height_descent(line, font, ismath=False)[0] for line in text.split("\n")]
    return float(max(widths)) / 72 * 1.02  # rounded to pixels, letters may take more


def wrap(text: str, size: float, inches: float) -> str:
    """A text with line breaks between words, or within those that are too long, so that it fits a width."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and text_width(longer, size) > inches:
                lines.append(line)
                longer = word
            while text_width(longer, size) > inches and len(longer) > 1:
                shorter = range(len(longer) - 1, 1, -1)
                kept = next((k for k in shorter if text_width(longer[:k], size) <= inches), 1)
                lines.append(longer[:kept])
                longer = longer[kept:]
            line = longer
        lines.append(line)
    return "\n".join(lines)


def shorten(text: str, size: float, inches: float) -> str:
    """A text without its middle where it would not fit a width: names often differ at their ends."""
    short, kept = text, len(text)
    while text_width(short, size) > inches and kept > 2:
        kept -= 1
        short = f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
    return short


def add_title(figure: Figure, title: str, size: float) -> None:
    """A title above all, with as many lines as it needs."""
    figure.suptitle(wrap(title, size, figure.get_figwidth() - 2 * _MARGIN), fontsize=size)


def add_legend(
    figure: Figure, handles: Mapping[str, Any], size: float, title: str, weights: Mapping[str, int] | None = None
) -> None:
    """A legend beneath all, in as many columns as fit; the figure grows by its height.

    Of classes, which have ``weights``, it may leave out some.
    """
    handle = 2.0 if weights is None else 1.0  # lines are longer than points, in ems
    em, room = size / 72, figure.get_figwidth() - 2 * _MARGIN
    texts = {label: shorten(label, size, room - (handle + 0.5) * em) for label in handles}
    entry = max(text_width(text, size) for text in texts.values()) + (handle + 0.5 + 1.5) * em
    columns = min(max(1, int((room + 1.5 * em) / entry)), len(texts))
    lines = [title] if title else []
    if weights is not None and len(texts) > columns * _ROWS:
        kept = set(sorted(texts, key=lambda label: -weights[label])[: columns * _ROWS])
        lines.append(f"Legend: the {len(kept)} classes with most images, of {len(texts)} that are shown.")
        texts = {label: text for label, text in texts.items() if label in kept}
    if any(text != label for label, text in texts.items()):
        lines.append("Long names are shortened.")
    heading = wrap("\n".join(lines), size, room) if lines else ""
    rows = -(-len(texts) // columns)
    columns = -(-len(texts) // rows)
    figure.set_figheight(figure.get_figheight() + (rows * 1.55 + (heading.count("\n") + 1.5 if lines else 0) + 1) * em)
    figure.legend(
        [handles[label] for label in texts], list(texts.values()),
        loc="outside lower center", ncols=columns, frameon=False, fontsize=size,
        title=heading or None, title_fontsize=size,
        handlelength=handle, handletextpad=0.5, columnspacing=1.5, labelspacing=0.35, borderpad=0.2,
    )  # fmt: skip


def _families(text: str) -> list[str]:
    """The usual family, and those that have what it lacks."""
    others = (_family_with(c) for c in sorted(set(text)) if _foreign(c))
    return list(dict.fromkeys([*matplotlib.rcParams["font.family"], *filter(None, others)]))


@functools.cache
def _foreign(character: str) -> bool:
    """Whether the usual font lacks a character."""
    return character.isprintable() and not get_font(findfont(FontProperties())).get_char_index(ord(character))


@functools.cache
def _family_with(character: str) -> str | None:
    """An installed family that has a character."""
    with no_warnings():
        for family in _installed():
            if get_font(findfont(FontProperties(family=[family]))).get_char_index(ord(character)):
                return family
    return None


@functools.cache
def _installed() -> tuple[str, ...]:
    """Families, upright and sans serif first, also of fonts that matplotlib's own list does not know yet."""
    known = {str(entry.fname) for entry in fontManager.ttflist}
    for path in findSystemFonts():
        if str(path) not in known:
            try:
                fontManager.addfont(path)
            except (OSError, RuntimeError):
                continue  # not a font, or one that FreeType cannot read
    entries = [entry for entry in fontManager.ttflist if not entry.name.startswith("Last Resort")]
    entries.sort(key=lambda entry: ("Sans" not in entry.name, entry.style != "normal", entry.name))
    return tuple(dict.fromkeys(entry.name for entry in entries))


@functools.cache
def _warn_of_missing(characters: str) -> None:
    log.warning(
        "figure: no installed font has the characters %s, so they are boxes; install one, such as Noto Sans or Noto "
        "Sans CJK (Debian and Ubuntu: apt install fonts-noto-core fonts-noto-cjk)", " ".join(characters[:5]),
    )  # fmt: skip
