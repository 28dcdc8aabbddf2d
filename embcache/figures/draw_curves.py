"""Learning curves as figures: of saved results, and of a table with the paper's values dashed beside ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from embcache.figures.plots import Curve, CurvePanel, plot_curves
from embcache.paths import PathLike, home_dir, slug
from embcache.results.curves import band_words, by_task, curve_table, metric_words, named_curves
from embcache.results.layout import Table
from embcache.results.paper import Cell, Grid, Model
from embcache.runs.folders import Result


def draw_curves(
    results: Sequence[Result], *, home: PathLike | None = None, target: Path | None = None
) -> tuple[Table, Path]:
    """Draw scored results, one panel per dataset and metric, and lay them out as a table."""
    names = list(dict.fromkeys(result.dataset for result in results))
    folder = home_dir(home) / slug(names[0]) / "figures" if len(names) == 1 else home_dir(home)
    panels, path = curve_panels(results), target or folder / "curves.png"
    return curve_table(results), plot_curves(panels, "Learning curves", path, bands=band_words(results))


def curve_panels(results: Sequence[Result]) -> list[CurvePanel]:
    """One panel per dataset and metric, one curve per model and protocol.

    A point is the mean over folds at the number of training labels per fold, its band the saved 95 % interval
    (`band_words` names it); of a leaderboard's scores ± one sd. Results without a score are left out.
    """
    panels = []
    for (dataset, target, *_), members in by_task(results).items():
        title = dataset + (f", {target}" if target else "") + (" (synthetic)" if members[0].synthetic else "")
        curves = tuple(_curve(label, own) for label, own in named_curves(members).items())
        panels.append(CurvePanel(title, metric_words(members[0]), curves))
    return panels


def table_curves(grid: Grid, cells: Sequence[Cell]) -> list[CurvePanel]:
    """The curves of a table: ours with their intervals, the paper's dashed."""
    panels = []
    for dataset in grid.datasets:
        ours: list[Curve] = []
        paper: list[Curve] = []
        metric = ""
        for model in grid.models:
            at = [cell for cell in cells if cell.dataset == dataset and cell.model == model]
            scored = [cell.result for cell in at if cell.result is not None and cell.result.mean is not None]
            if scored:
                metric = metric_words(scored[0])
                ours.append(_curve(model.label, scored))
            paper += _paper_curve(model, at)
        if ours:
            panels.append(CurvePanel(dataset, metric, (*ours, *paper)))
    return panels


def _curve(label: str, results: Sequence[Result]) -> Curve:
    points = sorted({r.n_train: r for r in results}.values(), key=lambda r: r.n_train)
    bounds = [r.interval or _spread(r) for r in points]
    return Curve(
        label, tuple(float(r.n_train) for r in points), tuple(float(r.mean or 0.0) for r in points),
        tuple(low for low, _ in bounds), tuple(high for _, high in bounds),
        family=" + ".join(results[0].backbones), method=f"{results[0].head}, {results[0].kind}",
    )  # fmt: skip


def _spread(result: Result) -> tuple[float, float]:
    """Where there is no interval: nothing, but of a leaderboard's scores ± one sd."""
    if result.estimate is not None:
        return math.nan, math.nan
    mean, sd = result.mean or 0.0, result.std or 0.0
    return mean - sd, mean + sd


def _paper_curve(model: Model, cells: Sequence[Cell]) -> list[Curve]:
    """The paper's values for one model in a table, as a curve at our numbers of labels; none where it has none."""
    points = sorted(
        (float(cell.result.n_train), cell.paper.mean, cell.paper.std or 0.0)
        for cell in cells
        if cell.paper is not None and cell.paper.mean is not None and cell.result is not None
    )
    if not points:
        return []
    x, means, _ = (tuple(values) for values in zip(*points, strict=True))
    low, high = (tuple(mean + side * sd for _, mean, sd in points) for side in (-1, 1))
    return [Curve(f"{model.label}, paper", x, means, low, high, dashed=True)]
