"""The paper's tables as data, and what narrows them."""

from __future__ import annotations

import pytest

from embcache.errors import UsageError
from embcache.results.paper import find_value, named_subset, paper_tables
from embcache.study.definitions import FIGURES, GRIDS, LINEAR, NAMES, find_name, narrow


def test_every_table_and_figure_has_a_name() -> None:
    expected = ["table1", "table2", "table3", "table4", *(f"B{i}" for i in range(1, 9))]
    expected += [*(f"C{i}" for i in range(1, 5)), "G1", "fig2", "D1", "D2", "F1"]
    assert list(NAMES) == expected
    assert find_name("b3") == "B3"
    with pytest.raises(UsageError, match="did you mean table2"):
        find_name("tabel2")


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_every_value_of_the_paper_has_a_cell(name: str) -> None:
    grid = GRIDS[name]
    cells = {(d, m.paper, named_subset(d, s)) for d in grid.datasets for m in grid.models for s in grid.subsets}
    values = {(v.dataset, v.model, v.subset) for v in paper_tables()[name].values}
    assert values <= cells
    assert {key for key in cells if key[1]} == values
    assert all(find_value(name, *key) for key in values)


def test_backbones_limit_the_columns_and_keep_the_papers_names() -> None:
    grid = narrow(GRIDS["B3"], backbones=["random", "effnet_lite0"], subsets=["50", "f"])
    assert [(m.label, m.paper, m.backbones) for m in grid.models] == [
        ("Random", "random", ("random",)), ("effnet_lite0", "", ("effnet_lite0",)),
    ]  # fmt: skip
    assert grid.subsets == ("50", "F")


def test_heads_that_fuse_take_the_backbones_together() -> None:
    grid = narrow(GRIDS["C3"], backbones=["a", "b"])
    assert [(m.head, m.backbones, m.paper) for m in grid.models] == [
        ("dvme-noattn", ("a", "b"), ""), ("dvme", ("a", "b"), ""),
    ]  # fmt: skip
    with pytest.raises(UsageError, match="fuses backbones"):
        narrow(GRIDS["C3"], backbones=["a"])


def test_other_heads_are_not_the_papers() -> None:
    grid = narrow(GRIDS["B3"], heads=["knn", "linear"], backbones=["dino"])
    assert [(m.label, m.paper) for m in grid.models] == [("dino, knn", ""), ("DINO", "dino")]
    with pytest.raises(UsageError, match="did you mean linear"):
        narrow(GRIDS["B3"], heads=["linaer"])


def test_the_best_baseline_follows_the_backbones() -> None:
    grid = narrow(GRIDS["table4"], backbones=["a", "b"])
    dvme, by_test, by_validation = grid.models
    assert dvme.backbones == ("a", "b")
    assert [m.backbones for m in by_test.among] == [("a",), ("b",)]
    assert (by_test.by, by_validation.by) == ("test", "validation")
    assert (by_test.paper, GRIDS["table4"].models[1].paper) == ("", "best")


def test_a_table_of_one_dataset_points_to_that_of_another() -> None:
    with pytest.raises(UsageError, match="embcache run B2"):
        narrow(GRIDS["B3"], datasets=["aptos"])
    assert narrow(GRIDS["table2"], datasets=["aptos"]).datasets == ("aptos",)
    assert narrow(GRIDS["B3"], datasets=["mine"]).datasets == ("mine",)


def test_figures_show_what_the_paper_shows() -> None:
    assert FIGURES["fig2"].datasets == ("patchcam", "aptos")
    assert FIGURES["D1"].backbones == ("supervised", "dino")
    assert FIGURES["F1"].subset == "F"
    assert all(model.kind == "probe" for model in LINEAR)
