"""ROC and precision–recall curves and confusion against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import average_precision_score, confusion_matrix, precision_recall_curve, roc_auc_score, roc_curve

from embcache.probe.metrics import confusion
from embcache.probe.predictions import Predictions
from embcache.results.rates import (
    GRID,
    class_rates,
    precision_at,
    precision_recall_points,
    roc_at,
    roc_points,
)


@pytest.fixture(params=[0, 1, 2])
def rows(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores; with ties in the second case, few positives in the third."""
    rng = np.random.default_rng(request.param)
    y = rng.random(120) < (0.05 if request.param == 2 else 0.4)
    scores = rng.normal(size=120) + y
    return y, np.round(scores, 1) if request.param == 1 else scores


def test_roc_points_are_those_of_scikit_learn(rows: tuple[np.ndarray, np.ndarray]) -> None:
    y, scores = rows
    false, true = roc_points(y, scores)
    theirs = roc_curve(y, scores, drop_intermediate=False)
    assert false == pytest.approx(theirs[0])
    assert true == pytest.approx(theirs[1])


def test_precision_at_each_recall_is_that_of_scikit_learn(rows: tuple[np.ndarray, np.ndarray]) -> None:
    y, scores = rows
    recall, precision = precision_recall_points(y, scores)
    p, r, _ = precision_recall_curve(y, scores)  # ascending thresholds, the point (recall 0, precision 1) last
    wanted = {round(float(each), 12): p[np.flatnonzero(r == each)[-1]] for each in r[:-1] if each > 0}
    assert dict(zip(np.round(recall, 12).tolist(), precision, strict=True)) == pytest.approx(wanted)
    assert (np.diff(recall, prepend=0) * precision).sum() == pytest.approx(average_precision_score(y, scores))


def test_curves_at_the_grid_have_the_area_of_the_score(rows: tuple[np.ndarray, np.ndarray]) -> None:
    y, scores = rows
    assert np.trapezoid(roc_at(y, scores), GRID) == pytest.approx(roc_auc_score(y, scores), abs=0.01)
    assert precision_at(y, scores)[1:].mean() == pytest.approx(average_precision_score(y, scores), abs=0.02)


def test_rates_of_a_class_are_of_its_log_odds_in_models_and_ensemble() -> None:
    rng = np.random.default_rng(3)
    y, ids = rng.integers(0, 3, 90), np.array([f"p{k}" for k in range(90)], dtype=object)
    logits = rng.normal(size=(4, 90, 3)) + 1.5 * np.eye(3)[y]
    found = class_rates(Predictions(ids, ids, y, logits, ("a", "b", "c")), 2, "auc")
    p = softmax(logits, axis=2)
    own = y == 2
    curves = [np.interp(GRID[1:], *roc_curve(own, q[:, 2], drop_intermediate=False)[:2]) for q in p]
    assert found.mean[1:] == pytest.approx(np.mean(curves, axis=0))
    assert found.sd[1:] == pytest.approx(np.std(curves, axis=0, ddof=1))
    assert found.estimate.mean == pytest.approx(np.mean([roc_auc_score(own, q[:, 2]) for q in p]))
    assert found.ensemble.mean == pytest.approx(roc_auc_score(own, p.mean(0)[:, 2]))
    assert (found.x, found.y) == (
        pytest.approx(roc_curve(own, p.mean(0)[:, 2], drop_intermediate=False)[0]),
        pytest.approx(roc_curve(own, p.mean(0)[:, 2], drop_intermediate=False)[1]),
    )
    assert (found.name, found.images, found.groups) == ("c", own.sum(), own.sum())


def test_probabilities_of_1_are_no_ties() -> None:
    y = np.array([0, 1] * 20)
    z = np.where(y == 1, 900.0, 60.0) + np.arange(40) / 100
    logits = np.stack([np.zeros(40), z], axis=1)[None]
    ids = np.array([f"p{k}" for k in range(40)], dtype=object)
    found = class_rates(Predictions(ids, ids, y, logits, ("a", "b")), 1, "auprc")
    assert (found.estimate.mean, found.ensemble.mean, found.mean.min()) == (1.0, 1.0, 1.0)


def test_confusion_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(5)
    y, logits = rng.integers(0, 4, 60), rng.normal(size=(60, 5))
    assert confusion(y, logits).tolist() == confusion_matrix(y, logits.argmax(1), labels=range(5)).tolist()
