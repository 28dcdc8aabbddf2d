"""Attention of a saved run: its averages against a transcription in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from embcache.data.dataset import ImageDataset
from embcache.errors import UsageError
from embcache.figures import attention as module
from embcache.figures.attention import draw_attention, mean_entropy, run_attention
from embcache.probe.probe import probe_features
from embcache.runs.folders import Result, load_heads, runs_dir
from tests.probe.build import make_dataset, make_features, put_store
from tests.refusal import refused

DIMS = {"a": 9, "b": 5}
WIDTH = 8


@pytest.fixture
def ds(home: Path) -> ImageDataset:
    ds = make_dataset(np.tile([0, 1, 1], 40), split=["train"] * 90 + ["test"] * 30)
    for seed, (name, dim) in enumerate(DIMS.items()):
        put_store(home, ds, name, make_features(ds, dim, seed=seed))
    return ds


def probed(ds: ImageDataset, home: Path, head: str = "dvme", folds: int = 3) -> tuple[Result, Path]:
    result = probe_features(ds, list(DIMS), head=head, subset="S", folds=folds, home=home, head_options={"proj_dim": 8})
    return result, runs_dir("toy", home) / result.id


def all_weights(ds: ImageDataset, params: dict[str, torch.Tensor]) -> NDArray[np.float64]:
    """Attention weights of each test image, (30, 16, 16), as Section 3.3 writes them."""
    p = {name: value.double() for name, value in params.items()}
    parts = [
        torch.from_numpy(make_features(ds, dim, seed=seed)[90:]).double() @ p[f"project.{name}.weight"].T
        + p[f"project.{name}.bias"]
        for seed, (name, dim) in enumerate(DIMS.items())
    ]
    meta = torch.cat(parts, 1)[..., None]
    q, k = (meta * p["attn.qkv.weight"].view(3)[i] + p["attn.qkv.bias"][i] for i in (0, 1))
    return np.asarray((q @ k.transpose(1, 2)).softmax(-1).numpy())


def blocks(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    return weights.reshape(2, WIDTH, 2, WIDTH).sum(3).mean(1)


def test_averages_over_images_and_folds(ds: ImageDataset, home: Path) -> None:
    result, folder = probed(ds, home)
    found = run_attention(ds, result, folder, home=home)
    each = [all_weights(ds, params) for params in load_heads(folder)]
    np.testing.assert_allclose(found.weights, np.mean([w.mean(0) for w in each], axis=0), rtol=1e-3)
    masses = np.stack([blocks(w.mean(0)) for w in each])
    np.testing.assert_allclose(found.mass, masses.mean(0), atol=1e-4)
    np.testing.assert_allclose(found.mass_std, masses.std(0, ddof=1), atol=1e-4)
    y = ds.labels[90:]
    for label, name in enumerate(ds.class_names):
        part = np.mean([blocks(w[y == label].mean(0)) for w in each], axis=0)
        np.testing.assert_allclose(found.by_class[name], part, atol=1e-4)
    entropies = [-(w * np.log(w)).sum(-1).mean() / math.log(2 * WIDTH) for w in each]
    assert found.entropy == pytest.approx(np.mean(entropies), abs=1e-4)
    assert found.entropy_std == pytest.approx(np.std(entropies, ddof=1), abs=1e-4)
    assert found.folds == 3
    shares = found.weights.mean(0)
    backbone, component, share = found.received[0]
    assert share == pytest.approx(shares.max(), rel=1e-5)
    assert list(DIMS).index(backbone) * WIDTH + component == shares.argmax()
    assert sum(s for _, _, s in found.received) <= 1 + 1e-5


@pytest.mark.parametrize("spread", [0.01, 0.3, 2.0, 5.0, 100.0])
def test_the_entropy_of_few_queries_is_that_of_all(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    tokens = 1000
    params = {
        "project.a.weight": torch.randn(tokens, 6, generator=rng), "project.a.bias": torch.zeros(tokens),
        "attn.qkv.weight": torch.tensor([[1.0], [spread], [1.0]]), "attn.qkv.bias": torch.zeros(3),
    }  # fmt: skip
    x = {"a": torch.randn(5, 6, generator=rng)}
    found = mean_entropy(params, x)
    monkeypatch.setattr(module, "_GRID", tokens)  # never fewer than tokens / 2: every query is computed
    assert found == pytest.approx(mean_entropy(params, x), abs=1e-4)


def test_one_fold_has_no_spread(ds: ImageDataset, home: Path) -> None:
    result, folder = probed(ds, home)
    heads = load_heads(folder)
    import embcache.figures.attention as ra

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ra, "load_heads", lambda run: heads[:1])
        found = run_attention(ds, result, folder, home=home)
    assert found.folds == 1
    assert np.isnan(found.mass_std).all()
    assert math.isnan(found.entropy_std)


@pytest.mark.parametrize("head", ["dvme", "dvme-token"])
def test_a_figure_is_drawn(ds: ImageDataset, home: Path, tmp_path: Path, head: str) -> None:
    result, folder = probed(ds, home, head, folds=2)
    found = run_attention(ds, result, folder, home=home)
    np.testing.assert_allclose(found.mass.sum(1), 1, atol=1e-5)
    assert 0 < found.entropy <= 1
    assert draw_attention(found, True, tmp_path / "attention.png").stat().st_size > 5000


def test_heads_without_attention_and_other_datasets_are_refused(ds: ImageDataset, home: Path) -> None:
    result, folder = probed(ds, home, "dvme-noattn", folds=2)
    with refused(UsageError, "no-attention"):
        run_attention(ds, result, folder, home=home)
    with refused(UsageError, "other-dataset"):
        run_attention(make_dataset([0, 1] * 20, name="other"), result, folder, home=home)
