"""Probing, top to bottom: dataset and stores → splits → features in memory → stacked heads → results."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embcache.data.dataset import ImageDataset
from embcache.data.draws import IntArray
from embcache.errors import StoreError
from embcache.memory import is_shortage
from embcache.paths import PathLike
from embcache.probe.feature_rows import FeatureRows, Resident
from embcache.probe.heads import Head, count_parameters
from embcache.probe.inputs import load_features, stream_features
from embcache.probe.options import ProbeOptions, make_options
from embcache.probe.probe_plan import Asked, ask
from embcache.probe.solve import is_solved
from embcache.probe.stack import Job, TrainedHead, logits_of_sets
from embcache.probe.summary import Outcome, Outputs, prediction_table, summarise, validation_table
from embcache.probe.train import best_of, make_job, train_jobs
from embcache.runs.folders import ProbeResult, run_id, save_run

Progress = Callable[[int, int, str], Any]
"""Told (head-epochs settled, head-epochs planned, what is being trained)."""

_SMALL = 5_000_000
"""Parameters of one subset's heads up to which several subsets train as one stack."""


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
    metric: str | None = None,
    positive: str | None = None,
    target: str | None = None,
    head_options: Mapping[str, Any] | None = None,
    splits: PathLike | None = None,
    exclude_test_overlap: bool = False,
    device: str = "cpu",
    buffer: int | None = None,
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
    head, folds, seed, repeats, home, val, test, recipe, views, lr, metric, positive, target, head_options, splits,\
 exclude_test_overlap, device, buffer, save, reuse
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
        metric=metric,
        positive=positive,
        target=target,
        splits=splits,
        exclude_test_overlap=exclude_test_overlap,
        device=device,
        buffer=buffer,
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
    """`probe_features` for several sets of backbones and subsets; features are read once for all subsets."""
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
    requests = [asked.request(names, subset) for names in asked.sets for subset in asked.order]
    return [asked.saved(request) or run_id(request) for request in requests]


def _answer_all(asked: Asked, progress: Progress | None) -> list[ProbeResult]:
    o, each = asked.options, asked.n_models * asked.options.schedules[0].max_epochs
    settled, planned = 0, len(asked.sets) * len(asked.subsets) * each
    results: list[ProbeResult] = []
    loaded = _Loaded()
    for names in asked.sets:
        loaded.keep(names)  # the others are done with
        requests = {subset: asked.request(names, subset) for subset in asked.subsets}
        saved = {subset: asked.saved(r) if o.save and o.reuse else None for subset, r in requests.items()}
        found = {subset: result for subset, result in saved.items() if result is not None}
        settled += len(found) * each
        lacking = [subset for subset in asked.subsets if subset not in found]
        for group in _groups_of(asked, names, lacking):
            tell = _teller(progress, settled, planned, f"{asked.ds.name} {o.head} {'+'.join(names)} {','.join(group)}")
            # No name is kept of the features: they would live on while the next ones are read.
            found |= _answer(asked, names, group, requests, *_features(asked, names, group, lacking, loaded), tell)
            settled += len(group) * each
        results += [found[subset] for subset in asked.order]
        if progress is not None:
            progress(settled, planned, f"{asked.ds.name} {o.head}")
    return results


def _groups_of(asked: Asked, names: Sequence[str], subsets: Sequence[str]) -> list[list[str]]:
    """Subsets that train as one stack: all of them where heads are small.

    Large heads have nothing to gain from one another, and much to lose where hours of training are interrupted.
    """
    dims = {backbone: asked.stores[backbone].row_shape[-1] for backbone in names}
    size = count_parameters(asked.options.model, dims, len(asked.ds.class_names)) * asked.n_models
    if is_solved(asked.options.model) or size > _SMALL or not subsets:
        return [[subset] for subset in subsets]
    return [list(subsets)]


@dataclass(eq=False)
class _Loaded:
    """Features in memory, by backbone, and the rows of the dataset that all of them are of."""

    used: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    x: dict[str, torch.Tensor] = field(default_factory=dict)

    def keep(self, names: Sequence[str]) -> None:
        """Let go of the features of all other backbones."""
        self.x = {backbone: x for backbone, x in self.x.items() if backbone in names}


def _features(
    asked: Asked, names: Sequence[str], group: Sequence[str], lacking: Sequence[str], loaded: _Loaded
) -> tuple[FeatureRows, IntArray]:
    """Features of a group of the lacking subsets, and the rows of the dataset that they are of."""
    o, ids = asked.options, asked.plans[0].ids
    if o.buffer is not None:
        used = asked.used(*group)
        loaded.keep([])
        stores = {backbone: asked.stores[backbone] for backbone in names}
        x = stream_features(
            stores, asked.ds, ids[used], buffer_rows=o.buffer, views=o.n_views, stream=str(o.seed), device=o.device
        )
        return x, used
    used = asked.used(*lacking)
    if not np.array_equal(used, loaded.used):
        loaded.keep([])
        loaded.used = used
    for backbone in names:
        if backbone not in loaded.x:
            try:
                features = load_features(asked.stores[backbone], asked.ds, ids[used], o.n_views, keep_half=True)
                loaded.x[backbone] = features.to(o.device)
            except (MemoryError, RuntimeError) as error:
                if not is_shortage(error):
                    raise
                raise StoreError(
                    f"the features of {len(used):,} images do not fit into memory",
                    found=str(error).splitlines()[0] if str(error) else None,
                    where=asked.stores[backbone].path,
                    fix="a smaller --subset" + ("" if is_solved(o.model) else ", or stream them: --buffer 10000"),
                ) from error
    return Resident({backbone: loaded.x[backbone] for backbone in names}), used


def _answer(
    asked: Asked,
    names: Sequence[str],
    group: Sequence[str],
    requests: Mapping[str, Mapping[str, Any]],
    x: FeatureRows,
    used: IntArray,
    on_epoch: Callable[[int], Any],
) -> dict[str, ProbeResult]:
    """Train all heads of a group of subsets, then test and save each subset's; ``x`` holds the dataset's ``used``."""
    began = time.perf_counter()
    o, ds, plans = asked.options, asked.ds, asked.plans
    n_classes = len(ds.class_names)
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
        for subset in group
        for repeat, plan in enumerate(plans)
        for f in range(plan.n_folds)
        for schedule in o.schedules
    ]
    y = torch.from_numpy(labels).to(o.device)
    scored_by = asked.metric.of(asked.positive)
    every = train_jobs(o.model, x, y, jobs, n_classes, scored_by, o.schedules[0], on_epoch=on_epoch)
    rates = len(o.schedules)
    sweeps = [range(k, k + rates) for k in range(0, len(every), rates)]
    chosen = [sweep[best_of([every[k] for k in sweep])] for sweep in sweeps]
    models = [every[k] for k in chosen]
    held = [jobs[k].val for k in chosen]
    outputs = _predict(o.model, models, x, torch.from_numpy(place[plans[0].test]), held, n_classes)
    trained = time.perf_counter() - began
    # What a subset took of the time of all: as much as its heads saw of the rows.
    seen = [max(1, len(t.losses)) * (len(job.train) + len(job.val)) for t, job in zip(every, jobs, strict=True)]
    results = {}
    for number, subset in enumerate(group):
        began, part = (
            time.perf_counter(),
            slice(number * len(models) // len(group), (number + 1) * len(models) // len(group)),
        )
        share = sum(seen[part.start * rates : part.stop * rates]) / sum(seen)
        outcomes = [_outcome(o, every, jobs, k, sweep) for k, sweep in zip(chosen[part], sweeps[part], strict=True)]
        own = Outputs(outputs.test[part], outputs.val[part])
        _check_finite(own.test[[bool(m.params) for m in models[part]]], plans[0].test_ids, asked)
        result = summarise(
            ds,
            plans,
            subset,
            kind="probe",
            backbones=tuple(names),
            head=o.head,
            request=requests[subset],
            recipes={backbone: asked.stores[backbone].recipe.to_json() for backbone in names},
            outcomes=outcomes,
            outputs=own,
            source=asked.source,
            seconds=trained * share + time.perf_counter() - began,
            positive=o.positive,
            target=ds.target,
            notes=o.notes(),
        )
        if o.save:
            table = prediction_table(plans[0], own, outcomes)
            validation = validation_table(plans, subset, own, outcomes)
            save_run(result, table, [m.params for m in models[part]], o.home, validation=validation)
        results[subset] = result
    return results


def _predict(
    head: Head,
    models: Sequence[TrainedHead],
    x: FeatureRows,
    test: torch.Tensor,
    held: Sequence[torch.Tensor],
    n_classes: int,
) -> Outputs:
    """Logits of the test rows and of each model's own validation rows; nan where there is no model."""
    logits = np.full((len(models), len(test), n_classes), np.nan)
    val = [np.full((len(rows), n_classes), np.nan) for rows in held]
    # A solved head may keep as many rows as trained it: such heads cannot be stacked.
    made = [k for k, model in enumerate(models) if model.params]
    stacks = [[k] for k in made] if is_solved(head) else [made] if made else []
    asked = [(stack, test) for stack in stacks] + [([k], held[k]) for k in made if len(held[k])]
    params = [
        {name: torch.stack([models[k].params[name] for k in stack]) for name in models[stack[0]].params}
        for stack, _ in asked
    ]
    found = logits_of_sets(head, params, x, [rows for _, rows in asked])
    for number, ((stack, _), given) in enumerate(zip(asked, found, strict=True)):
        if number < len(stacks):
            logits[stack] = given
        else:
            val[stack[0]] = given[0].astype(np.float64)
    return Outputs(logits, val)


def _outcome(o: ProbeOptions, every: Sequence[TrainedHead], jobs: Sequence[Job], k: int, sweep: range) -> Outcome:
    trained = every[k]
    return Outcome(
        best_epoch=trained.best_epoch,
        epochs=len(trained.losses),
        val_score=trained.val_score,
        lr=None if is_solved(o.model) else jobs[k].lr,
        diverged=trained.diverged,
        chosen=trained.chosen,
        lost_lrs=[jobs[j].lr for j in sweep if every[j].diverged and j != k],
    )


def _check_finite(p: NDArray[np.float64], test_ids: Sequence[str], asked: Asked) -> None:
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
