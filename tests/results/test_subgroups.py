"""Scores within subgroups: the right images, their own intervals, none where a class is missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, roc_auc_score

from embcache.data.dataset import ImageDataset
from embcache.errors import StoreError, UsageError
from embcache.probe.probe import probe_features
from embcache.results.subgroups import score_subgroups
from embcache.runs.folders import find_run_anywhere, load_predictions
from tests.probe.build import make_dataset, make_features, put_store


def columns_dataset() -> ImageDataset:
    labels = np.tile([0, 1], 80)
    ds = make_dataset(labels, [f"g{k // 4}-{k % 2}" for k in range(160)], ["train"] * 60 + ["test"] * 100)
    sex = np.where(np.arange(160) % 5 < 2, "F", "M").astype(object)
    sex[60:64] = ""
    rare = np.where(np.arange(160) == 101, "odd", "even")  # one image of class 1
    return replace(ds, table=ds.table.assign(sex=sex, age=np.arange(160) % 95, rare=rare))


@pytest.fixture
def run(home: Path) -> str:
    ds = columns_dataset()
    put_store(home, ds, "toy", make_features(ds, shift=1.0))
    return probe_features(ds, "toy", folds=2, subset=20, home=home).id


def test_rows_are_the_scores_of_their_images(home: Path, run: str) -> None:
    rows, notes = score_subgroups([run], ["sex"], home=home, resamples=100)
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
    rows, _ = score_subgroups([run], ["rare"], home=home, resamples=50)
    odd = next(row for row in rows if row.value == "odd")
    assert (odd.n_images, odd.lacks, odd.mean, odd.interval) == (1, ("a",), None, None)
    assert odd.to_json()["lacks"] == ("a",)


def test_any_metric_can_be_asked_for(home: Path, run: str) -> None:
    rows, _ = score_subgroups([run], ["age"], metrics=["accuracy"], home=home, resamples=50)
    assert [row.value for row in rows] == ["all", "<18", "18-39", "40-59", "60-79", "80+"]
    table = load_predictions(find_run_anywhere(run, home)[1])
    expected = [accuracy_score(f["label"], f["p_1"] > f["p_0"]) for _, f in table.groupby("fold")]
    assert rows[0].mean == pytest.approx(np.mean(expected))
    assert rows[0].interval is not None
    assert rows[0].interval[0] < np.mean(expected) < rows[0].interval[1]


def test_unknown_columns_metrics_and_images_are_refused(home: Path, run: str) -> None:
    with pytest.raises(UsageError, match="no column 'gender'"):
        score_subgroups([run], ["gender"], home=home)
    with pytest.raises(UsageError, match="no such metric"):
        score_subgroups([run], ["sex"], metrics=["f3"], home=home)
    with pytest.raises(UsageError, match="runs and columns"):
        score_subgroups([run], [], home=home)
    ds = columns_dataset()
    part = replace(ds, table=ds.table[:-1])
    (home / "toy" / "dataset.parquet").write_bytes(part.to_parquet_bytes())
    with pytest.raises(StoreError, match=r"1 test images of run .* are no longer in toy"):
        score_subgroups([run], ["sex"], home=home)


def test_runs_are_compared_within_every_subgroup(home: Path, run: str) -> None:
    ds = columns_dataset()
    put_store(home, ds, "better", make_features(ds, shift=3.0))
    better = probe_features(ds, "better", folds=2, subset=20, home=home).id
    rows, _ = score_subgroups([run, better], ["sex"], home=home)
    apart = [row for row in rows if row.difference is not None]
    assert {row.run for row in apart} == {better}
    for row in apart:
        (own,) = [r for r in rows if r.run == run and r.value == row.value]
        assert row.difference.difference == pytest.approx(row.mean - own.mean)
    known = [row for row in apart if row.difference.p is not None]
    assert len(known) >= 3
    smallest = min(known, key=lambda row: row.difference.p)
    assert smallest.p_holm == pytest.approx(min(1.0, smallest.difference.p * len(known)))
