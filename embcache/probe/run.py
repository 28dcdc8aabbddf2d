"""Probing, top to bottom: dataset and stores → splits → features in memory → stacked heads → results."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from embcache.data.dataset import ImageDataset
from embcache.data.splits import IntArray
from embcache.errors import StoreError
from embcache.paths import PathLike
from embcache.probe.apply import predict_logits
from embcache.probe.inputs import load_features
from embcache.probe.metrics import FloatArray, softmax
from embcache.probe.options import ProbeOptions, make_options
from embcache.probe.request import Asked, ask
from embcache.probe.results import ProbeResult, run_id, save_run
from embcache.probe.solve import is_solved
from embcache.probe.summary import Outcome, prediction_table, summarise
from embcache.probe.train import best_of, make_job, train_jobs

Progress = Callable[[int, int, str], Any]
"""Told (head-epochs settled, head-epochs planned, what is being trained)."""


def probe_features(
    ds: ImageDataset,
    backbones: str | Sequence[str],
    *,
    head: str = "linear",
    subset: str | int = "S",
    folds: int = 5,
    seed: int = 0,
    repeats: int = 1,
    home: PathLike | None = None,
    val: str = "full",
    test: str = "local",
    recipe: str | None = None,
    views: int | None = None,
    lr: float | Sequence[float] | None = None,
    target: str | None = None,
    head_options: Mapping[str, Any] | None = None,
    splits: PathLike | None = None,
    exclude_test_overlap: bool = False,
    device: str = "cpu",
    save: bool = True,
    reuse: bool = True,
    progress: Progress | None = None,
) -> ProbeResult:
    """Train a head on cached features by the paper's protocol and test it.

    Nothing is computed from images: only the feature stores and the labels are read. A result that was saved under the
    same request is returned as it is. A fold whose training diverges in its first epoch has no score; the others keep
    theirs, and a note says which it was.

    Parameters
    ----------
    ds : ImageDataset
        Labels, groups and splits; its files need not be there.
    backbones : str or sequence of str
        Whose cached features; exactly one for a head that does not fuse.
    subset : str or int
        ``"S"``, ``"M"``, ``"F"``, or a number of training images.
    head, folds, seed, repeats, home, val, test, recipe, views, lr, target, head_options, splits, exclude_test_overlap,\
 device, save, reuse
        See `embcache.probe.options.ProbeOptions`.
    progress : callable, optional
        See `Progress`.

    Returns
    -------
    ProbeResult

    Raises
    ------
    UsageError
        The request is malformed.
    DatasetError
        The target column cannot be told apart.
    ProtocolError
        The data cannot carry the folds, the subset or the metric; or training diverged in every fold.
    StoreError
        Features are missing.
    """
    options = ProbeOptions(
        head=head,
        head_options=head_options,
        folds=folds,
        seed=seed,
        repeats=repeats,
        home=home,
        val=val,
        test=test,
        recipe=recipe,
        views=views,
        lr=lr,
        target=target,
        splits=splits,
        exclude_test_overlap=exclude_test_overlap,
        device=device,
        save=save,
        reuse=reuse,
    )
    names = [backbones] if isinstance(backbones, str) else list(backbones)
    (result,) = _answer_all(ask(ds, [names], [subset], options), progress)
    return result


def probe_grid(
    ds: ImageDataset,
    backbones: Sequence[Sequence[str]],
    *,
    subsets: Sequence[str | int] = ("S",),
    source: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> list[ProbeResult]:
    """`probe_features` for several sets of backbones and subsets; features are read once for all subsets.

    Parameters
    ----------
    ds : ImageDataset
        Labels, groups and splits.
    backbones : sequence of sequences of str
        Each set gives one result per subset; one name a set for a head that does not fuse.
    subsets : sequence of str or int
        Names or numbers of training images.
    source : {"live", "snapshot"}, optional
        Where ``ds`` came from, to be told with the result; default: whether its root is there.
    progress : callable, optional
        See `Progress`.
    **options
        See `embcache.probe.options.ProbeOptions`.

    Returns
    -------
    list of ProbeResult
        For each set of backbones each subset, in the order asked.
    """
    return _answer_all(ask(ds, backbones, subsets, make_options(options), source), progress)


def find_saved(
    ds: ImageDataset,
    backbones: Sequence[Sequence[str]],
    *,
    subsets: Sequence[str | int] = ("S",),
    source: str | None = None,
    **options: Any,
) -> list[ProbeResult | str]:
    """What `probe_grid` would not have to train: each saved result, or the id of the run that would be made.

    Parameters as of `probe_grid`. Requests are computed, nothing is trained or written; the stores must be there.
    """
    asked = ask(ds, backbones, subsets, make_options(options), source)
    requests = [asked.request(names, subset) for names in asked.sets for subset in asked.subsets]
    return [asked.saved(request) or run_id(request) for request in requests]


def _answer_all(asked: Asked, progress: Progress | None) -> list[ProbeResult]:
    o, ds = asked.options, asked.ds
    each = asked.n_models * o.schedules[0].max_epochs
    settled, planned = 0, len(asked.sets) * len(asked.subsets) * each
    results: list[ProbeResult] = []
    loaded: dict[str, torch.Tensor] = {}
    used = asked.used(*asked.subsets)
    for names in asked.sets:
        loaded = {backbone: x for backbone, x in loaded.items() if backbone in names}  # the others are done with
        for subset in asked.subsets:
            request = asked.request(names, subset)
            result = asked.saved(request) if o.save and o.reuse else None
            if result is None:
                for backbone in names:
                    if backbone not in loaded:
                        x = load_features(asked.stores[backbone], ds, asked.plans[0].ids[used], o.n_views)
                        loaded[backbone] = x.to(o.device)
                tell = _teller(progress, settled, planned, f"{ds.name} {o.head} {'+'.join(names)} {subset}")
                result = _answer(asked, subset, request, {b: loaded[b] for b in names}, used, tell)
            results.append(result)
            settled += each
            if progress is not None:
                progress(settled, planned, f"{ds.name} {o.head}")
    return results


def _answer(
    asked: Asked,
    subset: str,
    request: Mapping[str, Any],
    x: Mapping[str, torch.Tensor],
    used: IntArray,
    on_epoch: Callable[[int], Any],
) -> ProbeResult:
    """Train, test and save one result; ``x`` holds features of the dataset's rows ``used``."""
    began = time.perf_counter()
    o, ds, plans = asked.options, asked.ds, asked.plans
    n_classes, head = len(ds.class_names), o.model
    place = np.full(len(plans[0].ids), -1, dtype=np.int64)  # dataset row → row of the features
    place[used] = np.arange(len(used))
    labels = plans[0].labels[used]
    jobs = [
        make_job(
            labels,
            place[plan.train[f, subset]],
            place[plan.val[f, subset]],
            n_classes,
            f"{o.seed + repeat}\0{f}",
            schedule.lr,
        )
        for repeat, plan in enumerate(plans)
        for f in range(plan.n_folds)
        for schedule in o.schedules
    ]
    y = torch.from_numpy(labels).to(o.device)
    every = train_jobs(head, x, y, jobs, n_classes, ds.metric, o.schedules[0], on_epoch=on_epoch)
    rates = len(o.schedules)
    sweeps = [range(k, k + rates) for k in range(0, len(every), rates)]
    chosen = [sweep[best_of([every[k] for k in sweep])] for sweep in sweeps]
    models = [every[k] for k in chosen]
    outcomes = [
        Outcome(
            best_epoch=every[k].best_epoch,
            epochs=len(every[k].losses),
            val_score=every[k].val_score,
            lr=None if is_solved(head) else jobs[k].lr,
            diverged=every[k].diverged,
            chosen=every[k].chosen,
            lost_lrs=[jobs[j].lr for j in sweep if every[j].diverged and j != k],
        )
        for k, sweep in zip(chosen, sweeps, strict=True)
    ]
    rows = torch.from_numpy(place[plans[0].test])
    blank = np.full((len(rows), n_classes), np.nan)
    p = np.stack(  # (R × K, n_test, C)
        [softmax(predict_logits(head, m.params, x, rows)) if m.params else blank for m in models]
    )
    _check_finite(p[[bool(m.params) for m in models]], plans[0].test_ids, asked)
    result = summarise(
        ds,
        plans,
        subset,
        kind="probe",
        backbones=tuple(x),
        head=o.head,
        request=request,
        recipes={backbone: asked.stores[backbone].recipe.to_json() for backbone in x},
        outcomes=outcomes,
        p=p,
        source=asked.source,
        seconds=time.perf_counter() - began,
        target=asked.target,
        notes=o.notes(),
    )
    if o.save:
        save_run(result, prediction_table(plans[0], p, outcomes), [m.params for m in models], o.home)
    return result


def _check_finite(p: FloatArray, test_ids: Sequence[str], asked: Asked) -> None:
    bad = [test_ids[int(i)] for i in np.flatnonzero(~np.isfinite(p).all(axis=(0, 2)))]
    if bad:
        raise StoreError(
            f"{len(bad):,} of {len(test_ids):,} test images have features that are not finite",
            found=", ".join(map(repr, bad[:5])) + (" …" if len(bad) > 5 else ""),
            where=", ".join(str(store.path) for store in asked.stores.values()),
            fix="remove the store and extract again, in fp32: embcache ls",
        )


def _teller(progress: Progress | None, settled: int, planned: int, label: str) -> Callable[[int], Any]:
    return lambda done: progress(settled + done, planned, label) if progress is not None else None
