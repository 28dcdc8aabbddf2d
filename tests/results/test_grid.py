"""The difference from the paper, and when it is withheld."""

from __future__ import annotations

from typing import Any

import pytest

from embcache.probe.schedule import Schedule
from embcache.results.paper import choose_best, compare_with_paper, find_value
from tests.results.build import make_cell, make_result

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
        ({"request": {"views": 4}}, "4 cached views"),
        ({"request": {"target": "sex"}}, "the column sex"),
        ({"request": {"exclude_test_overlap": True}}, "share a group with the test set"),
        ({"recipes": {"supervised": {"precision": "bf16"}}}, "computed in bf16"),
        ({"request": {"kind": "probe", "lr": [1e-4]}}, "trained with lr 0.0001, the paper with 0.001"),
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


@pytest.mark.parametrize(
    ("backbones", "lr", "batch_size", "reason"),
    [
        (("supervised",), 1e-3, 64, ""),
        (("supervised",), 1e-4, 16, "lr 0.0001, the paper with 0.001"),
        (("dino",), 1e-4, 64, "batch size 64, the paper with 16"),
        (("simclr", "swav", "dino"), 1e-4, 16, ""),
        (("dino",), 1e-3, 16, "lr 0.001, the paper with 0.0001"),
    ],
)
def test_only_dino_is_finetuned_gently(backbones: tuple[str, ...], lr: float, batch_size: int, reason: str) -> None:
    request = {"kind": "finetune", "schedule": Schedule(lr=lr, batch_size=batch_size).changed()}
    result = make_result(kind="finetune", backbones=backbones, request=request)
    cell = compare_with_paper(make_cell(result, paper=PAPER))
    assert (cell.difference is None) == bool(reason)
    assert reason in cell.withheld


def test_a_leaderboard_result_may_be_compared_by_the_run_handed_in() -> None:
    def compared(**request: Any) -> Any:
        result = make_result(kind="kaggle", dataset="aptos", n_test=1928, request={"kind": "kaggle", **request})
        return compare_with_paper(make_cell(result, paper=PAPER))

    assert compared(of={"kind": "probe", "schedule": {"lr": 1e-3}}).difference is not None
    assert "is not known" in compared().withheld
    for of, reason in (({"val": "matched"}, "whole folds"), ({"lr": [1, 2]}, "chosen on validation"),
                       ({"schedule": {"max_epochs": 5}}, "max epochs 5"), ({"views": 2}, "views")):  # fmt: skip
        cell = compared(of={"kind": "probe", **of})
        assert cell.difference is None
        assert reason in cell.withheld


def test_the_best_is_chosen_by_the_score_asked_for() -> None:
    one = make_cell(make_result(mean=0.8, val_mean=0.9))
    two = make_cell(make_result(mean=0.9, val_mean=0.8))
    assert choose_best([one, two], "test") is two
    assert choose_best([one, two], "validation") is one
    assert choose_best([make_cell()], "test") is None
