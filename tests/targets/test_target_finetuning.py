"""Finetuning by findings, numbers and grades: the loss of probing, resumed as uninterrupted, loaded and exported."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import embcache.finetune.epochs as checkpoint
from embcache.data.classes import retarget
from embcache.data.dataset import ImageDataset
from embcache.finetune.finetune import finetune_images
from embcache.finetune.model import load_finetuned
from embcache.runs.folders import Result, load_heads, load_predictions, runs_dir
from tests.finetune.conftest import QUICK, RESNET
from tests.finetune.conftest import ds as ds
from tests.finetune.conftest import networks as networks
from tests.finetune.conftest import pictures as pictures

TARGETS = {
    "findings": ("x,y", "bce"), "weighted": ("x,y", "weighted-bce"), "number": ("bmi", "squared"),
    "huber": ("bmi", "huber"), "ordinal": ("grade", "cumulative"),
}  # fmt: skip


def with_target(ds: ImageDataset, name: str) -> ImageDataset:
    rng = np.random.default_rng(0)
    y, n = ds.labels, len(ds)
    text = np.where(rng.random((n, 2)) < 0.1, "", np.column_stack([y, rng.integers(0, 2, n)]).astype(str))
    table = ds.table.assign(x=text[:, 0], y=text[:, 1], bmi=(25 + 4 * y + rng.normal(size=n)).round(2).astype(str),
                            grade=(y + rng.integers(0, 2, len(ds))).astype(str))  # fmt: skip
    columns, loss = TARGETS[name]
    kind = name if name in ("number", "ordinal") else "number" if name == "huber" else "findings"
    return retarget(dataclasses.replace(ds, table=table), columns, kind, loss=loss)


def run(ds: ImageDataset, **changes: Any) -> Result:
    return finetune_images(ds, RESNET, **{**QUICK, **changes})


@pytest.mark.parametrize("name", TARGETS)
def test_interrupted_and_resumed_is_uninterrupted(
    ds: ImageDataset, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = with_target(ds, name)
    whole = run(mine, home=tmp_path / "whole")
    original, seen = checkpoint.CheckpointFolder.write, []

    def write(self: checkpoint.CheckpointFolder, progress: checkpoint.Progress) -> None:
        original(self, progress)
        seen.append(1)
        if len(seen) in (1, 4):  # in the first fold, and in the second
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.CheckpointFolder, "write", write)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run(mine, resume=True)
    resumed = run(mine, resume=True)
    assert (resumed.id, resumed.folds, resumed.estimate) == (whole.id, whole.folds, whole.estimate)
    folders = [runs_dir(ds.name, home) / whole.id for home in (None, tmp_path / "whole")]
    pd.testing.assert_frame_equal(*(load_predictions(folder) for folder in folders))
    for one, other in zip(*(load_heads(folder) for folder in folders), strict=True):
        assert one.keys() == other.keys()
        assert all((one[key] == other[key]).all() for key in one)
    # Constants are those of each fold's own training rows.
    if resumed.task.kind == "number":
        means = {float(head["target.mean"][0]) for head in load_heads(folders[0])}
        assert len(means) == 2


@pytest.mark.parametrize("name", ["findings", "number", "ordinal"])
def test_a_loaded_model_predicts_what_was_tested(ds: ImageDataset, name: str, pictures: Path) -> None:
    mine = with_target(ds, name)
    result = run(mine, max_epochs=1)
    assert (result.task.kind, result.task.names) == (mine.task.kind, mine.task.names)
    table = load_predictions(runs_dir(ds.name) / result.id)
    paths = dict(zip(ds.table["id"], ds.table["path"], strict=True))
    for fold in range(2):
        model, rows = load_finetuned(result.id, fold), table[table["fold"] == fold]
        pixels = np.stack([model.transform.geometry(np.asarray(Image.open(pictures / paths[i]))) for i in rows["id"]])
        columns = [column for column in table if column == "prediction" or column.startswith("p_")]
        np.testing.assert_allclose(model.predict(pixels), rows[columns].to_numpy(), rtol=1e-5, atol=1e-6)
    assert bool(result.baseline) == (name != "ordinal")
