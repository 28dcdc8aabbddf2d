"""Comparisons: the same test groups, Holm in one family, refused where the test images are not the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from embcache.errors import ProtocolError, StoreNotFoundError, UsageError
from embcache.probe.probe import probe_features
from embcache.results.compare import compare_runs
from embcache.runs.folders import find_run_anywhere, load_predictions
from tests.probe.build import make_dataset, make_features, put_store


@pytest.fixture(scope="module")
def made_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    home = tmp_path_factory.mktemp("made") / "home"
    labels = np.tile([0, 1], 60)
    groups = [f"g{k // 4}-{k % 2}" for k in range(120)]
    ds = make_dataset(labels, groups, ["train"] * 60 + ["test"] * 60)
    ids = []
    for name, shift in (("bad", 0.3), ("good", 3.0), ("fair", 1.0)):
        put_store(home, ds, name, make_features(ds, shift=shift, seed=len(name)))
        ids.append(probe_features(ds, name, folds=2, subset=20, home=home).id)
    return home, ids


@pytest.fixture
def runs(made_runs: tuple[Path, list[str]], home: Path) -> list[str]:
    """A bad, a good and a middling result on one dataset with groups of two."""
    shutil.copytree(made_runs[0], home)
    return made_runs[1]


def holm_by_definition(p: list[float]) -> list[float]:
    """The step-down procedure as Holm (1979) states it: the least level at which each hypothesis is rejected."""
    order = sorted(range(len(p)), key=lambda k: p[k])
    adjusted: list[float] = [0.0] * len(p)
    for rank, k in enumerate(order):
        adjusted[k] = min(1.0, max((len(p) - j) * p[order[j]] for j in range(rank + 1)))
    return adjusted


def placements(labels: Any, score: Any) -> Any:
    """Share of the other class that each row is ranked rightly against, pair by pair."""
    out = np.empty(len(labels))
    for i, y in enumerate(labels):
        apart = (score[i] - score[labels != y]) * (1 if y else -1)
        out[i] = np.mean((apart > 0) + 0.5 * (apart == 0))
    return out


def test_a_difference_has_the_variance_of_test_groups_and_of_training(home: Path, runs: list[str]) -> None:
    rows = compare_runs(runs, home=home)
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
    rows = compare_runs(runs, metrics=["auc", "accuracy"], margin=0.9, home=home)
    assert [row.metric for row in rows] == ["auc"] * 3 + ["accuracy"] * 3
    apart = [row for row in rows if row.difference is not None]
    assert [row.p_holm for row in apart] == pytest.approx(holm_by_definition([r.difference.p for r in apart]))
    assert all(0 <= row.difference.p_margin < 0.5 for row in apart)
    with pytest.raises(UsageError, match="margin"):
        compare_runs(runs, margin=0.0, home=home)


def test_the_own_interval_is_that_of_the_result(home: Path, runs: list[str]) -> None:
    for row, run in zip(compare_runs(runs, home=home), runs, strict=True):
        assert row.interval == find_run_anywhere(run, home)[0].interval


def test_the_reference_comes_first_and_a_run_named_twice_counts_once(home: Path, runs: list[str]) -> None:
    rows = compare_runs([*runs, runs[0]], reference=runs[1], home=home, resamples=50)
    assert [row.run for row in rows] == [runs[1], runs[0], runs[2]]
    assert rows[1].difference is not None
    assert rows[1].difference.difference < 0


def test_fewer_than_two_runs_and_unknown_ones_are_refused(home: Path, runs: list[str]) -> None:
    with pytest.raises(UsageError, match="two runs"):
        compare_runs(runs[:1], home=home)
    with pytest.raises(StoreNotFoundError, match="no such run"):
        compare_runs([runs[0], "nonsense"], home=home)
    with pytest.raises(StoreNotFoundError, match="3 runs are called so"):
        compare_runs([runs[0], "linear-"], home=home)


def test_other_test_images_metrics_and_unknown_labels_are_refused(home: Path, runs: list[str]) -> None:
    labels = np.tile([0, 1], 60)
    ds = make_dataset(labels)  # the same dataset by name, with a local test set
    put_store(home, ds, "other", make_features(ds))
    local = probe_features(ds, "other", folds=2, subset=20, home=home).id
    with pytest.raises(ProtocolError, match="not tested on the same images") as caught:
        compare_runs([runs[0], local], home=home)
    assert "differ" in str(caught.value.found)
    blind = make_dataset([*labels, *[-1] * 10], split=["train"] * 120 + ["test"] * 10, name="blind")
    put_store(home, blind, "other", make_features(blind))
    unknown = probe_features(blind, "other", folds=2, subset=20, home=home, test="official").id
    with pytest.raises(ProtocolError, match="not known"):
        compare_runs([runs[0], unknown], home=home)
    elsewhere = make_dataset(np.tile([0, 1, 2], 40), name="elsewhere")
    put_store(home, elsewhere, "other", make_features(elsewhere))
    third = probe_features(elsewhere, "other", folds=2, subset=20, home=home).id
    with pytest.raises(ProtocolError, match="different datasets"):
        compare_runs([runs[0], third], home=home)
