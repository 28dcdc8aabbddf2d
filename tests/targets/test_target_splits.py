"""Splits of findings and numbers: no group divided, balanced, nested, the same whatever the order of rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embcache.data.classes import retarget
from embcache.data.dataset import ImageDataset
from embcache.data.groups import spread_order, stratified_group_folds
from embcache.errors import ProtocolError
from embcache.probe.protocol import Splits, plan_splits, read_splits, write_splits
from tests.probe.build import make_dataset
from tests.refusal import refused

SHARES = (0.3, 0.1, 0.04)


def findings(n: int = 900, groups: int = 400, seed: int = 0, unknown: float = 0.05) -> ImageDataset:
    rng = np.random.default_rng(seed)
    of = rng.integers(0, groups, n)
    ill = rng.random((groups, 3)) < np.array(SHARES)
    y = (ill[of] & (rng.random((n, 3)) < 0.8)).astype(np.int64)
    text = np.where(rng.random((n, 3)) < unknown, "", y.astype(str))
    ds = make_dataset(np.arange(n) % 2, [f"p{g}" for g in of])
    ds = dataclasses.replace(ds, table=ds.table.assign(a=text[:, 0], b=text[:, 1], c=text[:, 2]))
    return retarget(ds, "a,b,c", "findings")


def numbers(n: int = 400, seed: int = 0) -> ImageDataset:
    rng = np.random.default_rng(seed)
    ds = make_dataset(np.arange(n) % 2, [f"p{g}" for g in rng.integers(0, n // 2, n)])
    ages = rng.gamma(4, 12, n).clip(0, 110).round(1).astype(str)
    ages[:: n // 10] = ""
    return retarget(dataclasses.replace(ds, table=ds.table.assign(age=ages)), "age", "number")


BOTH = {"findings": findings, "number": numbers}


def parts(splits: Splits, fold: int) -> list[np.ndarray]:
    return [splits.train[fold, "F"], splits.val[fold, "F"], splits.test]


@pytest.mark.parametrize("kind", BOTH)
def test_no_group_is_divided_and_rows_without_a_value_are_left_out(kind: str) -> None:
    ds = BOTH[kind]()
    splits = plan_splits(ds, folds=4)
    for fold in range(4):
        groups = [set(splits.groups[part]) for part in parts(splits, fold)]
        assert sum(map(len, groups)) == len(set().union(*groups))
        assert splits.task.known(splits.labels[np.concatenate(parts(splits, fold))]).all()
    every = np.sort(np.concatenate(parts(splits, 0)))
    np.testing.assert_array_equal(every, np.flatnonzero(ds.task.known(ds.labels)))
    held = np.sort(np.concatenate([splits.val[fold, "F"] for fold in range(4)]))
    np.testing.assert_array_equal(held, np.setdiff1d(every, splits.test))


@pytest.mark.parametrize("seed", range(3))
def test_each_finding_is_spread_over_folds_and_test_set(seed: int) -> None:
    splits = plan_splits(findings(seed=seed), folds=5, seed=seed)
    y = splits.labels == 1
    counts = np.array([y[splits.val[fold, "F"]].sum(0) for fold in range(5)])
    assert (np.ptp(counts, axis=0) <= np.maximum(3, 0.1 * counts.sum(0))).all(), counts
    share = y[splits.test].sum(0) / (y[splits.test].sum(0) + counts.sum(0))
    np.testing.assert_allclose(share, 0.2, atol=0.06)
    sizes = [len(splits.val[fold, "F"]) for fold in range(5)]
    assert max(sizes) <= 1.15 * min(sizes)


def test_numbers_are_spread_over_folds_subsets_and_test_set() -> None:
    splits = plan_splits(numbers(), folds=5)
    y = splits.labels
    pool = np.concatenate([splits.val[fold, "F"] for fold in range(5)])
    cuts = np.quantile(y[pool], [0.2, 0.4, 0.6, 0.8])
    for rows in (*(splits.val[fold, "F"] for fold in range(5)), splits.test):
        counts = np.bincount(np.searchsorted(cuts, y[rows]), minlength=5)
        assert counts.min() >= 0.7 * len(rows) / 5, counts
    for fold in range(5):
        counts = np.bincount(np.searchsorted(cuts, y[splits.train[fold, "S"]]), minlength=5)
        assert counts.min() >= 3  # of 20 in fifths
        assert counts.max() <= 5


@pytest.mark.parametrize("kind", BOTH)
def test_subsets_are_nested_and_do_not_depend_on_each_other(kind: str) -> None:
    ds = BOTH[kind]()
    splits = plan_splits(ds, folds=3)
    for fold in range(3):
        s, m, f = (splits.train[fold, name].tolist() for name in "SMF")
        assert (len(s), len(m)) == (20, 60)
        assert set(s) < set(m) < set(f)
        if kind == "findings":
            assert s == m[:20] == f[:20]
            assert m == f[:60]
    alone = plan_splits(ds, subsets=["S"], folds=3)
    more = plan_splits(ds, subsets=["S", 100], folds=3)
    for other in (alone, more):
        for fold in range(3):
            assert set(other.train[fold, "S"].tolist()) == set(splits.train[fold, "S"].tolist())
        assert other.digest("S") == splits.digest("S")


@pytest.mark.parametrize("kind", BOTH)
def test_splits_are_the_same_whatever_the_order_of_rows(kind: str) -> None:
    ds = BOTH[kind](300)
    order = np.random.default_rng(3).permutation(len(ds))
    moved = dataclasses.replace(ds, table=ds.table.iloc[order].reset_index(drop=True))
    one, other = plan_splits(ds, folds=3), plan_splits(moved, folds=3)
    assert set(one.test_ids) == set(other.test_ids)
    for fold in range(3):
        for subset in "SMF":
            assert set(one.train_ids(fold, subset)) == set(other.train_ids(fold, subset))
            assert set(one.val_ids(fold, subset)) == set(other.val_ids(fold, subset))
    assert one.digest("S") == plan_splits(ds, folds=3).digest("S") != plan_splits(ds, folds=3, seed=1).digest("S")


def test_a_subset_of_findings_has_them_equally_often() -> None:
    splits = plan_splits(findings(), folds=3)
    for fold in range(3):
        y = splits.labels[splits.train[fold, "S"]] == 1
        counts = np.append(y.sum(0), (~y.any(1)).sum())
        assert counts.min() >= 4, counts  # of 20 in four strata; one image may have several
        rows = splits.labels[splits.train[fold, "F"]] == 1
        assert rows[:, 2].mean() < 0.1 < y[:, 2].mean()


@pytest.mark.parametrize("kind", BOTH)
def test_a_splits_file_reads_back(kind: str, tmp_path: Path) -> None:
    ds = BOTH[kind]()
    splits = plan_splits(ds, folds=3, val="matched")
    write_splits(splits, tmp_path / "splits.json")
    again = read_splits(tmp_path / "splits.json", ds)
    for subset in splits.subsets:
        assert again.digest(subset) == splits.digest(subset)
    for key, rows in splits.train.items():
        np.testing.assert_array_equal(again.train[key], rows)
    other = ds.whole
    assert other is not None
    with refused(ProtocolError, "splits-of-other-classes"):
        read_splits(tmp_path / "splits.json", other)


def test_rare_findings_are_refused_before_training() -> None:
    ds = findings(200, 100, unknown=0)
    rare = np.zeros(200, dtype=np.int64)
    rare[:2] = 1
    table = ds.table.assign(c=rare)
    with refused(ProtocolError, "class-too-small") as caught:
        plan_splits(dataclasses.replace(ds, table=table), folds=5)
    assert "c" in str(caught.value.found)
    assert "--drop-class c" in str(caught.value.fix)


def test_matched_validation_and_numbers_of_images() -> None:
    for kind in BOTH:
        ds = BOTH[kind]()
        splits = plan_splits(ds, subsets=[40], folds=3, val="matched")
        for fold in range(3):
            assert len(splits.train[fold, "40"]) == len(splits.val[fold, "40"]) == 40
        with refused(ProtocolError, "subset-too-large"):
            plan_splits(ds, subsets=[100_000], folds=3)
        with refused(ProtocolError, "subset-too-small"):
            plan_splits(ds, subsets=[1], folds=3)


# --- the orders themselves


@given(st.lists(st.tuples(*[st.booleans()] * 4), min_size=1, max_size=40), st.integers(0, 50), st.randoms())
def test_spread_order_keeps_its_promises(rows: list[tuple[bool, ...]], n: int, random: object) -> None:
    membership = np.array(rows, dtype=np.int64)
    order = np.random.default_rng(len(rows)).permutation(len(rows))
    whole = spread_order(membership, len(rows), order)
    assert sorted(whole.tolist()) == list(range(len(rows)))
    np.testing.assert_array_equal(spread_order(membership, min(n, len(rows)), order), whole[:n])
    none = np.flatnonzero(membership.sum(1) == 0)
    assert set(whole[len(rows) - len(none) :].tolist()) == set(none.tolist())


@given(st.integers(1, 4), st.integers(1, 30))
def test_a_row_of_one_stratum_each_makes_counts_equal(strata: int, each: int) -> None:
    membership = np.tile(np.eye(strata, dtype=np.int64), (each, 1))
    order = np.random.default_rng(each).permutation(len(membership))
    counts = np.cumsum(membership[spread_order(membership, len(membership), order)], axis=0)
    assert (np.ptp(counts, axis=1) <= 1).all()


def test_the_rarest_stratum_is_in_the_beginning() -> None:
    membership = np.zeros((1000, 3), dtype=np.int64)
    membership[:5, 0] = membership[5:100, 1] = membership[100:, 2] = 1
    first = spread_order(membership, 15, np.random.default_rng(0).permutation(1000))
    assert membership[first].sum(0).tolist() == [5, 5, 5]


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.booleans()), min_size=12, max_size=60))
def test_folds_of_membership_divide_no_group(rows: list[tuple[int, bool, bool]]) -> None:
    membership = np.array([[a, b, not (a or b)] for _, a, b in rows], dtype=np.int64)
    groups = [f"g{g}" for g, *_ in rows]
    fold = stratified_group_folds(membership, groups, 3, 0)
    assert len({(g, f) for g, f in zip(groups, fold.tolist(), strict=True)}) == len(set(groups))
    moved = np.random.default_rng(0).permutation(len(rows))
    again = stratified_group_folds(membership[moved], [groups[k] for k in moved], 3, 0)
    np.testing.assert_array_equal(again, fold[moved])
