"""Finetuning of one fold: epochs over augmented batches, validation, early stopping; resumable after every epoch.

No random state outlives an epoch: order, dropout and augmentation follow from the stream of the fold and the number of
the epoch, so a run that is resumed from the model and Adam's moments repeats an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from embcache.backbones.transforms import Augmentation
from embcache.extract.worker import arithmetic
from embcache.finetune.batches import Frames, batches
from embcache.finetune.checkpoint import FoldState
from embcache.finetune.model import ImageModel, State
from embcache.probe.metrics import Metric, scorer
from embcache.probe.schedule import Schedule, Tracker
from embcache.probe.stack import Job, stream_generator


@dataclass(frozen=True, eq=False)
class Trainer:
    """A model and what the training of every fold of a run shares."""

    model: ImageModel
    frames: Frames  # of all images that train, validate or test
    y: NDArray[np.int64]  # (n,); labels of the frames; −1 where unlabeled
    augment: Augmentation  # of training images; its ``size`` is that of the network
    schedule: Schedule
    metric: str | Metric  # scores the validation images
    accumulate: int = 1  # parts in which a batch passes through the network; one step follows all of them
    pool: ThreadPoolExecutor | None = None  # augments images
    on_images: Callable[[int], object] = field(default=lambda count: None)

    def epochs(
        self, job: Job, state: FoldState, resume: Mapping[str, Tensor] | None
    ) -> Iterator[tuple[FoldState, State, State]]:
        """Train until the schedule ends or a loss or an output is not finite.

        Yields, after each epoch, the state, the tensors to resume from, and the model if it is the best so far;
        a state that has diverged comes without tensors.
        """
        model = self.model
        tracker = Tracker(self.schedule, job.lr)
        for value in state.val_scores:
            tracker.update(value)
        optimizer = torch.optim.Adam(model.trainable().values(), lr=tracker.lr)
        scaler = torch.amp.GradScaler(model.device.type, enabled=model.precision == "fp16")
        if resume is not None:
            _restore(model, optimizer, scaler, state, resume)
        while not tracker.done:
            for group in optimizer.param_groups:
                group["lr"] = tracker.lr
            lr = tracker.lr
            loss = self._train(job, optimizer, scaler, tracker.epoch + 1)
            logits = self.predict(job.val.tolist()) if math.isfinite(loss) else None
            if logits is None or not np.isfinite(logits).all():
                yield replace(state, diverged=True), {}, {}
                return
            value = scorer(self.metric, self.y[job.val.numpy()], logits.shape[1])(logits)
            better = tracker.update(value)
            state = replace(
                state,
                losses=(*state.losses, loss),
                val_scores=(*state.val_scores, value),
                lrs=(*state.lrs, lr),
                scaler=dict(scaler.state_dict()),
            )
            yield state, _tensors(model, optimizer), model.state() if better else {}

    def predict(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """Logits, float32 (len(rows), C), of the plain view of some frames."""
        plan = [[(row, None) for row in part] for part in _split(rows, self._part)]
        parts = []
        self.model.train(False)
        with torch.no_grad(), self._arithmetic():
            for pixels in batches(self.frames, plan, self.augment, self.pool):
                parts.append(self.model.logits(pixels).float().cpu().numpy())
                self.on_images(len(pixels))
        return np.concatenate(parts)

    def _train(self, job: Job, optimizer: torch.optim.Adam, scaler: torch.amp.GradScaler, epoch: int) -> float:
        """One epoch; its mean loss per image, or the loss that was not finite."""
        model = self.model
        steps = epoch_batches(job, epoch, self.schedule.batch_size)
        plan, drawn = [], 0
        for rows in steps:
            # The place in the epoch is part of the key: an image that is drawn twice looks different each time.
            keys = (f"{job.stream}\0{epoch}\0{k}\0{self.frames.ids[row]}" for k, row in enumerate(rows, drawn))
            plan.append(list(zip(rows, keys, strict=True)))
            drawn += len(rows)
        model.train()
        total = 0.0
        with self._arithmetic():
            made = batches(self.frames, plan, self.augment, self.pool)
            for step, (rows, pixels) in enumerate(zip(steps, made, strict=True)):
                # Torch's own random state, which only dropout inside a backbone reads.
                seed = hashlib.sha256(f"{job.stream}\0network\0{epoch}\0{step}".encode()).digest()[:8]
                torch.manual_seed(int.from_bytes(seed, "little") >> 1)
                y = torch.from_numpy(self.y[rows]).to(model.device)
                masks = _masks(model, len(rows), stream_generator(job.stream, f"dropout\0{epoch}\0{step}"))
                optimizer.zero_grad(set_to_none=True)
                loss = 0.0
                for part in _join_single(_split(range(len(rows)), self._part)):
                    chosen = slice(part[0], part[-1] + 1)
                    logits = model.logits(pixels[chosen], {name: mask[chosen] for name, mask in masks.items()} or None)
                    # Divided by the whole batch, so that the gradients of the parts add up to that of the batch.
                    each = F.cross_entropy(logits, y[chosen], reduction="sum") / len(rows)
                    torch.autograd.backward(scaler.scale(each))
                    loss += float(each.detach())
                if not math.isfinite(loss):
                    return loss
                scaler.step(optimizer)
                scaler.update()
                total += loss * len(rows)
                self.on_images(len(rows))
        return total / drawn

    @property
    def _part(self) -> int:
        """Number of images that pass through the network at once."""
        return -(-self.schedule.batch_size // self.accumulate)

    def _arithmetic(self) -> contextlib.AbstractContextManager[None]:
        # Of forward and backward passes; the model itself narrows its forward pass.
        return arithmetic(self.model.device, "tf32" if self.model.precision == "tf32" else "fp32")


def epoch_batches(job: Job, epoch: int, batch_size: int) -> list[list[int]]:
    """Rows of each batch of an epoch: a permutation, or weighted draws where the job oversamples."""
    generator = stream_generator(job.stream, f"order\0{epoch}")
    if job.weights is None:
        order = torch.randperm(len(job.train), generator=generator)
    else:
        order = torch.multinomial(job.weights, len(job.train), replacement=True, generator=generator)
    return _join_single(_split(job.train[order].tolist(), batch_size))


def best_epoch(state: FoldState) -> int:
    """The epoch that is kept, counted from 1: the earliest with the best validation score; 0 for none."""
    return 1 + int(np.argmax(state.val_scores)) if state.val_scores else 0


@contextlib.contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Leave torch's random state as it was; on a GPU, use kernels that give the same sums every time."""
    cuda = device.type == "cuda"
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[device] if cuda else []), warnings.catch_warnings():
        if cuda:
            # A few kernels (bicubic position embeddings, attention) have no such version; documented.
            warnings.filterwarnings("ignore", message=".*determinis.*")
            torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            if cuda:
                torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _split(rows: Sequence[int], size: int) -> list[list[int]]:
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def _join_single(parts: list[list[int]]) -> list[list[int]]:
    # A last part of one image is joined to the one before: batch normalization has no statistics over one image.
    if len(parts) > 1 and len(parts[-1]) == 1:
        return [*parts[:-2], parts[-2] + parts[-1]]
    return parts


def _masks(model: ImageModel, rows: int, generator: torch.Generator) -> State:
    """Dropout masks of the head for a batch, each value 0 or 1/(1 − rate)."""
    return {
        name: ((torch.rand(rows, units, generator=generator) >= rate) / (1 - rate)).to(model.device)
        for name, (units, rate) in model.head.dropouts().items()
    }


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
        saved = {key: tensors.get(f"adam.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
        # Laid out in memory like the parameter; the step count stays on the CPU, as Adam makes it.
        moments = {
            key: value if key == "step" else torch.empty_like(parameter).copy_(value).detach()
            for key, value in saved.items()
            if value is not None
        }
        if moments:
            optimizer.state[parameter] = moments
    if state.scaler:
        scaler.load_state_dict(dict(state.scaler))
