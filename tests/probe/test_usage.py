"""What is refused of a probe without torch is what would be refused with it."""

from __future__ import annotations

import pytest

from embcache.errors import UsageError
from embcache.probe.heads import heads, make_head
from embcache.probe.usage import check_usage, head_names


def test_names_read_off_the_sources_are_those_of_the_heads() -> None:
    assert head_names() == list(heads())


def test_an_unknown_head_is_told_alike_early_and_late() -> None:
    with pytest.raises(UsageError) as early:
        check_usage(head="dvmee")
    with pytest.raises(UsageError) as late:
        make_head("dvmee")
    assert str(early.value) == str(late.value)


@pytest.mark.parametrize("subset", ["S", "m", "F", "50", 20, " 7 ", "other"])
def test_what_a_dataset_may_define_is_left_to_it(subset: str | int) -> None:
    check_usage(subsets=[subset], lr=[1e-3, 1e-2], views=4, repeats=3, val="matched", test="official")


@pytest.mark.parametrize("subset", ["0", "-5", "1e3", "", "S M", 0])
def test_what_no_dataset_defines_is_refused(subset: str | int) -> None:
    with pytest.raises(UsageError, match="no such subset"):
        check_usage(subsets=[subset])
