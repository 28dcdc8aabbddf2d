"""Learning curves from saved results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from embcache.errors import StoreNotFoundError
from embcache.figures.run_plots import curve_panels, table_curves
from embcache.results.curves import band_words, curve_table, find_results, named_curves
from embcache.results.paper import Grid, find_value
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
