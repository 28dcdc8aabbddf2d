"""Probing, top to bottom: dataset and stores → splits → features in memory → stacked heads → results."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from embcache.data.dataset import ImageDataset
from embcache.data.splits import IntArray
from embcache.errors import UsageError
from embcache.paths import PathLike
from embcache.probe.apply import predict_logits
from embcache.probe.heads import Head, hyperparameters, make_head
from embcache.probe.inputs import digest_images, load_features, open_stores, plan_for
from embcache.probe.metrics import softmax
from embcache.probe.protocol import subset_sizes
from embcache.probe.results import (
    PROTOCOL_VERSION,
    ProbeResult,
    as_asked,
    find_run,
    run_id,
    save_run,
)
from embcache.probe.schedule import Schedule
from embcache.probe.splits import Splits
from embcache.probe.summary import Outcome, prediction_table, request_notes, summarise, training_notes
from embcache.probe.train import make_job, train_jobs
from embcache.store.feature_store import FeatureStore

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
    home: PathLike | None = None,
    val: str = "full",
    test: str = "local",
    recipe: str | None = None,
    lr: float | None = None,
    splits: PathLike | None = None,
    exclude_test_overlap: bool = False,
    device: str = "cpu",
    save: bool = True,
    reuse: bool = True,
    progress: Progress | None = None,
) -> ProbeResult:
    """Train a head on cached features by the paper's protocol and test it.

    Nothing is computed from images: only the feature stores and the labels are read. A result that was saved under the
    same request is returned as it is.

    Parameters
    ----------
    ds : ImageDataset
        Labels, groups and splits; its files need not be there.
    backbones : str or sequence of str
        Whose cached features; exactly one for a head that does not fuse.
    head : str
        A name that ``embcache heads`` lists.
    subset : str or int
        ``"S"``, ``"M"``, ``"F"``, or a number of training images.
    folds : int
        How many folds the pool is divided into.
    seed : int
        Of pool, folds, subsets, initial weights, order and dropout.
    home : path, optional
        Folder of stores and runs; default ``$EMBCACHE_HOME``, else ``~/.cache/embcache``.
    val : {"full", "matched"}
        Validate on the whole fold, or on as many images as train.
    test : {"local", "official"}
        See `embcache.probe.protocol.plan_splits`.
    recipe : str, optional
        First digits of a fingerprint, where several recipes of a backbone are cached; several separated by commas.
    lr : float, optional
        First learning rate, instead of the protocol's 1e-3.
    splits : path, optional
        A splits file to use instead of drawing.
    exclude_test_overlap : bool
        Leave out of the pool images that share a group with the official test set.
    device : str
        Where heads are trained: ``"cpu"``, ``"cuda"`` …
    save : bool
        Write the run folder.
    reuse : bool
        Take a saved result of the same request.
    progress : callable, optional
        See `Progress`.

    Returns
    -------
    ProbeResult

    Raises
    ------
    UsageError
        The request is malformed.
    ProtocolError
        The data cannot carry the folds, the subset or the metric; or training diverged.
    StoreError
        Features are missing.
    """
    names = [backbones] if isinstance(backbones, str) else list(backbones)
    (result,) = probe_grid(
        ds,
        [names],
        head=head,
        subsets=[subset],
        folds=folds,
        seed=seed,
        home=home,
        val=val,
        test=test,
        recipe=recipe,
        lr=lr,
        splits=splits,
        exclude_test_overlap=exclude_test_overlap,
        device=device,
        save=save,
        reuse=reuse,
        progress=progress,
    )
    return result


def probe_grid(
    ds: ImageDataset,
    backbones: Sequence[Sequence[str]],
    *,
    head: str = "linear",
    subsets: Sequence[str | int] = ("S",),
    folds: int = 5,
    seed: int = 0,
    home: PathLike | None = None,
    val: str = "full",
    test: str = "local",
    recipe: str | None = None,
    lr: float | None = None,
    splits: PathLike | None = None,
    exclude_test_overlap: bool = False,
    device: str = "cpu",
    save: bool = True,
    reuse: bool = True,
    source: str | None = None,
    progress: Progress | None = None,
) -> list[ProbeResult]:
    """`probe_features` for several sets of backbones and subsets; features are read once for all subsets.

    Parameters
    ----------
    ds, head, folds, seed, home, val, test, recipe, lr, splits, exclude_test_overlap, device, save, reuse, progress
        As for `probe_features`.
    backbones : sequence of sequences of str
        Each set gives one result per subset; one name a set for a head that does not fuse.
    subsets : sequence of str or int
        Names or numbers of training images.
    source : {"live", "snapshot"}, optional
        Where ``ds`` came from, to be told with the result; default: whether its root is there.

    Returns
    -------
    list of ProbeResult
        For each set of backbones each subset, in the order asked.
    """
    model = make_head(head)
    schedule = Schedule() if lr is None else Schedule(lr=lr)
    names = tuple(subset_sizes(ds, subsets))
    _check_device(device)
    stores = open_stores(ds, [_checked_set(model, asked) for asked in backbones], home, recipe)
    plan = plan_for(
        ds,
        list(stores.values()),
        subsets=names,
        folds=folds,
        seed=seed,
        val=val,
        test=test,
        splits=splits,
        exclude_test_overlap=exclude_test_overlap,
    )
    source = source or ("live" if ds.root is not None and ds.root.exists() else "snapshot")
    results: list[ProbeResult] = []
    settled, planned = 0, len(backbones) * len(names) * plan.n_folds * schedule.max_epochs
    loaded: dict[str, torch.Tensor] = {}
    used = np.unique(np.concatenate([plan.used(subset) for subset in names]))
    for asked in backbones:
        chosen = {backbone: stores[backbone] for backbone in asked}
        loaded = {backbone: x for backbone, x in loaded.items() if backbone in chosen}  # the others are done with
        for subset in names:
            request = _request(ds, plan, subset, chosen, model, schedule, seed)
            result = find_run(run_id(request), ds.name, home) if save and reuse else None
            if result is None:
                for backbone, store in chosen.items():
                    if backbone not in loaded:
                        loaded[backbone] = load_features(store, ds, plan, used).to(device)
                label = f"{ds.name} {head} {'+'.join(asked)} {subset}"
                tell = _teller(progress, settled, planned, label)
                question = Question(
                    ds, plan, subset, {b: loaded[b] for b in asked}, used, model, schedule, seed, device
                )
                result = _answer(question, request, source, home, save, tell)
            notes = [*request_notes(ds, plan, subset), *training_notes(result.folds)]
            results.append(as_asked(result, source, notes))
            settled += plan.n_folds * schedule.max_epochs
            if progress is not None:
                progress(settled, planned, f"{ds.name} {head}")
    return results


@dataclass(frozen=True, eq=False)
class Question:
    """One result to compute, everything in memory.

    Attributes
    ----------
    ds, plan, subset
        Dataset, its splits and the subset asked for.
    features : mapping of backbone to float32 Tensor of shape (n, D)
        Raw features of the rows ``used``.
    used : int64 array of shape (n,)
        Row in the dataset of each row of the features.
    head, schedule, seed, device
        What is trained, how and where.
    """

    ds: ImageDataset
    plan: Splits
    subset: str
    features: Mapping[str, torch.Tensor]
    used: IntArray
    head: Head
    schedule: Schedule
    seed: int
    device: str


def _answer(
    q: Question,
    request: Mapping[str, Any],
    source: str,
    home: PathLike | None,
    save: bool,
    on_epoch: Callable[[int], Any],
) -> ProbeResult:
    began = time.perf_counter()
    plan, metric, n_classes = q.plan, q.ds.metric, len(q.ds.class_names)
    place = np.full(len(plan.ids), -1, dtype=np.int64)  # dataset row → row of the features
    place[q.used] = np.arange(len(q.used))
    labels = plan.labels[q.used]
    jobs = [
        make_job(
            labels,
            place[plan.train[f, q.subset]],
            place[plan.val[f, q.subset]],
            n_classes,
            f"{q.seed}\0{f}",
            q.schedule.lr,
        )
        for f in range(plan.n_folds)
    ]
    y = torch.from_numpy(labels).to(q.device)
    trained = train_jobs(q.head, q.features, y, jobs, n_classes, metric, q.schedule, on_epoch=on_epoch)
    outcomes = [
        Outcome(head.best_epoch, len(head.losses), head.val_score, job.lr, head.diverged)
        for job, head in zip(jobs, trained, strict=True)
    ]
    rows = torch.from_numpy(place[plan.test])
    blank = np.full((len(rows), n_classes), np.nan)
    p = np.stack(  # (K, n_test, C)
        [softmax(predict_logits(q.head, h.params, q.features, rows)) if h.params else blank for h in trained]
    )
    result = summarise(
        q.ds,
        [plan],
        q.subset,
        kind="probe",
        backbones=tuple(q.features),
        head=q.head.name,
        request=request,
        recipes={},
        outcomes=outcomes,
        p=p,
        source=source,
        seconds=time.perf_counter() - began,
    )
    if save:
        save_run(result, prediction_table(plan, p, outcomes), [head.params for head in trained], home)
    return result


def _request(
    ds: ImageDataset,
    plan: Splits,
    subset: str,
    stores: Mapping[str, FeatureStore],
    head: Head,
    schedule: Schedule,
    seed: int,
) -> dict[str, Any]:
    """Everything that the result depends on, as JSON data."""
    return {
        "kind": "probe",
        "protocol": PROTOCOL_VERSION,
        "dataset": ds.name,
        "metric": ds.metric,
        "splits": plan.digest(subset),
        "images": digest_images(stores, plan, subset),
        "recipes": [[backbone, store.recipe.fingerprint] for backbone, store in stores.items()],
        "head": {"name": head.name, **hyperparameters(head)},
        "schedule": asdict(schedule),
        "subset": subset,
        "folds": plan.n_folds,
        "val": plan.val_mode,
        "test": plan.test_set,
        "seed": seed,
    }


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


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            "the device cannot be used", found=f"{device}: {str(error).splitlines()[0]}", fix="--device cpu"
        ) from error


def _teller(progress: Progress | None, settled: int, planned: int, label: str) -> Callable[[int], Any]:
    return lambda done: progress(settled + done, planned, label) if progress is not None else None
