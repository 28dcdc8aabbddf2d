"""An audit finds what was planted, judges training labels without the test set, and only says what it measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from embcache.data.dataset import ImageDataset
from embcache.errors import ProtocolError, UsageError
from embcache.figures.audit import Audit, _calibrated, _Images, audit_dataset, doubted_labels
from tests.probe.build import make_dataset, make_features, put_store
from tests.refusal import refused

N, TEST = 300, 75
FLIPPED = {"i10", "i41", "i77", "i231"}


TRUTH = np.tile([0, 1, 1], 100)


@pytest.fixture(scope="module")
def ds() -> ImageDataset:
    """300 images of two classes far apart: two pairs of near-duplicates, four wrong labels, two outliers."""
    groups = [f"g{k}" for k in range(N)]
    groups[8] = groups[5]
    labels = [1 - y if f"i{k}" in FLIPPED else y for k, y in enumerate(TRUTH.tolist())]
    return make_dataset(labels, groups, ["train"] * (N - TEST) + ["test"] * TEST)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, ds: ImageDataset) -> Path:
    """A home with features of `ds`."""
    x = make_features(make_dataset(TRUTH.tolist()), 24, shift=14.0)
    x[8] = x[5] + 1e-3  # within a group
    x[240] = x[21] + 1e-3  # a training image in the test set
    x[100] = np.random.default_rng(3).normal(size=24) * 0.1 - 30  # far from everything
    x[250] = np.tile([40, -40], 12)
    home = tmp_path_factory.mktemp("audit")
    put_store(home, ds, "a", x)
    return home


@pytest.fixture(scope="module")
def found(ds: ImageDataset, cache: Path) -> Audit:
    return audit_dataset(ds, "a", home=cache, similarity=0.999)


def audit(
    home: Path, x: np.ndarray, labels: Sequence[int], split: Sequence[str] | str = "train", **options: object
) -> Audit:
    """The audit of these features, each image of a group of its own."""
    ds = make_dataset(labels, split=split)
    put_store(home, ds, "a", np.asarray(x, dtype=np.float32))
    return audit_dataset(ds, "a", home=home, **options)  # type: ignore[arg-type]


def test_what_was_planted_is_found(found: Audit) -> None:
    assert (found.images, found.test_images) == (N - TEST, TEST)
    assert {(frozenset((p.one, p.other)), p.kind) for p in found.pairs} == {
        (frozenset(("i5", "i8")), "within a group"),
        (frozenset(("i21", "i240")), "across splits"),
    }
    # Perhaps not all of them: a class is confident where it is as probable as among its own images on average.
    doubted = {e.id for e in found.label_errors}
    assert len(doubted & FLIPPED) >= 3
    assert doubted <= FLIPPED | {"i100", "i250"}
    for error in found.label_errors:
        assert error.p_proposed > error.p_label
        assert error.proposed != error.label
        assert error.split == ("test" if int(error.id[1:]) >= N - TEST else "train")
    assert {o.id for o in found.outliers} == {"i100", "i250"}
    assert found.judge is not None
    assert not found.judge.too_weak
    assert found.judge.balanced_accuracy > 0.95


def test_training_images_are_left_out_and_test_images_are_not(found: Audit) -> None:
    reasons = dict(found.exclude)
    assert reasons.pop("i21") == "near-duplicate of the test image i240"
    assert {"i10", "i41", "i100"} <= set(reasons) <= {"i10", "i41", "i77", "i100"}  # within a group nothing leaks
    assert "label error" in reasons["i10"]
    assert found.effect is not None
    assert found.effect.metric == "auc"
    assert max(*found.effect.before, *found.effect.after) < 1  # one test label is wrong, and stays in the test set


def test_confident_learning_as_cleanlab_defines_it() -> None:
    """By the loops in the documentation of ``cleanlab.count.compute_confident_joint``, and the filter's last step."""

    @given(seed=st.integers(0, 2**20), classes=st.integers(2, 5), n=st.integers(5, 40), others=st.integers(0, 10))
    def check(seed: int, classes: int, n: int, others: int) -> None:
        rng = np.random.default_rng(seed)
        labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n + others)])
        p = rng.dirichlet(np.full(classes, 0.7), len(labels))
        judged = len(labels) - others
        thresholds = [np.mean([p[i][k] for i in range(judged) if labels[i] == k]) for k in range(classes)]
        right = []
        for row, label in zip(p, labels, strict=True):
            confident_bins = [row[k] >= thresholds[k] - 1e-6 for k in range(classes)]
            guess = label
            if sum(confident_bins) == 1:
                guess = confident_bins.index(True)
            elif sum(confident_bins) > 1:
                guess = int(np.argmax(row))
            right.append(bool(guess != label and np.argmax(row) != label))
        assert doubted_labels(labels, p, judged).tolist() == right

    check()


def test_probabilities_are_calibrated_where_classes_are_unequal() -> None:
    rng = np.random.default_rng(0)
    n, prior = 2_000, 0.1
    y = (rng.random(n) < prior).astype(np.int64)
    x = rng.normal(size=(n, 6)).astype(np.float32)
    x[:, 0] += 2 * y
    ids = np.arange(n).astype(str).astype(object)
    images = _Images(ids, y, ids, np.full(n, "train", dtype=object), torch.from_numpy(x), n - 400, ("a", "b"))
    p = _calibrated(images, 5, 0)[:, 1]
    right = 1 / (1 + (1 - prior) / prior * np.exp(2 - 2 * x[:, 0]))  # Bayes: log odds 2 x − 2 and those of the prior
    for side in (slice(0, n - 400), slice(n - 400, None)):
        assert np.abs(p[side] - right[side]).mean() < 0.03
    balanced = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced")).fit(x, y)
    assert np.abs(balanced.predict_proba(x)[:, 1] - right).mean() > 0.1


def test_on_noise_nothing_is_gained(home: Path) -> None:
    """Leaving out what models of the training images doubt moves a test AUC of nothing by nothing."""
    changes = []
    for draw in range(3):
        rng = np.random.default_rng(draw)
        labels = rng.permutation(np.arange(1_000) % 2)
        x = rng.normal(size=(1_000, 40)).astype(np.float32)
        train, test = np.arange(200), np.arange(200, 1_000)
        split = ["train"] * 200 + ["test"] * 800
        found = audit(home / str(draw), x, labels, split, most=1_000, folds=3)
        assert found.judge is not None
        assert found.judge.too_weak
        assert found.judge.found > 15  # they are listed, but no one should act on them
        assert [e.split for e in found.label_errors].count("train") == found.judge.found
        assert found.exclude == ()
        doubted = {e.id for e in found.label_errors}
        kept = np.array([k for k in train if f"i{k}" not in doubted])
        before, after = (
            roc_auc_score(
                labels[test],
                make_pipeline(StandardScaler(), LogisticRegression(C=0.01))
                .fit(x[rows], labels[rows])
                .decision_function(x[test]),
            )
            for rows in (train, kept)
        )
        changes.append(after - before)
    assert abs(np.mean(changes)) < 0.02  # 0.19 where test labels decide


def test_the_list_of_label_errors_is_capped_on_each_side(ds: ImageDataset, cache: Path, found: Audit) -> None:
    capped = audit_dataset(ds, "a", home=cache, most=1)
    assert capped.judge is not None
    every = [e.split for e in found.label_errors]
    assert (capped.judge.found, capped.judge.test_found) == (every.count("train"), every.count("test"))
    assert sorted(e.split for e in capped.label_errors) == ["test", "train"]
    assert sum("label error" in reason for _, reason in capped.exclude) == 1


def test_a_clean_dataset_has_nothing_to_leave_out(home: Path) -> None:
    x = make_features(make_dataset(TRUTH.tolist()), 24, shift=12.0)
    found = audit(home, x, TRUTH.tolist(), ["train"] * (N - TEST) + ["test"] * TEST, similarity=0.9999)
    assert (found.pairs, found.label_errors, found.outliers, found.exclude, found.effect) == ((), (), (), (), None)
    assert found.no_effect == ""


def test_a_class_of_near_duplicates_does_not_end_the_audit(home: Path) -> None:
    """Video frames on both sides of the border: all are to be left out, and then the class is gone."""
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(1, 30)) * 5 + rng.normal(size=(30, 30)) * 1e-3
    groups = [f"video{k // 3}" for k in range(30)] + [f"patient{k}" for k in range(60)]
    ds = make_dataset([0] * 30 + [1] * 60, groups)
    put_store(home, ds, "a", np.concatenate([frames, rng.normal(size=(60, 30))]).astype(np.float32))
    found = audit_dataset(ds, "a", home=home)
    assert sum(p.kind == "across splits" for p in found.pairs) == 24 * 6
    assert len(found.exclude) == 24
    assert found.effect is None
    assert found.no_effect == "a would be gone"


def test_rare_classes_do_not_end_the_audit(home: Path) -> None:
    labels = [0] * 40 + [1] * 40 + [2] * 3
    x = make_features(make_dataset(labels), 20, shift=10.0)
    x[6] = x[5]
    labels[7] = 1
    found = audit(home, x, labels, similarity=0.999)
    assert found.images + found.test_images == 83
    assert [frozenset((p.one, p.other)) for p in found.pairs] == [frozenset(("i5", "i6"))]
    assert [(e.id, e.label, e.proposed) for e in found.label_errors if e.split == "train"] == [("i7", 1, 0)]
    assert found.judge is not None
    assert not found.judge.too_weak
    assert any("fewer than 5 groups in training: c (" in note for note in found.notes)
    assert {"i80", "i81", "i82"} & {o.id for o in found.outliers}  # far from all others, since they are few
    assert not {"i80", "i81", "i82"} & {id_ for id_, _ in found.exclude}
    assert found.effect is not None


@pytest.mark.parametrize("labels", [[0] * 12, [0] * 11 + [1], [0, 0, 1, 1, 2, 2]])
def test_labels_that_cannot_be_judged_are_not(home: Path, labels: list[int]) -> None:
    x = np.random.default_rng(0).normal(size=(len(labels), 8))
    x[1] = x[0]
    found = audit(home, x, labels)
    assert found.judge is None
    assert found.label_errors == ()
    assert {frozenset((p.one, p.other)) for p in found.pairs} == {frozenset(("i0", "i1"))}
    assert found.exclude == () or found.no_effect


def test_images_of_the_datasets_own_validation_split_are_audited_once(home: Path) -> None:
    split = ["train"] * 200 + ["val"] * 50 + ["test"] * 50
    x = make_features(make_dataset(TRUTH.tolist()), 24, shift=14.0)
    labels = TRUTH.copy()
    labels[[20, 220]] = 1 - labels[[20, 220]]
    found = audit(home, x, labels, split)
    assert (found.images, found.test_images) == (250, 50)
    assert {(e.id, e.split) for e in found.label_errors} == {("i20", "train"), ("i220", "val")}
    assert {id_ for id_, _ in found.exclude} == {"i20", "i220"}


def test_features_that_do_not_vary_make_no_near_duplicates(home: Path) -> None:
    """Three features in four are constants whose float32 mean is not exactly theirs."""
    rng = np.random.default_rng(0)
    varying = rng.normal(size=(120, 16))
    x = np.concatenate([varying, np.tile(rng.uniform(100, 1_000, 48), (120, 1))], axis=1).astype(np.float32)
    assert audit(home, x, np.arange(120) % 2, similarity=0.9, folds=3).pairs == ()


def test_test_images_do_not_decide_which_training_images_are_outliers(
    ds: ImageDataset, home: Path, found: Audit
) -> None:
    train = make_dataset([*ds.labels[: N - TEST].tolist(), 0, 1], split=["train"] * (N - TEST) + ["test"] * 2)
    x = make_features(make_dataset(np.tile([0, 1, 1], 100).tolist()), 24, shift=14.0)[: N - TEST]
    x[8] = x[5] + 1e-3
    x[100] = np.random.default_rng(3).normal(size=24) * 0.1 - 30
    put_store(home, train, "a", np.concatenate([x, x[:1] + 900, x[:1] - 900]).astype(np.float32))
    others = audit_dataset(train, "a", home=home, folds=3)
    mine, theirs = ({o.id: o.deviations for o in some.outliers if o.split == "train"} for some in (found, others))
    assert mine == pytest.approx(theirs, rel=1e-5)


def test_unlabeled_and_quarantined_images_are_not_audited(home: Path) -> None:
    labels = [*np.tile([0, 1], 60).tolist(), -1, -1]
    ds = make_dataset(labels, split=["train"] * 90 + ["test"] * 32, n_classes=2)
    put_store(home, ds, "a", make_features(ds, 8), bad={"i4": "truncated"})
    found = audit_dataset(ds, "a", home=home, folds=3)
    assert (found.images, found.test_images) == (89, 30)


@pytest.mark.parametrize("options", [{"similarity": 0.0}, {"similarity": float("nan")}, {"most": -1}, {"folds": 2}])
def test_what_is_out_of_range_is_refused(ds: ImageDataset, cache: Path, options: dict[str, float]) -> None:
    with refused(UsageError, "option-bounds"):
        audit_dataset(ds, "a", home=cache, **options)


def test_features_that_cannot_be_used_are_told(home: Path) -> None:
    x = np.random.default_rng(0).normal(size=(40, 8))
    x[3, 2] = np.inf
    with refused(ProtocolError, "not-finite"):
        audit(home, x, np.arange(40) % 2)
    with refused(ProtocolError, "too-few-images"):
        audit(home / "other", x[5:10], [0, 1, 0, 1, 0], ["test"] * 4 + ["train"])
