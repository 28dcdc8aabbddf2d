"""Finetuning, top to bottom: dataset and weights → pixels → splits → folds, one after another → result."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embcache.config import FinetuneConfig
from embcache.cores import default_workers, keep_freed_memory
from embcache.data.dataset import ImageDataset, named_dataset
from embcache.errors import ProtocolError, StoreError
from embcache.extract.pixels import cache_pixels
from embcache.finetune.epochs import (
    CheckpointFolder,
    FoldState,
    Frames,
    Progress,
    Trainer,
    best_epoch,
    cached_images,
    decode_frames,
    known_images,
    repeatable,
    stored_frames,
)
from embcache.finetune.finetune_plan import FinetunePlan, load_networks, plan_finetuning
from embcache.finetune.model import State, assemble, model_file
from embcache.log import log
from embcache.paths import PathLike
from embcache.probe.inputs import KnownImages
from embcache.probe.protocol import subset_sizes
from embcache.probe.stack import Job, make_job, stream_generator
from embcache.probe.summary import (
    Outcome,
    build_result,
    prediction_table,
    training_notes,
    validation_table,
    with_positive,
)
from embcache.runs.folders import Result, find_run, runs_dir, save_run

# Called with (images done, images planned, what is being trained).
OnImages = Callable[[int, int, str], object]


def finetune_images(
    dataset: ImageDataset | str,
    backbones: str | Sequence[str],
    *,
    subset: str | int = "S",
    home: PathLike | None = None,
    config: FinetuneConfig | None = None,
    **options: Any,
) -> Result:
    """Train backbones and a head together on augmented images, by the protocol of probing, and test them.

    Splits, subsets, schedule, model selection, metrics and the record of the run are those of
    `embcache.probe.probe.probe_features`, so that frozen and finetuned rows stand in one table. A checkpoint is kept
    after every epoch; a result that was saved under the same request is returned as it is.

    Parameters
    ----------
    dataset : ImageDataset
        Its images must be present.
    backbones : str or sequence of str
        Exactly one for a head that does not fuse; ``random`` trains from scratch.
    subset : str or int
        ``S``, ``M``, ``F`` or a number of training images.
    home : path, optional
        Folder of stores and runs; default ``$EMBCACHE_HOME``, else ``~/.cache/embcache``.
    config, **options
        A `embcache.config.FinetuneConfig`, and fields that take the place of its own.

    Returns
    -------
    Result
        Scores of all folds on the test set, their mean, interval and notes.

    Raises
    ------
    UsageError, DatasetError, WeightsError
        The request is malformed; images or weights are missing.
    ProtocolError
        The data do not support the folds, the subset or the metric; or training diverged in every fold.
    StoreError
        There is a damaged checkpoint of this request, one with neither ``resume`` nor ``again`` set, or one in use.
    """
    names = [backbones] if isinstance(backbones, str) else list(backbones)
    return finetune(named_dataset(dataset, home), names, subset, FinetuneConfig.make(config, options), home=home)


def finetune(
    dataset: ImageDataset,
    backbones: Sequence[str],
    subset: str | int,
    config: FinetuneConfig,
    *,
    home: PathLike | None = None,
    source: str = "live",
    progress: OnImages | None = None,
) -> Result:
    """Finetune as `finetune_images`; ``source`` is where the dataset came from, as `find_dataset` reports it."""
    with ExitStack() as stack:
        threads = config.workers or (1 if config.workers == 0 else default_workers())
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="embcache-")))
        subset_sizes(dataset, [subset])  # a slip is reported before networks are loaded
        networks = load_networks(dataset, backbones, config, home, pool)
        for note in networks.notes():
            log.info(note)
        geometry, files = networks.transform, networks.files
        images: KnownImages | None
        frames, store = None, None
        if config.pixel_cache:
            decoding, workers = files.scan.decoding, config.workers or None
            store = cache_pixels(dataset, geometry, home=home, workers=workers, decoding=decoding)
            images = store = store.restrict(dataset.table["id"])
        else:
            images = cached_images(dataset, geometry, files, home)
        if images is None:
            frames, images = decode_frames(dataset, geometry, files, scratch / "all", pool)
        plan = plan_finetuning(networks, images, subset, home)
        result = None if config.again else find_run(plan.cell.id, dataset.name, home)
        if result is not None:
            return _answered(plan, result, source, home)
        partial = runs_dir(dataset.name, home) / f".{plan.cell.id}.partial"
        folder = CheckpointFolder(partial, plan.cell.request, plan.resume_command(home))
        stack.enter_context(folder.lock())
        begun = _begin(folder, plan)
        used = plan.splits.ids[plan.splits.used(plan.cell.subset)].tolist()
        if store is not None:
            frames = stored_frames(store, used, scratch / "used")
        elif frames is None:
            frames, _ = decode_frames(dataset, geometry, files, scratch / "used", pool, ids=used)
        run = FinetuneRun(plan, frames, folder, None if config.workers == 0 else pool, progress)
        done = run.train(begun)
        try:
            result = _save(run, done, source, home)
        except ProtocolError:  # every fold diverged: there is nothing to resume
            folder.clear()
            raise
        folder.clear()
        return _answered(plan, result, source, home)


def find_finetuned(
    dataset: ImageDataset,
    backbones: Sequence[str],
    subset: str | int,
    config: FinetuneConfig,
    *,
    home: PathLike | None = None,
) -> Result | str:
    """The saved result of a finetuning, or the ID that its run would have; trains and downloads nothing."""
    subset_sizes(dataset, [subset])
    with ThreadPoolExecutor(config.workers or default_workers()) as pool:
        networks = load_networks(dataset, backbones, config, home, pool, allow_download=False)
        images = known_images(dataset, networks.transform, networks.files, home, pool)
        plan = plan_finetuning(networks, images, subset, home)
    result = find_run(plan.cell.id, dataset.name, home)
    return plan.cell.id if result is None else _with_notes(plan, result, "live", home)


def _answered(plan: FinetunePlan, result: Result, source: str, home: PathLike | None) -> Result:
    """A saved result as an answer; a note where it lacks models that were asked for."""
    networks = plan.networks
    run = runs_dir(networks.dataset.name, home) / result.id
    trained = [fold for fold, found in enumerate(result.folds) if not found.failed]
    lost = [fold for fold in trained if not (run / model_file(fold)).is_file()] if networks.config.models else []
    if lost:
        which = "models" if lost == trained else f"models of fold {', '.join(map(str, lost))}"
        log.info(f"{result.id}: {which} were not kept; --again trains and keeps them")
    return _with_notes(plan, result, source, home)


def _with_notes(plan: FinetunePlan, result: Result, source: str, home: PathLike | None) -> Result:
    result = with_positive(result, plan.networks.config.positive, home)
    notes = (*plan.cell.notes, *plan.networks.notes(), *training_notes(result))
    return replace(result, source=source, notes=notes)


def _begin(folder: CheckpointFolder, plan: FinetunePlan) -> Progress:
    config = plan.networks.config
    here = machine(plan.networks.device)
    if config.again and config.resume is False:
        folder.clear()
        return Progress(machine=here)
    found = folder.read()
    if found is None:
        if config.resume:
            log.info("there is no checkpoint to resume: training starts from the beginning")
        return Progress(machine=here)
    done = sum(fold.finished for fold in found.folds)
    where = f"{done} of {plan.splits.n_folds} folds finished"
    if current := next((fold for fold in found.folds if not fold.finished), None):
        where += f", fold {done} trained for {current.epoch} epoch{'s' * (current.epoch != 1)}"
    if config.resume is False:
        raise StoreError(
            "there is an interrupted run of this request", code="run-interrupted", found=where, where=folder.path,
            fix="repeat the command with --resume to continue it, or with --again to start over",
        )  # fmt: skip
    log.info(f"resumed: {where}")
    if dict(found.machine) != here:
        then, now = (", ".join(f"{key} {value}" for key, value in each.items()) for each in (found.machine, here))
        log.warning(f"the run began on {then} and continues on {now}: the last bits may differ")
    return replace(found, machine=here)


def machine(device: torch.device) -> dict[str, Any]:
    """What decides whether a resumed run repeats an uninterrupted one bit for bit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}


@dataclass(eq=False)
class FinetuneRun:
    """The folds of one run, trained one after another with a checkpoint after every epoch."""

    plan: FinetunePlan
    frames: Frames  # of every image that trains, validates or tests
    folder: CheckpointFolder
    pool: ThreadPoolExecutor | None  # augments images
    on_images: OnImages | None

    def __post_init__(self) -> None:
        splits = self.plan.splits
        row_of = {name: row for row, name in enumerate(self.frames.ids)}
        self._place = np.array([row_of.get(name, -1) for name in splits.ids], dtype=np.int64)
        self._y = splits.task.blank(len(self.frames.ids))
        known = self._place >= 0
        self._y[self._place[known]] = splits.labels[known]
        self._settled = self._done = 0

    def train(self, progress: Progress) -> Progress:
        """Train and test every fold that is not finished."""
        networks, n_folds = self.plan.networks, self.plan.splits.n_folds
        began = time.perf_counter() - progress.seconds
        if networks.device.type == "cpu":
            keep_freed_memory()
        trainer, initial = None, {}
        for fold in range(n_folds):
            if not progress.fold(fold).finished:
                job = self._job(fold)
                dims = {spec.name: spec.dim for spec in networks.specs}
                target = self.plan.splits.task
                params = networks.head.init(stream_generator(job.stream, "init"), dims, target.width) | target.init()
                params |= target.constants(self._y[job.train.numpy()])
                if trainer is None:
                    trainer = self._trainer(params)
                    initial = {name: value.cpu().clone() for name, value in trainer.model.state().items()}
                trainer.model.load(initial | {f"head.{name}": value for name, value in params.items()})
                for state in self._fold(trainer, job, fold, progress.fold(fold)):
                    folds = (*progress.folds[:fold], state)
                    progress = replace(progress, folds=folds, seconds=time.perf_counter() - began)
                    self.folder.write(progress)
            # What was planned of the fold and not needed counts as done.
            self._settled, self._done = sum(map(self._planned, range(fold + 1))), 0
            self._count(0)
        return replace(progress, seconds=time.perf_counter() - began)

    def _trainer(self, params: State) -> Trainer:
        of = self.plan.networks
        model = assemble(of.modules, of.transforms, of.head, params, of.device, of.config.precision)
        return Trainer(
            model, self.frames, self._y, of.augment, of.schedule, of.metric, of.config.accumulate, self.pool,
            self._count, self.plan.splits.task,
        )  # fmt: skip

    def _job(self, fold: int) -> Job:
        """The job of a fold: the same stream, and so the same initial head, as in probing."""
        networks, (train, val) = self.plan.networks, (self._place[rows] for rows in self.plan.cell.parts(fold))
        stream = f"{networks.config.seed}\0{fold}"
        return make_job(self._y, train, val, self.plan.splits.task, stream, networks.schedule.lr)

    def _fold(self, trainer: Trainer, job: Job, fold: int, state: FoldState) -> Iterator[FoldState]:
        """The state after each epoch, and last that of the tested fold; its tensors are saved."""
        self._settled += state.epoch * (len(job.train) + len(job.val))
        resume = self.folder.load(state.files["train"]) if "train" in state.files else None
        with repeatable(trainer.model.device):
            for reached, tensors, best in trainer.epochs(job, state, resume):
                state = replace(reached, files=state.files)
                if reached.diverged:
                    break
                name = f"{state.epoch:06d}.safetensors"
                files = {**state.files, "train": self.folder.save(f"fold{fold}-train-{name}", tensors)}
                if best:
                    files["best"] = self.folder.save(f"fold{fold}-best-{name}", best)
                state = replace(state, files=files)
                yield state
        yield self._tested(trainer, fold, state)

    def _tested(self, trainer: Trainer, fold: int, state: FoldState) -> FoldState:
        """Test the model of the best epoch; a fold without one is finished without predictions."""
        files = {}
        if "best" in state.files:
            trainer.model.load(self.folder.load(state.files["best"]))
            test = trainer.predict(self._place[self.plan.splits.test].tolist())
            if np.isfinite(test).all():
                val = trainer.predict(self._place[np.sort(self.plan.cell.parts(fold)[1])].tolist())
                logits = {"test": torch.from_numpy(test), "val": torch.from_numpy(val)}
                files["test"] = self.folder.save(f"fold{fold}-test.safetensors", logits)
                if self.plan.networks.config.models:
                    files["best"] = state.files["best"]
            else:
                state = replace(state, diverged=True)
        return replace(state, finished=True, files=files)

    def _planned(self, fold: int) -> int:
        train, val = self.plan.cell.parts(fold)
        epochs = self.plan.networks.schedule.max_epochs * (len(train) + len(val))
        return epochs + len(self.plan.splits.test) + len(val)

    def _count(self, images: int) -> None:
        self._done += images
        if self.on_images is not None:
            planned = sum(map(self._planned, range(self.plan.splits.n_folds)))
            cell = self.plan.cell
            label = f"{cell.dataset.name} {'+'.join(cell.backbones)} {cell.request['head']['name']} {cell.subset}"
            self.on_images(min(self._settled + self._done, planned), planned, label)


def _save(run: FinetuneRun, done: Progress, source: str, home: PathLike | None) -> Result:
    """Make and write the result: models move there from the checkpoints, heads are kept separately too."""
    plan, networks, folder = run.plan, run.plan.networks, run.folder
    cell = replace(plan.cell, source=source)
    blank = np.full((len(plan.splits.test), plan.splits.task.outputs), np.nan)
    outcomes: list[Outcome] = []
    for fold, state in enumerate(done.folds):
        tensors = folder.load(state.files["test"]) if "test" in state.files else {}
        test, val = (tensors[key].double().numpy() if tensors else blank for key in ("test", "val"))
        best = best_epoch(state) if tensors else 0
        outcomes.append(cell.outcome(
            fold, test, val, max(state.val_scores) if best else None, best_epoch=best,
            epochs=state.epoch + state.diverged, lr=networks.schedule.lr, diverged=state.diverged,
        ))  # fmt: skip
    result = build_result(cell, outcomes, done.seconds)
    result = replace(result, versions={**result.versions, **{name: version(name) for name in ("timm", "torchvision")}})
    best_files = {fold: state.files["best"] for fold, state in enumerate(done.folds) if "best" in state.files}
    models = {model_file(fold): folder.file(saved) for fold, saved in best_files.items()}
    heads: list[State] = [{} for _ in done.folds] if best_files else []
    for fold, saved in best_files.items():
        heads[fold] = {name[5:]: p for name, p in folder.load(saved).items() if name.startswith("head.")}
    table, validation = prediction_table(cell, outcomes), validation_table(cell, outcomes)
    save_run(result, table, heads, home, validation=validation, files=models)
    return result
