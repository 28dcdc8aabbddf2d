"""Probabilities for another prevalence: Bayes' rule, temperatures by brute force, and what training really saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from embcache.errors import ProtocolError, UsageError
from embcache.probe.predictions import (
    Adjust,
    Adjustment,
    Predictions,
    adjustments,
    evidence,
    fit_temperature,
    parse_prevalence,
    prevalence_vector,
    row_weights,
)
from embcache.probe.probe import probe_features
from embcache.results.decisions import calibration_error
from tests.probe.build import make_dataset, make_features, put_store


def world(rng: np.random.Generator, n: int, share: float, d: float = 1.45) -> tuple[np.ndarray, np.ndarray]:
    """Labels, and logits (n, 2) of a model that is right where both classes are as frequent."""
    y = (rng.random(n) < share).astype(np.int64)
    odds = d * (rng.normal(size=n) + d * (y - 0.5))
    return y, np.stack([np.zeros(n), odds], axis=1)


def predicted(y: np.ndarray, logits: np.ndarray) -> Predictions:
    ids = np.arange(len(y)).astype(str).astype(object)
    return Predictions(ids, ids, y, logits[None], tuple("abcd"[: logits.shape[1]]))


def test_prevalence_mends_a_perfect_balanced_model_where_one_in_ten_is_sick() -> None:
    rng = np.random.default_rng(0)
    y, logits = world(rng, 20_000, 0.5)
    groups, one = np.arange(len(y)).astype(str).astype(object), np.ones(len(y))
    p = 1 / (1 + np.exp(-logits[:, 1]))
    right = 1 / (1 + 9 * np.exp(-logits[:, 1]))  # Bayes' rule
    weights = row_weights(y, np.array([0.9, 0.1]))
    assert np.average(y, weights=weights) == pytest.approx(0.1)
    # On balanced images nothing is wrong with it; at 10 % it is off by a quarter, and no such figure tells.
    assert calibration_error(y, p, one, groups) < 0.01
    assert np.average(np.abs(p - right), weights=weights) == pytest.approx(0.247, abs=0.01)
    assert calibration_error(y, p, weights, groups) > 0.24
    (model,) = adjustments([(0.5, 0.5)], [], np.array([0.9, 0.1]), calibrate=False)
    fixed = model.probabilities(logits)[:, 1]
    np.testing.assert_allclose(fixed, right, atol=1e-12)
    assert calibration_error(y, fixed, weights, groups) < 0.01


def test_several_classes_follow_bayes_rule_from_what_training_saw() -> None:
    rng = np.random.default_rng(1)
    seen, wanted = np.array([0.2, 0.3, 0.5]), np.array([0.7, 0.2, 0.1])
    p = rng.dirichlet([1, 1, 1], size=50)
    right = p * wanted / seen
    found = Adjustment(tuple(seen), tuple(wanted)).probabilities(np.log(p))
    np.testing.assert_allclose(found, right / right.sum(1, keepdims=True))


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_temperature_has_the_smallest_weighted_log_loss(scale: float) -> None:
    rng = np.random.default_rng(2)
    y, logits = world(rng, 500, 0.3)
    shares, model = np.array([0.9, 0.1]), evidence(scale * logits, (0.5, 0.5))
    weights = row_weights(y, shares)

    def loss(t: float) -> float:
        each = -log_softmax(model / np.exp(t) + np.log(shares), axis=1)[np.arange(500), y]
        return float((weights * each).sum() + t * t / 2)

    best = float(np.exp(minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-9}).x))
    assert fit_temperature(y, model, shares) == pytest.approx(best, rel=1e-4)
    assert best == pytest.approx(scale, rel=0.25)


def test_a_model_that_is_too_sure_is_fixed_without_moving_the_prevalence() -> None:
    rng = np.random.default_rng(3)
    (held, held_logits), (_, logits) = world(rng, 1000, 0.4), world(rng, 20_000, 0.1)
    (model,) = adjustments([(0.5, 0.5)], [predicted(held, 3 * held_logits)], np.array([0.9, 0.1]), calibrate=True)
    found = model.probabilities(3 * logits)[:, 1]
    right = 1 / (1 + 9 * np.exp(-logits[:, 1]))
    assert model.temperature == pytest.approx(3, rel=0.15)
    assert np.abs(found - right).mean() < 0.01
    assert found.mean() == pytest.approx(0.1, abs=0.01)


def test_few_images_told_apart_do_not_make_a_model_sure_of_itself() -> None:
    y = np.repeat([0, 1], 5)
    logits = np.stack([np.zeros(10), np.where(y == 1, 3.0, -3.0)], axis=1)
    assert 0.3 < fit_temperature(y, logits, np.array([0.5, 0.5])) < 1
    assert fit_temperature(y[:0], logits[:0], np.array([0.5, 0.5])) == 1


def test_without_a_prevalence_classes_are_as_frequent_as_among_validation_images() -> None:
    rng = np.random.default_rng(4)
    held = [predicted(*world(rng, n, 0.25)) for n in (100, 300)]
    found = adjustments([(0.5, 0.5)] * 2, held, None, calibrate=True)
    share = np.concatenate([v.labels for v in held]).mean()
    assert [model.prevalence for model in found] == [pytest.approx((1 - share, share))] * 2
    assert found[0].temperature != found[1].temperature
    lacking = predicted(np.zeros(10, dtype=np.int64), np.zeros((10, 2)))
    with pytest.raises(ProtocolError, match="how frequent") as caught:
        adjustments([(0.5, 0.5)], [lacking], None, calibrate=True)
    assert caught.value.found == "none of b"


def test_a_prevalence_is_a_number_or_one_for_each_class() -> None:
    assert parse_prevalence(None) is None
    assert parse_prevalence("0.1") == 0.1
    assert parse_prevalence("a=0.1, b=c=0.9") == {"a": 0.1, "b=c": 0.9}
    with pytest.raises(UsageError, match="not a prevalence"):
        parse_prevalence("rare")
    np.testing.assert_allclose(prevalence_vector(0.1, ("sick", "well"), 0), [0.1, 0.9])
    np.testing.assert_allclose(prevalence_vector({"b": 0.2, "a": 0.1, "c": 0.7}, "abc", 1), [0.1, 0.2, 0.7])
    for wrong in (0.0, 1.0, 1.5, float("nan"), {"a": 0.5}, {"a": 0.5, "b": 0.6}, {"a": 0.5, "x": 0.5}):
        with pytest.raises(UsageError, match="not a prevalence of these classes"):
            prevalence_vector(wrong, "ab", 1)
    with pytest.raises(UsageError, match="not a prevalence of these classes") as caught:
        prevalence_vector(0.1, "abc", 1)
    assert caught.value.fix == "--prevalence a=0.33,b=0.33,c=0.33"
    assert not Adjust()
    assert Adjust(0.1)
    assert Adjust(calibrate=True)


def test_a_run_records_what_its_training_saw(home: Path) -> None:
    ds = make_dataset(np.tile([0, 0, 0, 1], 60), split=["train"] * 160 + ["test"] * 80)
    put_store(home, ds, "net", make_features(ds))
    for head, balanced in (("linear", True), ("knn", False)):
        result = probe_features(ds, "net", head=head, subset="F", folds=2, home=home)
        assert [fold.seen for fold in result.folds] == [[0.5, 0.5] if balanced else [0.75, 0.25]] * 2
    odd = probe_features(ds, "net", head="linear", subset=7, folds=2, home=home)  # balanced but for one: no draws
    assert sorted(odd.folds[0].seen) == pytest.approx([3 / 7, 4 / 7])
