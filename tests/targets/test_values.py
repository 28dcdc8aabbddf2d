"""Columns of findings, lists and numbers as tables have them, what is guessed of them, and strata of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embcache.data.classes import guess_task, retarget
from embcache.data.dataset import ImageDataset
from embcache.errors import DatasetError, UsageError
from embcache.targets import make_target
from embcache.targets.findings import read_columns, read_list, separator_of
from embcache.targets.number import read_numbers
from tests.probe.build import make_dataset
from tests.refusal import refused


def table(n: int = 40, **columns: Any) -> ImageDataset:
    """A dataset with columns of its own."""
    ds = make_dataset(np.arange(n) % 2)
    ds.table[list(columns)] = np.array(list(columns.values()), dtype=object).T
    return ds


# --- findings


def test_columns_of_findings() -> None:
    texts = ["1", "1.0", " Yes ", "TRUE", "pos", "0", "no", "False", "", "nan", "?", "-1", "Uncertain"]
    wanted = [1, 1, 1, 1, 1, 0, 0, 0, -1, -1, -1]
    for how, value in (("unknown", -1), ("zero", 0), ("one", 1)):
        y, notes = read_columns({"a": texts, "b": texts[::-1]}, how)
        assert y[:, 0].tolist() == [*wanted, value, value] == y[::-1, 1].tolist()
        assert y.dtype == np.int64
        assert any("4 uncertain" in note for note in notes)
        assert any("6 of 26" in note for note in notes)


@pytest.mark.parametrize("wrong", ["2", "0.5", "maybe", "1;0", "\u0661", "0x1", "1e0"])
def test_what_is_no_finding_is_refused(wrong: str) -> None:
    with refused(DatasetError, "finding-values") as caught:
        read_columns({"a": ["1", "0"], "b": ["1", wrong]})
    assert "'b'" in caught.value.problem
    assert wrong in str(caught.value.found)


@pytest.mark.parametrize(
    ("texts", "separator"),
    [
        (["Effusion", "Mass", "Effusion|Mass", "No Finding"], "|"),
        (["a;b", "b;c", "c;a"], ";"),
        (["a, b", "b, c", "a", "c"], ","),
        (["left/right", "up/down", "in/out"], ""),  # names with a stroke
        (["no_lung-mass", "lung-mass"], ""),
        (["3,5", "3,7", "4,5", "4,7"], ""),  # decimals of some languages
        (["01/02/2020", "01/03/2020", "02/03/2020"], ""),  # dates
        (["1|3", "3|7", "1|7", "3"], "|"),  # codes
        (["ER+", "ER+PR+", "PR+"], ""),
        (["", ""], ""),
        ([], ""),
    ],
)
def test_separators(texts: list[str], separator: str) -> None:
    assert separator_of(texts) == separator


def test_lists_of_findings() -> None:
    texts = ["Mass|Effusion", "No Finding", "", "Mass", "Effusion|No Finding", "Mass|Mass", "Pneumonia | Mass"]
    names, y, notes = read_list("labels", texts, "|")
    assert names == ("Effusion", "Mass", "Pneumonia")
    assert y.tolist() == [[1, 1, 0], [0, 0, 0], [-1, -1, -1], [0, 1, 0], [1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert any("No Finding" in note for note in notes)
    assert read_list("labels", ["a", "b", "none"], "")[1].tolist() == [[1, 0], [0, 1], [0, 0]]


@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=4), min_size=1, max_size=20))
def test_a_list_reads_back(sets: list[list[str]]) -> None:
    names, y, _ = read_list("labels", ["|".join(parts) or "No Finding" for parts in sets], "|")
    for parts, row in zip(sets, y, strict=True):
        assert {name for name, value in zip(names, row, strict=True) if value == 1} == set(parts)


# --- numbers


def test_numbers() -> None:
    y, notes = read_numbers("bmi", ["3.5", "", "-2", "1e3", " 7 "])
    np.testing.assert_array_equal(y, [3.5, np.nan, -2, 1000, 7])
    assert not notes
    ages, notes = read_numbers("patient age", ["30", "414", "-1", "120", ""])
    np.testing.assert_array_equal(ages, [30, np.nan, np.nan, 120, np.nan])
    assert len(notes) == 1
    assert read_numbers("dosage", ["414"])[0].tolist() == [414]  # is not called an age


@pytest.mark.parametrize("wrong", ["inf", "-Infinity", "1e999", "3,5", "30Y", "<18", "1_000", "0x1f", "abc"])
def test_what_is_no_number_is_refused(wrong: str) -> None:
    with refused(DatasetError, "not-a-number") as caught:
        read_numbers("bmi", ["1", "2", wrong])
    assert wrong in str(caught.value.found)


# --- guesses


@pytest.mark.parametrize(
    ("texts", "task"),
    [
        ({"a": ["0", "1"], "b": ["x", "y"]}, "findings"),
        ({"age": ["1", "2", "3", "4", "5", "6", ""]}, "number"),
        ({"grade": ["0", "1", "2", "3", "4", ""]}, "classes"),
        ({"bmi": ["0.5", "1.5"]}, "classes"),
        ({"patient_id": ["1", "2", "3", "4", "5", "6"]}, "classes"),
        ({"labels": ["a|b", "b", "a", "b|c"]}, "findings"),
        ({"view": ["AP", "PA"]}, "classes"),
        ({"size": ["1", "2", "3", "4", "5", "6", "large"]}, "classes"),
        ({"volume": ["3,5", "3,7", "4,5", "4,7"]}, "classes"),
    ],
)
def test_guesses(texts: dict[str, list[str]], task: str) -> None:
    found, why = guess_task(texts)
    assert found == task
    assert why


def test_targets_of_a_table() -> None:
    n = 40
    ds = table(n, a=[str(k % 2) for k in range(n)], b=[["1", "", "0", "-1"][k % 4] for k in range(n)],
               age=[str(20 + k) for k in range(n)], both=[["x|y", "y", "x", "No finding"][k % 4] for k in range(n)],
               grade=[str(k % 3) for k in range(n)])  # fmt: skip
    findings = retarget(ds, "a,b", None)
    assert (findings.kind, findings.class_names, findings.labels.shape) == ("findings", ("a", "b"), (n, 2))
    assert findings.labels[:4].tolist() == [[0, 1], [1, -1], [0, 0], [1, -1]]
    assert retarget(ds, "a,b", None, uncertain="one").labels[3].tolist() == [1, 1]
    assert retarget(ds, "both", None).class_names == ("x", "y")
    number = retarget(ds, "age", None)
    assert number.kind == "number"
    np.testing.assert_array_equal(number.labels, 20.0 + np.arange(n))
    ordinal = retarget(ds, "grade", "ordinal")
    assert (ordinal.kind, ordinal.task.loss, ordinal.metric) == ("ordinal", "cumulative", "kappa")
    assert retarget(ds, "grade", "number").kind == "number"
    assert retarget(ds, "age", "classes").kind == "classes"
    for other in (findings, number, ordinal):
        again = ImageDataset.from_parquet_bytes(other.to_parquet_bytes())
        assert again.task == other.task
        np.testing.assert_array_equal(again.labels, other.labels)


@pytest.mark.parametrize(
    ("target", "task", "kind", "code"),
    [
        ("constant", "number", DatasetError, "too-few-classes"),
        ("a,a", None, UsageError, "target-columns"),
        ("a,label", None, UsageError, "target-columns"),
        (",", None, UsageError, "target-columns"),
        ("a,age", "number", UsageError, "target-columns"),
        ("a,age", "findings", DatasetError, "finding-values"),
        ("view", "number", DatasetError, "not-a-number"),
        ("view", "ordinal", DatasetError, "order-unknown"),
        ("empty", None, DatasetError, "column-empty"),
        ("age", "ordinal", DatasetError, "column-values"),
        ("age", "survival", UsageError, "option-choice"),
        ("nothing", None, UsageError, "unknown-column"),
    ],
)
def test_targets_without_sense_are_refused(target: str, task: str | None, kind: type, code: str) -> None:
    n = 40
    ds = table(n, a=[str(k % 2) for k in range(n)], constant=["1"] * n, age=[str(20 + k) for k in range(n)],
               view=["AP", "PA", "lateral", "oblique"] * 10, empty=["", "nan"] * 20)  # fmt: skip
    with refused(kind, code):
        retarget(ds, target, task)


def test_findings_may_not_be_called_like_columns_of_the_table() -> None:
    ds = table(40, findings=["group|x", "x", "group", "none"] * 10)
    with refused(DatasetError, "class-names"):
        retarget(ds, "findings", "findings")


def test_findings_that_differ_in_case_are_refused() -> None:
    ds = table(40, findings=["Mass|x", "x", "mass|x", "Mass", "none"] * 8)
    with refused(DatasetError, "classes-differ-in-case"):
        retarget(ds, "findings", "findings")


# --- strata of numbers


def strata(y: Any, least: int = 1) -> np.ndarray:
    values = np.asarray(y, dtype=np.float64)
    return make_target("number", ["n"]).strata(values, np.arange(len(values)), least)


def test_numbers_are_balanced_by_fifths() -> None:
    y = np.random.default_rng(0).normal(size=103)
    found = strata(y)
    assert np.bincount(found).tolist() == [20, 21, 20, 21, 21]
    for s in range(4):
        assert y[found == s].max() < y[found == s + 1].min()


@pytest.mark.parametrize(
    ("y", "counts"),
    [
        ([5.0] * 20, [20]),  # constant
        ([0.0] * 18 + [1.0] * 2, [18, 2]),
        ([0.0] * 2 + [1.0] * 18, [2, 18]),  # most are the greatest
        ([1.0, 2, 3] * 10, [10, 10, 10]),
        ([1.0, 2], [1, 1]),
        ([7.0], [1]),
        ([], []),
    ],
)
def test_ties_are_in_one_stratum(y: list[float], counts: list[int]) -> None:
    found = strata(y)
    assert np.bincount(found).tolist() == counts
    assert all(len(set(found[np.asarray(y) == value].tolist())) == 1 for value in set(y))


def test_no_stratum_is_smaller_than_asked() -> None:
    y = np.random.default_rng(0).normal(size=23)
    assert len(np.bincount(strata(y, 6))) == 3
    assert len(np.bincount(strata(y, 11))) == 2
    assert len(np.bincount(strata(y, 12))) == 1


def test_rows_without_a_number_and_of_other_splits() -> None:
    y, rows = np.array([1.0, np.nan, 2, 3, 4, -100, 100]), np.array([0, 2, 3, 4])
    found = make_target("number", ["n"]).strata(y, rows)
    assert found.tolist() == [0, -1, 1, 2, 3, 0, 3]  # bounds are those of the rows


@settings(max_examples=100)
@given(st.lists(st.integers(-3, 3).map(float), max_size=40), st.integers(1, 5))
def test_strata_keep_their_promises(y: list[float], least: int) -> None:
    found, values = strata(y, least), np.asarray(y)
    counts = np.bincount(found, minlength=1)
    assert len(counts) <= 5
    assert len(counts) == 1 or counts.min() >= least
    for s in range(len(counts) - 1):
        assert values[found == s].max() < values[found == s + 1].min()


def test_what_is_unknown_stays_so_in_another_target() -> None:
    ds = table(40, a=["1", "0", "", "1"] * 10, b=["0", "1", "", "1"] * 10)
    several = retarget(ds, "a,b", "findings")
    one = retarget(several, "a", "findings", uncertain="one")  # unknown is not uncertain
    assert one.labels[:4, 0].tolist() == [1, 0, -1, 1]
