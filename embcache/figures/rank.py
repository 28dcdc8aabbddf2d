"""What cached features tell without training, on training images only: scores, ranks and similarity of backbones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from math import nan
from typing import Any

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.stats import kendalltau, rankdata, spearmanr
from sklearn.covariance import ledoit_wolf

from embcache.cores import threads_for
from embcache.data.dataset import ImageDataset
from embcache.data.groups import IntArray
from embcache.errors import ProtocolError, UsageError
from embcache.figures.shown import MOST, Pool, open_pool
from embcache.paths import PathLike
from embcache.probe.heads.solved import KNN
from embcache.probe.inputs import plan_for
from embcache.probe.layers import standard_directions, standardized
from embcache.probe.metrics import find_metric, score
from embcache.probe.protocol import Splits
from embcache.probe.stack import predict_logits
from embcache.runs.folders import Result, list_results
from embcache.sealed import Plain
from embcache.store.feature_store import extract_command
from embcache.targets import declared

Array = NDArray[np.float64]

SCORES: Mapping[str, str] = {"logme": "LogME", "h_score": "H-score", "centroid": "nearest centroid", "knn": "k-NN"}
"""The scores of a backbone, higher is better, as tables name them."""

ORDER = ("logme", "centroid", "knn")
"""The scores that rows are ordered by. The H-score is measured on the rows that it is fitted to: it is almost as
high with permuted labels (docs/heads.md)."""

NEIGHBORS = 10
"""Nearest neighbors of an image that `similarity` compares."""

_FOLDS = 5
_BLOCK = 1024  # images whose neighbors are looked for at a time
# What a request has where it says nothing else; probes that differ in these are of different protocols.
_DEFAULTS = {"val": "full", "test": "local", "seed": 0, "folds": 5, "exclude_test_overlap": False}


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
class Ranking(Plain):
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


def rank(
    ds: ImageDataset,
    backbones: Sequence[str] = (),
    *,
    home: PathLike | None = None,
    recipe: str | None = None,
    seed: int = 0,
    subset: str | int = "F",
) -> Ranking:
    """Score cached backbones, all by default, without training, and rank them; no test row is looked at.

    H-score and nearest centroid are of classes; LogME of a number is its evidence, k-NN predicts each kind of target.

    Folds are five; fewer, with a note, where a class has fewer groups; where it has one, all training images are scored
    by LogME alone. Subset F with more than 5,000 training images per fold takes that many.

    Parameters
    ----------
    ds : ImageDataset
        Labels, groups and splits; its files need not be there.
    backbones : sequence of str
        Default: all that are cached.
    home : path, optional
        Folder of stores and runs. Default: ``$EMBCACHE_HOME`` or ``~/.cache/embcache``.
    recipe : str, optional
        First digits of the fingerprint, where several recipes are cached.
    seed : int
        Seed of folds and subsets.
    subset : str or int
        As in `probe_features`.

    Returns
    -------
    Ranking
        One row per backbone, best first.

    Raises
    ------
    StoreNotFoundError
        No features are cached.
    ProtocolError
        The dataset has too few images for the subset.
    """
    pool = open_pool(ds, backbones, home, recipe, seed)
    plan, more = _plan(pool, subset, seed)
    (name,) = plan.subsets
    scores = {backbone: _scores(pool, plan, backbone, name) for backbone in pool.stores}
    if pool.ds.kind in ("findings", "number"):
        more.append(f"H-score and nearest centroid are of classes; the target is {pool.ds.kind}")
    known = [key for key in ORDER if not any(np.isnan(row[key]) for row in scores.values())]
    places = np.mean([rankdata([-row[key] for row in scores.values()]) for key in known], axis=0)
    saved, found = _saved_probes(pool, plan, home)
    rows = [
        RankRow(
            backbone, **row, place=float(place), runs={subset: r.id for subset, r in saved[backbone].items()},
            probes={subset: float(r.mean or 0.0) for subset, r in saved[backbone].items()},
        )
        for (backbone, row), place in zip(scores.items(), places, strict=True)
    ]  # fmt: skip
    rows.sort(key=lambda row: row.place)
    n_train, n_val = (float(np.mean([len(ids) for ids in part.values()])) for part in (plan.train, plan.val))
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
        for key in (*(key for key in SCORES if not any(np.isnan(vars(row)[key]) for row in both)), "place"):
            values = [-row.place if key == "place" else vars(row)[key] for row in both]
            if len(set(values)) < 2 or len(set(reached)) < 2:
                tau = rho = float("nan")
            else:
                tau, rho = kendalltau(values, reached).statistic, spearmanr(values, reached).statistic
            found.append(Correlation(key, subset, len(both), float(tau), float(rho)))
    return found


def _plan(pool: Pool, subset: str | int, seed: int) -> tuple[Splits, list[str]]:
    """Five folds, fewer where a class has fewer groups, none to validate where it has one; and notes.

    Of findings, groups with and groups without each count; of a number, all.
    """
    sides, names, task = pool.sides, pool.ds.class_names, pool.ds.task
    labels, groups = sides.labels[sides.pool], sides.groups[sides.pool]
    if task.kind == "number":
        counts = [len(set(groups))]
    elif task.kind == "findings":
        counts = [min(len(set(groups[of == value])) for value in (0, 1)) for of in labels.T]
    else:
        counts = [len(set(groups[labels == c])) for c in range(len(names))]
    folds = min(_FOLDS, *counts)
    if folds < 2 <= sum(count > 0 for count in counts) and str(subset).upper() == "F":
        rows = pool.drawn(seed)
        few = ", ".join(name for name, count in zip(names, counts, strict=True) if count < 2)
        note = f"LogME alone: nearest centroid and k-NN need two groups outside the test set; there are fewer of {few}"
        return Splits(
            dataset=pool.ds.name, class_names=names, ids=sides.ids, labels=sides.labels, groups=sides.groups,
            test=sides.test, test_set=sides.test_set, train={(0, "F"): rows}, val={(0, "F"): rows[:0]}, subsets=("F",),
            n_folds=1, seed=seed, val_mode="full", notes=sides.notes, target=task,
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
    metric, task, n_classes = pool.ds.metric, pool.ds.task, pool.ds.task.outputs
    of_classes = task.kind not in ("findings", "number")
    features, place = pool.features(backbone, pool.rows), np.full(len(plan.ids), -1, dtype=np.int64)
    place[pool.rows] = np.arange(len(pool.rows))
    x, labels = features.numpy(), plan.labels
    centroid, near = [], []
    parts = [plan.train[fold, subset] for fold in range(plan.n_folds)]
    for fold, train in enumerate(parts):
        val = plan.val[fold, subset]
        if not len(val):
            centroid, near = [np.nan], [np.nan]
            break
        if of_classes:
            nearest = centroid_logits(x[place[train]], labels[train], x[place[val]], n_classes)
            centroid.append(score(metric, labels[val], nearest))
        own = {backbone: features[place[train]]}
        solved = KNN().solve(own, torch.from_numpy(labels[train]), None, None, n_classes, metric)
        votes = predict_logits(KNN(), solved.params, {backbone: features}, torch.from_numpy(place[val]))
        near.append(score(metric, labels[val], votes, of=task))
    # At F the folds' training rows together are the pool; smaller subsets differ from fold to fold.
    parts = [np.unique(np.concatenate(parts))] if subset == "F" else parts
    fitted = [
        (logme(x[place[rows]], _unitless(labels[rows])), h_score(x[place[rows]], labels[rows]) if of_classes else nan)
        for rows in parts
    ]
    values = (*np.mean(fitted, axis=0), np.mean(centroid or [nan]), np.mean(near))
    return dict(zip(SCORES, map(float, values), strict=True))


def _unitless(y: NDArray[Any]) -> NDArray[Any]:
    """Numbers standardized, so that their evidence does not depend on their unit; all else as it is."""
    return (y - y.mean()) / (y.std() or 1.0) if y.dtype.kind == "f" else y


def _saved_probes(pool: Pool, plan: Splits, home: PathLike | None) -> tuple[dict[str, dict[str, Result]], list[str]]:
    """Saved linear probes of each backbone by subset, on the very features ranked, and notes.

    All are of one protocol: that of the plan, where there is a probe of it, else the most frequent one; at each subset
    also of the same splits.
    """

    def fits(result: Result) -> bool:
        one, request = result.backbones[0], result.request
        return (
            (result.kind, result.head, len(result.backbones)) == ("probe", "linear", 1)
            and result.mean is not None
            and (result.target, request.get("classes", {})) == (pool.ds.target, pool.ds.renamed)
            and (result.class_names, declared(result.task)) == (tuple(pool.ds.class_names), declared(pool.ds.task))
            and one in pool.stores
            and dict(request["recipes"]).get(one) == pool.stores[one].recipe.fingerprint
        )

    metric = find_metric(pool.ds.metric, pool.ds.task).key
    fitting: dict[tuple[Any, ...], list[Result]] = {}  # by protocol: the values of `_DEFAULTS`
    candidates = [result for result in list_results(home, pool.ds.name) if fits(result)]
    for result in candidates:
        plain = not {"lr", "views", "repeats"} & set(result.request)
        complete = result.metric == metric and all(fold.score is not None for fold in result.folds)
        if plain and complete and result.request.get("head") == {"name": "linear"}:
            protocol = tuple(result.request.get(key, value) for key, value in _DEFAULTS.items())
            fitting.setdefault(protocol, []).append(result)
    found: dict[str, dict[str, Result]] = {backbone: {} for backbone in pool.stores}
    if not fitting:
        return found, [f"{len(candidates)} linear probes of other protocols left out"] if candidates else []
    default = (plan.val_mode, plan.test_set, plan.seed, plan.n_folds, False)
    chosen = default if default in fitting else max(fitting, key=lambda key: (len(fitting[key]), repr(key)))
    ordered = sorted(fitting[chosen], key=lambda r: (r.n_train, r.id))
    drawn = Counter((r.subset, str(r.request.get("splits"))) for r in ordered)
    splits = {subset: digest for (subset, digest), _ in sorted(drawn.items(), key=lambda item: (item[1], item[0][1]))}
    for result in ordered:
        if result.request.get("splits") == splits[result.subset]:
            found[result.backbones[0]].setdefault(result.subset, result)
    val, test, seed, folds, excluded = chosen
    note = f"linear probes are all of one protocol: {folds} folds, seed {seed}, --val {val}, {test} test set"
    note += ", without the overlap with the test set" if excluded else ""
    others = len(candidates) - sum(map(len, found.values()))
    return found, [note + (f"; {others} of other protocols or splits left out" if others else "")]


# Scores.


def logme(x: NDArray[np.floating], y: NDArray[Any]) -> float:
    """Logarithm of maximum evidence (You et al. 2021): how well features explain labels by Bayesian linear regression.

    A number is regressed itself; for each class, and for each finding and its absence where it is known, 0/1 targets.
    The prior is Gaussian with precision α, the noise has precision β; the log evidence per image, at the α and β that
    maximize it, is averaged over classes, and over findings that occur. The authors iterate a fixed point; here
    β is solved for and λ = α/β searched, which finds the same maximum also where there are fewer images than features
    and the iteration breaks down.

    Shapes: x (n, D); y (n,) classes or numbers in floats, or (n, L) findings, −1 unknown.
    """
    X, y = np.asarray(x, dtype=np.float64), np.asarray(y)
    if y.ndim == 1:
        return _evidence(X, y[:, None] if y.dtype.kind == "f" else (y[:, None] == np.unique(y)).astype(np.float64))
    y = y[:, [{0, 1} <= set(of) for of in y.T.tolist()]]
    patterns, of = np.unique(y >= 0, axis=1, return_inverse=True)  # findings that are known alike share a spectrum
    values = []
    for number, rows in enumerate(patterns.T):
        present = y[rows][:, of.reshape(-1) == number]
        values += [_evidence(X[rows], np.hstack([present == v for v in (0, 1)]).astype(np.float64))] * present.shape[1]
    return float(np.mean(values)) if values else nan


def _evidence(X: Array, targets: Array) -> float:
    """Mean of the evidence of targets (n, c)."""
    with threads_for(X.size):
        s2, projected = _spectrum(X, targets)
    values = []
    for target, along in zip(targets.T, projected.T, strict=True):
        rest = max(float((target**2).sum() - (along**2).sum()), 0.0)  # outside the features' span
        values.append(_max_evidence(s2, along**2, rest, len(X)))
    return float(np.mean(values))


def h_score(x: NDArray[np.floating], y: IntArray) -> float:
    """Regularized H-score (Ibrahim et al. 2021): between-class variance in units of the features' covariance.

    ``tr(Σ_α⁻¹ (1 − α) Σ_z)``, with Σ_α the Ledoit-Wolf estimate of the covariance, α its shrinkage, and Σ_z the
    covariance of the features replaced by their class means (both divided by n). Between 0 and the number of classes
    less one.

    Shapes: x (n, D); y (n,).
    """
    X, y = np.asarray(x, dtype=np.float64), np.asarray(y)
    X = X - X.mean(axis=0)
    if not X.any():
        return 0.0
    with threads_for(X.size):
        covariance, shrinkage = ledoit_wolf(X, assume_centered=True)
        classes, counts = np.unique(y, return_counts=True)
        means = np.stack([X[y == c].mean(axis=0) for c in classes])  # (classes, D)
        if shrinkage > 0:
            solved = scipy.linalg.cho_solve(scipy.linalg.cho_factor(covariance), means.T)  # (D, classes)
        else:  # nothing was shrunk, so that there may be no inverse
            solved = np.linalg.pinv(covariance, hermitian=True) @ means.T
    return float((1 - shrinkage) * (counts / len(X) * np.einsum("cd,dc->c", means, solved)).sum())


def centroid_logits(x: NDArray[np.floating], y: IntArray, held: NDArray[np.floating], n_classes: int) -> Array:
    """Nearest class centroid on features standardized by the training rows, as logits.

    Shapes: x, held (n, D); y (n,); returns (m, C).
    """
    z, h = (standardized(rows, by=x).astype(np.float64) for rows in (x, held))
    centroids = np.stack([z[y == c].mean(axis=0) for c in range(n_classes)])  # (C, D)
    squared = (h**2).sum(1)[:, None] - 2 * h @ centroids.T + (centroids**2).sum(1)
    return np.asarray(-0.5 * squared / x.shape[1])


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

    # The loss can have more than one minimum: a grid finds the neighborhood of the lowest, then it is refined.
    grid = np.log(s2.max()) + np.linspace(-30.0, 30.0, 121)
    best = int(np.argmin([loss(point) for point in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    least = min(loss(grid[best]), float(minimize_scalar(loss, bounds=(low, high), method="bounded").fun))
    return float(-0.5 * (np.log(2 * np.pi) + 1 + least))


# Similarity.


@dataclass(frozen=True, eq=False)
class Similarity:
    """Similarity of every pair of backbones; the matrices are symmetric with ones on the diagonal."""

    dataset: str
    backbones: tuple[str, ...]
    n: int  # images that were compared
    cka: Array  # (B, B)
    cka_biased: Array  # (B, B)
    neighbors: Array  # (B, B); mean share of an image's ``k`` nearest images that are the same in both
    k: int
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, every field by its name."""
        matrices = {"cka": self.cka, "cka_biased": self.cka_biased, "neighbors": self.neighbors}
        return {**vars(self), **{name: matrix.tolist() for name, matrix in matrices.items()}}


def similarity(
    ds: ImageDataset,
    backbones: Sequence[str] = (),
    *,
    home: PathLike | None = None,
    recipe: str | None = None,
    seed: int = 0,
) -> Similarity:
    """Compare the embeddings of two or more cached backbones, all by default, on the same training images.

    Parameters
    ----------
    ds : ImageDataset
        Labels, groups and splits; its files need not be there.
    backbones : sequence of str
        B names; default: all that are cached.
    home : path, optional
        Folder of stores and runs. Default: ``$EMBCACHE_HOME`` or ``~/.cache/embcache``.
    recipe : str, optional
        First digits of the fingerprint, where several recipes are cached.
    seed : int
        Seed of the images drawn, where there are more than 5,000.

    Returns
    -------
    Similarity
        Its matrices are float64 (B, B).

    Raises
    ------
    UsageError
        There are fewer than two backbones.
    StoreNotFoundError
        No features are cached.
    ProtocolError
        There are fewer than four training images.
    """
    pool = open_pool(ds, backbones, home, recipe, seed)
    names, rows = list(pool.stores), pool.drawn(seed)
    if len(names) < 2:
        raise UsageError("similarity compares backbones", code="too-few-backbones", expected="at least two",
                         found=", ".join(names), fix=extract_command("NAME", ds, home))  # fmt: skip
    if len(rows) < 4:
        raise ProtocolError("too few images to compare embeddings on", code="too-few-images", expected="at least 4",
                            found=str(len(rows)))  # fmt: skip
    k = min(NEIGHBORS, len(rows) - 1)
    features = [pool.features(name, rows).numpy() for name in names]
    wide, near = [x.astype(np.float64) for x in features], [nearest_neighbors(x, k) for x in features]
    centered = [x - x.mean(axis=0) for x in wide]
    unbiased, biased, shared = np.zeros((3, len(names), len(names)))
    for i, j in combinations_with_replacement(range(len(names)), 2):
        biased[i, j], unbiased[i, j] = biased[j, i], unbiased[j, i] = hsic(centered[i], centered[j])
        shared[i, j] = shared[j, i] = shared_neighbors(near[i], near[j])
    notes = list(pool.sides.notes)
    if len(rows) < len(pool.rows):
        notes.append(f"{len(rows):,} of {len(pool.rows):,} training images, drawn at random")
    return Similarity(ds.name, tuple(names), len(rows), cka(unbiased), cka(biased), shared, k, tuple(notes))


def nearest_neighbors(x: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """Rows of the ``k`` nearest other images of each, int64 (n, k): by cosine on standardized features, as ``knn``."""
    z = standard_directions(x)
    near = np.empty((len(z), k), dtype=np.int64)
    for start in range(0, len(z), _BLOCK):
        cosines = z[start : start + _BLOCK] @ z.T
        own = np.arange(len(cosines))
        cosines[own, start + own] = -np.inf
        near[start : start + _BLOCK] = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
    return near


def shared_neighbors(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    """Mean share of neighbors (n, k) that two embeddings have in common (Huh et al. 2024, mutual k-NN)."""
    both = np.sort(np.concatenate([a, b], axis=1), axis=1)  # a row that is in both stands twice
    return float((both[:, 1:] == both[:, :-1]).sum() / a.size)


def hsic(x: Array, y: Array) -> tuple[float, float]:
    """HSIC of centered X and Y with linear kernels, biased and unbiased, each but for a factor that only n sets.

    Biased, `cka` of it is ``‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖)`` (Kornblith et al. 2019, eq. 6). The unbiased estimator (Song et
    al. 2012, eq. 5) leaves out each image's similarity with itself: without that, embeddings with more dimensions than
    images are alike whatever they are.

    For K = XXᵀ and L = YYᵀ with their diagonals set to 0, a_i = ‖x_i‖² and b_i = ‖y_i‖²: tr(KL) = ‖XᵀY‖² − Σ a_i b_i,
    and K1 = −a because rows sum to 0 with the diagonal.
    """
    n = len(x)
    a, b = (x**2).sum(1), (y**2).sum(1)
    few = n < min(x.shape[1], y.shape[1])  # ‖XᵀY‖² by the smaller of the two ways to it
    biased = float(((x @ x.T) * (y @ y.T)).sum() if few else ((x.T @ y) ** 2).sum())
    unbiased = biased - a @ b + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a @ b)
    return biased, float(unbiased)


def cka(matrix: Array) -> Array:
    """Centered kernel alignment: HSIC of each pair by the roots of its diagonal; NaN where that is not positive."""
    own = np.where(np.diag(matrix) > 0, np.diag(matrix), np.nan)
    return np.asarray(matrix / np.sqrt(np.outer(own, own)))
