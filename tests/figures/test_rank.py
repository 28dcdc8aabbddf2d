"""Ranking backbones: what it looks at, what it compares with, and what the commands print."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from scipy.stats import kendalltau, spearmanr
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from embcache.commands import features as commands
from embcache.config import DatasetRef
from embcache.data.dataset import ImageDataset
from embcache.errors import StoreNotFoundError, UsageError
from embcache.figures import rank as module
from embcache.figures import shown
from embcache.figures.rank import RankRow, correlate, h_score, logme, rank
from embcache.probe.heads import make_head
from embcache.probe.probe import probe_features
from embcache.probe.protocol import plan_splits
from tests.probe.build import make_dataset, make_features, make_recipe, put_store
from tests.refusal import refused

SHIFTS = {"strong": 3.0, "middling": 1.5, "weak": 0.3}


@pytest.fixture
def ds(home: Path) -> ImageDataset:
    ds = make_dataset([0, 1, 1] * 60, split=["train"] * 150 + ["test"] * 30)
    for seed, (name, shift) in enumerate(SHIFTS.items()):
        put_store(home, ds, name, make_features(ds, 16, shift=shift, seed=seed))
    return ds


@pytest.fixture
def probed(ds: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch) -> ImageDataset:
    for name in SHIFTS:
        probe_features(ds, [name], subset="S", home=home)
    probe_features(ds, ["strong"], subset="F", home=home, head="knn")
    return ds


def test_orders_backbones_from_best_to_worst(ds: ImageDataset, home: Path) -> None:
    for subset in ("S", "F", 40):
        assert [row.backbone for row in rank(ds, home=home, subset=subset).rows] == list(SHIFTS)


def test_the_h_score_takes_no_part_in_the_order(ds: ImageDataset, home: Path) -> None:
    put_store(home, ds, "wide noise", make_features(ds, 400, shift=0.0, seed=9))
    rows = {row.backbone: row for row in rank(ds, home=home).rows}
    assert rows["wide noise"].h_score > rows["weak"].h_score
    for name, row in rows.items():
        ranks = [
            1 + sum(getattr(other, key) > getattr(row, key) for other in rows.values())
            for key in ("logme", "centroid", "knn")
        ]
        assert row.place == pytest.approx(np.mean(ranks)), name


def test_scores_are_of_each_folds_own_rows(ds: ImageDataset, home: Path) -> None:
    (row,) = rank(ds, ["middling"], home=home, subset="S", seed=3).rows
    plan = plan_splits(ds, subsets=["S"], seed=3)
    x, y = make_features(ds, 16, shift=1.5, seed=1), plan.labels
    evidence, separation, near, voted = [], [], [], []
    for fold in range(5):
        train, val = plan.train[fold, "S"], plan.val[fold, "S"]
        evidence.append(logme(x[train], y[train]))
        separation.append(h_score(x[train], y[train]))
        scaler = StandardScaler().fit(x[train].astype(np.float64))
        centroids = NearestCentroid().fit(scaler.transform(x[train]), y[train]).centroids_
        squared = ((scaler.transform(x[val])[:, None] - centroids) ** 2).sum(-1)
        near.append(roc_auc_score(y[val], squared[:, 0] - squared[:, 1]))
        p = make_head("knn").fit({"a": x[train]}, y[train]).predict_proba({"a": x[val]})
        voted.append(roc_auc_score(y[val], p[:, 1]))
    assert row.logme == pytest.approx(np.mean(evidence))
    assert row.h_score == pytest.approx(np.mean(separation))
    assert row.centroid == pytest.approx(np.mean(near))
    assert row.knn == pytest.approx(np.mean(voted), abs=1e-3)


def test_at_f_evidence_is_of_the_whole_pool(ds: ImageDataset, home: Path) -> None:
    (row,) = rank(ds, ["weak"], home=home).rows
    x, y = make_features(ds, 16, shift=0.3, seed=2)[:150], ds.labels[:150]
    assert row.logme == pytest.approx(logme(x, y))
    assert row.h_score == pytest.approx(h_score(x, y))


def test_test_rows_are_never_looked_at(ds: ImageDataset, home: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for seed, (name, shift) in enumerate(SHIFTS.items()):
        x = make_features(ds, 16, shift=shift, seed=seed)
        x[150:] = np.nan
        put_store(other, ds, name, x)
    assert rank(ds, home=other).rows == rank(ds, home=home).rows


def test_probes_of_the_same_features_stand_beside(probed: ImageDataset, home: Path) -> None:
    ranking = rank(probed, home=home)
    results = {name: probe_features(probed, [name], subset="S", home=home) for name in SHIFTS}
    for row in ranking.rows:
        assert row.probes == {"S": results[row.backbone].mean}
        assert row.runs == {"S": results[row.backbone].id}
    found = {c.score: c for c in ranking.correlations}
    assert set(found) == {*module.SCORES, "place"}
    assert {(c.subset, c.n) for c in ranking.correlations} == {("S", 3)}
    assert found["knn"].kendall == pytest.approx(
        kendalltau([r.knn for r in ranking.rows], [r.probes["S"] for r in ranking.rows]).statistic
    )


def test_probes_of_other_features_do_not_count(probed: ImageDataset, home: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    for name in SHIFTS:
        recipe = make_recipe(name, dtype="float32", decoder="another")
        put_store(elsewhere, probed, name, make_features(probed, 16), recipe=recipe)
    (home / probed.name / "runs").rename(elsewhere / probed.name / "runs")
    ranking = rank(probed, home=elsewhere)
    assert all(not row.probes for row in ranking.rows)
    assert ranking.correlations == ()


def test_only_probes_of_one_protocol_stand_beside(probed: ImageDataset, home: Path) -> None:
    usual = {name: probe_features(probed, [name], subset="S", home=home) for name in SHIFTS}
    for other in ({"val": "matched"}, {"seed": 1}, {"folds": 3}, {"lr": 1e-4}, {"lr": [1e-2, 1e-3]}, {"repeats": 2}):
        for name in ("strong", "weak"):
            probe_features(probed, [name], home=home, **{"subset": "S", **other})
            probe_features(probed, [name], home=home, **{"subset": 40, **other})
    ranking = rank(probed, home=home)
    assert {row.backbone: row.runs for row in ranking.rows} == {name: {"S": r.id} for name, r in usual.items()}
    assert ranking.probe_labels == {"S": usual["weak"].labels_used}
    assert ranking.labels_used == 150
    (note,) = [note for note in ranking.notes if "one protocol" in note]
    assert "5 folds, seed 0, --val full, official test set; 24 of other protocols" in note


def test_without_probes_of_the_default_protocol_the_commonest_serves_all_rows(ds: ImageDataset, home: Path) -> None:
    matched = {name: probe_features(ds, [name], subset="S", home=home, val="matched") for name in SHIFTS}
    probe_features(ds, ["strong"], subset="S", home=home, folds=3)
    probe_features(ds, ["weak"], subset="S", home=home, lr=1e-2)
    ranking = rank(ds, home=home)
    assert {row.backbone: row.runs for row in ranking.rows} == {name: {"S": r.id} for name, r in matched.items()}
    assert any("--val matched" in note and "2 of other protocols" in note for note in ranking.notes)


def test_correlations_are_scipys() -> None:
    rng = np.random.default_rng(0)
    rows = [RankRow(f"b{k}", *rng.normal(size=4), place=float(k), probes={"M": float(rng.normal())}) for k in range(6)]
    rows.append(RankRow("unprobed", 0, 0, 0, 0, place=7.0))
    for c in correlate(rows):
        values = [-r.place if c.score == "place" else getattr(r, c.score) for r in rows[:6]]
        reached = [r.probes["M"] for r in rows[:6]]
        assert (c.n, c.subset) == (6, "M")
        assert c.kendall == pytest.approx(kendalltau(values, reached).statistic)
        assert c.spearman == pytest.approx(spearmanr(values, reached).statistic)
    assert correlate(rows[:2]) == []
    flat = [RankRow(str(k), 1.0, float(k), 0.0, 0.0, place=1.0, probes={"S": float(k)}) for k in range(3)]
    assert np.isnan(correlate(flat)[0].kendall)


def test_many_images_are_drawn_down(ds: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 50)
    ranking = rank(ds, home=home)
    assert (ranking.subset, ranking.n_train) == ("50", 50)
    assert any("50 training images per fold" in note for note in ranking.notes)


def test_views_are_ranked_by_the_plain_image(ds: ImageDataset, home: Path, tmp_path: Path) -> None:
    other = tmp_path / "views"
    x = make_features(ds, 16, shift=1.5, seed=1)
    put_store(other, ds, "middling", np.stack([x, x * 0, x + 9], axis=1))
    assert rank(ds, home=other).rows == rank(ds, ["middling"], home=home).rows


def test_the_callers_threads_stay(ds: ImageDataset, home: Path) -> None:
    before = torch.get_num_threads()
    rank(ds, ["weak"], home=home)
    assert torch.get_num_threads() == before


def test_nothing_cached_is_told(home: Path) -> None:
    with refused(StoreNotFoundError, "store-not-found"):
        shown.open_datasets([], DatasetRef(), home)
    with refused(StoreNotFoundError, "store-not-found"):
        rank(make_dataset([0, 1] * 30), home=home)
    with refused(UsageError, "several-datasets"):
        shown.open_datasets(["a", "b"], DatasetRef(data_root="x"), home)


def app() -> typer.Typer:
    made = typer.Typer(pretty_exceptions_enable=False)
    made.command()(commands.rank)
    made.command()(commands.similarity)
    return made


def test_rank_prints_a_table_and_correlations(probed: ImageDataset, home: Path, tmp_path: Path) -> None:
    file = tmp_path / "rank.json"
    done = CliRunner().invoke(app(), ["rank", "--dataset", "toy", "--json", str(file)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "linear S (" in done.stdout
    assert "150 labels used in all" in done.stdout
    assert "Kendall" in done.stdout
    assert done.stdout.index("strong") < done.stdout.index("weak")
    (ranking,) = json.loads(file.read_text())
    assert ranking["rows"][0]["backbone"] == "strong"
    assert {c["score"] for c in ranking["correlations"]} == {*module.SCORES, "place"}


def test_rank_without_probes_says_how_to_compare(ds: ImageDataset, home: Path) -> None:
    done = CliRunner().invoke(app(), ["rank", "--subset", "S"], catch_exceptions=False)
    assert "embcache probe --head linear" in done.stdout


def test_similarity_prints_both_matrices_or_json_alone(ds: ImageDataset, home: Path) -> None:
    done = CliRunner().invoke(app(), ["similarity", "--dataset", "toy"], catch_exceptions=False)
    assert "linear CKA, debiased" in done.stdout
    assert "mutual k-NN, k = 10" in done.stdout
    done = CliRunner().invoke(app(), ["similarity", "--json", "-"], catch_exceptions=False)
    (found,) = json.loads(done.stdout)
    assert found["backbones"] == ["middling", "strong", "weak"]
    assert np.array(found["cka"]).shape == np.array(found["neighbors"]).shape == (3, 3)
