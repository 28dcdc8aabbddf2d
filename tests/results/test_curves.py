"""Learning curves from saved results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embcache.errors import StoreNotFoundError
from embcache.figures.plots import Curve, CurvePanel, curve_styles, plot_curves
from embcache.figures.run_plots import curve_panels, table_curves
from embcache.results.curves import band_words, curve_table, find_results, named_curves
from embcache.results.grid import Grid
from embcache.results.paper import find_value
from embcache.runs.folders import Result
from embcache.runs.result import Estimate
from tests.refusal import refused
from tests.results.build import SUPERVISED, make_cell, make_result


def at(n: int, mean: float | None = 0.8, seed: int = 0, **changes: Any) -> Result:
    request = {"kind": "probe", "head": {"name": "linear"}, "subset": str(n), "seed": seed, "splits": str(n)}
    return make_result(n_train=n, subset=str(n), mean=mean, request=request, **changes)


def test_sizes_of_one_model_and_protocol_are_one_curve() -> None:
    curves = named_curves([at(500), at(50), at(100)])
    assert list(curves) == ["supervised, linear"]
    (panel,) = curve_panels([at(500, 0.9), at(50, 0.7)])
    (curve,) = panel.curves
    assert (curve.x, curve.y) == ((50.0, 500.0), (0.7, 0.9))
    assert (panel.title, panel.metric) == ("pneumonia", "AUC")


def test_protocols_are_kept_apart_and_told_by_what_differs() -> None:
    assert list(named_curves([at(50), at(50, seed=1), at(100, seed=1)])) == [
        "supervised, linear, seed 0", "supervised, linear, seed 1",
    ]  # fmt: skip


def test_a_band_without_an_interval_is_one_deviation() -> None:
    (panel,) = curve_panels([at(50, 0.8, interval=None, std=0.1)])
    assert (panel.curves[0].low, panel.curves[0].high) == (pytest.approx((0.7,)), pytest.approx((0.9,)))


def test_datasets_are_panels_and_unscored_results_are_left_out() -> None:
    panels = curve_panels([at(50), at(50, dataset="nih"), at(50, None, dataset="aptos")])
    assert [panel.title for panel in panels] == ["pneumonia", "nih"]


def test_the_table_has_a_column_for_each_number_of_labels() -> None:
    table = curve_table([at(50, 0.75, std=0.02, interval=(0.7, 0.8)), at(500, 0.9, std=0.01, interval=None)])
    assert table.headers == ("dataset", "model", "50", "500")
    assert table.rows == (
        ("pneumonia (AUC)", "supervised, linear", "0.750 ± 0.020", "0.900 ± 0.010"),
        ("", "  95 % interval", "0.700 – 0.800", ""),
    )
    assert [record["n_train"] for record in table.records] == [50, 500]


def test_the_papers_points_are_dashed_beside_ours() -> None:
    value = find_value("B3", "pneumonia", "supervised", "S")
    grid = Grid("B3", "t", ("pneumonia",), (SUPERVISED,), ("S",), "models")
    (panel,) = table_curves(grid, [make_cell(make_result(), paper=value)])
    assert [(curve.label, curve.dashed) for curve in panel.curves] == [
        ("Supervised ImageNet", False), ("Supervised ImageNet, paper", True),
    ]  # fmt: skip
    assert panel.curves[1].y == (0.8789,)


def test_every_curve_of_a_figure_looks_different(tmp_path: Path) -> None:
    names = [(f"b{b}", f"h{h}") for b in range(10) for h in range(10)] + [("b0", "h0")]
    curves = [
        Curve(f"{k}", (50.0, 500.0), (0.7, 0.8), (0.6, 0.7), (0.8, 0.9), family=family, method=method)
        for k, (family, method) in enumerate(names)
    ]  # fmt: skip
    panels = [CurvePanel("one", "AUC", tuple(curves[:60])), CurvePanel("two", "AUC", tuple(curves[40:]))]
    styles = curve_styles(panels)
    assert len(set(styles.values())) == len(styles) == 101
    colors = {curve.family: styles[curve.label][0] for curve in curves[:80]}
    assert len(set(colors.values())) == 8
    assert all(styles[curve.label][0] == colors[curve.family] for curve in curves[:80])
    (alone,) = [CurvePanel("heads", "AUC", tuple(curves[:8]))]
    assert len({style[0] for style in curve_styles([alone]).values()}) == 8
    assert plot_curves([alone], "t", tmp_path / "c.png").stat().st_size > 0


def test_the_papers_curve_looks_like_ours_dashed() -> None:
    point = ((50.0,), (0.7,), (0.6,), (0.8,))
    ours, theirs = Curve("a", *point), Curve("a, paper", *point, dashed=True)
    styles = curve_styles([CurvePanel("t", "AUC", (ours, theirs, Curve("b, paper", *point, dashed=True)))])
    assert styles["a"][:2] == styles["a, paper"][:2]
    assert [style[2] for style in styles.values()] == ["-", "--", "--"]


def test_nothing_saved_is_an_error_with_the_next_command(home: Path) -> None:
    with refused(StoreNotFoundError, "no-result"):
        find_results(home=home)


def estimated(new: bool, these: bool) -> Estimate:
    ends = (0.7, 0.9)
    return Estimate("auc", "", 0.8, 0.1, ends if these else None, ends if new else None, "", 20, 0.0, None, None, 0.0)


def test_bands_are_the_saved_intervals_and_the_caption_says_which() -> None:
    anew = at(50, estimate=estimated(True, True))
    fixed = at(100, estimate=estimated(False, True))
    none = at(200, interval=None, std=0.1, estimate=estimated(False, False))
    board = at(500, interval=None, std=0.1)
    assert band_words([anew]) == "95 % interval for new patients and a newly trained model"
    assert band_words([fixed]) == "95 % interval for new patients and these models"
    assert band_words([anew, fixed, none, board]).split("; ") == [
        "95 % interval for new patients and a newly trained model",
        "95 % interval for new patients and these models, where the first is missing",
        "no interval where there are too few patients",
        "± sd over folds of leaderboard scores",
    ]
    (panel,) = curve_panels([anew, none])
    assert np.isnan(panel.curves[0].low).tolist() == [False, True]  # a deviation is no interval
    assert "95 % interval for new patients and a newly trained model" in " ".join(curve_table([anew]).notes)
