"""Predictions by a finetuned run: its own models, nothing of what training began with."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from embcache.data.dataset import ImageDataset
from embcache.errors import RecipeError, StoreError, UsageError
from embcache.finetune.finetune import finetune_images
from embcache.probe.predictions import Adjust
from embcache.probe.summary import adjust_models
from embcache.results.predict import predict
from embcache.runs.folders import find_run_anywhere, load_predictions
from tests.finetune.conftest import QUICK, RESNET, VIT, ds, networks, pictures
from tests.refusal import refused

__all__ = ["ds", "networks", "pictures"]  # fixtures


def test_test_images_get_their_stored_predictions(
    ds: ImageDataset, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ds.root is not None
    result = finetune_images(ds, [RESNET, VIT], head="dvme", home=home, **QUICK)
    monkeypatch.setenv("EMBCACHE_WEIGHTS", str(tmp_path / "nothing"))
    for store in home.glob("*/pixels-*"):
        shutil.rmtree(store)
    (tmp_path / "text.png").write_text("x")
    found = predict(result.id, [ds.root / "test", tmp_path / "text.png"], home=home)
    assert list(found.failed) == [str(tmp_path / "text.png")]
    table = load_predictions(find_run_anywhere(result.id, home)[1]).groupby("id")[["p_0", "p_1"]].mean()
    assert len(table) == len(found.images) - 1
    for image, p in zip(found.images[:-1], found.p, strict=False):
        np.testing.assert_allclose(p, table.loc[Path(image).relative_to(ds.root).as_posix()], rtol=0, atol=1e-5)
    adjusted = predict(result.id, [ds.root / "test"], home=home, prevalence="0.1", calibrate=True)
    folder = find_run_anywhere(result.id, home)[1]
    models = adjust_models(result, folder, Adjust(0.1, calibrate=True))
    rows = load_predictions(folder)
    p = [m.probabilities(rows.loc[rows["fold"] == f, ["logit_0", "logit_1"]].to_numpy()) for f, m in enumerate(models)]
    ids = rows.loc[rows["fold"] == 0, "id"].tolist()
    for image, row in zip(adjusted.images, adjusted.p, strict=True):
        at = ids.index(Path(image).relative_to(ds.root).as_posix())
        np.testing.assert_allclose(row, np.mean(p, axis=0)[at], rtol=0, atol=1e-5)
    with refused(UsageError, "unused-option"):
        predict(result.id, [ds.root / "test"], home=home, weights=tmp_path / "text.png")
    monkeypatch.setattr("embcache.results.predict.DECODER_VERSION", "another")
    with refused(RecipeError, "recipe-differs") as caught:
        predict(result.id, [ds.root / "test"], home=home)
    assert caught.value.found == "decoder: another"


def test_a_run_that_kept_no_models_says_so(ds: ImageDataset, home: Path) -> None:
    assert ds.root is not None
    result = finetune_images(ds, [RESNET], home=home, models=False, **QUICK)
    with pytest.raises(StoreError):
        predict(result.id, [ds.root / "test"], home=home)
