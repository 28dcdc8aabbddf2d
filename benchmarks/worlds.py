"""Simulated test sets with a known truth, for `statistics.py`: labels (n,), groups (n,), logits (models, n, classes).

The laws, so that the figures can be repeated elsewhere (N is a standard normal deviate, Φ its distribution):

two classes    A patient has one class and 1 + Poisson(1) images. A score is δ·(label − ½) + √.6 N(patient) +
               √.28 N(image) + √.12 N(model, image), with δ = √2 Φ⁻¹(AUC): its AUC over all patients is known exactly.
               Uneven: a geometric number of images of mean 5, and a patient's images share 90 % of the variance.
               Unequal: scores of positives spread 3 times as wide. Coarse: scores rounded to 4 levels.
one class      The same noise in each of several classes' logits, for patients of one class each; + gain on its own.
fundus         A patient has one eye, or two with probability .46. An eye's severity is .8 N(patient) + .6 N(eye), cut
               into five grades with shares .475, .1775, .255, .065, .0275. The logit of grade g is −.48 (g − grade)² +
               .6 N(patient, g) + .8 N(eye, g) + .5 N(model, eye, g).
single images  The same grades, every image a patient of its own; logits −.5 (g − grade)² + .9 N(image, g) +
               .5 N(model, image, g).
rare           15 % positive, every image a patient of its own; score 1.5·label + .9 N(image) + .4 N(model, image) − 1.
several        A patient has images of different classes (lesions), drawn without replacement; the logits are N(image,
               class), + gain on its own.
equal models   As two classes, but √.35 N(patient) + √.35 N(image) are common to both sets of models, √.15 N(patient) +
               √.15 N(model, image) are each set's own.
findings       A patient has 1 + Poisson(1) images; has each finding by a prevalence of its own, in 80 % of the images,
               10 % of the values unknown; a score is 1.2·present + √.6 N(patient) + √.3 N(image) + √.1 N(model, image).
numbers        Images as of findings. The number is √.9 N(patient) + √.1 N(image), or 5 to its power (skewed); what is
               predicted is .8 number + .4 N(patient) + .3 N(image) + .2 N(model, image), + a bias.
heads          64 features N(image) + ¼ (label − ½), and .6 N(image) along the diagonal, the same for all backbones.
               Logistic regression on the first labels of each fold's training part, as many of either class.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embcache.targets import Target, make_target

Array = NDArray[np.float64]
GRADES = np.array([0.475, 0.1775, 0.255, 0.065, 0.0275])
NORMAL = NormalDist()


@dataclass(frozen=True)
class Drawn:
    """One test set. ``other`` is a second set of models, as good as the first; ``overlap`` of heads' training rows."""

    labels: NDArray[Any]
    groups: NDArray[np.int64]
    logits: Array
    other: Array | None = None
    overlap: float | None = None
    truth: float | None = None
    target: Target | None = None


World = Callable[[np.random.Generator], Drawn]


def _two_columns(score: Array) -> Array:
    return np.stack([np.zeros_like(score), score], axis=-1)


def _patients(images: NDArray[np.int64], positive: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Groups and labels of rows: the first patients are positive."""
    groups = np.repeat(np.arange(len(images)), images)
    return groups, (groups < positive).astype(np.int64)


def two_classes(
    positive: int, negative: int, auc: float, *, uneven: bool = False, unequal: bool = False, coarse: bool = False
) -> World:
    def draw(rng: np.random.Generator) -> Drawn:
        n = positive + negative
        groups, labels = _patients(rng.geometric(0.2, n) if uneven else 1 + rng.poisson(1.0, n), positive)
        shared = 0.9 if uneven else 0.6
        noise = math.sqrt(shared) * rng.normal(size=n)[groups]
        noise = noise + math.sqrt(0.7 * (1 - shared)) * rng.normal(size=len(groups))
        noise = noise + math.sqrt(0.3 * (1 - shared)) * rng.normal(size=(5, len(groups)))
        spread = np.where(labels == 1, 3.0, 1.0) if unequal else np.ones(len(groups))
        distance = NORMAL.inv_cdf(auc) * math.sqrt(10 if unequal else 2)
        score = distance * (labels - 0.5) + spread * noise
        return Drawn(labels, groups, _two_columns(np.clip(np.round(score), -2, 1) if coarse else score))

    return draw


def one_class(per_class: tuple[int, ...], gain: float, models: int = 3) -> World:
    def draw(rng: np.random.Generator) -> Drawn:
        n, classes = sum(per_class), len(per_class)
        groups = np.repeat(np.arange(n), 1 + rng.poisson(1.0, n))
        labels = np.repeat(np.arange(classes), per_class)[groups]
        logits = gain * np.eye(classes)[labels] + math.sqrt(0.6) * rng.normal(size=(n, classes))[groups]
        logits += math.sqrt(0.28) * rng.normal(size=logits.shape)
        return Drawn(labels, groups, logits + math.sqrt(0.12) * rng.normal(size=(models, *logits.shape)))

    return draw


def fundus(patients: int, models: int = 5) -> World:
    cuts = [NORMAL.inv_cdf(share) for share in np.cumsum(GRADES)[:-1]]

    def draw(rng: np.random.Generator) -> Drawn:
        groups = np.repeat(np.arange(patients), 1 + (rng.random(patients) < 0.46))
        n = len(groups)
        grade = np.searchsorted(cuts, 0.8 * rng.normal(size=patients)[groups] + 0.6 * rng.normal(size=n))
        logits = -0.48 * (np.arange(5) - grade[:, None]) ** 2.0
        logits += 0.6 * rng.normal(size=(patients, 5))[groups] + 0.8 * rng.normal(size=(n, 5))
        return Drawn(grade, groups, logits + 0.5 * rng.normal(size=(models, n, 5)))

    return draw


def single_images(images: int, models: int = 3) -> World:
    def draw(rng: np.random.Generator) -> Drawn:
        grade = rng.choice(5, images, p=GRADES)
        logits = -0.5 * (np.arange(5) - grade[:, None]) ** 2.0 + 0.9 * rng.normal(size=(images, 5))
        return Drawn(grade, np.arange(images), logits + 0.5 * rng.normal(size=(models, images, 5)))

    return draw


def rare(images: int, models: int = 3) -> World:
    def draw(rng: np.random.Generator) -> Drawn:
        labels = (rng.random(images) < 0.15).astype(np.int64)
        score = 1.5 * labels + 0.9 * rng.normal(size=images) - 1 + 0.4 * rng.normal(size=(models, images))
        return Drawn(labels, np.arange(images), _two_columns(score))

    return draw


def several(patients: int, classes: int, images: int, *, gain: float = 0.7, models: int = 1) -> World:
    def draw(rng: np.random.Generator) -> Drawn:
        labels = rng.permuted(np.tile(np.arange(classes), (patients, 1)), axis=1)[:, :images].reshape(-1)
        logits, other = (
            rng.normal(size=(models, len(labels), classes)) + gain * np.eye(classes)[labels] for _ in range(2)
        )
        return Drawn(labels, np.repeat(np.arange(patients), images), logits, other)

    return draw


def equal_models(positive: int, negative: int, auc: float) -> World:
    """Two sets of five fixed models that are equally good, and have 70 % of their variance in common."""

    def draw(rng: np.random.Generator) -> Drawn:
        groups, labels = _patients(1 + rng.poisson(1.0, positive + negative), positive)
        n = len(groups)

        def noise(share: float, *models: int) -> Array:
            by_patient = rng.normal(size=positive + negative)[groups]
            return math.sqrt(share / 2) * (by_patient + rng.normal(size=(*models, n)))

        both = NORMAL.inv_cdf(auc) * math.sqrt(2) * labels + noise(0.7)
        one, other = (_two_columns(both + noise(0.3, 5)) for _ in range(2))
        return Drawn(labels, groups, one, other)

    return draw


def _several(rng: np.random.Generator, patients: int) -> NDArray[np.int64]:
    return np.repeat(np.arange(patients), 1 + rng.poisson(1, patients))


def findings(patients: int, prevalences: tuple[float, ...], models: int = 3) -> World:
    width = len(prevalences)

    def draw(rng: np.random.Generator) -> Drawn:
        groups = _several(rng, patients)
        shape = (len(groups), width)
        y = ((rng.random((patients, width)) < prevalences)[groups] & (rng.random(shape) < 0.8)).astype(np.int64)
        z = 1.2 * y + 0.6**0.5 * rng.normal(size=(patients, width))[groups] + 0.3**0.5 * rng.normal(size=shape)
        logits = z + 0.1**0.5 * rng.normal(size=(models, *shape))
        y[rng.random(shape) < 0.1] = -1
        return Drawn(y, groups, logits, target=make_target("findings", [f"f{c}" for c in range(width)]))

    return draw


def numbers(patients: int, *, skewed: bool = False, bias: float = 0.0, models: int = 3) -> World:
    def draw(rng: np.random.Generator) -> Drawn:
        groups = _several(rng, patients)
        n = len(groups)
        y = 0.9**0.5 * rng.normal(size=patients)[groups] + 0.1**0.5 * rng.normal(size=n)
        y = 5**y if skewed else y
        z = 0.8 * y + 0.4 * rng.normal(size=patients)[groups] + 0.3 * rng.normal(size=n) + bias
        return Drawn(
            y, groups, (z + 0.2 * rng.normal(size=(models, n)))[..., None], target=make_target("number", ["n"])
        )

    return draw


def logistic(x: Array, y: NDArray[np.int64], C: float = 0.1) -> Array:
    """Weights (K, D) of K logistic regressions on (K, n, D), ½‖w‖² + C Σ cross-entropy, by Newton's method."""
    k, n, d = x.shape
    x = np.concatenate([x, np.ones((k, n, 1))], axis=2)
    w, penalty = np.zeros((k, d + 1)), np.diag(np.r_[np.ones(d), 0.0])
    for _ in range(10):
        p = 1 / (1 + np.exp(-np.einsum("knd,kd->kn", x, w)))
        gradient = w @ penalty + C * np.einsum("knd,kn->kd", x, p - y)
        hessian = penalty + C * (x * (p * (1 - p))[:, :, None]).swapaxes(1, 2) @ x
        w = w - np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
    return w[:, :d]


def heads(labeled: int, test: int, *, folds: int = 5, repeats: int = 1, apart: bool = False) -> World:
    """Heads of two backbones with one law. The truth is the AUC, over all patients, of one head trained on other rows.

    ``apart`` trains each head on rows of its own: overlap 0.
    """
    dimensions, pool = 64, max(1250, 3 * labeled * (folds if apart else 1))
    direction = np.full(dimensions, 2 / math.sqrt(dimensions))
    unit = direction / np.linalg.norm(direction)

    def draw(rng: np.random.Generator) -> Drawn:
        labels = np.r_[np.arange(pool) % 2, np.arange(test) % 2]
        difficulty = rng.normal(size=len(labels))

        def features(rows: NDArray[np.int64], hard: Array) -> Array:
            x = rng.normal(size=(len(rows), dimensions)) + np.outer(labels[rows] - 0.5, direction)
            return np.asarray(x + 0.6 * np.outer(hard, unit))

        splits = [rng.permutation(pool // 2)[np.arange(pool) // 2] % folds for _ in range(repeats)]
        parts = []
        for fold in splits:
            for k in range(folds):
                rows = np.flatnonzero((fold == k) if apart else (fold != k))
                parts.append(np.r_[rows[labels[rows] == 0][: labeled // 2], rows[labels[rows] == 1][: labeled // 2]])
        pair = []
        for _ in range(2):
            x = features(np.arange(len(labels)), difficulty)
            rows = np.stack(parts)
            pair.append(_two_columns(logistic(x[rows], labels[rows]) @ x[pool:].T))
        common = [len(np.intersect1d(a, b)) / len(a) for i, a in enumerate(parts) for b in parts[:i]]
        new = np.arange(labeled)
        w = logistic(features(new, rng.normal(size=labeled))[None], labels[new][None])[0]
        truth = NORMAL.cdf(float(w @ direction / math.sqrt(2 * (w @ w + 0.36 * (w @ unit) ** 2))))
        return Drawn(labels[pool:], np.arange(test), pair[0], pair[1], float(np.mean(common)), truth)

    return draw
