"""Metrics of findings, numbers and grades against scikit-learn and scipy, with weights too, and their intervals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    cohen_kappa_score,
    f1_score,
    log_loss,
    matthews_corrcoef,
    mean_absolute_error,
    r2_score,
    recall_score,
    roc_auc_score,
    root_mean_squared_error,
)

from embcache.errors import ProtocolError
from embcache.probe.metrics import METRICS, OTHERS, evaluate, find_metric, score, scorer
from embcache.probe.predictions import Predictions, all_estimates, group_rows, grouped_scores
from embcache.probe.statistics import FEWEST_GROUPS, TestSet, estimate, sample
from embcache.targets import Target, make_target
from tests.refusal import refused

FINDINGS = make_target("findings", "abc")
NUMBER = make_target("number", ["age"])
GRADES = make_target("ordinal", "0123")


def findings(n: int = 120, seed: int = 0, *, coarse: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, size=(n, 3))
    z = rng.normal(size=y.shape) + 1.2 * y - 0.6
    y[rng.random(y.shape) < 0.2] = -1
    return y, np.round(z) if coarse else z


def numbers(n: int = 120, seed: int = 0, *, coarse: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.normal(40, 9, n)
    z = y + rng.normal(scale=6, size=n)
    return (np.round(y, -1), np.round(z, -1)[:, None]) if coarse else (y, z[:, None])


def weights_of(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4, size=n).astype(np.float64)


def value(metric: str, y: np.ndarray, z: np.ndarray, target: Target, w: np.ndarray) -> float:
    return float(find_metric(metric, target).form(y, z, 1)(w[None])[0])


OF_ONE: dict[str, Callable[..., float]] = {
    "macro_auc": lambda y, z, w: roc_auc_score(y, z, sample_weight=w),
    "auprc": lambda y, z, w: average_precision_score(y, z, sample_weight=w),
    "accuracy": lambda y, z, w: accuracy_score(y, z > 0, sample_weight=w),
    "balanced_accuracy": lambda y, z, w: balanced_accuracy_score(y, z > 0, sample_weight=w),
    "f1": lambda y, z, w: f1_score(y, z > 0, sample_weight=w),
    "mcc": lambda y, z, w: matthews_corrcoef(y, z > 0, sample_weight=w),
    "brier": lambda y, z, w: brier_score_loss(y, expit(z), sample_weight=w),
    "log_loss": lambda y, z, w: log_loss(y, expit(z), sample_weight=w),
    "sensitivity": lambda y, z, w: recall_score(y, z > 0, sample_weight=w),
    "specificity": lambda y, z, w: recall_score(y, z > 0, pos_label=0, sample_weight=w),
}


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("metric", OF_ONE)
def test_findings_are_scored_each_where_it_is_known(metric: str, coarse: bool) -> None:
    y, z = findings(coarse=coarse)
    for w in (np.ones(len(y)), weights_of(len(y), 3)):
        each = [OF_ONE[metric](y[known, c], z[known, c], w[known]) for c in range(3) for known in [y[:, c] >= 0]]
        assert value(metric, y, z, FINDINGS, w) == pytest.approx(np.mean(each), rel=1e-9)


@pytest.mark.parametrize("coarse", [False, True])
def test_micro_scores_are_of_all_known_values_together(coarse: bool) -> None:
    y, z = findings(coarse=coarse)
    known = y >= 0
    for w in (np.ones(len(y)), weights_of(len(y), 3)):
        each = np.repeat(w[:, None], 3, 1)[known]
        wanted = roc_auc_score(y[known], z[known], sample_weight=each)
        assert value("micro_auc", y, z, FINDINGS, w) == pytest.approx(wanted, rel=1e-9)
        wanted = average_precision_score(y[known], z[known], sample_weight=each)
        assert value("micro_auprc", y, z, FINDINGS, w) == pytest.approx(wanted, rel=1e-9)


def test_a_finding_that_is_one_sided_is_left_out() -> None:
    y, z = findings()
    y[y[:, 1] == 0, 1] = -1
    wanted = np.mean([roc_auc_score(y[y[:, c] >= 0, c], z[y[:, c] >= 0, c]) for c in (0, 2)])
    found = evaluate("macro_auc", y, z, of=FINDINGS)
    assert found["score"] == pytest.approx(wanted)
    assert found["absent_classes"] == [1]
    assert found["per_class_auc"][1] is None
    assert found["per_class_auprc"][1] is None
    with refused(ProtocolError, "one-class"):
        score("macro_auc", np.maximum(y, 1), z, of=FINDINGS)
    nothing = find_metric("macro_auc", FINDINGS).form(np.ones_like(y), z, 1)(np.ones((2, len(y))))
    assert np.isnan(nothing).all()  # as a resample may be


OF_NUMBERS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], float]] = {
    "mae": lambda y, z, w: mean_absolute_error(y, z, sample_weight=w),
    "rmse": lambda y, z, w: root_mean_squared_error(y, z, sample_weight=w),
    "r2": lambda y, z, w: r2_score(y, z, sample_weight=w),
    "pearson": lambda y, z, w: pearsonr(np.repeat(y, w.astype(int)), np.repeat(z, w.astype(int)))[0],
    "spearman": lambda y, z, w: spearmanr(np.repeat(y, w.astype(int)), np.repeat(z, w.astype(int)))[0],
}


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("metric", OF_NUMBERS)
@pytest.mark.parametrize("shift", [0.0, 1e7])
def test_numbers_are_scored_as_scikit_learn_and_scipy_do(metric: str, coarse: bool, shift: float) -> None:
    y, z = numbers(coarse=coarse)
    y, z = y + shift, z + shift
    for w in (np.ones(len(y)), weights_of(len(y), 3)):
        wanted = OF_NUMBERS[metric](y, z[:, 0], w)
        assert value(metric, y, z, NUMBER, w) == pytest.approx(wanted, rel=1e-6 if shift else 1e-9)


def test_scores_of_numbers_at_their_ends() -> None:
    y, z = numbers()
    assert score("r2", y, z * 0 + 1000, of=NUMBER) < -100
    assert score("r2", y, np.full_like(z, y.mean()), of=NUMBER) == pytest.approx(0, abs=1e-12)
    perfect = {m: score(m, y, y[:, None], of=NUMBER) for m in OF_NUMBERS}
    assert perfect == pytest.approx({"mae": 0, "rmse": 0, "r2": 1, "pearson": 1, "spearman": 1})
    constant = evaluate("r2", y, np.full_like(z, 3.0), of=NUMBER)
    assert (constant["pearson"], constant["spearman"]) == (None, None)
    assert scorer("pearson", y, NUMBER)(np.full_like(z, 3.0)) == -1.0  # the worst
    with refused(ProtocolError, "one-class"):
        score("r2", np.full(5, 3.0), z[:5], of=NUMBER)
    with refused(ProtocolError, "predictions-not-finite"):
        score("r2", y, z * np.inf, of=NUMBER)


def test_grades() -> None:
    rng = np.random.default_rng(0)
    y = np.concatenate([np.arange(4), rng.integers(0, 4, 80)])
    z = rng.normal(size=(84, 4)) + 1.5 * np.eye(4)[y]
    for w in (np.ones(84), weights_of(84, 1)):
        wanted = mean_absolute_error(y, z.argmax(1), sample_weight=w)
        assert value("mae", y, z, GRADES, w) == pytest.approx(wanted)
        wanted = cohen_kappa_score(y, z.argmax(1), weights="quadratic", sample_weight=w)
        assert value("kappa", y, z, GRADES, w) == pytest.approx(wanted)
    assert "mae" in evaluate("kappa", y, z, of=GRADES)
    assert "mae" not in evaluate("macro_auc", y, z)  # of classes without an order


@pytest.mark.parametrize("name", [*METRICS, *OTHERS])
def test_a_metric_that_does_not_fit_names_those_that_do(name: str) -> None:
    of = {"classes": make_target("classes", "ab"), "findings": FINDINGS, "number": NUMBER, "ordinal": GRADES}
    metric = {**METRICS, **OTHERS}[name]
    for kind, target in of.items():
        if kind in metric.fits or (name == "auc" and kind in ("findings", "ordinal")):  # auc is else macro AUC
            continue
        with refused(ProtocolError, "metric-does-not-fit") as caught:
            find_metric(name, target)
        assert target.metric in str(caught.value.fix)
        assert name not in caught.value.expected.split(", ")  # type: ignore[union-attr]


def test_all_that_is_reported_is_finite_or_none() -> None:
    for target, (y, z) in ((FINDINGS, findings()), (NUMBER, numbers())):
        found = evaluate(target.metric, y, z, of=target)
        flat = [v for x in found.values() for v in (x if isinstance(x, list) else [x])]
        assert all(v is None or np.isfinite(v) for v in flat)
        fitting = {k for k, m in {**METRICS, **OTHERS}.items() if target.kind in m.fits}
        assert fitting <= set(found)


# --- intervals


def test_the_variance_of_a_macro_auc_of_findings_is_that_of_a_bootstrap_of_groups() -> None:
    y, z = findings(400, seed=5)
    groups = np.arange(400) // 3
    metric = find_metric("macro_auc", FINDINGS)
    found = sample(metric, TestSet(y, groups, FINDINGS.names, target=FINDINGS), z[None])
    rng, form = np.random.default_rng(0), metric.form(y, z, 1)
    drawn = rng.multinomial(groups.max() + 1, np.full(groups.max() + 1, 1 / (groups.max() + 1)), size=3000)
    bootstrap = form(drawn[:, groups].astype(np.float64)).var()
    assert float((found.moves @ found.moves.T).mean()) == pytest.approx(bootstrap, rel=0.1)
    low, high = estimate(found).these_models or (0, 0)
    assert high - low == pytest.approx(2 * 1.96 * bootstrap**0.5, rel=0.15)


def test_one_finding_has_the_interval_of_two_classes() -> None:
    """Of findings one after the other, and of one finding alone: the same AUC and nearly the same interval."""
    y, z = findings(300, seed=2)
    groups = np.arange(300).astype(str).astype(object)
    many = Predictions(groups, groups, y, z[None], FINDINGS.names, target=FINDINGS)
    one = replace_target(many, [1])
    two = many.finding("b")
    assert one.estimate("macro_auc").mean == pytest.approx(two.estimate("auc").mean)
    np.testing.assert_allclose(one.estimate("macro_auc").these_models, two.estimate("auc").these_models, atol=0.004)  # type: ignore[arg-type]


def replace_target(many: Predictions, columns: list[int]) -> Predictions:
    names = tuple(many.class_names[c] for c in columns)
    return Predictions(
        many.ids, many.groups, many.labels[:, columns], many.logits[:, :, columns], names,
        target=make_target("findings", names),
    )  # fmt: skip


@pytest.mark.parametrize("metric", ["macro_auc", "auprc", "f1", "micro_auc", "brier"])
def test_perfect_findings_have_an_interval(metric: str) -> None:
    y, _ = findings(150)
    test = TestSet(y, np.arange(150), FINDINGS.names, target=FINDINGS)
    found = estimate(sample(find_metric(metric, FINDINGS), test, (40.0 * y - 20)[None], resamples=200))
    assert found.these_models is not None
    low, high = found.these_models
    if metric == "brier":
        assert 0 <= low <= found.mean <= high < 0.2
    else:
        assert 0.8 < low < 1
        assert high == pytest.approx(1)


def test_a_finding_of_few_groups_gets_words() -> None:
    y, z = findings(150)
    rare = y.copy()
    rare[np.flatnonzero(rare[:, 2] == 1)[FEWEST_GROUPS - 1 :], 2] = 0
    groups = np.arange(150)
    for metric in ("macro_auc", "auprc"):
        found = estimate(
            sample(find_metric(metric, FINDINGS), TestSet(rare, groups, FINDINGS.names, target=FINDINGS), z[None])
        )
        assert found.these_models is None
        assert f"{FEWEST_GROUPS - 1} with c" in found.why
    enough = TestSet(y, groups, FINDINGS.names, target=FINDINGS)
    assert estimate(sample(find_metric("macro_auc", FINDINGS), enough, z[None])).these_models


@pytest.mark.parametrize("metric", OF_NUMBERS)
def test_intervals_of_numbers(metric: str) -> None:
    y, z = numbers(300)
    groups = np.arange(300) // 2
    found = estimate(sample(find_metric(metric, NUMBER), TestSet(y, groups, ("age",), target=NUMBER), z[None]))
    assert found.these_models is not None
    low, high = found.these_models
    assert low < found.mean < high
    assert found.groups == 150
    few = TestSet(y[:8], groups[:8], ("age",), target=NUMBER)
    assert estimate(sample(find_metric(metric, NUMBER), few, z[None, :8])).why


def test_an_r2_below_zero_has_an_interval_below_zero() -> None:
    y, z = numbers(300)
    found = estimate(sample(find_metric("r2", NUMBER), TestSet(y, np.arange(300), ("age",)), (z + 30)[None]))
    assert found.these_models is not None
    assert found.these_models[0] < found.mean < found.these_models[1] < 0


def test_perfect_numbers_have_no_variation() -> None:
    y, _ = numbers(50)
    for metric in ("mae", "rmse", "r2"):
        test = TestSet(y, np.arange(50), ("age",), target=NUMBER)
        found = estimate(sample(find_metric(metric, NUMBER), test, y[None, :, None]))
        assert (found.these_models, bool(found.why)) == (None, True)


# --- by group


def by_group(y: Any, z: np.ndarray, groups: list[str], target: Target) -> Predictions:
    ids = np.array([f"i{k}" for k in range(len(groups))], dtype=object)
    return Predictions(ids, np.array(groups, dtype=object), np.asarray(y), z, target.names, target=target)


def test_groups_of_findings_take_the_maximum() -> None:
    y, z = [[1, 0, -1], [0, 0, -1], [0, 1, 0]], np.array([[[1.0, 2, 3], [4, -1, 0], [-1, 1, 1]]])
    found = by_group(y, z, ["p", "p", "q"], FINDINGS).by_group()
    assert found.labels.tolist() == [[1, 0, -1], [0, 1, 0]]
    assert found.logits.tolist() == [[[4, 2, 3], [-1, 1, 1]]]


def test_groups_of_numbers_take_the_mean() -> None:
    found = by_group([1.0, 2, 9], np.array([[[1.0], [3], [5]]]), ["p", "p", "q"], NUMBER).by_group()
    assert found.labels.tolist() == [1.5, 9]
    assert found.logits.tolist() == [[[2], [5]]]


def test_groups_whose_rows_disagree_are_left_out_with_a_count() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(rng.permutation(np.arange(40) % 4), 2)
    y[1], y[2], y[3] = (y[0] + 1) % 4, 0, 1
    some = by_group(y, rng.normal(size=(3, 80, 4)), [f"p{k // 2}" for k in range(80)], GRADES)
    found = grouped_scores(some, "kappa")
    assert (found["groups"], found["mixed"]) == (38, 2)
    assert set(all_estimates(some, "kappa")) == {"", "ensemble", "by patient", "by patient, ensemble"}
    apart = by_group([0, 1] * 5, rng.normal(size=(1, 10, 4)), [f"p{k // 2}" for k in range(10)], GRADES)
    groups, why = group_rows(apart)
    assert groups is None
    assert why
    assert grouped_scores(apart, "kappa") == {"why": why}
