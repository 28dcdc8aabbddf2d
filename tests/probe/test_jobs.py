"""Jobs and fits: views, solved heads, the best of several, and how jobs are divided among stacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from embcache.errors import ProtocolError
from embcache.probe import stack
from embcache.probe.heads import make_head
from embcache.probe.schedule import Schedule
from embcache.probe.stack import Job, TrainedModel, best_of, fit, make_job, train_heads
from tests.probe.test_stack import Spy, problem, rows, train


def test_fit_without_validation_trains_all_epochs() -> None:
    x, y = problem()
    fitted = fit(make_head("linear"), {"a": x.numpy()}, y.numpy())
    assert fitted.trained.val_score is None
    assert fitted.trained.best_epoch == len(fitted.trained.losses) == 50
    assert set(fitted.trained.lrs) == {1e-3}


# --- constants, views, stacks that are divided, heads that are solved


def test_constants_are_of_the_training_rows_and_stay_as_they_were() -> None:
    x, y = problem()
    jobs = [Job(rows(0, 80), rows(300, 400), "0", 1e-2), Job(rows(80, 200), rows(300, 400), "1", 1e-2)]
    for job, head in zip(jobs, train(make_head("concat"), {"a": x, "b": x[:, :3]}, y, jobs), strict=True):
        torch.testing.assert_close(head.params["standard.a.mean"], x[job.train].mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(head.params["standard.b.scale"], x[job.train, :3].std(0, correction=0))


@pytest.mark.parametrize("name", ["mlp", "concat"])
def test_identical_views_train_as_the_plain_features(name: str) -> None:
    x, y = problem(spread=0.3)
    jobs = [Job(rows(40 * k, 40 * k + 90), rows(300, 400), f"0\0{k}", 1e-3) for k in range(2)]
    plain = train(make_head(name), {"a": x}, y, jobs)
    viewed = train(make_head(name), {"a": x[:, None].expand(-1, 4, -1)}, y, jobs)
    for a, b in zip(plain, viewed, strict=True):
        assert a.losses == b.losses
        assert a.val_scores == b.val_scores
        assert all(torch.equal(a.params[n], b.params[n]) for n in a.params)


def test_each_draw_takes_any_view_and_validation_the_first() -> None:
    n, n_views = 200, 4
    y = np.array([0, 1] * (n // 2))
    numbers = torch.arange(n)[:, None] * 10 + torch.arange(n_views)  # (n, V): row × 10 + view
    trained, validated = [], []

    class ViewSpy(Spy):
        def apply(self, params: Any, x: Mapping[str, torch.Tensor], masks: Any) -> torch.Tensor:
            (trained if masks is not None else validated).append(x["a"][0, :, 0].long())
            return super().apply(params, x, None)

    job = make_job(y, np.arange(100), np.arange(100, n), 2, "s", 1e-3)
    features = {"a": numbers[:, :, None].float()}
    train_heads(ViewSpy(), features, torch.from_numpy(y), [job], 2, "auc", Schedule(max_epochs=20, min_epochs=20))
    seen = torch.cat(trained)
    assert sorted((seen[:100] // 10).tolist()) == list(range(100))
    np.testing.assert_allclose(np.bincount(seen % 10) / len(seen), 1 / n_views, atol=0.05)
    assert (seen[:100] % 10).tolist() != (seen[100:200] % 10).tolist()
    assert set((torch.cat(validated) % 10).tolist()) == {0}


def test_how_jobs_are_divided_among_stacks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = problem(spread=0.3)
    jobs = [Job(rows(30 * k, 30 * k + 60), rows(300, 400), f"0\0{k}", 1e-3) for k in range(3)]
    head, schedule = make_head("mlp", hidden=6), Schedule(max_epochs=8, min_epochs=8)
    whole = train_heads(head, {"a": x}, y, jobs, 2, "auc", schedule)
    monkeypatch.setattr(stack, "_LARGEST_STACK", 200)  # two heads of 92 parameters
    told: list[int] = []
    parts = train_heads(head, {"a": x}, y, jobs, 2, "auc", schedule, on_epoch=told.append)
    assert told == sorted(told)
    assert told[-1] == 3 * 8
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a.losses, b.losses, rtol=1e-5)
        assert a.best_epoch == b.best_epoch


def test_the_best_of_several_is_by_validation_the_first_of_equals_and_never_one_without_a_model() -> None:
    def outcome(val_score: float | None, *, made: bool = True) -> TrainedModel:
        return TrainedModel({"w": torch.zeros(1)} if made else {}, 1, val_score, (0.1,), (), ())

    assert best_of([outcome(0.7), outcome(0.9), outcome(0.9)]) == 1
    assert best_of([outcome(None, made=False), outcome(-0.4)]) == 1  # kappa can be negative
    assert best_of([outcome(None, made=False), outcome(None, made=False)]) == 0


@pytest.mark.parametrize("broken", [slice(0, 1), slice(399, 400)], ids=["training", "validation"])
@pytest.mark.parametrize("name", ["knn", "logreg"])
def test_a_solved_head_on_features_that_are_not_finite_leaves_the_others(name: str, broken: slice) -> None:
    x, y = problem()
    x[broken] = float("nan")
    jobs = [
        Job(torch.cat([rows(0, 40), rows(0, 1)]), rows(300, 400), "0", 1e-3),
        Job(rows(40, 90), rows(300, 399), "1", 1e-3),
    ]
    bad, good = train_heads(make_head(name), {"a": x}, y, jobs, 2, "auc", Schedule())
    assert (bad.params, bad.diverged, bad.val_score) == ({}, True, None)
    assert not good.diverged
    with pytest.raises(ProtocolError, match="the head cannot be solved"):
        fit(make_head(name), {"a": np.full((4, 3), np.nan, np.float32)}, [0, 1, 0, 1])
