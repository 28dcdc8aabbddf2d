"""CSV files: exact, whole, and harmless in a spreadsheet."""

from __future__ import annotations

import csv
import io
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embcache.results.layout import csv_text, guard_cell, is_formula


def test_scores_with_a_sign_are_no_formulas() -> None:
    for text in ("-0.0062", "+0.5", "-0.0493 – +0.0369"):
        assert guard_cell(text) == text


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1"])
def test_formulas_are_guarded(text: str) -> None:
    assert guard_cell(text) == "'" + text
    (row,) = list(csv.reader(io.StringIO(csv_text(["a"], [[text]]), newline="")))[1:]
    assert row == ["'" + text]
    assert csv_text([text], [], guard=False).startswith((text, '"'))


HIDDEN = ["", " ", "\u00a0", "\ufeff", "\u200b\u202e", "'", "''\ufeff ", "\x00"]


def test_signs_of_any_width_are_guarded_whatever_unseen_stands_before_them() -> None:
    for sign, before in itertools.product("=+-@＝＋－＠﹦﹢﹣﹫", HIDDEN):
        text = f"{before}{sign}1+1"
        assert is_formula(text)
        assert guard_cell(text) == f"'{text}"


@given(st.text(alphabet="=＝'\ufeff +-@\t\n ab1", max_size=8))
def test_taking_one_apostrophe_off_what_is_guarded_gives_it_back(text: str) -> None:
    cell = guard_cell(text)
    read = cell[1:] if cell.startswith("'") and is_formula(cell[1:]) else cell
    assert read == text


def test_other_text_and_numbers_stay_as_they_are() -> None:
    text = csv_text(["id", "p", "n", "none"], [['a,b "c"\nd', 0.1 + 0.2, -3, None]])
    assert list(csv.reader(io.StringIO(text, newline=""))) == [
        ["id", "p", "n", "none"],
        ['a,b "c"\nd', "0.30000000000000004", "-3", ""],
    ]
