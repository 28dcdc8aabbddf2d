"""Comparisons: the same resamples, Holm in one family, refused where the test images are not the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from embcache.errors import ProtocolError, StoreNotFoundError, UsageError
from embcache.probe.metrics import BOOTSTRAP_SEED, resample_weights
from embcache.probe.results import find_run_anywhere, load_predictions
from embcache.probe.run import probe_features
from embcache.report.compare import bootstrap_p, compare_runs, holm
from tests.probe.build import make_dataset, make_features, put_store


@pytest.fixture
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


def test_holm_of_the_textbook_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_equal_scores_are_no_difference_whatever_their_last_bits() -> None:
    assert bootstrap_p([1e-17, -1e-17] * 50) == bootstrap_p(np.zeros(100)) == 1.0
    assert bootstrap_p([1e-16] * 100) == 1.0


def test_p_counts_both_sides_of_zero() -> None:
    assert bootstrap_p(np.arange(1, 2000)) == pytest.approx(2 / 2000)
    assert bootstrap_p([-1.0, 1.0]) == 1.0
    assert bootstrap_p(np.zeros(100)) == 1.0
    assert bootstrap_p([-1.0] * 4 + [1.0] * 95) == pytest.approx(2 * 5 / 100)


def test_differences_are_those_of_a_loop_with_scikit_learn(home: Path, runs: list[str]) -> None:
    rows = compare_runs(runs, home=home, resamples=60)
    tables = [load_predictions(find_run_anywhere(run, home)[1]).sort_values(["fold", "id"]) for run in runs]
    first = tables[0][tables[0]["fold"] == 0]
    y, groups = first["label"].to_numpy(), first["group"].to_numpy(dtype=object)
    weights = np.concatenate(list(resample_weights(y, groups, 60, BOOTSTRAP_SEED)))
    # copies of the drawn images instead of weights, one fold and one resample at a time
    samples = [
        [
            np.mean([roc_auc_score(np.repeat(y, c), np.repeat(q, c)) for q in t["p_1"].to_numpy().reshape(2, -1)])
            for c in weights.astype(int)
        ]
        for t in tables
    ]
    for row, own in zip(rows, samples, strict=True):
        assert row.interval == pytest.approx(tuple(np.quantile(own, [0.025, 0.975])), abs=1e-12)
    assert rows[0].difference is None
    assert rows[0].p is None
    p = [bootstrap_p(np.subtract(own, samples[0])) for own in samples[1:]]
    for row, own, raw, corrected in zip(rows[1:], samples[1:], p, holm(p), strict=True):
        assert row.difference == pytest.approx(row.mean - rows[0].mean)
        gap = np.subtract(own, samples[0])
        assert row.difference_interval == pytest.approx(tuple(np.quantile(gap, [0.025, 0.975])), abs=1e-12)
        assert (row.p, row.p_holm) == pytest.approx((raw, corrected))


def test_the_own_interval_is_that_of_the_result(home: Path, runs: list[str]) -> None:
    for row, run in zip(compare_runs(runs, home=home), runs, strict=True):
        assert row.interval == find_run_anywhere(run, home)[0].interval


def test_the_reference_comes_first_and_a_run_named_twice_counts_once(home: Path, runs: list[str]) -> None:
    rows = compare_runs([*runs, runs[0]], reference=runs[1], home=home, resamples=50)
    assert [row.run for row in rows] == [runs[1], runs[0], runs[2]]
    assert rows[1].difference is not None
    assert rows[1].difference < 0


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
