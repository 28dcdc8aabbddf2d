"""From trained models' test predictions to a result: scores, interval, what a reader must know."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd

import embcache
from embcache.data.dataset import ImageDataset
from embcache.probe.heads import imbalance
from embcache.probe.metrics import FloatArray, bootstrap, evaluate, interval
from embcache.probe.results import FoldResult, ProbeResult, run_id
from embcache.probe.splits import Splits
from embcache.probe.train import diverged_error, is_balanced

FEW_GROUPS = 10
"""A class with fewer test groups makes a bootstrap interval that a reader must be warned of."""


@dataclass(frozen=True)
class Outcome:
    """How the training of one fold's model went.

    Attributes
    ----------
    best_epoch, epochs : int
        The epoch that was kept (0: none) and how many were trained; both 0 for a head that is solved.
    val_score : float or None
        Validation score at ``best_epoch``.
    lr : float or None
        First learning rate; None for a head that is solved.
    diverged : bool
        Training ended because a loss or an output was not finite.
    chosen : dict
        What a solved head chose on validation.
    lost_lrs : sequence of float
        Other learning rates of a sweep, at which training diverged.
    """

    best_epoch: int
    epochs: int
    val_score: float | None
    lr: float | None
    diverged: bool = False
    chosen: Mapping[str, Any] = field(default_factory=dict)
    lost_lrs: Sequence[float] = ()

    @property
    def failed(self) -> bool:
        """Whether there is no model: training diverged before a first usable epoch."""
        return self.diverged and self.best_epoch == 0


def summarise(
    ds: ImageDataset,
    plans: Sequence[Splits],
    subset: str,
    *,
    kind: str,
    backbones: Sequence[str],
    head: str,
    request: Mapping[str, Any],
    recipes: Mapping[str, Any],
    outcomes: Sequence[Outcome],
    p: FloatArray,
    source: str,
    seconds: float,
    target: str = "",
    notes: Sequence[str] = (),
) -> ProbeResult:
    """Score every fold's test predictions and put the result together.

    Parameters
    ----------
    ds : ImageDataset
        What was asked about; ``target``'s column is already its label.
    plans : sequence of Splits
        The splits of each repeat, of K folds each and with the same test set.
    subset : str
        The subset that trained.
    kind : {"probe", "finetune"}
        What was trained.
    backbones : sequence of str
        In the order in which they were asked for.
    head : str
        Name of the head.
    request : dict
        All that the result depends on; its hash is the run's id.
    recipes : mapping of backbone to JSON
        Whole recipes.
    outcomes : sequence of Outcome
        One a model, R × K of them, repeat by repeat.
    p : float64 array of shape (R × K, n_test, C)
        Test predictions; whatever stands there for a model that failed is not read.
    source : {"live", "snapshot"}
        Where labels came from.
    seconds : float
        Wall time.
    target : str
        The column that is told apart instead of the labels.
    notes : sequence of str
        What a reader must know besides `request_notes` and `training_notes`.

    Raises
    ------
    ProtocolError
        No model is left: training diverged in every fold.
    """
    plan, metric = plans[0], ds.metric
    labels, groups = plan.labels[plan.test], plan.groups[plan.test]
    known = labels >= 0
    made = [f for f, outcome in enumerate(outcomes) if not outcome.failed]
    if not made:
        where = f"every fold ({head}, subset {subset})"
        raise diverged_error(where, max((o.lr for o in outcomes if o.lr is not None), default=None))
    folds = []
    for f, outcome in enumerate(outcomes):
        repeat, part = divmod(f, plan.n_folds)
        metrics = evaluate(metric, labels[known], p[f, known]) if known.any() and f in made else {}
        folds.append(
            FoldResult(
                fold=f,
                score=metrics.get("score"),
                val_score=None if outcome.failed else outcome.val_score,
                best_epoch=outcome.best_epoch,
                epochs=outcome.epochs,
                n_train=len(plans[repeat].train[part, subset]),
                n_val=len(plans[repeat].val[part, subset]),
                lr=outcome.lr,
                metrics=metrics,
                diverged=outcome.diverged,
                repeat=repeat,
                chosen=dict(outcome.chosen),
                lost_lrs=list(outcome.lost_lrs),
            )
        )
    scores = [fold.score for fold in folds if fold.score is not None]
    validated = [fold.val_score for fold in folds if fold.val_score is not None]
    sizes = np.array([[fold.n_train, fold.n_val] for fold in folds], dtype=np.float64).mean(0)
    return ProbeResult(
        id=run_id(request),
        kind=kind,
        dataset=ds.name,
        backbones=tuple(backbones),
        head=head,
        subset=subset,
        n_train=round(sizes[0]),
        n_val=round(sizes[1]),
        n_test=int(known.sum()) or len(plan.test),
        labels_used=round(sizes.sum()),
        metric=metric,
        mean=float(np.mean(scores)) if scores else None,
        std=float(np.std(scores, ddof=1)) if len(scores) > 1 else None,
        interval=interval(bootstrap(metric, labels[known], p[made][:, known], groups[known])) if scores else None,
        val_mean=float(np.mean(validated)) if validated else None,
        folds=tuple(folds),
        test_set=plan.test_set,
        synthetic=ds.synthetic,
        notes=(*request_notes(ds, plans, subset, head), *notes, *training_notes(folds)),
        class_names=tuple(ds.class_names),
        request=request,
        seconds=round(seconds, 3),
        versions=_versions(),
        source=source,
        target=target,
        recipes=dict(recipes),
    )


def request_notes(ds: ImageDataset, plans: Splits | Sequence[Splits], subset: str, head: str) -> list[str]:
    """What a reader must know before anything is trained: of the dataset, its splits, the subset and the head.

    What is true of a later repeat only says which.
    """
    plan, *repeats = [plans] if isinstance(plans, Splits) else plans
    notes = _notes_of(ds, plan, subset, head)
    for number, repeat in enumerate(repeats, start=1):
        notes += [f"repeat {number}: {note}" for note in _notes_of(ds, repeat, subset, head) if note not in notes]
    return list(dict.fromkeys(notes))


def training_notes(folds: Sequence[FoldResult]) -> list[str]:
    """What a reader must know of the training: folds and learning rates that ended because a loss was not finite."""
    notes = []
    for rate in dict.fromkeys(rate for fold in folds for rate in fold.lost_lrs):
        where = [str(fold.fold) for fold in folds if rate in fold.lost_lrs]
        told = "every fold" if len(where) == len(folds) else f"fold{'s' * (len(where) > 1)} {', '.join(where)}"
        notes.append(f"learning rate {rate:g} diverged in {told}: the others were kept")
    for fold in folds:
        if fold.failed:
            notes.append(f"fold {fold.fold} diverged in its first epoch: left out of mean, deviation and interval")
        elif fold.diverged:
            notes.append(f"fold {fold.fold} diverged in epoch {fold.epochs}: epoch {fold.best_epoch} was kept")
    return notes


def prediction_table(plan: Splits, p: FloatArray, outcomes: Sequence[Outcome] | None = None) -> pd.DataFrame:
    """Test predictions as a table: ``id, label, group, fold, p_0 … p_C-1``.

    Parameters
    ----------
    plan : Splits
        Of any repeat: all have one test set.
    p : float64 array of shape (folds, n_test, C)
        Test predictions, folds counted over all repeats.
    outcomes : sequence of Outcome, optional
        Folds without a model get no rows.
    """
    made = [f for f in range(len(p)) if outcomes is None or not outcomes[f].failed]
    n_test, n_classes = p.shape[1:]
    flat = p[made].reshape(-1, n_classes)
    return pd.DataFrame(
        {
            "id": np.tile(plan.ids[plan.test], len(made)),
            "label": np.tile(plan.labels[plan.test], len(made)),
            "group": np.tile(plan.groups[plan.test], len(made)),
            "fold": np.repeat(np.array(made, dtype=np.int64), n_test),
            **{f"p_{c}": flat[:, c] for c in range(n_classes)},
        }
    )


def _notes_of(ds: ImageDataset, plan: Splits, subset: str, head: str) -> list[str]:
    notes = list(plan.notes)
    if ds.synthetic and not any(note.startswith("synthetic") for note in notes):
        notes.insert(0, "synthetic: the images are drawn by embcache")
    if not plan.test_labelled:
        notes.append(f"the labels of the {len(plan.test)} test images are not known: predictions are kept, not scored")
    n_classes = len(ds.class_names)
    if not all(is_balanced(plan.labels[plan.train[f, subset]], n_classes) for f in range(plan.n_folds)):
        notes.append(f"subset {subset}: classes are not balanced: {imbalance(head)}")
    labels, groups = plan.labels[plan.test], plan.groups[plan.test]
    few = {name: len(set(groups[labels == c])) for c, name in enumerate(ds.class_names) if (labels == c).any()}
    few = {name: count for name, count in few.items() if count < FEW_GROUPS}
    if few:
        counts = ", ".join(f"{count} of {name}" for name, count in few.items())
        notes.append(f"few test groups ({counts}): resampling them says less than the interval seems to")
    return notes


def _versions() -> dict[str, str]:
    packages = ("torch", "numpy", "scikit-learn", "pandas")
    return {"embcache": embcache.__version__, "python": platform.python_version(), **{p: version(p) for p in packages}}
