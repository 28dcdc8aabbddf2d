"""Which backbone to bother with: scores of cached features that need no training, on training images only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.stats import kendalltau, rankdata, spearmanr
from sklearn.covariance import ledoit_wolf

from embcache.analysis.pool import MOST, Pool, open_pool
from embcache.data.dataset import ImageDataset
from embcache.data.splits import IntArray
from embcache.paths import PathLike
from embcache.probe.heads.knn import KNN
from embcache.probe.metrics import score, softmax
from embcache.probe.protocol import subset_sizes
from embcache.probe.results import list_results
from embcache.probe.stack import predict_logits

Array = NDArray[np.float64]

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
        `logme` and `h_score` of the training rows (mean over folds; of the whole pool at subset F).
    centroid, knn : float
        The dataset's metric on validation rows (mean over folds) of the nearest class centroid, and of the head
        ``knn``: both learn from a fold's training rows.
    place : float
        Mean of the four ranks among the backbones compared; 1 is best in all of them.
    subset : str
        The subset whose rows were looked at.
    n_train : int
        Training rows of a fold.
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
    subset: str
    n_train: int
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


def rank_backbones(
    ds: ImageDataset,
    backbones: Sequence[str] | None = None,
    *,
    home: PathLike | None = None,
    recipe: str | None = None,
    seed: int = 0,
    subset: str | int = "F",
    say: Callable[[str], Any] = lambda line: None,
) -> list[RankRow]:
    """Score every cached backbone without training, best first; no test row is looked at.

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
    say : callable
        Told what a reader of the scores must know, a line at a time.

    Returns
    -------
    list of RankRow
        By ``place``.

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
    if name == "F" and min(len(pool.plan.train[f, name]) for f in range(pool.plan.n_folds)) > MOST:
        say(f"scored on {MOST:,} training images a fold, drawn balanced from all there are")
        name = str(MOST)
        pool = open_pool(ds, backbones, subset=name, home=home, recipe=recipe, seed=seed)
    for note in pool.plan.notes:
        say(note)
    scores = {backbone: _scores(pool, backbone, name) for backbone in pool.stores}
    ranks = [rankdata([-row[key] for row in scores.values()]) for key in SCORES]
    places = np.mean(ranks, axis=0)
    saved = _saved_probes(pool, home, seed)
    rows = [
        RankRow(
            backbone=backbone,
            **row,
            place=float(place),
            subset=name,
            n_train=round(np.mean([len(pool.plan.train[f, name]) for f in range(pool.plan.n_folds)])),
            probes={subset: mean for subset, (mean, _) in saved[backbone].items()},
            runs={subset: run for subset, (_, run) in saved[backbone].items()},
        )
        for (backbone, row), place in zip(scores.items(), places, strict=True)
    ]
    return sorted(rows, key=lambda row: row.place)


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


def logme(x: NDArray[np.floating], y: IntArray) -> float:
    """Logarithm of maximum evidence (You et al. 2021): how well features explain labels by Bayesian linear regression.

    For each class, 0/1 targets are regressed on the features with a Gaussian prior of precision α and noise of
    precision β; the log evidence per image, at the α and β that maximise it, is averaged over classes. The authors
    iterate a fixed point; here β is solved for and λ = α/β searched, which finds the same maximum also where there are
    fewer images than features and the iteration breaks down.

    Parameters
    ----------
    x : float array of shape (n, D)
        Raw features.
    y : int array of shape (n,)
        Labels of two classes at least.
    """
    X = np.asarray(x, dtype=np.float64)
    n = len(X)
    targets = (np.asarray(y)[:, None] == np.unique(y)).astype(np.float64)  # (n, classes)
    s2, projected = _spectrum(X, targets)
    values = []
    for c in range(targets.shape[1]):
        rest = max(float(targets[:, c].sum() - (projected[:, c] ** 2).sum()), 0.0)  # outside the features' span
        values.append(_max_evidence(s2, projected[:, c] ** 2, rest, n))
    return float(np.mean(values))


def h_score(x: NDArray[np.floating], y: IntArray) -> float:
    """Regularised H-score (Ibrahim et al. 2021): between-class variance in units of the features' covariance.

    ``tr(Σ_α⁻¹ (1 − α) Σ_z)``, with Σ_α the Ledoit-Wolf estimate of the covariance, α its shrinkage, and Σ_z the
    covariance of the features replaced by their class means (both divided by n). Between 0 and the number of classes
    less one.

    Parameters
    ----------
    x : float array of shape (n, D)
        Raw features.
    y : int array of shape (n,)
        Labels.
    """
    X = np.asarray(x, dtype=np.float64)
    X = X - X.mean(axis=0)
    if not X.any():
        return 0.0
    covariance, shrinkage = ledoit_wolf(X, assume_centered=True)
    classes, counts = np.unique(y, return_counts=True)
    means = np.stack([X[np.asarray(y) == c].mean(axis=0) for c in classes])  # (classes, D)
    # A feature that never varies leaves a covariance without inverse only where nothing was shrunk.
    inverse = np.linalg.lstsq(covariance, means.T, rcond=None)[0] if shrinkage == 0 else None
    solved = np.linalg.solve(covariance, means.T) if inverse is None else inverse  # (D, classes)
    return float((1 - shrinkage) * (counts / len(X) * np.einsum("cd,dc->c", means, solved)).sum())


def centroid_logits(x: NDArray[np.floating], y: IntArray, held: NDArray[np.floating], n_classes: int) -> Array:
    """Nearest class centroid on features standardised by the training rows, as logits.

    Parameters
    ----------
    x, held : float array of shape (n, D), (m, D)
        Training rows, and rows to be told apart.
    y : int array of shape (n,)
        Training labels; every class occurs.
    n_classes : int
        C.

    Returns
    -------
    float64 array of shape (m, C)
        −½ of the mean squared distance per feature: the arg max is the nearest centroid.
    """
    mean, scale = np.mean(x, axis=0, dtype=np.float64), np.std(x, axis=0, dtype=np.float64)
    scale = np.where(scale > 0, scale, 1.0)
    z, h = (x - mean) / scale, (held - mean) / scale
    centroids = np.stack([z[y == c].mean(axis=0) for c in range(n_classes)])  # (C, D)
    squared = (h**2).sum(1)[:, None] - 2 * h @ centroids.T + (centroids**2).sum(1)
    return np.asarray(-0.5 * squared / x.shape[1])


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


def _spectrum(x: Array, targets: Array) -> tuple[Array, Array]:
    """Squared singular values (r,) of X above rounding, and the targets along its left singular vectors, (r, c)."""
    if len(x) <= x.shape[1]:
        values, left = np.linalg.eigh(x @ x.T)
        kept = values > values[-1] * len(x) * np.finfo(np.float64).eps
        return values[kept], left[:, kept].T @ targets
    values, right = np.linalg.eigh(x.T @ x)
    kept = values > values[-1] * x.shape[1] * np.finfo(np.float64).eps
    return values[kept], (right[:, kept].T @ (x.T @ targets)) / np.sqrt(values[kept])[:, None]


def _max_evidence(s2: Array, t2: Array, rest: float, n: int) -> float:
    """Log evidence per image at its maximum over α and β.

    With λ = α/β the targets are N(0, (I + XXᵀ/λ)/β), so the best 1/β is ``q(λ)/n``, q = rest + Σ t² λ/(λ + s²).
    """
    if not len(s2):
        s2, t2 = np.ones(1), np.zeros(1)  # features that are all zero explain nothing

    def loss(log_lambda: float) -> float:
        shrunk = s2 / np.exp(log_lambda)
        q = max(rest + float((t2 / (1 + shrunk)).sum()), np.finfo(np.float64).tiny)
        return float(np.log(q / n) + np.log1p(shrunk).sum() / n)

    # The loss can have more than one minimum: a grid finds the neighbourhood of the lowest, then it is refined.
    grid = np.log(s2.max()) + np.linspace(-30.0, 30.0, 121)
    best = int(np.argmin([loss(point) for point in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    least = min(loss(grid[best]), float(minimize_scalar(loss, bounds=(low, high), method="bounded").fun))
    return float(-0.5 * (np.log(2 * np.pi) + 1 + least))
