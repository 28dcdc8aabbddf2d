"""Stacked training against the plain PyTorch loop, and what each head may and may not notice of the others."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from embcache.probe.heads import heads, make_head
from embcache.probe.layers import affine
from embcache.probe.metrics import softmax
from embcache.probe.schedule import Schedule
from embcache.probe.stack import (
    Job,
    TrainedHead,
    TrainedModel,
    adam_step,
    logits_of_sets,
    make_job,
    predict_logits,
    stream_generator,
    train_heads,
)

N, DIM = 400, 12
TRAINED = [name for name in heads if isinstance(make_head(name), TrainedHead)]
SMALL = {name: {"proj_dim": 8} for name in TRAINED if name.startswith("dvme")} | {"mlp": {"hidden": 8}}
BY_NODES: list[tuple[str, dict[str, Any]]] = [  # with 16 tokens auto never takes nodes
    ("dvme", {"proj_dim": 64, "attention": attention}) for attention in ("fast", "auto")
]


def problem(n_classes: int = 2, seed: int = 0, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, n_classes, size=N)
    x = rng.normal(size=(N, DIM)) + spread * rng.normal(size=(n_classes, DIM))[y]
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y)


def rows(start: int, stop: int) -> torch.Tensor:
    return torch.arange(start, stop)


def train(
    head: Any, x: Mapping[str, torch.Tensor], y: torch.Tensor, jobs: Sequence[Job], **options: Any
) -> list[TrainedModel]:
    n_classes = int(y.max()) + 1
    metric = "auc" if n_classes == 2 else "macro_auc"
    return train_heads(head, x, y, jobs, n_classes, metric, options.get("schedule", Schedule()))


def test_adam_is_torchs_with_a_rate_and_a_step_count_for_each_head() -> None:
    lrs, started = [1e-3, 1e-1, 1e-2], [0, 3, 1]
    torch.manual_seed(0)
    p = torch.randn(3, 5, 4)
    first, second = torch.zeros_like(p), torch.zeros_like(p)
    truth = [p[k].clone().requires_grad_() for k in range(3)]
    adams = [torch.optim.Adam([t], lr=lr) for t, lr in zip(truth, lrs, strict=True)]
    steps = [0, 0, 0]
    for step in range(8):
        gradient = torch.randn(3, 5, 4) * 10.0 ** torch.randint(-6, 2, (3, 5, 4))
        active = [k for k in range(3) if step >= started[k]]
        for k in active:
            steps[k] += 1
            truth[k].grad = gradient[k].clone()
            adams[k].step()
            parts = tuple(t[k : k + 1] for t in (p, gradient, first, second))
            adam_step([parts], steps[k : k + 1], lrs[k : k + 1])
    for k in range(3):
        torch.testing.assert_close(p[k], truth[k].detach(), rtol=1e-5, atol=1e-7)


def plain_loop(x: torch.Tensor, y: torch.Tensor, job: Job, schedule: Schedule) -> dict[str, Any]:
    """The protocol as anyone would write it: nn.Linear, torch's Adam and plateau, one head."""
    model = torch.nn.Linear(x.shape[1], int(y.max()) + 1)
    start = make_head("linear").init(stream_generator(job.stream, "init"), {"a": x.shape[1]}, int(y.max()) + 1)
    model.load_state_dict({name.removeprefix("classifier."): value for name, value in start.items()})
    optimizer = torch.optim.Adam(model.parameters(), lr=job.lr)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.1, patience=5, threshold=0)
    order = stream_generator(job.stream, "order")
    losses, scores, best, best_epoch, best_state = [], [], -1.0, 0, {}
    for epoch in range(1, 51):
        total, n = 0.0, len(job.train)
        if job.weights is None:
            drawn = job.train[torch.randperm(n, generator=order)]
        else:
            drawn = job.train[torch.multinomial(job.weights, n, replacement=True, generator=order)]
        for batch in drawn.split(64):
            loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        losses.append(total / n)
        with torch.no_grad():
            p = model(x[job.val]).softmax(-1)[:, 1]
        # rounded: scikit-learn's sum of trapezoids makes equal rankings differ in the last digit
        scores.append(round(float(roc_auc_score(y[job.val], p)), 12))
        plateau.step(scores[-1])
        if scores[-1] > best:
            best, best_epoch, best_state = scores[-1], epoch, copy.deepcopy(model.state_dict())
        if epoch >= 30 and epoch - best_epoch >= 10:
            break
    return {"losses": losses, "scores": scores, "best_epoch": best_epoch, "state": best_state}


@pytest.mark.parametrize(("n_train", "oversampled"), [(150, False), (100, True)])
def test_a_stack_is_the_plain_pytorch_loop_for_every_fold(n_train: int, oversampled: bool) -> None:
    x, y = problem(spread=0.3)
    jobs = []
    for fold in range(3):
        chosen = (rows(0, n_train) + 60 * fold) % 300
        weights = torch.where(y[chosen] == 0, 3.0, 1.0).double() if oversampled else None
        jobs.append(Job(chosen, rows(300, 400), f"0\0{fold}", 1e-3, weights))
    stacked = train(make_head("linear"), {"a": x}, y, jobs)
    for job, head in zip(jobs, stacked, strict=True):
        plain = plain_loop(x, y, job, Schedule())
        np.testing.assert_allclose(head.losses, plain["losses"], rtol=1e-5)
        np.testing.assert_allclose(head.val_scores, plain["scores"], atol=1e-9)
        assert head.best_epoch == plain["best_epoch"]
        torch.testing.assert_close(head.params["classifier.weight"], plain["state"]["weight"], rtol=1e-4, atol=1e-6)


@settings(max_examples=5)
@given(
    kind=st.sampled_from([(name, SMALL.get(name, {})) for name in TRAINED] + BY_NODES),
    sizes=st.lists(st.integers(8, 140), min_size=2, max_size=4),
    seed=st.integers(0, 100),
    views=st.sampled_from([0, 0, 2]),
)
def test_a_head_is_the_same_alone_and_in_a_stack(
    kind: tuple[str, dict[str, Any]], sizes: list[int], seed: int, views: int
) -> None:
    x, y = problem(3, seed)
    head = make_head(kind[0], **kind[1])
    features = {"a": x, "b": x[:, :5].contiguous()} if head.fuses else {"a": x}
    if views:
        noise = torch.randn(views, N, 1, generator=torch.Generator().manual_seed(seed))
        features = {b: torch.stack([f, *(f + part for part in noise)], 1) for b, f in features.items()}
    jobs = []
    for fold, n in enumerate(sizes):
        chosen = torch.from_numpy(np.random.default_rng(fold).permutation(300)[:n])
        weights = torch.rand(n, generator=torch.Generator().manual_seed(fold)).double() if fold % 2 else None
        jobs.append(Job(chosen, rows(300, 400), f"{seed}\0{fold}", [1e-3, 1e-2, 3e-3][fold % 3], weights))
    schedule = Schedule(max_epochs=4, min_epochs=2, patience=1)
    together = train(head, features, y, jobs, schedule=schedule)
    for job, stacked in zip(jobs, together, strict=True):
        (alone,) = train(head, features, y, [job], schedule=schedule)
        np.testing.assert_allclose(stacked.losses, alone.losses, rtol=1e-5, atol=1e-6)
        assert stacked.best_epoch == alone.best_epoch
        a, b = (softmax(predict_logits(head, t.params, features, rows(0, N))) for t in (stacked, alone))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("outputs", [1, 3, 14])
@pytest.mark.parametrize("n", [1, 2, 37])
@pytest.mark.parametrize("width", [5, 34, 1280])
def test_a_layer_has_the_same_bits_alone_and_in_a_stack(width: int, n: int, outputs: int) -> None:
    random = torch.Generator().manual_seed(width)
    x, weight = (torch.randn(3, rows, width, generator=random) for rows in (n, outputs))
    bias = torch.randn(3, outputs, generator=random)

    def of(chosen: slice) -> list[torch.Tensor]:
        # Cloned: in memory of its own a head lies at another address than in the stack.
        mine = [tensor[chosen].clone().requires_grad_() for tensor in (x, weight, bias)]
        out = affine({"a.weight": mine[1], "a.bias": mine[2]}, "a", mine[0])
        return [out.detach(), *torch.autograd.grad(out.square().sum(), mine)]

    together = of(slice(None))
    for k in range(3):
        assert all(torch.equal(a, b[k : k + 1]) for a, b in zip(of(slice(k, k + 1)), together, strict=True))


@pytest.mark.parametrize(("width", "n"), [(4, 3), (5, 3), (5, 1)])
def test_gradients_of_a_layer_are_those_of_its_formula(width: int, n: int) -> None:
    tensors = [
        torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in ((n, width), (3, width), (3,))
    ]

    def layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return affine({"a.weight": weight, "a.bias": bias}, "a", x)

    assert torch.autograd.gradcheck(layer, tensors)
    assert torch.autograd.gradgradcheck(layer, tensors)


def test_validation_rounds_a_head_alike_with_any_number_of_others() -> None:
    generator = torch.Generator().manual_seed(0)
    x = {"a": torch.rand(1300, 1536, generator=generator)}
    each = [make_head("linear").init(generator, {"a": 1536}, 2) for _ in range(20)]
    stacked = {name: torch.stack([p[name] for p in each]) for name in each[0]}
    (together,) = logits_of_sets(make_head("linear"), [stacked], x, [rows(0, 1300)])
    for params, logits in zip(each, together, strict=True):
        assert np.array_equal(predict_logits(make_head("linear"), params, x, rows(0, 1300)), logits)


@dataclass
class Spy(TrainedHead):
    """A head that remembers which rows it was shown in training."""

    seen: list[torch.Tensor] = field(default_factory=list)

    def init(self, generator: torch.Generator, dims: Mapping[str, int], n_classes: int) -> dict[str, torch.Tensor]:
        return {"w": torch.zeros(n_classes)}

    def apply(self, params: Any, x: Mapping[str, torch.Tensor], masks: Any) -> torch.Tensor:
        if masks is not None:
            self.seen.append(x["a"][0, :, 0].long())
        return x["a"][:, :, :1] * 0 + params["w"][:, None]


class CostSpy(Spy):
    """Remembers how many heads it was applied for, in training and in validation."""

    def __init__(self) -> None:
        self.applied: list[tuple[bool, int]] = []

    def apply(self, params: Any, x: Mapping[str, torch.Tensor], masks: Any) -> torch.Tensor:
        self.applied.append((masks is not None, len(params["w"])))
        return super().apply(params, x, None)


def test_a_finished_head_costs_nothing_more() -> None:
    x, y = problem()
    good, bad = Job(rows(0, 64), rows(300, 400), "0", 1e-3), Job(rows(100, 164), rows(300, 400), "1", float("nan"))
    spy = CostSpy()
    first, second = train(spy, {"a": x}, y, [good, bad], schedule=Schedule(max_epochs=5, min_epochs=5))
    assert (len(first.losses), second.diverged) == (5, True)
    ended = len(second.losses)
    assert ended < 5
    for training in (True, False):
        assert [k for t, k in spy.applied if t is training] == [2] * ended + [1] * (5 - ended)


def shown(y: np.ndarray, chosen: np.ndarray, epochs: int) -> list[torch.Tensor]:
    spy = Spy()
    numbers = torch.arange(len(y), dtype=torch.float32)[:, None]
    job = make_job(y, chosen, np.arange(0), int(y.max()) + 1, "s", 1e-3)
    train_heads(spy, {"a": numbers}, torch.from_numpy(y), [job], int(y.max()) + 1, "auc", Schedule(max_epochs=epochs))
    return spy.seen


def test_the_last_partial_batch_is_kept() -> None:
    y = np.array([0, 1] * 100)
    assert [len(batch) for batch in shown(y, np.arange(150), 2)] == [64, 64, 22] * 2


def test_a_balanced_subset_shows_every_image_once_an_epoch_in_another_order() -> None:
    y = np.array([0, 1] * 100)
    first, second = shown(y, np.arange(50), 2)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(50))
    assert first.tolist() != second.tolist()


def test_an_unbalanced_subset_is_oversampled_with_an_epoch_of_n_draws() -> None:
    y = np.array([0] * 180 + [1] * 15 + [2] * 5)
    batches = shown(y, np.arange(200), 30)
    assert [len(b) for b in batches[:4]] == [64, 64, 64, 8]
    drawn = torch.cat(batches).numpy()
    assert len(drawn) == 200 * 30
    np.testing.assert_allclose(np.bincount(y[drawn]) / len(drawn), 1 / 3, atol=0.03)
    assert len(set(drawn[:200].tolist())) < 200  # with replacement


def test_a_head_that_diverges_leaves_the_others_as_they_are() -> None:
    x, y = problem()
    broken = x.clone()
    broken[:60] = float("inf")
    jobs = [Job(rows(0, 60), rows(300, 400), "0", 1e-3), Job(rows(60, 120), rows(300, 400), "1", 1e-3)]
    bad, good = train(make_head("linear"), {"a": broken}, y, jobs)
    (alone,) = train(make_head("linear"), {"a": broken}, y, jobs[1:])
    assert bad.diverged
    assert bad.params == {}
    assert len(bad.losses) == 1
    assert not good.diverged
    np.testing.assert_allclose(good.losses, alone.losses, rtol=1e-6)


def test_validation_alone_chooses_the_epoch() -> None:
    x, y = problem(spread=0.3)
    flipped = y.clone()
    flipped[200:300] = 1 - flipped[200:300]  # rows that neither train nor validate
    job = Job(rows(0, 100), rows(300, 400), "0", 1e-3)
    (a,), (b,) = (train(make_head("linear"), {"a": x}, labels, [job]) for labels in (y, flipped))
    assert a.val_scores == b.val_scores
    assert torch.equal(a.params["classifier.weight"], b.params["classifier.weight"])


def test_ties_keep_the_earliest_epoch() -> None:
    x, y = problem(spread=20.0)  # separable from the first epochs on
    (head,) = train(make_head("linear"), {"a": x}, y, [Job(rows(0, 100), rows(300, 400), "0", 1e-2)])
    assert head.best_epoch == head.val_scores.index(max(head.val_scores)) + 1
    assert len(head.losses) == max(30, head.best_epoch + 10)
