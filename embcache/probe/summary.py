"""From trained heads and test predictions to a result: scores, interval, what a reader must know."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import torch

import embcache
from embcache.data.dataset import ImageDataset
from embcache.data.splits import IntArray
from embcache.probe.heads import Head
from embcache.probe.metrics import FloatArray, bootstrap, evaluate, interval
from embcache.probe.results import FoldResult, ProbeResult, run_id
from embcache.probe.schedule import Schedule
from embcache.probe.splits import Splits
from embcache.probe.stack import TrainedHead
from embcache.probe.train import is_balanced

FEW_GROUPS = 10
"""A class with fewer test groups makes a bootstrap interval that a reader must be warned of."""


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


def summarise(
    q: Question,
    request: Mapping[str, Any],
    trained: Sequence[TrainedHead],
    p: FloatArray,
    source: str,
    seconds: float,
) -> ProbeResult:
    """Score every fold's test predictions and put the result together.

    Parameters
    ----------
    q : Question
        What was asked.
    request : dict
        All that the result depends on; its hash is the run's id.
    trained : sequence of TrainedHead
        One a fold.
    p : float64 array of shape (folds, n_test, C)
        Test predictions.
    source : {"live", "snapshot"}
        Where labels came from.
    seconds : float
        Wall time.
    """
    plan, metric, subset = q.plan, q.ds.metric, q.subset
    labels = plan.labels[plan.test]
    known = labels >= 0
    folds = []
    for f, head in enumerate(trained):
        metrics = evaluate(metric, labels[known], p[f, known]) if known.any() else {}
        folds.append(
            FoldResult(
                fold=f,
                score=metrics.get("score"),
                val_score=head.val_score,
                best_epoch=head.best_epoch,
                epochs=len(head.losses),
                n_train=len(plan.train[f, subset]),
                n_val=len(plan.val[f, subset]),
                lr=q.schedule.lr,
                metrics=metrics,
                diverged=head.diverged,
            )
        )
    scores = [fold.score for fold in folds if fold.score is not None]
    sizes = np.array([[fold.n_train, fold.n_val] for fold in folds], dtype=np.float64).mean(0)
    return ProbeResult(
        id=run_id(request),
        kind="probe",
        dataset=q.ds.name,
        backbones=tuple(q.features),
        head=q.head.name,
        subset=subset,
        n_train=round(sizes[0]),
        n_val=round(sizes[1]),
        n_test=len(plan.test),
        labels_used=round(sizes.sum()),
        metric=metric,
        mean=float(np.mean(scores)) if scores else None,
        std=float(np.std(scores, ddof=1)) if scores else None,
        interval=interval(bootstrap(metric, labels[known], p[:, known], plan.groups[plan.test][known]))
        if scores
        else None,
        val_mean=float(np.mean([fold.val_score for fold in folds if fold.val_score is not None])),
        folds=tuple(folds),
        test_set=plan.test_set,
        synthetic=q.ds.synthetic,
        notes=(*request_notes(q.ds, plan, subset), *training_notes(folds)),
        class_names=tuple(q.ds.class_names),
        request=request,
        seconds=round(seconds, 3),
        versions=_versions(),
        source=source,
    )


def request_notes(ds: ImageDataset, plan: Splits, subset: str) -> list[str]:
    """What a reader must know before anything is trained: of the dataset, its splits and the subset."""
    notes = list(plan.notes)
    if ds.synthetic and not any(note.startswith("synthetic") for note in notes):
        notes.insert(0, "synthetic: the images are drawn by embcache")
    if not plan.test_labelled:
        notes.append(f"the labels of the {len(plan.test)} test images are not known: predictions are kept, not scored")
    n_classes = len(ds.class_names)
    if not all(is_balanced(plan.labels[plan.train[f, subset]], n_classes) for f in range(plan.n_folds)):
        notes.append(f"subset {subset}: classes are not balanced, so training draws them equally often")
    labels, groups = plan.labels[plan.test], plan.groups[plan.test]
    few = {name: len(set(groups[labels == c])) for c, name in enumerate(ds.class_names) if (labels == c).any()}
    few = {name: count for name, count in few.items() if count < FEW_GROUPS}
    if few:
        counts = ", ".join(f"{count} of {name}" for name, count in few.items())
        notes.append(f"few test groups ({counts}): resampling them says less than the interval seems to")
    return list(dict.fromkeys(notes))


def training_notes(folds: Sequence[FoldResult]) -> list[str]:
    """What a reader must know of the training: folds that ended because a loss was not finite."""
    return [f"fold {f.fold} diverged in epoch {f.epochs}: epoch {f.best_epoch} was kept" for f in folds if f.diverged]


def prediction_table(plan: Splits, p: FloatArray) -> pd.DataFrame:
    """Test predictions (folds, n_test, C) as a table: ``id, label, fold, p_0 … p_C-1``."""
    n_folds, n_test, n_classes = p.shape
    flat = p.reshape(-1, n_classes)
    return pd.DataFrame(
        {
            "id": np.tile(plan.ids[plan.test], n_folds),
            "label": np.tile(plan.labels[plan.test], n_folds),
            "fold": np.repeat(np.arange(n_folds, dtype=np.int64), n_test),
            **{f"p_{c}": flat[:, c] for c in range(n_classes)},
        }
    )


def _versions() -> dict[str, str]:
    packages = ("torch", "numpy", "scikit-learn", "pandas")
    return {"embcache": embcache.__version__, "python": platform.python_version(), **{p: version(p) for p in packages}}
