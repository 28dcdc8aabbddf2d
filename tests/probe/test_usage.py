"""What is refused of a probe without torch is what would be refused with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from embcache.config import ExtractConfig
from embcache.errors import UsageError
from embcache.figures.maps import embed_map
from embcache.probe.heads import heads, make_head
from embcache.probe.schedule import Schedule
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


@pytest.mark.parametrize("subset", ["0", "-5", "1e3", "", "S M", 0, "9" * 5000])
def test_what_no_dataset_defines_is_refused(subset: str | int) -> None:
    with pytest.raises(UsageError, match="no such subset"):
        check_usage(subsets=[subset])


@pytest.mark.parametrize(
    "ask",
    [
        lambda: Schedule(max_epochs=10**9),
        lambda: Schedule(batch_size=10**9),
        lambda: Schedule(patience=0),
        lambda: make_head("knn", k=10**9),
        lambda: make_head("mlp", hidden=10**9),
        lambda: make_head("logreg", max_iter=10**9),
        lambda: ExtractConfig(batch_size=10**9),
        lambda: ExtractConfig(workers=10**9),
        lambda: ExtractConfig(views=10**9),
        lambda: embed_map([[0.0]] * 5, seed=-1),
    ],
)
def test_no_count_that_can_be_asked_for_is_without_a_bound(ask: Callable[[], object]) -> None:
    with pytest.raises(UsageError, match="out of bounds"):
        ask()
