"""Figures of embeddings and attention, on a small dataset whose features are cached."""

from __future__ import annotations

from pathlib import Path

import pytest

from embcache.config import DatasetRef, ProbeConfig, StudyConfig
from embcache.data.dataset import ImageDataset
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


def test_a_figure_says_what_it_could_not_show(toy: ImageDataset) -> None:
    config = StudyConfig(folds=2, datasets=("toy",), backbones=(("random",), ("dino",)), subsets=("S",))
    done = run_study("D1", config)
    assert [record.get("embedding") for record in done.table.records] == [None, "Random"]
    assert "dino: the images of toy are not here" in str(done.table.records[0]["reason"])
    assert len(done.figures) == 1
    assert run_study("D1", StudyConfig(datasets=("toy",), backbones=(("dino",),))).empty
