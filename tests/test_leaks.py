"""No test label decides anything: where test labels are permuted and the split is fixed, all else stays as it was."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embcache.data.dataset import ImageDataset
from embcache.figures.audit import audit_dataset
from embcache.figures.rank import rank, similarity
from embcache.figures.shown import shown_images
from embcache.probe.inputs import open_stores, plan_cached
from embcache.probe.probe import probe_features
from embcache.report.collect import choose, collect_parts
from embcache.report.embedding import fused_run
from embcache.results.paper import Cell, Model, choose_best
from embcache.runs.folders import Result, load_heads, load_predictions, runs_dir
from tests.probe.build import make_dataset, make_features, put_store

N, TEST = 180, 60
BACKBONES = ("good", "weak")


@dataclass(frozen=True)
class World:
    """A dataset with an official test set, and where its features lie."""

    ds: ImageDataset
    home: Path

    def results(self, head: str, **options: Any) -> list[Result]:
        """Results of a head on each backbone, or on both."""
        sets = [list(BACKBONES)] if head.startswith("dvme") else [[name] for name in BACKBONES]
        options = {"subset": 30, "folds": 2, **options}
        return [probe_features(self.ds, names, head=head, home=self.home, **options) for names in sets]

    def run(self, result: Result) -> Path:
        return runs_dir(result.dataset, self.home) / result.id


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, World]:
    """The same images, features and splits twice; in the second the test images have each other's labels."""
    rng = np.random.default_rng(0)
    truth = np.arange(N) % 3
    split = ["train"] * (N - TEST) + ["test"] * TEST
    true = make_dataset(truth, split=split)
    features = {name: make_features(true, 24, shift=shift) for name, shift in zip(BACKBONES, (8.0, 1.5), strict=True)}
    features["good"][3] = features["good"][N - 3]  # a near-duplicate across the border
    features["good"][11] = rng.normal(size=24) * 0.1 - 30  # an outlier
    labels = np.where(rng.random(N) < 0.08, 0, truth)  # some are wrong, and classes are not balanced
    size = rng.integers(20, 90, N)
    ds = make_dataset(labels, [f"g{k // 2}" for k in range(N)], split)
    ds = replace(ds, table=ds.table.assign(size=size))
    order = np.concatenate([np.arange(N - TEST), N - TEST + rng.permutation(TEST)])
    permuted = replace(ds, table=ds.table.assign(label=labels[order], size=size[order]))
    assert (permuted.labels[-TEST:] != ds.labels[-TEST:]).mean() > 0.4
    found = []
    for number, one in enumerate((ds, permuted)):
        home = tmp_path_factory.mktemp(f"home{number}")
        for name, x in features.items():
            put_store(home, one, name, x)
        found.append(World(one, home))
    return found[0], found[1]


def told(result: Result) -> list[Any]:
    """What a result chose, and how it validated."""
    return [(f.fold, f.best_epoch, f.epochs, f.lr, f.val_score, f.chosen, f.n_train, f.n_val) for f in result.folds]


@pytest.mark.parametrize(
    ("head", "options"),
    [
        ("linear", {"lr": [1e-2, 1e-3]}),
        ("logreg", {"subset": "F"}),
        ("dvme", {"head_options": {"proj_dim": 6}}),
        ("linear", {"target": "size"}),
    ],
)
def test_heads_are_the_same(worlds: tuple[World, World], head: str, options: dict[str, Any]) -> None:
    for a, b in zip(*(world.results(head, **options) for world in worlds), strict=True):
        assert told(a) == told(b)
        assert a.val_mean == b.val_mean
        for one, other in zip(load_heads(worlds[0].run(a)), load_heads(worlds[1].run(b)), strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
        p = [load_predictions(world.run(r)).drop(columns="label") for world, r in zip(worlds, (a, b), strict=True)]
        assert p[0].equals(p[1])
        assert a.mean != b.mean  # the score, alone, is another


def test_splits_are_the_same(worlds: tuple[World, World]) -> None:
    plans = [plan_cached(w.ds, home=w.home, subsets=("S", "M", "F"), val="matched")[0] for w in worlds]
    assert plans[0].to_json() == plans[1].to_json()


def test_ranks_similarities_and_maps_are_the_same(worlds: tuple[World, World]) -> None:
    ranks = [rank(w.ds, home=w.home) for w in worlds]
    assert ranks[0] == ranks[1]
    alike = [similarity(w.ds, home=w.home) for w in worlds]
    assert np.array_equal(alike[0].cka, alike[1].cka)
    assert np.array_equal(alike[0].neighbors, alike[1].neighbors)
    stores = [list(open_stores(w.ds, [BACKBONES], w.home).values()) for w in worlds]
    shown = [shown_images(w.ds, s, most=50) for w, s in zip(worlds, stores, strict=True)]
    assert shown[0].ids == shown[1].ids


@pytest.mark.parametrize("credible", [0.0, 1.0])
def test_an_audit_says_the_same_of_training_images(
    worlds: tuple[World, World], credible: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embcache.figures.audit.CREDIBLE", credible)
    one, other = (audit_dataset(w.ds, "good", home=w.home, most=3) for w in worlds)
    assert [e for e in one.label_errors if e.split != "test"] == [e for e in other.label_errors if e.split != "test"]
    assert [e for e in one.label_errors if e.split == "test"] != [e for e in other.label_errors if e.split == "test"]
    assert one.outliers == other.outliers
    assert one.exclude == other.exclude
    reasons = dict(one.exclude)
    assert {"i3", "i11"} <= set(reasons)
    assert any("label error" in reason for reason in reasons.values()) == (credible == 1.0)
    assert one.judge is not None
    assert other.judge is not None
    assert replace(one.judge, test_found=0) == replace(other.judge, test_found=0)
    pairs = [[replace(p, same_label=True) for p in found.pairs] for found in (one, other)]
    assert pairs[0] == pairs[1]
    inside = [[p for p in found.pairs if p.kind != "across splits"] for found in (one, other)]
    assert inside[0] == inside[1]


def test_what_a_report_and_a_table_choose_is_the_same(worlds: tuple[World, World]) -> None:
    chosen = []
    for world in worlds:
        made = [*world.results("linear"), *world.results("logreg"), *world.results("knn")]
        made += world.results("dvme", head_options={"proj_dim": 6})
        (part,) = collect_parts([], home=world.home)
        task = next(task for task in part.tasks if not task.target)
        choices = choose(task, part, resamples=20)
        attending = fused_run(part.results, choices)
        assert attending is not None
        model = Model("one", "probe", "linear", ("good",))
        best = choose_best([Cell(r.dataset, model, "30", r) for r in made], "validation")
        assert best is not None
        assert best.result is not None
        chosen.append(
            [
                [[(rival.name, rival.validated) for rival in choice.rivals] for choice in choices],
                told(attending),
                told(best.result),
            ]
        )
    assert chosen[0] == chosen[1]
