"""What the comparison of two revisions takes for a difference."""

from __future__ import annotations

import math

import pytest

from tests.golden.compare import difference

SCORES = {"id": "a", "auc": 0.5, "rows": [{"n": 3, "why": "x"}], "std": None, "odd": math.nan}


def test_new_keys_and_other_texts_are_no_difference() -> None:
    assert difference(SCORES, {**SCORES, "id": "b", "more": 1, "rows": [{"n": 3, "why": "y"}, {"n": 4}]}) == 0
    assert difference(SCORES, {**SCORES, "auc": 0.75}) == 0.25


@pytest.mark.parametrize(
    "change",
    [{"auc": None}, {"auc": math.nan}, {"auc": "0.5"}, {"rows": []}, {"std": 0.1}, {"odd": 0.5}, {"odd": None}],
)
def test_a_score_that_is_gone_or_no_number_any_more_is_one(change: dict[str, object]) -> None:
    assert difference(SCORES, {**SCORES, **change}) == math.inf
    assert difference(SCORES, {key: value for key, value in SCORES.items() if key != "auc"}) == math.inf
