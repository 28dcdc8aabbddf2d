"""Studies from plan to table, on a small dataset whose features are cached."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

import embcache.study.study as study_run
from embcache.commands import figures as commands
from embcache.config import DatasetRef, StudyConfig
from embcache.data.dataset import ImageDataset
from embcache.errors import UsageError
from embcache.extract.foreign import import_features
from embcache.log import shown
from embcache.probe.probe import probe_features
from embcache.probe.protocol import plan_splits, write_splits
from embcache.results.paper import Grid
from embcache.runs.folders import Result, list_results, run_id, save_run
from embcache.study.definitions import BEST, GRIDS
from embcache.study.study import Study, run_study
from tests.probe.build import make_dataset, make_features, put_store
from tests.refusal import refused

N = 120


@pytest.fixture
def toy(home: Path) -> ImageDataset:
    """Two classes, a test split, features of two backbones; no images."""
    split = ["train"] * 80 + ["test"] * 40
    ds = make_dataset([k % 2 for k in range(N)], split=split, subset_sizes={"S": 20, "M": 40})
    for seed, backbone in enumerate(("random", "effnet_lite0")):
        put_store(home, ds, backbone, make_features(ds, seed=seed))
    return ds


def made(what: str = "table2", ref: DatasetRef | None = None, *, dry_run: bool = False, **options: Any) -> Study:
    usual = {"folds": 2, "datasets": ["toy"], "backbones": ["random", "effnet_lite0"], "subsets": ["S"]}
    return run_study(what, StudyConfig.make(None, usual | options), ref, dry_run=dry_run)


def test_what_is_missing_is_done_and_then_reused(
    toy: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with shown(said.append):
        first = made(subsets=["S", "20", "M"])
    assert not first.empty
    # S is 20 images: one run serves both columns
    assert len(list_results(home)) == 4
    assert said[:3] == [
        "plan: results that are there 0, to make 4, that cannot be had 0",
        "probe     toy: random, linear: S, M: 2 results",
        "probe     toy: effnet_lite0, linear: S, M: 2 results",
    ]
    by_column = {record["subset"]: record["run"] for record in first.table.records if record["model"] == "Random"}
    assert by_column["S"] == by_column["20"] != by_column["M"]

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(study_run, "probe", never)
    again = made(subsets=["S", "20", "M"])
    assert again.table == first.table


def test_a_study_that_was_stopped_goes_on(toy: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = study_run.probe, []

    def stop_at_the_second(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(study_run, "probe", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        made()
    assert [result.backbones for result in list_results(home)] == [("random",)]
    calls.clear()
    done = made()
    assert calls == [[("effnet_lite0",)]]
    assert all(record["mean"] is not None for record in done.table.records)


def test_imported_features_are_a_column_of_a_table(toy: ImageDataset, tmp_path: Path) -> None:
    features = make_features(toy, seed=3)
    np.savez(tmp_path / "f.npz", features=features, ids=np.array(toy.table["id"].tolist()))
    import_features(tmp_path / "f.npz", toy, backbone="mine")
    done = made(backbones=["mine", "random"])
    assert {record["model"] for record in done.table.records if record["run"]} >= {"mine", "Random"}
    with refused(UsageError, "unknown-backbone"):
        made(backbones=["nothing"])


def test_a_dry_run_says_what_would_be_done_and_does_nothing(toy: ImageDataset, home: Path) -> None:
    plan = made(dry_run=True)
    assert list_results(home) == []
    assert [(record["step"], record["count"]) for record in plan.table.records] == [("probe", 1), ("probe", 1)]
    made(backbones=["random"])
    plan = made(dry_run=True)
    assert [row[1:] for row in plan.table.rows] == [
        ("probe", "effnet_lite0, linear: S", "1"),
        ("there", "saved results of the same request", "1"),
    ]


def test_what_cannot_be_had_is_told_and_the_rest_goes_on(toy: ImageDataset) -> None:
    done = made(backbones=["random", "dino"], subsets=["S", "1000"])
    assert not done.empty
    reasons = {(record["model"], record["subset"]): record["reason"] for record in done.table.records}
    assert reasons["Random", "S"] is None
    assert "1000 training images" in reasons["Random", "1000"]
    assert reasons["DINO", "S"].startswith("dino: the images of toy are not here")
    assert made(backbones=["dino"]).empty
    assert made(backbones=["dino"], dry_run=True).table.notes[0] == "nothing can be computed"
    assert made(backbones=["random"], dry_run=True).table.notes == ("nothing is left to do",)


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ({"heads": ["linaer"]}, "unknown-head"),
        ({"what": "B9"}, "unknown-table"),
        ({"what": "G1", "heads": ["linear"]}, "no-heads"),
        ({"metric": "auc"}, "option-of-own-studies"),
        ({"what": "table3", "repeats": 2}, "repeats-of-finetuning"),
        ({"what": "table3", "lr": [1e-3, 1e-4]}, "sweep-of-finetuning"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(
    toy: ImageDataset, home: Path, wrong: dict[str, Any], code: str
) -> None:
    with refused(UsageError, code):
        made(**wrong)
    for other in ({"backbones": ["random", "dnio"]}, {"subsets": ["X"]}):
        with pytest.raises(UsageError):
            made(**other)
    assert list_results(home) == []


def test_the_best_baseline_is_chosen_by_test_or_validation(
    toy: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid("table4", "t", ("toy",), BEST, ("S",), "subsets")
    monkeypatch.setitem(GRIDS, "table4", grid)  # type: ignore[arg-type]
    by_test, by_validation = made("table4").table.records
    saved = list_results(home)
    assert by_test["mean"] == max(result.mean or 0 for result in saved)
    assert by_validation["val_mean"] == max(result.val_mean or 0 for result in saved)


def test_a_toml_grid_runs_and_options_win_over_it(toy: ImageDataset, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text('datasets = ["toy"]\nbackbones = ["random"]\nseeds = [0, 1]\nsubsets = ["S"]\nfolds = 3\n')
    done = run_study(path)
    assert [record["folds"] for record in done.table.records] == [3, 3]
    assert len({record["run"] for record in done.table.records}) == 2
    done = run_study(path, StudyConfig(folds=2))
    assert [record["folds"] for record in done.table.records] == [2, 2]


def to_hand_in() -> ImageDataset:
    """A dataset whose official test labels only a leaderboard knows."""
    split = ["train"] * 80 + ["test"] * 40
    labels = [k % 2 for k in range(80)] + [-1] * 40
    return make_dataset(labels, split=split, subset_sizes={"S": 20}, n_classes=2, leaderboard_alpha=0.85)


def save_scored(run: Result, *, of: bool = True) -> Result:
    """A leaderboard's result of a run, as kept; without the run's request as earlier states kept it."""
    request = {"kind": "kaggle", "run": run.id, "head": {"name": run.head}, "subset": run.subset}
    request |= {"of": dict(run.request)} if of else {}
    scored = replace(run, id=run_id(request), kind="kaggle", request=request, mean=0.77, std=0.01)
    save_run(scored, pd.DataFrame({"id": ["i80"], "p_0": [0.5]}), [])
    return scored


def test_a_leaderboard_result_stands_in_place_of_the_local_one(home: Path) -> None:
    ds = to_hand_in()
    features = np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32)
    put_store(home, ds, "random", features)
    handed_in = save_scored(probe_features(ds, "random", subset="S", folds=2, test="official"))
    (record,) = made(backbones=["random"]).table.records
    assert (record["kind"], record["mean"], record["run"]) == ("kaggle", 0.77, handed_in.id)
    for other in ({"folds": 3}, {"seed": 1}, {"lr": 1e-4}):
        (record,) = made(backbones=["random"], **other).table.records
        assert record["kind"] == "probe", other


@pytest.mark.parametrize(
    "other",
    [
        {"lr": [1e-3, 1e-4]}, {"val": "matched"}, {"target": "site"}, {"splits": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_leaderboard_result_of_another_protocol_stands_nowhere(
    home: Path, tmp_path: Path, other: dict[str, Any]
) -> None:
    ds = to_hand_in()
    ds.table["site"] = np.where(np.arange(N) % 3 < 1, "a", "b").astype(object)
    features = np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32)
    put_store(home, ds, "random", features)
    if "splits" in other:
        other = {"splits": tmp_path / "splits.json"}
        write_splits(plan_splits(ds, subsets=["S"], folds=2, seed=5, test="official"), other["splits"])
    save_scored(probe_features(ds, "random", **{"subset": "S", "folds": 2, "test": "official", **other}))
    (record,) = made(backbones=["random"]).table.records
    assert record["kind"] == "probe"


def test_g1_has_the_exact_totals() -> None:
    table = run_study("G1").table
    assert [record["parameters"] for record in table.records] == [
        10_245, 23_518_277, 7_685, 21_677_957, 3_677_709, 72_364_045,
    ]  # fmt: skip
    assert [record["agrees"] for record in table.records] == [*["rounded"] * 4, "truncated", "rounded"]


def test_table1_counts_the_images_of_a_dataset(toy: ImageDataset) -> None:
    done = run_study("table1", StudyConfig(folds=2, datasets=("toy", "pneumonia")))
    counts = {(r["dataset"], r["column"]): r["images"] for r in done.table.records}
    assert [counts["toy", c] for c in ("S", "M", "F", "test")] == [20, 40, 80, 40]
    assert counts["pneumonia", "F"] is None
    assert [r["paper"] for r in done.table.records if r["dataset"] == "pneumonia"] == [50, 500, 5216, 624]


def test_the_command_prints_writes_and_leaves_with_a_status(
    toy: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = typer.Typer()
    app.command()(commands.run)
    app.command()(commands.curves)
    asked = ["run", "table2", "--dataset", "toy", "--backbone", "random", "--subset", "S,M", "--folds", "2"]
    runner = CliRunner()
    figure = tmp_path / "curves.svg"
    done = runner.invoke(app, [*asked, "--figure", str(figure), "--json", str(tmp_path / "t.json")])
    assert done.exit_code == 0, done.output
    assert "| Random" in done.stdout
    assert figure.read_text(encoding="utf-8").startswith("<?xml")
    answer = json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert [record["subset"] for record in answer["records"]] == ["S", "M"]
    done = runner.invoke(app, [*asked, "--format", "csv", "--output", str(tmp_path / "t.csv")])
    assert done.exit_code == 0
    assert done.stdout == ""
    assert (tmp_path / "t.csv").read_text(encoding="utf-8").startswith("dataset,model,kind,")
    assert runner.invoke(app, [*asked, "--backbone", "dino"]).exit_code == 0
    assert runner.invoke(app, ["run", "table2", "--dataset", "pneumonia"]).exit_code == 1
    assert isinstance(runner.invoke(app, [*asked, "--format", "html"]).exception, UsageError)
    assert isinstance(runner.invoke(app, [*asked, "--figure", "x.gif"]).exception, UsageError)
    toml = tmp_path / "own.toml"
    toml.write_text('datasets = ["toy"]\nbackbones = ["random"]\nsubsets = ["S"]\nfolds = 3\n')
    for flags, folds in (([], 3), (["--folds", "5"], 5), (["--folds", "2"], 2)):
        done = runner.invoke(app, ["run", str(toml), *flags, "--json", "-"])
        assert [record["folds"] for record in json.loads(done.stdout)["records"]] == [folds], done.output
    done = runner.invoke(app, ["curves", "--dataset", "toy"])
    assert done.exit_code == 0, done.output
    assert "random, linear" in done.stdout
