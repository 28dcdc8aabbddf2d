"""Scores against scikit-learn; intervals against scikit-learn on each resample."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)

from embcache.errors import ProtocolError
from embcache.probe import metrics
from embcache.probe.metrics import bootstrap, evaluate, interval, per_class_auc, score, softmax


def predictions(n: int, n_classes: int, seed: int, *, coarse: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(n_classes), rng.integers(0, n_classes, size=n - n_classes)])
    logits = rng.normal(size=(n, n_classes)) + 1.5 * np.eye(n_classes)[y]
    return y, softmax(np.round(logits) if coarse else logits)  # coarse ones are full of ties


@given(st.integers(0, 500), st.booleans())
def test_auc_is_scikit_learns(seed: int, coarse: bool) -> None:
    y, p = predictions(40, 2, seed, coarse=coarse)
    assert score("auc", y, p) == pytest.approx(roc_auc_score(y, p[:, 1]), abs=1e-12)


@given(st.integers(0, 500), st.integers(3, 5))
def test_macro_auc_and_kappa_are_scikit_learns(seed: int, n_classes: int) -> None:
    y, p = predictions(60, n_classes, seed)
    assert score("macro_auc", y, p) == pytest.approx(roc_auc_score(y, p, multi_class="ovr", average="macro"), abs=1e-12)
    expected = cohen_kappa_score(y, p.argmax(1), weights="quadratic", labels=range(n_classes))
    assert score("kappa", y, p) == pytest.approx(expected, abs=1e-12)


@given(st.integers(0, 300))
def test_equal_rankings_have_exactly_equal_scores(seed: int) -> None:
    y, p = predictions(50, 2, seed)
    sharper = softmax(np.log(p) * 1.7)
    assert score("auc", y, sharper) == score("auc", y, p)


def test_confident_predictions_are_still_ranked() -> None:
    logits = np.array([[0.0, 50.0], [0.0, 60.0], [0.0, 40.0], [0.0, 55.0]])
    p = softmax(logits)
    assert (p[:, 1] == 1.0).all()  # as far as float64 can tell
    assert score("auc", [0, 1, 0, 1], p) == 1.0


def test_a_class_absent_from_the_fold_is_flagged_and_not_averaged_over() -> None:
    y, p = predictions(60, 4, 0)
    keep = y != 2
    y, p = y[keep], p[keep]
    assert per_class_auc(y, p)[2] is None
    present = [roc_auc_score(y == c, p[:, c]) for c in (0, 1, 3)]
    assert score("macro_auc", y, p) == pytest.approx(np.mean(present))
    everything = evaluate("macro_auc", y, p)
    assert everything["absent_classes"] == [2]
    assert everything["per_class_auc"][2] is None
    assert everything["balanced_accuracy"] == pytest.approx(
        np.mean([(p.argmax(1)[y == c] == c).mean() for c in (0, 1, 3)])
    )


@given(st.integers(0, 200), st.booleans())
def test_the_other_scores_of_two_classes(seed: int, coarse: bool) -> None:
    y, p = predictions(60, 2, seed, coarse=coarse)
    odds = np.log(p[:, 1] / p[:, 0]).round(9)  # what ranks: coarse logits have ties that their rounding would part
    p = softmax(np.stack([np.zeros(60), odds], 1))
    got = evaluate("auc", y, p)
    assert got["score"] == got["auc"] == pytest.approx(roc_auc_score(y, odds), abs=1e-12)
    assert got["auprc"] == pytest.approx(average_precision_score(y, odds), abs=1e-12)
    assert got["accuracy"] == pytest.approx(accuracy_score(y, p.argmax(1)))
    assert got["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, p.argmax(1)))
    fpr, tpr, _ = roc_curve(y, odds, drop_intermediate=False)
    assert got["sensitivity_at_95_specificity"] == pytest.approx(tpr[fpr <= 0.05 + 1e-12].max(), abs=1e-12)
    thresholds = np.unique(odds)
    by_hand = max((odds[y == 1] > t).mean() for t in [*thresholds, -np.inf] if (odds[y == 0] <= t).mean() >= 0.95)
    assert got["sensitivity_at_95_specificity"] == pytest.approx(by_hand)


@given(st.integers(0, 200), st.integers(3, 6), st.booleans())
def test_the_other_scores_of_more_classes(seed: int, n_classes: int, coarse: bool) -> None:
    y, p = predictions(60, n_classes, seed, coarse=coarse)
    y[y == n_classes - 1] = 0  # the last class does not occur
    got, sides = evaluate("macro_auc", y, p), [(y == c, p[:, c]) for c in range(n_classes - 1)]
    assert got["auc"] == pytest.approx(np.mean([roc_auc_score(*side) for side in sides]), abs=1e-12)
    assert got["auprc"] == pytest.approx(np.mean([average_precision_score(*side) for side in sides]), abs=1e-12)
    recall = recall_score(y, p.argmax(1), labels=range(n_classes - 1), average="macro", zero_division=0.0)
    assert got["balanced_accuracy"] == pytest.approx(recall)
    expected = cohen_kappa_score(y, p.argmax(1), weights="quadratic", labels=range(n_classes))
    assert got["kappa"] == pytest.approx(expected, abs=1e-12)
    assert got["per_class_auc"][:-1] == pytest.approx([roc_auc_score(*side) for side in sides], abs=1e-12)
    assert got["per_class_auc"][-1] is None
    assert got["absent_classes"] == [n_classes - 1]


def test_predictions_that_are_not_numbers_have_no_score() -> None:
    with pytest.raises(ProtocolError, match="numbers"):
        score("auc", [0, 1], [[0.5, 0.5], [np.nan, 0.5]])


@pytest.mark.parametrize("metric", ["auc", "macro_auc", "kappa"])
def test_one_class_has_no_score(metric: str) -> None:
    with pytest.raises(ProtocolError, match="two classes"):
        score(metric, [1, 1, 1], np.full((3, 2), 0.5))


def test_metric_and_classes_must_fit() -> None:
    with pytest.raises(ProtocolError, match="AUC is for two classes"):
        score("auc", [0, 1, 2], np.full((3, 3), 1 / 3))
    with pytest.raises(ProtocolError, match="unknown metric"):
        score("f1", [0, 1], np.full((2, 2), 0.5))


# --- intervals


def weighted_by_scikit_learn(metric: str, y: np.ndarray, p: np.ndarray, w: np.ndarray) -> float:
    if metric == "auc":
        return float(roc_auc_score(y, p[:, 1], sample_weight=w))
    if metric == "macro_auc":
        return float(np.mean([roc_auc_score(y == c, p[:, c], sample_weight=w) for c in range(p.shape[1])]))
    labels = list(range(p.shape[1]))
    return float(cohen_kappa_score(y, p.argmax(1), weights="quadratic", labels=labels, sample_weight=w))


@settings(max_examples=25)
@given(
    st.integers(0, 500),
    st.sampled_from([("auc", 2), ("macro_auc", 4), ("kappa", 5)]),
    st.booleans(),
    st.integers(5, 60),
)
def test_bootstrap_is_scikit_learn_on_every_resample(
    seed: int, metric: tuple[str, int], coarse: bool, n_groups: int
) -> None:
    y, p = predictions(60, metric[1], seed, coarse=coarse)
    other = predictions(60, metric[1], seed + 1)[1]
    groups = [f"g{k % n_groups}" for k in range(60)]
    samples = bootstrap(metric[0], y, np.stack([p, other]), groups, resamples=7, seed=seed)
    (weights,) = list(metrics.resample_weights(y, groups, 7, seed))
    for sample, w in zip(samples, weights, strict=True):
        expected = np.mean([weighted_by_scikit_learn(metric[0], y, q, w) for q in (p, other)])
        assert sample == pytest.approx(expected, abs=1e-10)


@given(st.integers(0, 500), st.integers(2, 4), st.integers(4, 40))
def test_resamples_draw_whole_groups_and_never_lose_a_class(seed: int, n_classes: int, n_groups: int) -> None:
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(n_classes), rng.integers(0, n_classes, size=40)])
    group = rng.integers(0, n_groups, size=len(y))
    (weights,) = list(metrics.resample_weights(y, [f"g{g}" for g in group], 20, seed))
    assert weights.shape == (20, len(y))
    for w in weights:
        for g in set(group):
            assert len(set(w[group == g])) == 1  # a group is drawn as a whole
        assert w[np.unique(group, return_index=True)[1]].sum() == len(set(group))  # as many groups as there are
        assert set(y[w > 0]) == set(y)


def test_the_same_test_set_means_the_same_resamples_for_every_model() -> None:
    y, p = predictions(80, 2, 0)
    other = predictions(80, 2, 1)[1]
    groups = [f"g{k // 2}" for k in range(80)]
    both = bootstrap("auc", y, np.stack([p, other]), groups, resamples=30)
    alone = [bootstrap("auc", y, q[None], groups, resamples=30) for q in (p, other)]
    np.testing.assert_allclose(both, np.mean(alone, axis=0))
    np.testing.assert_array_equal(bootstrap("auc", y, p[None], groups, resamples=30), alone[0])
    longer = bootstrap("auc", y, p[None], groups, resamples=70)
    np.testing.assert_array_equal(longer[:30], alone[0])


def test_groups_widen_the_interval() -> None:
    y, p = predictions(400, 2, 3)
    order = np.argsort(y, kind="stable")
    y, p = np.repeat(y[order], 1), p[order]
    single = interval(bootstrap("auc", y, p[None], [str(k) for k in range(400)]))
    copies = np.repeat(np.arange(400), 5)  # every image five times, in groups of five: no more information
    grouped = interval(bootstrap("auc", y[copies], p[copies][None], [str(k) for k in copies]))
    ignoring = interval(bootstrap("auc", y[copies], p[copies][None], [str(k) for k in range(2000)]))
    assert np.diff(grouped)[0] == pytest.approx(np.diff(single)[0], rel=0.1)
    assert np.diff(ignoring)[0] < 0.6 * np.diff(grouped)[0]


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for k in range(60):
        y = np.repeat([0, 1], 60)
        x = rng.normal(size=120) + y  # true AUC: Φ(1/√2)
        p = softmax(np.stack([np.zeros(120), x], axis=1))
        low, high = interval(bootstrap("auc", y, p[None], [str(i) for i in range(120)], resamples=300, seed=k))
        hits += low <= 0.7602 <= high
    assert 51 <= hits <= 60
