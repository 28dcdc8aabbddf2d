"""Tables beside the paper's values, and the commands that make results again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from embcache import cli
from embcache.report.charts import paper_table, paper_value
from embcache.report.collect import Part, make_tasks
from embcache.report.page import commands
from embcache.runs.folders import Result
from tests.probe.build import make_dataset
from tests.results.build import make_result


def _part(*results: Result, name: str = "pneumonia") -> Part:
    return Part(name, None, "", "", results, tuple(make_tasks(results)), 0, Path())


def _rows(*results: Result) -> list[tuple[str, ...]]:
    table = paper_table(make_tasks(results)[0], _part(*results))
    assert table is not None
    return list(table.rows)


def test_the_papers_value_and_the_difference_stand_beneath_ours() -> None:
    rows = _rows(make_result())
    at = [row[:2] for row in rows].index(("supervised, linear", "ours"))
    assert rows[at][2] == "0.8400 ± 0.0316"
    assert rows[at + 1][1:] == ("paper", "0.8789 ± 0.0234")
    assert rows[at + 2][1:] == ("difference", "−1.0")  # (0.84 − 0.8789) / √(0.0316² + 0.0234²)


def test_the_papers_other_models_stand_below_without_a_row_of_ours() -> None:
    rows = _rows(make_result(backbones=("effnet_lite0",)))
    theirs = {row[0]: row for row in rows if row[0].endswith("the paper's")}
    assert theirs["DINO, the paper's"][1:] == ("paper", "0.9492 ± 0.0170")
    assert len(theirs) == 6
    assert all(row[1] == "paper" for row in theirs.values())


def test_private_images_and_other_metrics_are_not_put_beside_the_paper() -> None:
    for result in (make_result(dataset="mine"), make_result(metric="accuracy"), make_result(request={"target": "sex"})):
        assert paper_table(make_tasks([result])[0], _part(result)) is None
    own = make_dataset([0, 1] * 10, name="pneumonia")  # another folder under the paper's name
    part = Part("pneumonia", own, "live", "", (), (), 0, Path())
    assert paper_table(make_tasks([make_result()])[0], part) is None
    assert paper_value("mine", "probe", "dino", "S") is None


def _probe(**changes: Any) -> Result:
    request = {
        "kind": "probe", "head": {"name": "linear"}, "subset": "S", "folds": 5, "val": "full", "test": "official",
        "seed": 0, "recipes": [["random", "a" * 64]], "schedule": {"lr": 1e-3},
    }  # fmt: skip
    request |= changes.pop("request", {})
    recipe = {"backbone": "random", "transform": {"kind": "paper"}, "precision": "fp32", "dtype": "float32"}
    return make_result(**{"request": request, "recipes": {"random": recipe}, "backbones": ("random",), **changes})


def test_sizes_and_backbones_of_one_request_are_one_command() -> None:
    results = [
        _probe(id=f"{b}-{s}", subset=s, n_train=n, backbones=(b,), recipes={b: {"transform": {"kind": "paper"}}},
               request={"subset": s, "recipes": [[b, b * 8]]})
        for b in ("one", "two") for s, n in (("S", 50), ("M", 500))
    ]  # fmt: skip
    assert commands(_part(*results)) == [
        "embcache extract --dataset pneumonia --backbone one,two",
        "embcache probe --dataset pneumonia --head linear --backbone one,two --subset S,M",
    ]


@pytest.mark.parametrize(
    ("request_", "flag"),
    [
        ({"seed": 3}, "--seed 3"),
        ({"target": "sex"}, "--target sex"),
        ({"exclude_test_overlap": True}, "--exclude-test-overlap"),
        ({"lr": [1e-4, 1e-2]}, "--lr 0.0001,0.01"),
        ({"schedule": {"lr": 0.1}}, "--lr 0.1"),
        ({"head": {"name": "knn", "k": 5, "temperature": 0.07}}, "--head-option k=5"),
    ],
)
def test_what_differs_from_the_defaults_is_a_flag_of_the_command(request_: dict[str, Any], flag: str) -> None:
    result = _probe(request=request_, head=request_.get("head", {}).get("name", "linear"))
    line = commands(_part(result))[-1]
    assert flag in line
    probe = get_command(cli.app).commands["probe"]  # type: ignore[attr-defined]
    known = {name for option in probe.params for name in option.opts}
    assert {word for word in shlex.split(line) if word.startswith("--")} <= known
