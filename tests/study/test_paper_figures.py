"""Figures of embeddings and attention, on a small dataset whose features are cached."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from embcache.config import DatasetRef, ProbeConfig, StudyConfig
from embcache.data.dataset import ImageDataset
from embcache.figures.maps import neighbor_accuracy
from embcache.probe.probe import probe
from embcache.results.layout import Table
from embcache.study.definitions import FIGURES, narrow_figure
from embcache.study.paper_figures import draw_figure
from embcache.study.study import run_study
from embcache.study.study_plan import look
from tests.probe.build import make_dataset, make_features, put_store

BACKBONES = ("random", "effnet_lite0")


@pytest.fixture
def toy(home: Path) -> ImageDataset:
    """Two classes, a test split, features of two backbones; no images."""
    split = ["train"] * 60 + ["test"] * 30
    ds = make_dataset([k % 2 for k in range(90)], split=split, subset_sizes={"S": 20})
    for seed, backbone in enumerate(BACKBONES):
        put_store(home, ds, backbone, make_features(ds, seed=seed))
    return ds


def drawn(name: str, ds: ImageDataset, target: Path | None = None) -> tuple[Table, list[Path]]:
    """A figure of the two backbones, with a small DVME in place of the paper's."""
    figure = narrow_figure(FIGURES[name], StudyConfig(datasets=("toy",), backbones=(BACKBONES,), subsets=("S",)))
    config = ProbeConfig(head="dvme", head_options={"proj_dim": 4}, folds=2)
    (result,) = probe(ds, [BACKBONES], ["S"], config)
    (state,) = look(figure, StudyConfig(folds=2), DatasetRef(), None)
    state.results[figure.models[-1], "S"] = result
    return draw_figure(figure, [state], target)


def test_maps_show_each_backbone_and_their_fusion(toy: ImageDataset, home: Path) -> None:
    table, paths = drawn("D1", toy)
    assert paths == [home / "toy" / "figures" / "D1.png"]
    assert paths[0].stat().st_size > 10_000
    assert [(r["embedding"], r["dimensions"]) for r in table.records] == [
        ("Random", 16), ("effnet_lite0", 16), ("DVME", 4),
    ]  # fmt: skip
    assert all(record["n_test"] == 30 for record in table.records)
    assert any("trained with labels (fold 0, subset S)" in note for note in table.notes)


def test_attention_is_shared_out_among_the_backbones(toy: ImageDataset, tmp_path: Path) -> None:
    target = tmp_path / "f1.svg"
    table, paths = drawn("F1", toy, target)
    assert paths == [target]
    assert [record["from"] for record in table.records] == list(BACKBONES)
    for record in table.records:
        assert record["folds"] == 2
        assert sum(record[f"to {name}"] for name in BACKBONES) == pytest.approx(1, abs=1e-4)


def test_attention_is_of_all_test_images_and_maps_of_so_many(
    toy: ImageDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embcache.study.paper_figures.LIMIT", 10)
    for name, n in (("F1", 30), ("D1", 10)):
        table, _ = drawn(name, toy, tmp_path / f"{name}.png")
        assert {record["n_test"] for record in table.records} == {n}
        assert any("10 drawn of 30 images" in note for note in table.notes) == (name == "D1")


def test_a_figure_says_what_it_could_not_show(toy: ImageDataset) -> None:
    config = StudyConfig(folds=2, datasets=("toy",), backbones=(("random",), ("dino",)), subsets=("S",))
    done = run_study("D1", config)
    assert [record.get("embedding") for record in done.table.records] == [None, "Random"]
    assert "dino: the images of toy are not here" in str(done.table.records[0]["reason"])
    assert len(done.figures) == 1
    assert run_study("D1", StudyConfig(datasets=("toy",), backbones=(("dino",),))).empty


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
