"""Intervals and comparisons against definitions written out here: DeLong, Obuchowski, Newcombe, Wilson, a bootstrap."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from sklearn.metrics import roc_auc_score

from embcache.probe.metrics import METRICS, find_metric
from embcache.probe.statistics import (
    Estimate,
    TestSet,
    compare,
    estimate,
    holm,
    newcombe_auc,
    sample,
    training_overlap,
    wilson,
)

NAMES = ("well", "ill", "other", "more")


def world(seed: int = 0, patients: int = 12, models: int = 3, classes: int = 2, gap: float = 1.0) -> Any:
    """Labels, groups and logits: patients of one class each, with one to three images."""
    rng = np.random.default_rng(seed)
    labels, groups, shift = [], [], []
    for patient in range(patients * classes):
        images = 1 + patient % 3
        labels += [patient % classes] * images
        groups += [f"p{patient}"] * images
        shift += [rng.normal()] * images
    y = np.array(labels)
    z = rng.normal(size=(models, len(y), classes)) + rng.normal(size=(len(y), classes))
    z[:, np.arange(len(y)), y] += gap + 0.5 * np.array(shift)
    return TestSet(y, np.array(groups, dtype=object), NAMES[:classes]), z


def auc_by_pairs(positive: Any, score: Any) -> Any:
    return ((score[positive][:, None] > score[~positive]) + 0.5 * (score[positive][:, None] == score[~positive])).mean()


def clustered_variance(labels: Any, groups: Any, scores: Any) -> float:
    """Obuchowski (1997), sums over patients; of the mean over models, whose placements are averaged."""
    positive = labels == 1
    v10 = np.mean([(s[positive][:, None] > s[~positive]).mean(1) for s in scores], axis=0)
    v01 = np.mean([(s[positive][:, None] > s[~positive]).mean(0) for s in scores], axis=0)
    auc = v10.mean()
    total = 0.0
    for side, values in ((positive, v10), (~positive, v01)):
        sums = [(values[groups[side] == g] - auc).sum() for g in np.unique(groups[side])]
        total += len(sums) / (len(sums) - 1) * np.square(sums).sum() / side.sum() ** 2
    return float(total)


def test_the_variance_of_an_auc_is_obuchowskis() -> None:
    test, z = world()
    found = estimate(sample(METRICS["auc"], test, z))
    scores = z[:, :, 1] - z[:, :, 0]
    assert found.mean == pytest.approx(np.mean([roc_auc_score(test.labels, s) for s in scores]))
    assert found.test_variance == pytest.approx(clustered_variance(test.labels, test.groups, scores))


@pytest.mark.parametrize(("p", "n"), [(0.0, 9), (0.2, 30), (0.5, 7.5), (0.97, 200), (1.0, 12)])
def test_wilson_is_his_formula(p: float, n: float) -> None:
    z = stats.norm.ppf(0.975)
    center, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = ((center - half) / (1 + z**2 / n), (center + half) / (1 + z**2 / n))
    assert wilson(p, n) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("auc", "m", "n"), [(0.8, 30, 40), (0.95, 10, 100), (0.5, 12, 12)])
def test_newcombes_ends_are_the_roots_of_his_equation(auc: float, m: int, n: int) -> None:
    def beyond(a: float) -> float:
        q1, q2, star = a / (2 - a), 2 * a * a / (1 + a), (m + n) / 2 - 1
        v = (a * (1 - a) + star * (q1 - a * a) + star * (q2 - a * a)) / (m * n)  # Hanley and McNeil, equal sizes
        return (auc - a) ** 2 - stats.norm.ppf(0.975) ** 2 * v

    low, high = newcombe_auc(auc, m, n)
    assert low == pytest.approx(optimize.brentq(beyond, 1e-6, auc), abs=1e-8)
    assert high == pytest.approx(optimize.brentq(beyond, auc, 1 - 1e-9), abs=1e-8)


def test_a_perfect_score_has_a_lower_end_and_no_zero_width() -> None:
    test, z = world(gap=50.0)
    for name in ("auc", "accuracy", "kappa", "balanced_accuracy", "f1", "mcc", "auprc"):
        found = estimate(sample(METRICS[name], test, z), overlap=0.5)
        assert found.mean == pytest.approx(1.0), name
        assert found.these_models is not None, name
        assert found.these_models[0] < 0.97, name
        assert found.these_models[1] == pytest.approx(1.0), name


@pytest.mark.parametrize("name", [m.key for m in METRICS.values() if m.key != "macro_auc"])
@pytest.mark.parametrize("gap", [0.0, 1.0, 50.0])
def test_a_result_does_not_differ_from_its_copy(name: str, gap: float) -> None:
    test, z = world(gap=gap)
    one = sample(METRICS[name], test, z)
    found = compare(one, one, overlap=0.5, margin=0.1)
    assert found.difference == 0 or found.why
    assert found.p == pytest.approx(1.0) or found.why


def test_an_undefined_value_is_said() -> None:
    test, z = world()
    z[..., 1] -= 1e3  # nothing is called positive
    ppv = sample(METRICS["ppv"], test, z)
    assert estimate(ppv, 0.5).why
    assert compare(ppv, ppv, overlap=0.5).why == "no value"


def test_comparisons_are_the_same_from_both_sides() -> None:
    test, z = world(seed=1)
    _, other = world(seed=2, gap=0.3)
    for name in ("auc", "accuracy", "kappa", "log_loss"):
        a, b = (sample(METRICS[name], test, x) for x in (z, other))
        there, back = compare(a, b, overlap=0.4), compare(b, a, overlap=0.4)
        assert there.difference == pytest.approx(-back.difference)
        assert there.p == pytest.approx(back.p)
        assert there.interval == pytest.approx((-back.interval[1], -back.interval[0]))
        assert there.trained
        assert not compare(a, b).trained
        assert not compare(a, b, overlap=0.95).trained


@pytest.mark.parametrize("name", [m.key for m in METRICS.values()])
def test_too_few_patients_have_words_whatever_the_score(name: str) -> None:
    words = set()
    for gap in (0.0, 1.0, 50.0):
        test, z = world(patients=2, gap=gap)
        found = estimate(sample(find_metric(name, 2), test, z), overlap=0.2)
        assert found.interval is None
        words.add(found.why.split(":")[0])
    assert words == {"too few patients"}


def test_the_class_that_has_too_few_is_named() -> None:
    labels = np.array([0] * 20 + [1] * 9)
    test = TestSet(
        labels, np.array([f"g{k}" for k in range(20)] + ["a", "a", "b", "b", "c", "c", "d", "d", "d"]), NAMES[:2]
    )
    z = np.random.default_rng(0).normal(size=(2, 29, 2))
    assert estimate(sample(METRICS["auc"], test, z)).why == "too few patients: 4 of ill, 5 needed"
    assert estimate(sample(METRICS["kappa"], test, z)).these_models is not None


def test_patients_of_several_classes_vary() -> None:
    """The kind of `lesions`: most sets of classes occur in one patient. As wide as a plain bootstrap of patients."""
    rng = np.random.default_rng(3)
    labels = np.concatenate([rng.choice(4, 3, replace=False) for _ in range(24)])
    groups = np.repeat(np.arange(24), 3).astype(str)
    z = rng.normal(size=(2, 72, 4))
    z[:, np.arange(72), labels] += 0.8
    found = estimate(sample(METRICS["macro_auc"], TestSet(labels, groups, NAMES), z))
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    draws = []
    for _ in range(300):
        rows = np.concatenate([np.flatnonzero(groups == g) for g in rng.choice(np.unique(groups), 24)])
        each = [auc_by_pairs(labels[rows] == c, q[rows, c]) for q in p for c in range(4)]
        draws.append(np.mean(each))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.these_models is not None
    assert 0.9 < (found.these_models[1] - found.these_models[0]) / (high - low) < 2.0  # it was 13 times too narrow


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["auc", "accuracy", "brier", "auprc", "sensitivity"]))
def test_intervals_do_not_depend_on_the_order_of_images(seed: int, name: str) -> None:
    test, z = world(seed=seed % 100)
    order = np.random.default_rng(seed).permutation(len(test.labels))
    turned = TestSet(test.labels[order], test.groups[order], test.class_names)
    one, other = (estimate(sample(METRICS[name], t, x), 0.5) for t, x in ((test, z), (turned, z[:, order])))
    assert one.these_models == pytest.approx(other.these_models)
    assert one.new_model == pytest.approx(other.new_model)


def test_an_auc_has_one_interval_whichever_class_is_positive() -> None:
    test, z = world(seed=4)
    turned = TestSet(test.labels, test.groups, test.class_names, positive=0)
    one, other = (estimate(sample(METRICS["auc"], t, z), 0.5) for t in (test, turned))
    assert one.mean == other.mean
    assert one.these_models == pytest.approx(other.these_models)


def test_a_newly_trained_model_varies_more_and_one_model_says_so() -> None:
    test, z = world(seed=5, models=5)
    z += 0.8 * np.random.default_rng(0).normal(size=(5, 1, 2)) * np.arange(len(test.labels))[:, None] % 2
    scores = sample(METRICS["auc"], test, z)
    found = estimate(scores, overlap=0.5)
    low, high = found.new_model
    assert low <= found.these_models[0]
    assert high >= found.these_models[1]
    values, covariance = scores.values, scores.moves @ scores.moves.T
    noise = np.diag(covariance).mean() - (covariance.sum() - np.trace(covariance)) / 20
    assert found.training_variance == pytest.approx(max(0.0, values.var(ddof=1) - noise) / 0.5)
    assert estimate(sample(METRICS["auc"], test, z[:1]), None).why == "one model"
    assert "95%" in estimate(scores, overlap=0.95).why


def test_an_estimate_reads_back() -> None:
    test, z = world()
    found = estimate(sample(METRICS["auprc"], test, z), 0.5)
    assert Estimate.from_json(found.to_json()) == found
    assert found.positive == "ill"


def test_overlap_is_the_mean_share_of_common_rows() -> None:
    assert training_overlap([np.arange(4), np.arange(2, 6), np.arange(10, 14)]) == pytest.approx(0.5 / 3)
    assert training_overlap([np.arange(4)]) is None


def test_holm_of_the_textbook_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
