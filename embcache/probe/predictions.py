"""Predictions of several models for one test set, and every number that is made of them; nothing here trains anything.

Probabilities for another prevalence: training sees classes alike where its draws or weights make them so, whatever
their share among patients is. The log of that share is taken off a model's log probabilities, what is left is divided
by a temperature fitted on validation, and the log of the wanted prevalence is added.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embcache.errors import ProtocolError, UsageError
from embcache.probe.metrics import FloatArray, IntArray, alike, evaluate, find_metric, log_probabilities, softmax
from embcache.probe.statistics import RESAMPLES, Scores, TestSet, estimate, sample
from embcache.runs.result import Estimate
from embcache.targets import Target, make_target


@dataclass(frozen=True, eq=False)
class Predictions:
    """Logits of K models for n labeled rows."""

    ids: NDArray[np.object_]
    groups: NDArray[np.object_]
    labels: NDArray[Any]  # values (n,), or (n, L) of findings
    logits: FloatArray  # (K, n, C)
    class_names: tuple[str, ...]
    positive: int = 1  # class that asymmetric metrics of two classes are of
    overlap: float | None = None  # mean share of training rows that two models have in common
    folds: int = 1  # of one repeat
    target: Target | None = None  # by default classes

    @property
    def task(self) -> Target:
        """What is predicted."""
        return self.target or make_target("classes", self.class_names)

    @property
    def p(self) -> FloatArray:
        """Probabilities, or numbers, float64 of shape (K, n, C)."""
        return self.task.predicted(self.logits)

    @property
    def test(self) -> TestSet:
        """Values and groups of the rows."""
        return TestSet(self.labels, self.groups, self.class_names, self.positive, self.target)

    def scores(self, metric: str, resamples: int = RESAMPLES) -> Scores:
        """Scores by a metric; see `embcache.probe.statistics.sample`."""
        return sample(find_metric(metric, self.task), self.test, self.logits, resamples=resamples)

    def estimate(self, metric: str, resamples: int = RESAMPLES) -> Estimate:
        """Mean score by a metric, with its two intervals."""
        return estimate(self.scores(metric, resamples), self.overlap, self.folds)

    def take(self, rows: NDArray[Any]) -> Predictions:
        """Some of the rows, by number or by mask."""
        return replace(
            self, ids=self.ids[rows], groups=self.groups[rows], labels=self.labels[rows], logits=self.logits[:, rows]
        )

    def ensemble(self) -> Predictions:
        """One model: the mean of the models' probabilities or numbers, which is what ``predict`` uses."""
        return replace(self, logits=self.task.average(self.logits)[None], overlap=None, folds=1)

    def finding(self, name: str) -> Predictions:
        """One finding as models of two classes, absent and present, on the rows of which it is known."""
        if name not in self.class_names:
            raise UsageError(
                "there is no such finding", code="unknown-finding", expected=", ".join(self.class_names), found=name
            )
        of = self.class_names.index(name)
        known = self.labels[:, of] >= 0
        odds = self.logits[:, known, of]
        return replace(
            self.take(known), labels=self.labels[known, of], logits=np.stack([np.zeros_like(odds), odds], axis=-1),
            class_names=(f"no {name}", name), positive=1, target=None,
        )  # fmt: skip

    def by_group(self) -> Predictions:
        """One row per group, as its target makes it; those whose rows disagree in their class are left out."""
        task = self.task
        names, group = np.unique(self.groups.astype(str), return_inverse=True)
        order = np.argsort(group.reshape(-1), kind="stable")
        parts = np.split(order, np.cumsum(np.bincount(group.reshape(-1)))[:-1])
        labels = np.stack([np.asarray(task.group_value(self.labels[part])) for part in parts])
        kept = np.flatnonzero(task.known(labels))
        logits = [task.of_group(self.logits[:, parts[k]]) for k in kept]
        named = names.astype(object)[kept]
        stacked = np.stack(logits, axis=1) if logits else self.logits[:, :0]
        return replace(self, ids=named, groups=named, labels=labels[kept], logits=stacked)


def group_ensemble(predictions: Predictions) -> Predictions:
    """One model by group, as ``predict`` has it: the maximum of findings is of the models' mean probabilities."""
    if predictions.task.kind == "findings":
        return predictions.ensemble().by_group()
    return predictions.by_group().ensemble()


def all_estimates(predictions: Predictions, metric: str) -> dict[str, Estimate]:
    """Scores of the mean over models (``""``), and where there are such of the ensemble, by patient, and of both."""
    found = {"": predictions.estimate(metric)}
    if len(predictions.logits) > 1:
        found["ensemble"] = predictions.ensemble().estimate(metric)
    groups, _ = group_rows(predictions)
    if groups is not None:
        found["by patient"] = groups.estimate(metric)
        if len(predictions.logits) > 1:
            found["by patient, ensemble"] = group_ensemble(predictions).estimate(metric)
    return found


def group_rows(predictions: Predictions) -> tuple[Predictions | None, str]:
    """Predictions by group, or None and why there are none; no reason where every image is a group."""
    total = len(set(predictions.groups.tolist()))
    if total == len(predictions.groups):
        return None, ""
    groups = predictions.by_group()
    task = predictions.task
    if not len(groups.ids) or alike(groups.labels, task):
        mixed = total - len(groups.ids)
        constant = f"no {task.noun} varies among {len(groups.ids):,} groups"
        return None, f"of {total:,} groups {mixed:,} hold images of several classes" if mixed else constant
    return groups, ""


def grouped_scores(predictions: Predictions, metric: str) -> dict[str, Any]:
    """What `embcache.runs.result.Result.by_group` holds."""
    groups, why = group_rows(predictions)
    if groups is None:
        return {"why": why} if why else {}
    one_label = predictions.task.kind not in ("findings", "number")  # of others only what is unknown is left out
    mixed = len(set(predictions.groups.tolist())) - len(groups.ids) if one_label else 0
    estimated = groups.estimate(metric).to_json()
    one = ensemble_scores(group_ensemble(predictions), metric)
    found = {"groups": len(groups.ids), "estimate": estimated, "ensemble": one}
    return found | ({"mixed": mixed} if mixed else {})


def ensemble_scores(predictions: Predictions, metric: str) -> dict[str, Any]:
    """What `embcache.runs.result.Result.ensemble` holds."""
    one = predictions if len(predictions.logits) == 1 else predictions.ensemble()
    one = replace(one, overlap=None, folds=1)
    measured = evaluate(metric, one.labels, one.logits[0], one.positive, one.task)
    return {"estimate": one.estimate(metric).to_json(), "metrics": measured}


@dataclass(frozen=True)
class Adjust:
    """What a user asks to be done to the probabilities of every model before they are averaged."""

    prevalence: float | Mapping[str, float] | None = None  # where the models are to be used
    calibrate: bool = False  # fit a temperature on each model's own validation rows

    def __bool__(self) -> bool:
        return self.calibrate or self.prevalence is not None


def parse_prevalence(text: str | None) -> float | dict[str, float] | None:
    """``0.1`` or ``a=0.1,b=0.2,c=0.7`` as `Adjust` takes it."""
    if text is None:
        return None
    try:
        if "=" not in text:
            return float(text)
        pairs = [part.rpartition("=") for part in text.split(",")]
        return {name.strip(): float(value) for name, _, value in pairs}
    except ValueError as error:
        raise UsageError(
            "not a prevalence", code="prevalence", expected="a number between 0 and 1, or CLASS=NUMBER for each class",
            found=repr(text), where="--prevalence", fix="--prevalence 0.1",
        ) from error  # fmt: skip


def prevalence_vector(prevalence: float | Mapping[str, float], class_names: Sequence[str], positive: int) -> FloatArray:
    """Prevalence of each class, float64 (C,), adding up to 1."""
    names, example = list(class_names), ",".join(f"{name}={1 / len(class_names):.2g}" for name in class_names)
    if isinstance(prevalence, Mapping):
        given, found = dict(prevalence), ", ".join(f"{name}={value:g}" for name, value in prevalence.items())
    else:  # one number is of the positive class of two
        given, found = {names[positive]: prevalence, names[1 - positive]: 1 - prevalence}, f"{prevalence:g}"
    values = [given.get(name, math.nan) for name in names]
    if set(given) != set(names) or not all(0 < value < 1 for value in values) or abs(sum(values) - 1) > 1e-3:
        raise UsageError(
            "not a prevalence of these classes", code="prevalence",
            expected="a number above 0 and below 1 for each of " + ", ".join(names) + ", together 1", found=found,
            where="--prevalence", fix="--prevalence 0.1" if len(names) == 2 else f"--prevalence {shlex.quote(example)}",
        )  # fmt: skip
    return np.array(values) / sum(values)


@dataclass(frozen=True)
class Adjustment:
    """How the logits of one model become those of another prevalence."""

    seen: tuple[float, ...]  # share of each class among what its training saw
    prevalence: tuple[float, ...]  # of each class, where it is to be used
    temperature: float = 1.0  # evidence is divided by it: above 1 where the model is too sure

    def logits(self, logits: NDArray[Any]) -> FloatArray:
        """Logits (…, C) of the adjusted model."""
        return evidence(logits, self.seen) / self.temperature + np.log(self.prevalence)

    def probabilities(self, logits: NDArray[Any]) -> FloatArray:
        """Class probabilities (…, C) of the adjusted model."""
        return softmax(self.logits(logits))


def evidence(logits: NDArray[Any], seen: Sequence[float]) -> FloatArray:
    """Log p (…, C) less the log of what training saw of each class: the log likelihood of an image, but for a sum."""
    shares = np.asarray(seen, dtype=np.float64)
    return log_probabilities(logits) - np.log(np.where(shares > 0, shares, 1 / len(shares)))


def adjustments(
    seen: Sequence[Sequence[float]], validation: Sequence[Predictions], prevalence: FloatArray | None, calibrate: bool
) -> list[Adjustment]:
    """For each model the prior correction, and a temperature where one is asked for."""
    if prevalence is None:
        names = validation[0].class_names
        counts = np.bincount(np.concatenate([v.labels for v in validation]), minlength=len(names))
        if not counts.all():
            raise ProtocolError(
                "validation images do not show how frequent each class is", code="class-missing",
                expected="images of each class", found="none of " + ", ".join(np.array(names)[counts == 0]),
                fix="--prevalence with a number for each class",
            )  # fmt: skip
        prevalence = counts / counts.sum()
    prior = tuple(prevalence.tolist())
    if not calibrate:
        return [Adjustment(tuple(shares), prior) for shares in seen]
    return [
        Adjustment(tuple(shares), prior, fit_temperature(v.labels, evidence(v.logits[0], shares), prevalence))
        for shares, v in zip(seen, validation, strict=True)
    ]


def fit_temperature(labels: IntArray, logits: FloatArray, prevalence: FloatArray) -> float:
    """The temperature by which ``logits / temperature + log(prevalence)`` have the smallest log loss.

    Rows are weighted so that classes are as frequent as ``prevalence`` says. Half the squared log of the temperature is
    added (a normal prior with sd 1): a few rows that are separated without an error do not make a model infinitely
    sure.

    Shapes: labels (m,); logits (m, C); prevalence (C,).
    """
    if not len(labels):
        return 1.0
    weighted = row_weights(labels, prevalence)[:, None] * logits
    prior, target = np.log(prevalence), np.eye(len(prevalence))[labels]
    low, high = -math.log(100.0), math.log(100.0)  # of the log of the inverse temperature
    for _ in range(50):
        middle = (low + high) / 2
        steep = math.exp(middle)
        slope = steep * float((weighted * (softmax(steep * logits + prior) - target)).sum()) + middle
        low, high = (low, middle) if slope > 0 else (middle, high)
    return math.exp(-(low + high) / 2)


def row_weights(labels: IntArray, prevalence: FloatArray) -> FloatArray:
    """Weights (n,), with mean 1, by which the classes of rows are as frequent as ``prevalence`` (C,) says."""
    each = prevalence / np.maximum(np.bincount(labels, minlength=len(prevalence)), 1)
    weights = each[labels]
    return np.asarray(weights / weights.mean())
