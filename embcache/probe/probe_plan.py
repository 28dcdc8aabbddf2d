"""What a probe will do, written down before it does it: stores, splits and one cell for each result."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from embcache.config import ProbeConfig
from embcache.cores import is_shortage
from embcache.data.classes import task_of
from embcache.data.dataset import ImageDataset, with_loss
from embcache.data.groups import IntArray
from embcache.errors import StoreError, UsageError
from embcache.paths import PathLike
from embcache.probe.feature_rows import FeatureRows, Resident
from embcache.probe.heads import check_backbones, check_fits, find_head, identify, name_of
from embcache.probe.inputs import (
    digest_images,
    digest_shards,
    find_splits,
    load_features,
    open_stores,
    plan_for,
    stream_features,
)
from embcache.probe.metrics import Metric, asymmetry, check_order, find_metric, positive_class
from embcache.probe.protocol import name_everything, subset_sizes
from embcache.probe.schedule import Schedule
from embcache.probe.stack import ClosedFormHead, Head
from embcache.probe.summary import RunCell, request_notes, training_notes, with_positive
from embcache.runs.folders import PROTOCOL_VERSION, Result, find_run
from embcache.store.feature_store import FeatureStore

_SMALL = 5_000_000  # parameters of one subset's heads up to which several subsets train as one stack


Batch = tuple[Sequence[RunCell], Sequence[RunCell]]  # that train as one stack, and whose features are read together


@dataclass(frozen=True, eq=False)
class ProbePlan:
    """Sets of backbones × subsets on one dataset; nothing is computed yet."""

    dataset: ImageDataset
    head: Head
    config: ProbeConfig
    stores: Mapping[str, FeatureStore]
    metric: Metric  # that chooses epochs on validation, its positive class fixed
    cells: tuple[RunCell, ...]  # one per result, in the order asked for; equal ones are the same object
    home: PathLike | None

    @cached_property
    def schedules(self) -> tuple[Schedule, ...]:
        """The optimization at every learning rate."""
        return tuple(Schedule(lr=rate) for rate in self.config.lr) or (Schedule(),)

    @property
    def models_per_cell(self) -> int:
        """Heads that one result trains: repeats × folds × learning rates."""
        splits = self.cells[0].splits
        return len(splits) * splits[0].n_folds * len(self.schedules)

    def saved(self, cell: RunCell) -> Result | None:
        """The saved result of a cell with the source and the notes of this plan; None where there is none."""
        found = find_run(cell.id, self.dataset.name, self.home)
        if found is None:
            return None
        found = with_positive(found, self.config.positive, self.home)
        return replace(found, source=cell.source, notes=(*cell.notes, *training_notes(found)))

    def batches(self, done: Mapping[str, object]) -> Iterator[Batch]:
        """Cells whose id is not among ``done``, in stacks; large heads alone: hours of training may be interrupted."""
        missing: dict[tuple[str, ...], dict[str, RunCell]] = {}
        for cell in self.cells:
            if cell.id not in done:
                missing.setdefault(cell.backbones, {})[cell.id] = cell
        for backbones, cells in missing.items():
            dims = {backbone: self.stores[backbone].row_shape[-1] for backbone in backbones}
            size = self.head.count_parameters(dims, self.dataset.task.width) * self.models_per_cell
            together = list(cells.values())
            apart = isinstance(self.head, ClosedFormHead) or size > _SMALL
            yield from [([cell], together) for cell in together] if apart else [(together, together)]


@dataclass(eq=False)
class FeatureReader:
    """Reads the features of batches and keeps those in memory that the next batch needs too."""

    plan: ProbePlan
    rows: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))  # of the dataset, ascending
    x: dict[str, Tensor] = field(default_factory=dict)

    def read(self, batch: Batch) -> FeatureRows:
        """Features of all ``rows`` that the batch needs."""
        config, ds, (cells, shared) = self.plan.config, self.plan.dataset, batch
        streams, backbones = config.buffer is not None, cells[0].backbones
        rows = np.unique(np.concatenate([cell.rows for cell in (cells if streams else shared)]))
        same = np.array_equal(rows, self.rows)
        # First let go of what is not needed: it would lie beside what is read.
        self.x = {b: x for b, x in self.x.items() if b in backbones and same and not streams}
        self.rows = rows
        ids = cells[0].splits[0].ids[rows]
        if streams:
            return stream_features({b: self.plan.stores[b] for b in backbones}, ds, ids, config)
        for backbone in backbones:
            store = self.plan.stores[backbone]
            if backbone in self.x:
                continue
            try:
                self.x[backbone] = load_features(store, ds, ids, config.views, keep_half=True).to(config.device)
            except (MemoryError, RuntimeError) as error:
                if not is_shortage(error):
                    raise
                closed = isinstance(self.plan.head, ClosedFormHead)
                raise StoreError(
                    f"the features of {len(rows):,} images do not fit into memory", code="out-of-memory",
                    found=str(error).splitlines()[0] if str(error) else None, where=store.path,
                    fix="a smaller --subset" + ("" if closed else ", or stream them: --buffer 10000"),
                ) from error  # fmt: skip
        return Resident({backbone: self.x[backbone] for backbone in backbones})


def plan_probe(
    dataset: ImageDataset,
    sets: Sequence[Sequence[str]],
    subsets: Sequence[str | int],
    config: ProbeConfig,
    *,
    home: PathLike | None = None,
    head: object = None,
) -> ProbePlan:
    """Open the stores, draw the splits and write down one cell per set of backbones and subset."""
    given = config.head if head is None else head
    model = find_head(given, config.hyperparameters)
    if isinstance(model, ClosedFormHead):
        _refuse_training_options(config)
        dataset = with_loss(dataset, dataset.task.losses[0])  # grades are classes to it
    dataset = with_loss(dataset, config.loss)
    names = [name for subset in subsets for name in subset_sizes(dataset, [subset])]
    subset_sizes(dataset, names)  # one at least
    config = _settled(config, model, dataset, home)
    metric = find_metric(config.metric or dataset.metric, dataset.task)
    check_order(metric, dataset.task)
    check_fits(model, dataset.task)
    for backbones in sets:
        check_backbones(model, backbones)
    stores = open_stores(dataset, sets, home, config.recipe, config.views)
    drawn = [
        plan_for(dataset, list(stores.values()), subsets=subsets, config=replace(config, seed=config.seed + repeat))
        for repeat in range(config.repeats)
    ]
    splits = name_everything(drawn)
    described = identify(model, given)
    notes = _notes(config, model)
    if described is None:
        described = {"name": name_of(model), "once": uuid.uuid4().hex}
        notes.append("the head has no importable name with JSON parameters: this run cannot be reused or rebuilt")
    if not model.keeps_models:
        notes.append("the heads are scikit-learn estimators: the run keeps their predictions, but no models")
    common = {
        "kind": "probe", "protocol": PROTOCOL_VERSION, "dataset": dataset.name, "head": described, "metric": metric.key,
        **asymmetry(metric, dataset.class_names, config.positive),
        **({"task": task} if (task := task_of(dataset)) else {}),
        **({"target": dataset.target} if dataset.target else {}),
        **({"classes": dict(dataset.renamed)} if dataset.renamed else {}),
        **config.result_options(),
        "test": splits[0].test_set, "val": splits[0].val_mode, "folds": splits[0].n_folds,
    }  # fmt: skip
    source = "live" if dataset.root is not None and dataset.root.exists() else "snapshot"
    cells: dict[tuple[tuple[str, ...], str], RunCell] = {}
    order = [(tuple(named), splits[0].name_of(name)) for named in sets for name in names]
    for backbones, subset in dict.fromkeys(order):
        own = {backbone: stores[backbone] for backbone in backbones}
        cell = RunCell(
            dataset=dataset, splits=splits, subset=subset, backbones=backbones, head=model, request={}, source=source,
            recipes={backbone: store.recipe.to_json() for backbone, store in own.items()}, positive=config.positive,
            notes=(*request_notes(dataset, splits, subset, model), *notes),
        )  # fmt: skip
        used, digests = splits[0].ids[cell.rows], [p.digest(subset) for p in splits]
        request = {
            **common,
            "subset": subset,
            "splits": digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest(),
            "images": digest_images(own, used),
            "recipes": [[backbone, store.recipe.fingerprint] for backbone, store in own.items()],
            **({} if config.buffer is None else {"shards": digest_shards(own, dataset, used, config.views)}),
        }
        # As it reads back: lists, no tuples.
        cells[backbones, subset] = replace(cell, request=json.loads(json.dumps(request)))
    metric = metric.of(positive_class(dataset.class_names, config.positive))
    return ProbePlan(dataset, model, config, stores, metric, tuple(cells[key] for key in order), home)


def _settled(config: ProbeConfig, head: Head, dataset: ImageDataset, home: PathLike | None) -> ProbeConfig:
    """The config with each computation written in one way; refuses what the head does not take."""
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            "the device cannot be used", code="device-not-usable", fix="--device cpu",
            found=f"{config.device}: {str(error).splitlines()[0]}",
        ) from error  # fmt: skip
    if config.splits is not None:
        config = replace(config, splits=str(find_splits(config.splits, dataset, home)))
    rates = tuple(dict.fromkeys(config.lr))
    config = replace(config, loss=None)  # that of the target, which is in the request
    return replace(config, lr=() if rates == (Schedule.lr,) else rates)


def _refuse_training_options(config: ProbeConfig) -> None:
    given = [f"--buffer {config.buffer}"] if config.buffer is not None else []
    given += [f"--lr {config.lr[0]:g}"] if config.lr else []
    given += [f"--loss {config.loss}"] if config.loss else []
    if given:
        raise UsageError(
            f"head {config.head!r} is solved on all features at once: it has no learning rate or loss, and nothing is "
            "streamed",
            code="head-not-trained", found=" ".join(given),
            fix=f"leave {given[0].split()[0]} out, or a head that is trained: --head linear",
        )  # fmt: skip
    if config.repeats > 1 and config.splits:
        raise UsageError(
            "repeats of a closed-form head on the folds of a splits file are copies of each other",
            code="repeats-are-copies", expected="folds drawn anew for each repeat, or a head that is trained",
            found=f"--head {config.head} --repeats {config.repeats} --splits {config.splits}",
            fix="leave --repeats or --splits out",
        )  # fmt: skip


def _notes(config: ProbeConfig, head: Head) -> list[str]:
    notes = []
    if len(config.lr) > 1:
        rates = ", ".join(f"{rate:g}" for rate in config.lr)
        notes.append(f"learning rate chosen on validation, fold by fold, among {rates}")
    if config.repeats > 1:
        drawn = "random streams on the folds of the splits file"
        drawn = drawn if config.splits else "folds, subsets and random streams"
        notes.append(f"{config.repeats} repeats with other {drawn}, on one test set")
    if config.views > 1 and isinstance(head, ClosedFormHead):
        notes.append(f"{head.name} is solved on the plain images: it takes no views")
    elif config.views > 1:
        notes.append(f"training draws one of {config.views} views of each image each epoch; others see it plain")
    if config.buffer is not None:
        notes.append(f"features were streamed: an epoch is shuffled by shards, then in some {config.buffer:,} rows")
    return notes
