"""What is counted from saved predictions for the page: scores of each class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from embcache.probe.metrics import per_class_auc
from embcache.results.compare import Tested


@dataclass(frozen=True)
class ClassScore:
    """How well one class is told from the others, mean over fold models."""

    name: str
    n_images: int
    n_groups: int
    auc: float | None
    auc_std: float | None
    sensitivity: float | None
    ppv: float | None


def class_scores(t: Tested) -> list[ClassScore]:
    """Scores of every class of a result, one against all others."""
    aucs = [per_class_auc(t.labels, z) for z in t.predictions.logits]
    predicted = t.predictions.logits.argmax(2)  # (K, n)
    rows = []
    for c, name in enumerate(t.result.class_names):
        own = t.labels == c
        values = [float(value) for auc in aucs if (value := auc[c]) is not None]
        hits = [float((q[own] == c).mean()) for q in predicted] if own.any() else []
        purity = [float(own[q == c].mean()) for q in predicted if (q == c).any()]
        rows.append(
            ClassScore(
                name,
                int(own.sum()),
                len(set(t.groups[own])),
                _mean(values),
                float(np.std(values, ddof=1)) if len(values) > 1 else None,
                _mean(hits),
                _mean(purity),
            )
        )
    return rows


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None
