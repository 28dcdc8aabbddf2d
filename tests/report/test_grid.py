"""The difference from the paper, and when it is withheld."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from embcache.report.grid import choose_best, compare_with_paper
from embcache.report.paper import find_value
from tests.report.build import make_cell, make_result

PAPER = find_value("B3", "pneumonia", "supervised", "S")


def test_difference_is_in_units_of_both_deviations() -> None:
    cell = compare_with_paper(make_cell(make_result(), paper=PAPER))
    assert PAPER is not None
    # scores 0.80 … 0.88: mean 0.84, sd √0.001
    assert cell.difference == pytest.approx((0.84 - 0.8789) / (0.001 + 0.0234**2) ** 0.5)
    assert cell.withheld == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"test_set": "local"}, "local"),
        ({"n_test": 30}, "30 images of 624"),
        ({"dataset": "mine"}, "not the paper's"),
        ({"std": 0.0}, "do not differ"),
        ({"request": {"val": "matched"}}, "whole folds"),
    ],
)
def test_difference_is_withheld(changes: dict[str, Any], reason: str) -> None:
    cell = compare_with_paper(make_cell(make_result(**changes), paper=PAPER))
    assert cell.difference is None
    assert reason in cell.withheld


def test_difference_is_withheld_from_fewer_folds() -> None:
    cell = compare_with_paper(make_cell(make_result((0.8, 0.9)), paper=PAPER))
    assert cell.difference is None
    assert cell.withheld == "2 folds, the paper has 5"


def test_a_fold_without_a_score_counts_as_missing() -> None:
    result = make_result()
    folds = (replace(result.folds[0], score=None, diverged=True), *result.folds[1:])
    assert compare_with_paper(make_cell(replace(result, folds=folds), paper=PAPER)).withheld.startswith("4 folds")


def test_nothing_is_withheld_where_the_paper_has_nothing() -> None:
    cell = compare_with_paper(make_cell(make_result(test_set="local")))
    assert (cell.difference, cell.withheld) == (None, "")


def test_a_leaderboard_result_may_be_compared() -> None:
    result = make_result(kind="kaggle", dataset="aptos", n_test=1928)
    assert compare_with_paper(make_cell(result, paper=PAPER)).difference is not None


def test_the_best_is_chosen_by_the_score_asked_for() -> None:
    one = make_cell(make_result(mean=0.8, val_mean=0.9))
    two = make_cell(make_result(mean=0.9, val_mean=0.8))
    assert choose_best([one, two], "test") is two
    assert choose_best([one, two], "validation") is one
    assert choose_best([make_cell()], "test") is None
