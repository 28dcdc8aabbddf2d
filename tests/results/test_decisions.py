"""Operating points chosen on validation, and calibration, against scikit-learn, scipy and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import softmax as scipy_softmax
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    confusion_matrix,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from embcache.probe.metrics import metric_title, score, softmax
from embcache.probe.predictions import Predictions
from embcache.results.decisions import (
    GRID,
    POOLED,
    RULES,
    Rule,
    calibration,
    calibration_error,
    choose_threshold,
    class_rates,
    operating_points,
    precision_recall_points,
    recalibration_intercept,
    recalibration_slope,
)

SENSITIVE, SPECIFIC = Rule("", "sensitivity", 0.9), Rule("", "specificity", 0.95)


def predictions(y: np.ndarray, odds: np.ndarray, groups: np.ndarray | None = None, **fields: object) -> Predictions:
    """Models of two classes by their log odds (K, n)."""
    odds = np.atleast_2d(odds)
    ids = np.array([f"i{k}" for k in range(len(y))], dtype=object)
    names = ids if groups is None else np.array([f"g{k}" for k in groups], dtype=object)
    logits = np.stack([np.zeros_like(odds), odds], axis=-1)
    return Predictions(ids, names, y.astype(np.int64), logits, ("healthy", "sick"), **fields)  # type: ignore[arg-type]


def drawn(rng: np.random.Generator, n: int, d: float = 1.5, share: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """Labels and the right log odds of normal scores (at equal shares)."""
    y = (rng.random(n) < share).astype(np.int64)
    y[:2] = 0, 1
    return y, d * (rng.normal(size=n) + d * (y - 0.5))


def rates(y: np.ndarray, called: np.ndarray) -> tuple[float, float]:
    return float(called[y == 1].mean()), float((~called[y == 0]).mean())


@pytest.mark.parametrize("seed", range(3))
def test_a_threshold_has_the_most_that_its_rule_allows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    y, x = drawn(rng, int(rng.integers(4, 60)))
    x = np.round(x, int(rng.integers(0, 3)))  # with ties
    every = [rates(y, x > t) for t in (-np.inf, *np.unique(x))]
    chosen = {
        rule.reach: rates(y, x > choose_threshold(y == 1, x, rule)) for rule in (*RULES[1:2], SENSITIVE, SPECIFIC)
    }
    assert sum(chosen["youden"]) == pytest.approx(max(map(sum, every)))
    assert chosen["sensitivity"] == max((r for r in every if r[0] >= 0.9), key=lambda r: r[::-1])
    assert chosen["specificity"] == max(r for r in every if r[1] >= 0.95)


def test_a_threshold_from_validation_is_unbiased_where_one_from_the_test_set_flatters() -> None:
    # 20 negatives; 0.429 is the sensitivity at 95 % specificity of an endless test set.
    d = float(norm.isf(0.05) + norm.ppf(0.429))
    rng, validated, read_off = np.random.default_rng(0), [], []
    y = np.repeat([0, 1], 20)
    for _ in range(1500):
        held, test = (rng.normal(size=40) + d * y for _ in range(2))
        t = choose_threshold(y == 1, held, SPECIFIC)
        validated.append([a - b for a, b in zip(rates(y, test > t), (norm.cdf(d - t), norm.cdf(t)), strict=True)])
        if len(validated) % 8 == 0:
            read_off.append(score("sensitivity_at_95_specificity", y, np.stack([0 * test, test], axis=1)) - 0.429)
    off, error = np.mean(validated, axis=0), np.std(validated, axis=0) / math.sqrt(1500)
    assert (np.abs(off) < 3 * error).all()
    assert (error < 0.004).all()
    assert np.mean(read_off) > 0.07
    assert metric_title("sensitivity_at_95_specificity", "sick").endswith(
        "specificity of sick, threshold read off the test set"
    )


def test_operating_points_are_those_of_the_test_set_at_each_models_own_threshold() -> None:
    rng = np.random.default_rng(1)
    y, x = drawn(rng, 200)
    odds = np.stack([x, 2 * x + rng.normal(size=200)])
    held = [predictions(*drawn(rng, n)) for n in (50, 60)]
    points = operating_points(predictions(y, odds), held)
    assert [(p.rule, p.models) for p in points] == [
        (rule.title, models) for rule in RULES for models in ("mean of the models", "ensemble")
    ]
    mean_p = softmax(predictions(y, odds).logits)[..., 1].mean(0)
    for rule, mean, one in zip(RULES, points[::2], points[1::2], strict=True):
        sides = [(v.labels == 1, v.logits[0, :, 1]) for v in held]
        own = [choose_threshold(*side, rule) for side in sides]
        pooled = choose_threshold(*(np.concatenate(part) for part in zip(*sides, strict=True)), rule)
        np.testing.assert_allclose(mean.thresholds, 1 / (1 + np.exp(-np.array(own))))
        assert one.thresholds == pytest.approx((1 / (1 + math.exp(-pooled)),))
        assert one.chosen_on == (POOLED if rule.reach else "")
        tables = [confusion_matrix(y, q > t) for q, t in zip(odds, own, strict=True)]
        ensemble = confusion_matrix(y, mean_p > 1 / (1 + math.exp(-pooled)))
        for point, counts in ((mean, tables), (one, [ensemble])):
            for value, (row, column, axis) in (
                (point.sensitivity, (1, 1, 1)), (point.specificity, (0, 0, 1)),
                (point.ppv, (1, 1, 0)), (point.npv, (0, 0, 0)),
            ):  # fmt: skip
                of = [table[row, column] / table.sum(axis)[row if axis else column] for table in counts]
                assert value.value == pytest.approx(np.mean(of))
                assert value.these_models is not None
                assert value.these_models[0] < np.mean(of) < value.these_models[1]


def test_predictive_values_at_another_prevalence_follow_bayes_and_their_intervals_cover() -> None:
    rng, d, share, covered, reps = np.random.default_rng(2), 1.8, 0.1, 0, 250
    y, hit = np.repeat([0, 1], 40), norm.cdf(0.9)
    truth = share * hit / (share * hit + (1 - share) * (1 - hit))
    for _ in range(reps):
        (point,) = operating_points(predictions(y, d * (rng.normal(size=80) + d * (y - 0.5))), [], share)
        assert point.ppv.interval is not None
        covered += point.ppv.interval[0] <= truth <= point.ppv.interval[1]
    assert covered / reps >= 0.93
    a, b = point.sensitivity.value or 0.0, point.specificity.value or 0.0
    assert point.ppv.value == pytest.approx(share * a / (share * a + (1 - share) * (1 - b)))
    assert point.npv.value == pytest.approx((1 - share) * b / ((1 - share) * b + share * (1 - a)))


@pytest.mark.parametrize("prevalence", [None, 0.2])
def test_where_no_image_is_called_positive_there_is_no_ppv(prevalence: float | None) -> None:
    y = np.repeat([0, 1], 10)
    (point,) = operating_points(predictions(y, np.full(20, -1.0)), [], prevalence)
    assert (point.sensitivity.value, point.specificity.value) == (0, 1)
    assert (point.ppv.value, point.ppv.why) == (None, "no image called")
    assert point.npv.value == pytest.approx(0.5 if prevalence is None else 0.8)


@pytest.mark.parametrize("weighted", [False, True])
def test_intercept_and_slope_are_those_of_an_unpenalized_logistic_regression(weighted: bool) -> None:
    rng = np.random.default_rng(4)
    y, x = drawn(rng, 300)
    x = 2.5 * x + 1
    w = np.where(y == 1, 0.3, 1.7) if weighted else np.ones(300)
    fitted = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x[:, None], y, sample_weight=w)
    assert recalibration_slope(y, x, w)[0] == pytest.approx(float(fitted.coef_[0, 0]), rel=1e-4)
    loss = minimize_scalar(lambda a: (w * (np.logaddexp(0, a + x) - y * (a + x))).sum(), tol=1e-12)
    assert recalibration_intercept(y, x, w)[0] == pytest.approx(loss.x, abs=1e-6)


def test_the_intervals_are_as_wide_as_a_bootstrap_of_patients() -> None:
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 2, 150)
    y, groups = np.repeat(labels, 3), np.repeat(np.arange(150), 3)
    x = 1.5 * (np.repeat(rng.normal(size=150), 3) + rng.normal(scale=0.5, size=450) + 1.5 * (y - 0.5))
    (found,) = calibration(predictions(y, x, groups), resamples=200)
    slopes = []
    for _ in range(200):
        rows = np.concatenate([np.arange(3) + 3 * g for g in rng.integers(0, 150, 150)])
        slopes.append(LogisticRegression(C=np.inf).fit(x[rows, None], y[rows]).coef_[0, 0])
    assert found.slope.interval is not None
    width = np.diff(found.slope.interval).item()
    assert width == pytest.approx(2 * 1.96 * np.std(slopes), rel=0.2)
    assert found.brier.value == pytest.approx(brier_score_loss(y, 1 / (1 + np.exp(-x))))


def test_what_cannot_be_told_says_why() -> None:
    y = np.repeat([0, 1], 20)
    apart = calibration(predictions(y, np.where(y == 1, 2.0, -2.0) + np.linspace(0, 1, 40)), resamples=20)[0]
    assert apart.slope.value is None
    assert "without an error" in apart.slope.why
    assert apart.intercept.value is not None
    rng = np.random.default_rng(8)
    few = calibration(predictions(y, rng.normal(size=40), np.arange(40) // 10), resamples=20)[0]
    assert few.slope.value is not None
    assert few.slope.interval is None
    assert "too few patients: 2 of healthy" in few.slope.why


def kumar(y: np.ndarray, p: np.ndarray) -> float:
    """Debiased squared error of a predictor of few values (Kumar, Liang and Ma 2019, section 5), unclipped."""
    total = 0.0
    for value in np.unique(p):
        rows = p == value
        n, observed = rows.sum(), y[rows].mean()
        total += n / len(y) * ((value - observed) ** 2 - observed * (1 - observed) / (n - 1))
    return total


def test_the_calibration_error_is_the_debiased_one_of_its_source() -> None:
    rng = np.random.default_rng(9)
    p = np.repeat([0.1, 0.3, 0.6, 0.9], 50)
    y = (rng.random(200) < np.clip(p + 0.15, 0, 1)).astype(float)
    error = calibration_error(y, p, np.ones(200), np.arange(200).astype(str).astype(object))
    assert error == pytest.approx(math.sqrt(kumar(y, p)))
    twice = np.repeat(np.arange(200), 2)  # each image given twice says no more than once
    again = calibration_error(y[twice], p[twice], np.ones(400), twice.astype(str).astype(object))
    assert again == pytest.approx(error)


@pytest.fixture(params=[1, 2])
def rows(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores; with ties in the first case, few positives in the second."""
    rng = np.random.default_rng(request.param)
    y = rng.random(120) < (0.05 if request.param == 2 else 0.4)
    scores = rng.normal(size=120) + y
    return y, np.round(scores, 1) if request.param == 1 else scores


def test_precision_at_each_recall_is_that_of_scikit_learn(rows: tuple[np.ndarray, np.ndarray]) -> None:
    y, scores = rows
    recall, precision = precision_recall_points(y, scores)
    p, r, _ = precision_recall_curve(y, scores)  # ascending thresholds, the point (recall 0, precision 1) last
    wanted = {round(float(each), 12): p[np.flatnonzero(r == each)[-1]] for each in r[:-1] if each > 0}
    assert dict(zip(np.round(recall, 12).tolist(), precision, strict=True)) == pytest.approx(wanted)
    assert (np.diff(recall, prepend=0) * precision).sum() == pytest.approx(average_precision_score(y, scores))


def test_rates_of_a_class_are_of_its_log_odds_in_models_and_ensemble() -> None:
    rng = np.random.default_rng(3)
    y, ids = rng.integers(0, 3, 90), np.array([f"p{k}" for k in range(90)], dtype=object)
    logits = rng.normal(size=(4, 90, 3)) + 1.5 * np.eye(3)[y]
    found = class_rates(Predictions(ids, ids, y, logits, ("a", "b", "c")), 2, "auc")
    p = scipy_softmax(logits, axis=2)
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
