"""Jobs and fits: views, solved heads, the best of several, and how jobs are divided among stacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from embcache.errors import ProtocolError
from embcache.probe.heads import make_head
from embcache.probe.metrics import score, softmax
from embcache.probe.schedule import Schedule
from embcache.probe.stack import Job, predict_logits, train_stack
from embcache.probe.train import fit, make_job, train_jobs
from tests.probe.test_stack import Spy, problem, rows, train


def test_fit_without_validation_trains_all_epochs() -> None:
    x, y = problem()
    fitted = fit(make_head("linear"), {"a": x.numpy()}, y.numpy())
    assert fitted.trained.val_score is None
    assert fitted.trained.best_epoch == len(fitted.trained.losses) == 50
    assert set(fitted.trained.lrs) == {1e-3}


# --- constants, views, stacks that are divided, heads that are solved


@pytest.mark.parametrize("name", ["linear", "mlp", "concat"])
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
    train_stack(ViewSpy(), features, torch.from_numpy(y), [job], 2, "auc", Schedule(max_epochs=20, min_epochs=20))
    seen = torch.cat(trained)
    assert sorted((seen[:100] // 10).tolist()) == list(range(100))
    np.testing.assert_allclose(np.bincount(seen % 10) / len(seen), 1 / n_views, atol=0.05)
    assert (seen[:100] % 10).tolist() != (seen[100:200] % 10).tolist()
    assert set((torch.cat(validated) % 10).tolist()) == {0}


@pytest.mark.parametrize("name", ["knn", "logreg"])
def test_a_solved_head_in_the_engine_is_the_head_on_its_rows(name: str) -> None:
    x, y = problem(3, spread=0.5)
    job = Job(rows(0, 90), rows(300, 400), "0", 1e-3)
    viewed = torch.stack([x, torch.full_like(x, 1e6)], 1)  # a solved head takes the plain view
    (head,) = train_jobs(make_head(name), {"a": viewed}, y, [job], 3, "macro_auc", Schedule())
    alone = make_head(name).solve({"a": x[:90]}, y[:90], {"a": x[300:]}, y[300:], 3, "macro_auc")
    assert head.chosen == alone.chosen
    assert all(torch.equal(head.params[n], alone.params[n]) for n in alone.params)
    p = softmax(predict_logits(make_head(name), head.params, {"a": x}, rows(300, 400)))
    assert head.val_score == pytest.approx(score("macro_auc", y[300:].numpy(), np.log(p)))
    assert (head.best_epoch, head.losses, head.diverged) == (0, (), False)


@pytest.mark.parametrize("broken", [slice(0, 1), slice(399, 400)], ids=["training", "validation"])
@pytest.mark.parametrize("name", ["knn", "logreg"])
def test_a_solved_head_on_features_that_are_not_finite_leaves_the_others(name: str, broken: slice) -> None:
    x, y = problem()
    x[broken] = float("nan")
    jobs = [
        Job(torch.cat([rows(0, 40), rows(0, 1)]), rows(300, 400), "0", 1e-3),
        Job(rows(40, 90), rows(300, 399), "1", 1e-3),
    ]
    bad, good = train_jobs(make_head(name), {"a": x}, y, jobs, 2, "auc", Schedule())
    assert (bad.params, bad.diverged, bad.val_score) == ({}, True, None)
    assert not good.diverged
    with pytest.raises(ProtocolError, match="the head cannot be solved"):
        fit(make_head(name), {"a": np.full((4, 3), np.nan, np.float32)}, [0, 1, 0, 1])
