"""The command line of finetuning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from embcache.commands import finetune as command
from embcache.commands import probe
from embcache.data.dataset import ImageDataset
from embcache.errors import StoreError, UsageError
from embcache.finetune.checkpoint import CheckpointFolder
from embcache.finetune.named import finetune_named
from tests.finetune.conftest import QUICK, RESNET, VIT

app = typer.Typer()
app.command()(command.finetune)
app.command()(probe.results)


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
    resumed = CliRunner().invoke(app, arguments(ds, "--resume"))
    assert resumed.exit_code == 0, resumed.exception
    assert "resumed" in resumed.stderr


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
