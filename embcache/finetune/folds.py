"""The folds of one run, one after another, with a checkpoint after every epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embcache.data.dataset import ImageDataset
from embcache.errors import StoreError
from embcache.finetune.batches import Frames
from embcache.finetune.checkpoint import CheckpointFolder, FoldState, Progress, machine
from embcache.finetune.epochs import Setting, best_epoch, predict_logits, train_fold
from embcache.finetune.finetune_plan import Asked
from embcache.finetune.model import ImageModel, State, assemble, model_file
from embcache.memory import keep_freed_memory
from embcache.probe.splits import Splits
from embcache.probe.stack import Job, make_job, stream_generator
from embcache.probe.summary import Outcome, Outputs

Tell = Callable[[int, int, str], Any]
"""Told (images settled, images planned, what is being trained)."""


def begin(
    folder: CheckpointFolder, asked: Asked, *, resume: bool | None, again: bool, say: Callable[[str], object]
) -> Progress:
    """The progress to go on from; an empty one to start with.

    ``resume`` of None goes on from a checkpoint where there is one, and says nothing where there is none.
    """
    here = machine(asked.device)
    if again and resume is False:
        folder.clear()
        return Progress(machine=here)
    found = folder.read()
    if found is None:
        if resume:
            say("there is no checkpoint to resume: training starts from the beginning")
        return Progress(machine=here)
    done = sum(fold.finished for fold in found.folds)
    current = next((fold for fold in found.folds if not fold.finished), None)
    where = f"{done} of {asked.settings.folds} folds finished"
    where += (
        f", fold {done} trained for {current.epoch} epoch{'s' * (current.epoch != 1)}" if current is not None else ""
    )
    if resume is False:
        raise StoreError(
            "an interrupted run of this request is there", found=where, where=folder.path,
            fix="repeat the command with --resume to go on from there, or with --again to start over",
        )  # fmt: skip
    say(f"resumed: {where}")
    if dict(found.machine) != here:
        say(f"the run began on {_words(found.machine)} and goes on on {_words(here)}: the last bits may differ")
    return replace(found, machine=here)


@dataclass(eq=False)
class FoldRun:
    """The folds of one run."""

    ds: ImageDataset
    asked: Asked
    plan: Splits
    frames: Frames  # of every image that trains, validates or tests
    folder: CheckpointFolder
    pool: ThreadPoolExecutor | None  # augments images
    keep_models: bool  # leave the files of the best models when folds are finished
    tell: Tell | None  # see `Tell`

    def __post_init__(self) -> None:
        row_of = {name: row for row, name in enumerate(self.frames.ids)}
        self._place = np.array([row_of.get(name, -1) for name in self.plan.ids], dtype=np.int64)
        self._y = np.full(len(self.frames.ids), -1, dtype=np.int64)
        known = self._place >= 0
        self._y[self._place[known]] = self.plan.labels[known]
        self._settled = self._done = 0

    def train(self, progress: Progress) -> tuple[Progress, Outputs]:
        """Train and test every fold that is not finished."""
        asked, began = self.asked, time.perf_counter() - progress.seconds
        if asked.device.type == "cpu":
            keep_freed_memory()
        setting = Setting(
            self.frames, self._y, asked.augment, asked.schedule, asked.metric(self.ds), asked.settings.accumulate,
            self.pool, self._count,
        )  # fmt: skip
        jobs = [self._job(fold) for fold in range(self.plan.n_folds)]
        model, initial = None, {}
        for fold, job in enumerate(jobs):
            if fold < len(progress.folds) and progress.folds[fold].finished:
                self._settle(fold)
                continue
            if model is None:
                model = assemble(
                    asked.networks,
                    asked.transforms,
                    asked.head,
                    self._head(job),
                    asked.device,
                    asked.settings.precision,
                )
                initial = {name: value.cpu().clone() for name, value in model.state().items()}
            model.load(initial | {f"head.{name}": value for name, value in self._head(job).items()})

            def keep(state: FoldState, fold: int = fold) -> None:
                nonlocal progress
                folds = (*progress.folds[:fold], state)
                progress = replace(progress, folds=folds, seconds=time.perf_counter() - began)
                self.folder.write(progress)

            state = progress.folds[fold] if fold < len(progress.folds) else FoldState()
            keep(self._finish(model, job, setting, fold, self._train(model, job, setting, fold, state, keep)))
            self._settle(fold)
        blank = np.full((len(self.plan.test), len(self.ds.class_names)), np.nan)
        found = [self.folder.load(f.files["test"]) if "test" in f.files else {} for f in progress.folds]
        test = [tensors["test"].double().numpy() if tensors else blank for tensors in found]
        val = [tensors["val"].double().numpy() if tensors else blank[:0] for tensors in found]
        return replace(progress, seconds=time.perf_counter() - began), Outputs(np.stack(test), val)

    def _job(self, fold: int) -> Job:
        """The fold's job: the same stream, and so the same initial head, as in probing."""
        key = (fold, self.asked.subset)
        train, val = self._place[self.plan.train[key]], self._place[self.plan.val[key]]
        stream = f"{self.asked.settings.seed}\0{fold}"
        return make_job(self._y, train, val, len(self.ds.class_names), stream, self.asked.schedule.lr)

    def _head(self, job: Job) -> State:
        generator = stream_generator(job.stream, "init")
        return self.asked.head.init(generator, self.asked.dims, len(self.ds.class_names))

    def _train(
        self,
        model: ImageModel,
        job: Job,
        setting: Setting,
        fold: int,
        state: FoldState,
        keep: Callable[[FoldState], None],
    ) -> FoldState:
        def save(state: FoldState, tensors: Mapping[str, Tensor], best: Mapping[str, Tensor] | None) -> FoldState:
            files = {
                **state.files,
                "train": self.folder.save(f"fold{fold}-train-{state.epoch:06d}.safetensors", tensors),
            }
            if best is not None:
                files["best"] = self.folder.save(f"fold{fold}-best-{state.epoch:06d}.safetensors", best)
            state = replace(state, files=files)
            keep(state)
            return state

        self._settled += state.epoch * (len(job.train) + len(job.val))
        resume = self.folder.load(state.files["train"]) if "train" in state.files else None
        return train_fold(model, job, setting, save, state=state, resume=resume)

    def _finish(self, model: ImageModel, job: Job, setting: Setting, fold: int, state: FoldState) -> FoldState:
        """Test the best epoch's model; a fold without one is finished without predictions."""
        files: dict[str, Any] = {}
        if "best" in state.files:
            model.load(self.folder.load(state.files["best"]))
            test = predict_logits(model, setting, self._place[self.plan.test].tolist())
            if np.isfinite(test).all():
                held = np.sort(self.plan.val[fold, self.asked.subset])
                val = predict_logits(model, setting, self._place[held].tolist())
                logits = {"test": torch.from_numpy(test), "val": torch.from_numpy(val)}
                files["test"] = self.folder.save(f"fold{fold}-test.safetensors", logits)
                if self.keep_models:
                    files["best"] = state.files["best"]
            else:
                state = replace(state, diverged=True)
        return replace(state, finished=True, files=files)

    def _images(self, fold: int) -> int:
        """Images that a fold is planned to see at most."""
        key = (fold, self.asked.subset)
        epoch = len(self.plan.train[key]) + len(self.plan.val[key])
        return self.asked.schedule.max_epochs * epoch + len(self.plan.test) + len(self.plan.val[key])

    def _settle(self, fold: int) -> None:
        """Whatever of a fold was planned and not needed counts as done."""
        self._settled, self._done = sum(self._images(f) for f in range(fold + 1)), 0
        self._count(0)

    def _count(self, images: int) -> None:
        self._done += images
        if self.tell is not None:
            planned = sum(self._images(fold) for fold in range(self.plan.n_folds))
            label = f"{self.ds.name} {'+'.join(self.asked.names)} {self.asked.head_name} {self.asked.subset}"
            self.tell(min(self._settled + self._done, planned), planned, label)


def outcome(state: FoldState, lr: float) -> Outcome:
    """How the training of a finished fold went."""
    best = best_epoch(state) if "test" in state.files else 0
    score = max(state.val_scores) if best else None
    return Outcome(best, state.epoch + state.diverged, score, lr, state.diverged)


def head_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's parameters of a saved model."""
    return {name.removeprefix("head."): value for name, value in state.items() if name.startswith("head.")}


def kept_models(folder: CheckpointFolder, progress: Progress) -> dict[str, Path]:
    """Files of the folds' models, by the names they have in a run."""
    return {
        model_file(fold): folder.file(state.files["best"])
        for fold, state in enumerate(progress.folds)
        if "best" in state.files
    }


def _words(here: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in here.items())
