"""Every metric against scikit-learn, with weights too; rankings of large logits; ensembles; positive classes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    cohen_kappa_score,
    f1_score,
    log_loss,
    matthews_corrcoef,
    precision_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)

from embcache.errors import ProtocolError, UsageError
from embcache.probe.metrics import (
    METRICS,
    asymmetry,
    check_order,
    evaluate,
    find_metric,
    log_odds,
    log_probabilities,
    mean_logits,
    metric_title,
    per_class_auc,
    positive_class,
    score,
    scorer,
    softmax,
)
from tests.refusal import refused


def predictions(n: int, n_classes: int, seed: int, *, coarse: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.concatenate([np.arange(n_classes), rng.integers(0, n_classes, size=n - n_classes)])
    logits = rng.normal(size=(n, n_classes)) + 1.5 * np.eye(n_classes)[y]
    return y, np.round(logits) if coarse else logits  # coarse ones are full of ties


def weights_of(y: np.ndarray, seed: int) -> np.ndarray:
    """How often a resample holds each row; every class stays."""
    w = np.random.default_rng(seed).integers(0, 4, size=len(y)).astype(np.float64)
    w[np.unique(y, return_index=True)[1]] = 1
    return w


# --- right values


def odds_by_hand(z: np.ndarray) -> np.ndarray:
    odds = [z[:, c] - logsumexp(np.delete(z, c, 1), axis=1) for c in range(z.shape[1])]
    return np.stack(odds, axis=1).round(9)  # what ranks: rounding would part ties


def operating_point(wanted: str, percent: float) -> Callable[..., float]:
    def value(positive: np.ndarray, odds: np.ndarray, sample_weight: np.ndarray) -> float:
        fpr, tpr, _ = roc_curve(positive, odds, sample_weight=sample_weight, drop_intermediate=False)
        given, found = (1 - fpr, tpr) if wanted == "sensitivity" else (tpr, 1 - fpr)
        return float(found[given >= percent / 100 - 1e-12].max())

    return value


ONE_VS_REST: dict[str, Callable[..., float]] = {
    "auc": roc_auc_score,
    "macro_auc": roc_auc_score,
    "auprc": average_precision_score,
    "sensitivity_at_95_specificity": operating_point("sensitivity", 95),
    "specificity_at_95_sensitivity": operating_point("specificity", 95),
    "sensitivity_at_80_specificity": operating_point("sensitivity", 80),
}


def by_scikit_learn(key: str, y: np.ndarray, z: np.ndarray, positive: int, w: np.ndarray) -> float:
    n_classes, called, p, present = z.shape[1], z.argmax(1), softmax(z), np.unique(y)
    if key in ONE_VS_REST:
        sides = [positive] if n_classes == 2 else present
        return float(np.mean([ONE_VS_REST[key](y == c, odds_by_hand(z)[:, c], sample_weight=w) for c in sides]))
    if key == "kappa":
        return float(cohen_kappa_score(y, called, weights="quadratic", labels=range(n_classes), sample_weight=w))
    if key == "brier":
        errors = (p[:, positive] - (y == positive)) ** 2 if n_classes == 2 else ((p - np.eye(n_classes)[y]) ** 2).sum(1)
        return float(np.average(errors, weights=w))
    if key == "log_loss":
        return float(log_loss(y, p, labels=range(n_classes), sample_weight=w))
    if key == "f1":
        labels, average = ([positive], "macro") if n_classes == 2 else (present, "macro")
        return float(f1_score(y, called, labels=labels, average=average, sample_weight=w))
    if key == "balanced_accuracy":  # scikit-learn warns of classes that are called and do not occur
        return float(recall_score(y, called, labels=present, average="macro", sample_weight=w))
    if key in ("sensitivity", "specificity"):
        side = positive if key == "sensitivity" else 1 - positive
        return float(recall_score(y, called, pos_label=side, sample_weight=w))
    if key in ("ppv", "npv"):
        side = positive if key == "ppv" else 1 - positive
        return float(precision_score(y, called, pos_label=side, sample_weight=w, zero_division=np.nan))
    plain = {"accuracy": accuracy_score, "mcc": matthews_corrcoef}
    return float(plain[key](y, called, sample_weight=w))


KEYS = [*METRICS, "sensitivity_at_80_specificity"]


@pytest.mark.parametrize("key", KEYS)
@settings(max_examples=15)
@given(seed=st.integers(0, 500), n_classes=st.integers(2, 5), coarse=st.booleans(), weighted=st.booleans())
def test_every_metric_is_scikit_learns(key: str, seed: int, n_classes: int, coarse: bool, weighted: bool) -> None:
    n_classes = 2 if key in METRICS and METRICS[key].binary else n_classes
    y, z = predictions(50, n_classes, seed, coarse=coarse)
    positive = seed % 2
    w = weights_of(y, seed) if weighted else np.ones(len(y))
    (got,) = find_metric(key, n_classes).form(y, z, positive)(w[None])
    assert got == pytest.approx(by_scikit_learn(key, y, z, positive, w), abs=1e-12, nan_ok=True)
    if not weighted:
        assert score(key, y, z, positive) == pytest.approx(got, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("key", KEYS)
def test_resamples_are_scored_at_once_as_one_by_one(key: str) -> None:
    y, z = predictions(50, 2, 3, coarse=True)
    form, weights = find_metric(key, 2).form(y, z, 1), np.stack([weights_of(y, seed) for seed in range(7)])
    np.testing.assert_allclose(form(weights), [form(w[None])[0] for w in weights], rtol=1e-14)


@settings(max_examples=12)
@given(st.integers(0, 200), st.integers(3, 6), st.booleans())
def test_a_class_that_does_not_occur_is_flagged_and_not_averaged_over(seed: int, n_classes: int, coarse: bool) -> None:
    y, z = predictions(60, n_classes, seed, coarse=coarse)
    y[y == n_classes - 1] = 0
    got = evaluate("macro_auc", y, z)
    for key in ("auprc", "balanced_accuracy", "f1", "kappa"):
        assert got[key] == pytest.approx(by_scikit_learn(key, y, z, 1, np.ones(60)), abs=1e-12)
    each = [roc_auc_score(y == c, odds_by_hand(z)[:, c]) for c in range(n_classes - 1)]
    assert got["per_class_auc"][:-1] == pytest.approx(each, abs=1e-12)
    assert got["auc"] == got["score"] == pytest.approx(np.mean(each), abs=1e-12)
    assert got["per_class_auc"][-1] is None
    assert got["absent_classes"] == [n_classes - 1]
    assert got["predicted"] == np.bincount(z.argmax(1), minlength=n_classes).tolist()


@pytest.mark.parametrize("key", ["auc", "auprc", "f1", "sensitivity", "sensitivity_at_95_specificity"])
def test_a_resample_without_the_positive_class_has_no_score(key: str) -> None:
    y, z = predictions(60, 2, 1)
    (got,) = find_metric(key, 2).form(y, z, 1)((y == 0).astype(float)[None])
    assert math.isnan(got)


def test_a_value_that_none_can_tell_is_none() -> None:
    y, z = np.array([0, 1, 0, 1]), np.array([[1.0, 0.0], [2.0, 0.0], [1.0, 0.5], [3.0, 0.0]])  # none is called 1
    got = evaluate("auc", y, z)
    assert got["ppv"] is None
    assert got["npv"] == 0.5
    assert got["mcc"] == 0.0
    assert got["predicted"] == [4, 0]


# --- rankings


@pytest.mark.parametrize("n_classes", [2, 3])
def test_rankings_hold_at_every_scale_of_logits(n_classes: int) -> None:
    rng = np.random.default_rng(41)
    y = rng.integers(0, n_classes, 300)
    base = rng.normal(size=(300, n_classes)) + 0.5 * np.eye(n_classes)[y]
    found = []
    for scale in (1, 30, 100, 1000, 10_000):
        z = (base * scale).astype(np.longdouble)
        each = []
        for c in range(n_classes):
            others = np.delete(z, c, axis=1)
            top = others.max(1, keepdims=True)
            odds = z[:, c] - top[:, 0] - np.log(np.exp(others - top).sum(1))
            apart = odds[y == c][:, None] - odds[y != c]
            each.append(float(((apart > 0) + 0.5 * (apart == 0)).mean()))
        key = "auc" if n_classes == 2 else "macro_auc"
        expected = each[1] if n_classes == 2 else np.mean(each)
        assert score(key, y, base * scale) == pytest.approx(expected, abs=1e-12), scale
        assert per_class_auc(y, base * scale) == pytest.approx(each, abs=1e-12), scale
        assert evaluate(key, y, base * scale)["auc"] == score(key, y, base * scale)
        found.append(expected)
    if n_classes == 2:
        assert len(set(found)) == 1  # a scale changes no ranking of two classes


# --- probabilities and ensembles


@given(st.integers(0, 300), st.integers(2, 5), st.sampled_from([1.0, 30.0, 1e4]))
def test_log_probabilities_and_log_odds_are_scipys(seed: int, n_classes: int, scale: float) -> None:
    z = scale * np.random.default_rng(seed).normal(size=(20, n_classes))
    np.testing.assert_allclose(log_probabilities(z), log_softmax(z, axis=1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(softmax(z), np.exp(log_softmax(z, axis=1)), rtol=1e-9, atol=1e-300)
    np.testing.assert_allclose(log_odds(z), odds_by_hand(z), rtol=1e-9, atol=1e-8)


@given(st.integers(0, 300), st.integers(2, 5))
def test_an_ensemble_averages_probabilities(seed: int, n_classes: int) -> None:
    z = 3 * np.random.default_rng(seed).normal(size=(4, 20, n_classes))
    p = np.exp(log_softmax(z, axis=-1)).mean(0)
    np.testing.assert_allclose(softmax(mean_logits(z)), p, rtol=1e-10)
    np.testing.assert_allclose(log_odds(mean_logits(z)), np.log(p) - np.log1p(-p), rtol=1e-7, atol=1e-9)


def test_an_ensemble_of_saturated_models_is_still_ranked() -> None:
    z = np.array([[[0.0, 800.0], [0.0, 800.0]], [[0.0, 900.0], [0.0, 801.0]]])  # two models, two images
    odds = log_odds(mean_logits(z))[:, 1]
    # 1 − p is (e⁻⁸⁰⁰ + e⁻⁹⁰⁰)/2 and (e⁻⁸⁰⁰ + e⁻⁸⁰¹)/2
    assert odds == pytest.approx([800 + math.log(2), 800 + math.log(2) - math.log1p(math.exp(-1))], abs=1e-9)
    three = log_odds(mean_logits(np.concatenate([z, np.full((2, 2, 1), -2000.0)], axis=2)))[:, 1]
    assert three == pytest.approx(odds, abs=1e-9)


# --- names, classes, errors


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("abnormal", "normal"), 0),
        (("malignant", "Benign"), 0),
        (("No finding", "pneumonia"), 1),
        (("noble", "nothing"), 1),
        (("normal", "healthy"), 1),  # both are negatives: the second, as ever
        (("a", "b", "c"), 1),
    ],
)
def test_the_positive_class_is_the_one_not_named_like_a_negative(names: tuple[str, ...], expected: int) -> None:
    assert positive_class(names) == expected
    assert positive_class(names, names[0]) == 0


def test_a_positive_class_that_there_is_not() -> None:
    with pytest.raises(UsageError) as caught:
        positive_class(("benign", "malignant"), "cancer")
    assert caught.value.found == "cancer"
    assert caught.value.where == "--positive"


@pytest.mark.parametrize("key", METRICS)
def test_asymmetric_metrics_depend_on_the_positive_class_and_the_others_do_not(key: str) -> None:
    y, z = predictions(80, 2, 5)
    asymmetric = METRICS[key].asymmetric
    assert (abs(score(key, y, z, 0) - score(key, y, z, 1)) > 1e-12) == asymmetric
    assert score(key, 1 - y, z[:, ::-1], 0) == pytest.approx(score(key, y, z, 1), abs=1e-12)
    assert asymmetry(METRICS[key], ("disease", "normal"), None) == ({"positive": "disease"} if asymmetric else {})


def test_metrics_are_found_by_their_names() -> None:
    assert find_metric("AUC", 2).key == find_metric("macro AUC", 2).key == "auc"
    assert find_metric("auc", 5).key == find_metric("Macro-AUC", 5).key == "macro_auc"
    assert find_metric("balanced-accuracy", 3).key == "balanced_accuracy"
    assert find_metric("specificity_at_97.5_sensitivity", 2).key == "specificity_at_97.5_sensitivity"
    assert metric_title("specificity_at_97.5_sensitivity").startswith("specificity at 97.5 % sensitivity")
    assert find_metric(METRICS["f1"], 2) is METRICS["f1"]


@pytest.mark.parametrize("name", ["f2", "sensitivity_at_95_sensitivity", "sensitivity_at_x_specificity", ""])
def test_a_metric_that_there_is_not(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_metric(name, 2)
    assert caught.value.problem == f"there is no such metric: {name}"
    assert "balanced_accuracy" in str(caught.value.expected)


def test_a_metric_of_two_classes_is_refused_for_more() -> None:
    with pytest.raises(ProtocolError) as caught:
        find_metric("sensitivity", 3)
    assert caught.value.found == "3 classes"
    assert find_metric(str(caught.value.fix).split()[-1], 3)


@pytest.mark.parametrize("key", ["auc", "kappa"])
def test_one_class_has_no_score(key: str) -> None:
    with pytest.raises(ProtocolError, match="two classes"):
        score(key, [1, 1, 1], np.zeros((3, 2)))
    with pytest.raises(ProtocolError, match="two classes"):
        scorer(key, [1, 1, 1], 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_predictions_that_are_not_numbers_have_no_score(bad: float) -> None:
    with pytest.raises(ProtocolError, match="numbers"):
        score("auc", [0, 1], [[0.5, 0.5], [bad, 0.5]])


def test_kappa_of_words_is_refused_as_their_order_is_not_known() -> None:
    kappa = find_metric("kappa", 3)
    for names in (("0", "1", "2"), ("sick", "well"), ("no DR", "mild", "severe")):
        check_order(kappa, names)
    with refused(ProtocolError, "metric-needs-order"):
        check_order(kappa, ("mild", "none", "severe"))
    check_order(find_metric("macro_auc", 3), ("mild", "none", "severe"))
