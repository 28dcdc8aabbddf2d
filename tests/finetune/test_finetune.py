"""What a user relies on in finetuning: the protocol of probing, and the same result whatever happened on the way."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

import embcache.finetune.epochs as checkpoint
from embcache.config import FinetuneConfig
from embcache.data.dataset import ImageDataset, load_dataset, read_snapshot
from embcache.errors import CorruptStoreError, EmbcacheError, ProtocolError, StoreError, UsageError
from embcache.extract.extract import extract_features
from embcache.finetune.epochs import Trainer
from embcache.finetune.finetune import find_finetuned, finetune, finetune_images
from embcache.finetune.model import ImageModel
from embcache.maintain.listing import list_interrupted
from embcache.probe.probe import probe_features
from embcache.probe.schedule import Schedule, schedule_of
from embcache.results.curves import request_flags
from embcache.runs.folders import Result, list_results, load_heads, load_predictions, runs_dir
from tests.finetune.conftest import QUICK, RESNET, VIT, draw
from tests.refusal import refused

OPTIONS: dict[str, Any] = QUICK


def run(ds: ImageDataset, **changes: Any) -> Result:
    return finetune_images(ds, RESNET, **{**OPTIONS, **changes})


def find(ds: ImageDataset, **changes: Any) -> Result | str:
    options = {**OPTIONS, **changes}
    return find_finetuned(ds, [RESNET], options.pop("subset"), FinetuneConfig.make(None, options))


@pytest.fixture(autouse=True)
def _notes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "embcache")


def predictions(ds: ImageDataset, result: Result, home: Path | None = None) -> pd.DataFrame:
    return load_predictions(runs_dir(ds.name, home) / result.id)


def reached(result: Result) -> tuple[object, ...]:
    return result.id, result.mean, result.std, result.interval, result.val_mean, result.folds


def partials(ds: ImageDataset, home: Path | None = None) -> list[Path]:
    return list(runs_dir(ds.name, home).glob(".*.partial"))


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Ctrl-C after so many checkpoints."""

    def after(epochs: int) -> None:
        original, seen = checkpoint.CheckpointFolder.write, []

        def write(self: checkpoint.CheckpointFolder, progress: checkpoint.Progress) -> None:
            original(self, progress)
            seen.append(1)
            if len(seen) == epochs:
                raise KeyboardInterrupt

        monkeypatch.setattr(checkpoint.CheckpointFolder, "write", write)

    yield after
    monkeypatch.undo()


def test_no_test_label_decides_anything(ds: ImageDataset, home: Path) -> None:
    table = ds.table.copy()
    test = table["split"] == "test"
    table.loc[test, "label"] = 1 - table.loc[test, "label"]
    kept = []
    for one in (ds, replace(ds, table=table)):
        result = run(one)
        heads = load_heads(runs_dir(ds.name, home) / result.id)
        folds = [(f.best_epoch, f.epochs, f.val_score, f.lr) for f in result.folds]
        kept.append((folds, [{name: p.tolist() for name, p in head.items()} for head in heads], result.mean))
    assert kept[0][:2] == kept[1][:2]
    assert kept[0][2] != kept[1][2]


Written = dict[tuple[int, int], tuple[object, ...]]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Written:
    """By fold and epoch what was kept after it: losses, scores, rates, and the checksums of model and moments."""
    found: Written = {}
    original = checkpoint.CheckpointFolder.write

    def write(self: checkpoint.CheckpointFolder, progress: checkpoint.Progress) -> None:
        original(self, progress)
        state = progress.folds[-1]
        if not state.finished:
            checksums = {role: file.crc32c for role, file in state.files.items()}
            key = (len(progress.folds) - 1, state.epoch)
            found[key] = (state.losses, state.val_scores, state.lrs, checksums)

    monkeypatch.setattr(checkpoint.CheckpointFolder, "write", write)
    return found


def take(written: Written) -> Written:
    """What was written so far, which is then forgotten."""
    found = dict(written)
    written.clear()
    return found


def assert_same(ds: ImageDataset, one: Result, home: Path | None, other: Result, other_home: Path | None) -> None:
    """Results, predictions and models are equal bit for bit."""
    assert reached(one) == reached(other)
    pd.testing.assert_frame_equal(predictions(ds, one, home), predictions(ds, other, other_home), check_exact=True)
    for fold in range(len(one.folds)):
        models = [
            load_file(runs_dir(ds.name, folder) / one.id / f"model-fold{fold}.safetensors")
            for folder in (home, other_home)
        ]
        assert models[0].keys() == models[1].keys()
        assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_the_result_is_a_run_like_one_of_probing(ds: ImageDataset) -> None:
    extract_features(RESNET, ds, transform="paper")
    probed = probe_features(ds, RESNET, subset=16, folds=2, val="matched")
    result = run(ds)
    assert result.kind == "finetune"
    assert result.id.startswith("finetune-linear-16-")
    assert result.request["splits"] == probed.request["splits"]
    assert (result.n_train, result.n_val, result.n_test, result.metric) == (16, 16, 12, "auc")
    assert [r.kind for r in list_results(dataset=ds.name)] == ["finetune", "probe"]
    assert result.recipes[RESNET]["transform"]["kind"] == "paper"
    assert [fold.lr for fold in result.folds] == [1e-3, 1e-3]
    assert result.request["schedule"] == {"batch_size": 8, "max_epochs": 2}, "only what differs from its default"
    assert schedule_of(result) == asdict(Schedule(batch_size=8, max_epochs=2))
    assert request_flags(result) == ["--folds", "2", "--val", "matched", "--max-epochs", "2", "--batch-size", "8"]
    table = predictions(ds, result)
    assert table["id"].tolist() == predictions(ds, probed)["id"].tolist()
    assert np.allclose(table["p_0"] + table["p_1"], 1)
    kept = runs_dir(ds.name) / result.id
    for fold, head in enumerate(load_heads(kept)):
        model = load_file(kept / f"model-fold{fold}.safetensors")
        assert torch.equal(model["head.classifier.weight"], head["classifier.weight"])
    assert not partials(ds)


def test_a_saved_result_is_returned_and_found(ds: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    before = find(ds, workers=1)
    result = run(ds)
    assert before == result.id
    monkeypatch.setattr(Trainer, "epochs", None)
    assert reached(run(ds)) == reached(result)
    found = find(ds)
    assert isinstance(found, Result)
    assert reached(found) == reached(result)
    assert find(ds, seed=1) != result.id


def test_nothing_that_should_not_matter_changes_the_result(ds: ImageDataset, tmp_path: Path) -> None:
    reference = run(ds, home=tmp_path / "a")
    p = predictions(ds, reference, tmp_path / "a")
    for number, changes in enumerate(({"pixel_cache": False}, {"workers": 0, "models": False})):
        home = tmp_path / str(number)
        other = run(ds, home=home, **changes)
        assert reached(other) == reached(reference)
        pd.testing.assert_frame_equal(predictions(ds, other, home), p, check_exact=True)
        assert bool(list((home / ds.name).glob("pixels-*"))) == changes.get("pixel_cache", True)


def test_what_matters_makes_another_run(ds: ImageDataset) -> None:
    ids = {
        find(ds, **changes)
        for changes in (
            {}, {"seed": 1}, {"lr": 1e-4}, {"max_epochs": 4}, {"precision": "bf16"}, {"transform": "imagenet"},
            {"accumulate": 2}, {"head": "mlp"}, {"subset": 12}, {"folds": 3}, {"batch_size": 4},
            {"exclude_test_overlap": True},
        )
    }  # fmt: skip
    assert len(ids) == 12


def test_images_that_cannot_be_read_or_are_above_the_limit_are_left_out_either_way(
    pictures: Path, ds: ImageDataset, tmp_path: Path
) -> None:
    shutil.copytree(pictures, tmp_path / "lesions")
    broken = tmp_path / "lesions" / "train" / "benign" / "07.png"
    broken.write_bytes(broken.read_bytes()[:150])
    draw(tmp_path / "lesions" / "train" / "benign" / "03.png", 3, 0, size=33)
    mixed = load_dataset("folder", tmp_path / "lesions")
    result = run(mixed, max_pixels=32 * 32, max_epochs=1)
    assert any("2 unreadable" in note for note in result.notes)
    direct = run(mixed, max_pixels=32 * 32, max_epochs=1, pixel_cache=False, home=tmp_path / "direct")
    assert reached(direct) == reached(result)
    assert find(mixed, max_pixels=33 * 33, max_epochs=1) != result.id


def test_pixels_that_do_not_fit_in_memory_are_mapped_from_a_file(
    ds: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = run(ds)
    monkeypatch.setattr(checkpoint.os, "sysconf", lambda name: 1)
    assert isinstance(checkpoint.allocate((4, 4, 4, 3), tmp_path / "a"), np.memmap)
    assert reached(run(ds, again=True)) == reached(reference)


def test_an_interrupted_run_is_resumed_only_on_request(
    ds: ImageDataset, tmp_path: Path, interrupt: Any, written: Written, caplog: pytest.LogCaptureFixture
) -> None:
    reference = run(ds, home=tmp_path / "whole")
    epochs = take(written)
    assert list(epochs) == [(fold, epoch) for fold in range(2) for epoch in range(1, 3)]
    # Within the first fold, after its last epoch, after its test, within the second fold.
    for checkpoints in (1, 2, 3, 4):
        interrupt(checkpoints)
        with pytest.raises(KeyboardInterrupt):
            run(ds)
        interrupt(10**6)
        with refused(StoreError, "run-interrupted") as where:
            run(ds)
        resumed = run(ds, resume=True)
        assert f"resumed: {where.value.found}" in caplog.messages
        assert take(written) == epochs
        assert_same(ds, resumed, None, reference, tmp_path / "whole")
        assert not partials(ds)
        shutil.rmtree(runs_dir(ds.name))


def test_a_killed_process_is_resumed_to_the_same_bits(
    ds: ImageDataset, tmp_path: Path, networks: Path, written: Written
) -> None:
    reference = run(ds, home=tmp_path / "whole")
    epochs = take(written)
    options = {name: value for name, value in OPTIONS.items() if name != "workers"}
    script = (
        "import os, signal\nfrom embcache.data.dataset import load_dataset\n"
        "import embcache.finetune.epochs as checkpoint\n"
        "from embcache.finetune.finetune import finetune_images\n"
        "original, seen = checkpoint.CheckpointFolder.save, []\n"
        "def save(self, name, tensors):\n"
        "    seen.append(name)\n"
        "    if name.startswith('fold1-train-000002'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(self, name, tensors)\n"
        "checkpoint.CheckpointFolder.save = save\n"
        f"ds, home = load_dataset('folder', {str(ds.root)!r}), {str(tmp_path / 'killed')!r}\n"
        f"finetune_images(ds, {RESNET!r}, home=home, **{options!r})\n"
    )
    environment = {**os.environ, "EMBCACHE_WEIGHTS": str(networks), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    resumed = run(ds, home=tmp_path / "killed", resume=True)
    assert take(written) == {(1, 2): epochs[1, 2]}
    assert_same(ds, resumed, tmp_path / "killed", reference, tmp_path / "whole")


def test_a_run_of_another_request_is_not_resumed_from_this_checkpoint(
    ds: ImageDataset, interrupt: Any, caplog: pytest.LogCaptureFixture
) -> None:
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        run(ds)
    interrupt(10**6)
    other = run(ds, seed=1, resume=True)
    assert any("no checkpoint to resume" in line for line in caplog.messages)
    assert reached(other) == reached(run(ds, seed=1, again=True))
    assert len(partials(ds)) == 1  # the first one's, untouched


def test_other_classes_leave_the_snapshot_as_it_is_and_are_resumed(ds: ImageDataset, interrupt: Any) -> None:
    labels = np.where(np.arange(len(ds)) % 3 == 0, 2, ds.labels)
    three = replace(ds, class_names=(*ds.class_names, "other"), metric="macro_auc", table=ds.table.assign(label=labels))
    two = three.with_classes(["other"])
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        run(two)
    (interrupted,) = list_interrupted(dataset=ds.name)
    assert "--drop-class other" in interrupted.command
    interrupt(10**6)
    result = run(two, resume=True)
    assert result.class_names == ds.class_names
    snapshot = read_snapshot(ds.name)
    assert snapshot is not None
    assert snapshot.class_names == three.class_names
    assert len(snapshot) == len(ds)


def test_a_damaged_checkpoint_is_one_clear_error(ds: ImageDataset, interrupt: Any) -> None:
    interrupt(2)
    with pytest.raises(KeyboardInterrupt):
        run(ds)
    interrupt(10**6)
    (file,) = partials(ds)[0].glob("fold0-train-*")
    file.write_bytes(file.read_bytes()[:1000])
    with refused(CorruptStoreError, "checkpoint-corrupt"):
        run(ds, resume=True)
    assert run(ds, again=True).kind == "finetune"


def test_a_fold_that_diverges_stops_alone(ds: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(ds)
    original, calls = ImageModel.logits, []

    def spoil(self: ImageModel, pixels: torch.Tensor, masks: Any = None) -> torch.Tensor:
        calls.append(1)
        return original(self, pixels, masks) * (float("nan") if len(calls) == 1 else 1.0)

    monkeypatch.setattr(ImageModel, "logits", spoil)
    result = run(ds, again=True)
    assert [fold.failed for fold in result.folds] == [True, False]
    assert result.folds[1] == whole.folds[1]
    assert result.mean == whole.folds[1].score
    assert any("fold 0 diverged in its first epoch" in note for note in result.notes)
    assert sorted(path.name for path in (runs_dir(ds.name) / result.id).glob("model*")) == ["model-fold1.safetensors"]
    assert set(predictions(ds, result)["fold"]) == {1}


def test_every_fold_diverging_is_one_error_and_no_run(ds: ImageDataset) -> None:
    with pytest.raises(ProtocolError, match="diverged"):
        run(ds, lr=1e30)
    assert not list_results(dataset=ds.name)
    assert not partials(ds)
    with pytest.raises(ProtocolError, match="diverged"):  # and not: an interrupted run is there
        run(ds, lr=1e30)


def test_a_run_without_models_is_reported_where_they_are_asked_for(
    ds: ImageDataset, caplog: pytest.LogCaptureFixture
) -> None:
    def lost(**changes: Any) -> list[str]:
        caplog.clear()
        run(ds, max_epochs=1, **changes)
        return [line for line in caplog.messages if "not kept" in line]

    assert lost(models=False) == []
    (note,) = lost()
    assert "models were not kept; --again trains and keeps them" in note
    assert lost(models=False) == []
    assert lost(again=True) == []
    assert lost() == []


def test_several_backbones_are_trained_together(ds: ImageDataset) -> None:
    result = finetune_images(ds, [RESNET, VIT], **{**OPTIONS, "head": "dvme", "max_epochs": 1})
    assert result.backbones == (RESNET, VIT)
    state = load_file(runs_dir(ds.name) / result.id / "model-fold0.safetensors")
    assert {name.split(".")[0] for name in state} == {"backbone", "head"}
    assert any(name.startswith(f"backbone.{VIT}.blocks") for name in state)
    assert any(name.startswith(f"head.project.{RESNET}") for name in state)


@pytest.mark.parametrize(
    ("changes", "error", "code"),
    [
        ({"head": "knn"}, UsageError, "head-needs-features"),
        ({"head": "concat"}, UsageError, "head-needs-features"),
        ({"precision": "fp16", "device": "cpu"}, UsageError, "precision-needs-cuda"),
        ({"accumulate": 9}, UsageError, "option-bounds"),
        ({"accumulate": 8}, UsageError, "batch-of-one"),
        ({"subset": 500}, ProtocolError, "subset-too-large"),
    ],
)
def test_bad_requests_are_one_error_and_write_no_run(
    ds: ImageDataset, changes: dict[str, Any], error: type[EmbcacheError], code: str
) -> None:
    with refused(error, code):
        run(ds, **changes)
    assert not runs_dir(ds.name).exists() or not list(runs_dir(ds.name).iterdir())


def test_images_of_another_size_are_resized_and_cropped_at_random(
    tmp_path: Path, ds: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(24):
        draw(tmp_path / "large" / ("a" if index % 2 else "b") / f"{index}.png", index, 30, size=230 + index)
    large = load_dataset("folder", tmp_path / "large")
    seen: list[tuple[int, ...]] = []
    original = ImageModel.logits

    def look(self: ImageModel, pixels: torch.Tensor, masks: Any = None) -> torch.Tensor:
        seen.append(tuple(pixels.shape[1:]))
        return original(self, pixels, masks)

    monkeypatch.setattr(ImageModel, "logits", look)
    result = run(large, subset=6, max_epochs=1)
    assert set(seen) == {(224, 224, 3)}
    assert result.request["augment"]["frame"] == [256, 256]


def test_progress_reaches_its_end(ds: ImageDataset) -> None:
    seen: list[tuple[int, int]] = []
    options = {**OPTIONS}
    subset = options.pop("subset")
    config = FinetuneConfig.make(None, options)
    finetune(ds, [RESNET], subset, config, progress=lambda done, total, label: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (2 * (2 * 32 + 12 + 16), 2 * (2 * 32 + 12 + 16))  # epochs, test, validation of the epoch kept


def test_predictions_of_validation_are_those_that_chose_the_epoch(ds: ImageDataset) -> None:
    result = run(ds)
    held = load_predictions(runs_dir(ds.name) / result.id, "validation")
    for fold in result.folds:
        part = held[held["fold"] == fold.fold]
        assert roc_auc_score(part["label"], part["logit_1"] - part["logit_0"]) == pytest.approx(fold.val_score)
