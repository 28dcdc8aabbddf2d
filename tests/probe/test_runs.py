"""Run folders: whole or not at all, verified, found by a few letters."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from embcache import io
from embcache.errors import StoreError, StoreNotFoundError
from embcache.maintain.gc import collect_home
from embcache.probe.heads import make_head
from embcache.probe.protocol import plan_splits
from embcache.probe.summary import RunCell, build_result, prediction_table
from embcache.runs.folders import (
    PROTOCOL_VERSION,
    Result,
    find_run,
    find_run_anywhere,
    list_results,
    list_unreadable,
    load_heads,
    load_predictions,
    load_result,
    run_id,
    runs_dir,
    save_run,
)
from embcache.sealed import seal, unseal
from tests.crash.faults import Call, between
from tests.probe.build import make_dataset
from tests.refusal import refused

MODEL = np.random.default_rng(0).bytes(3_000_000)


def make_run(
    kind: str = "finetune", head: str = "linear", seed: int = 0, dataset: str = "toy"
) -> tuple[Result, pd.DataFrame]:
    """A result that some other path than probing made."""
    ds = make_dataset([0, 1] * 40, split=["train"] * 60 + ["test"] * 20, name=dataset)
    plans = [plan_splits(ds, subsets=["S"], folds=3, seed=s) for s in (seed, seed + 1)]
    rng = np.random.default_rng(seed)
    logits, val = rng.normal(size=(6, 20, 2)), rng.normal(size=(20, 2))
    request = {"kind": kind, "protocol": PROTOCOL_VERSION, "head": {"name": head}, "subset": "S", "metric": "auc"}
    request |= {"dataset": dataset, "seed": seed}
    cell = RunCell(
        ds, tuple(plans), "S", ("random",), make_head(head), request, {"random": {"backbone": "random"}},
        notes=("a note of its own",),
    )  # fmt: skip
    outcomes = [cell.outcome(k, logits[k], val, 0.5 + k / 100, best_epoch=k + 1, epochs=9, lr=1e-4) for k in range(6)]
    return build_result(cell, outcomes, 1.0), prediction_table(cell, outcomes)


def test_results_of_other_paths_are_put_together_the_same_way(home: Path) -> None:
    result, frame = make_run()
    assert result.id.startswith("finetune-linear-S-")
    assert run_id({**result.request, "kind": "probe"}).startswith("linear-S-")
    assert [(f.fold, f.repeat, f.best_epoch, f.lr) for f in result.folds] == [
        (k, k // 3, k + 1, 1e-4) for k in range(6)
    ]
    assert result.mean == pytest.approx(np.mean([f.score for f in result.folds]))
    assert "a note of its own" in result.notes
    assert list(frame.columns) == ["id", "label", "group", "fold", "p_0", "p_1", "logit_0", "logit_1"]
    assert frame["group"].tolist() == frame["id"].tolist()  # each image is a group of its own here
    assert frame.groupby("fold").size().tolist() == [20] * 6
    assert load_result(save_run(result, frame, [], home)) == result


def test_a_single_scored_fold_has_no_deviation() -> None:
    ds = make_dataset([0, 1] * 40, split=["train"] * 60 + ["test"] * 20)
    plan = plan_splits(ds, subsets=["S"], folds=2)
    logits = np.random.default_rng(0).normal(size=(2, 20, 2))
    request = {"kind": "probe", "head": {"name": "linear"}, "subset": "S", "metric": "auc"}
    cell = RunCell(ds, (plan,), "S", ("a",), make_head("linear"), request, {})
    outcomes = [
        cell.outcome(0, logits[0], logits[0], None, best_epoch=0, epochs=1, lr=1e-3, diverged=True),
        cell.outcome(1, logits[1], logits[1], 0.7, best_epoch=5, epochs=30, lr=1e-3),
    ]
    result = build_result(cell, outcomes, 1.0)
    assert result.mean == result.folds[1].score
    assert result.std is None
    assert "±" not in repr(result)
    assert Result.from_json(result.to_json()) == result


def test_files_of_a_run_are_moved_in_and_recorded(home: Path, tmp_path: Path) -> None:
    result, frame = make_run()
    model = tmp_path / "model-fold0.safetensors"
    model.write_bytes(MODEL)
    run = save_run(result, frame, [], home, files={model.name: model, "log.txt": b"epoch 1"})
    assert not model.exists()
    assert (run / model.name).read_bytes() == MODEL
    assert (run / "log.txt").read_bytes() == b"epoch 1"
    assert not (run / "heads.safetensors").exists()
    assert find_run(result.id, "toy", home) == result
    with refused(StoreError, "run-file-damaged"):
        load_heads(run)
    damaged = bytearray(MODEL)
    damaged[-7] ^= 1
    (run / model.name).write_bytes(bytes(damaged))
    assert find_run(result.id, "toy", home) is None


def test_where_a_run_cannot_be_written_its_files_stay_where_they_were(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, frame = make_run()
    model = tmp_path / "model-fold0.safetensors"
    model.write_bytes(MODEL)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io, "swap_in", fail)
    with pytest.raises(OSError, match="No space"):
        save_run(result, frame, [], home, files={model.name: model})
    assert model.read_bytes() == MODEL
    assert list(runs_dir("toy", home).iterdir()) == []


@pytest.mark.parametrize(
    ("name", "harm"),
    [("predictions.parquet", "flipped bit"), ("heads.safetensors", "flipped bit"), ("heads.safetensors", "gone")],
)
def test_damaged_files_are_never_read(home: Path, name: str, harm: str) -> None:
    result, frame = make_run("probe")
    run = save_run(result, frame, [{"w": torch.ones(50)} for _ in range(6)], home)
    load = load_predictions if name.startswith("pred") else load_heads
    assert len(load(run))
    data = bytearray((run / name).read_bytes())
    data[len(data) // 2] ^= 16
    (run / name).write_bytes(bytes(data)) if harm == "flipped bit" else (run / name).unlink()
    with refused(StoreError, "run-file-damaged") as caught:
        load(run)
    assert name in str(caught.value)


def test_runs_are_found_by_id_by_its_beginning_and_by_its_digits(home: Path) -> None:
    made = [make_run(kind, head, seed) for kind, head, seed in [("probe", "linear", 0), ("probe", "dvme", 0)]]
    made.append(make_run("finetune", "linear", 1, dataset="other"))
    for result, frame in made:
        save_run(result, frame, [{"w": torch.ones(1)} for _ in range(6)], home)
    for result, _ in made:
        for asked in (result.id, result.id[:-6], result.id.rpartition("-")[2][:8]):
            assert find_run_anywhere(asked, home) == (result, runs_dir(result.dataset, home) / result.id)
    assert find_run_anywhere("fine", home)[0].dataset == "other"


def test_runs_that_are_not_there_or_several_are_listed(home: Path) -> None:
    with refused(StoreNotFoundError, "run-not-found") as caught:
        find_run_anywhere("linear-S", home)
    assert "none is saved yet" in str(caught.value)
    ids = []
    for seed in range(2):
        result, frame = make_run("probe", seed=seed)
        save_run(result, frame, [], home)
        ids.append(result.id)
    with refused(StoreNotFoundError, "several-runs") as caught:
        find_run_anywhere("linear-S", home)
    assert all(id in str(caught.value) for id in ids)
    with refused(StoreNotFoundError, "run-not-found") as caught:
        find_run_anywhere("lineer-S-" + ids[0][-12:], home)
    assert ids[0] in str(caught.value)
    assert caught.value.fix == "embcache results"
    with pytest.raises(StoreNotFoundError):
        find_run_anywhere("", home)


@pytest.mark.parametrize("harm", ["another version", "no checksum", "no files", "gone"])
def test_a_run_of_another_version_is_called_so_and_never_offered(home: Path, harm: str) -> None:
    (other, frame), (mine, _) = (make_run("probe", seed=seed) for seed in range(2))
    run = save_run(other, frame, [], home)
    save_run(mine, frame, [], home)
    path = run / "result.json"
    content = unseal(path.read_bytes(), path, "")
    texts = {
        "another version": seal({**content, "extra": 1}),
        "no checksum": json.dumps(content).encode(),
        "no files": seal({name: value for name, value in content.items() if name != "files"}),
    }
    path.write_bytes(texts[harm]) if harm != "gone" else path.unlink()
    for read in (lambda: find_run_anywhere(other.id, home), lambda: load_result(run)):
        with refused(StoreError, "run-not-readable") as caught:
            read()
        assert "feature store" not in str(caught.value)
        assert "KeyError" not in str(caught.value)
    assert (list_results(home), list_unreadable(home)) == ([mine], [run])
    assert list_unreadable(home, "another") == []
    assert find_run_anywhere("linear-S", home)[0] == mine
    with pytest.raises(StoreNotFoundError) as missing:
        find_run_anywhere("lineer-S", home)
    assert mine.id in str(missing.value)
    assert other.id not in str(missing.value)


class _KilledError(BaseException):
    """Nothing catches it, as nothing catches SIGKILL; what would be removed on an error is named apart below."""


@pytest.mark.parametrize("exchange", [True, False])
def test_killed_at_any_call_a_run_that_is_replaced_is_there(
    exchange: bool, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, frame = make_run("probe")
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    if not exchange:
        monkeypatch.setattr(io, "_rename_at", lambda *_: False)
    run = save_run(result, frame, [], home)
    later, at, ended = replace(result, seconds=2.0), 0, False
    while not ended:

        def kill(call: Call, do: Callable[[], Any], at: int = at) -> Any:
            if call.index >= at:
                raise _KilledError
            return do()

        try:
            with between(kill):
                save_run(later, frame, [], home)
            ended = True
        except _KilledError:
            pass
        (found,) = list_results(home)
        assert found in (result, later)
        assert find_run(result.id, "toy", home) == found
        at += 1
    assert at > 15
    for left in run.parent.iterdir():
        os.utime(left, (1, 1))
    left = len(list(run.parent.iterdir())) - 1
    assert collect_home(home)["leftovers"] == left
    assert [path.name for path in run.parent.iterdir()] == [run.name]


def test_two_writers_of_one_run_both_succeed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, frame = make_run("probe")
    for exchange in (True, False):
        monkeypatch.setattr(io, "_rename_at", io._rename_at if exchange else lambda *_: False)
        save_run(result, frame, [], home)
        for at in range(0, 30, 4):  # up to more than there are calls

            def meet(call: Call, do: Callable[[], Any], at: int = at) -> Any:
                if call.index == at:
                    with between(lambda _, do: do()):
                        save_run(replace(result, seconds=float(at)), frame, [], home)
                return do()

            with between(meet):
                save_run(result, frame, [], home)
            assert find_run(result.id, "toy", home) is not None, at
        assert [path.name for path in runs_dir("toy", home).iterdir()] == [result.id]


def test_checkpoints_of_a_finished_run_are_removed_and_others_stay(home: Path) -> None:
    result, frame = make_run("probe")
    run = save_run(result, frame, [], home)
    for id in (run.name, "linear-S-000000000000"):
        folder = run.parent / f".{id}.partial"
        folder.mkdir()
        (folder / "state.json").write_bytes(b"{}")
        os.utime(folder / "state.json", (1, 1))
    assert collect_home(home)["leftovers"] == 1
    assert sorted(path.name for path in run.parent.iterdir()) == [".linear-S-000000000000.partial", run.name]


def test_runs_in_a_folder_that_is_a_link_are_neither_read_nor_written(home: Path, tmp_path: Path) -> None:
    result, frame = make_run("probe")
    save_run(result, frame, [], tmp_path / "elsewhere")
    (home / "toy").mkdir(parents=True)
    (home / "toy" / "runs").symlink_to(tmp_path / "elsewhere" / "toy" / "runs")
    assert list_results(home) == []
    assert find_run(result.id, "toy", home) is None
    with refused(StoreError, "folder-irregular"):
        save_run(result, frame, [], home)
