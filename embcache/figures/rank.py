"""Scores of cached features that need no training, on training images only: which backbones are worth probing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau, rankdata, spearmanr

from embcache.data.dataset import ImageDataset
from embcache.figures.shown import MOST, Pool, open_pool
from embcache.figures.transferability import centroid_logits, h_score, logme
from embcache.paths import PathLike
from embcache.probe.heads.solved import KNN
from embcache.probe.inputs import plan_for
from embcache.probe.metrics import score
from embcache.probe.protocol import Splits
from embcache.probe.stack import predict_logits
from embcache.runs.folders import Result, list_results

SCORES: Mapping[str, str] = {
    "logme": "LogME",
    "h_score": "H-score",
    "centroid": "nearest centroid",
    "knn": "k-NN",
}
"""The scores of a backbone, higher is better, as tables name them."""

ORDER = ("logme", "centroid", "knn")
"""The scores that rows are ordered by. The H-score is measured on the rows that it is fitted to: it is almost as
high with permuted labels (docs/heads.md)."""

_FOLDS = 5


@dataclass(frozen=True)
class RankRow:
    """Scores of one backbone on a dataset's training images, and the test scores of its probes."""

    backbone: str
    logme: float
    h_score: float
    centroid: float
    knn: float
    place: float  # mean of the ranks by `ORDER` among the backbones compared; 1 is best in all of them
    probes: Mapping[str, float] = field(default_factory=dict)
    runs: Mapping[str, str] = field(default_factory=dict)  # their run ids


@dataclass(frozen=True)
class Correlation:
    """Agreement of one score with the linear probe's test score at one subset, over backbones."""

    score: str  # A key of `SCORES`, or ``"place"``
    subset: str
    n: int  # backbones that have both; three at least
    kendall: float
    spearman: float


@dataclass(frozen=True)
class Ranking:
    """The backbones of one dataset, best first."""

    dataset: str
    metric: str
    subset: str  # the subset whose rows were scored
    n_train: int  # training rows per fold
    labels_used: int  # labels per fold, training and validation
    probe_labels: Mapping[str, int]  # the same of the linear probes
    rows: tuple[RankRow, ...]  # by ``place``
    correlations: tuple[Correlation, ...]  # empty where fewer than three backbones have a linear probe at one subset
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, every field by its name."""
        return asdict(self)


def rank(
    ds: ImageDataset,
    backbones: Sequence[str] = (),
    *,
    home: PathLike | None = None,
    recipe: str | None = None,
    seed: int = 0,
    subset: str | int = "F",
) -> Ranking:
    """Score cached backbones without training; no test row is looked at.

    Folds are five; fewer, with a note, where a class has fewer groups; where it has one, all training images are scored
    by LogME alone. Subset F with more than 5,000 training images per fold takes that many.

    Parameters
    ----------
    ds : ImageDataset
        The dataset.
    backbones : sequence of str, optional
        Backbones with cached features; default all.
    home : path, optional
        Folder of stores and runs.
    recipe : str, optional
        First digits of the fingerprint, where several recipes are cached.
    seed : int
        Of folds and subsets.
    subset : str or int
        Training images to score on: a subset of `probe_features`.

    Returns
    -------
    Ranking
        One row per backbone, the best first.

    Raises
    ------
    StoreNotFoundError
        No features are cached.
    ProtocolError
        The dataset has too few images for the subset.
    """
    pool = open_pool(ds, backbones, home=home, recipe=recipe, seed=seed)
    plan, more = _plan(pool, subset, seed)
    (name,) = plan.subsets
    scores = {backbone: _scores(pool, plan, backbone, name) for backbone in pool.stores}
    known = [key for key in ORDER if not any(np.isnan(row[key]) for row in scores.values())]
    places = np.mean([rankdata([-row[key] for row in scores.values()]) for key in known], axis=0)
    saved, found = _saved_probes(pool, plan, home)
    rows = [
        RankRow(
            backbone,
            **row,
            place=float(place),
            probes={subset: float(result.mean or 0.0) for subset, result in saved[backbone].items()},
            runs={subset: result.id for subset, result in saved[backbone].items()},
        )
        for (backbone, row), place in zip(scores.items(), places, strict=True)
    ]
    rows.sort(key=lambda row: row.place)
    folds = range(plan.n_folds)
    n_train, n_val = (float(np.mean([len(part[fold, name]) for fold in folds])) for part in (plan.train, plan.val))
    ordered = sorted((result for own in saved.values() for result in own.values()), key=lambda r: r.n_train)
    return Ranking(
        ds.name, ds.metric, name, round(n_train), round(n_train + n_val),
        {result.subset: result.labels_used for result in ordered}, tuple(rows), tuple(correlate(rows)),
        (*plan.notes, *more, *found),
    )  # fmt: skip


def correlate(rows: Sequence[RankRow]) -> list[Correlation]:
    """Rank correlation of every score, and of the place, with the linear probe at each subset of three or more."""
    found = []
    for subset in dict.fromkeys(subset for row in rows for subset in row.probes):
        both = [row for row in rows if subset in row.probes]
        if len(both) < 3:
            continue
        reached = [row.probes[subset] for row in both]
        for key in (*SCORES, "place"):
            values = [-row.place if key == "place" else vars(row)[key] for row in both]
            if len(set(values)) < 2 or len(set(reached)) < 2:
                tau = rho = float("nan")
            else:
                tau, rho = kendalltau(values, reached).statistic, spearmanr(values, reached).statistic
            found.append(Correlation(key, subset, len(both), float(tau), float(rho)))
    return found


def _plan(pool: Pool, subset: str | int, seed: int) -> tuple[Splits, list[str]]:
    """Five folds, fewer where a class has fewer groups, none to validate where it has one; and notes."""
    sides, names = pool.sides, pool.ds.class_names
    labels, groups = sides.labels[sides.pool], sides.groups[sides.pool]
    counts = [len(set(groups[labels == c])) for c in range(len(names))]
    folds = min(_FOLDS, *counts)
    if folds < 2 <= sum(count > 0 for count in counts) and str(subset).upper() == "F":
        rows = pool.drawn(seed)
        few = ", ".join(name for name, count in zip(names, counts, strict=True) if count < 2)
        note = f"LogME alone: nearest centroid and k-NN need two groups outside the test set; there are fewer of {few}"
        return Splits(
            dataset=pool.ds.name, class_names=names, ids=sides.ids, labels=sides.labels, groups=sides.groups,
            test=sides.test, test_set=sides.test_set, train={(0, "F"): rows}, val={(0, "F"): rows[:0]}, subsets=("F",),
            n_folds=1, seed=seed, val_mode="full", notes=sides.notes,
        ), [note]  # fmt: skip
    stores, folds = list(pool.stores.values()), max(folds, 2)
    plan = plan_for(pool.ds, stores, subsets=[subset], folds=folds, seed=seed)
    notes = []
    if folds < _FOLDS:
        few = ", ".join(name for name, count in zip(names, counts, strict=True) if count < _FOLDS)
        notes.append(f"{folds} folds in place of {_FOLDS}: too few groups outside the test set of {few}")
    if plan.subsets == ("F",) and min(len(rows) for rows in plan.train.values()) > MOST:
        notes.append(f"scored on {MOST:,} training images per fold, drawn balanced from all")
        plan = plan_for(pool.ds, stores, subsets=[MOST], folds=folds, seed=seed)
    return plan, notes


def _scores(pool: Pool, plan: Splits, backbone: str, subset: str) -> dict[str, float]:
    metric, n_classes = pool.ds.metric, len(pool.ds.class_names)
    features, place = pool.features(backbone, pool.rows), np.full(len(plan.ids), -1, dtype=np.int64)
    place[pool.rows] = np.arange(len(pool.rows))
    x, labels = features.numpy(), plan.labels
    centroid, near = [], []
    for fold in range(plan.n_folds):
        train, val = plan.train[fold, subset], plan.val[fold, subset]
        if not len(val):
            centroid, near = [np.nan], [np.nan]
            break
        nearest = centroid_logits(x[place[train]], labels[train], x[place[val]], n_classes)
        centroid.append(score(metric, labels[val], nearest))
        own = {backbone: features[place[train]]}
        solved = KNN().solve(own, torch.from_numpy(labels[train]), None, None, n_classes, metric)
        votes = predict_logits(KNN(), solved.params, {backbone: features}, torch.from_numpy(place[val]))
        near.append(score(metric, labels[val], votes))
    # At F the folds' training rows together are the pool; smaller subsets differ from fold to fold.
    parts = [plan.train[fold, subset] for fold in range(plan.n_folds)]
    parts = [np.unique(np.concatenate(parts))] if subset == "F" else parts
    return {
        "logme": float(np.mean([logme(x[place[rows]], labels[rows]) for rows in parts])),
        "h_score": float(np.mean([h_score(x[place[rows]], labels[rows]) for rows in parts])),
        "centroid": float(np.mean(centroid)),
        "knn": float(np.mean(near)),
    }


def _saved_probes(pool: Pool, plan: Splits, home: PathLike | None) -> tuple[dict[str, dict[str, Result]], list[str]]:
    """Saved linear probes of each backbone by subset, on the very features ranked, and notes.

    All are of one protocol: that of the plan, where there is a probe of it, else the most frequent one; at each subset
    also of the same splits.
    """
    fitting: dict[tuple[Any, ...], list[Result]] = {}  # by validation, test set, seed, folds, overlap left out
    others = 0
    for result in list_results(home, pool.ds.name):
        request, backbone = result.request, result.backbones[0]
        if result.kind != "probe" or result.head != "linear" or len(result.backbones) > 1 or result.mean is None:
            continue
        if result.target != pool.ds.target or request.get("classes", {}) != pool.ds.renamed:
            continue
        if backbone not in pool.stores:
            continue
        if dict(request["recipes"]).get(backbone) != pool.stores[backbone].recipe.fingerprint:
            continue
        plain = not any(name in request for name in ("lr", "views", "repeats", "target"))
        complete = all(fold.score is not None for fold in result.folds)
        if plain and complete and request.get("head") == {"name": "linear"}:
            defaults = {"val": "full", "test": "local", "seed": 0, "folds": 5, "exclude_test_overlap": False}
            fitting.setdefault(tuple(request.get(k, value) for k, value in defaults.items()), []).append(result)
        else:
            others += 1
    found: dict[str, dict[str, Result]] = {backbone: {} for backbone in pool.stores}
    if not fitting:
        return found, [f"{others} linear probes of other protocols left out"] if others else []
    default = (plan.val_mode, plan.test_set, plan.seed, plan.n_folds, False)
    chosen = default if default in fitting else max(fitting, key=lambda key: (len(fitting[key]), repr(key)))
    ordered = sorted(fitting[chosen], key=lambda r: (r.n_train, r.id))
    for subset in dict.fromkeys(result.subset for result in ordered):
        drawn = Counter(str(r.request.get("splits")) for r in ordered if r.subset == subset)
        splits = max(drawn, key=lambda digest: (drawn[digest], digest))
        for result in ordered:
            if result.subset == subset and result.request.get("splits") == splits:
                found[result.backbones[0]].setdefault(subset, result)
    val, test, seed, folds, excluded = chosen
    note = f"linear probes are all of one protocol: {folds} folds, seed {seed}, --val {val}, {test} test set"
    note += ", without the overlap with the test set" if excluded else ""
    others += sum(map(len, fitting.values())) - sum(map(len, found.values()))
    return found, [note + (f"; {others} of other protocols or splits left out" if others else "")]
