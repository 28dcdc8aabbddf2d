"""Primitives of splitting: what they promise, held against slower or independent ways to the same thing."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embcache.data.groups import hash_order, stratified_group_folds, water_fill

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=6)
FROZEN_ORDER = [9, 8, 7, 4, 3, 0, 2, 5, 6, 1]
ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 25)), min_size=1, max_size=120)  # (label, group)


def test_hash_order_is_the_published_recipe() -> None:
    keys = ["b", "a", "ü", "image 7"]
    by_hand = sorted(range(4), key=lambda i: hashlib.sha256(f"3\0folds\0{keys[i]}".encode()).hexdigest())
    assert hash_order(3, "folds", keys).tolist() == by_hand


def test_hash_order_never_changes() -> None:
    # A frozen value: each process that changes it changes every split ever published.
    order = hash_order(0, "train/0/1", [f"image{i}" for i in range(10)])
    assert order.tolist() == FROZEN_ORDER


@given(COUNTS, st.data())
def test_water_fill_equals_drawing_one_at_a_time(counts: list[int], data: st.DataObject) -> None:
    n = data.draw(st.integers(0, sum(counts)))
    take = [0] * len(counts)
    for _ in range(n):  # the emptiest class that still has some; among equals the one that has more, then the first
        open_classes = [c for c in range(len(counts)) if take[c] < counts[c]]
        chosen = min(open_classes, key=lambda c: (take[c], -counts[c], c))
        take[chosen] += 1
    assert water_fill(counts, n).tolist() == take
    if n < sum(counts):
        assert (water_fill(counts, n + 1) >= take).all()  # nested


@pytest.mark.parametrize("n", [-1, 7])
def test_water_fill_refuses_what_is_not_there(n: int) -> None:
    with pytest.raises(ValueError, match="cannot draw"):
        water_fill([2, 4], n)


@given(ROWS, st.integers(2, 6), st.integers(0, 5))
def test_folds_divide_no_group_and_place_every_row(rows: list[tuple[int, int]], n: int, seed: int) -> None:
    labels, groups = [r[0] for r in rows], [f"g{r[1]}" for r in rows]
    folds = stratified_group_folds(labels, groups, n, seed)
    assert len(folds) == len(rows)
    assert set(folds.tolist()) <= set(range(n))
    assert all(len(set(folds[[g == name for g in groups]])) == 1 for name in set(groups))


@settings(max_examples=30)
@given(ROWS, st.integers(2, 6), st.randoms(use_true_random=False))
def test_folds_do_not_depend_on_the_order_of_rows(rows: list[tuple[int, int]], n: int, random: object) -> None:
    shuffled = list(range(len(rows)))
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    labels, groups = np.array([r[0] for r in rows]), np.array([f"g{r[1]}" for r in rows])
    folds = stratified_group_folds(labels, groups.tolist(), n, 0)
    again = stratified_group_folds(labels[shuffled], groups[shuffled].tolist(), n, 0)
    assert again.tolist() == folds[shuffled].tolist()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=150), st.integers(2, 6))
def test_ungrouped_folds_are_level_in_every_class(labels: list[int], n: int) -> None:
    folds = stratified_group_folds(labels, [str(i) for i in range(len(labels))], n, 0)
    for c in set(labels):
        sizes = Counter(folds[np.array(labels) == c].tolist())
        assert max(sizes.values()) - min(sizes.get(f, 0) for f in range(n)) <= 1
    sizes = np.bincount(folds, minlength=n)
    assert sizes.max() - sizes.min() <= 1


@settings(max_examples=30)
@given(st.integers(0, 300), st.integers(2, 5))
def test_every_fold_gets_a_class_that_has_a_group_for_each(seed: int, n: int) -> None:
    # One rare class of n groups of different sizes among many common ones: no fold may go without.
    rng = np.random.default_rng(seed)
    labels, groups = [], []
    for g in range(60):
        for _ in range(rng.integers(1, 8)):
            labels.append(0)
            groups.append(f"common{g}")
    for g in range(n):
        for _ in range(rng.integers(1, 6)):
            labels.append(1)
            groups.append(f"rare{g}")
    folds = stratified_group_folds(labels, groups, n, seed)
    assert set(folds[np.array(labels) == 1].tolist()) == set(range(n))


def test_folds_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="two folds"):
        stratified_group_folds([0], ["a"], 1, 0)
    with pytest.raises(ValueError, match="2 labels but 1 groups"):
        stratified_group_folds([0, 1], ["a"], 2, 0)
    assert stratified_group_folds([], [], 5, 0).tolist() == []
