"""A probe that is asked for, nothing computed yet: its stores, its splits, and the request that a result hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embcache.data.classes import retarget
from embcache.data.dataset import ImageDataset
from embcache.data.draws import IntArray
from embcache.errors import UsageError
from embcache.probe.heads import Head, hyperparameters
from embcache.probe.inputs import digest_images, digest_shards, open_stores, plan_for
from embcache.probe.metrics import Metric, asymmetry, find_metric, positive_class
from embcache.probe.options import ProbeOptions
from embcache.probe.protocol import subset_sizes
from embcache.probe.solve import is_solved
from embcache.probe.splits import Splits, name_everything
from embcache.probe.summary import request_notes, training_notes, with_positive
from embcache.runs.folders import PROTOCOL_VERSION, ProbeResult, as_asked, find_run, run_id
from embcache.store.feature_store import FeatureStore


@dataclass(frozen=True, eq=False)
class Asked:
    """Sets of backbones × subsets on one dataset."""

    ds: ImageDataset  # with the target column as its labels where one is asked for
    sets: Sequence[Sequence[str]]  # each gives one result per subset
    subsets: tuple[str, ...]  # canonical names, each once
    order: tuple[str, ...]  # the canonical name of each subset that was asked for
    stores: Mapping[str, FeatureStore]
    plans: tuple[Splits, ...]  # one a repeat; all have the same test set
    options: ProbeOptions
    source: str  # where labels came from

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
        used = plan.ids[self.used(subset)]
        digests = [p.digest(subset) for p in self.plans]
        request = {
            "kind": "probe",
            "protocol": PROTOCOL_VERSION,
            "dataset": self.ds.name,
            "metric": self.metric.key,
            "splits": digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest(),
            "images": digest_images(stores, used),
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
            **self._streamed(stores, used),
        }
        return json.loads(json.dumps(request))  # type: ignore[no-any-return]  # as it reads back: lists, no tuples

    def _streamed(self, stores: Mapping[str, FeatureStore], used: NDArray[np.object_]) -> dict[str, Any]:
        """What a request holds of how features are streamed: nothing where they are not."""
        rows = self.options.buffer
        if rows is None:
            return {}
        return {"buffer_rows": rows, "shards": digest_shards(stores, self.ds, used, self.options.n_views)}

    def saved(self, request: Mapping[str, Any]) -> ProbeResult | None:
        """The saved result of a request, with the source and the notes of this one; None where there is none."""
        found = find_run(run_id(request), self.ds.name, self.options.home)
        if found is None:
            return None
        found = with_positive(found, self.options.positive, self.options.home)
        notes = [
            *request_notes(self.ds, self.plans, found.subset, found.head),
            *self.options.notes(),
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
    """Open the stores and draw the splits of a request."""
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
