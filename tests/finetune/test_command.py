"""The command line of finetuning."""

from __future__ import annotations

import csv
import json
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from embcache.cli import app
from embcache.config import DatasetRef, FinetuneConfig
from embcache.data.dataset import ImageDataset
from embcache.errors import StoreError, UsageError
from embcache.finetune.epochs import CheckpointFolder, known_images
from embcache.finetune.finetune_plan import load_networks, plan_finetuning
from embcache.finetune.model import load_fold
from embcache.maintain.listing import list_interrupted
from embcache.probe.heads import heads
from embcache.probe.heads.trained import LinearHead
from embcache.probe.metrics import metrics
from embcache.runs.folders import list_results, runs_dir
from tests.finetune.conftest import RESNET, VIT
from tests.refusal import refused


def invoke(words: list[str]) -> Result:
    return CliRunner().invoke(app, words)


def arguments(ds: ImageDataset, *more: str) -> list[str]:
    words = ["finetune", "--backbone", RESNET, "--dataset", "folder", "--data-root", str(ds.root), "--subset", "16"]
    words += ["--folds", "2", "--val", "matched", "--max-epochs", "2", "--transform", "paper", "--batch-size", "8"]
    return [*words, *more]


def test_the_command_prints_and_saves_a_result(ds: ImageDataset, tmp_path: Path) -> None:
    done = invoke(arguments(ds, "--json", str(tmp_path / "r.json"), "--no-models", "--workers", "0"))
    assert done.exit_code == 0, done.exception
    assert "± " in done.stdout
    assert "finetune" in done.stdout
    (result,) = json.loads((tmp_path / "r.json").read_text())
    assert (result["kind"], result["head"], len(result["folds"])) == ("finetune", "linear", 2)
    listed = invoke(["results"])
    assert result["id"] in listed.stdout
    assert done.stderr.endswith(f"next: embcache results {result['id']}\n")


def test_an_interrupted_command_says_how_to_continue(ds: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    original = CheckpointFolder.write

    def write(self: CheckpointFolder, progress: object) -> None:
        original(self, progress)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "write", write)
        stopped = invoke(arguments(ds))
    assert stopped.exit_code == 130
    assert "--resume" in stopped.stderr
    refused = invoke(arguments(ds))
    assert isinstance(refused.exception, StoreError)
    assert refused.exception.code == "run-interrupted"
    assert "trained for 1 epoch" in str(refused.exception.found)
    (run,) = list_interrupted()
    assert run.id.startswith("finetune-linear-16-")
    assert run.bytes > 10_000
    for words in (["ls"], ["ls", "--dataset", ds.name]):
        listed = invoke(words).stdout
        assert f"unfinished: {ds.name} {run.id}" in listed
        assert run.command in listed
    assert list_interrupted(dataset="nih") == []
    resumed = invoke(shlex.split(run.command)[1:])
    assert resumed.exit_code == 0, resumed.exception
    assert "resumed" in resumed.stderr
    assert list_interrupted() == []
    assert "unfinished" not in invoke(["ls"]).stdout


def test_an_unfinished_run_that_cannot_be_read_is_listed_all_the_same(home: Path) -> None:
    folder = home / "nih" / "runs" / ".finetune-linear-S-0123.partial"
    (folder / "leases").mkdir(parents=True)
    assert list_interrupted() == []  # begun, and no epoch is whole yet
    (folder / "state.json").write_bytes(b"{}")
    assert [(run.dataset, run.id, run.command) for run in list_interrupted()] == [("nih", "finetune-linear-S-0123", "")]
    listed = invoke(["ls"]).stdout
    assert "its command with --resume" in listed
    assert f"rm -r '{folder}'" in listed


def test_the_command_that_continues_a_run_repeats_its_options(ds: ImageDataset, tmp_path: Path) -> None:
    config = FinetuneConfig(folds=3, seed=7, val="matched", lr=0.01, batch_size=8, max_epochs=9, models=False)
    read = replace(ds, ref=DatasetRef(group_column="who", merge_class=("A+a=A",)))
    with ThreadPoolExecutor(1) as pool:
        networks = load_networks(read, [VIT], config, None, pool)
        images = known_images(read, networks.transform, networks.files, None, pool)
    words = shlex.split(plan_finetuning(networks, images, "16", None).resume_command(tmp_path))
    assert words == [
        "embcache", "finetune", "--backbone", VIT, "--dataset", "folder", "--data-root", str(ds.origin),
        "--name", ds.name, "--group-column", "who", "--merge-class", "A+a=A", "--subset", "16", "--folds", "3",
        "--seed", "7", "--val", "matched", "--lr", "0.01", "--batch-size", "8", "--max-epochs", "9", "--no-models",
        "--resume", "--home", str(tmp_path),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--backbone", RESNET], "no-dataset"),
        (["--dataset", "a,b", "--backbone", RESNET, "--data-root", "x"], "one-dataset"),
        (["--dataset", "nih", "--backbone", f"{RESNET},{VIT}", "--weights", "x=y"], "weights-unnamed"),
    ],
)
def test_bad_usage_is_refused(home: Path, words: list[str], code: str) -> None:
    error = invoke(["finetune", *words]).exception
    assert isinstance(error, UsageError)
    assert error.code == code


class Own(LinearHead):
    """A head that is registered nowhere."""

    name = "own"


def test_a_head_and_a_metric_of_ones_own(ds: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"{__name__}:Own"
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "plugin"))
    monkeypatch.setattr(metrics, "_objects", dict(metrics._objects))
    monkeypatch.setattr(heads, "_objects", dict(heads._objects))
    words = arguments(ds, "--max-epochs", "1", "--metric", "embcache_plugin:YOUDEN", "--json", "-")
    done = invoke([*words, "--head", place])
    assert done.exit_code == 0, done.exception
    (result,) = list_results()
    folder = runs_dir(ds.name) / result.id
    assert (result.request["head"], result.metric) == ({"name": place}, "youden")
    with refused(UsageError, "head-not-registered"):  # only the run's file names it
        load_fold(folder, result, 0)
    model = load_fold(folder, result, 0, trust=[place])
    heads.register("renamed")(Own)
    done = invoke([*words, "--head", "renamed"])
    (renamed,) = [each for each in list_results() if each.id != result.id]
    assert renamed.request["head"] == {"name": "renamed"}
    again = load_fold(runs_dir(ds.name) / renamed.id, renamed, 0)
    pixels = np.zeros((1, *model.transform.size, 3), dtype=np.uint8)
    assert np.array_equal(again.predict(pixels), model.predict(pixels))


def test_lists_of_backbones_heads_and_subsets_give_a_result_each(ds: ImageDataset) -> None:
    words = arguments(ds, "--max-epochs", "1", "--head", "linear,mlp", "--backbone", VIT, "--csv")
    done = invoke(words)
    assert done.exit_code == 0, done.exception
    rows = list(csv.DictReader(done.stdout.splitlines()))
    found = [(row["backbone"], row["head"].split()[0]) for row in rows if row["scored"] == "mean of the models"]
    assert found == [(backbone, head) for head in ("linear", "mlp") for backbone in (RESNET, VIT)]
