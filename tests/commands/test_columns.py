"""``--group-column`` and the like, wherever a dataset is loaded."""

import json
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from embcache.cli import app
from tests.data.pictures import write_image
from tests.docs.test_commands import COMMANDS

LOADING = [
    "datasets", "extract", "probe", "finetune", "rank", "similarity", "tsne", "neighbors", "audit", "run", "export",
    "splits export", "splits import", "predict",
]  # fmt: skip


@pytest.mark.parametrize("command", LOADING)
def test_commands_that_load_a_dataset_take_columns(command: str) -> None:
    flags = {flag for option in COMMANDS[f"embcache {command}"].params for flag in option.opts}
    assert {f"--{role}-column" for role in ("path", "label", "group", "split", "id")} <= flags


def call(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=True)
    assert result.exit_code == (status if result.exception is None or status == 0 else 1)
    return result.stdout if result.exception is None else str(result.exception)


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    rows = []
    for i in range(40):
        write_image(tmp_path / f"{i}.png", i, (8, 8))
        rows.append((f"{i}.png", ("Sick", "sick", "well")[i % 3], f"p{i // 2}", f"s{i % 20}", ("x", "y")[i % 2]))
    frame = pd.DataFrame(rows, columns=["file", "finding", "patient", "slide", "marker"])
    frame.to_csv(tmp_path / "labels.csv", index=False)
    return tmp_path / "labels.csv"


def test_what_extraction_was_told_of_columns_is_remembered(labels: Path, home: Path) -> None:
    root = ("--data-root", str(labels))
    assert "do not nest in one of them" in call("datasets", "folder", *root, status=1)
    assert "differ only in letter case" in call("datasets", "folder", *root, "--group-column", "slide", status=1)
    told = ("--group-column", "Slide", "--merge-class", "Sick+sick=sick")
    shown = json.loads(call("datasets", "folder", *root, *told, "--json", "-"))
    assert list(shown["classes"]) == ["sick", "well"]
    assert shown["groups"] == {"train": 20}
    call("extract", "--backbone", "random", "--dataset", "folder", *root, *told, "--name", "mine")
    assert json.loads(call("datasets", "mine", "--json", "-"))["groups"] == {"train": 20}
    assert "letter case" in call(
        "extract", "--backbone", "random", "--dataset", "mine", "--merge-class", "sick+well=x", status=1
    )
    (result,) = json.loads(call("probe", "--dataset", "mine", "--subset", "F", "--folds", "2", "--json", "-"))
    assert any("column 'slide' (20 groups)" in note for note in result["notes"])
    (other,) = json.loads(
        call("probe", "--dataset", "mine", "--subset", "F", "--folds", "2", "--group-column", "patient", "--json", "-")
    )
    assert any("column 'patient' (20 groups)" in note for note in other["notes"])
    assert other["id"] != result["id"]


def test_columns_belong_to_one_dataset(home: Path) -> None:
    assert "belong to one dataset" in call("datasets", "--group-column", "x", status=2)
