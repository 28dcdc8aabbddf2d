"""The command line of finetuning."""

from __future__ import annotations

import inspect
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from embcache.commands import finetune_command as command
from embcache.commands import probe_command as probe
from embcache.commands import store_command as store
from embcache.config import DatasetRef
from embcache.data.dataset import ImageDataset
from embcache.errors import StoreError, UsageError
from embcache.finetune.checkpoint import CheckpointFolder
from embcache.finetune.finetune_plan import Settings, resume_command
from embcache.finetune.named import finetune_named
from embcache.maintain.listing import list_interrupted
from tests.finetune.conftest import QUICK, RESNET, VIT

app = typer.Typer()
app.command()(command.finetune)
app.command()(probe.results)
app.command()(store.ls)


def arguments(ds: ImageDataset, *more: str) -> list[str]:
    words = ["finetune", "--backbone", RESNET, "--dataset", "folder", "--data-root", str(ds.root), "--subset", "16"]
    words += ["--folds", "2", "--val", "matched", "--max-epochs", "2", "--transform", "paper", "--batch-size", "8"]
    return [*words, *more]


def test_the_command_prints_and_saves_a_result(ds: ImageDataset, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, arguments(ds, "--json", str(tmp_path / "r.json"), "--no-models", "--workers", "0"))
    assert done.exit_code == 0, done.exception
    assert "± " in done.stdout
    assert "finetune" in done.stdout
    (result,) = json.loads((tmp_path / "r.json").read_text())
    assert (result["kind"], result["head"], len(result["folds"])) == ("finetune", "linear", 2)
    listed = CliRunner().invoke(app, ["results"])
    assert result["id"] in listed.stdout


def test_json_to_stdout_is_json_alone(ds: ImageDataset) -> None:
    done = CliRunner().invoke(app, arguments(ds, "--json", "-", "--max-epochs", "1"))
    assert json.loads(done.stdout)[0]["subset"] == "16"


def test_an_interrupted_command_says_how_to_go_on(ds: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    original = CheckpointFolder.write

    def write(self: CheckpointFolder, progress: object) -> None:
        original(self, progress)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "write", write)
        stopped = CliRunner().invoke(app, arguments(ds))
    assert stopped.exit_code == 130
    assert "--resume" in stopped.stderr
    refused = CliRunner().invoke(app, arguments(ds))
    assert isinstance(refused.exception, StoreError)
    assert "trained for 1 epoch" in str(refused.exception)
    (run,) = list_interrupted()
    assert run.id.startswith("finetune-linear-16-")
    assert run.bytes > 10_000
    for words in (["ls"], ["ls", "--dataset", ds.name]):
        listed = CliRunner().invoke(app, words).stdout
        assert f"unfinished: {ds.name} {run.id}" in listed
        assert run.command in listed
    assert list_interrupted(dataset="nih") == []
    resumed = CliRunner().invoke(app, shlex.split(run.command)[1:])
    assert resumed.exit_code == 0, resumed.exception
    assert "resumed" in resumed.stderr
    assert list_interrupted() == []
    assert "unfinished" not in CliRunner().invoke(app, ["ls"]).stdout


def test_an_unfinished_run_that_cannot_be_read_is_listed_all_the_same(home: Path) -> None:
    folder = home / "nih" / "runs" / ".finetune-linear-S-0123.partial"
    (folder / "leases").mkdir(parents=True)
    assert list_interrupted() == []  # begun, and no epoch is whole yet
    (folder / "state.json").write_bytes(b"{}")
    assert [(run.dataset, run.id, run.command) for run in list_interrupted()] == [("nih", "finetune-linear-S-0123", "")]
    listed = CliRunner().invoke(app, ["ls"]).stdout
    assert "its command with --resume" in listed
    assert f"rm -r '{folder}'" in listed


def test_the_command_that_goes_on_asks_the_same(ds: ImageDataset, tmp_path: Path) -> None:
    settings = Settings(
        "dvme", 16, 3, 7, "matched", "official", "kept", True, {"a": "x y.pth", "b": "b.pth"}, "paper", "cpu", "bf16",
        0.01, 8, 2, 9,
    )  # fmt: skip
    read = replace(ds, columns=DatasetRef(group_column="who", merge_class=("A+a=A",)))
    assert "--group-column who --merge-class A+a=A " in resume_command(read, ["a", "b"], settings, tmp_path)
    words = shlex.split(resume_command(ds, ["a", "b"], settings, tmp_path))
    assert words == [
        "embcache", "finetune", "--backbone", "a,b", "--dataset", "folder", "--data-root", str(ds.origin),
        "--name", ds.name, "--head", "dvme", "--subset", "16", "--folds", "3", "--seed", "7", "--val", "matched",
        "--test", "official", "--splits", "kept", "--exclude-test-overlap", "--weights", "a=x y.pth",
        "--weights", "b=b.pth", "--transform", "paper", "--device", "cpu", "--precision", "bf16", "--lr", "0.01",
        "--batch-size", "8", "--accumulate", "2", "--max-epochs", "9", "--home", str(tmp_path), "--resume",
    ]  # fmt: skip
    (finetune,) = (c for c in app.registered_commands if c.callback is command.finetune)
    assert finetune.callback is not None
    options = {name.replace("_", "-") for name in inspect.signature(finetune.callback).parameters}
    assert {word[2:] for word in words if word.startswith("--")} <= options


def test_what_was_not_named_is_asked_for(home: Path) -> None:
    for words, message in ((["--backbone", RESNET], "no dataset"), (["--dataset", "nih"], "no backbone")):
        done = CliRunner().invoke(app, ["finetune", *words])
        assert isinstance(done.exception, UsageError)
        assert message in str(done.exception)


def test_names_give_a_result_for_each_backbone_and_subset(ds: ImageDataset) -> None:
    common = {key: value for key, value in QUICK.items() if key != "subset"}
    results = finetune_named(
        ["folder"], [RESNET, VIT], subsets=[8, 16], data_root=ds.root, **{**common, "max_epochs": 1}
    )
    assert [(r.backbones, r.subset) for r in results] == [
        ((RESNET,), "8"), ((RESNET,), "16"), ((VIT,), "8"), ((VIT,), "16"),
    ]  # fmt: skip
    with pytest.raises(UsageError, match="no backbone"):
        finetune_named(["folder"], [], data_root=ds.root)
    with pytest.raises(UsageError, match="for one dataset"):
        finetune_named(["a", "b"], [RESNET], data_root=ds.root)
