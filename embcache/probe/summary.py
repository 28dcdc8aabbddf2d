"""From trained models' test predictions to a result: scores, interval, what a reader must know."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import embcache
from embcache.data.dataset import ImageDataset
from embcache.errors import StoreError
from embcache.paths import PathLike
from embcache.probe.heads import imbalance, weighing
from embcache.probe.metrics import FloatArray, check_order, evaluate, find_metric, known, positive_class, score
from embcache.probe.predictions import (
    Adjust,
    Adjustment,
    Predictions,
    adjustments,
    ensemble_scores,
    grouped_scores,
    prevalence_vector,
)
from embcache.probe.protocol import Splits
from embcache.probe.schedule import diverged_error
from embcache.probe.statistics import training_overlap
from embcache.runs.folders import FoldResult, Result, load_predictions, replace_result, run_id, runs_dir
from embcache.targets import Target
from embcache.targets.labels import is_balanced

if TYPE_CHECKING:
    from embcache.probe.stack import Head

COLLAPSED = 0.8  # a model that predicts one class for this share of the test images, far more than it has, is named


@dataclass(frozen=True, eq=False)
class RunCell:
    """One result to be made: what it is trained on and everything that it depends on."""

    dataset: ImageDataset
    splits: tuple[Splits, ...]  # one per repeat; all have the same test set
    subset: str
    backbones: tuple[str, ...]
    head: Head
    request: Mapping[str, Any]  # JSON data that the run's id hashes
    recipes: Mapping[str, Any]  # by backbone
    positive: str | None = None
    source: str = "live"  # or "snapshot": where labels came from
    notes: tuple[str, ...] = ()

    @cached_property
    def id(self) -> str:
        """Id of the run."""
        return run_id(self.request)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Rows of the dataset that train, validate or test in any repeat, ascending."""
        return np.unique(np.concatenate([splits.used(self.subset) for splits in self.splits]))

    def parts(self, fold: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows that train and rows that validate in a fold, counted over all repeats."""
        repeat, number = divmod(fold, self.splits[0].n_folds)
        key = number, self.subset
        return self.splits[repeat].train[key], self.splits[repeat].val[key]

    def outcome(
        self, number: int, test: FloatArray, val: FloatArray, val_score: float | None, **training: Any
    ) -> Outcome:
        """How one fold went: ``val_score`` as training has it, which negates a loss; ``training`` as `FoldResult`."""
        train, held = self.parts(number)
        task = self.dataset.task
        fold = FoldResult(
            fold=number, score=None, val_score=None, n_train=len(train), n_val=len(held), metrics={},
            repeat=number // self.splits[0].n_folds,
            seen=task.seen(self.splits[0].labels[train], self.head.weighs), **training,
        )  # fmt: skip
        if val_score is not None and not fold.failed:
            sign = -1.0 if find_metric(str(self.request["metric"]), task).loss else 1.0
            fold = replace(fold, val_score=sign * val_score)
        return Outcome(fold, test, val)


@dataclass(frozen=True, eq=False)
class Outcome:
    """One fold's training, and the logits of its model; nan where there is none."""

    fold: FoldResult  # without scores of the test set
    test: FloatArray  # (n_test, C)
    val: FloatArray  # (m, C); of the model's own validation images


def build_result(cell: RunCell, outcomes: Sequence[Outcome], seconds: float) -> Result:
    """Score every fold's test predictions and put the result together."""
    ds, plan, request = cell.dataset, cell.splits[0], cell.request
    labels, names = plan.labels[plan.test], tuple(ds.class_names)
    known = ds.task.known(labels)
    folds = tuple(outcome.fold for outcome in outcomes)
    made = [fold.fold for fold in folds if not fold.failed]
    if not made:
        where = f"every fold ({request['head']['name']}, subset {cell.subset})"
        raise diverged_error(where, max((fold.lr for fold in folds if fold.lr is not None), default=None))
    n_train, n_val = np.array([[fold.n_train, fold.n_val] for fold in folds], dtype=np.float64).mean(0)
    versions = {"embcache": embcache.__version__, "python": platform.python_version()}
    versions |= {package: version(package) for package in ("torch", "numpy", "scikit-learn", "pandas")}
    result = Result(
        id=cell.id, kind=str(request["kind"]), dataset=ds.name, backbones=cell.backbones,
        head=str(request["head"]["name"]), subset=cell.subset, n_train=round(n_train), n_val=round(n_val),
        n_test=int(known.sum()) or len(plan.test), labels_used=round(n_train + n_val), metric=str(request["metric"]),
        mean=None, std=None, interval=None, val_mean=_mean([fold.val_score for fold in folds]), folds=folds,
        test_set=plan.test_set, synthetic=ds.synthetic, notes=cell.notes, class_names=names, request=request,
        seconds=round(seconds, 3), versions=versions, source=cell.source, target=ds.target,
        recipes=dict(cell.recipes), overlap=training_overlap([cell.parts(f)[0] for f in made]),
    )  # fmt: skip
    logits = np.stack([outcomes[f].test[known] for f in made])
    test = Predictions(
        plan.ids[plan.test][known], plan.groups[plan.test][known], labels[known], logits, names, target=result.task
    )
    result = scored(result, test, cell.positive)
    if known.any():
        result = replace(result, baseline=_baseline(cell, [cell.parts(f)[0] for f in made], test, result))
    return replace(result, notes=(*result.notes, *training_notes(result)))


def _baseline(
    cell: RunCell, trained: Sequence[NDArray[np.int64]], test: Predictions, result: Result
) -> dict[str, float]:
    """Scores of what training rows say without features, where the target's metrics need one to be read."""
    y = cell.splits[0].labels
    each = [test.task.baseline(y[rows], test.labels) for rows in trained]
    keys = dict.fromkeys((*test.task.metrics, result.metric)) if test.task.metrics else ()
    scores = {key: _mean([known(score(key, test.labels, z, 1, test.task)) for z in each]) for key in keys}
    return {key: value for key, value in scores.items() if value is not None}


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def scored(result: Result, predictions: Predictions, positive: str | None = None) -> Result:
    """A result with every score of its predictions of labeled test images; ``positive`` names the positive class."""
    names, metric = result.class_names, result.metric
    number = positive_class(names, positive)
    asymmetric = len(names) == 2 and result.task.kind not in ("findings", "number")
    shown = names[number] if asymmetric or positive is not None else ""
    if not len(predictions.labels):
        return replace(result, positive=shown)
    found = replace(predictions, positive=number, overlap=result.overlap, folds=_folds(result))
    each = iter([evaluate(metric, found.labels, z, number, found.task) for z in found.logits])
    metrics: list[dict[str, Any]] = [{} if fold.failed else next(each) for fold in result.folds]
    estimate = found.estimate(metric)
    return replace(
        result, mean=known(estimate.mean), std=known(estimate.std), interval=estimate.interval,
        folds=tuple(replace(f, score=m.get("score"), metrics=m) for f, m in zip(result.folds, metrics, strict=True)),
        estimate=estimate, positive=shown, test_counts=found.task.counts(found.labels),
        ensemble=ensemble_scores(found, metric), by_group=grouped_scores(found, metric),
    )  # fmt: skip


def _folds(result: Result) -> int:
    return sum(not fold.repeat for fold in result.folds)


def with_positive(result: Result, positive: str | None, home: PathLike | None) -> Result:
    """A saved result with the positive class asked for, if any, scored anew and recorded in its run."""
    if positive is None or result.class_names[positive_class(result.class_names, positive)] == result.positive:
        return result
    run = runs_dir(result.dataset, home) / result.id
    found = scored(result, load_run_predictions(result, run), positive)
    replace_result(run, found)
    return found


def in_metric(result: Result, metric: str, home: PathLike | None) -> Result:
    """A saved result, if it has test scores, by another metric on test and validation; its own chose its epochs."""
    if metric == result.metric:  # whose package may be gone
        return result
    found_metric = find_metric(metric, result.task)
    check_order(found_metric, result.task)
    key = found_metric.key
    if key == result.metric or result.mean is None or result.kind == "kaggle":
        return result
    run = runs_dir(result.dataset, home) / result.id
    found = scored(replace(result, metric=key), load_run_predictions(result, run), result.positive or None)
    try:
        held = load_validation(result, run)
    except StoreError:  # one damaged file must not end a listing; the test scores are there
        held = []
    each = iter([known(score(key, v.labels, v.logits[0], v.positive, v.task)) for v in held])
    folds = tuple(replace(fold, val_score=None if fold.failed else next(each, None)) for fold in found.folds)
    return replace(found, folds=folds, val_mean=_mean([fold.val_score for fold in folds]))


def load_run_predictions(result: Result, run: Path) -> Predictions:
    """Predictions of a run for its labeled test images, ascending by id."""
    task, table = result.task, load_predictions(run)
    table = table[task.known(_values(table, task))].sort_values(["fold", "id"], kind="stable")
    rows = [(part["id"].to_numpy(), _values(part, task)) for _, part in table.groupby("fold")]
    counts = task.counts(rows[0][1] if rows else task.blank(0))
    same = all(np.array_equal(a, b) for part in rows for a, b in zip(part, rows[0], strict=True))
    if not rows or not same or counts != (result.test_counts or counts):
        raise StoreError(
            "a run's predictions are not those that its result was made of", code="run-damaged",
            expected=f"test images of each {task.noun} {result.test_counts}, the same of every fold",
            found=f"{counts}, {len(rows)} folds", where=run / "predictions.parquet",
            fix="make the run again: embcache probe --again …",
        )  # fmt: skip
    return replace(_predictions(result, table), overlap=result.overlap, folds=_folds(result))


def _predictions(result: Result, table: pd.DataFrame) -> Predictions:
    """A run's table of predictions, whose folds have the same rows in the same order."""
    one, task = table[table["fold"] == table["fold"].min()], result.task
    names = result.class_names
    logits = table[[f"logit_{c}" for c in range(task.outputs)]].to_numpy(dtype=np.float64)
    return Predictions(
        ids=one["id"].to_numpy(dtype=object), groups=one["group"].to_numpy(dtype=object), labels=_values(one, task),
        logits=logits.reshape(-1, len(one), task.outputs), class_names=names,
        positive=positive_class(names, result.positive or None), target=task,
    )  # fmt: skip


def _values(table: pd.DataFrame, task: Target) -> NDArray[Any]:
    """The values of a table of predictions: ``label``, of findings ``label_0 …``."""
    if task.kind == "findings":
        return table[[f"label_{c}" for c in range(task.outputs)]].to_numpy(dtype=np.int64)
    return table["label"].to_numpy(dtype=np.float64 if task.kind == "number" else np.int64)


def load_validation(result: Result, run: Path) -> list[Predictions]:
    """Predictions of a run's models for their own validation images, one `Predictions` per model."""
    try:
        table = load_predictions(run, "validation")
    except StoreError as error:
        raise StoreError(
            "operating points and --calibrate need the run's predictions of validation images",
            code="no-validation-predictions", found=error.found, where=run / "validation.parquet",
            fix="embcache probe --again …, as the run was made",
        ) from error  # fmt: skip
    made = [fold.fold for fold in result.folds if not fold.failed]
    return [_predictions(result, table[table["fold"] == fold]) for fold in made]


def adjust_models(result: Result, run: Path, adjust: Adjust) -> list[Adjustment]:
    """What `Adjust` means for each model of a run, in the order of its folds that have one."""
    seen = [fold.seen for fold in result.folds if not fold.failed]
    if not all(seen):
        raise StoreError(
            "the run was made by a version that did not record how often training saw each class",
            code="run-of-another-version", where=run, fix="embcache probe --again …, as the run was made",
        )  # fmt: skip
    names, prevalence = result.class_names, None
    if adjust.prevalence is not None:
        prevalence = prevalence_vector(adjust.prevalence, names, positive_class(names, result.positive or None))
    return adjustments(seen, load_validation(result, run) if adjust.calibrate else [], prevalence, adjust.calibrate)


def request_notes(ds: ImageDataset, plans: Sequence[Splits], subset: str, head: Head) -> list[str]:
    """What a reader must know before anything is trained: of the dataset, its splits, the subset and the head."""
    notes = _notes_of(ds, plans[0], subset, head)
    for number, repeat in enumerate(plans[1:], start=1):
        notes += [f"repeat {number}: {note}" for note in _notes_of(ds, repeat, subset, head) if note not in notes]
    return list(dict.fromkeys(notes))


def training_notes(result: Result) -> list[str]:
    """What a reader must know of the training: what diverged, and models that predict little but one class."""
    folds, notes = result.folds, []
    for rate in dict.fromkeys(rate for fold in folds for rate in fold.lost_lrs):
        where = [str(fold.fold) for fold in folds if rate in fold.lost_lrs]
        shown = "every fold" if len(where) == len(folds) else f"fold{'s' * (len(where) > 1)} {', '.join(where)}"
        notes.append(f"learning rate {rate:g} diverged in {shown}: the others were kept")
    for fold in folds:
        if fold.failed:
            notes.append(f"fold {fold.fold} diverged in its first epoch: left out of mean, deviation and interval")
        elif fold.diverged:
            notes.append(f"fold {fold.fold} diverged in epoch {fold.epochs}: epoch {fold.best_epoch} was kept")
    collapsed: dict[int, list[FoldResult]] = {}
    for fold in folds:
        predicted = fold.metrics.get("predicted", [0])
        most, n = max(predicted), sum(predicted)
        if n and most >= COLLAPSED * n and most >= 1.5 * result.test_counts[predicted.index(most)]:
            collapsed.setdefault(predicted.index(most), []).append(fold)
    for c, found in collapsed.items():
        name, n = result.class_names[c], sum(found[0].metrics["predicted"])
        counts = sorted({fold.metrics["predicted"][c] for fold in found})
        count = (
            f"all {n:,}"
            if counts == [n]
            else f"{counts[0]:,}" + f" to {counts[-1]:,}" * (len(counts) > 1) + f" of {n:,}"
        )
        which = f"fold {found[0].fold} predicts" if len(found) == 1 else f"{len(found)} of {len(folds)} models predict"
        notes.append(f"{which} {name!r} for {count} test images; {result.test_counts[c]:,} of them are {name!r}")
    return notes


def prediction_table(cell: RunCell, outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """Test predictions, ``id, label, group, fold, p_0 …, logit_0 …``; a fold without a model has none.

    Of findings labels are ``label_0 …``; a number has ``prediction`` in the place of probabilities.
    """
    plan, made = cell.splits[0], [outcome for outcome in outcomes if not outcome.fold.failed]
    table = pd.concat([_rows(plan, plan.test, one.fold.fold, one.test) for one in made], ignore_index=True)
    task = cell.dataset.task
    p = task.predicted(table[[f"logit_{c}" for c in range(task.outputs)]].to_numpy())
    first = table.columns.tolist().index("logit_0")
    for c in range(task.outputs):
        table.insert(first + c, "prediction" if task.kind == "number" else f"p_{c}", p[:, c])
    return table


def validation_table(cell: RunCell, outcomes: Sequence[Outcome]) -> pd.DataFrame:
    """Predictions of the rows that chose each model: ``id, label, group, fold, logit_0 … logit_C-1``."""
    made = [outcome for outcome in outcomes if not outcome.fold.failed]
    parts = [
        _rows(cell.splits[one.fold.repeat], np.sort(cell.parts(one.fold.fold)[1]), one.fold.fold, one.val)
        for one in made
    ]
    return pd.concat(parts, ignore_index=True)


def _rows(plan: Splits, rows: NDArray[np.int64], fold: int, logits: FloatArray) -> pd.DataFrame:
    columns = {f"logit_{c}": column for c, column in enumerate(np.asarray(logits, dtype=np.float64).T)}
    y = plan.labels[rows]
    values = {"label": y} if y.ndim == 1 else {f"label_{c}": column for c, column in enumerate(y.T)}
    about = {"id": plan.ids[rows], **values, "group": plan.groups[rows]}
    return pd.DataFrame({**about, "fold": np.full(len(rows), fold, dtype=np.int64), **columns})


def _notes_of(ds: ImageDataset, plan: Splits, subset: str, head: Head) -> list[str]:
    notes = list(plan.notes)
    if ds.synthetic and not any(note.startswith("synthetic") for note in notes):
        notes.insert(0, "synthetic: the images are drawn by embcache")
    if not plan.test_labeled:
        notes.append(f"the labels of the {len(plan.test)} test images are not known: predictions are kept, not scored")
    n_classes = len(ds.class_names)
    if ds.task.kind == "findings":
        unknown = "findings that are not known are left out of training and scores; " * bool((ds.labels < 0).any())
        notes.append(f"{unknown}{weighing(head, ds.task)}")
    elif ds.task.kind != "number" and not all(
        is_balanced(plan.labels[plan.train[f, subset]], n_classes) for f in range(plan.n_folds)
    ):
        notes.append(f"subset {subset}: classes are not balanced: {imbalance(head)}")
    return notes
