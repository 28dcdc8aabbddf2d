"""Bootstrap of the other metrics: held against scikit-learn with sample weights, and against resampled copies."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, average_precision_score, recall_score, roc_curve

from embcache.probe.metrics import bootstrap, evaluate, log_odds, resample_weights
from embcache.report.scorers import bootstrap_metric


def problem(n_classes: int, ties: bool = False, n: int = 90) -> tuple[np.ndarray, np.ndarray, list[str]]:
    rng = np.random.default_rng(n_classes)
    y = rng.integers(0, n_classes, n)
    logits = rng.normal(size=(3, n, n_classes)) + 1.2 * np.eye(n_classes)[y]
    if ties:
        logits = logits.round()
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return y, p, [f"g{k}" for k in rng.integers(0, 40, n)]


def one_side(metric: str, positive: np.ndarray, scores: np.ndarray, w: np.ndarray) -> float:
    if metric == "auprc":
        return float(average_precision_score(positive, scores, sample_weight=w))
    fpr, tpr, _ = roc_curve(positive, scores, sample_weight=w, drop_intermediate=False)
    return float(tpr[fpr <= 0.05 + 1e-12].max())


def by_sklearn(metric: str, y: np.ndarray, p: np.ndarray, w: np.ndarray) -> float:
    if metric == "accuracy":
        return float(accuracy_score(y, p.argmax(1), sample_weight=w))
    if metric == "balanced_accuracy":
        return float(recall_score(y, p.argmax(1), average="macro", sample_weight=w, zero_division=0.0))
    classes = [1] if p.shape[1] == 2 else list(np.unique(y))
    scores = p if p.shape[1] > 2 else np.stack([-log_odds(p), log_odds(p)], axis=1)
    keep = w > 0  # images that were not drawn are not there
    return float(np.mean([one_side(metric, (y == c)[keep], scores[keep, c], w[keep]) for c in classes]))


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "auprc", "sensitivity_at_95_specificity"])
@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("ties", [False, True])
def test_each_resample_scores_as_scikit_learn_does_with_weights(metric: str, n_classes: int, ties: bool) -> None:
    y, p, groups = problem(n_classes, ties)
    found = bootstrap_metric(metric, y, p, groups, resamples=20, seed=5)
    (weights,) = list(resample_weights(y, groups, 20, 5))
    expected = [np.mean([by_sklearn(metric, y, q, w) for q in p]) for w in weights]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "auprc", "sensitivity_at_95_specificity"])
def test_without_resampling_it_is_the_reported_number(metric: str) -> None:
    y, p, _ = problem(2)
    alone = bootstrap_metric(metric, y, p, ["one group"] * len(y), resamples=3)
    np.testing.assert_allclose(alone, np.mean([evaluate("auc", y, q)[metric] for q in p]), atol=1e-12)


def test_a_datasets_own_metric_is_bootstrapped_as_ever() -> None:
    y, p, groups = problem(4)
    np.testing.assert_array_equal(
        bootstrap_metric("auc", y, p, groups, resamples=10), bootstrap("macro_auc", y, p, groups, resamples=10)
    )
