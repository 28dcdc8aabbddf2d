"""The schedule against torch's own plateau scheduler and against its sentence in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embcache.probe.schedule import Schedule, Tracker

SCORES = st.lists(st.one_of(st.sampled_from([0.5, 0.6, 0.7]), st.floats(0, 1)), min_size=1, max_size=70)


@given(SCORES)
def test_learning_rate_is_that_of_torch(scores: list[float]) -> None:
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1e-3)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.1, patience=5, threshold=0)
    tracker = Tracker(Schedule())
    for score in scores:
        plateau.step(score)
        tracker.update(score)
        assert tracker.lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


@given(SCORES)
def test_stops_and_keeps_as_the_sentence_says(scores: list[float]) -> None:
    tracker = Tracker(Schedule())
    seen: list[float] = []
    for score in scores:
        if tracker.done:
            break
        tracker.update(score)
        seen.append(score)
        best = max(seen)
        assert tracker.best_epoch == seen.index(best) + 1  # ties keep the earliest
        assert tracker.best_score == best
        without_better = len(seen) - tracker.best_epoch
        assert tracker.done == (len(seen) == 50 or (len(seen) >= 30 and without_better >= 10))
