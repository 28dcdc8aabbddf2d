"""From rows and labels to trained or solved heads: jobs with their oversampling, and `fit` for a head on arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from embcache.errors import ProtocolError
from embcache.probe.feature_rows import FeatureRows, as_rows
from embcache.probe.metrics import Metric, scorer, softmax
from embcache.probe.schedule import Schedule
from embcache.probe.solve import SolvedHead, is_solved
from embcache.probe.stack import (
    Applicable,
    Job,
    TrainableHead,
    TrainedHead,
    predict_logits,
    stream_generator,
    train_stack,
)

_LARGEST_STACK = 100_000_000
"""Parameters that one stack may hold; with gradients, moments and best epochs some 2 GB."""


def is_balanced(labels: NDArray[np.int64], n_classes: int) -> bool:
    """Whether class counts are equal, but for a remainder of one."""
    counts = np.bincount(labels, minlength=n_classes)
    return int(counts.max() - counts.min()) <= 1


def seen_shares(labels: NDArray[np.int64], n_classes: int, weighs: bool) -> list[float]:
    """Share of each class among what training sees of rows with these labels.

    ``weighs``: the head takes the classes that occur alike where they are not balanced.
    """
    counts = np.bincount(labels, minlength=n_classes).astype(np.float64)
    if weighs and not is_balanced(labels, n_classes):
        counts = (counts > 0).astype(np.float64)
    return (counts / counts.sum()).tolist()  # type: ignore[no-any-return]


def make_job(
    labels: NDArray[np.int64], train: NDArray[np.int64], val: NDArray[np.int64], n_classes: int, stream: str, lr: float
) -> Job:
    """A job that oversamples where its training rows are not balanced (Section A, and the choice for all datasets).

    An unbalanced epoch is as many weighted draws with replacement as there are rows, every class equally likely.

    Shapes: labels (N,).
    """
    # The result depends on which rows train, not on how they were listed.
    train, val = np.sort(train), np.sort(val)
    y = labels[train]
    weights = None
    if not is_balanced(y, n_classes):
        weights = torch.from_numpy(1.0 / np.bincount(y)[y])
    return Job(torch.from_numpy(train), torch.from_numpy(val), stream, lr, weights)


def train_jobs(
    head: Applicable,
    x: Mapping[str, torch.Tensor] | FeatureRows,
    y: torch.Tensor,
    jobs: Sequence[Job],
    n_classes: int,
    metric: str | Metric,
    schedule: Schedule,
    *,
    on_epoch: Callable[[int], Any] | None = None,
) -> list[TrainedHead]:
    """Train (all as one stack, or as few as memory allows) or solve a head for each job.

    Parameters and return value as of `embcache.probe.stack.train_stack`; a head that is solved has neither losses nor
    epochs. How jobs are divided among stacks changes no result.
    """
    tell, rows = on_epoch or (lambda done: None), as_rows(x)
    if is_solved(head):
        solved = []
        for number, job in enumerate(jobs, start=1):
            solved.append(_solve(head, rows, y, job, n_classes, metric))
            tell(number * schedule.max_epochs)
        return solved
    trainable = cast("TrainableHead", head)
    width = max(1, _LARGEST_STACK // size_of(trainable, rows.dims, n_classes))
    trained: list[TrainedHead] = []
    for start in range(0, len(jobs), width):

        def told(done: int, before: int = start * schedule.max_epochs) -> None:
            tell(before + done)

        trained += train_stack(
            trainable,
            rows,
            y,
            jobs[start : start + width],
            n_classes,
            metric,
            schedule,
            on_epoch=told,
        )
    return trained


def size_of(head: TrainableHead, dims: Mapping[str, int], n_classes: int) -> int:
    """How many numbers one head trains."""
    return sum(p.numel() for p in head.init(stream_generator("", "count"), dims, n_classes).values())


def best_of(trained: Sequence[TrainedHead]) -> int:
    """Which of several heads did best on validation: the first of equals, one without a model only where none has."""
    scores = [(bool(t.params), -np.inf if t.val_score is None else t.val_score) for t in trained]
    return scores.index(max(scores))


def _solve(
    head: SolvedHead, x: FeatureRows, y: torch.Tensor, job: Job, n_classes: int, metric: str | Metric
) -> TrainedHead:
    def take(rows: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        return x.gather(rows), y[rows.to(y.device)]

    train, labels = take(job.train)
    failed = TrainedHead({}, 0, None, (), (), (), diverged=True)
    held, held_labels = take(job.val) if len(job.val) else (None, None)
    if not all(torch.isfinite(features).all() for features in [*train.values(), *(held or {}).values()]):
        return failed
    solved = head.solve(train, labels, held, held_labels, n_classes, metric)
    if held_labels is None:
        return TrainedHead(solved.params, 0, None, (), (), (), chosen=solved.chosen)
    logits = predict_logits(head, solved.params, x, job.val)
    if not np.isfinite(logits).all():
        return failed
    value = scorer(metric, held_labels.cpu().numpy(), n_classes)(logits)
    return TrainedHead(solved.params, 0, value, (), (), (), chosen=solved.chosen)


@dataclass(frozen=True, eq=False)
class FittedHead:
    """A trained or solved head that predicts."""

    head: Applicable
    trained: TrainedHead
    dims: dict[str, int]  # features it was trained on, in their order
    n_classes: int

    def predict_proba(self, x: Mapping[str, ArrayLike]) -> NDArray[np.float64]:
        """Class probabilities, float64 of shape (n, C), from features of shape (n, D) of each backbone."""
        features = _tensors(x)
        found = {backbone: features[backbone].shape[1] for backbone in self.dims if backbone in features}
        if found != self.dims:
            raise ValueError(f"features of {self.dims} are needed, not of {found}")
        n = len(next(iter(features.values())))
        if n == 0:
            return np.zeros((0, self.n_classes))
        chosen = {backbone: features[backbone] for backbone in self.dims}
        return softmax(predict_logits(self.head, self.trained.params, chosen, torch.arange(n)))


def fit(
    head: Applicable,
    x: Mapping[str, ArrayLike],
    y: ArrayLike,
    *,
    x_val: Mapping[str, ArrayLike] | None = None,
    y_val: ArrayLike | None = None,
    metric: str | None = None,
    seed: int = 0,
    schedule: Schedule | None = None,
) -> FittedHead:
    """Train or solve one head on arrays.

    Parameters
    ----------
    head : TrainableHead or SolvedHead
        The head; see `embcache.probe.heads`.
    x : mapping of backbone to array-like of shape (n, D)
        Training features, raw.
    y : array-like of int, shape (n,)
        Labels 0 … C − 1.
    x_val, y_val : optional
        Validation rows, which choose the epoch (or what a solved head chooses); without them the head trains for all
        epochs.
    metric : str, optional
        Scores the validation rows. Default: AUC for two classes, macro AUC for more.
    seed : int
        Of initial weights, order and dropout; a solved head has none of them.
    schedule : Schedule, optional
        The optimisation; default: the protocol's.

    Raises
    ------
    ProtocolError
        Training diverged before a first usable epoch.
    ValueError
        No backbone, no rows, or lengths that differ.
    """
    labels = np.asarray(y, dtype=np.int64)
    features = _tensors(x)
    n, n_classes = len(labels), int(labels.max(initial=0)) + 1
    val_labels = np.zeros(0, dtype=np.int64)
    if x_val is not None:
        val_labels = np.asarray(y_val, dtype=np.int64)
        held = _tensors(x_val)
        features = {backbone: torch.cat([f, held[backbone]]) for backbone, f in features.items()}
    if not features or n == 0 or any(len(f) != n + len(val_labels) for f in features.values()):
        raise ValueError(f"{n} labels and {len(val_labels)} validation labels do not fit the features")
    both = np.concatenate([labels, val_labels])
    plan = schedule or Schedule()
    job = make_job(both, np.arange(n), np.arange(n, len(both)), n_classes, f"{seed}\0fit", plan.lr)
    chosen = metric or ("auc" if n_classes == 2 else "macro_auc")
    (trained,) = train_jobs(head, features, torch.from_numpy(both), [job], n_classes, chosen, plan)
    if not trained.params:
        raise diverged_error("the head", None if is_solved(head) else plan.lr)
    return FittedHead(head, trained, {backbone: f.shape[1] for backbone, f in features.items()}, n_classes)


def diverged_error(what: str, lr: float | None) -> ProtocolError:
    """The error for a head without a model: no finite loss in its first epoch, or (no rate) features not finite."""
    look = "look for features that are not finite: embcache info"
    if lr is None:
        return ProtocolError(
            f"{what} cannot be solved",
            expected="finite features",
            found="features or outputs that are not numbers",
            fix=look,
        )
    return ProtocolError(
        f"training of {what} diverged in its first epoch",
        expected="finite losses",
        found=f"a loss or an output that is not a number, at learning rate {lr:g}",
        fix=f"--lr {lr / 10:g}, or {look}",
    )


def _tensors(x: Mapping[str, ArrayLike]) -> dict[str, torch.Tensor]:
    return {backbone: torch.from_numpy(np.ascontiguousarray(f, dtype=np.float32)) for backbone, f in x.items()}
