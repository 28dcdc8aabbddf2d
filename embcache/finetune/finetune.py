"""Finetuning, top to bottom: dataset and weights → pixels → splits → folds, one after another → result."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from embcache.data.dataset import ImageDataset
from embcache.errors import ProtocolError, check_number
from embcache.extract.extract_request import default_workers
from embcache.finetune.batches import (
    cached_frames,
    cached_images,
    decode_frames,
    known_images,
    store_images,
    stored_frames,
)
from embcache.finetune.checkpoint import CheckpointFolder, Progress
from embcache.finetune.finetune_plan import Settings, ask, resume_command
from embcache.finetune.folds import FoldRun, Tell, begin, head_of, kept_models, outcome
from embcache.finetune.model import model_file
from embcache.paths import PathLike
from embcache.probe.summary import (
    Outputs,
    RunCell,
    build_result,
    prediction_table,
    request_notes,
    training_notes,
    validation_table,
    with_positive,
)
from embcache.runs.folders import ProbeResult, as_asked, find_run, run_id, runs_dir, save_run


def finetune_images(
    ds: ImageDataset,
    backbones: str | Sequence[str],
    *,
    head: str = "linear",
    subset: str | int = "S",
    folds: int = 5,
    seed: int = 0,
    home: PathLike | None = None,
    val: str = "full",
    test: str = "local",
    splits: PathLike | None = None,
    exclude_test_overlap: bool = False,
    weights: PathLike | Mapping[str, PathLike] | None = None,
    transform: str | None = None,
    device: str = "auto",
    precision: str = "fp32",
    lr: float | None = None,
    batch_size: int | None = None,
    accumulate: int = 1,
    max_epochs: int = 50,
    metric: str | None = None,
    positive: str | None = None,
    workers: int | None = None,
    pixel_cache: bool = True,
    resume: bool | None = False,
    keep_models: bool = True,
    save: bool = True,
    reuse: bool = True,
    source: str | None = None,
    say: Callable[[str], object] = lambda line: None,
    progress: Tell | None = None,
) -> ProbeResult:
    """Train backbones and head together on augmented images, by the protocol of probing, and test them.

    Splits, subsets, schedule, model selection, metrics and the record of the run are those of
    `embcache.probe.probe.probe_features`, so that frozen and finetuned rows stand in one table. A checkpoint is kept
    after every epoch; a result that was saved under the same request is returned as it is.

    Parameters
    ----------
    ds : ImageDataset
        Its images must be here.
    backbones : str or sequence of str
        Exactly one for a head that does not fuse; ``random`` trains from scratch.
    head : str
        A head that is trained by gradient on features as they are: linear, mlp, dvme and its ablations.
    subset, folds, seed, val, test, splits, exclude_test_overlap
        As for `embcache.probe.probe.probe_features`.
    home : path, optional
        Folder of stores and runs; default ``$EMBCACHE_HOME``, else ``~/.cache/embcache``.
    weights : path or mapping of name to path, optional
        Checkpoints to use instead of those found or downloaded.
    transform : {"paper", "imagenet", "model"}, optional
        Resizing and normalisation, as for extraction; the centre crop is a random one in training.
    device : str
        ``auto``, ``cpu``, ``cuda:0``, …
    precision : {"fp32", "tf32", "bf16", "fp16"}
        Arithmetic of the backbones; tf32 and fp16 need CUDA.
    lr : float, optional
        First learning rate; default 1e-3, and 1e-4 where DINO's ViT-S/8 is among the backbones.
    batch_size : int, optional
        Images of one step; default 64, and 16 with DINO.
    accumulate : int
        Parts in which a batch goes through the network, to take less memory.
    max_epochs : int
        At most so many epochs.
    metric, positive
        As for `embcache.probe.probe.probe_features`.
    workers : int, optional
        Threads that decode and augment images; 0 for none besides the main one. No result depends on it.
    pixel_cache : bool
        Keep decoded, resized images in a pixel store, and read them from there.
    resume : bool or None
        Go on from the last checkpoint of the same request, if there is one.
    keep_models : bool
        Keep the model of each fold's best epoch with the run.
    save : bool
        Write the run folder.
    reuse : bool
        Take a saved result of the same request, with a word where it has no models though ``keep_models`` was asked
        for: training anew takes too long to begin unasked. False without ``resume`` also discards a checkpoint.
    source : {"live", "snapshot"}, optional
        Where ``ds`` came from, to be told with the result; default live.
    say : callable
        Told each thing worth knowing as it happens.
    progress : callable, optional
        See `Tell`.

    Returns
    -------
    ProbeResult
        Of kind ``"finetune"``.

    Raises
    ------
    UsageError, DatasetError, WeightsError
        The request is malformed; images or weights are not here.
    ProtocolError
        The data cannot carry the folds, the subset or the metric; or training diverged in every fold.
    StoreError
        There is a checkpoint of this request and neither ``resume`` nor ``reuse=False`` was said; it is damaged; or
        another process is training the same.
    """
    settings = Settings(
        head, subset, folds, seed, val, test, splits, exclude_test_overlap, weights, transform, device, precision, lr,
        batch_size, accumulate, max_epochs, metric, positive,
    )  # fmt: skip
    if workers is not None:
        check_number("--workers", workers, 0, 1 << 10)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(workers or (1 if workers == 0 else default_workers())))
        asked = ask(ds, backbones, settings, home, pool)
        for note in asked.notes(ds):
            say(note)
        store, frames = None, None
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="embcache-")))
        if pixel_cache:
            store = cached_frames(ds, asked.transform, home, workers or None, say)
            images = store_images(store)
        else:
            known = cached_images(ds, asked.transform, asked.files, home)
            if known is not None:
                images = known
            else:
                frames, images = decode_frames(ds, asked.transform, asked.files.root, scratch / "all.u8", pool)
        plan = asked.plan(ds, images)
        asked = replace(asked, subset=plan.name_of(asked.subset))
        request = asked.request(ds, plan, images)
        id = run_id(request)
        folder = CheckpointFolder(
            runs_dir(ds.name, home) / f".{id}.partial" if save else scratch / "checkpoint",
            request,
            resume_command(ds, asked.names, settings, home) + ("" if keep_models else " --no-models"),
        )
        result = find_run(id, ds.name, home) if save and reuse else None
        if result is None:
            stack.enter_context(folder.lock())
            begun = begin(folder, asked, resume=resume, again=not reuse, say=say)
            used = plan.used(asked.subset)
            ids = plan.ids[used].tolist()
            if store is not None:
                frames = stored_frames(store, ids, scratch / "used.u8")
            elif frames is None:
                frames, _ = decode_frames(ds, asked.transform, asked.files.root, scratch / "used.u8", pool, ids=ids)
            run = FoldRun(ds, asked, plan, frames, folder, None if workers == 0 else pool, keep_models, progress)
            done, outputs = run.train(begun)
            try:
                result = _result(run, request, done, outputs, source or "live")
            except ProtocolError:  # every fold diverged: there is nothing to go on from
                folder.clear()
                raise
            if save:
                _save(run, result, done, outputs, home)
            folder.clear()
        else:
            result = with_positive(result, positive, home)
        if save and keep_models:
            _tell_lost_models(runs_dir(ds.name, home) / id, result, say)
        notes = [
            *request_notes(ds, [plan], asked.subset, asked.head),
            *asked.notes(ds),
            *training_notes(result),
        ]
        return as_asked(result, source or "live", notes)


def find_finetuned(
    ds: ImageDataset,
    backbones: str | Sequence[str],
    *,
    home: PathLike | None = None,
    workers: int | None = None,
    **request: Any,
) -> ProbeResult | str:
    """The saved result of a finetuning, or the id that its run would have; trains and downloads nothing."""
    settings = Settings(**request)
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        asked = ask(ds, backbones, settings, home, pool, allow_download=False)
        images = known_images(ds, asked.transform, asked.files, home, pool)
        plan = asked.plan(ds, images)
        asked = replace(asked, subset=plan.name_of(asked.subset))
    id = run_id(asked.request(ds, plan, images))
    result = find_run(id, ds.name, home)
    if result is None:
        return id
    result = with_positive(result, settings.positive, home)
    notes = [*request_notes(ds, [plan], asked.subset, asked.head), *asked.notes(ds), *training_notes(result)]
    return as_asked(result, "live", notes)


def _result(run: FoldRun, request: Mapping[str, Any], done: Progress, outputs: Outputs, source: str) -> ProbeResult:
    asked = run.asked
    cell = RunCell(
        dataset=run.ds, splits=(run.plan,), subset=asked.subset, backbones=asked.names, head=asked.head,
        request=request, recipes=asked.recipes, positive=asked.settings.positive, source=source,
        notes=tuple(request_notes(run.ds, [run.plan], asked.subset, asked.head)),
    )  # fmt: skip
    outcomes = [outcome(state, asked.schedule.lr) for state in done.folds]
    result = build_result(cell, outcomes, outputs, done.seconds)
    return replace(result, versions={**result.versions, **{name: version(name) for name in ("timm", "torchvision")}})


def _tell_lost_models(run: Path, result: ProbeResult, say: Callable[[str], object]) -> None:
    """Say that a run which answers has no models, or not all of them: it was asked for without them before."""
    trained = [fold for fold, found in enumerate(result.folds) if not found.failed]
    lost = [fold for fold in trained if not (run / model_file(fold)).is_file()]
    if lost:
        which = "models" if lost == trained else f"models of fold {', '.join(map(str, lost))}"
        say(f"{result.id}: {which} were not kept; --again trains and keeps them")


def _save(run: FoldRun, result: ProbeResult, done: Progress, outputs: Outputs, home: PathLike | None) -> None:
    """Write the run; the models move there from the checkpoints, and the heads are kept besides as in probing."""
    outcomes = [outcome(state, run.asked.schedule.lr) for state in done.folds]
    models = kept_models(run.folder, done)
    heads = [
        head_of(run.folder.load(state.files["best"])) if "best" in state.files else {} for state in done.folds
    ] if models else []  # fmt: skip
    table = prediction_table(run.plan, outputs, outcomes)
    validation = validation_table([run.plan], run.asked.subset, outputs, outcomes)
    save_run(result, table, heads, home, validation=validation, files=models)
