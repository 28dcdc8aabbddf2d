"""An audit finds what was planted, and only says what it measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embcache.analysis.audit import _doubt, audit_dataset
from embcache.data.dataset import ImageDataset
from embcache.errors import UsageError
from tests.probe.build import make_dataset, make_features, put_store

N, TEST = 300, 75
FLIPPED = {"i10", "i41", "i77", "i231"}


@pytest.fixture
def truth() -> np.ndarray:
    return np.tile([0, 1, 1], 100)


@pytest.fixture
def ds(home: Path, truth: np.ndarray) -> ImageDataset:
    """300 images of two classes far apart: two pairs of near-duplicates, four wrong labels, one outlier."""
    groups = [f"g{k}" for k in range(N)]
    groups[8] = groups[5]
    true = make_dataset(truth.tolist(), groups, ["train"] * (N - TEST) + ["test"] * TEST)
    x = make_features(true, 24, shift=14.0)
    x[8] = x[5] + 1e-3  # within a group
    x[240] = x[21] + 1e-3  # a training image in the test set
    x[100] = np.random.default_rng(3).normal(size=24) * 0.1 - 30  # far from everything
    labels = [1 - y if f"i{k}" in FLIPPED else y for k, y in enumerate(truth)]
    ds = make_dataset(labels, groups, ["train"] * (N - TEST) + ["test"] * TEST)
    put_store(home, ds, "a", x)
    return ds


def test_what_was_planted_is_found(ds: ImageDataset, home: Path) -> None:
    found = audit_dataset(ds, "a", home=home, similarity=0.999)
    assert found.images == N
    assert {(frozenset((p.one, p.other)), p.kind) for p in found.pairs} == {
        (frozenset(("i5", "i8")), "within a group"),
        (frozenset(("i21", "i240")), "across splits"),
    }
    # Not all of them: a class proposes itself where it is as probable as among its own images on average.
    doubted = {d.id for d in found.doubts}
    assert len(doubted & FLIPPED) >= 2
    assert doubted <= FLIPPED | {"i100"}
    for doubt in found.doubts:
        assert doubt.p_proposed > doubt.p_label
        assert doubt.proposed != doubt.label
    assert [o.id for o in found.outliers][:1] == ["i100"]


def test_a_label_is_doubted_where_another_class_is_as_probable_as_its_own_images_find_it() -> None:
    p = np.array(
        [[0.9, 0.1, 0.0], [0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.1, 0.6, 0.3], [0.85, 0.1, 0.05], [0.4, 0.0, 0.6]]
    )
    labels = np.array([0, 0, 1, 1, 1, 2])
    # Means of p(own class): 0.8, 0.5, 0.6. Only image 4 has another class above that class's mean.
    ids = np.array([f"i{k}" for k in range(6)], dtype=object)
    (doubt,) = _doubt(ids, labels, p, np.array(["train"] * 5 + ["test"]))
    assert (doubt.id, doubt.label, doubt.proposed, doubt.p_label, doubt.p_proposed) == ("i4", 1, 0, 0.1, 0.85)


def test_what_to_leave_out_and_its_effect(ds: ImageDataset, home: Path) -> None:
    found = audit_dataset(ds, "a", home=home, similarity=0.999)
    reasons = dict(found.exclude)
    assert reasons["i21"].endswith("near-duplicate of the test image i240")  # the training image goes, never the test's
    assert "i240" not in reasons
    assert "i5" not in reasons  # within a group nothing leaks
    assert {d.id for d in found.doubts} | {o.id for o in found.outliers} | {"i21"} == set(reasons)
    effect = found.effect
    assert effect is not None
    tests = {f"i{k}" for k in range(N - TEST, N)}
    assert effect.excluded_test == len(tests & set(reasons))
    assert effect.excluded_train == len(set(reasons) - tests)
    assert effect.metric == "auc"
    assert effect.after_clean[0] >= effect.after[0]
    assert effect.before[0] < 1  # one test label is wrong: nothing reaches 1 on all of them


def test_a_clean_dataset_has_nothing_to_leave_out(home: Path, truth: np.ndarray) -> None:
    ds = make_dataset(truth.tolist(), split=["train"] * (N - TEST) + ["test"] * TEST)
    put_store(home, ds, "a", make_features(ds, 24, shift=12.0))
    found = audit_dataset(ds, "a", home=home, similarity=0.9999)
    assert (found.pairs, found.doubts, found.outliers, found.exclude, found.effect) == ((), (), (), (), None)


def test_unlabelled_and_quarantined_images_are_not_audited(home: Path) -> None:
    labels = [*np.tile([0, 1], 60).tolist(), -1, -1]
    ds = make_dataset(labels, split=["train"] * 90 + ["test"] * 32, n_classes=2)
    put_store(home, ds, "a", make_features(ds, 8), bad={"i4": "truncated"})
    assert audit_dataset(ds, "a", home=home).images == 119


def test_a_threshold_that_is_none_is_refused(ds: ImageDataset, home: Path) -> None:
    for value in (0.0, 1.5, float("nan")):
        with pytest.raises(UsageError, match="not a similarity"):
            audit_dataset(ds, "a", similarity=value, home=home)
