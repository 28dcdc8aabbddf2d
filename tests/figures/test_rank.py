"""Scores without training against published code, scipy and scikit-learn; what ranks and compares backbones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from scipy.optimize import minimize
from scipy.stats import kendalltau, multivariate_normal, spearmanr
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestCentroid, NearestNeighbors
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from embcache.commands import features as commands
from embcache.config import DatasetRef
from embcache.data.dataset import ImageDataset
from embcache.errors import ProtocolError, StoreNotFoundError, UsageError
from embcache.figures import rank as module
from embcache.figures import shown
from embcache.figures.maps import draw_maps
from embcache.figures.rank import (
    RankRow,
    centroid_logits,
    cka,
    correlate,
    h_score,
    hsic,
    logme,
    nearest_neighbors,
    rank,
    shared_neighbors,
    similarity,
)
from embcache.probe.heads import make_head
from embcache.probe.probe import probe_features
from embcache.probe.protocol import divide, plan_splits
from embcache.runs.folders import Result
from tests.probe.build import make_dataset, make_features, make_recipe, put_store
from tests.refusal import refused

SHIFTS = {"strong": 3.0, "middling": 1.5, "weak": 0.3}


@pytest.fixture(scope="module")
def ds() -> ImageDataset:
    return make_dataset([0, 1, 1] * 60, split=["train"] * 150 + ["test"] * 30)


@pytest.fixture(scope="module")
def cache(ds: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with features of three backbones; nothing is added to it."""
    home = tmp_path_factory.mktemp("rank")
    for seed, (name, shift) in enumerate(SHIFTS.items()):
        put_store(home, ds, name, make_features(ds, 16, shift=shift, seed=seed))
    return home


@pytest.fixture(scope="module")
def probed(ds: ImageDataset, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Result]]:
    """The same with linear probes at S, which are given by backbone, and one of another head."""
    home = tmp_path_factory.mktemp("probed") / "home"
    shutil.copytree(cache, home)
    results = {name: probe_features(ds, [name], subset="S", home=home) for name in SHIFTS}
    probe_features(ds, ["strong"], subset="S", home=home, head="knn")
    return home, results


def test_orders_backbones_from_best_to_worst(ds: ImageDataset, cache: Path) -> None:
    for subset in ("S", "F", 40):
        assert [row.backbone for row in rank(ds, home=cache, subset=subset).rows] == list(SHIFTS)


def test_the_h_score_takes_no_part_in_the_order(ds: ImageDataset, cache: Path, tmp_path: Path) -> None:
    home = tmp_path / "noise"
    shutil.copytree(cache, home)
    put_store(home, ds, "wide noise", make_features(ds, 400, shift=0.0, seed=9))
    rows = {row.backbone: row for row in rank(ds, home=home).rows}
    assert rows["wide noise"].h_score > rows["weak"].h_score
    for name, row in rows.items():
        ranks = [
            1 + sum(getattr(other, key) > getattr(row, key) for other in rows.values())
            for key in ("logme", "centroid", "knn")
        ]
        assert row.place == pytest.approx(np.mean(ranks)), name


def test_scores_are_of_each_folds_own_rows(ds: ImageDataset, cache: Path) -> None:
    (row,) = rank(ds, ["middling"], home=cache, subset="S", seed=3).rows
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


def test_at_f_evidence_is_of_the_whole_pool(ds: ImageDataset, cache: Path) -> None:
    (row,) = rank(ds, ["weak"], home=cache).rows
    x, y = make_features(ds, 16, shift=0.3, seed=2)[:150], ds.labels[:150]
    assert row.logme == pytest.approx(logme(x, y))
    assert row.h_score == pytest.approx(h_score(x, y))


def test_test_rows_and_other_views_are_never_looked_at(ds: ImageDataset, cache: Path, tmp_path: Path) -> None:
    for seed, (name, shift) in enumerate(SHIFTS.items()):
        x = make_features(ds, 16, shift=shift, seed=seed)
        x[150:] = np.nan
        put_store(tmp_path, ds, name, np.stack([x, x * 0, x + 9], axis=1) if seed == 1 else x)
    threads = torch.get_num_threads()
    assert rank(ds, home=tmp_path).rows == rank(ds, home=cache).rows
    assert torch.get_num_threads() == threads


def test_probes_of_the_same_features_stand_beside(ds: ImageDataset, probed: tuple[Path, dict[str, Result]]) -> None:
    home, results = probed
    ranking = rank(ds, home=home)
    for row in ranking.rows:
        assert row.probes == {"S": results[row.backbone].mean}
        assert row.runs == {"S": results[row.backbone].id}
    found = {c.score: c for c in ranking.correlations}
    assert set(found) == {*module.SCORES, "place"}
    assert {(c.subset, c.n) for c in ranking.correlations} == {("S", 3)}
    assert found["knn"].kendall == pytest.approx(
        kendalltau([r.knn for r in ranking.rows], [r.probes["S"] for r in ranking.rows]).statistic
    )


def test_probes_of_other_features_do_not_count(
    ds: ImageDataset, probed: tuple[Path, dict[str, Result]], tmp_path: Path
) -> None:
    for name in SHIFTS:
        recipe = make_recipe(name, dtype="float32", decoder="another")
        put_store(tmp_path, ds, name, make_features(ds, 16), recipe=recipe)
    shutil.copytree(probed[0] / ds.name / "runs", tmp_path / ds.name / "runs")
    ranking = rank(ds, home=tmp_path)
    assert all(not row.probes for row in ranking.rows)
    assert ranking.correlations == ()


def test_only_probes_of_one_protocol_stand_beside(
    ds: ImageDataset, probed: tuple[Path, dict[str, Result]], tmp_path: Path
) -> None:
    home, usual = tmp_path / "home", probed[1]
    shutil.copytree(probed[0], home)
    for other in ({"val": "matched"}, {"seed": 1}, {"folds": 3}, {"lr": 1e-4}, {"repeats": 2},
                  {"metric": "balanced_accuracy"}):  # fmt: skip
        probe_features(ds, ["strong"], home=home, **{"subset": "S", **other})
    ranking = rank(ds, home=home)
    assert {row.backbone: row.runs for row in ranking.rows} == {name: {"S": r.id} for name, r in usual.items()}
    assert ranking.probe_labels == {"S": usual["weak"].labels_used}
    assert ranking.labels_used == 150
    (note,) = [note for note in ranking.notes if "one protocol" in note]
    assert "5 folds, seed 0, --val full, official test set; 6 of other protocols" in note


def test_without_probes_of_the_default_protocol_the_commonest_serves_all_rows(
    ds: ImageDataset, cache: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    shutil.copytree(cache, home)
    matched = {name: probe_features(ds, [name], subset="S", home=home, val="matched") for name in ("strong", "weak")}
    probe_features(ds, ["strong"], subset="S", home=home, folds=3)
    ranking = rank(ds, ["strong", "weak"], home=home)
    assert {row.backbone: row.runs for row in ranking.rows} == {name: {"S": r.id} for name, r in matched.items()}
    assert any("--val matched" in note and "1 of other protocols" in note for note in ranking.notes)


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


def test_many_images_are_drawn_down(ds: ImageDataset, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 50)
    monkeypatch.setattr(shown, "MOST", 50)
    ranking, found = rank(ds, home=cache), similarity(ds, home=cache)
    assert (ranking.subset, ranking.n_train, found.n) == ("50", 50, 50)
    assert any("50 training images per fold" in note for note in ranking.notes)
    assert any("50 of 150 training images" in note for note in found.notes)


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


def test_commands_print_tables_or_json_alone(
    ds: ImageDataset, cache: Path, probed: tuple[Path, dict[str, Result]], tmp_path: Path
) -> None:
    def run(*words: str) -> str:
        done = CliRunner().invoke(app(), words, catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    file = tmp_path / "rank.json"
    text = run("rank", "--dataset", "toy", "--home", str(probed[0]), "--json", str(file))
    for part in ("linear S (", "150 labels used in total", "Kendall"):
        assert part in text
    assert text.index("strong") < text.index("weak")
    (ranking,) = json.loads(file.read_text())
    assert ranking["rows"][0]["backbone"] == "strong"
    assert {c["score"] for c in ranking["correlations"]} == {*module.SCORES, "place"}
    assert "embcache probe --head linear" in run("rank", "--subset", "S", "--home", str(cache))
    text = run("similarity", "--dataset", "toy", "--home", str(cache))
    assert "linear CKA, debiased" in text
    assert "mutual k-NN, k = 10" in text
    (found,) = json.loads(run("similarity", "--home", str(cache), "--json", "-"))
    assert found["backbones"] == ["middling", "strong", "weak"]
    assert np.array(found["cka"]).shape == np.array(found["neighbors"]).shape == (3, 3)


# Classes of few images: maps and similarity need no folds, and `rank` makes do with fewer.


def cached(home: Path, labels: list[int]) -> ImageDataset:
    ds = make_dataset(labels)
    for seed, name in enumerate(("one", "two")):
        put_store(home, ds, name, make_features(ds, 12, seed=seed))
    return ds


def test_maps_and_similarity_of_a_class_with_three_images(home: Path) -> None:
    ds = cached(home, [0] * 40 + [1] * 40 + [2] * 3)
    shown = draw_maps(ds, method="pca", rows="all", home=home).shown
    assert sorted(shown.ids) == sorted(f"i{k}" for k in range(83))
    test, train = (set(draw_maps(ds, method="pca", rows=rows, home=home).shown.ids) for rows in ("test", "train"))
    assert not test & train
    assert test | train == set(shown.ids)
    assert similarity(ds, home=home).n == len(train)


def test_the_test_set_of_a_figure_is_that_of_a_probe(home: Path) -> None:
    ds = cached(home, [0, 1, 2] * 40)
    plan = plan_splits(ds)
    assert draw_maps(ds, method="pca", home=home).shown.ids == list(plan.test_ids)


def test_rank_takes_as_many_folds_as_the_rarest_class_has_groups_and_says_so(home: Path) -> None:
    ds = cached(home, [0] * 40 + [1] * 40 + [2] * 4)
    ranking = rank(ds, ["one"], home=home)
    (note,) = [note for note in ranking.notes if "folds in place of 5" in note]
    folds = int(note.split()[0])
    plan = plan_splits(ds, subsets=["F"], folds=folds)
    assert folds == sum(int(ds.labels[i] == 2) for i in range(84) if i not in plan.test)
    assert "of c" in note
    assert ranking.n_train + len(plan.val[0, "F"]) == pytest.approx(ranking.labels_used, abs=1)
    assert ranking.labels_used == 84 - len(plan.test)


def test_rank_by_logme_alone_where_a_class_has_one_group(home: Path) -> None:
    ds = cached(home, [0, 1, 2, 3, 4] * 2)
    ranking = rank(ds, home=home)
    pool = sorted(set(range(10)) - set(divide(ds).test.tolist()))
    assert ranking.n_train == ranking.labels_used == len(pool)
    assert any("LogME alone" in note for note in ranking.notes)
    for seed, row in enumerate(sorted(ranking.rows, key=lambda row: row.backbone)):
        assert row.logme == pytest.approx(logme(make_features(ds, 12, seed=seed)[pool], ds.labels[pool]))
        assert np.isnan(row.knn)
    assert [row.place for row in ranking.rows] == [1, 2]
    with pytest.raises(ProtocolError):
        rank(ds, home=home, subset=6)


# Scores.


def draw(n: int, dim: int, n_classes: int, shift: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, n_classes, n)
    y[:n_classes] = np.arange(n_classes)
    mixing = rng.normal(size=(dim, dim)) / np.sqrt(dim)
    x = (rng.normal(size=(n, dim)) + shift * rng.normal(size=(n_classes, dim))[y]) @ mixing
    return x.astype(np.float32), y


def published_logme(f: np.ndarray, y: np.ndarray) -> float:
    """The fixed point of You et al. (2021), Algorithm 1, for more images than features; iterated to rest."""
    f = f.astype(np.float64)
    n, d = f.shape
    _, s, vh = np.linalg.svd(f, full_matrices=True)
    sigma = s**2
    evidences = []
    for target in [y] if y.dtype.kind == "f" else [(y == c).astype(np.float64) for c in range(int(y.max()) + 1)]:
        alpha, beta = 1.0, 1.0
        for _ in range(5000):
            gamma = (beta * sigma / (alpha + beta * sigma)).sum()
            m = vh.T @ (beta * (vh @ (f.T @ target)) / (alpha + beta * sigma))
            residual = ((target - f @ m) ** 2).sum()
            alpha, beta, before = gamma / (m @ m), (n - gamma) / residual, alpha / beta
            if abs(alpha / beta - before) < 1e-10 * before:
                break
        m = vh.T @ (beta * (vh @ (f.T @ target)) / (alpha + beta * sigma))
        residual = ((target - f @ m) ** 2).sum()
        log_det = np.log(alpha + beta * sigma).sum()
        evidence = n / 2 * np.log(beta) + d / 2 * np.log(alpha) - n / 2 * np.log(2 * np.pi)
        evidences.append((evidence - beta / 2 * residual - alpha / 2 * (m @ m) - log_det / 2) / n)
    return float(np.mean(evidences))


@pytest.mark.parametrize(("n", "dim", "n_classes"), [(300, 20, 2), (200, 60, 4)])
def test_logme_is_the_published_fixed_point(n: int, dim: int, n_classes: int) -> None:
    x, y = draw(n, dim, n_classes)
    assert logme(x, y) == pytest.approx(published_logme(x, y), rel=1e-5)


def test_logme_of_numbers_and_findings_is_the_published_fixed_point() -> None:
    x, y = draw(300, 20, 2)
    number = x[:, 0] * 3.0 + np.random.default_rng(1).normal(size=300)
    assert logme(x, number) == pytest.approx(published_logme(x, number), rel=1e-5)
    findings = np.stack([y, np.arange(300) % 3 == 0, y], axis=1).astype(np.int64)
    findings[:40, 2] = -1
    each = [published_logme(x[of >= 0], of[of >= 0]) for of in findings.T]
    assert logme(x, findings) == pytest.approx(np.mean(each), rel=1e-5)
    assert logme(x, np.column_stack([findings, np.zeros(300, dtype=np.int64)])) == logme(x, findings)
    assert np.isnan(logme(x, np.zeros((300, 2), dtype=np.int64)))


@pytest.mark.parametrize(("n", "dim"), [(20, 60), (40, 8), (30, 30)])
def test_logme_is_the_largest_evidence_of_the_gaussian_it_describes(n: int, dim: int) -> None:
    x, y = draw(n, dim, 2, 0.5)
    wide = x.astype(np.float64)

    def negative(logs: np.ndarray, target: np.ndarray) -> float:
        alpha, beta = np.exp(logs)
        covariance = np.eye(n) / beta + wide @ wide.T / alpha
        return -float(multivariate_normal(np.zeros(n), covariance).logpdf(target)) / n

    best = []
    for c in (0, 1):
        target = (y == c).astype(np.float64)
        starts = [np.array([a, b]) for a in (-2.0, 2.0, 6.0) for b in (0.0, 3.0)]
        bounds = [(-12, 12)] * 2
        best.append(min(minimize(negative, s, args=(target,), method="L-BFGS-B", bounds=bounds).fun for s in starts))
    assert logme(x, y) == pytest.approx(-np.mean(best), abs=1e-4)


def test_logme_prefers_features_that_tell_the_classes_apart() -> None:
    values = [logme(*draw(200, 30, 3, shift)) for shift in (0.0, 1.0, 3.0)]
    assert values == sorted(values)
    assert np.isfinite(logme(np.zeros((10, 3)), np.arange(10) % 2))


def published_h_score(features: np.ndarray, labels: np.ndarray) -> float:
    """Ibrahim et al. (2021): Ledoit-Wolf covariance of the features, covariance of their class means."""
    f = features.astype(np.float64) - features.astype(np.float64).mean(axis=0)
    estimate = LedoitWolf(assume_centered=False).fit(f)
    g = np.zeros_like(f)
    for c in np.unique(labels):
        g[labels == c] = f[labels == c].mean(axis=0)
    between = np.cov(g, rowvar=False, bias=True)
    inverse = np.linalg.pinv(estimate.covariance_, rcond=1e-15)
    return float(np.trace(inverse @ ((1 - estimate.shrinkage_) * between)))


@pytest.mark.parametrize(("n", "dim", "n_classes"), [(300, 20, 2), (30, 60, 3), (200, 60, 4)])
def test_h_score_is_the_published_one(n: int, dim: int, n_classes: int) -> None:
    x, y = draw(n, dim, n_classes)
    x[:, 3] = 7.0  # a feature that never varies
    assert h_score(x, y) == pytest.approx(published_h_score(x, y), rel=1e-6)
    assert 0 < h_score(x, y) < n_classes - 1


def test_h_score_of_degenerate_features_is_a_number() -> None:
    assert h_score(np.ones((10, 4)), np.arange(10) % 2) == 0
    assert h_score(np.array([[1.0, 0.0], [-1.0, 0.0]]), np.array([0, 1])) == pytest.approx(1)


@pytest.mark.parametrize("n_classes", [2, 5])
def test_nearest_centroid_is_scikit_learns(n_classes: int) -> None:
    x, y = draw(100, 12, n_classes)
    held, _ = draw(60, 12, n_classes, seed=1)
    scaler = StandardScaler().fit(x.astype(np.float64))
    theirs = NearestCentroid().fit(scaler.transform(x), y)
    logits = centroid_logits(x, y, held, n_classes)
    z = scaler.transform(held.astype(np.float64))
    np.testing.assert_array_equal(logits.argmax(1), theirs.predict(z))
    distances = ((z[:, None] - theirs.centroids_) ** 2).mean(-1)
    np.testing.assert_allclose(logits, -distances / 2, rtol=1e-5)


# Similarity.


def embeddings(n: int, d: int, e: int, *, related: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, d)) * np.geomspace(0.1, 10, d) + 5
    y = related * x @ rng.normal(size=(d, e)) + rng.normal(size=(n, e)) * 20
    return x.astype(np.float32), y.astype(np.float32)


def linear_cka(x: np.ndarray, y: np.ndarray, *, debiased: bool = True) -> float:
    parts = [np.asarray(f, np.float64) - np.asarray(f, np.float64).mean(0) for f in (x, y)]
    return float(cka(np.array([[hsic(a, b)[int(debiased)] for b in parts] for a in parts]))[0, 1])


def kernel_hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Gretton et al. (2005): tr(KHLH) with the centring matrix H."""
    n = len(k)
    centring = np.eye(n) - np.ones((n, n)) / n
    return float(np.trace(k @ centring @ l @ centring))


def unbiased_hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Song et al. (2012), equation 5."""
    n, ones = len(k), np.ones(len(k))
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    middle = (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
    return float((np.trace(k @ l) + middle - 2 / (n - 2) * ones @ k @ l @ ones) / (n * (n - 3)))


@pytest.mark.parametrize("related", [0.0, 1.0])
@pytest.mark.parametrize(("n", "d", "e"), [(60, 8, 5), (20, 40, 30)])
def test_cka_is_its_definition_on_kernels(n: int, d: int, e: int, related: float) -> None:
    x, y = embeddings(n, d, e, related=related)
    k, l = (f.astype(np.float64) @ f.astype(np.float64).T for f in (x, y))  # noqa: E741
    for debiased, right in ((False, kernel_hsic), (True, unbiased_hsic)):
        expected = right(k, l) / np.sqrt(right(k, k) * right(l, l))
        assert linear_cka(x, y, debiased=debiased) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_debiased_cka_of_unrelated_wide_embeddings_is_near_zero() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(100, 400)), rng.normal(size=(100, 400))
    assert abs(linear_cka(x, y)) < 0.02
    assert linear_cka(x, y, debiased=False) > 0.7  # what it would be without


def test_cka_of_what_does_not_vary_is_not_a_number() -> None:
    assert np.isnan(linear_cka(np.ones((10, 3)), np.arange(30.0).reshape(10, 3) ** 2))


def test_neighbors_are_scikit_learns() -> None:
    x, y = embeddings(80, 12, 9, related=1)
    found = []
    for f in (x, y):
        theirs = NearestNeighbors(n_neighbors=6, metric="cosine").fit(StandardScaler().fit_transform(f))
        expected = theirs.kneighbors(return_distance=False)
        mine = nearest_neighbors(f, 6)
        assert [set(row) for row in mine.tolist()] == [set(row) for row in expected.tolist()]
        found.append(expected)
    overlap = np.mean([len(set(a) & set(b)) / 6 for a, b in zip(*found, strict=True)])
    assert shared_neighbors(nearest_neighbors(x, 6), nearest_neighbors(y, 6)) == pytest.approx(overlap)


def test_compares_all_cached_backbones_on_training_images(home: Path) -> None:
    ds = make_dataset([0, 1] * 60, split=["train"] * 100 + ["test"] * 20)
    x = make_features(ds, 16)
    spoiled = x.copy()
    spoiled[100:] = 1e6  # test rows must not matter
    put_store(home, ds, "one", x)
    put_store(home, ds, "twin", spoiled * 2)
    put_store(home, ds, "other", make_features(ds, 12, shift=0, seed=5))
    found = similarity(ds, home=home)
    assert found.backbones == ("one", "other", "twin")
    assert found.n == 100
    assert found.cka[0, 2] == pytest.approx(1)
    assert found.neighbors[0, 2] == 1
    assert abs(found.cka[0, 1]) < 0.2
    for matrix in (found.cka, found.cka_biased, found.neighbors):
        np.testing.assert_allclose(np.diag(matrix), 1)
        np.testing.assert_array_equal(matrix, matrix.T)
    assert similarity(ds, ["twin", "one"], home=home).backbones == ("twin", "one")


def test_one_backbone_is_refused_and_datasets_with_one_are_left_out(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    several, single = (make_dataset([0, 1] * 60, name=name) for name in ("several", "single"))
    for name in ("one", "two"):
        put_store(home, several, name, make_features(several, 8))
    put_store(home, single, "one", make_features(single, 8))
    with refused(UsageError, "too-few-backbones"):
        similarity(single, home=home)
    caplog.set_level("INFO", "embcache")
    (found,) = shown.open_datasets([], DatasetRef(), home, several=True)
    assert found.name == "several"
    assert caplog.messages == ["single left out: fewer than two backbones cached"]
