"""What a plan's estimates rest on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from embcache.data.dataset import ImageDataset, load_dataset
from embcache.probe.results import FoldResult, ProbeResult
from embcache.report.grid import Model
from embcache.study import cost
from embcache.study.cost import Step, duration, estimate_steps, step_words, total_words
from embcache.study.plan import DatasetState
from embcache.study.settings import Settings
from tests.data.pictures import write_image
from tests.probe.build import make_dataset
from tests.report.build import make_result

LINEAR = Model("m", "probe", "linear", ("random",))
SETTINGS = Settings(folds=2)


def earlier(seconds: float, n_train: int, n_val: int, epochs: int = 30, folds: int = 2) -> ProbeResult:
    models = tuple(FoldResult(f, 0.8, 0.8, epochs, epochs, n_train, n_val, 1e-3, {}) for f in range(folds))
    result = make_result(seconds=seconds, n_train=n_train, n_val=n_val, backbones=("other",))
    return replace(result, folds=models)


def state(ds: ImageDataset, *subsets: str, model: Model = LINEAR) -> DatasetState:
    return DatasetState("toy", ds, "snapshot", missing={(model, subset): "" for subset in subsets})


def test_earlier_runs_are_scaled_by_what_training_and_validation_see(monkeypatch: pytest.MonkeyPatch) -> None:
    ds = make_dataset([k % 2 for k in range(60)], split=["train"] * 40 + ["test"] * 20, subset_sizes={"S": 10})
    # a fold trains on 10 or 20 images and validates on 20, each a third of a training image
    monkeypatch.setattr(cost, "list_results", lambda home: [earlier(60.0, 10, 20), earlier(9e9, 4000, 20)])
    (step,) = estimate_steps([state(ds, "S", "F")], SETTINGS)
    assert (step.action, step.count) == ("probe", 2)
    assert step.seconds == pytest.approx(60 + 60 * (20 + 20 / 3) / (10 + 20 / 3))
    assert step.basis.startswith("2 earlier runs")
    (step,) = estimate_steps([state(ds, "S")], replace(SETTINGS, repeats=3))
    assert step.seconds == pytest.approx(180)
    (step,) = estimate_steps([state(ds, "S")], replace(SETTINGS, val="matched"))
    assert step.seconds == pytest.approx(60 * (10 + 10 / 3) / (10 + 20 / 3))


def test_runs_of_another_head_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ds = make_dataset([k % 2 for k in range(60)], split=["train"] * 40 + ["test"] * 20, subset_sizes={"S": 10})
    monkeypatch.setattr(cost, "list_results", lambda home: [earlier(60.0, 10, 20)])
    (step,) = estimate_steps([state(ds, "S", model=replace(LINEAR, head="knn"))], SETTINGS)
    assert step.basis == "calibration: solved for 64 images"
    finetuning = replace(LINEAR, kind="finetune")
    monkeypatch.setattr(cost, "seconds_to_train", lambda spec, settings: 0.5)
    (step,) = estimate_steps([state(ds, "S", model=finetuning)], SETTINGS)
    assert step.basis == "calibration: up to 4 images forward and backward, 500 ms each; at 40 epochs"
    assert step.seconds == pytest.approx(0.5 * 2 * 40 * (10 + 20 / 3))


def test_an_extraction_is_calibrated_on_the_datasets_own_images(tmp_path: Path, home: Path) -> None:
    for k in range(6):
        write_image(tmp_path / "images" / ("a" if k % 2 else "b") / f"{k}.png", seed=k, size=(64, 64))
    ds = load_dataset("folder", tmp_path / "images")
    asked = DatasetState("mine", ds, "live", owed={"effnet_lite0": 6}, missing={(LINEAR, "S"): ""})
    lite = replace(LINEAR, backbones=("effnet_lite0",))
    asked.missing = {(lite, "S"): ""}
    said: list[str] = []
    extraction, probing = estimate_steps([asked], Settings(device="cpu", folds=2), said.append)
    assert (extraction.action, extraction.count, probing.action) == ("extract", 6, "probe")
    assert extraction.seconds is not None
    assert 0 < extraction.seconds < 6 * 60
    assert extraction.basis.startswith("calibration: up to 4 images here")
    assert said == [
        "calibrating the reading of mine …", "calibrating effnet_lite0 on mine …",
        "calibrating linear on effnet_lite0 …",
    ]  # fmt: skip


def test_one_architecture_is_calibrated_once_for_all_backbones_and_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([{(96, 96)}, {(96, 96)}, {(50, 40)}, {(50, 40)}, {(50, 40)}])
    monkeypatch.setattr(cost, "_sample", lambda ds: ([], next(sizes)))
    monkeypatch.setattr(cost, "seconds_to_read", lambda *_: 0.25)
    monkeypatch.setattr(cost, "seconds_to_extract", lambda *_: 0.5)
    monkeypatch.setattr(cost, "seconds_to_train", lambda *_: 0.5)
    ds = make_dataset([0, 1] * 30, split=["train"] * 40 + ["test"] * 20, subset_sizes={"S": 10})
    heads = [replace(LINEAR, backbones=(name,)) for name in ("supervised", "simclr")]
    tuned = [replace(model, kind="finetune") for model in heads]
    missing = {(model, "S"): "" for model in heads + tuned}
    said: list[str] = []
    states = [
        DatasetState(name, ds, "live", owed=dict.fromkeys(("supervised", "simclr"), 9), missing=dict(missing))
        for name in ("one", "two")
    ]  # fmt: skip
    steps = estimate_steps(states, SETTINGS, said.append)
    assert [step.seconds for step in steps if step.action == "extract"] == [0.75 * 9] * 4
    assert said == [
        "calibrating the reading of one …", "calibrating supervised on one …",
        "calibrating the finetuning of supervised …", "calibrating linear on supervised …",
        "calibrating the reading of two …", "calibrating supervised on two …",  # images of another size
    ]  # fmt: skip


def test_a_long_first_step_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 8.0, 0.0, 0.5, 1.0, 2.0])
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(now))
    steps: list[int] = []
    assert cost._per_image(steps.append, torch.device("cpu")) == 4.0
    assert cost._per_image(steps.append, torch.device("cpu")) == 0.25
    assert steps == [2, 2, 4]


def test_costs_are_told_in_words() -> None:
    assert [duration(s) for s in (0.2, 40, 600, 3 * 3600)] == ["1 s", "40 s", "10 min", "3.0 h"]
    known = Step("d", "probe", "what", 1, 60.0, "basis")
    unknown = Step("d", "extract", "what", 2, None, "basis")
    assert step_words(known) == "d: what: 1 result, about 60 s (basis)"
    assert step_words(unknown) == "d: what: 2 images, cost not known (basis)"
    assert total_words([known, unknown]) == "in all about 60 s, rough, and 1 step whose cost is not known"
