"""One fold's finetuning: epochs over augmented batches, validation, early stopping; resumable after every epoch.

No random state outlives an epoch: order, dropout and augmentation follow from the fold's stream and the epoch's number,
so a run resumed from the model and Adam's moments repeats an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from embcache.extract.augment import Augmentation
from embcache.extract.worker import arithmetic
from embcache.finetune.batches import Draw, Frames, batches
from embcache.finetune.checkpoint import FoldState
from embcache.finetune.model import ImageModel, State
from embcache.probe.metrics import Metric, scorer
from embcache.probe.schedule import Schedule, Tracker
from embcache.probe.stack import Job, stream_generator

Save = Callable[[FoldState, State, State | None], FoldState]
"""(state after an epoch, tensors to resume from, the model where it is the best so far) → the state as it was saved."""


@dataclass(frozen=True, eq=False)
class Setting:
    """What the training of every fold of a run shares."""

    frames: Frames  # of all images that train, validate or test
    y: NDArray[np.int64]  # (n,); labels of the frames; −1 where unlabelled
    augment: Augmentation  # of training images; its ``size`` is the network's
    schedule: Schedule  # the optimisation
    metric: str | Metric  # scores the validation images
    accumulate: int = 1  # parts in which a batch goes through the network; one step follows all of them
    pool: ThreadPoolExecutor | None = None  # augments images
    on_images: Callable[[int], object] = field(default=lambda count: None)


def epoch_batches(job: Job, epoch: int, batch_size: int) -> list[list[int]]:
    """Rows of each batch of an epoch: a permutation, or weighted draws where the job oversamples.

    A last batch of one image is joined to the one before: batch normalisation has no statistics over one image.
    """
    generator = stream_generator(job.stream, f"order\0{epoch}")
    if job.weights is None:
        order = torch.randperm(len(job.train), generator=generator)
    else:
        order = torch.multinomial(job.weights, len(job.train), replacement=True, generator=generator)
    rows = job.train[order].tolist()
    parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return _join_single(parts)


def train_fold(
    model: ImageModel, job: Job, setting: Setting, save: Save, *, state: FoldState, resume: Mapping[str, Tensor] | None
) -> FoldState:
    """Train until the schedule ends or a loss or an output is not finite."""
    schedule = setting.schedule
    tracker = Tracker(schedule, job.lr)
    for value in state.val_scores:
        tracker.update(value)
    named = model.trainable()
    optimizer = torch.optim.Adam(named.values(), lr=tracker.lr)
    scaler = torch.amp.GradScaler(model.device.type, enabled=model.precision == "fp16")
    if resume is not None:
        _restore(model, optimizer, scaler, state, resume)
    with _repeatable(model):
        while not tracker.done:
            for group in optimizer.param_groups:
                group["lr"] = tracker.lr
            epoch, lr = tracker.epoch + 1, tracker.lr
            loss = _train_epoch(model, job, setting, optimizer, scaler, epoch)
            logits = predict_logits(model, setting, job.val.tolist()) if math.isfinite(loss) else None
            if logits is None or not np.isfinite(logits).all():
                return replace(state, diverged=True)
            value = scorer(setting.metric, setting.y[job.val.numpy()], logits.shape[1])(logits)
            better = tracker.update(value)
            state = replace(
                state,
                losses=(*state.losses, loss),
                val_scores=(*state.val_scores, value),
                lrs=(*state.lrs, lr),
                scaler=dict(scaler.state_dict()),
            )
            state = save(state, _tensors(model, optimizer), model.state() if better else None)
    return state


def best_epoch(state: FoldState) -> int:
    """The epoch that is kept, counted from 1: the earliest of those with the best validation score; 0 for none."""
    return 1 + int(np.argmax(state.val_scores)) if state.val_scores else 0


def finished(state: FoldState, schedule: Schedule, lr: float) -> bool:
    """Whether no epoch is left to train."""
    tracker = Tracker(schedule, lr)
    for value in state.val_scores:
        tracker.update(value)
    return state.diverged or tracker.done


def predict_logits(model: ImageModel, setting: Setting, rows: Sequence[int]) -> NDArray[np.float32]:
    """Logits, float32 (len(rows), C), of the plain view of some frames."""
    size = _part_size(setting)
    plan = [[Draw(row, None) for row in rows[start : start + size]] for start in range(0, len(rows), size)]
    parts = []
    model.train(False)
    with torch.no_grad(), _flags(model):
        for pixels in batches(setting.frames, plan, setting.augment, setting.pool):
            parts.append(model.logits(pixels).float().cpu().numpy())
            setting.on_images(len(pixels))
    return np.concatenate(parts)


def _train_epoch(
    model: ImageModel,
    job: Job,
    setting: Setting,
    optimizer: torch.optim.Adam,
    scaler: torch.amp.GradScaler,
    epoch: int,
) -> float:
    """One epoch; its mean loss per image, or the loss that was not finite."""
    steps = epoch_batches(job, epoch, setting.schedule.batch_size)
    plan, drawn = [], 0
    for rows in steps:
        # The place in the epoch is part of the key: an image that is drawn twice looks different each time.
        plan.append([
            Draw(row, f"{job.stream}\0{epoch}\0{drawn + k}\0{setting.frames.ids[row]}") for k, row in enumerate(rows)
        ])  # fmt: skip
        drawn += len(rows)
    model.train()
    total = 0.0
    with _flags(model):
        for step, (rows, pixels) in enumerate(
            zip(steps, batches(setting.frames, plan, setting.augment, setting.pool), strict=True)
        ):
            _seed(f"{job.stream}\0network\0{epoch}\0{step}")
            y = torch.from_numpy(setting.y[rows]).to(model.device)
            masks = _masks(model, len(rows), stream_generator(job.stream, f"dropout\0{epoch}\0{step}"))
            optimizer.zero_grad(set_to_none=True)
            loss = 0.0
            for part in _join_single(_split(list(range(len(rows))), _part_size(setting))):
                chosen = slice(part[0], part[-1] + 1)
                logits = model.logits(pixels[chosen], {name: mask[chosen] for name, mask in masks.items()} or None)
                # Divided by the whole batch, so that the parts' gradients add up to the batch's.
                each = F.cross_entropy(logits, y[chosen], reduction="sum") / len(rows)
                torch.autograd.backward(scaler.scale(each))
                loss += float(each.detach())
            if not math.isfinite(loss):
                return loss
            scaler.step(optimizer)
            scaler.update()
            total += loss * len(rows)
            setting.on_images(len(rows))
    return total / drawn


def _part_size(setting: Setting) -> int:
    """Images that go through the network at once."""
    return -(-setting.schedule.batch_size // setting.accumulate)


def _split(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _join_single(parts: list[list[int]]) -> list[list[int]]:
    if len(parts) > 1 and len(parts[-1]) == 1:
        return [*parts[:-2], parts[-2] + parts[-1]]
    return parts


def _masks(model: ImageModel, rows: int, generator: torch.Generator) -> State:
    """The head's dropout masks for a batch, each value 0 or 1/(1 − rate)."""
    return {
        name: ((torch.rand(rows, units, generator=generator) >= rate) / (1 - rate)).to(model.device)
        for name, (units, rate) in model.head.dropouts().items()
    }


def _seed(stream: str) -> None:
    """Set torch's own random state, which only dropout inside a backbone reads."""
    torch.manual_seed(int.from_bytes(hashlib.sha256(stream.encode("utf-8")).digest()[:8], "little") >> 1)


def _flags(model: ImageModel) -> contextlib.AbstractContextManager[None]:
    """The device's arithmetic in forward and backward passes; the model itself narrows its forward pass."""
    return arithmetic(model.device, "tf32" if model.precision == "tf32" else "fp32")


@contextlib.contextmanager
def _repeatable(model: ImageModel) -> Iterator[None]:
    """Leave torch's random state as it was; on a GPU, use kernels that give the same sums every time."""
    cuda = model.device.type == "cuda"
    with torch.random.fork_rng(devices=[model.device] if cuda else []), warnings.catch_warnings():
        before, warned = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        if cuda:
            # A few kernels (bicubic position embeddings, attention) have no such version; documented.
            warnings.filterwarnings("ignore", message=".*determinis.*")
            torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            if cuda:
                torch.use_deterministic_algorithms(before, warn_only=warned)


def _tensors(model: ImageModel, optimizer: torch.optim.Adam) -> State:
    """What training is resumed from: the model, and Adam's moments and step counts."""
    tensors = {f"model.{name}": value for name, value in model.state().items()}
    for name, parameter in model.trainable().items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"adam.{key}.{name}"] = value
    return tensors


def _restore(
    model: ImageModel,
    optimizer: torch.optim.Adam,
    scaler: torch.amp.GradScaler,
    state: FoldState,
    tensors: Mapping[str, Tensor],
) -> None:
    model.load({name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")})
    for name, parameter in model.trainable().items():
        moments: dict[str, Any] = {}
        for key in ("step", "exp_avg", "exp_avg_sq"):
            value = tensors.get(f"adam.{key}.{name}")
            if value is not None:
                # Laid out in memory like the parameter; the step count stays on the CPU, as Adam makes it.
                moments[key] = value if key == "step" else torch.empty_like(parameter).copy_(value).detach()
        if moments:
            optimizer.state[parameter] = moments
    if state.scaler:
        scaler.load_state_dict(dict(state.scaler))
