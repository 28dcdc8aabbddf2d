"""The paper's tables as data, and what narrows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from embcache.config import StudyConfig
from embcache.errors import UsageError
from embcache.results.paper import Grid, find_value, named_subset, paper_tables
from embcache.study.definitions import (
    FIGURES,
    GRIDS,
    NAMES,
    find_name,
    narrow,
    narrow_figure,
    own_grid,
    read_study,
)
from tests.refusal import refused


def narrowed(name: str, **options: object) -> Grid:
    return narrow(GRIDS[name], StudyConfig.make(None, options))


def test_every_table_and_figure_has_a_name() -> None:
    expected = ["table1", "table2", "table3", "table4", *(f"B{i}" for i in range(1, 9))]
    expected += [*(f"C{i}" for i in range(1, 5)), "G1", "fig2", "D1", "D2", "F1"]
    assert list(NAMES) == expected
    assert find_name("b3") == "B3"
    with refused(UsageError, "unknown-table") as caught:
        find_name("tabel2")
    assert "did you mean table2" in caught.value.problem


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_every_value_of_the_paper_has_a_cell(name: str) -> None:
    grid = GRIDS[name]
    cells = {(d, m.paper, named_subset(d, s)) for d in grid.datasets for m in grid.models for s in grid.subsets}
    values = {(v.dataset, v.model, v.subset) for v in paper_tables()[name].values}
    assert values <= cells
    assert {key for key in cells if key[1]} == values
    assert all(find_value(name, *key) for key in values)


def test_heads_that_fuse_take_the_backbones_together() -> None:
    grid = narrowed("C3", backbones=["a", "b"])
    assert [(m.head, m.backbones, m.paper) for m in grid.models] == [
        ("dvme-noattn", ("a", "b"), ""), ("dvme", ("a", "b"), ""),
    ]  # fmt: skip
    with refused(UsageError, "too-few-backbones"):
        narrowed("C3", backbones=["a"])


def test_a_table_of_one_dataset_points_to_that_of_another() -> None:
    with refused(UsageError, "table-of-another-dataset") as caught:
        narrowed("B3", datasets=["aptos"])
    assert caught.value.fix == "embcache run B2"
    assert narrowed("table2", datasets=["aptos"]).datasets == ("aptos",)
    assert narrowed("B3", datasets=["mine"]).datasets == ("mine",)


def test_attention_needs_several_backbones_and_a_figure_one_subset() -> None:
    with refused(UsageError, "too-few-backbones"):
        narrow_figure(FIGURES["F1"], StudyConfig.make(None, {"backbones": ["random"]}))
    with refused(UsageError, "several-subsets"):
        narrow_figure(FIGURES["D1"], StudyConfig.make(None, {"subsets": ["S", "M"]}))
    alone = narrow_figure(FIGURES["D1"], StudyConfig.make(None, {"backbones": ["a"], "subsets": ["s"]}))
    assert [model.kind for model in alone.models] == ["features"]
    assert alone.subsets == ("S",)


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def grid_of(folder: Path, text: str) -> Grid:
    path = written(folder, text)
    return own_grid(path, StudyConfig.make(None, read_study(path)[0]))


WHOLE = """
title = "Mine"
datasets = ["pneumonia"]
backbones = ["dino", "effnet_lite0"]
heads = ["linear", "dvme"]
subsets = ["s", 100, "F"]
seeds = [0, 1]
val = "matched"
folds = 3
lr = [1e-4, 1e-3]
drop_class = "other"
"""


def test_a_grid_is_the_product_of_its_lists(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, WHOLE)
    assert (grid.name, grid.title, grid.subsets) == ("mine", "Mine", ("S", "100", "F"))
    assert [(m.head, m.backbones, m.seed) for m in grid.models] == [
        ("linear", ("dino",), 0), ("linear", ("effnet_lite0",), 0),
        ("linear", ("dino",), 1), ("linear", ("effnet_lite0",), 1),
        ("dvme", ("dino", "effnet_lite0"), 0), ("dvme", ("dino", "effnet_lite0"), 1),
    ]  # fmt: skip
    study, ref = read_study(tmp_path / "mine.toml")
    assert (study["val"], study["folds"], study["lr"]) == ("matched", 3, [1e-4, 1e-3])
    assert ref == {"drop_class": "other"}


def test_lists_in_the_list_are_sets_for_heads_that_fuse(tmp_path: Path) -> None:
    text = 'datasets = ["a"]\nbackbones = ["x", ["x", "y"], ["y", "z"]]\nheads = ["linear", "dvme"]\n'
    models = grid_of(tmp_path, text).models
    assert [m.backbones for m in models if m.head == "linear"] == [("x",), ("y",), ("z",)]
    assert [m.backbones for m in models if m.head == "dvme"] == [("x", "y"), ("y", "z")]


BASE = 'datasets = ["a"]\nbackbones = ["x"]\n'


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('dataset = ["a"]\nbackbones = ["x"]\n', "unknown-option"),
        ('backbones = ["x"]\n', "study-incomplete"),
        (BASE + "heads = []\n", "study-value"),
        (BASE + 'name = "a\\u0000b"\n', "study-value"),
        (BASE + 'heads = ["linaer"]\n', "unknown-head"),
        (BASE + 'heads = ["dvme"]\n', "too-few-backbones"),
        (BASE + "subsets = [1.5]\n", "option-type"),
        (BASE + 'val = "half"\n', "option-choice"),
        (BASE + "folds = 0\n", "option-bounds"),
        ("datasets = [", "study-not-toml"),
    ],
)
def test_what_a_study_cannot_be_is_refused(tmp_path: Path, text: str, code: str) -> None:
    with refused(UsageError, code) as caught:
        grid_of(tmp_path, text)
    if code not in ("unknown-head", "too-few-backbones"):
        assert str(tmp_path / "mine.toml") in str(caught.value)
