"""What cached features say of a dataset: near-duplicates, labels to doubt, outliers; and what leaving them out does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from embcache.data.dataset import ImageDataset
from embcache.errors import UsageError
from embcache.paths import PathLike
from embcache.probe.heads.logreg import LogReg
from embcache.probe.inputs import load_features, open_stores, plan_for
from embcache.probe.metrics import score, softmax
from embcache.probe.splits import Splits
from embcache.probe.standard import standard_directions

SIMILARITY = 0.95
"""Cosine of standardised features from which two images count as near-duplicates."""

NEIGHBOURS = 10
FAR = 5.0
"""Robust deviations below the usual closeness of neighbours from which an image counts as an outlier."""

_BLOCK = 512  # rows compared with all others at a time
_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)

Float = NDArray[np.float64]
Int = NDArray[np.int64]


@dataclass(frozen=True)
class Pair:
    """Two images that are nearly the same. ``kind``: across splits, across groups, or within a group."""

    one: str
    other: str
    similarity: float
    kind: str
    same_label: bool


@dataclass(frozen=True)
class Doubt:
    """A label that models which did not see the image confidently disagree with."""

    id: str
    label: int
    proposed: int
    p_label: float
    p_proposed: float
    split: str


@dataclass(frozen=True)
class Outlier:
    """An image far from all others. ``deviations``: of its closeness to its neighbours, robust, below the median."""

    id: str
    deviations: float
    split: str


@dataclass(frozen=True)
class Effect:
    """Test metric over folds of a logistic regression on F, with all rows and without the excluded ones.

    Attributes
    ----------
    metric : str
    before, after : (float, float)
        Mean and sd (ddof 1) over folds; ``after`` was trained and validated without the excluded rows and is scored on
        the whole test set: nothing is gained by leaving out what is hard.
    after_clean : (float, float)
        As ``after``, scored without the excluded test images.
    excluded_train, excluded_test : int
        Images.
    """

    metric: str
    before: tuple[float, float]
    after: tuple[float, float]
    after_clean: tuple[float, float]
    excluded_train: int
    excluded_test: int


@dataclass(frozen=True)
class Audit:
    """What one backbone's features say.

    Attributes
    ----------
    dataset, backbone : str
    images : int
        Labelled and readable.
    pairs : tuple of Pair
        Most similar first.
    doubts : tuple of Doubt
        Most confident first.
    outliers : tuple of Outlier
        Furthest first.
    exclude : tuple of (str, str)
        Ids to leave out, each with the reason: doubted labels, outliers, and of near-duplicates across the test border
        the training image.
    effect : Effect or None
        None where nothing is excluded.
    notes : tuple of str
    """

    dataset: str
    backbone: str
    images: int
    pairs: tuple[Pair, ...]
    doubts: tuple[Doubt, ...]
    outliers: tuple[Outlier, ...]
    exclude: tuple[tuple[str, str], ...]
    effect: Effect | None
    notes: tuple[str, ...]


def audit_dataset(
    ds: ImageDataset,
    backbone: str,
    *,
    similarity: float = SIMILARITY,
    home: PathLike | None = None,
    recipe: str | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Audit:
    """Look for near-duplicates, labels to doubt and outliers in the cached features of one backbone.

    Doubted labels follow confident learning (Northcutt et al., 2021): logistic regressions over grouped folds give each
    image probabilities of models that did not see it (or its group); a class proposes itself where its probability
    reaches the mean that images of this class have, and a label is doubted where the most probable such class is
    another one.

    Parameters
    ----------
    ds : ImageDataset
        Audited are its labelled images.
    backbone : str
        Whose cached features are used.
    similarity : float
        As `SIMILARITY`.
    home, recipe
        As for `embcache.probe.inputs.open_stores`.
    folds, seed : int
        Of the protocol.

    Raises
    ------
    UsageError
        The threshold is none.
    ProtocolError
        The dataset does not carry the folds.
    """
    if not 0 < similarity <= 1:
        raise UsageError(
            "not a similarity", expected="above 0, at most 1", found=str(similarity), fix="--similarity 0.95"
        )
    store = open_stores(ds, [[backbone]], home, recipe)[backbone]
    plan = plan_for(ds, [store], subsets=("F",), folds=folds, seed=seed)
    pool = [plan.val[fold, "F"] for fold in range(plan.n_folds)]
    test = plan.test[plan.labels[plan.test] >= 0]
    rows = np.concatenate([*pool, test])
    features = load_features(store, ds, plan.ids[rows])  # (n, D)
    directions = standard_directions(features.numpy())
    is_test = np.arange(len(rows)) >= len(rows) - len(test)
    pairs, closeness = _compare(plan, rows, directions, is_test, similarity)
    parts = [np.arange(len(part)) + start for part, start in _starts([*pool, test]) if len(part)]
    probabilities = _out_of_fold(features, plan.labels[rows], parts, len(plan.class_names))
    split = np.where(is_test, "test", "train")
    doubts = _doubt(plan.ids[rows], plan.labels[rows], probabilities, split)
    outliers = _outliers(plan.ids[rows], closeness, split)
    exclude = _exclude(pairs, doubts, outliers, dict(zip(plan.ids[rows].tolist(), is_test.tolist(), strict=True)))
    effect = _effect(plan, rows, features, {id_ for id_, _ in exclude}, ds.metric) if exclude else None
    return Audit(ds.name, backbone, len(rows), pairs, doubts, outliers, exclude, effect, plan.notes)


def _starts(parts: Sequence[Int]) -> Iterable[tuple[Int, int]]:
    start = 0
    for part in parts:
        yield part, start
        start += len(part)


def _compare(
    plan: Splits, rows: Int, directions: NDArray[np.float32], is_test: NDArray[np.bool_], threshold: float
) -> tuple[tuple[Pair, ...], Float]:
    """Near-duplicates, and each image's mean similarity to its nearest others, (n,)."""
    n, k = len(rows), min(NEIGHBOURS, len(rows) - 1)
    closeness = np.empty(n)
    pairs = []
    for start in range(0, n, _BLOCK):
        similar = directions[start : start + _BLOCK] @ directions.T  # (block, n)
        own = np.arange(len(similar))
        similar[own, start + own] = -np.inf
        closeness[start : start + len(similar)] = np.partition(similar, n - k, axis=1)[:, n - k :].mean(axis=1)
        for a, b in np.argwhere(similar >= threshold).tolist():
            i, j = start + a, b
            if i < j:
                pairs.append(_pair(plan, int(rows[i]), int(rows[j]), float(similar[a, b]), is_test[i] != is_test[j]))
    return tuple(sorted(pairs, key=lambda pair: (-pair.similarity, pair.one, pair.other))), closeness


def _pair(plan: Splits, one: int, other: int, similarity: float, across: bool) -> Pair:
    same_group = plan.groups[one] == plan.groups[other]
    kind = "across splits" if across else "within a group" if same_group else "across groups"
    same = bool(plan.labels[one] == plan.labels[other])
    return Pair(str(plan.ids[one]), str(plan.ids[other]), min(similarity, 1.0), kind, same)


def _out_of_fold(features: torch.Tensor, labels: Int, parts: Sequence[Int], classes: int) -> Float:
    """Probabilities (n, C) of each part by a model of all others but one, on which its strength was chosen.

    Chosen by the log loss: the metrics of the datasets do not care whether probabilities are those of the classes.
    """
    found = np.zeros((len(labels), classes))
    y = torch.from_numpy(labels)
    for place, held in enumerate(parts):
        val = parts[(place + 1) % len(parts)]
        train = np.setdiff1d(np.arange(len(labels)), np.concatenate([held, val]))
        each = [
            _probabilities(features, y, train, val, np.concatenate([val, held]), classes, "macro_auc", (strength,))
            for strength in _STRENGTHS
        ]
        own = np.arange(len(val)), labels[val]
        losses = [-np.log(np.maximum(p[own], 1e-12)).mean() for p in each]
        found[held] = each[int(np.argmin(losses))][len(val) :]
    return found


def _probabilities(
    features: torch.Tensor,
    y: torch.Tensor,
    train: Int,
    val: Int,
    asked: Int,
    classes: int,
    metric: str,
    strengths: tuple[float, ...] = _STRENGTHS,
) -> Float:
    head = LogReg(Cs=strengths)
    x = {"features": features[train]}
    solved = head.solve(x, y[train], {"features": features[val]}, y[val], classes, metric)
    logits = head.apply({name: p[None] for name, p in solved.params.items()}, {"features": features[asked][None]})
    return softmax(logits[0].double().numpy())


def _doubt(ids: NDArray[np.object_], labels: Int, p: Float, split: NDArray[np.str_]) -> tuple[Doubt, ...]:
    classes = p.shape[1]
    usual = np.array([p[labels == c, c].mean() if (labels == c).any() else np.inf for c in range(classes)])
    fits = np.where(p >= usual, p, -1.0)
    proposed = fits.argmax(1)
    doubted = np.flatnonzero((fits.max(1) > 0) & (proposed != labels))
    own, other = p[doubted, labels[doubted]], p[doubted, proposed[doubted]]
    order = np.argsort(own - other, kind="stable")
    return tuple(
        Doubt(
            str(ids[i]),
            int(labels[i]),
            int(proposed[i]),
            float(p[i, labels[i]]),
            float(p[i, proposed[i]]),
            str(split[i]),
        )
        for i in doubted[order]
    )


def _outliers(ids: NDArray[np.object_], closeness: Float, split: NDArray[np.str_]) -> tuple[Outlier, ...]:
    middle = np.median(closeness)
    spread = 1.4826 * np.median(np.abs(closeness - middle))  # a standard deviation, were they normal
    deviations = (middle - closeness) / max(float(spread), 1e-12)
    far = np.flatnonzero(deviations > FAR)
    order = far[np.argsort(-deviations[far], kind="stable")]
    return tuple(Outlier(str(ids[i]), float(deviations[i]), str(split[i])) for i in order)


def _exclude(
    pairs: Sequence[Pair], doubts: Sequence[Doubt], outliers: Sequence[Outlier], is_test: dict[str, bool]
) -> tuple[tuple[str, str], ...]:
    reasons: dict[str, str] = {}
    for pair in pairs:
        if pair.kind == "across splits":
            train, test = (pair.other, pair.one) if is_test[pair.one] else (pair.one, pair.other)
            reasons.setdefault(train, f"near-duplicate of the test image {test}")
    for doubt in doubts:
        reasons.setdefault(doubt.id, f"its label is doubted (p = {doubt.p_label:.3f})")
    for outlier in outliers:
        reasons.setdefault(outlier.id, f"outlier ({outlier.deviations:.1f} deviations)")
    return tuple(reasons.items())


def _effect(plan: Splits, rows: Int, features: torch.Tensor, excluded: set[str], metric: str) -> Effect:
    place = {int(row): i for i, row in enumerate(rows.tolist())}
    out = np.array([str(plan.ids[row]) in excluded for row in rows])
    y = torch.from_numpy(plan.labels[rows])
    test = np.array([place[int(row)] for row in plan.test if int(row) in place], dtype=np.int64)
    classes = len(plan.class_names)
    before, after, clean = [], [], []
    for fold in range(plan.n_folds):
        train, val = (
            np.array([place[int(row)] for row in part[fold, "F"]], dtype=np.int64) for part in (plan.train, plan.val)
        )
        p = _probabilities(features, y, train, val, test, classes, metric)
        before.append(score(metric, plan.labels[rows][test], p))
        p = _probabilities(features, y, train[~out[train]], val[~out[val]], test, classes, metric)
        after.append(score(metric, plan.labels[rows][test], p))
        clean.append(score(metric, plan.labels[rows][test[~out[test]]], p[~out[test]]))
    pool = np.setdiff1d(np.arange(len(rows)), test)
    return Effect(
        metric, _mean_sd(before), _mean_sd(after), _mean_sd(clean), int(out[pool].sum()), int(out[test].sum())
    )


def _mean_sd(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
