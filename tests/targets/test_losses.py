"""Losses against loops in float64, cumulative logits against the likelihood of proportional odds, and averages."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit, logsumexp

from embcache.probe.stack import make_job, train_heads
from embcache.targets import Target, make_target
from embcache.targets.target import class_logits, finish

RNG = np.random.default_rng(0)


def losses_of(target: Target, z: np.ndarray, y: np.ndarray, train: np.ndarray | None = None) -> np.ndarray:
    """Losses (n,) of one head's outputs (n, width)."""
    found = target.constants(y if train is None else train)
    params = {name: p[None] for name, p in found.items()}
    out = torch.from_numpy(z.astype(np.float32))[None]
    return np.asarray(target.row_losses(out, torch.from_numpy(y)[None], params)[0])


def some_findings(n: int = 50, width: int = 4) -> tuple[np.ndarray, np.ndarray]:
    return RNG.normal(scale=3, size=(n, width)), RNG.integers(-1, 2, size=(n, width))


@pytest.mark.parametrize("loss", ["bce", "weighted-bce"])
def test_masked_binary_cross_entropy_is_a_loop(loss: str) -> None:
    z, y = some_findings()
    z[0], y[0] = [200, -200, 200, -200], [1, 0, 0, 1]  # no infinite loss
    wanted = np.zeros(len(y))
    for i in range(len(y)):
        for c in range(y.shape[1]):
            weight = 1.0 if loss == "bce" else (y[:, c] == 0).sum() / (y[:, c] == 1).sum()
            if y[i, c] == 1:
                wanted[i] += weight * np.logaddexp(0, -z[i, c])
            elif y[i, c] == 0:
                wanted[i] += np.logaddexp(0, z[i, c])
    np.testing.assert_allclose(losses_of(make_target("findings", "abcd", (), loss), z, y), wanted / 4, rtol=1e-5)


def test_it_is_torchs_where_all_is_known() -> None:
    z, y = some_findings()
    y = np.abs(y)
    pos = torch.from_numpy((y == 0).sum(0) / (y == 1).sum(0))
    for loss, weight in (("bce", None), ("weighted-bce", pos)):
        torchs = torch.nn.BCEWithLogitsLoss(pos_weight=weight)(torch.from_numpy(z), torch.from_numpy(y).double())
        found = losses_of(make_target("findings", "abcd", (), loss), z, y).mean()
        assert found == pytest.approx(float(torchs), rel=1e-5)


def test_an_unknown_finding_has_no_gradient() -> None:
    target, y = make_target("findings", "ab"), torch.tensor([[[1, -1], [-1, 0]]])
    out = torch.randn(1, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(target.row_losses(out, y, {}).sum(), out)
    assert ((gradient != 0) == (y >= 0)).all()
    rare = make_target("findings", "ab", (), "weighted-bce").constants(np.array([[0, 1], [0, -1]]))
    assert torch.isfinite(rare["target.positive"]).all()  # none, or all, have it


@pytest.mark.parametrize("loss", ["squared", "huber"])
def test_numbers_are_standardized_by_the_training_rows(loss: str) -> None:
    train, y, z = RNG.normal(300, 25, 40), RNG.normal(300, 60, 30), RNG.normal(size=(30, 1))
    target = make_target("number", ["age"], (), loss)
    error = np.abs(z[:, 0] - (y - train.mean()) / train.std())
    wanted = error**2 if loss == "squared" else np.where(error < 1, error**2 / 2, error - 0.5)
    np.testing.assert_allclose(losses_of(target, z, y, train), wanted, rtol=1e-4)
    params = {name: p[None] for name, p in target.constants(train).items()}
    numbers = finish(params, torch.from_numpy(z)[None])
    np.testing.assert_allclose(numbers[0, :, 0], z[:, 0] * train.std() + train.mean(), rtol=1e-6)


def test_large_numbers_that_hardly_vary_keep_their_digits() -> None:
    y = 1e6 + RNG.normal(size=40)
    standard = (y - y.mean()) / y.std()
    found = losses_of(make_target("number", ["id"]), np.zeros((40, 1)), y)
    np.testing.assert_allclose(found, standard**2, atol=0.1)


def test_cumulative_logits_are_those_of_proportional_odds() -> None:
    score, first, gaps = RNG.normal(scale=4, size=(20, 1)), RNG.normal(), RNG.normal(size=3)
    cuts = first + np.concatenate([[0], np.cumsum(np.exp(gaps))])
    below = np.concatenate([np.zeros((20, 1)), expit(cuts - score), np.ones((20, 1))], axis=1)
    tensors = (
        torch.from_numpy(score)[None],
        torch.tensor([[first]], dtype=torch.float64),
        torch.from_numpy(gaps)[None],
    )
    logits = class_logits(*tensors)[0]
    np.testing.assert_allclose(logits.exp(), np.diff(below, axis=1), rtol=1e-9, atol=1e-14)
    far = class_logits(torch.tensor([[[80.0], [-80.0]]]), torch.tensor([[-1.0]]), torch.tensor([[0.5]]))
    assert torch.isfinite(far).all()
    two = class_logits(torch.tensor([[[0.3]]]), torch.tensor([[0.1]]), None)
    np.testing.assert_allclose(two[0, 0].exp(), [expit(-0.2), expit(0.2)], rtol=1e-6)


def test_the_smallest_loss_is_that_of_scipys_fit() -> None:
    x = RNG.normal(size=(300, 2))
    y = np.digitize(x @ [1.0, -0.5] + RNG.logistic(size=300), [-1, 0.5, 1.5])

    def likelihood(p: np.ndarray) -> float:
        cuts = p[2] + np.concatenate([[0], np.cumsum(np.exp(p[3:]))])
        below = expit(np.concatenate([[-np.inf], cuts, [np.inf]]) - (x @ p[:2])[:, None])
        return -float(np.log(np.diff(below, axis=1)[np.arange(300), y]).mean())

    theirs = minimize(likelihood, np.zeros(5), method="BFGS", tol=1e-8)
    target = make_target("ordinal", "0123", (), "cumulative")
    weight = torch.zeros(1, 1, 2, dtype=torch.float64, requires_grad=True)
    params = {name: p[None].double().requires_grad_() for name, p in target.init().items()}
    search = torch.optim.LBFGS([weight, *params.values()], max_iter=60, line_search_fn="strong_wolfe")
    rows, values = torch.from_numpy(x)[None], torch.from_numpy(y)[None]

    def loss() -> float:
        search.zero_grad()
        found = target.row_losses(rows @ weight.transpose(1, 2), values, params).mean()
        found.backward()
        return float(found.detach())

    search.step(loss)
    assert loss() == pytest.approx(theirs.fun, abs=1e-6)
    np.testing.assert_allclose(weight.detach()[0, 0], theirs.x[:2], atol=2e-3)
    np.testing.assert_allclose(params["target.first"].detach()[0], theirs.x[2:3], atol=2e-3)


def test_the_cuts_begin_where_classes_are_equally_frequent() -> None:
    for n in (2, 3, 5):
        target = make_target("ordinal", [str(c) for c in range(n)], (), "cumulative")
        params = {name: p[None] for name, p in target.init().items()}
        p = target.predicted(finish(params, torch.zeros(1, 1, 1)).numpy())
        np.testing.assert_allclose(p[0, 0], np.full(n, 1 / n), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "loss"), [("findings", "bce"), ("findings", "weighted-bce"), ("number", "squared"), ("number", "huber"),
                       ("ordinal", "cumulative")],
)  # fmt: skip
def test_the_loss_of_an_epoch_is_the_loop_that_anyone_would_write(kind: str, loss: str) -> None:
    """One epoch of a linear head in one batch by torch's own functions and Adam."""
    from embcache.probe.heads import make_head
    from embcache.probe.schedule import Schedule
    from embcache.probe.stack import stream_generator

    x = torch.from_numpy(RNG.normal(size=(60, 5)).astype(np.float32))
    y = {"number": RNG.normal(40, 9, 60), "ordinal": np.arange(60) % 3}.get(kind, RNG.integers(-1, 2, (60, 3)))
    target = make_target(kind, {"number": ["n"]}.get(kind, ["0", "1", "2"]), (), loss)
    job = make_job(y, np.arange(60), np.arange(0), target, "s", 0.01)
    plan = Schedule(lr=0.01, max_epochs=3, min_epochs=3, batch_size=64)
    (found,) = train_heads(make_head("linear"), {"a": x}, torch.from_numpy(y), [job], target, target.metric, plan)
    start = make_head("linear").init(stream_generator("s", "init"), {"a": 5}, target.width)  # type: ignore[attr-defined]
    layer = torch.nn.Linear(5, target.width)
    layer.load_state_dict({name.removeprefix("classifier."): p for name, p in start.items()})
    extra = {name: p.clone().requires_grad_() for name, p in target.init().items()}
    adam = torch.optim.Adam([*layer.parameters(), *extra.values()], lr=0.01)
    values, losses = torch.from_numpy(y), []
    for _ in range(3):
        out = layer(x)
        if kind == "number":
            by = torch.nn.functional.huber_loss if loss == "huber" else torch.nn.functional.mse_loss
            wanted = by(out[:, 0].double(), (values - values.mean()) / values.std(correction=0))
        elif kind == "findings":
            weight = (y == 0).sum(0) / (y == 1).sum(0) if loss == "weighted-bce" else None
            each = torch.nn.functional.binary_cross_entropy_with_logits(
                out,
                (values == 1).float(),
                reduction="none",
                pos_weight=None if weight is None else torch.tensor(weight),
            )
            wanted = each[values >= 0].sum() / each.numel()
        else:
            cuts = torch.cat([extra["target.first"], extra["target.first"] + extra["target.gaps"].exp().cumsum(0)])
            below = torch.cat([torch.zeros(60, 1), (cuts - out).sigmoid(), torch.ones(60, 1)], dim=1)
            wanted = -below.diff(dim=1)[torch.arange(60), values].log().mean()
        losses.append(float(wanted.detach()))
        adam.zero_grad()
        wanted.backward()  # type: ignore[no-untyped-call]
        adam.step()
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
    assert found.best_epoch == 3


# --- averages of models and of groups


def test_an_ensemble_is_the_mean_of_what_is_predicted() -> None:
    z = RNG.normal(scale=30, size=(5, 20, 3))
    for kind in ("classes", "ordinal", "findings"):
        target = make_target(kind, "012")
        with np.errstate(divide="ignore"):
            log_p = z - logsumexp(z, axis=-1, keepdims=True) if kind != "findings" else -np.logaddexp(0, -z)
        found = target.predicted(target.average(z))
        np.testing.assert_allclose(found, np.exp(log_p).mean(0), rtol=1e-9)
        assert np.isfinite(target.average(z)).all()
    number = make_target("number", ["n"])
    np.testing.assert_allclose(number.average(z[..., :1]), z[..., :1].mean(0))


def test_values_of_a_group() -> None:
    assert make_target("classes", "ab").group_value(np.array([1, 1])) == 1
    assert make_target("ordinal", "ab").group_value(np.array([1, 0])) == -1
    findings = make_target("findings", "abc")
    assert findings.group_value(np.array([[0, -1, 0], [1, -1, -1]])).tolist() == [1, -1, -1]
    assert findings.group_value(np.array([[0, 0, 1], [0, -1, -1]])).tolist() == [0, -1, 1]
    assert make_target("number", ["n"]).group_value(np.array([1.0, 4.0])) == 2.5
    assert findings.of_group(np.array([[[0.0, 1, 2], [3, -1, 1]]])).tolist() == [[3, 1, 2]]
    assert math.isclose(make_target("number", ["n"]).of_group(np.array([[[1.0], [4.0]]]))[0, 0], 2.5)
