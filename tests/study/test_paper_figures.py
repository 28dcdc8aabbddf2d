"""Figures of embeddings and attention, on a small dataset whose features are cached."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from embcache.data.dataset import ImageDataset
from embcache.errors import UsageError
from embcache.runs.folders import load_heads
from embcache.study.definitions import FIGURES
from embcache.study.paper_figures import draw_figure, figure_grid, narrow_figure, neighbor_accuracy
from embcache.study.settings import Settings
from embcache.study.study_plan import DatasetState, look_at_stores
from tests.probe.build import make_dataset, make_features, probe_grid, put_store

BACKBONES = ("random", "effnet_lite0")
SETTINGS = Settings(folds=2)


@pytest.fixture
def toy(home: Path) -> ImageDataset:
    """Two classes, a test split, features of two backbones; no images."""
    split = ["train"] * 60 + ["test"] * 30
    ds = make_dataset([k % 2 for k in range(90)], split=split, subset_sizes={"S": 20})
    for seed, backbone in enumerate(BACKBONES):
        put_store(home, ds, backbone, make_features(ds, seed=seed))
    return ds


def with_dvme(name: str, ds: ImageDataset) -> DatasetState:
    """A figure's state whose DVME is there, and is a small one."""
    figure = narrow_figure(FIGURES[name], ["toy"], BACKBONES, ["S"])
    models = figure_grid(figure).models
    (result,) = probe_grid(ds, [BACKBONES], head="dvme", head_options={"proj_dim": 4}, subsets=["S"], folds=2)
    state = DatasetState("toy", ds, "snapshot", subset_of={"S": "S"}, results={(models[-1], "S"): result})
    look_at_stores(state, models, SETTINGS)
    return state


def test_maps_show_each_backbone_and_their_fusion(toy: ImageDataset, home: Path) -> None:
    figure = narrow_figure(FIGURES["D1"], ["toy"], BACKBONES, ["S"])
    drawn = draw_figure(figure, SETTINGS, states=[with_dvme("D1", toy)])
    assert drawn.paths == (home / "toy" / "figures" / "D1.png",)
    assert drawn.paths[0].stat().st_size > 10_000
    assert [(r["embedding"], r["dimensions"]) for r in drawn.table.records] == [
        ("Random", 16), ("effnet_lite0", 16), ("DVME", 4),
    ]  # fmt: skip
    assert all(record["n_test"] == 30 for record in drawn.table.records)
    assert any("trained with labels" in note for note in drawn.table.notes)


def test_attention_is_shared_out_among_the_backbones(toy: ImageDataset, tmp_path: Path) -> None:
    figure = narrow_figure(FIGURES["F1"], ["toy"], BACKBONES, ["S"])
    target = tmp_path / "f1.svg"
    drawn = draw_figure(figure, SETTINGS, states=[with_dvme("F1", toy)], target=target)
    assert drawn.paths == (target,)
    assert [record["from"] for record in drawn.table.records] == list(BACKBONES)
    for record in drawn.table.records:
        assert record["folds"] == 2
        assert sum(record[f"to {name}"] for name in BACKBONES) == pytest.approx(1, abs=1e-4)


def test_attention_is_of_all_test_images_and_maps_of_so_many(
    toy: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embcache.study.paper_figures.LIMIT", 10)
    for name, n in (("F1", 30), ("D1", 10)):
        figure = narrow_figure(FIGURES[name], ["toy"], BACKBONES, ["S"])
        drawn = draw_figure(figure, SETTINGS, states=[with_dvme(name, toy)], target=tmp_path / f"{name}.png")
        assert {record["n_test"] for record in drawn.table.records} == {n}
        assert any("10 drawn of 30 images" in note for note in drawn.table.notes) == (name == "D1")


def test_the_fold_that_a_map_is_of_is_named(toy: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = with_dvme("D1", toy)
    monkeypatch.setattr("embcache.figures.shown.load_heads", lambda run: [{}, load_heads(run)[1]])
    figure = narrow_figure(FIGURES["D1"], ["toy"], BACKBONES, ["S"])
    drawn = draw_figure(figure, SETTINGS, states=[state], target=tmp_path / "d1.png")
    assert any("trained with labels (fold 1, subset S)" in note for note in drawn.table.notes)


def test_a_figure_says_what_it_could_not_show(toy: ImageDataset) -> None:
    figure = narrow_figure(FIGURES["D1"], ["toy"], ["random"])
    drawn = draw_figure(replace(figure, backbones=("random", "dino")), SETTINGS)
    assert [record.get("embedding") for record in drawn.table.records] == [None, "Random"]
    assert "dino: the images of toy are not here" in str(drawn.table.records[0]["reason"])
    assert len(drawn.paths) == 1
    assert not draw_figure(replace(figure, backbones=("dino",)), SETTINGS).paths


def test_attention_needs_several_backbones_and_one_subset() -> None:
    with pytest.raises(UsageError, match="fuses"):
        narrow_figure(FIGURES["F1"], backbones=["random"])
    with pytest.raises(UsageError, match="one subset"):
        narrow_figure(FIGURES["D1"], subsets=["S", "M"])


def test_neighbor_accuracy_leaves_each_image_out() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    features = (rng.normal(size=(60, 5)) + labels[:, None]).astype(np.float32)
    standard = (features - features.mean(0)) / features.std(0)
    guesses = []
    for i in range(60):
        others = np.arange(60) != i
        guesses.append(KNeighborsClassifier(1).fit(standard[others], labels[others]).predict(standard[i : i + 1])[0])
    assert neighbor_accuracy(features, labels, range(60), k=1) == balanced_accuracy_score(labels, guesses)
    assert neighbor_accuracy(labels[:, None].astype(np.float32), labels, range(60)) == 1.0
