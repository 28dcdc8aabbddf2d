"""Heads and their training: the contract, many heads of one sort trained as one stack, and `fit` for arrays.

Parameters of a stack carry a leading axis of K heads, so a step of all folds, seeds and learning rates is one batched
step. Each head keeps its own random streams, learning rate, plateau, early stop and best epoch; its losses are those it
would have alone. A finished head leaves the stack.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.optim.adam import adam

from embcache.cores import keep_freed_memory
from embcache.probe.feature_rows import FeatureRows, as_rows
from embcache.probe.feature_rows import stream_generator as stream_generator
from embcache.probe.layers import Params, Standard, Tensors
from embcache.probe.metrics import Metric, scorer
from embcache.probe.schedule import Schedule, Tracker, diverged_error
from embcache.targets import Target, as_target
from embcache.targets.target import finish

_LARGEST_STACK = 100_000_000  # parameters; with gradients, moments and best epochs some 2 GB
_SMALL = 500_000  # parameters, of all heads together

# Rows are cut alike however many heads are scored, as the products of a part are rounded by its length: a head's
# logits, and so its best epoch, are those it has alone.
_ROWS = 512
_HEADS = 4


class Head(ABC):
    """What is trained or solved on cached features; a subclass of `TrainedHead` or `ClosedFormHead`.

    A head is a frozen dataclass: its fields are its hyperparameters, whose values are JSON data. Sizes come from the
    features. `embcache.testing.check_head` checks a head against this contract.
    """

    name: ClassVar[str] = ""  # under which it is registered; empty for a head that is not
    summary: ClassVar[str] = ""  # one line for ``embcache heads``
    fuses: ClassVar[bool] = False  # whether it takes several backbones at once
    weighs: ClassVar[bool] = True  # whether the classes of an unbalanced training set weigh alike
    fits: ClassVar[tuple[str, ...]] = ("classes", "ordinal")  # kinds of targets that it is trained for
    keeps_models: ClassVar[bool] = True  # whether its parameters are all that a prediction needs

    @abstractmethod
    def apply(self, params: Params, x: Tensors, masks: Tensors | None = None) -> Tensor:
        """Logits (K, B, C) of K heads; of a number the standardized one, C = 1.

        Shapes: params (K, …); x float32 (K, B, D) of each backbone; masks, in training, (K, B, width) with values 0 or
        1 / (1 − rate).
        """

    def count_parameters(self, dims: Mapping[str, int], n_classes: int) -> int:
        """Number of trained parameters for features of ``dims[backbone]`` dimensions; 0 for a closed-form head."""
        return 0

    @property
    def place(self) -> str:
        """``module:name`` of its class."""
        return f"{type(self).__module__}:{type(self).__qualname__}"

    def parameters(self) -> dict[str, Any]:
        """Hyperparameters that differ from their defaults."""
        values = ((f, getattr(self, f.name)) for f in dataclasses.fields(self))  # type: ignore[arg-type]
        return {f.name: value for f, value in values if value != f.default}

    def fit(self, x: Mapping[str, ArrayLike], y: ArrayLike, **options: Any) -> FittedHead:
        """Train or solve the head on features (n, D) and labels (n,); options as for `fit`."""
        return fit(self, x, y, **options)


class TrainedHead(Head):
    """A head that is trained by gradient steps.

    With ``standardized``, ``params`` also hold the mean and scale of every training feature, which are not trained and
    which `apply` uses through `embcache.probe.layers.standardize`.
    """

    standardized: ClassVar[bool] = False
    fits = ("classes", "ordinal", "findings", "number")

    @abstractmethod
    def init(self, generator: torch.Generator, dims: Mapping[str, int], n_classes: int) -> Params:
        """Fresh parameters of one head, without the stacking axis; the generator alone decides their values."""

    def dropouts(self) -> Mapping[str, tuple[int, float]]:
        """Width and rate of each dropout mask that `apply` takes in training."""
        return {}

    def draw_masks(self, rows: int, streams: Sequence[torch.Generator]) -> Params:
        """Dropout masks (K, ``rows``, width) of a batch, each head's from its own stream."""
        return {
            name: torch.stack([(torch.rand(rows, width, generator=s) >= rate) / (1 - rate) for s in streams])
            for name, (width, rate) in self.dropouts().items()
        }

    def count_parameters(self, dims: Mapping[str, int], n_classes: int) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.init(stream_generator("", "count"), dims, n_classes).values())


@dataclass(frozen=True, eq=False)
class Solution:
    """A solved head."""

    params: Params  # what ``apply`` needs, without the stacking axis, on the device of the features
    chosen: dict[str, Any] = field(default_factory=dict)  # what validation chose, as JSON data


class ClosedFormHead(Head):
    """A head that is solved: no epochs, no learning rate, no random stream."""

    weighs = False

    @abstractmethod
    def solve(
        self, x: Tensors, y: Tensor, x_val: Tensors | None, y_val: Tensor | None, n_classes: int, metric: str | Metric
    ) -> Solution:
        """Solve one head; validation, None where there is none, chooses by ``metric``.

        Shapes: x, x_val float32 (n, D), (m, D) of each backbone; y, y_val int64 (n,), (m,) of 0 … ``n_classes`` − 1; of
        findings int64 (n, L), −1 unknown, with L in the place of ``n_classes``; of a number float64 (n,), standardized,
        with 1. Only kinds of targets that the head ``fits`` are given; `apply` gives logits, or standardized numbers.
        """


@dataclass(frozen=True, eq=False)
class Job:
    """The rows, the random stream and the learning rate of one head to train."""

    train: Tensor
    val: Tensor
    stream: str  # names the head's random streams: initial weights, order, dropout and views follow from it alone
    lr: float  # first learning rate
    weights: Tensor | None = None  # (n,); an unbalanced epoch is as many draws with replacement, classes equally likely

    def draw(self, generator: torch.Generator) -> Tensor:
        """Rows of one epoch, in order."""
        n = len(self.train)
        if self.weights is None:
            return self.train[torch.randperm(n, generator=generator)]
        return self.train[torch.multinomial(self.weights, n, replacement=True, generator=generator)]


@dataclass(eq=False)
class TrainedModel:
    """A trained or solved head: parameters of its best epoch and how it got there."""

    params: Params  # what ``apply`` needs, without the stacking axis; empty if training failed
    best_epoch: int = 0  # counted from 1; 0 where there is none
    val_score: float | None = None
    losses: list[float] = field(default_factory=list)  # mean training loss of each epoch
    val_scores: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    diverged: bool = False  # training ended because the loss or an output was not finite
    chosen: Mapping[str, Any] = field(default_factory=dict)  # what a closed-form head chose on validation


def make_job(
    labels: NDArray[Any], train: NDArray[np.int64], val: NDArray[np.int64], of: int | Target, stream: str, lr: float
) -> Job:
    """A job that oversamples where its training rows are not balanced (Section A, and the choice for all datasets)."""
    # The result depends on which rows train, not on how they were listed.
    train, val = np.sort(train), np.sort(val)
    weights = as_target(of).draw_weights(labels[train])
    drawn = None if weights is None else torch.from_numpy(weights)
    return Job(torch.from_numpy(train), torch.from_numpy(val), stream, lr, drawn)


def train_heads(
    head: Head,
    x: Tensors | FeatureRows,
    y: Tensor,
    jobs: Sequence[Job],
    of: int | Target,
    metric: str | Metric,
    schedule: Schedule,
    on_epoch: Callable[[int], Any] = lambda done: None,
) -> list[TrainedModel]:
    """Train (in as few stacks as memory allows) or solve a head per job; ``on_epoch`` gets the head-epochs settled.

    ``of`` is the target of the values y, or a number of classes.
    """
    rows, most, target = as_rows(x), schedule.max_epochs, as_target(of)
    trained: list[TrainedModel] = []
    if isinstance(head, ClosedFormHead):
        for job in jobs:
            trained.append(_solve(head, rows, y, job, target, metric))
            on_epoch(len(trained) * most)
        return trained
    assert isinstance(head, TrainedHead)
    width = max(1, _LARGEST_STACK // head.count_parameters(rows.dims, target.width))
    for start in range(0, len(jobs), width):
        runs = [_Run(job, y, target, metric, schedule) for job in jobs[start : start + width]]
        stack = _Stack(head, rows, y, runs, target)
        with _threads_for(stack.params):
            while stack.live:
                stack.train_epoch()
                stack.validate()
                on_epoch(start * most + sum(most if run.finished else len(run.model.losses) for run in runs))
                stack.drop_finished()
        trained += [run.model for run in runs]
    return trained


def values_at(y: Tensor, rows: Tensor) -> NDArray[Any]:
    """Values of rows, in memory."""
    return np.asarray(y[rows.to(y.device)].cpu().numpy())


class _Run:
    """One head of a stack while it trains."""

    def __init__(self, job: Job, y: Tensor, target: Target, metric: str | Metric, schedule: Schedule) -> None:
        self.job, self.tracker, self.model = job, Tracker(schedule, job.lr), TrainedModel({})
        self.order, self.dropout, self.views = (
            stream_generator(job.stream, purpose) for purpose in ("order", "dropout", "views")
        )
        self.scorer = scorer(metric, values_at(y, job.val), target) if len(job.val) else None
        self.held = hashlib.sha256(job.val.numpy().tobytes()).digest()  # heads with equal ones validate together
        self.constants: Params = {n: p.to(y.device) for n, p in target.constants(values_at(y, job.train)).items()}

    @property
    def finished(self) -> bool:
        ended = self.tracker.done if self.scorer else len(self.model.losses) >= self.tracker.schedule.max_epochs
        return self.model.diverged or ended


class _Stack:
    """Heads that train as one: parameters, Adam's moments and step counts of those that are not finished."""

    def __init__(self, head: TrainedHead, x: FeatureRows, y: Tensor, runs: Sequence[_Run], target: Target):
        self.head, self.x, self.y, self.target = head, x, y, target
        if head.standardized:
            parts = [Standard() for _ in runs]
            # One pass for all heads, in parts: a fold's training rows, widened, may take four times what they do.
            for chunk in x.chunks([run.job.train for run in runs]):
                parts[chunk.number].add(chunk.x)
            for run, part in zip(runs, parts, strict=True):
                run.constants |= part.params()
        # Heads with more steps per epoch come first: those still active in a step are neighbors in the stack.
        self.live = sorted(runs, key=lambda run: -len(run.job.train))
        fresh = [
            head.init(stream_generator(run.job.stream, "init"), x.dims, target.width) | target.init()
            for run in self.live
        ]
        names = fresh[0] if fresh else ()
        self.params: Params = {name: torch.stack([p[name] for p in fresh]).to(y.device) for name in names}
        self.first = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.steps = [0] * len(self.live)
        self.fixed = self._constants()

    def _constants(self) -> Params:
        names = self.live[0].constants if self.live else ()
        return {name: torch.stack([run.constants[name] for run in self.live]) for name in names}

    def train_epoch(self) -> None:
        """One epoch of every live head."""
        schedule, n_views = self.live[0].tracker.schedule, self.x.n_views
        orders = [run.job.draw(run.order) for run in self.live]
        # The view of each draw. A stream of its own: views change neither order nor dropout.
        views = [
            torch.randint(n_views, (len(order),), generator=run.views)
            if n_views > 1
            else torch.zeros((), dtype=torch.int64).expand(len(order))
            for run, order in zip(self.live, orders, strict=True)
        ]
        sums = torch.zeros(len(self.live), dtype=torch.float64, device=self.y.device)
        lrs = [run.tracker.lr for run in self.live]
        for step in self.x.steps(orders, views, schedule.batch_size, len(self.live[0].model.losses)):
            part, shape = step.heads, step.rows.shape
            leaves = {name: p[part].detach().requires_grad_() for name, p in self.params.items()}
            fixed = {name: c[part] for name, c in self.fixed.items()}
            masks = self.head.draw_masks(shape[1], [run.dropout for run in self.live[part]])
            masks = {name: mask.to(self.y.device) for name, mask in masks.items()}
            given = {**leaves, **fixed}
            losses = self.target.row_losses(self.head.apply(given, step.x, masks), self.y[step.rows], given).mean(1)
            # Heads share no parameter, so the gradient of the sum is the gradient of each.
            gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
            self.steps[part] = [done + 1 for done in self.steps[part]]
            parts = [
                (self.params[name][part], gradient, self.first[name][part], self.second[name][part])
                for name, gradient in zip(leaves, gradients, strict=True)
            ]
            adam_step(parts, self.steps[part], lrs[part])
            sums[part].add_(losses.detach(), alpha=shape[1])
        for run, total in zip(self.live, sums.tolist(), strict=True):
            run.model.losses.append(total / len(run.job.train))
            run.model.lrs.append(run.tracker.lr)

    def validate(self) -> None:
        """Score every live head, those with the same rows together, and keep its parameters where it is the best."""
        groups: dict[bytes, list[int]] = {}
        for k, run in enumerate(self.live):
            groups.setdefault(run.held, []).append(k)
        given = {**self.params, **self.fixed}
        of_group = [
            {n: p[k[0] : k[0] + 1] if len(k) == 1 else p[torch.tensor(k, device=p.device)] for n, p in given.items()}
            for k in groups.values()
        ]
        sets = [self.live[k[0]].job.val for k in groups.values()]
        for numbers, found in zip(groups.values(), logits_of_sets(self.head, of_group, self.x, sets), strict=True):
            for k, logits in zip(numbers, found, strict=True):
                run, model = self.live[k], self.live[k].model
                model.diverged = not (math.isfinite(model.losses[-1]) and bool(np.isfinite(logits).all()))
                value = -math.inf if model.diverged else run.scorer(logits) if run.scorer else None
                model.val_scores += [] if value is None else [value]
                if not model.diverged and (value is None or run.tracker.update(value)):
                    model.params = {name: p[k].clone() for name, p in self.params.items()} | run.constants
                    model.best_epoch, model.val_score = len(model.losses), value

    def drop_finished(self) -> None:
        """Take finished heads out of the stack."""
        keep = [k for k, run in enumerate(self.live) if not run.finished]
        if len(keep) == len(self.live):
            return
        chosen = torch.tensor(keep, dtype=torch.int64, device=self.y.device)
        self.params, self.first, self.second = (
            {name: t[chosen] for name, t in tensors.items()} for tensors in (self.params, self.first, self.second)
        )
        self.live, self.steps = [self.live[k] for k in keep], [self.steps[k] for k in keep]
        self.fixed = self._constants()


@contextmanager
def _threads_for(params: Params) -> Iterator[None]:
    """One thread for a small stack: on a busy machine the wait for a second takes ten times as long as the work."""
    before = torch.get_num_threads()
    keep_freed_memory()  # batches and gradients are megabytes, freed after each step and wanted again in the next
    if sum(p.numel() for p in params.values()) < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def adam_step(tensors: Sequence[tuple[Tensor, ...]], steps: Sequence[int], lrs: Sequence[float]) -> None:
    """One step of torch's Adam in place, each head with its own step count (this one included) and rate.

    ``tensors``: each parameter (K, …), its gradient and two moments. ``torch.optim.Adam`` has one rate per tensor.
    """
    for k, (step, lr) in enumerate(zip(steps, lrs, strict=True)):
        params, gradients, first, second = ([each[i][k] for each in tensors] for i in range(4))
        gradients = [gradient.contiguous() for gradient in gradients]
        before = [torch.tensor(float(step - 1), device=p.device) for p in params]
        adam(
            params, gradients, first, second, [], before, fused=True, amsgrad=False, beta1=0.9, beta2=0.999, lr=lr,
            weight_decay=0.0, eps=1e-8, maximize=False,
        )  # fmt: skip


def _solve(
    head: ClosedFormHead, x: FeatureRows, y: Tensor, job: Job, target: Target, metric: str | Metric
) -> TrainedModel:
    """Solve one head; without a model where features or outputs are not finite."""
    train, held = x.gather(job.train), x.gather(job.val) if len(job.val) else None
    labels, held_labels = (y[rows.to(y.device)] for rows in (job.train, job.val))
    failed = TrainedModel({}, diverged=True)
    if not all(torch.isfinite(features).all() for features in [*train.values(), *(held or {}).values()]):
        return failed
    constants = {name: p.to(y.device) for name, p in target.constants(values_at(y, job.train)).items()}
    given = [(v - constants["target.mean"]) / constants["target.scale"] if target.kind == "number" else v
             for v in (labels, held_labels)]  # fmt: skip
    solved = head.solve(train, given[0], held, given[1] if held else None, target.outputs, metric)
    params = solved.params | (constants if target.kind == "number" else {})
    if held is None:
        return TrainedModel(params, chosen=solved.chosen)
    logits = predict_logits(head, params, x, job.val)
    if not np.isfinite(logits).all():
        return failed
    value = scorer(metric, held_labels.cpu().numpy(), target)(logits)
    return TrainedModel(params, val_score=value, chosen=solved.chosen)


def best_of(trained: Sequence[TrainedModel]) -> int:
    """The best of several heads on validation: the first of equals, one without a model only where none has one."""
    scores = [(bool(t.params), -np.inf if t.val_score is None else t.val_score) for t in trained]
    return scores.index(max(scores))


def predict_logits(head: Head, params: Params, x: Tensors | FeatureRows, rows: Tensor) -> NDArray[Any]:
    """Logits of one head, shape (len(rows), C); ``params`` without the stacking axis; of views the first."""
    (logits,) = logits_of_sets(head, [{name: p[None] for name, p in params.items()}], x, [rows])
    return np.asarray(logits[0])


@torch.no_grad()
def logits_of_sets(
    head: Head, params: Sequence[Params], x: Tensors | FeatureRows, sets: Sequence[Tensor]
) -> list[NDArray[Any]]:
    """Logits (K, m, C), of numbers float64, of several stacks of heads, each for its own set (m,) of rows."""
    widths = [len(next(iter(p.values()))) for p in params]
    found: list[NDArray[Any]] = [np.zeros((width, 0, 0), np.float32) for width in widths]
    for chunk in as_rows(x).chunks(sets):
        k, width = chunk.number, widths[chunk.number]
        for first in range(0, width, _HEADS):
            heads = slice(first, min(first + _HEADS, width))
            some = {name: p[heads] for name, p in params[k].items()}
            for start in range(0, len(chunk.places), _ROWS):
                part = slice(start, start + _ROWS)
                shared = {b: f[None, part].expand(heads.stop - first, -1, -1) for b, f in chunk.x.items()}
                out = finish(some, head.apply(some, shared, None))
                logits = (out if out.dtype == torch.float64 else out.float()).cpu().numpy()
                if not found[k].size:
                    found[k] = np.empty((width, len(sets[k]), logits.shape[-1]), logits.dtype)
                found[k][heads, chunk.places[part].numpy()] = logits
    return found


@dataclass(frozen=True, eq=False)
class FittedHead:
    """A trained or solved head that predicts."""

    head: Head
    trained: TrainedModel
    dims: dict[str, int]  # features it was trained on, in their order
    target: Target

    def predict_proba(self, x: Mapping[str, ArrayLike]) -> NDArray[np.float64]:
        """Probabilities, or numbers, float64 of shape (n, C), from features of shape (n, D) of each backbone."""
        features = _tensors(x)
        found = {backbone: features[backbone].shape[1] for backbone in self.dims if backbone in features}
        if found != self.dims:
            raise ValueError(f"features of {self.dims} are needed, not of {found}")
        n = len(next(iter(features.values())))
        if n == 0:
            return np.zeros((0, self.target.outputs))
        chosen = {backbone: features[backbone] for backbone in self.dims}
        return self.target.predicted(predict_logits(self.head, self.trained.params, chosen, torch.arange(n)))


class FitOptions(TypedDict, total=False):
    """Options of `fit`."""

    metric: str | None
    seed: int
    schedule: Schedule | None
    target: Target | None


def fit(
    head: Head,
    x: Mapping[str, ArrayLike],
    y: ArrayLike,
    *,
    x_val: Mapping[str, ArrayLike] | None = None,
    y_val: ArrayLike | None = None,
    **options: Unpack[FitOptions],
) -> FittedHead:
    """Train or solve one head on arrays: raw features (n, D) of each backbone and values as its target has them.

    Without a target y are labels (n,) of 0 … C − 1. Validation rows choose the epoch, or the solution; without them the
    head trains for all epochs. The default metric is the target's (of more than two classes macro AUC), the default
    schedule that of the protocol.

    Raises
    ------
    ProtocolError
        Training diverged before a first usable epoch.
    ValueError
        No backbone, no rows, or lengths that differ.
    """
    of = options.get("target") or as_target(int(np.max(y, initial=0)) + 1)
    val_labels = of.blank(0)
    labels = np.asarray(y, dtype=val_labels.dtype)
    features = _tensors(x)
    n = len(labels)
    if x_val is not None:
        val_labels, held = np.asarray(y_val, dtype=labels.dtype), _tensors(x_val)
        features = {backbone: torch.cat([f, held[backbone]]) for backbone, f in features.items()}
    if not features or n == 0 or any(len(f) != n + len(val_labels) for f in features.values()):
        raise ValueError(f"{n} labels and {len(val_labels)} validation labels do not fit the features")
    both = np.concatenate([labels, val_labels])
    plan, metric = options.get("schedule") or Schedule(), options.get("metric") or of.metric
    job = make_job(both, np.arange(n), np.arange(n, len(both)), of, f"{options.get('seed', 0)}\0fit", plan.lr)
    (trained,) = train_heads(head, features, torch.from_numpy(both), [job], of, metric, plan)
    if not trained.params:
        raise diverged_error("the head", None if isinstance(head, ClosedFormHead) else plan.lr)
    return FittedHead(head, trained, {backbone: f.shape[1] for backbone, f in features.items()}, of)


def _tensors(x: Mapping[str, ArrayLike]) -> dict[str, Tensor]:
    return {backbone: torch.from_numpy(np.ascontiguousarray(f, dtype=np.float32)) for backbone, f in x.items()}
