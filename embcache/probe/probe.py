"""Probing, top to bottom: plan → features of the cells that are missing → trained heads → results → run folders."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embcache.config import DatasetRef, ProbeConfig
from embcache.data.classes import refuse_unclear, retarget
from embcache.data.dataset import ImageDataset, find_dataset, named_dataset
from embcache.errors import StoreError, StoreNotFoundError, UsageError, first_few
from embcache.log import log
from embcache.paths import PathLike, home_dir, slug
from embcache.probe.feature_rows import FeatureRows
from embcache.probe.heads import find_head
from embcache.probe.inputs import PAPER_SET, cached_backbones, cached_datasets
from embcache.probe.metrics import FloatArray
from embcache.probe.probe_plan import Batch, FeatureReader, ProbePlan, plan_probe
from embcache.probe.stack import ClosedFormHead, Head, TrainedModel, best_of, logits_of_sets, make_job, train_heads
from embcache.probe.summary import RunCell, build_result, prediction_table, validation_table
from embcache.runs.folders import Result, save_run
from embcache.store.feature_store import extract_command

Progress = Callable[[int, int, str], Any]
"""Called with (head-epochs settled, head-epochs planned, what is being trained)."""


def probe_features(
    dataset: ImageDataset | str,
    backbones: str | Sequence[str],
    *,
    head: object = None,
    subset: str | int = "S",
    target: str | None = None,
    home: PathLike | None = None,
    config: ProbeConfig | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Train a head on cached features by the paper's protocol and test it.

    Only the feature stores and the labels are read, no images. A result that was saved under the same request is
    returned as it is. A fold whose training diverges in its first epoch has no score, and a note names it.

    Parameters
    ----------
    dataset : ImageDataset or str
        Labels, groups and splits, or the name of a cached dataset; its files need not be there.
    backbones : str or sequence of str
        Backbones with cached features; exactly one for a head that does not fuse.
    head : str, Head or scikit-learn classifier, optional
        A registered name, ``module:name``, or an object. Default: the config's, ``"linear"``.
    subset : str or int
        ``"S"``, ``"M"``, ``"F"``, or a number of training images.
    target : str, optional
        Column of the dataset's table to predict instead of its labels; several, with commas, are findings.
    home : path, optional
        Folder of stores and runs. Default: ``$EMBCACHE_HOME`` or ``~/.cache/embcache``.
    config, **options
        A `embcache.config.ProbeConfig`, and fields that take the place of its own; None leaves one as it is. With
        ``task`` the target is one of ``classes``, ``ordinal``, ``findings`` and ``number``; see
        `embcache.data.classes.retarget`.
    progress : callable, optional
        See `Progress`.

    Returns
    -------
    Result
        Scores of all folds on the test set, their mean, interval and notes.

    Raises
    ------
    UsageError, StoreError
        The request is malformed; features are missing.
    ProtocolError
        The data cannot carry the folds, the subset or the metric; or training diverged in every fold.
    """
    dataset, task = named_dataset(dataset, home), options.pop("task", None)
    if isinstance(head, str):
        options["head"], head = head, None
    names = [backbones] if isinstance(backbones, str) else list(backbones)
    made = ProbeConfig.make(config, {key: value for key, value in options.items() if value is not None})
    dataset = dataset if target is None and task is None else retarget(dataset, target, task)
    (result,) = probe(dataset, [names], [subset], made, home=home, head=head, progress=progress)
    return result


def probe(
    dataset: ImageDataset,
    sets: Sequence[Sequence[str]],
    subsets: Sequence[str | int],
    config: ProbeConfig,
    *,
    home: PathLike | None = None,
    head: object = None,
    progress: Progress | None = None,
) -> list[Result]:
    """A result for each set of backbones and each subset; `probe_features` of several, which share what they read."""
    plan = plan_probe(dataset, sets, subsets, config, home=home, head=head)
    if not plan.cells:
        return []
    reuse = config.save and not config.again
    saved = {cell.id: plan.saved(cell) if reuse else None for cell in plan.cells}
    results = {id: result for id, result in saved.items() if result is not None}
    each, name = plan.models_per_cell * plan.schedules[0].max_epochs, plan.cells[0].request["head"]["name"]
    reader, tell = FeatureReader(plan), progress or (lambda done, total, label: None)
    for batch in list(plan.batches(results)):
        label = f"{dataset.name} {name} {'+'.join(batch[0][0].backbones)} {','.join(c.subset for c in batch[0])}"
        settled = len(results) * each

        def report(done: int, settled: int = settled, label: str = label) -> None:
            tell(settled + done, len(saved) * each, label)

        for cell, result in _train_batch(plan, batch, reader, report):
            results[cell.id] = result
    tell(len(results) * each, len(saved) * each, f"{dataset.name} {name}")
    return [results[cell.id] for cell in plan.cells]


def _train_batch(
    plan: ProbePlan, batch: Batch, reader: FeatureReader, on_epoch: Callable[[int], Any]
) -> Iterator[tuple[RunCell, Result]]:
    features, (cells, _) = reader.read(batch), batch
    began = time.perf_counter()
    splits, rates = cells[0].splits, len(plan.schedules)
    place = np.full(len(splits[0].ids), -1, dtype=np.int64)  # dataset row → row of the features
    place[reader.rows] = np.arange(len(reader.rows))
    labels, target = splits[0].labels[reader.rows], plan.dataset.task
    streams = [f"{plan.config.seed + repeat}\0{fold}" for repeat, s in enumerate(splits) for fold in range(s.n_folds)]
    jobs = [
        make_job(labels, place[train], place[val], target, stream, schedule.lr)
        for cell in cells
        for fold, stream in enumerate(streams)
        for train, val in [cell.parts(fold)]
        for schedule in plan.schedules
    ]
    y = torch.from_numpy(labels).to(plan.config.device)
    every = train_heads(plan.head, features, y, jobs, target, plan.metric, plan.schedules[0], on_epoch)
    sweeps = [range(k, k + rates) for k in range(0, len(every), rates)]
    chosen = [sweep[best_of([every[k] for k in sweep])] for sweep in sweeps]
    models = [every[k] for k in chosen]
    test = torch.from_numpy(place[splits[0].test])
    logits, val = _predict(plan.head, models, features, test, [jobs[k].val for k in chosen], target.outputs)
    trained = time.perf_counter() - began
    # The share of a cell in the time of all: as much as its heads saw of the rows.
    seen = [max(1, len(t.losses)) * (len(job.train) + len(job.val)) for t, job in zip(every, jobs, strict=True)]
    size, closed = len(streams), isinstance(plan.head, ClosedFormHead)
    for number, cell in enumerate(cells):
        began, first = time.perf_counter(), number * size
        own = range(first, first + size)
        _check_finite(plan, logits[[k for k in own if models[k].params]])
        outcomes = [
            cell.outcome(
                k - first, logits[k], val[k], models[k].val_score, best_epoch=models[k].best_epoch,
                epochs=len(models[k].losses), lr=None if closed else jobs[chosen[k]].lr, diverged=models[k].diverged,
                chosen=dict(models[k].chosen),
                lost_lrs=[jobs[j].lr for j in sweeps[k] if every[j].diverged and j != chosen[k]],
            )
            for k in own
        ]  # fmt: skip
        share = sum(seen[first * rates : (first + size) * rates]) / sum(seen)
        result = build_result(cell, outcomes, trained * share + time.perf_counter() - began)
        if plan.config.save:
            heads = [models[k].params for k in own] if plan.head.keeps_models else []
            table, validation = prediction_table(cell, outcomes), validation_table(cell, outcomes)
            save_run(result, table, heads, plan.home, validation=validation)
        yield cell, result


def _predict(
    head: Head, models: Sequence[TrainedModel], x: FeatureRows, test: Tensor, held: Sequence[Tensor], n_classes: int
) -> tuple[FloatArray, list[FloatArray]]:
    """Logits of the test rows and of each model's own validation rows; nan where there is no model."""
    logits = np.full((len(models), len(test), n_classes), np.nan)
    val = [np.full((len(rows), n_classes), np.nan) for rows in held]
    # A closed-form head may keep as many rows as trained it: such heads cannot be stacked.
    made = [k for k, model in enumerate(models) if model.params]
    stacks = [[k] for k in made] if isinstance(head, ClosedFormHead) else [made] if made else []
    sets = [(stack, test) for stack in stacks] + [([k], held[k]) for k in made if len(held[k])]
    params = [
        {name: torch.stack([models[k].params[name] for k in stack]) for name in models[stack[0]].params}
        for stack, _ in sets
    ]
    found = logits_of_sets(head, params, x, [rows for _, rows in sets])
    for number, ((stack, _), given) in enumerate(zip(sets, found, strict=True)):
        if number < len(stacks):
            logits[stack] = given
        else:
            val[stack[0]] = given[0].astype(np.float64)
    return logits, val


def _check_finite(plan: ProbePlan, logits: FloatArray) -> None:
    ids = plan.cells[0].splits[0].test_ids
    bad = [ids[int(i)] for i in np.flatnonzero(~np.isfinite(logits).all(axis=(0, 2)))]
    if bad:
        raise StoreError(
            f"{len(bad):,} of {len(ids):,} test images have features that are not finite", code="features-not-finite",
            found=first_few(list(map(repr, bad))), where=", ".join(str(store.path) for store in plan.stores.values()),
            fix="remove the store and extract again, in fp32: embcache ls",
        )  # fmt: skip


def probe_cached(
    datasets: Sequence[str] = (),
    backbones: Sequence[str] = (),
    subsets: Sequence[str | int] = ("S",),
    config: ProbeConfig = ProbeConfig(),
    ref: DatasetRef = DatasetRef(),
    *,
    home: PathLike | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Probe datasets by name: what ``embcache probe`` does.

    ``datasets``: by default all that have the backbones cached. A head that takes one of ``backbones`` gives a result
    for each (default: all that are cached); one that fuses takes them together (default: simclr, swav, dino where these
    are cached, else all that are, but for those with several views of each image).
    """
    head = find_head(config.head, config.hyperparameters)
    names = list(datasets) or _datasets_with(head, backbones, home, config.views)
    if len(names) > 1 and any(given is not None for given in (ref.data_root, config.splits, ref.name)):
        raise UsageError(
            "--data-root, --name and --splits are for one dataset", code="one-dataset", found=", ".join(names),
            fix="--dataset NAME",
        )  # fmt: skip
    found = [find_dataset(name, ref, home)[0] for name in names]
    for ds in found if ref.task is None else ():
        refuse_unclear(ds)
    results = []
    for ds in found:
        sets = _sets(head, backbones, ds, home, config.views)
        results += probe(ds, sets, subsets, config, home=home, progress=progress)
    return list({result.id: result for result in results}.values())


def _sets(head: Head, backbones: Sequence[str], ds: ImageDataset, home: PathLike | None, views: int) -> list[list[str]]:
    names, several = list(backbones) or _cached(head, ds.name, home, views), views > 1
    if not names:
        raise StoreNotFoundError(
            f"no features are cached for {ds.name}" + f" with {views} views of each image" * several,
            code="store-not-found", where=home_dir(home) / slug(ds.name),
            fix=extract_command("NAME", ds, home) + f" --views {views}" * several,
        )  # fmt: skip
    if head.fuses and not backbones and len(names) == 1:
        raise StoreNotFoundError(
            f"{head.name} fuses backbones, and one is cached for {ds.name}", code="store-not-found",
            expected="two or more", found=names[0], where=home_dir(home) / slug(ds.name),
            fix=(extract_command("NAME", ds, home), f"--backbone {names[0]}, or --head linear"),
        )  # fmt: skip
    if head.fuses and not backbones:
        log.info(f"{ds.name}: {head.name} fuses {', '.join(names)}, which are cached")
    return [names] if head.fuses else [[name] for name in names]


def _cached(head: Head, dataset: str, home: PathLike | None, views: int) -> list[str]:
    """What a head takes of a dataset where no backbones are named."""
    cached = cached_backbones(dataset, home, views, plain=head.fuses)
    return list(PAPER_SET) if head.fuses and set(PAPER_SET) <= set(cached) else cached


def _datasets_with(head: Head, backbones: Sequence[str], home: PathLike | None, views: int) -> list[str]:
    names = cached_datasets(home)
    if not names:
        raise StoreNotFoundError(
            "nothing is cached", code="store-not-found", where=home_dir(home),
            fix="embcache extract --backbone NAME --dataset NAME, or embcache demo",
        )  # fmt: skip
    wanted, least = set(backbones), 2 if head.fuses and not backbones else 1
    cached = {
        name: cached_backbones(name, home, views) if backbones else _cached(head, name, home, views) for name in names
    }
    lacking = {name: sorted(wanted - set(cached[name])) for name in names}
    chosen = [name for name in names if not lacking[name] and len(cached[name]) >= least]
    if not chosen:
        several = f" --views {views}" if views > 1 else ""
        command = f"embcache extract --backbone {','.join(sorted(wanted)) or 'NAME'} --dataset NAME{several}"
        raise StoreNotFoundError(
            f"no dataset has {'two' if least > 1 else 'all of these'} backbones cached{several}",
            code="store-not-found",
            expected=", ".join(sorted(wanted)) or ("two or more to fuse" if least > 1 else "any backbone"),
            where=home_dir(home),
            found="; ".join(f"{name}: {', '.join(cached[name]) or 'none'}" for name in names),
            fix=f"{command}, or other --backbone names",
        )  # fmt: skip
    for name in names:
        if name not in chosen:
            few = "fewer than two backbones" if least > 1 else "no features"
            log.info(f"{name} left out: " + (f"{', '.join(lacking[name])} not" if lacking[name] else few) + " cached")
    return chosen
