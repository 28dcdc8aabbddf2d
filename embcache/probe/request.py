"""A probe that is asked for, nothing computed yet: its stores, its splits, and the request that a result hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from embcache.data.columns import retarget
from embcache.data.dataset import ImageDataset
from embcache.data.splits import IntArray
from embcache.errors import UsageError
from embcache.probe.budget import Need, Shape, estimate, megabytes
from embcache.probe.heads import Head, hyperparameters
from embcache.probe.inputs import digest_images, digest_shards, open_stores, plan_for
from embcache.probe.metrics import Metric, asymmetry, find_metric, positive_class
from embcache.probe.options import ProbeOptions
from embcache.probe.protocol import subset_sizes
from embcache.probe.results import PROTOCOL_VERSION, ProbeResult, as_asked, find_run, run_id
from embcache.probe.solve import is_solved
from embcache.probe.splits import Splits, name_everything
from embcache.probe.summary import request_notes, training_notes, with_positive
from embcache.store.feature_store import FeatureStore


@dataclass(frozen=True, eq=False)
class Asked:
    """Sets of backbones × subsets on one dataset.

    Attributes
    ----------
    ds : ImageDataset
        With the target column as its labels where one is asked for.
    sets : sequence of sequences of str
        Each gives one result per subset.
    subsets : tuple of str
        Canonical names, each once.
    order : tuple of str
        The canonical name of each subset that was asked for.
    stores : mapping of backbone to FeatureStore
    plans : tuple of Splits
        One a repeat; all have the same test set.
    options : ProbeOptions
    source : {"live", "snapshot"}
        Where labels came from.
    """

    ds: ImageDataset
    sets: Sequence[Sequence[str]]
    subsets: tuple[str, ...]
    order: tuple[str, ...]
    stores: Mapping[str, FeatureStore]
    plans: tuple[Splits, ...]
    options: ProbeOptions
    source: str
    _needs: dict[tuple[str, ...], Need] = field(default_factory=dict, repr=False, compare=False)

    @property
    def metric(self) -> Metric:
        """What scores, and chooses epochs on validation: the one asked for, else the dataset's own."""
        return find_metric(self.options.metric or self.ds.metric, len(self.ds.class_names))

    @property
    def positive(self) -> int:
        """The positive class."""
        return positive_class(self.ds.class_names, self.options.positive)

    @property
    def n_models(self) -> int:
        """Heads that one result trains: repeats × folds × learning rates."""
        return len(self.plans) * self.plans[0].n_folds * len(self.options.schedules)

    def used(self, *subsets: str) -> IntArray:
        """Rows of the dataset that train, validate or test in any repeat, ascending."""
        return np.unique(np.concatenate([plan.used(subset) for plan in self.plans for subset in subsets]))

    def request(self, backbones: Sequence[str], subset: str) -> dict[str, Any]:
        """Everything that one result depends on, as JSON data; what is not asked for is not in it."""
        o, plan = self.options, self.plans[0]
        stores = {backbone: self.stores[backbone] for backbone in backbones}
        digests = [p.digest(subset) for p in self.plans]
        request = {
            "kind": "probe",
            "protocol": PROTOCOL_VERSION,
            "dataset": self.ds.name,
            "metric": self.metric.key,
            "splits": digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest(),
            "images": digest_images(stores, plan.ids[self.used(subset)]),
            "recipes": [[backbone, store.recipe.fingerprint] for backbone, store in stores.items()],
            "head": {"name": o.model.name, **hyperparameters(o.model)},
            "schedule": {} if is_solved(o.model) else asdict(o.schedules[0]),
            "subset": subset,
            "folds": plan.n_folds,
            "val": plan.val_mode,
            "test": plan.test_set,
            "seed": o.seed,
            **({"repeats": o.repeats} if o.repeats > 1 else {}),
            **({"lrs": [schedule.lr for schedule in o.schedules]} if len(o.schedules) > 1 else {}),
            **({"views": o.n_views} if o.n_views > 1 else {}),
            **({"target": self.ds.target} if self.ds.target else {}),
            **({"classes": dict(self.ds.renamed)} if self.ds.renamed else {}),
            **asymmetry(self.metric, self.ds.class_names, o.positive),
            **({"exclude_test_overlap": True} if o.exclude_test_overlap else {}),
            **self._streamed(backbones, subset),
        }
        return json.loads(json.dumps(request))  # type: ignore[no-any-return]  # as it reads back: lists, no tuples

    def need(self, backbones: Sequence[str], *subsets: str) -> Need:
        """Memory that these subsets take, trained together; estimated once, as all that follows asks for it again."""
        key = (*backbones, "", *subsets)
        if key not in self._needs:
            self._needs[key] = self._estimate(backbones, subsets)
        return self._needs[key]

    def _estimate(self, backbones: Sequence[str], subsets: Sequence[str]) -> Need:
        o, kinds = self.options, [(plan, f, s) for plan in self.plans for s in subsets for f in range(plan.n_folds)]
        shape = Shape(
            images=len(self.plans[0].ids),
            used=len(self.used(*subsets)),
            train=max(len(plan.train[f, s]) for plan, f, s in kinds),
            val=max(len(plan.val[f, s]) for plan, f, s in kinds),
            test=len(self.plans[0].test),
            models=self.n_models * len(subsets),
            batch=o.schedules[0].batch_size,
            n_classes=len(self.ds.class_names),
            n_views=o.n_views,
        )
        return estimate(o.model, {backbone: self.stores[backbone] for backbone in backbones}, shape)

    def buffer_rows(self, backbones: Sequence[str], subset: str) -> int | None:
        """Rows of the buffer that features are streamed through; None where they are read into memory.

        Raises
        ------
        UsageError
            The limit holds neither the features nor a buffer of them, with what one head takes at least; or it does
            not hold the features, and the head is solved.
        """
        o, limit = self.options, self.options.memory
        if limit is None:
            return None
        need = self.need(backbones, subset)
        if need.in_memory <= limit:
            return None
        features = f"{need.features / 1e6:,.4g} MB of features"
        if need.solved:
            raise UsageError(
                f"head {o.head!r} is solved on all features at once: they cannot be streamed",
                expected=f"--max-memory {megabytes(need.least)} or more, copies that are worked on included",
                found=f"{limit / 1e6:,.4g} MB for {features}",
                fix=f"--max-memory {megabytes(need.least)}, a smaller --subset, or a head that is trained: "
                "--head linear",
            )
        if need.streamed > limit:
            streams = need.streamed < need.in_memory
            raise UsageError(
                "--max-memory leaves no room for a buffer of features" if streams else "--max-memory is too small",
                expected=f"{megabytes(need.least)} or more, "
                + ("to stream features through a buffer" if streams else "to read features into memory"),
                found=f"{limit / 1e6:,.4g} MB for {features}, and {(need.base + need.head) / 1e6:,.4g} MB for training",
                fix=f"--max-memory {megabytes(need.least)}",
            )
        return need.buffer_rows(limit)

    def _streamed(self, backbones: Sequence[str], subset: str) -> dict[str, Any]:
        """What a request holds of how features are streamed: nothing where they are not."""
        rows = self.buffer_rows(backbones, subset)
        if rows is None:
            return {}
        stores = {backbone: self.stores[backbone] for backbone in backbones}
        lies = digest_shards(stores, self.ds, self.plans[0].ids[self.used(subset)], self.options.n_views)
        return {"buffer_rows": rows, "shards": lies}

    def notes(self, backbones: Sequence[str], subset: str) -> list[str]:
        """What a reader must know of how a result was asked for."""
        rows = self.buffer_rows(backbones, subset)
        if rows is None:
            return self.options.notes()
        streamed = f"features were streamed: an epoch's order is shuffled by shards, then within some {rows:,} rows"
        return [*self.options.notes(), streamed]

    def saved(self, request: Mapping[str, Any]) -> ProbeResult | None:
        """The saved result of a request, with the source and the notes of this one; None where there is none."""
        found = find_run(run_id(request), self.ds.name, self.options.home)
        if found is None:
            return None
        found = with_positive(found, self.options.positive, self.options.home)
        notes = [
            *request_notes(self.ds, self.plans, found.subset, found.head),
            *self.notes(found.backbones, found.subset),
            *training_notes(found),
        ]
        return as_asked(found, self.source, notes)


def ask(
    ds: ImageDataset,
    sets: Sequence[Sequence[str]],
    subsets: Sequence[str | int],
    options: ProbeOptions,
    source: str | None = None,
) -> Asked:
    """Open the stores and draw the splits of a request.

    Raises
    ------
    UsageError
        The request is malformed.
    DatasetError
        The target column cannot be told apart.
    ProtocolError
        The data cannot carry the folds or the subsets.
    StoreError
        Nothing is cached for it, or several recipes are.
    """
    if options.target is not None:
        ds = retarget(ds, options.target)
    names = [name for asked in subsets for name in subset_sizes(ds, [asked])]
    subset_sizes(ds, names)  # one at least
    check_device(options.device)
    sets = [_checked_set(options.model, asked) for asked in sets]
    stores = open_stores(ds, sets, options.home, options.recipe, options.n_views)
    drawn = [
        plan_for(
            ds,
            list(stores.values()),
            subsets=subsets,
            folds=options.folds,
            seed=options.seed + repeat,
            val=options.val,
            test=options.test,
            splits=options.splits,
            exclude_test_overlap=options.exclude_test_overlap,
        )
        for repeat in range(options.repeats)
    ]
    plans = name_everything(drawn)
    order = tuple(map(plans[0].name_of, names))
    source = source or ("live" if ds.root is not None and ds.root.exists() else "snapshot")
    return Asked(ds, sets, tuple(dict.fromkeys(order)), order, stores, plans, options, source)


def _checked_set(head: Head, names: Sequence[str]) -> Sequence[str]:
    if not names:
        raise UsageError("no backbone was named", fix="--backbone NAME")
    if len(set(names)) < len(names):
        raise UsageError("a backbone is named twice", found=", ".join(names))
    if not head.fuses and len(names) != 1:
        raise UsageError(
            f"head {head.name!r} takes one backbone at a time",
            found=", ".join(names),
            fix=f"backbones=[{names[0]!r}], or a head that fuses: dvme",
        )
    return names


def check_device(device: str) -> None:
    """Raise a `UsageError` unless torch can compute there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            "the device cannot be used", found=f"{device}: {str(error).splitlines()[0]}", fix="--device cpu"
        ) from error
