"""The command line as a user meets it: one message for each mistake, the promised exit status, data as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from embcache.cli import app
from tests.commands.test_output import command
from tests.extract.conftest import draw
from tests.forked import ran

TINY = "tests.extract.tiny_run"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Class folders of 2 × 15 small images."""
    root = tmp_path / "mine"
    for index in range(30):
        draw(root / ("a" if index % 2 else "b") / f"{index:02}.png", index, size=32)
    return root


def test_help_names_every_command(home: Path) -> None:
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0
    for name in vars(get_command(app))["commands"]:
        assert f"\n  {name} " in shown.stdout
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


def test_version(home: Path) -> None:
    assert ran("--version")[1].startswith("embcache 0.")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["nonsense"], 2, ["nonsense"]),
        (["extract"], 2, ["backbone", "embcache backbones"]),
        (["extract", "--backbone", "random"], 2, ["dataset", "embcache datasets"]),
        (["extract", "--backbone", "dinno", "--dataset", "sample"], 2, ["dinno", "dino"]),
        (["extract", "--backbone", "random,,dino", "--dataset", "sample"], 2, ["empty name"]),
        (["extract", "--backbone", "random", "--dataset", "pneumonia"], 1, ["pneumonia", "kagglehub"]),
        (["extract", "--backbone", "random", "--dataset", "nonsense"], 1, ["nonsense", "embcache datasets"]),
        (["extract", "--backbone", "random", "--dataset", "folder"], 2, ["--data-root"]),
        (["extract", "--backbone", "random", "--dataset", "sample", "--part", "x"], 2, ["--part"]),
        (["probe", "--dataset", "sample"], 1, ["embcache extract"]),
        (["probe", "--head", "liner"], 2, ["liner", "linear"]),
    ],
)
def test_each_mistake_gets_one_message(
    home: Path, arguments: list[str], status: int, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, _, err = command(arguments, "utf-8", monkeypatch)
    assert ended == status, err
    assert "Traceback" not in err
    for word in words:
        assert word in err


@pytest.mark.skipif(sys.platform != "linux", reason="needs a shell and /dev/full")
@pytest.mark.parametrize(
    ("target", "statuses"),
    [(">&-", (0,)), ("> /dev/full", (1,)), ("| true; exit ${PIPESTATUS[0]}", (0, 1))],
    ids=["closed", "full", "reader gone"],
)
def test_output_that_cannot_be_written_leaves_no_traceback(home: Path, target: str, statuses: tuple[int, ...]) -> None:
    command = f"{sys.executable} -m embcache datasets {target}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode in statuses, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_extract_then_probe_a_folder(folder: Path, home: Path, tmp_path: Path) -> None:
    extract = ("extract", "--backbone", "random", "--dataset", "folder", "--data-root", str(folder), "--json", "-")
    status, out, err = ran(*extract, module=TINY)
    assert status == 0, err
    (extraction,) = json.loads(out)
    assert (extraction["computed"], extraction["cached"], extraction["quarantined"]) == (30, 0, {})
    assert ran("ls")[1].count("random") == 1
    target = tmp_path / "results.json"
    probe = ("probe", "--head", "linear", "--subset", "10,F", "--dataset")
    status, out, err = ran(*probe, "folder", "--data-root", str(folder), "--json", str(target))
    assert status == 0, err
    live = json.loads(target.read_text())
    assert live[0]["n_train"] == 10
    assert all(0 <= result["mean"] <= 1 and len(result["folds"]) == 5 for result in live)
    assert "linear" in out
    folder.rename(folder.with_name("elsewhere"))
    status, out, err = ran(*probe, extraction["dataset"], "--json", "-")
    assert status == 0, err
    assert json.loads(out)[0]["mean"] == live[0]["mean"]
    assert json.loads(out)[0]["source"] == "snapshot"
