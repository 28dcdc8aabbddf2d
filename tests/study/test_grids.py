"""One's own grid from a TOML file."""

from __future__ import annotations

from pathlib import Path

import pytest

from embcache.data.classes import ClassOptions
from embcache.errors import UsageError
from embcache.study.grids import read_grid


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


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
"""


def test_a_grid_is_the_product_of_its_lists(tmp_path: Path) -> None:
    own = read_grid(written(tmp_path, WHOLE))
    assert (own.grid.name, own.grid.title, own.grid.subsets) == ("mine", "Mine", ("S", "100", "F"))
    assert [(m.head, m.backbones, m.seed) for m in own.grid.models] == [
        ("linear", ("dino",), 0), ("linear", ("effnet_lite0",), 0),
        ("linear", ("dino",), 1), ("linear", ("effnet_lite0",), 1),
        ("dvme", ("dino", "effnet_lite0"), 0), ("dvme", ("dino", "effnet_lite0"), 1),
    ]  # fmt: skip
    assert own.options == {"val": "matched", "folds": 3, "lr": [1e-4, 1e-3]}


def test_what_is_left_out_is_linear_at_s_m_f(tmp_path: Path) -> None:
    own = read_grid(written(tmp_path, 'datasets = "pneumonia"\nbackbones = "dino"\n'))
    assert (own.grid.subsets, own.options) == (("S", "M", "F"), {})
    (model,) = own.grid.models
    assert (model.kind, model.head, model.seed, model.label) == ("probe", "linear", None, "DINO")


def test_lists_in_the_list_are_sets_for_heads_that_fuse(tmp_path: Path) -> None:
    text = 'datasets = ["a"]\nbackbones = ["x", ["x", "y"], ["y", "z"]]\nheads = ["linear", "dvme"]\n'
    models = read_grid(written(tmp_path, text)).grid.models
    assert [m.backbones for m in models if m.head == "linear"] == [("x",), ("y",), ("z",)]
    assert [m.backbones for m in models if m.head == "dvme"] == [("x", "y"), ("y", "z")]


def test_probes_and_finetunings_stand_in_one_grid(tmp_path: Path) -> None:
    text = 'datasets = ["a"]\nbackbones = ["random"]\nkind = ["probe", "finetune"]\n'
    assert [m.kind for m in read_grid(written(tmp_path, text)).grid.models] == ["probe", "finetune"]


def test_classes_are_left_out_and_merged_as_the_command_does(tmp_path: Path) -> None:
    own = read_grid(written(tmp_path, BASE + 'drop_class = "other"\nmerge_class = ["mild+severe=ill"]\n'))
    assert own.options == {"classes": ClassOptions(("other",), ("mild+severe=ill",))}


BASE = 'datasets = ["a"]\nbackbones = ["x"]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('dataset = ["a"]\nbackbones = ["x"]\n', "did you mean datasets"),
        ('backbones = ["x"]\n', "names no datasets"),
        (BASE + "heads = []\n", "'heads' is not a list"),
        (BASE + 'heads = ["linaer"]\n', "did you mean linear"),
        (BASE + 'heads = ["dvme"]\n', "fuses backbones"),
        (BASE + "subsets = [1.5]\n", "'subsets' is not a list"),
        (BASE + "seeds = [true]\n", "'seeds' is not a list"),
        (BASE + 'val = "half"\n', "no such 'val'"),
        (BASE + 'kind = "train"\n', "no such 'kind'"),
        (BASE + "folds = 0\n", "'folds' is not a number"),
        (BASE + 'lr = "fast"\n', "'lr' is not a learning rate"),
        (BASE + "drop_class = 3\n", "'drop_class' is not a list"),
        (BASE + "title = 3\n", "'title' is not of the right kind"),
        ("backbones = [1]\ndatasets = ['a']\n", "'backbones' is not a list of names"),
        ("datasets = [", "not TOML"),
    ],
)
def test_what_a_grid_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_grid(written(tmp_path, text))


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_grid(tmp_path / "none.toml")
