"""Predictions of several models for one test set, and every number that is made of them.

What a run saves is enough for all of it, so another metric, another positive class, the ensemble or scores by patient
never train anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from embcache.probe.metrics import FloatArray, IntArray, evaluate, find_metric, mean_logits, softmax
from embcache.probe.statistics import RESAMPLES, Scores, TestSet, estimate, sample
from embcache.runs.result import Estimate


@dataclass(frozen=True, eq=False)
class Predictions:
    """Logits of K models for n labeled rows."""

    ids: NDArray[np.object_]
    groups: NDArray[np.object_]
    labels: IntArray  # (n,)
    logits: FloatArray  # (K, n, C)
    class_names: tuple[str, ...]
    positive: int = 1  # class that asymmetric metrics of two classes are of
    overlap: float | None = None  # mean share of training rows that two models have in common
    folds: int = 1  # of one repeat

    @property
    def p(self) -> FloatArray:
        """Class probabilities, float64 of shape (K, n, C)."""
        return softmax(self.logits)

    @property
    def test(self) -> TestSet:
        """Labels and groups of the rows."""
        return TestSet(self.labels, self.groups, self.class_names, self.positive)

    def scores(self, metric: str, resamples: int = RESAMPLES) -> Scores:
        """Scores by a metric; see `embcache.probe.statistics.sample`."""
        found = find_metric(metric, len(self.class_names))
        return sample(found, self.test, self.logits, resamples=resamples)

    def estimate(self, metric: str, resamples: int = RESAMPLES) -> Estimate:
        """Mean score by a metric, with its two intervals."""
        return estimate(self.scores(metric, resamples), self.overlap, self.folds)

    def take(self, rows: NDArray[Any]) -> Predictions:
        """Some of the rows, by number or by mask."""
        return replace(
            self, ids=self.ids[rows], groups=self.groups[rows], labels=self.labels[rows], logits=self.logits[:, rows]
        )

    def ensemble(self) -> Predictions:
        """One model: the mean of the models' probabilities, which is what ``predict`` uses."""
        return replace(self, logits=mean_logits(self.logits)[None], overlap=None, folds=1)

    def mixed_groups(self) -> list[str]:
        """Groups that hold rows of several classes."""
        classes = pd.Series(self.labels).groupby(self.groups).nunique()
        return [str(name) for name in classes.index[classes > 1]]

    def by_group(self) -> Predictions:
        """One row per group: the mean of its rows' probabilities. For groups of one class each (`mixed_groups`)."""
        names, first, group = np.unique(self.groups.astype(str), return_index=True, return_inverse=True)
        order = np.argsort(group.reshape(-1), kind="stable")
        parts = np.split(order, np.cumsum(np.bincount(group.reshape(-1)))[:-1])
        logits = np.stack([mean_logits(self.logits[:, part], axis=1) for part in parts], axis=1)
        named = names.astype(object)
        return replace(self, ids=named, groups=named, labels=self.labels[first], logits=logits)


def all_estimates(predictions: Predictions, metric: str) -> dict[str, Estimate]:
    """Scores of the mean over models (``""``), of the ensemble, by patient, and of the ensemble by patient.

    By patient only where groups have several images of one class; of an ensemble only where there are several models.
    """
    found = {"": predictions.estimate(metric)}
    if len(predictions.logits) > 1:
        found["ensemble"] = predictions.ensemble().estimate(metric)
    if len(np.unique(predictions.groups.astype(str))) < len(predictions.groups) and not predictions.mixed_groups():
        parts = all_estimates(predictions.by_group(), metric)
        found |= {f"by patient, {name}" if name else "by patient": e for name, e in parts.items()}
    return found


def grouped_scores(predictions: Predictions, metric: str) -> dict[str, Any]:
    """What `embcache.runs.result.Result.by_group` holds."""
    if len(set(predictions.groups.tolist())) == len(predictions.groups):
        return {}
    mixed = predictions.mixed_groups()
    if mixed:
        return {"why": f"{len(mixed):,} groups hold images of several classes"}
    groups = predictions.by_group()
    return {
        "groups": len(groups.ids),
        "estimate": groups.estimate(metric).to_json(),
        "ensemble": ensemble_scores(groups, metric),
    }


def ensemble_scores(predictions: Predictions, metric: str) -> dict[str, Any]:
    """What `embcache.runs.result.Result.ensemble` holds."""
    one = predictions.ensemble()
    return {
        "estimate": one.estimate(metric).to_json(),
        "metrics": evaluate(metric, one.labels, one.logits[0], one.positive),
    }
