"""What one run's saved predictions show: scores, operating points, calibration, the confusion matrix, its mistakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from embcache.errors import StoreError
from embcache.probe.metrics import confusion, find_metric, log_odds, positive_class, softmax
from embcache.probe.predictions import Predictions, all_estimates
from embcache.probe.prevalence import Adjust, Adjustment, row_weights
from embcache.probe.summary import adjust_models, load_run_predictions, load_validation
from embcache.results.compare import Tested
from embcache.results.decisions import Calibration, OperatingPoint, against_rest, calibration, operating_points
from embcache.results.layout import csv_text
from embcache.runs.result import Estimate, Result

USUAL = ("auc", "kappa", "auprc", "accuracy", "balanced_accuracy", "f1", "mcc", "brier", "log_loss")
"""Scores that are shown in addition to the run's own; `auc` is the macro one for more than two classes."""


@dataclass(frozen=True, eq=False)
class Described:
    """Everything that is measured on a run's saved predictions."""

    result: Result  # with the chosen positive class
    scores: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    confusion: Sequence[Sequence[int]] = ()
    prevalence: float | None = None  # of the positive class, for PPV, NPV and calibration
    operating_points: Sequence[OperatingPoint] = ()
    calibration: Sequence[Calibration] = ()
    adjustments: Sequence[Adjustment] = ()  # of each model, to another prevalence or by a temperature
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data, every field by its name."""
        return {**asdict(self), "result": self.result.to_json()}


@dataclass(frozen=True)
class Mistake:
    """A test image whose class the ensemble, the mean of the models' probabilities, gets wrong."""

    id: str
    group: str
    label: str
    predicted: str
    p_label: float
    p_predicted: float
    models_agree: int
    models: int


def describe(
    result: Result,
    folder: Path,
    *,
    metrics: Sequence[str] = (),
    positive: str | None = None,
    adjust: Adjust = Adjust(),
) -> Described:
    """Measure a run's saved predictions; nothing is trained and the run is not changed."""
    names, chosen = result.class_names, positive or result.positive or None
    number = positive_class(names, chosen)
    has_positive = len(names) == 2 or chosen is not None
    result = replace(result, positive=names[number] if has_positive else "")
    if result.mean is None or result.kind == "kaggle":
        return Described(result, notes=["the labels of the test images are not known, so nothing can be measured"])
    test = replace(load_run_predictions(result, folder), positive=number)
    keys = dict.fromkeys(find_metric(m, len(names)).key for m in metrics or [result.metric, *USUAL])
    found = Described(
        result,
        scores={key: all_estimates(test, key) for key in keys},
        confusion=confusion(test.labels, test.ensemble().logits[0]).tolist(),
        notes=[f"no scores by patient: {result.by_group['why']}"] if "why" in result.by_group else [],
    )
    if not has_positive:
        note = "operating points and calibration are of one class against the others: --positive CLASS"
        return replace(found, notes=[*found.notes, note])
    try:
        validation = load_validation(result, folder)
    except StoreError as error:
        if adjust.calibrate:
            raise
        note = f"no operating points but P > 0.5: the run kept no predictions of validation images ({error.fix})"
        validation, found = [], replace(found, notes=[*found.notes, note])
    models = adjust_models(result, folder, adjust) if adjust else []
    prevalence, weights = None, None
    if models:
        test = replace(test, logits=np.stack([m.logits(z) for m, z in zip(models, test.logits, strict=True)]))
        pairs = zip(models, validation, strict=True) if validation else ()
        validation = [replace(v, logits=model.logits(v.logits)) for model, v in pairs]
    if adjust.prevalence is not None:
        prevalence = models[0].prevalence[number]
        weights = row_weights(test.labels, np.array(models[0].prevalence))
    two = against_rest(test, number)
    return replace(
        found,
        prevalence=float(two.labels.mean()) if prevalence is None else prevalence,
        operating_points=operating_points(two, [against_rest(v, number) for v in validation], prevalence),
        calibration=calibration(two, weights),
        adjustments=models,
        notes=[*found.notes, *_notes(two, adjust, models, names)],
    )


def _notes(two: Predictions, adjust: Adjust, models: Sequence[Adjustment], names: Sequence[str]) -> list[str]:
    positive, own = two.class_names[1], float(two.labels.mean())
    notes = ["one model: its numbers are those of the ensemble"] if len(two.logits) == 1 else []
    if adjust:
        notes.append("scores and confusion matrix are of the models' own probabilities; what is below is adjusted")
    if adjust.prevalence is None:
        notes.append(
            f"PPV, NPV and calibration are at the test set's prevalence of {positive}, {own:.3f}; where it is another, "
            "--prevalence P"
        )
    else:
        notes.append(f"PPV, NPV and calibration are at the prevalence {shares_in_words(models[0], names)}")
        if len(names) > 2:
            notes.append("specificity, and so PPV and NPV, take the other classes as they are in the test set")
    return notes


def shares_in_words(model: Adjustment, names: Sequence[str]) -> str:
    """``a=0.1, b=0.9``: the prevalence that probabilities are adjusted to."""
    return ", ".join(f"{name}={share:.4g}" for name, share in zip(names, model.prevalence, strict=True))


def find_mistakes(tested: Tested) -> list[Mistake]:
    """Mistakes of a run's ensemble on its labeled test images, by falling log odds of the predicted class, then by ID.

    Log odds order images whose probabilities are both 1 to the last digit.
    """
    predictions, names = tested.predictions, tested.result.class_names
    logits = predictions.ensemble().logits[0]
    p, called = softmax(logits), logits.argmax(1)
    odds = log_odds(logits)[np.arange(len(called)), called]
    agree = (predictions.logits.argmax(2) == called).sum(0)
    rows = np.flatnonzero(called != predictions.labels)
    return [
        Mistake(
            str(predictions.ids[row]), str(predictions.groups[row]), names[predictions.labels[row]], names[called[row]],
            float(p[row, predictions.labels[row]]), float(p[row, called[row]]), int(agree[row]),
            len(predictions.logits),
        )
        for row in sorted(rows, key=lambda row: (-odds[row], str(predictions.ids[row])))
    ]  # fmt: skip


def mistakes_csv(mistakes: Sequence[Mistake], *, groups: bool = False) -> str:
    """One line per mistake; ``groups`` adds each image's group, which may name a patient."""
    rows = [{name: value for name, value in vars(m).items() if groups or name != "group"} for m in mistakes]
    columns = [name for name in Mistake.__dataclass_fields__ if groups or name != "group"]
    return csv_text(columns, (list(row.values()) for row in rows))
