"""Which backbone to bother with: scores of cached features that need no training, on training images only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau, rankdata, spearmanr

from embcache.analysis.pool import MOST, Pool, open_datasets, open_pool
from embcache.analysis.transfer import centroid_logits, h_score, logme
from embcache.data.dataset import ImageDataset
from embcache.paths import PathLike
from embcache.probe.heads.knn import KNN
from embcache.probe.metrics import score, softmax
from embcache.probe.protocol import subset_sizes
from embcache.probe.results import list_results
from embcache.probe.stack import predict_logits

SCORES: Mapping[str, str] = {
    "logme": "LogME",
    "h_score": "H-score",
    "centroid": "nearest centroid",
    "knn": "k-NN",
}
"""The scores of a backbone, higher is better, as tables name them."""


@dataclass(frozen=True)
class RankRow:
    """Scores of one backbone on a dataset's training images, and what probes of it reached.

    Attributes
    ----------
    backbone : str
    logme, h_score : float
        See `embcache.analysis.transfer`; of the training rows (mean over folds; of the whole pool at subset F).
    centroid, knn : float
        The dataset's metric on validation rows (mean over folds) of the nearest class centroid, and of the head
        ``knn``: both learn from a fold's training rows.
    place : float
        Mean of the four ranks among the backbones compared; 1 is best in all of them.
    probes : mapping of subset to float
        Mean test score of the saved linear probe on the same features, for each subset there is one of.
    runs : mapping of subset to str
        Their run ids.
    """

    backbone: str
    logme: float
    h_score: float
    centroid: float
    knn: float
    place: float
    probes: Mapping[str, float] = field(default_factory=dict)
    runs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Correlation:
    """Agreement of one score with the linear probe's test score at one subset, over backbones.

    Attributes
    ----------
    score : str
        A key of `SCORES`, or ``"place"``.
    subset : str
    n : int
        Backbones that have both; three at least.
    kendall, spearman : float
        Rank correlations, τ_b and ρ; NaN where a side is constant. For ``place`` of its negative, so that 1 is
        agreement throughout.
    """

    score: str
    subset: str
    n: int
    kendall: float
    spearman: float


@dataclass(frozen=True)
class Ranking:
    """The backbones of one dataset, best first.

    Attributes
    ----------
    dataset, metric : str
    subset : str
        The subset whose rows were looked at.
    n_train : int
        Training rows of a fold.
    rows : tuple of RankRow
        By ``place``.
    correlations : tuple of Correlation
        Empty where fewer than three backbones have a linear probe at one subset.
    notes : tuple of str
        What a reader of the scores must know.
    """

    dataset: str
    metric: str
    subset: str
    n_train: int
    rows: tuple[RankRow, ...]
    correlations: tuple[Correlation, ...]
    notes: tuple[str, ...]


def rank_cached(
    datasets: Sequence[str] | None = None,
    backbones: Sequence[str] | None = None,
    *,
    subset: str | int = "F",
    seed: int = 0,
    recipe: str | None = None,
    data_root: PathLike | None = None,
    home: PathLike | None = None,
    allow_missing: bool = False,
    dataset_name: str | None = None,
) -> list[Ranking]:
    """Rank the backbones of datasets by name, by default of every one whose features are cached.

    Parameters
    ----------
    datasets, backbones, data_root, home, allow_missing, dataset_name
        As for `embcache.probe.cached.probe_cached`.
    subset, seed, recipe
        As for `rank_dataset`.

    Raises
    ------
    StoreNotFoundError
        Nothing is cached.
    UsageError
        ``data_root`` with several datasets.
    """
    opened = open_datasets(
        datasets, data_root=data_root, home=home, allow_missing=allow_missing, dataset_name=dataset_name
    )
    return [rank_dataset(ds, backbones, home=home, recipe=recipe, seed=seed, subset=subset) for ds in opened]


def rank_backbones(
    ds: ImageDataset, backbones: Sequence[str] | None = None, *, home: PathLike | None = None, **options: Any
) -> list[RankRow]:
    """The rows of `rank_dataset`; parameters as there."""
    return list(rank_dataset(ds, backbones, home=home, **options).rows)


def rank_dataset(
    ds: ImageDataset,
    backbones: Sequence[str] | None = None,
    *,
    home: PathLike | None = None,
    recipe: str | None = None,
    seed: int = 0,
    subset: str | int = "F",
) -> Ranking:
    """Score every cached backbone without training; no test row is looked at.

    Parameters
    ----------
    ds : ImageDataset
        The dataset.
    backbones : sequence of str, optional
        Default: all that are cached.
    home : path, optional
        Folder of stores and runs.
    recipe : str, optional
        Fingerprint prefixes, where several recipes of a backbone are cached; separated by commas.
    seed : int
        Of the protocol's folds and subsets.
    subset : str or int
        As for probing. F with more than `embcache.analysis.pool.MOST` training images a fold takes that many.

    Raises
    ------
    StoreNotFoundError
        Nothing is cached.
    StoreError
        Features are missing.
    ProtocolError
        The dataset cannot carry folds or subset.
    """
    (name,) = subset_sizes(ds, [subset])
    pool = open_pool(ds, backbones, subset=name, home=home, recipe=recipe, seed=seed)
    notes = list(pool.plan.notes)
    if name == "F" and min(len(rows) for rows in pool.plan.train.values()) > MOST:
        notes.append(f"scored on {MOST:,} training images a fold, drawn balanced from all there are")
        name = str(MOST)
        pool = open_pool(ds, backbones, subset=name, home=home, recipe=recipe, seed=seed)
    scores = {backbone: _scores(pool, backbone, name) for backbone in pool.stores}
    ranks = [rankdata([-row[key] for row in scores.values()]) for key in SCORES]
    saved = _saved_probes(pool, home, seed)
    rows = [
        RankRow(
            backbone=backbone,
            **row,
            place=float(place),
            probes={subset: mean for subset, (mean, _) in saved[backbone].items()},
            runs={subset: run for subset, (_, run) in saved[backbone].items()},
        )
        for (backbone, row), place in zip(scores.items(), np.mean(ranks, axis=0), strict=True)
    ]
    rows.sort(key=lambda row: row.place)
    n_train = round(float(np.mean([len(rows) for rows in pool.plan.train.values()])))
    return Ranking(ds.name, ds.metric, name, n_train, tuple(rows), tuple(correlate(rows)), tuple(notes))


def correlate(rows: Sequence[RankRow]) -> list[Correlation]:
    """Rank correlation of every score, and of the place, with the linear probe at each subset that has three or more.

    Parameters
    ----------
    rows : sequence of RankRow
        From `rank_backbones`.
    """
    found = []
    for subset in dict.fromkeys(subset for row in rows for subset in row.probes):
        both = [row for row in rows if subset in row.probes]
        if len(both) < 3:
            continue
        reached = [row.probes[subset] for row in both]
        for key in (*SCORES, "place"):
            values = [-row.place if key == "place" else getattr(row, key) for row in both]
            if len(set(values)) < 2 or len(set(reached)) < 2:
                tau = rho = float("nan")
            else:
                tau, rho = kendalltau(values, reached).statistic, spearmanr(values, reached).statistic
            found.append(Correlation(key, subset, len(both), float(tau), float(rho)))
    return found


def _scores(pool: Pool, backbone: str, subset: str) -> dict[str, float]:
    plan, metric, n_classes = pool.plan, pool.ds.metric, len(pool.ds.class_names)
    features, place = pool.features(backbone, pool.rows), np.full(len(plan.ids), -1, dtype=np.int64)
    place[pool.rows] = np.arange(len(pool.rows))
    x, labels = features.numpy(), plan.labels
    centroid, near = [], []
    for fold in range(plan.n_folds):
        train, val = plan.train[fold, subset], plan.val[fold, subset]
        nearest = centroid_logits(x[place[train]], labels[train], x[place[val]], n_classes)
        centroid.append(score(metric, labels[val], softmax(nearest)))
        solved = KNN().solve(
            {backbone: features[place[train]]}, torch.from_numpy(labels[train]), None, None, n_classes, metric
        )
        votes = predict_logits(KNN(), solved.params, {backbone: features}, torch.from_numpy(place[val]))
        near.append(score(metric, labels[val], softmax(votes)))
    # At F the folds' training rows together are the pool; smaller subsets differ from fold to fold.
    parts = [plan.train[fold, subset] for fold in range(plan.n_folds)]
    parts = [np.unique(np.concatenate(parts))] if subset == "F" else parts
    return {
        "logme": float(np.mean([logme(x[place[rows]], labels[rows]) for rows in parts])),
        "h_score": float(np.mean([h_score(x[place[rows]], labels[rows]) for rows in parts])),
        "centroid": float(np.mean(centroid)),
        "knn": float(np.mean(near)),
    }


def _saved_probes(pool: Pool, home: PathLike | None, seed: int) -> dict[str, dict[str, tuple[float, str]]]:
    """Mean test score and run id of each backbone's saved linear probes, by subset, on the very features ranked.

    Where several differ in other things, the one of this seed with the most folds.
    """
    found: dict[str, dict[str, tuple[float, str]]] = {backbone: {} for backbone in pool.stores}
    results = [r for r in list_results(home, pool.ds.name) if r.kind == "probe" and r.head == "linear" and not r.target]
    results.sort(key=lambda r: (r.request.get("seed") != seed, -len(r.folds), r.n_train, r.id))
    for result in results:
        (backbone, *others) = result.backbones
        if others or backbone not in found or result.mean is None or result.test_set != pool.plan.test_set:
            continue
        if dict(result.request["recipes"]).get(backbone) == pool.stores[backbone].recipe.fingerprint:
            found[backbone].setdefault(result.subset, (result.mean, result.id))
    return found
