"""All drawing; the only module that imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from embcache.paths import replace_file

# Okabe and Ito's colours (2008), told apart with every common kind of colour vision; markers serve print in grey.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True)
class Map:
    """One panel: a title, coordinates (n, 2) and labels (n,)."""

    title: str
    coordinates: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Curve:
    """One line: x values, y values and a band of the same length; dashed and without a band for reference."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    dashed: bool = False


@dataclass(frozen=True)
class CurvePanel:
    """One panel of learning curves: a title, the name of the metric and the lines."""

    title: str
    metric: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class AttentionPanel:
    """One mean attention map (N, N), the backbones its tokens are of, and attention by backbone (B, B)."""

    title: str
    backbones: tuple[str, ...]
    weights: NDArray[np.float32]
    mass: NDArray[np.float64]


def plot_maps(maps: Sequence[Map], class_names: Sequence[str], title: str, target: Path) -> Path:
    """Draw maps side by side with one legend; the format follows the target's suffix (PNG, SVG, PDF)."""
    columns = min(len(maps), 4)
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(3.0 * columns, 3.1 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, panel in zip(axes, maps, strict=False):
        for label, name in enumerate(class_names):
            points = panel.coordinates[panel.labels == label]
            axis.scatter(
                points[:, 0], points[:, 1], s=14, alpha=0.8, linewidths=0, label=_plain(name),
                color=_COLOURS[label % len(_COLOURS)], marker=_MARKERS[label % len(_MARKERS)],
            )  # fmt: skip
        axis.set_title(_plain(panel.title), fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    for axis in axes[len(maps) :]:
        axis.set_axis_off()
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 6), frameon=False, fontsize=9)
    figure.suptitle(_plain(title), fontsize=11)
    return _save(figure, target)


def plot_curves(panels: Sequence[CurvePanel], title: str, target: Path) -> Path:
    """Draw learning curves over a logarithmic axis of training labels, a panel beside the other.

    A curve that is dashed, the paper's, has the colour of the one whose label begins its own.
    """
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    most = max(len(panel.curves) for panel in panels)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows + 0.22 * most + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, panel in zip(axes, panels, strict=False):
        own = [curve for curve in panel.curves if not curve.dashed]
        place = {curve.label: i for i, curve in enumerate(own)}
        for curve in panel.curves:
            i = place.get(curve.label if not curve.dashed else curve.label.removesuffix(", paper"), len(own))
            colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
            style = {"linestyle": "--", "linewidth": 1.2, "markersize": 3} if curve.dashed else {"markersize": 5}
            axis.plot(curve.x, curve.y, color=colour, marker=marker, label=_plain(curve.label), **style)
            if curve.dashed:
                continue
            if len(curve.x) > 1:
                axis.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
            errors = [np.subtract(curve.y, curve.low), np.subtract(curve.high, curve.y)]
            axis.errorbar(curve.x, curve.y, yerr=np.clip(errors, 0, None), fmt="none", ecolor=colour, capsize=2, lw=0.8)
        ticks = sorted({x for curve in panel.curves for x in curve.x})
        axis.set_xscale("log")
        axis.set_xticks(_apart(ticks), [f"{x:,.0f}" for x in _apart(ticks)], fontsize=8)
        axis.minorticks_off()
        axis.set_xlabel("training labels of a fold", fontsize=9)
        axis.set_ylabel(panel.metric, fontsize=9)
        axis.set_title(_plain(panel.title), fontsize=10)
        axis.grid(alpha=0.25)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), fontsize=8, frameon=False)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(_plain(title), fontsize=11)
    return _save(figure, target)


def _apart(ticks: Sequence[float]) -> list[float]:
    """Those of some ascending positions that are far enough apart on a logarithmic axis to be labelled."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or tick / kept[-1] > 1.35:
            kept.append(tick)
    return kept


def plot_attention(panels: Sequence[AttentionPanel], title: str, target: Path) -> Path:
    """Draw mean attention maps above their sums by backbone; rows attend to columns."""
    columns = len(panels)
    figure = Figure(figsize=(3.6 * columns + 0.4, 7.4), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    for (above, below), panel in zip(axes.T, panels, strict=True):
        n, each = len(panel.weights), len(panel.weights) // len(panel.backbones)
        # Nearly all of 1536 × 1536 weights lie close to 1/1536 and a few far off: the scale leaves out the outermost
        # half percent on either side, so that the pattern is seen; the sums below have the whole scale.
        low, high = np.quantile(panel.weights, (0.005, 0.995))
        image = above.imshow(panel.weights, cmap="viridis", vmin=float(low), vmax=float(high))
        figure.colorbar(image, ax=above, shrink=0.7, extend="both")
        centres = np.arange(len(panel.backbones)) * each + each / 2 - 0.5
        for edge in range(each, n, each):
            above.axhline(edge - 0.5, color="white", lw=0.6)
            above.axvline(edge - 0.5, color="white", lw=0.6)
        table = below.imshow(panel.mass, cmap="viridis", vmin=0.0, vmax=1.0)
        figure.colorbar(table, ax=below, shrink=0.7)
        for (row, column), value in np.ndenumerate(panel.mass):
            colour = "white" if value < 0.6 else "black"
            below.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
        names = [_plain(name) for name in panel.backbones]
        for axis, places in ((above, centres), (below, np.arange(len(names)))):
            axis.set_xticks(places, names, fontsize=8, rotation=30, ha="right")
            axis.set_yticks(places, names, fontsize=8)
        above.set_title(_plain(panel.title), fontsize=10)
        below.set_title("attention of a row's tokens to a column's, summed", fontsize=8)
    figure.suptitle(_plain(title), fontsize=11)
    return _save(figure, target)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")


def _save(figure: Figure, target: Path) -> Path:
    """Write a figure in the format of the target's suffix, whole or not at all."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=150, format=target.suffix.lstrip(".").lower() or None)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, drawn.getvalue())
    return target
