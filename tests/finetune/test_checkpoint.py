"""Checkpoints: what was saved is read back or refused, whatever happened to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embcache.errors import CorruptStoreError, StoreError
from embcache.finetune.epochs import CheckpointFolder, FoldState, Progress
from tests.refusal import refused

REQUEST = {"kind": "finetune", "seed": 0}


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    (tmp_path / "run").mkdir()
    return CheckpointFolder(tmp_path / "run", REQUEST)


def put(folder: CheckpointFolder, epoch: int = 1) -> Progress:
    files = {"train": folder.save(f"fold0-train-{epoch:06d}.safetensors", {"w": torch.arange(6.0).view(2, 3) * epoch})}
    state = FoldState((0.1 + 0.2,) * epoch, (1 / 3,) * epoch, (1e-3,) * epoch, {"scale": 65536.0}, files=files)
    progress = Progress((state,), 1.5, {"device": "cpu", "threads": 1})
    folder.write(progress)
    return progress


def test_progress_is_read_back_as_it_was_written(folder: CheckpointFolder) -> None:
    written = put(folder)
    assert folder.read() == written
    assert torch.equal(folder.load(written.folds[0].files["train"])["w"], torch.arange(6.0).view(2, 3))


def test_only_files_that_count_are_kept(folder: CheckpointFolder) -> None:
    put(folder, 1)
    (folder.path / "fold0-train-000009.safetensors").write_bytes(b"left by a killed process")
    put(folder, 2)
    assert [path.name for path in folder.path.glob("*.safetensors")] == ["fold0-train-000002.safetensors"]


def test_a_flipped_bit_is_one_clear_error(folder: CheckpointFolder) -> None:
    progress = put(folder)
    for name in ("state.json", "fold0-train-000001.safetensors"):
        path = folder.path / name
        before = path.read_bytes()
        path.write_bytes(before[:-3] + bytes([before[-3] ^ 1]) + before[-2:])
        with refused(CorruptStoreError, "checkpoint-corrupt"):
            (folder.read() if name == "state.json" else folder.load(progress.folds[0].files["train"]))
        path.write_bytes(before)
    (folder.path / "fold0-train-000001.safetensors").unlink()
    with refused(CorruptStoreError, "checkpoint-corrupt"):
        folder.load(progress.folds[0].files["train"])


def test_a_checkpoint_of_another_request_is_refused(folder: CheckpointFolder) -> None:
    put(folder)
    with refused(CorruptStoreError, "checkpoint-corrupt"):
        CheckpointFolder(folder.path, {**REQUEST, "seed": 1}).read()


def test_two_processes_do_not_train_the_same_run(folder: CheckpointFolder) -> None:
    with folder.lock(), refused(StoreError, "run-in-use"), folder.lock():
        pass
    assert not folder.path.exists()  # nothing was saved, so nothing stays


def test_a_full_disk_is_reported(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("embcache.finetune.epochs.save_file", fail)
    with refused(StoreError, "checkpoint-not-written") as caught:
        put(folder)
    assert "No space left" in str(caught.value.found)
