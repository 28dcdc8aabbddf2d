"""Audit of a dataset by cached features: near-duplicates, likely label errors, outliers, and the effect without them.

Nothing here that decides about a training image looks at the label of a test image: features are standardized, models
fitted and thresholds set on training images alone. Test images are judged by what was learned from training images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embcache.config import AuditConfig
from embcache.data.dataset import ImageDataset
from embcache.data.groups import IntArray, stratified_group_folds
from embcache.errors import ProtocolError, first_few
from embcache.paths import PathLike
from embcache.probe.heads.solved import LogReg
from embcache.probe.inputs import load_features, open_stores
from embcache.probe.layers import standard_directions
from embcache.probe.metrics import log_probabilities, score, softmax
from embcache.probe.predictions import fit_temperature
from embcache.probe.protocol import divide

CREDIBLE = 0.10
"""Share of doubted labels (mean over classes) above which the model counts as too weak, not the labels as wrong.

The worst of the ten benchmarks whose labels Northcutt, Athalye and Mueller (2021) had checked has 10 % errors.
"""

NEIGHBORS = 10
FAR = 5.0
"""Robust deviations below the usual closeness of neighbors from which an image counts as an outlier."""

_BLOCK = 512  # rows compared with all others at a time
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Pair:
    """Two images that are nearly the same. ``kind``: across splits, across groups, or within a group."""

    one: str
    other: str
    similarity: float
    kind: str
    same_label: bool


@dataclass(frozen=True)
class LabelError:
    """A label that models which did not see the image confidently disagree with, and their most probable class."""

    id: str
    label: int
    proposed: int
    p_label: float
    p_proposed: float
    split: str


@dataclass(frozen=True)
class Judge:
    """How good the models that judge labels are."""

    labels: int
    test_labels: int
    found: int
    test_found: int
    share: float  # of the training labels of a class, how many are doubted: mean over classes
    balanced_accuracy: float  # of the most probable class against the training labels, out of fold
    too_weak: bool  # ``share`` is above `CREDIBLE`, or most labels of a class are doubted


@dataclass(frozen=True)
class Outlier:
    """An image far from all training images. ``deviations``: of its closeness to them, robust, below their median."""

    id: str
    deviations: float
    split: str


@dataclass(frozen=True)
class Effect:
    """Test metric of a logistic regression on F, of all test images, trained with and without the excluded images."""

    metric: str
    before: tuple[float, float]
    after: tuple[float, float]


@dataclass(frozen=True)
class Audit:
    """What one backbone's features show."""

    dataset: str
    backbone: str
    images: int
    test_images: int
    pairs: tuple[Pair, ...]  # most similar first
    judge: Judge | None  # none where fewer than two classes can be judged; a note says why
    label_errors: tuple[LabelError, ...]  # most confident first
    outliers: tuple[Outlier, ...]  # furthest first
    exclude: tuple[tuple[str, str], ...]  # training images to leave out, each with the reason
    effect: Effect | None  # none where nothing is excluded, or where it cannot be measured
    no_effect: str  # why it cannot be measured
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, every field by its name."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class _Images:
    """Images that are audited: the first ``n`` train, the others test."""

    ids: NDArray[np.object_]
    labels: IntArray
    groups: NDArray[np.object_]
    split: NDArray[np.object_]
    x: torch.Tensor  # float32 (N, D), raw
    n: int
    class_names: tuple[str, ...]

    def folds(self, folds: int, seed: int) -> list[IntArray]:
        """Training images of each fold, classes spread evenly and no group divided; any class may be rare."""
        fold_of = stratified_group_folds(self.labels[: self.n], self.groups[: self.n].tolist(), folds, seed)
        return [np.flatnonzero(fold_of == k) for k in range(folds)]

    def of_classes(self, classes: Sequence[int]) -> _Images:
        """The images of some classes, these numbered anew."""
        number = np.full(len(self.class_names), -1, dtype=np.int64)
        number[list(classes)] = np.arange(len(classes))
        rows = np.flatnonzero(number[self.labels] >= 0)
        return _Images(
            self.ids[rows], number[self.labels[rows]], self.groups[rows], self.split[rows], self.x[rows],
            int((rows < self.n).sum()), tuple(self.class_names[c] for c in classes),
        )  # fmt: skip


def audit_dataset(
    ds: ImageDataset, backbone: str, config: AuditConfig | None = None, *, home: PathLike | None = None, **options: Any
) -> Audit:
    """Look for near-duplicates, likely label errors and outliers in the cached features of one backbone.

    Label errors are found by confident learning (Northcutt, Jiang and Chuang, 2021): logistic regressions over grouped
    folds of the training images give each of these calibrated probabilities of models that did not see it (or its
    group). A class is confident of an image where its probability reaches the mean that training images of this label
    have; a label is doubted where such a class is another one (of several, the most probable class counts) and the
    label is not itself the most probable class, as ``cleanlab.filter.find_label_issues`` has it with
    ``filter_by="confident_learning"``. Test labels are judged by the mean of the same models.

    Parameters
    ----------
    ds : ImageDataset
        Labels, groups and splits; its files need not be there.
    backbone : str
        A backbone with cached features.
    config, **options
        A `embcache.config.AuditConfig`, and fields that take the place of its own.
    home : path, optional
        Folder of stores and runs. Default: ``$EMBCACHE_HOME`` or ``~/.cache/embcache``.

    Returns
    -------
    Audit
        Pairs, label errors and outliers by image ID, what to leave out, and the effect of that.

    Raises
    ------
    UsageError, StoreError
        An option is malformed; features are missing.
    ProtocolError
        There are fewer than two training images, or features that are not finite.
    """
    config = AuditConfig.make(config, options)
    store = open_stores(ds, [[backbone]], home, config.recipe)[backbone]
    sides = divide(ds, seed=config.seed, digests=store.digests, unreadable=store.quarantined)
    train, test = np.union1d(sides.pool, sides.own_val), sides.test[sides.labels[sides.test] >= 0]
    rows = np.concatenate([train, test])
    split = ds.table["split"].to_numpy(dtype=object)[rows]
    split[len(train) :] = "test"  # of a local test set too
    images = _Images(
        sides.ids[rows], sides.labels[rows], sides.groups[rows], split,
        load_features(store, ds, sides.ids[rows]), len(train), tuple(ds.class_names),
    )  # fmt: skip
    if images.n < 2:
        raise ProtocolError(
            f"{ds.name} has too few training images to audit", code="too-few-images",
            expected="at least 2, labeled and readable", found=str(images.n), where=ds.root,
        )  # fmt: skip
    if bad := images.ids[~torch.isfinite(images.x).all(dim=1).numpy()].tolist():
        raise ProtocolError(
            f"{len(bad):,} of {len(images.ids):,} images have features that are not finite", code="not-finite",
            found=first_few([repr(id_) for id_ in bad]), fix="remove the store and extract again, in fp32: embcache ls",
        )  # fmt: skip
    pairs, closeness = _compare(images, config.similarity)
    judge, errors, notes = _judge(images, config)
    usual = closeness[: images.n]
    # A standard deviation, were they normal.
    spread = 1.4826 * np.median(np.abs(usual - np.median(usual)))
    deviations = (np.median(usual) - closeness) / max(float(spread), 1e-12)
    far = [i for i in np.argsort(-deviations, kind="stable") if deviations[i] > FAR]
    outliers = tuple(Outlier(str(images.ids[i]), float(deviations[i]), str(images.split[i])) for i in far)
    exclude = _exclude(images, pairs, () if judge is None or judge.too_weak else errors, outliers)
    effect, reason = None, ""
    if exclude:
        effect, reason = _effect(images, {id_ for id_, _ in exclude}, ds.metric, config)
    own = [note.removesuffix("; --exclude-test-overlap leaves them out") for note in sides.notes]  # a flag of others
    return Audit(
        ds.name, backbone, len(train), len(test), pairs, judge, errors, outliers, exclude, effect, reason,
        (*own, *notes),
    )  # fmt: skip


def _compare(images: _Images, threshold: float) -> tuple[tuple[Pair, ...], Float]:
    """Near-duplicates among all images, and each image's mean similarity to its nearest other training images, (N,)."""
    z = standard_directions(images.x.numpy(), by=images.x[: images.n].numpy())
    total, n, k = len(z), images.n, min(NEIGHBORS, images.n - 1)
    closeness, pairs = np.empty(total), []
    for start in range(0, total, _BLOCK):
        similar = z[start : start + _BLOCK] @ z.T  # (block, N)
        own = np.arange(len(similar))
        similar[own, start + own] = -np.inf
        closeness[start : start + len(similar)] = np.partition(similar[:, :n], n - k, axis=1)[:, n - k :].mean(axis=1)
        for row, other in np.argwhere(similar >= threshold).tolist():
            one = start + row
            if one < other:
                same_group, same_label = (bool(a[one] == a[other]) for a in (images.groups, images.labels))
                kind = "across splits" if one < n <= other else "within a group" if same_group else "across groups"
                cosine = min(float(similar[row, other]), 1.0)
                pairs.append(Pair(str(images.ids[one]), str(images.ids[other]), cosine, kind, same_label))
    return tuple(sorted(pairs, key=lambda pair: (-pair.similarity, pair.one, pair.other))), closeness


def _judge(images: _Images, config: AuditConfig) -> tuple[Judge | None, tuple[LabelError, ...], tuple[str, ...]]:
    """Likely label errors of the classes that have enough groups, how good the models are, and notes."""
    names, here = images.class_names, images.labels[: images.n]
    groups = [len(set(images.groups[: images.n][here == c].tolist())) for c in range(len(names))]
    judged = [c for c, count in enumerate(groups) if count >= config.folds]
    rare = ", ".join(f"{name} ({groups[c]})" for c, name in enumerate(names) if c not in judged)
    note = f"labels are not judged of classes with fewer than {config.folds} groups in training: {rare}"
    notes = (note,) if rare else ()
    if len(judged) < 2:
        return None, (), notes
    some = images.of_classes(judged) if rare else images
    p, labels, n = _calibrated(some, config.folds, config.seed), some.labels, some.n
    rows, best, doubted = np.arange(len(p)), p.argmax(1), doubted_labels(labels, p, n)
    of_class = [rows[:n][labels[:n] == c] for c in range(len(judged))]
    shares = np.array([doubted[own].mean() for own in of_class])
    judge = Judge(
        labels=n,
        test_labels=len(p) - n,
        found=int(doubted[:n].sum()),
        test_found=int(doubted[n:].sum()),
        share=float(shares.mean()),
        balanced_accuracy=float(np.mean([(best[own] == labels[own]).mean() for own in of_class])),
        too_weak=bool(shares.mean() > CREDIBLE or shares.max() > 0.5),
    )
    order = np.argsort(p[rows, labels] - p[rows, best], kind="stable")  # most confident first
    # Capped on each side of its own: no test label decides which training labels are listed.
    listed = {i for side in (rows < n, rows >= n) for i in order[(doubted & side)[order]][: config.most].tolist()}
    errors = [
        LabelError(
            str(some.ids[i]), judged[labels[i]], judged[best[i]], float(p[i, labels[i]]), float(p[i, best[i]]),
            str(some.split[i]),
        )
        for i in order.tolist() if i in listed
    ]  # fmt: skip
    return judge, tuple(errors), notes


def doubted_labels(labels: IntArray, p: Float, n: int) -> NDArray[np.bool_]:
    """Labels that confident learning doubts; see `audit_dataset`.

    Shapes: labels (N,); p (N, C); returns (N,).
    """
    thresholds = np.array([p[:n][labels[:n] == c, c].mean() for c in range(p.shape[1])])
    confident = p >= thresholds - 1e-6
    several, most_probable = confident.sum(1) > 1, p.argmax(1)
    guess = np.where(several, most_probable, confident.argmax(1))
    return np.asarray(confident.any(1) & (guess != labels) & (most_probable != labels))


def _calibrated(images: _Images, folds: int, seed: int) -> Float:
    """Calibrated probabilities (N, C): of a training image by the model that saw neither it nor its group.

    A test image has the mean of all models, which are of training images.
    """
    y, n, classes = images.labels, images.n, len(images.class_names)
    parts = images.folds(folds, seed)
    found = np.zeros((len(y), classes))
    for held, val in zip(parts, [*parts[1:], parts[0]], strict=True):
        train = np.setdiff1d(np.arange(n), np.concatenate([held, val]))
        others = np.concatenate([val, held, np.arange(n, len(y))])
        # The head weighs classes alike; their shares in training turn its odds into those of the data.
        shares = np.maximum(np.bincount(y[train], minlength=classes), 1) / len(train)
        best = np.inf
        for strength in _STRENGTHS:
            logits = _logits(images, train, others, LogReg(Cs=(strength,)))
            logits = logits / fit_temperature(y[val], logits[: len(val)], shares) + np.log(shares)
            loss = -float(log_probabilities(logits[: len(val)])[np.arange(len(val)), y[val]].mean())
            if loss < best:
                best, p = loss, softmax(logits[len(val) :])
        found[held] = p[: len(held)]
        found[n:] += p[len(held) :] / folds
    return found


def _logits(
    images: _Images, train: IntArray, others: IntArray, head: LogReg, val: IntArray | None = None, metric: str = ""
) -> Float:
    """Logits (len(others), C) of a head trained on some rows, its strength chosen on ``val``."""
    x, y = images.x, torch.from_numpy(images.labels)
    x_val, y_val = (None, None) if val is None else ({"features": x[val]}, y[val])
    solved = head.solve({"features": x[train]}, y[train], x_val, y_val, len(images.class_names), metric)
    logits = head.apply({name: p[None] for name, p in solved.params.items()}, {"features": x[others][None]})
    return np.asarray(logits[0].double().numpy())


def _exclude(
    images: _Images, pairs: Sequence[Pair], errors: Sequence[LabelError], outliers: Sequence[Outlier]
) -> tuple[tuple[str, str], ...]:
    """Training images to leave out, each with its first reason."""
    # An image of a rare class is far from others only because there are few like it.
    common = np.bincount(images.labels[: images.n], minlength=len(images.class_names)) > NEIGHBORS
    usual = set(images.ids[: images.n][common[images.labels[: images.n]]].tolist())
    names = images.class_names
    found = [
        # Of a pair across splits the training image comes first.
        *((p.one, f"near-duplicate of the test image {p.other}") for p in pairs if p.kind == "across splits"),
        *((e.id, f"likely label error ({names[e.proposed]}: p = {e.p_proposed:.3f})")
          for e in errors if e.split != "test"),
        *((o.id, f"outlier ({o.deviations:.1f} deviations)") for o in outliers if o.id in usual),
    ]  # fmt: skip
    first = dict(reversed(found))
    return tuple((id_, first[id_]) for id_ in dict(found))


def _effect(images: _Images, excluded: set[str], metric: str, config: AuditConfig) -> tuple[Effect | None, str]:
    """What leaving training images out does to the test metric, or why it cannot be measured."""
    y, test = images.labels, np.arange(images.n, len(images.labels))
    out = np.isin(images.ids.astype(str), list(excluded))
    parts = [(np.setdiff1d(np.arange(images.n), val), val) for val in images.folds(config.folds, config.seed)]
    if gone := sorted({int(c) for train, _ in parts for c in set(y[train]) - set(y[train[~out[train]]])}):
        return None, f"{', '.join(images.class_names[c] for c in gone)} would be gone"
    if len(np.unique(y[test])) < 2:
        return None, "the labeled test images are not of two classes"
    if any(len(np.unique(y[val[~out[val]]])) < 2 for _, val in parts):
        return None, "a fold would have images of one class only to validate on"
    scores = np.array([
        [
            score(metric, y[test], _logits(images, rows, test, LogReg(Cs=_STRENGTHS), held, metric))
            for rows, held in ((train, val), (train[~out[train]], val[~out[val]]))
        ]
        for train, val in parts
    ])  # fmt: skip
    before, after = ((float(mean), float(sd)) for mean, sd in zip(scores.mean(0), scores.std(0, ddof=1), strict=True))
    return Effect(metric, before, after), ""
