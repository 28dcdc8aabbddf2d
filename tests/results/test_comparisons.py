"""Comparisons against transcriptions of their formulas, plain loops and SciPy."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import t as student

from embcache.probe.metrics import METRICS
from embcache.probe.statistics import (
    TestSet,
    estimate,
)
from embcache.results.comparisons import compare, holm
from tests.probe.patients import components, patients, scored, width

# --- comparisons


@pytest.mark.parametrize("key", ["auc", "macro_auc", "accuracy", "kappa"])
@pytest.mark.parametrize("overlap", [None, 0.75])
def test_a_comparison_turns_round(key: str, overlap: float | None) -> None:
    test, z = patients(6, n_groups=40, n_classes=3 if key == "macro_auc" else 2, models=6)
    one, other = (scored(key, test, q) for q in (z[:3], z[3:]))
    there, back = (compare(a, b, overlap=overlap, margin=0.05) for a, b in ((one, other), (other, one)))
    assert there.interval is not None
    assert there.difference == pytest.approx(one.mean - other.mean)
    assert back.difference == pytest.approx(-there.difference)
    assert back.interval == pytest.approx((-there.interval[1], -there.interval[0]))
    for name in ("p", "smallest", "p_margin", "trained"):
        assert getattr(back, name) == pytest.approx(getattr(there, name)), name
    assert there.trained == (overlap is not None)


def test_a_comparison_is_delongs_with_students_t() -> None:
    rng = np.random.default_rng(2)
    labels = np.repeat([0, 1], 30)
    z = rng.normal(size=(2, 60, 2)) + np.array([1.6, 1.0])[:, None, None] * np.eye(2)[labels]
    parts = [components(labels == 1, q[:, 1] - q[:, 0]) for q in z]
    v = [np.var(parts[0][k] - parts[1][k], ddof=1) / 30 for k in (1, 2)]
    error, df = math.sqrt(sum(v)), sum(v) ** 2 / (v[0] ** 2 / 29 + v[1] ** 2 / 29)
    d = parts[0][0] - parts[1][0]
    test = TestSet(labels, np.arange(60), ("a", "b"))
    found = compare(*(scored("auc", test, q[None]) for q in z), margin=0.3)
    assert found.difference == pytest.approx(d)
    assert found.p == pytest.approx(2 * student.sf(abs(d) / error, df))
    reach = student.ppf(0.975, df) * error
    assert found.interval == pytest.approx((d - reach, d + reach))
    assert found.smallest == pytest.approx(reach + student.ppf(0.8, df) * error)
    sides = student.sf((d + 0.3) / error, df), student.cdf((d - 0.3) / error, df)
    assert found.p_margin == pytest.approx(max(sides))
    assert not found.trained


def test_a_comparison_of_procedures_adds_the_variance_of_training() -> None:
    test, z = patients(6, n_groups=40, models=10)
    unlike = 0.8 * np.linspace(-1, 1, 5)[:, None, None] * (test.labels[:, None] == np.arange(2))
    one, other = (scored("auc", test, q) for q in (z[:5] + unlike, z[5:] - unlike))
    found, fixed = (compare(one, other, overlap=o, folds=5) for o in (0.75, None))
    moves = one.moves - other.moves
    noise = np.mean([((moves[i] - moves[j]) ** 2).sum() for i, j in combinations(range(5), 2)]) / 2
    s2 = (one.values - other.values).var(ddof=1) - noise
    assert s2 > 0
    extra = s2 / 0.25 * (1 / 5 + 4 / 5 * 0.75)
    v_test = float((moves.mean(0) ** 2).sum())
    assert fixed.interval is not None
    reach = width(fixed.interval) / 2
    df_test = brentq(lambda df: student.ppf(0.975, df) * math.sqrt(v_test) - reach, 20, 40)
    v = v_test + extra
    df = v**2 / (v_test**2 / df_test + extra**2 / 4)
    assert found.p == pytest.approx(2 * student.sf(abs(found.difference) / math.sqrt(v), df), rel=1e-3)
    assert found.trained
    assert compare(one, other, overlap=(0.75, 0.75), folds=5) == found
    assert not compare(one, other, overlap=0.95).trained
    assert not compare(one, other, overlap=(0.5, 0.95)).trained
    assert not compare(one, scored("auc", test, z[5:7]), overlap=0.75).trained


def test_training_sets_of_two_sizes_have_their_own_variances() -> None:
    test, z = patients(6, n_groups=40, models=10)
    unlike = 0.8 * np.linspace(-1, 1, 5)[:, None, None] * (test.labels[:, None] == np.arange(2))
    one, other = (scored("auc", test, q) for q in (z[:5] + unlike, z[5:] - 2 * unlike))
    found, back = compare(one, other, overlap=(0.4, 0.8)), compare(other, one, overlap=(0.8, 0.4))
    moves, parts = (one.moves - other.moves).mean(0), []
    for side, o in ((one, 0.4), (other, 0.8)):
        pairs = [((side.moves[i] - side.moves[j]) ** 2).sum() for i, j in combinations(range(5), 2)]
        sigma2 = max(0, side.values.var(ddof=1) - np.mean(pairs) / 2) / (1 - o)
        parts.append(sigma2 * (1 / 5 + 4 / 5 * o))
    assert all(parts)
    v = (moves**2).sum() + sum(parts)
    assert found.interval is not None
    t = width(found.interval) / 2 / math.sqrt(v)
    assert student.ppf(0.975, 39) < t < student.ppf(0.975, 4)
    assert found.p == pytest.approx(back.p)


def test_a_value_that_cannot_be_told_is_said() -> None:
    test, z = patients(6)
    nobody = scored("ppv", test, z + np.array([1e3, 0.0]))
    assert (estimate(nobody).why, estimate(nobody).interval) == ("no value", None)
    assert compare(nobody, scored("ppv", test, z)).why == "no value"


@pytest.mark.parametrize("key", sorted(METRICS))
@pytest.mark.parametrize("gain", [1.5, 40.0])
def test_equal_models_do_not_differ_and_are_not_proven_equal_by_few_patients(key: str, gain: float) -> None:
    test, z = patients(6, models=2, gain=gain)  # ordinary, and perfect
    one = scored(key, test, z)
    found = compare(one, one, margin=0.005)
    if found.why:
        assert (key, found.why) == ("log_loss", "no variation among the test groups")
    else:
        assert (found.difference, found.p) == (0, 1)
        assert width(found.interval) > 0.01
        assert found.p_margin is not None
        assert found.p_margin > 0.05


def test_a_perfect_model_beside_a_useless_one() -> None:
    labels = np.repeat([0, 1], 30)
    test = TestSet(labels, np.arange(60), ("a", "b"))
    perfect, useless = scored("auc", test, 9 * np.eye(2)[labels][None]), scored("auc", test, np.zeros((1, 60, 2)))
    found = compare(perfect, useless)
    assert found.difference == 0.5
    assert found.p is not None
    assert found.p < 1e-6


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([], []),
    ],
)
def test_holms_correction(p: list[float], expected: list[float]) -> None:
    assert holm(p) == pytest.approx(expected)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_as_the_step_down_procedure_does(p: list[float]) -> None:
    adjusted, order = holm(p), sorted(range(len(p)), key=lambda k: p[k])
    for alpha in (0.01, 0.05, 0.2):
        rejected = set()
        for step, k in enumerate(order):
            if p[k] * (len(p) - step) > alpha:
                break
            rejected.add(k)
        assert {k for k, q in enumerate(adjusted) if q <= alpha} == rejected
