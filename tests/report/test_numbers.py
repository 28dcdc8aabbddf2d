"""What is counted from predictions, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import auc, precision_score, recall_score, roc_curve

from embcache.probe.predictions import Predictions
from embcache.report.sections import class_table
from embcache.results import compare
from embcache.results.decisions import GRID, mean_curve
from tests.results.build import make_result


def _predictions(n_classes: int, ties: bool = False, n: int = 400, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n_classes)
    labels = rng.integers(0, n_classes, n)
    logits = rng.normal(size=(k, n, n_classes)) + 1.5 * np.eye(n_classes)[labels]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    if ties:
        p = np.round(p, 1)
        p /= p.sum(-1, keepdims=True)
    return labels, p


def test_roc_is_counted_from_logits_where_probabilities_saturate() -> None:
    logits, labels = np.zeros((1, 400, 2)), np.arange(400) % 2
    logits[0, :, 1] = np.random.default_rng(0).normal(size=400) * 900 + 500 * labels
    mean, _ = mean_curve(labels, logits, 1)
    theirs = auc(*roc_curve(labels, logits[0, :, 1])[:2])
    assert np.trapezoid(mean, GRID) == pytest.approx(theirs, abs=0.01)


def test_class_scores_are_scikit_learns() -> None:
    labels, p = _predictions(3)
    names = ("a", "b", "c", "never")
    wide = np.concatenate([np.log(p), np.full((*p.shape[:2], 1), -50.0)], axis=2)
    groups = np.array([f"g{k // 2}" for k in range(len(labels))], dtype=object)
    t = compare.Tested(make_result(class_names=names), Predictions(groups, groups, labels, wide, names))
    rows = class_table(t, "m").rows
    for c in range(3):
        recalls = [recall_score(labels == c, q.argmax(1) == c) for q in p]
        purity = [precision_score(labels == c, q.argmax(1) == c) for q in p]
        aucs = [auc(*roc_curve(labels == c, q[:, c])[:2]) for q in p]
        assert rows[c] == (
            names[c], str((labels == c).sum()), str(len(set(groups[labels == c]))),
            f"{np.mean(aucs):.3f} ± {np.std(aucs, ddof=1):.3f}", f"{np.mean(recalls):.3f}", f"{np.mean(purity):.3f}",
        )  # fmt: skip
    assert rows[3] == ("never", "0", "0", "–", "–", "–")
