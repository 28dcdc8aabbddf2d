"""Trains many heads of one kind as one model: parameters carry a leading axis of K heads.

Folds, seeds and learning rates differ only in their rows, random streams and learning rate, so a step of all of them
is one batched step. Each head keeps its own sample order, dropout stream, learning rate, plateau, early stop and best
epoch; its losses are those it would have alone. A finished head leaves the stack.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch.optim.adam import adam

from embcache.memory import keep_freed_memory
from embcache.probe.feature_rows import FeatureRows, as_rows
from embcache.probe.metrics import Metric, scorer
from embcache.probe.schedule import Schedule, Tracker
from embcache.probe.standard import constants_of

_SMALL = 500_000  # parameters, of all heads together
Params = dict[str, torch.Tensor]

# Rows are cut alike however many heads are scored, as the products of a part are rounded by its length: a head's
# logits, and so its best epoch, are those it has alone.
_ROWS = 512
_HEADS = 4


class Applicable(Protocol):
    """What prediction needs of a head, trained or solved."""

    def apply(
        self, params: Params, x: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor] | None
    ) -> torch.Tensor:
        """Logits of shape (K, B, C) from parameters (K, …), features (K, B, D) each and dropout masks (K, B, width)."""
        ...


class TrainableHead(Applicable, Protocol):
    """What the stack needs of a head; see `embcache.probe.heads` for the whole contract.

    A head may also have ``constants(x)``: untrained values, named like parameters, that it computes from a fold's
    training rows (n, D) of each backbone. ``apply`` finds them among ``params``, and they are kept with the head. To be
    trained on streamed features it then also has ``constants_in_parts()``, which makes something that takes in rows by
    ``add(x)`` and gives the values by ``params()``: `embcache.probe.standard.Standard`.
    """

    def init(self, generator: torch.Generator, dims: Mapping[str, int], n_classes: int) -> Params:
        """Fresh parameters of one head for features of ``dims[backbone]`` dimensions."""
        ...

    def dropouts(self) -> Mapping[str, tuple[int, float]]:
        """Width and rate of each dropout mask that ``apply`` wants in training."""
        ...


@dataclass(frozen=True, eq=False)
class Job:
    """One head to train."""

    train: torch.Tensor
    val: torch.Tensor
    stream: str  # names the head's random streams: initial weights, order, dropout and views follow from it alone
    lr: float  # first learning rate
    weights: torch.Tensor | None = None  # (n,)


@dataclass(frozen=True, eq=False)
class TrainedHead:
    """A trained (or solved) head: parameters of its best epoch and how it got there."""

    params: Params  # all that ``apply`` needs, constants too, without the stacking axis
    best_epoch: int  # counted from 1; 0 where there is none
    val_score: float | None
    losses: tuple[float, ...]  # mean training loss of each epoch
    val_scores: tuple[float, ...]
    lrs: tuple[float, ...]
    diverged: bool = False  # training ended because the loss or an output was not finite
    chosen: Mapping[str, Any] = field(default_factory=dict)  # what a solved head chose on validation


@dataclass(eq=False)
class _Run:
    job: Job
    tracker: Tracker
    order: torch.Generator
    dropout: torch.Generator
    views: torch.Generator
    scorer: Callable[[NDArray[np.float64]], float] | None
    constants: Params = field(default_factory=dict)
    best: Params = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    val_scores: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    diverged: bool = False

    @cached_property
    def held(self) -> bytes:
        """Which rows validate: heads of which these are equal validate on the same ones."""
        return hashlib.sha256(self.job.val.numpy().tobytes()).digest()

    @property
    def finished(self) -> bool:
        if len(self.job.val):
            return self.diverged or self.tracker.done
        return self.diverged or len(self.losses) >= self.tracker.schedule.max_epochs


def stream_generator(stream: str, purpose: str) -> torch.Generator:
    """A random stream of its own for each (stream, purpose), on the CPU whatever the device."""
    digest = hashlib.sha256(f"{stream}\0{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def train_stack(
    head: TrainableHead,
    x: Mapping[str, torch.Tensor] | FeatureRows,
    y: torch.Tensor,
    jobs: Sequence[Job],
    n_classes: int,
    metric: str | Metric,
    schedule: Schedule,
    *,
    on_epoch: Callable[[int], Any] | None = None,
) -> list[TrainedHead]:
    """Train one head for each job, all at once.

    Shapes: x (N, D); y (N,).
    """
    rows, device = as_rows(x), y.device
    runs = [_start(job, y, n_classes, metric, schedule) for job in jobs]
    for run, constants in zip(runs, constants_of(head, rows, [job.train for job in jobs]), strict=True):
        run.constants = constants
    # Heads with more steps an epoch come first: those that are still active in a step are neighbours in the stack.
    live = sorted(runs, key=lambda run: -len(run.job.train))
    fresh = [head.init(stream_generator(run.job.stream, "init"), rows.dims, n_classes) for run in live]
    params: Params = {name: torch.stack([p[name] for p in fresh]).to(device) for name in fresh[0]} if fresh else {}
    first = {name: torch.zeros_like(p) for name, p in params.items()}
    second = {name: torch.zeros_like(p) for name, p in params.items()}
    fixed = _stacked_constants(live)
    steps = [0] * len(live)

    with _threads_for(params):
        while live:
            _train_epoch(head, rows, y, live, params, fixed, first, second, steps, schedule)
            _validate(head, rows, live, {**params, **fixed}, params)
            if on_epoch is not None:
                on_epoch(sum(schedule.max_epochs if run.finished else len(run.losses) for run in runs))
            keep = [k for k, run in enumerate(live) if not run.finished]
            if len(keep) < len(live):
                chosen = torch.tensor(keep, dtype=torch.int64, device=device)
                params, first, second = ({n: t[chosen] for n, t in s.items()} for s in (params, first, second))
                live, steps = [live[k] for k in keep], [steps[k] for k in keep]
                fixed = _stacked_constants(live)
    return [_trained(run) for run in runs]


def _start(job: Job, y: torch.Tensor, n_classes: int, metric: str | Metric, schedule: Schedule) -> _Run:
    own = scorer(metric, y[job.val.to(y.device)].cpu().numpy(), n_classes) if len(job.val) else None
    order, dropout, views = (stream_generator(job.stream, purpose) for purpose in ("order", "dropout", "views"))
    return _Run(job, Tracker(schedule, job.lr), order, dropout, views, own)


def _stacked_constants(live: Sequence[_Run]) -> Params:
    return {name: torch.stack([run.constants[name] for run in live]) for name in live[0].constants} if live else {}


@contextmanager
def _threads_for(params: Params) -> Iterator[None]:
    """One thread for a small stack.

    Its steps are over before a second thread has started, and on a busy machine the wait for that thread takes ten
    times as long as the work. Batches and gradients are megabytes, freed after each step and wanted again in the next.
    """
    before = torch.get_num_threads()
    keep_freed_memory()
    if sum(p.numel() for p in params.values()) < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train_epoch(
    head: TrainableHead,
    x: FeatureRows,
    y: torch.Tensor,
    live: Sequence[_Run],
    params: Params,
    fixed: Params,
    first: Params,
    second: Params,
    steps: list[int],
    schedule: Schedule,
) -> None:
    """One epoch of every live head; parameters and moments are updated in place."""
    orders = [_draw_epoch(run) for run in live]
    views = [_draw_views(run, x.n_views) for run in live]
    sums = torch.zeros(len(live), dtype=torch.float64, device=y.device)
    lrs = [run.tracker.lr for run in live]
    for step in x.steps(orders, views, schedule.batch_size, len(live[0].losses)):
        part, shape = step.heads, step.rows.shape
        masks = _dropout_masks(head, live[part], shape[1], y.device)
        leaves = {name: p[part].detach().requires_grad_() for name, p in params.items()}
        logits = head.apply({**leaves, **{name: c[part] for name, c in fixed.items()}}, step.x, masks)
        each = F.cross_entropy(logits.flatten(0, 1), y[step.rows].flatten(), reduction="none").view(shape)
        losses = each.mean(1)
        # Heads share no parameter, so the gradient of the sum is the gradient of each.
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
        steps[part] = [done + 1 for done in steps[part]]
        parts = [
            (params[name][part], gradient, first[name][part], second[name][part])
            for name, gradient in zip(leaves, gradients, strict=True)
        ]
        adam_step(parts, steps[part], lrs[part])
        sums[part].add_(losses.detach(), alpha=shape[1])
    for run, total in zip(live, sums.tolist(), strict=True):
        run.losses.append(total / len(run.job.train))
        run.lrs.append(run.tracker.lr)


def adam_step(tensors: Sequence[tuple[torch.Tensor, ...]], steps: Sequence[int], lrs: Sequence[float]) -> None:
    """One step of torch's Adam in place, each head with its own step count (this one included) and rate.

    ``tensors`` are each parameter, its gradient and its two moments, of shape (K, …). ``torch.optim.Adam`` itself has
    one rate per tensor, and its first step imports torch's compiler.
    """
    for k, (step, lr) in enumerate(zip(steps, lrs, strict=True)):
        params, gradients, first, second = ([each[i][k] for each in tensors] for i in range(4))
        gradients = [gradient.contiguous() for gradient in gradients]
        before = [torch.tensor(float(step - 1), device=p.device) for p in params]
        adam(
            params, gradients, first, second, [], before, fused=True, amsgrad=False, beta1=0.9, beta2=0.999, lr=lr,
            weight_decay=0.0, eps=1e-8, maximize=False,
        )  # fmt: skip


def _draw_epoch(run: _Run) -> torch.Tensor:
    """Row numbers of one epoch, in order."""
    job = run.job
    if job.weights is None:
        return job.train[torch.randperm(len(job.train), generator=run.order)]
    return job.train[torch.multinomial(job.weights, len(job.train), replacement=True, generator=run.order)]


def _draw_views(run: _Run, n_views: int) -> torch.Tensor:
    """The view of each draw of one epoch. A stream of its own: views change neither order nor dropout."""
    n = len(run.job.train)
    if n_views == 1:
        return torch.zeros((), dtype=torch.int64).expand(n)
    return torch.randint(n_views, (n,), generator=run.views)


def _dropout_masks(
    head: TrainableHead, live: Sequence[_Run], rows: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Masks of shape (K, rows, units), each value 0 or 1/(1 - rate), from each head's own stream."""
    return {
        name: torch.stack([(torch.rand(rows, units, generator=run.dropout) >= rate) / (1 - rate) for run in live]).to(
            device
        )
        for name, (units, rate) in head.dropouts().items()
    }


def _validate(head: TrainableHead, x: FeatureRows, live: Sequence[_Run], given: Params, params: Params) -> None:
    """Score every live head after an epoch and keep its parameters where it is the best so far.

    ``given`` is what heads are applied with: ``params``, and their constants. Heads that validate on the same rows are
    applied to them together.
    """
    groups: dict[bytes, list[int]] = {}
    for k, run in enumerate(live):
        groups.setdefault(run.held, []).append(k)
    of_group = [
        {name: p[k[0] : k[0] + 1] if len(k) == 1 else p[torch.tensor(k, device=p.device)] for name, p in given.items()}
        for k in groups.values()
    ]
    scored = logits_of_sets(head, of_group, x, [live[k[0]].job.val for k in groups.values()])
    logits = {
        k: part
        for numbers, found in zip(groups.values(), scored, strict=True)
        for k, part in zip(numbers, found, strict=True)
    }
    for k, run in enumerate(live):
        run.diverged = not (math.isfinite(run.losses[-1]) and bool(np.isfinite(logits[k]).all()))
        if run.diverged:
            run.val_scores.append(-math.inf)
            continue
        better = True
        if run.scorer is not None:
            value = run.scorer(logits[k])
            run.val_scores.append(value)
            better = run.tracker.update(value)
        if better:
            run.best = {name: p[k].clone() for name, p in params.items()} | run.constants


def _trained(run: _Run) -> TrainedHead:
    validated = len(run.job.val) > 0
    return TrainedHead(
        params=run.best,
        best_epoch=run.tracker.best_epoch if validated else len(run.losses) - run.diverged,
        val_score=run.tracker.best_score if validated and run.best else None,
        losses=tuple(run.losses),
        val_scores=tuple(run.val_scores),
        lrs=tuple(run.lrs),
        diverged=run.diverged,
    )


def predict_logits(
    head: Applicable, params: Params, x: Mapping[str, torch.Tensor] | FeatureRows, rows: torch.Tensor
) -> NDArray[np.float32]:
    """Logits of one head, shape (len(rows), C); ``params`` without the stacking axis; of views the first."""
    (logits,) = logits_of_sets(head, [{name: p[None] for name, p in params.items()}], x, [rows])
    return np.asarray(logits[0])


@torch.no_grad()
def logits_of_sets(
    head: Applicable,
    params: Sequence[Params],
    x: Mapping[str, torch.Tensor] | FeatureRows,
    sets: Sequence[torch.Tensor],
) -> list[NDArray[np.float32]]:
    """Logits of several stacks of heads, each over a set of rows of its own; every row is read once a set.

    Shapes: sets (m,); returns (K, m, C).
    """
    widths = [len(next(iter(p.values()))) for p in params]
    found = [np.zeros((width, 0, 0), np.float32) for width in widths]
    for chunk in as_rows(x).chunks(sets):
        k, width = chunk.number, widths[chunk.number]
        for first in range(0, width, _HEADS):
            heads = slice(first, min(first + _HEADS, width))
            asked = {name: p[heads] for name, p in params[k].items()}
            for start in range(0, len(chunk.places), _ROWS):
                part = slice(start, start + _ROWS)
                shared = {b: f[None, part].expand(heads.stop - first, -1, -1) for b, f in chunk.x.items()}
                logits = head.apply(asked, shared, None).float().cpu().numpy()
                if not found[k].size:
                    found[k] = np.empty((width, len(sets[k]), logits.shape[-1]), np.float32)
                found[k][heads, chunk.places[part].numpy()] = logits
    return found
