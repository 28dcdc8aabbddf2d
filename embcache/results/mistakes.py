"""Test images that a run's ensemble gets wrong, the most confident mistakes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embcache.data.dataset import ImageDataset
from embcache.figures.sheets import draw_pictures
from embcache.probe.metrics import log_odds, softmax
from embcache.results.compare import Tested
from embcache.results.csvfile import csv_text

SHOWN = 24
"""Images of a contact sheet, unless another number is asked for."""


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


def find_mistakes(tested: Tested) -> list[Mistake]:
    """Mistakes of a run's ensemble on its labeled test images, by falling log odds of the predicted class, then by id.

    Log odds order images whose probabilities are both 1 to the last digit.
    """
    predictions, names = tested.predictions, tested.result.class_names
    logits = predictions.ensemble().logits[0]
    p, called = softmax(logits), logits.argmax(1)
    odds = log_odds(logits)[np.arange(len(called)), called]
    agree = (predictions.logits.argmax(2) == called).sum(0)
    wrong = np.flatnonzero(called != predictions.labels)
    return [
        Mistake(
            id=str(predictions.ids[row]),
            group=str(predictions.groups[row]),
            label=names[predictions.labels[row]],
            predicted=names[called[row]],
            p_label=float(p[row, predictions.labels[row]]),
            p_predicted=float(p[row, called[row]]),
            models_agree=int(agree[row]),
            models=len(predictions.logits),
        )
        for row in sorted(wrong, key=lambda row: (-odds[row], str(predictions.ids[row])))
    ]


def mistakes_csv(mistakes: Sequence[Mistake], *, groups: bool = False) -> str:
    """One line per mistake; ``groups`` adds each image's group, which may name a patient."""
    columns = ["id", *(["group"] if groups else []), "label", "predicted", "p_label", "p_predicted"]
    columns += ["models_agree", "models"]
    return csv_text(columns, ([getattr(mistake, name) for name in columns] for mistake in mistakes))


def draw_mistakes(dataset: ImageDataset, mistakes: Sequence[Mistake], title: str, target: Path) -> int:
    """Draw the images of mistakes, with classes and probability beneath each."""
    captions = [
        (m.id, f"{m.label} → {m.predicted}\np {m.p_predicted:.3f} · {m.models_agree} of {m.models} models")
        for m in mistakes
    ]
    return draw_pictures(dataset, captions, title, target)
