"""Comparisons against transcriptions, loops and SciPy: one family for Holm, the same test groups, subgroups."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq
from scipy.stats import t as student
from sklearn.metrics import roc_auc_score

from embcache.data.dataset import ImageDataset
from embcache.errors import ProtocolError, StoreError, StoreNotFoundError, UsageError
from embcache.probe.metrics import METRICS
from embcache.probe.probe import probe_features
from embcache.probe.statistics import TestSet
from embcache.results.compare import compare, compare_scores, holm, subgroups
from embcache.runs.folders import find_run_anywhere, load_predictions
from tests.probe.build import make_dataset, make_features, put_store
from tests.probe.patients import components, patients, scored, width
from tests.refusal import refused


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare") / "home"


@pytest.fixture(scope="module")
def runs(home: Path) -> list[str]:
    """A bad, a good and a middling result on one dataset with groups of two."""
    labels = np.tile([0, 1], 60)
    groups = [f"g{k // 4}-{k % 2}" for k in range(120)]
    ds = make_dataset(labels, groups, ["train"] * 60 + ["test"] * 60)
    ids = []
    for name, shift in (("bad", 0.3), ("good", 3.0), ("fair", 1.0)):
        put_store(home, ds, name, make_features(ds, shift=shift, seed=len(name)))
        ids.append(probe_features(ds, name, folds=2, subset=20, home=home).id)
    return ids


def holm_by_definition(p: list[float]) -> list[float]:
    """The step-down procedure as Holm (1979) states it: the least level at which each hypothesis is rejected."""
    order = sorted(range(len(p)), key=lambda k: p[k])
    adjusted: list[float] = [0.0] * len(p)
    for rank, k in enumerate(order):
        adjusted[k] = min(1.0, max((len(p) - j) * p[order[j]] for j in range(rank + 1)))
    return adjusted


@pytest.mark.parametrize("p", [[], [0.5], [0.01, 0.04, 0.03, 0.005], [0.02, 0.02, 0.9], [0.6, 0.7, 0.8], [1.0, 0.0]])
def test_holm_is_the_step_down_procedure(p: list[float]) -> None:
    assert holm(p) == pytest.approx(holm_by_definition(p), abs=1e-15)


def placements(labels: Any, score: Any) -> Any:
    """Share of the other class that each row is ranked rightly against, pair by pair."""
    out = np.empty(len(labels))
    for i, y in enumerate(labels):
        apart = (score[i] - score[labels != y]) * (1 if y else -1)
        out[i] = np.mean((apart > 0) + 0.5 * (apart == 0))
    return out


def test_a_difference_has_the_variance_of_test_groups_and_of_training(home: Path, runs: list[str]) -> None:
    rows = compare(runs, home=home)
    found = [find_run_anywhere(run, home) for run in runs]
    tables = [load_predictions(path).sort_values(["fold", "id"]) for _, path in found]
    first = tables[0][tables[0]["fold"] == 0]
    y, groups = first["label"].to_numpy(), first["group"].to_numpy()
    scores = [t["p_1"].to_numpy().reshape(2, -1) for t in tables]
    influence, auc = [], []
    for own in scores:  # DeLong's placement values, summed by group (one class each) as Obuchowski does
        placed = np.stack([placements(y, q) for q in own])
        auc.append([roc_auc_score(y, q) for q in own])
        moves = []
        for group in np.unique(groups):
            rows_of = groups == group
            c = y[rows_of][0]
            n_groups = len(np.unique(groups[y == c]))
            share = (placed[:, rows_of] - np.array(auc[-1])[:, None]).sum(1) / (y == c).sum()
            moves.append(share * np.sqrt(n_groups / (n_groups - 1)))
        influence.append(np.array(moves))  # (groups, folds)
    overlap = found[0][0].overlap
    assert overlap == 0.0  # two folds
    for row, own, values in zip(rows[1:], influence[1:], auc[1:], strict=True):
        apart = own - influence[0]
        v_test = (apart.mean(1) ** 2).sum()
        noise = ((apart - apart.mean(1, keepdims=True)) ** 2).sum()
        sigma2 = max(0.0, np.var(np.subtract(values, auc[0]), ddof=1) - noise)
        assert row.difference is not None
        assert row.difference.difference == pytest.approx(np.mean(values) - np.mean(auc[0]))
        assert row.difference.trained
        low, high = row.difference.interval
        assert (low + high) / 2 == pytest.approx(row.difference.difference)
        v, t = v_test + sigma2 / 2, row.difference.difference / np.sqrt(v_test + sigma2 / 2)
        # Satterthwaite: 14 groups less one of each class, one degree of freedom of training
        parts = [(apart[[y[groups == g][0] == c for g in np.unique(groups)]].mean(1) ** 2).sum() for c in (0, 1)]
        n_groups = [len(np.unique(groups[y == c])) for c in (0, 1)]
        df_test = v_test**2 / sum(p**2 / (n - 1) for p, n in zip(parts, n_groups, strict=True))
        df = v**2 / (v_test**2 / df_test + (sigma2 / 2) ** 2)
        assert row.difference.p == pytest.approx(2 * stats.t.sf(abs(t), df), rel=1e-6)
        assert high - low == pytest.approx(2 * stats.t.ppf(0.975, df) * np.sqrt(v))
        smallest = (stats.t.ppf(0.975, df) + stats.t.ppf(0.8, df)) * np.sqrt(v)
        assert row.difference.smallest == pytest.approx(smallest)
    assert [row.p_holm for row in rows[1:]] == pytest.approx(holm_by_definition([r.difference.p for r in rows[1:]]))


def test_metrics_are_one_family_and_margins_test_equivalence(home: Path, runs: list[str]) -> None:
    rows = compare(runs, metrics=["auc", "accuracy"], margin=0.9, home=home)
    assert [row.metric for row in rows] == ["auc"] * 3 + ["accuracy"] * 3
    apart = [row for row in rows if row.difference is not None]
    assert [row.p_holm for row in apart] == pytest.approx(holm_by_definition([r.difference.p for r in apart]))
    assert all(0 <= row.difference.p_margin < 0.5 for row in apart)
    with refused(UsageError, "option-bounds"):
        compare(runs, margin=0.0, home=home)
    rows = compare([*runs, runs[0]], reference=runs[1], home=home, resamples=50)
    assert [row.run for row in rows] == [runs[1], runs[0], runs[2]]


def test_fewer_than_two_runs_and_unknown_ones_are_refused(home: Path, runs: list[str]) -> None:
    with refused(UsageError, "too-few-runs"):
        compare(runs[:1], home=home)
    with pytest.raises(StoreNotFoundError):
        compare([runs[0], "nonsense"], home=home)
    with pytest.raises(StoreNotFoundError):
        compare([runs[0], "linear-"], home=home)


def test_other_test_images_metrics_and_unknown_labels_are_refused(home: Path, runs: list[str]) -> None:
    labels = np.tile([0, 1], 60)
    ds = make_dataset(labels)  # the same dataset by name, with a local test set
    put_store(home, ds, "other", make_features(ds))
    local = probe_features(ds, "other", folds=2, subset=20, home=home).id
    with refused(ProtocolError, "different-test-sets") as caught:
        compare([runs[0], local], home=home)
    assert "differ" in str(caught.value.found)
    blind = make_dataset([*labels, *[-1] * 10], split=["train"] * 120 + ["test"] * 10, name="blind")
    put_store(home, blind, "other", make_features(blind))
    unknown = probe_features(blind, "other", folds=2, subset=20, home=home, test="official").id
    with refused(ProtocolError, "no-test-labels"):
        compare([runs[0], unknown], home=home)
    elsewhere = make_dataset(np.tile([0, 1, 2], 40), name="elsewhere")
    put_store(home, elsewhere, "other", make_features(elsewhere))
    third = probe_features(elsewhere, "other", folds=2, subset=20, home=home).id
    with refused(ProtocolError, "different-tasks"):
        compare([runs[0], third], home=home)


def test_a_comparison_is_delongs_with_students_t() -> None:
    rng = np.random.default_rng(2)
    labels = np.repeat([0, 1], 30)
    z = rng.normal(size=(2, 60, 2)) + np.array([1.6, 1.0])[:, None, None] * np.eye(2)[labels]
    parts = [components(labels == 1, q[:, 1] - q[:, 0]) for q in z]
    v = [np.var(parts[0][k] - parts[1][k], ddof=1) / 30 for k in (1, 2)]
    error, df = math.sqrt(sum(v)), sum(v) ** 2 / (v[0] ** 2 / 29 + v[1] ** 2 / 29)
    d = parts[0][0] - parts[1][0]
    test = TestSet(labels, np.arange(60), ("a", "b"))
    found = compare_scores(*(scored("auc", test, q[None]) for q in z), margin=0.3)
    assert found.difference == pytest.approx(d)
    assert found.p == pytest.approx(2 * student.sf(abs(d) / error, df))
    reach = student.ppf(0.975, df) * error
    assert found.interval == pytest.approx((d - reach, d + reach))
    assert found.smallest == pytest.approx(reach + student.ppf(0.8, df) * error)
    sides = student.sf((d + 0.3) / error, df), student.cdf((d - 0.3) / error, df)
    assert found.p_margin == pytest.approx(max(sides))
    assert not found.trained


def test_a_comparison_of_procedures_adds_the_variance_of_training() -> None:
    test, z = patients(6, n_groups=40, models=10)
    unlike = 0.8 * np.linspace(-1, 1, 5)[:, None, None] * (test.labels[:, None] == np.arange(2))
    one, other = (scored("auc", test, q) for q in (z[:5] + unlike, z[5:] - unlike))
    found, fixed = (compare_scores(one, other, overlap=o, folds=5) for o in (0.75, None))
    moves = one.moves - other.moves
    noise = np.mean([((moves[i] - moves[j]) ** 2).sum() for i, j in combinations(range(5), 2)]) / 2
    s2 = (one.values - other.values).var(ddof=1) - noise
    assert s2 > 0
    extra = s2 / 0.25 * (1 / 5 + 4 / 5 * 0.75)
    v_test = float((moves.mean(0) ** 2).sum())
    assert fixed.interval is not None
    reach = width(fixed.interval) / 2 / math.sqrt(v_test)
    df_test = brentq(lambda df: student.ppf(0.975, df) - reach, 20, 40)
    v = v_test + extra
    df = v**2 / (v_test**2 / df_test + extra**2 / 4)
    assert found.p == pytest.approx(2 * student.sf(abs(found.difference) / math.sqrt(v), df), rel=1e-3)
    assert found.trained
    assert compare_scores(one, other, overlap=(0.75, 0.75), folds=5) == found
    assert not compare_scores(one, other, overlap=0.95).trained
    assert not compare_scores(one, other, overlap=(0.5, 0.95)).trained
    assert not compare_scores(one, scored("auc", test, z[5:7]), overlap=0.75).trained


@pytest.mark.parametrize("key", sorted(METRICS))
@pytest.mark.parametrize("gain", [1.5, 40.0])
def test_equal_models_do_not_differ_and_are_not_proven_equal_by_few_patients(key: str, gain: float) -> None:
    test, z = patients(6, models=2, gain=gain)  # ordinary, and perfect
    one = scored(key, test, z)
    found = compare_scores(one, one, margin=0.005)
    if found.why:
        assert (key, found.why) == ("log_loss", "no variation among the test groups")
    else:
        assert (found.difference, found.p) == (0, 1)
        assert width(found.interval) > 0.01
        assert found.p_margin is not None
        assert found.p_margin > 0.05


def columns_dataset() -> ImageDataset:
    labels = np.tile([0, 1], 80)
    groups = [f"g{k // 4}-{k % 2}" for k in range(160)]
    ds = make_dataset(labels, groups, ["train"] * 60 + ["test"] * 100, name="columns")
    sex = np.where(np.arange(160) % 5 < 2, "F", "M").astype(object)
    sex[60:64] = ""
    rare = np.where(np.arange(160) == 101, "odd", "even")  # one image of class 1
    return replace(ds, table=ds.table.assign(sex=sex, age=np.arange(160) % 95, rare=rare))


@pytest.fixture(scope="module")
def run(home: Path) -> str:
    ds = columns_dataset()
    put_store(home, ds, "toy", make_features(ds, shift=1.0))
    return probe_features(ds, "toy", folds=2, subset=20, home=home).id


def test_rows_are_the_scores_of_their_images(home: Path, run: str) -> None:
    rows, notes = subgroups([run], ["sex"], home=home, resamples=100)
    result, path = find_run_anywhere(run, home)
    assert [(r.column, r.value) for r in rows] == [("", "all"), ("sex", "F"), ("sex", "M"), ("sex", "(no value)")]
    assert rows[0].mean == pytest.approx(result.mean)
    table = load_predictions(path).merge(columns_dataset().table[["id", "sex"]], on="id")
    for row in rows[1:]:
        part = table[table["sex"] == row.value.replace("(no value)", "")].sort_values(["fold", "id"])
        one = part[part["fold"] == 0]
        scores = [roc_auc_score(f["label"], f["p_1"]) for _, f in part.groupby("fold")]
        assert (row.n_images, row.n_groups) == (len(one), one["group"].nunique())
        assert (row.mean, row.std) == pytest.approx((np.mean(scores), np.std(scores, ddof=1)))
        few = min(one["group"][one["label"] == c].nunique() for c in (0, 1)) < 5
        assert (row.interval is None) == few == row.why.startswith("too few patients")
    assert sum(row.n_images for row in rows[1:]) == rows[0].n_images
    assert notes == []


def test_a_subgroup_without_a_class_is_too_few(home: Path, run: str) -> None:
    rows, _ = subgroups([run], ["rare"], home=home, resamples=50)
    odd = next(row for row in rows if row.value == "odd")
    assert (odd.n_images, odd.lacks, odd.mean, odd.interval) == (1, ("a",), None, None)
    assert odd.to_json()["lacks"] == ("a",)


def test_runs_are_compared_within_every_subgroup(home: Path, run: str) -> None:
    ds = columns_dataset()
    put_store(home, ds, "better", make_features(ds, shift=3.0))
    better = probe_features(ds, "better", folds=2, subset=20, home=home).id
    rows, _ = subgroups([run, better], ["sex"], home=home)
    apart = [row for row in rows if row.difference is not None]
    assert {row.run for row in apart} == {better}
    for row in apart:
        (own,) = [r for r in rows if r.run == run and r.value == row.value]
        assert row.difference.difference == pytest.approx(row.mean - own.mean)
    known = [row for row in apart if row.difference.p is not None]
    assert len(known) >= 3
    smallest = min(known, key=lambda row: row.difference.p)
    assert smallest.p_holm == pytest.approx(min(1.0, smallest.difference.p * len(known)))


def test_unknown_columns_metrics_and_images_are_refused(home: Path, run: str) -> None:
    with pytest.raises(UsageError):
        subgroups([run], ["gender"], home=home)
    with pytest.raises(UsageError):
        subgroups([run], ["sex"], metrics=["f3"], home=home)
    with refused(UsageError, "nothing-named"):
        subgroups([run], [], home=home)
    ds = columns_dataset()
    part = replace(ds, table=ds.table[:-1])
    (home / "columns" / "dataset.parquet").write_bytes(part.to_parquet_bytes())
    with refused(StoreError, "images-gone"):
        subgroups([run], ["sex"], home=home)
