"""All drawing; the only module that imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

# Okabe and Ito's colours (2008), told apart with every common kind of colour vision; markers serve print in grey.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True)
class Map:
    """One panel: a title, coordinates (n, 2) and labels (n,)."""

    title: str
    coordinates: NDArray[np.float32]
    labels: NDArray[np.int64]


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
                points[:, 0], points[:, 1], s=14, alpha=0.8, linewidths=0, label=name.replace("$", r"\$"),
                color=_COLOURS[label % len(_COLOURS)], marker=_MARKERS[label % len(_MARKERS)],
            )  # fmt: skip
        axis.set_title(panel.title.replace("$", r"\$"), fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    for axis in axes[len(maps) :]:
        axis.set_axis_off()
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 6), frameon=False, fontsize=9)
    figure.suptitle(title.replace("$", r"\$"), fontsize=11)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    return target
