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
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from embcache.memory import keep_freed_memory
from embcache.probe.adam import adam_step
from embcache.probe.apply import Applicable, Params, plain_view, stacked_logits
from embcache.probe.apply import predict_logits as predict_logits
from embcache.probe.metrics import selection_score, softmax
from embcache.probe.schedule import Schedule, Tracker

_SMALL = 500_000  # parameters, of all heads together


class TrainableHead(Applicable, Protocol):
    """What the stack needs of a head; see `embcache.probe.heads` for the whole contract.

    A head may also have ``constants(x)``: untrained values, named like parameters, that it computes from a fold's
    training rows (n, D) of each backbone. ``apply`` finds them among ``params``, and they are kept with the head.
    """

    def init(self, generator: torch.Generator, dims: Mapping[str, int], n_classes: int) -> Params:
        """Fresh parameters of one head for features of ``dims[backbone]`` dimensions."""
        ...

    def dropouts(self) -> Mapping[str, tuple[int, float]]:
        """Width and rate of each dropout mask that ``apply`` wants in training."""
        ...


@dataclass(frozen=True, eq=False)
class Job:
    """One head to train.

    Attributes
    ----------
    train, val : int64 Tensor of shape (n,), (m,)
        Rows of the features. Without validation rows the head trains for ``max_epochs`` at one learning rate and the
        last epoch is kept.
    stream : str
        Names the head's random streams: initial weights, order, dropout and views follow from it alone.
    lr : float
        First learning rate.
    weights : float Tensor of shape (n,), optional
        Draw each epoch's n rows with replacement by these weights, instead of each row once.
    """

    train: torch.Tensor
    val: torch.Tensor
    stream: str
    lr: float
    weights: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class TrainedHead:
    """A trained (or solved) head: parameters of its best epoch and how it got there.

    Attributes
    ----------
    params : dict of Tensor
        All that ``apply`` needs, constants too, without the stacking axis. Empty where training diverged before a first
        usable epoch.
    best_epoch : int
        Counted from 1; 0 where there is none.
    val_score : float or None
    losses : tuple of float
        Mean training loss of each epoch.
    val_scores, lrs : tuple of float
        Validation score after, and learning rate during, each epoch.
    diverged : bool
        Training ended because the loss or an output was not finite.
    chosen : dict
        What a solved head chose on validation.
    """

    params: Params
    best_epoch: int
    val_score: float | None
    losses: tuple[float, ...]
    val_scores: tuple[float, ...]
    lrs: tuple[float, ...]
    diverged: bool = False
    chosen: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Run:
    job: Job
    tracker: Tracker
    order: torch.Generator
    dropout: torch.Generator
    views: torch.Generator
    constants: Params = field(default_factory=dict)
    best: Params = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    val_scores: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    diverged: bool = False

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
    x: Mapping[str, torch.Tensor],
    y: torch.Tensor,
    jobs: Sequence[Job],
    n_classes: int,
    metric: str,
    schedule: Schedule,
    *,
    on_epoch: Callable[[int], Any] | None = None,
) -> list[TrainedHead]:
    """Train one head for each job, all at once.

    Parameters
    ----------
    head : TrainableHead
        Gives ``init`` and ``apply``.
    x : mapping of backbone to float32 Tensor of shape (N, D) or (N, V, D)
        Features; gathered by row number, never copied whole. Of V views of every image, each draw of an epoch takes
        one, the same of every backbone; constants and validation take the first.
    y : int64 Tensor of shape (N,)
        Labels; read for the jobs' rows only.
    jobs : sequence of Job
        The heads.
    n_classes : int
        C, the width of the logits.
    metric : str
        Scores the validation rows; see `embcache.probe.metrics.score`.
    schedule : Schedule
        The optimisation.
    on_epoch : callable, optional
        Told after each epoch how many head-epochs of the ``len(jobs) * max_epochs`` planned are settled.

    Returns
    -------
    list of TrainedHead, in the order of ``jobs``
    """
    device = y.device
    dims = {backbone: features.shape[-1] for backbone, features in x.items()}
    runs = [
        _Run(
            job,
            Tracker(schedule, job.lr),
            stream_generator(job.stream, "order"),
            stream_generator(job.stream, "dropout"),
            stream_generator(job.stream, "views"),
            _constants(head, x, job),
        )
        for job in jobs
    ]
    # Heads with more steps an epoch come first, so that those still active in a step are a prefix of the stack.
    live = sorted(runs, key=lambda run: -len(run.job.train))
    fresh = [head.init(stream_generator(run.job.stream, "init"), dims, n_classes) for run in live]
    params: Params = {name: torch.stack([p[name] for p in fresh]).to(device) for name in fresh[0]} if fresh else {}
    first = {name: torch.zeros_like(p) for name, p in params.items()}
    second = {name: torch.zeros_like(p) for name, p in params.items()}
    fixed = _stacked_constants(live)
    steps = [0] * len(live)

    with _threads_for(params):
        while live:
            _train_epoch(head, x, y, live, params, fixed, first, second, steps, schedule)
            for k, run in enumerate(live):
                _validate(head, {name: p[k : k + 1] for name, p in params.items()}, x, y, run, metric)
            if on_epoch is not None:
                on_epoch(sum(schedule.max_epochs if run.finished else len(run.losses) for run in runs))
            keep = [k for k, run in enumerate(live) if not run.finished]
            if len(keep) < len(live):
                chosen = torch.tensor(keep, dtype=torch.int64, device=device)
                params, first, second = ({n: t[chosen] for n, t in s.items()} for s in (params, first, second))
                live, steps = [live[k] for k in keep], [steps[k] for k in keep]
                fixed = _stacked_constants(live)
    return [_trained(run) for run in runs]


def _constants(head: TrainableHead, x: Mapping[str, torch.Tensor], job: Job) -> Params:
    """Untrained values of one head, from its training rows."""
    compute = getattr(head, "constants", None)
    if compute is None:
        return {}
    constants: Params = compute({b: plain_view(f)[job.train.to(f.device)] for b, f in x.items()})
    return constants


def _stacked_constants(live: Sequence[_Run]) -> Params:
    return {name: torch.stack([run.constants[name] for run in live]) for name in live[0].constants} if live else {}


@contextmanager
def _threads_for(params: Params) -> Iterator[None]:
    """One thread for a small stack.

    Its steps are over before a second thread has started, and on a busy machine the wait for that thread takes ten
    times as long as the work. The gradients of a large one are tens of megabytes, freed after each step and wanted
    again in the next.
    """
    before = torch.get_num_threads()
    if sum(p.numel() for p in params.values()) < _SMALL:
        torch.set_num_threads(1)
    else:
        keep_freed_memory()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train_epoch(
    head: TrainableHead,
    x: Mapping[str, torch.Tensor],
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
    size = schedule.batch_size
    orders = [_draw_epoch(run) for run in live]
    n_views = max(features.shape[1] if features.dim() == 3 else 1 for features in x.values())
    views = [_draw_views(run, n_views) for run in live]
    sums = [0.0] * len(live)
    for start in range(0, len(orders[0]), size):
        batches = [order[start : start + size] for order in orders if len(order) > start]
        for part in _equal_lengths(batches):
            rows = torch.stack(batches[part]).to(y.device)  # (heads of the part, their batch)
            view = torch.stack([v[start : start + rows.shape[1]] for v in views[part]]).to(y.device)
            masks = _dropout_masks(head, live[part], rows.shape[1], y.device)
            leaves = {name: p[part].detach().requires_grad_() for name, p in params.items()}
            given = {**leaves, **{name: c[part] for name, c in fixed.items()}}
            batch = {b: features[rows] if features.dim() == 2 else features[rows, view] for b, features in x.items()}
            logits = head.apply(given, batch, masks)
            each = F.cross_entropy(logits.flatten(0, 1), y[rows].flatten(), reduction="none").view(rows.shape)
            losses = each.mean(1)
            # Heads share no parameter, so the gradient of the sum is the gradient of each.
            gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
            steps[part] = [step + 1 for step in steps[part]]
            lrs = [run.tracker.lr for run in live[part]]
            for (name, p), gradient in zip(leaves.items(), gradients, strict=True):
                adam_step(p.detach(), gradient, first[name][part], second[name][part], steps[part], lrs)
            for k, value in enumerate(losses.tolist(), start=part.start):
                sums[k] += value * rows.shape[1]
    for run, total in zip(live, sums, strict=True):
        run.losses.append(total / len(run.job.train))
        run.lrs.append(run.tracker.lr)


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
        return torch.zeros(n, dtype=torch.int64)
    return torch.randint(n_views, (n,), generator=run.views)


def _equal_lengths(batches: Sequence[torch.Tensor]) -> list[slice]:
    """Neighbouring heads whose batches are equally long: one stacked step each, and no padding.

    Heads are sorted by their number of rows, so only last, partial batches differ. A padded batch would be rounded
    otherwise than the one a head has alone, and attention's vanishing gradients make much of that.
    """
    lengths = [len(batch) for batch in batches]
    starts = [k for k in range(len(lengths)) if k == 0 or lengths[k] != lengths[k - 1]]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(lengths)], strict=True)]


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


def _validate(
    head: TrainableHead, params: Params, x: Mapping[str, torch.Tensor], y: torch.Tensor, run: _Run, metric: str
) -> None:
    """Score one head (stacking axis of 1) after an epoch and keep its parameters where it is the best so far."""
    params = {**params, **{name: c[None] for name, c in run.constants.items()}}
    logits = stacked_logits(head, params, x, run.job.val)
    run.diverged = not (math.isfinite(run.losses[-1]) and bool(np.isfinite(logits).all()))
    if run.diverged:
        run.val_scores.append(-math.inf)
        return
    better = True
    if len(run.job.val):
        value = selection_score(metric, y[run.job.val.to(y.device)].cpu().numpy(), softmax(logits))
        run.val_scores.append(value)
        better = run.tracker.update(value)
    if better:
        run.best = {name: p[0].clone() for name, p in params.items()}


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
