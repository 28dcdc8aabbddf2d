"""What a run's ensemble gets wrong on its test images: classes, findings, and the largest errors of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embcache.probe.metrics import log_odds, softmax
from embcache.probe.predictions import Predictions
from embcache.results.compare import Tested
from embcache.results.layout import csv_text


@dataclass(frozen=True)
class Mistake:
    """A test image whose class, or one of whose findings, the ensemble of the models gets wrong.

    Of a finding ``label`` and ``predicted`` are its name where it is present, and ``no`` and its name where it is not.
    """

    id: str
    group: str
    label: str
    predicted: str
    p_label: float
    p_predicted: float
    models_agree: int
    models: int

    @property
    def words(self) -> str:
        """What is wrong, for the caption of its image."""
        chance = f"p {self.p_predicted:.3f} · {self.models_agree} of {self.models} models"
        return f"{self.label} → {self.predicted}\n{chance}"


@dataclass(frozen=True)
class Miss:
    """A test image, its number, and how far the ensemble, the mean of the models' numbers, is from it."""

    id: str
    group: str
    value: float
    predicted: float
    error: float  # predicted − value
    models_sd: float | None  # of the models' numbers, ddof 1; none of one model
    models: int

    @property
    def words(self) -> str:
        """How far off it is, for the caption of its image."""
        return f"{self.value:.4g} → {self.predicted:.4g}\nerror {self.error:+.4g}".replace("-", "−")


def find_mistakes(tested: Tested) -> list[Mistake] | list[Miss]:
    """Mistakes of a run's ensemble on its labeled test images, the most confident first, then by ID.

    By the log odds of what is predicted, which order images whose probabilities are both 1 to the last digit. Of
    findings, one for each wrong finding of an image; of a number all images, the largest absolute error first.
    """
    predictions = tested.predictions
    kind = predictions.task.kind
    if kind == "number":
        return _misses(predictions)
    parts = [predictions.finding(name) for name in predictions.class_names] if kind == "findings" else [predictions]
    found = sorted((each for part in parts for each in _mistakes(part)), key=lambda each: (each[0], each[1].id))
    return [mistake for _, mistake in found]


def _mistakes(predictions: Predictions) -> list[tuple[float, Mistake]]:
    """Mistakes between classes, each with the negative log odds of its predicted class."""
    names, logits = predictions.class_names, predictions.ensemble().logits[0]
    p, called = softmax(logits), logits.argmax(1)
    odds = log_odds(logits)[np.arange(len(called)), called]
    agree = (predictions.logits.argmax(2) == called).sum(0)
    return [
        (-float(odds[row]), Mistake(
            str(predictions.ids[row]), str(predictions.groups[row]), names[predictions.labels[row]], names[called[row]],
            float(p[row, predictions.labels[row]]), float(p[row, called[row]]), int(agree[row]),
            len(predictions.logits),
        ))
        for row in np.flatnonzero(called != predictions.labels)
    ]  # fmt: skip


def _misses(predictions: Predictions) -> list[Miss]:
    numbers, k = predictions.p[..., 0], len(predictions.logits)  # (K, n)
    means, sds = numbers.mean(0), numbers.std(0, ddof=1) if k > 1 else None
    found = [
        Miss(
            str(predictions.ids[row]), str(predictions.groups[row]), value, float(means[row]),
            float(means[row]) - value, None if sds is None else float(sds[row]), k,
        )
        for row, value in enumerate(predictions.labels.tolist())
    ]  # fmt: skip
    return sorted(found, key=lambda miss: (-abs(miss.error), miss.id))


def mistakes_csv(mistakes: Sequence[Mistake] | Sequence[Miss], *, groups: bool = False) -> str:
    """One line per mistake; ``groups`` adds each image's group, which may name a patient."""
    kind: type[Any] = type(mistakes[0]) if mistakes else Mistake
    columns = [name for name in kind.__dataclass_fields__ if groups or name != "group"]
    return csv_text(columns, ([vars(m)[name] for name in columns] for m in mistakes))
