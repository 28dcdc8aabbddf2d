"""Audit of a dataset by cached features: near-duplicates, likely label errors, outliers, and the effect without them.

Of findings, each is judged as two classes; of a number, images whose value is far from what others predict are listed.

Nothing here that decides about a training image looks at the label of a test image: features are standardized, models
fitted and thresholds set on training images alone. Test images are judged by what was learned from training images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from embcache.config import AuditConfig
from embcache.data.dataset import ImageDataset
from embcache.data.groups import IntArray, stratified_group_folds
from embcache.errors import ProtocolError, first_few
from embcache.paths import PathLike
from embcache.probe.heads.ridge import Ridge
from embcache.probe.heads.solved import LogReg
from embcache.probe.inputs import load_features, open_stores
from embcache.probe.layers import standard_directions
from embcache.probe.metrics import alike, log_probabilities, score, softmax
from embcache.probe.predictions import fit_temperature
from embcache.probe.protocol import divide
from embcache.probe.schedule import Schedule
from embcache.probe.stack import ClosedFormHead, Job, predict_logits, train_heads
from embcache.sealed import Plain
from embcache.targets import Target, make_target

CREDIBLE = 0.10
"""Share of doubted labels (mean over classes) above which the model counts as too weak, not the labels as wrong.

The worst of the ten benchmarks whose labels Northcutt, Athalye and Mueller (2021) had checked has 10 % errors.
"""

NEIGHBORS = 10
FAR = 5.0
"""Robust deviations from which an image is an outlier: of its closeness to neighbors, or of the error of its number."""

SAME = 0.1
"""Numbers are the same label where they differ by at most so many standard deviations of the training images."""

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
    finding: str = ""  # that is judged; its classes are 0, absent, and 1, present


@dataclass(frozen=True)
class Residual:
    """A number far from what models that did not see the image predict. ``deviations``: of the error, robust."""

    id: str
    value: float
    predicted: float
    deviations: float
    split: str


@dataclass(frozen=True)
class Judge:
    """How good the models that judge labels are."""

    labels: int
    test_labels: int
    found: int
    test_found: int
    share: float  # of the training labels of a class, how many are doubted: mean over classes (and findings)
    balanced_accuracy: float | None  # of the most probable class against the training labels, out of fold
    too_weak: bool  # ``share`` is above `CREDIBLE`, or most labels of a class are doubted; of findings, of all
    r2: float | None = None  # of a number, out of fold; the models are too weak where it is not above 0
    weak: tuple[str, ...] = ()  # findings of which the models are too weak


@dataclass(frozen=True)
class Outlier:
    """An image far from all training images. ``deviations``: of its closeness to them, robust, below their median."""

    id: str
    deviations: float
    split: str


@dataclass(frozen=True)
class Effect:
    """Test metric of a regression on F, of all test images, trained with and without the excluded images."""

    metric: str
    before: tuple[float, float]
    after: tuple[float, float]


@dataclass(frozen=True)
class Audit(Plain):
    """What one backbone's features show."""

    dataset: str
    backbone: str
    images: int
    test_images: int
    pairs: tuple[Pair, ...]  # most similar first
    judge: Judge | None  # none where fewer than two classes can be judged; a note says why
    label_errors: tuple[LabelError, ...]  # most confident first
    residuals: tuple[Residual, ...]  # of a number, in the place of label errors; furthest first
    outliers: tuple[Outlier, ...]  # furthest first
    exclude: tuple[tuple[str, str], ...]  # training images to leave out, each with the reason
    effect: Effect | None  # none where nothing is excluded, or where it cannot be measured
    no_effect: str  # why it cannot be measured
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Images:
    """Images that are audited: the first ``n`` train, the others test."""

    ids: NDArray[np.object_]
    labels: NDArray[Any]  # values of the target
    groups: NDArray[np.object_]
    split: NDArray[np.object_]
    x: torch.Tensor  # float32 (N, D), raw
    n: int
    class_names: tuple[str, ...]
    target: Target | None = None  # by default classes

    @property
    def task(self) -> Target:
        """What the labels are values of."""
        return self.target or make_target("classes", self.class_names)

    def folds(self, folds: int, seed: int) -> list[IntArray]:
        """Training images of each fold, strata spread evenly and no group divided; any class may be rare."""
        strata = self.task.strata(self.labels[: self.n], np.arange(self.n))
        fold_of = stratified_group_folds(strata, self.groups[: self.n].tolist(), folds, seed)
        return [np.flatnonzero(fold_of == k) for k in range(folds)]

    def finding(self, c: int) -> _Images:
        """The images of which a finding is known, as two classes."""
        rows, name = np.flatnonzero(self.labels[:, c] >= 0), self.class_names[c]
        return _Images(
            self.ids[rows], self.labels[rows, c], self.groups[rows], self.split[rows], self.x[rows],
            int((rows < self.n).sum()), (f"no {name}", name),
        )  # fmt: skip

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
    ``filter_by="confident_learning"``. Test labels are judged by the mean of the same models. Each finding is judged so
    as two classes. Of a number, ridge regressions over the same folds predict each training image; one whose error is
    `FAR` robust deviations (1.4826 × the median absolute deviation of these errors) from their median is listed.

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
    train, test = np.union1d(sides.pool, sides.own_val), sides.test[ds.task.known(sides.labels[sides.test])]
    rows = np.concatenate([train, test])
    split = ds.table["split"].to_numpy(dtype=object)[rows]
    split[len(train) :] = "test"  # of a local test set too
    images = _Images(
        sides.ids[rows], sides.labels[rows], sides.groups[rows], split,
        load_features(store, ds, sides.ids[rows]), len(train), tuple(ds.class_names), ds.task,
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
    errors: tuple[LabelError, ...] = ()
    residuals: tuple[Residual, ...] = ()
    if ds.kind == "number":
        judge, residuals, notes = _judge_number(images, config)
    elif ds.kind == "findings":
        judge, errors, notes = _judge_findings(images, config)
    else:
        judge, errors, notes = _judge(images, config)
    usual = closeness[: images.n]
    # A standard deviation, were they normal.
    spread = 1.4826 * np.median(np.abs(usual - np.median(usual)))
    deviations = (np.median(usual) - closeness) / max(float(spread), 1e-12)
    far = [i for i in np.argsort(-deviations, kind="stable") if deviations[i] > FAR]
    outliers = tuple(Outlier(str(images.ids[i]), float(deviations[i]), str(images.split[i])) for i in far)
    if judge is None or judge.too_weak:
        exclude = _exclude(images, pairs, (), (), outliers)
    else:
        exclude = _exclude(images, pairs, [e for e in errors if e.finding not in judge.weak], residuals, outliers)
    effect, reason = None, ""
    if exclude:
        effect, reason = _effect(images, {id_ for id_, _ in exclude}, ds.metric, config)
    own = [note.removesuffix("; --exclude-test-overlap leaves them out") for note in sides.notes]  # a flag of others
    return Audit(
        ds.name, backbone, len(train), len(test), pairs, judge, errors, residuals, outliers, exclude, effect, reason,
        (*own, *notes),
    )  # fmt: skip


def _compare(images: _Images, threshold: float) -> tuple[tuple[Pair, ...], Float]:
    """Near-duplicates among all images, and each image's mean similarity to its nearest other training images, (N,)."""
    z = standard_directions(images.x.numpy(), by=images.x[: images.n].numpy())
    total, n, k = len(z), images.n, min(NEIGHBORS, images.n - 1)
    y = images.labels
    apart = SAME * y[:n].std() if y.dtype.kind == "f" else 0
    closeness, pairs = np.empty(total), []
    for start in range(0, total, _BLOCK):
        similar = z[start : start + _BLOCK] @ z.T  # (block, N)
        own = np.arange(len(similar))
        similar[own, start + own] = -np.inf
        closeness[start : start + len(similar)] = np.partition(similar[:, :n], n - k, axis=1)[:, n - k :].mean(axis=1)
        for row, other in np.argwhere(similar >= threshold).tolist():
            one = start + row
            if one < other:
                same_group = bool(images.groups[one] == images.groups[other])
                same = (np.abs(y[one] - y[other]) <= apart) | ((y[one] < 0) | (y[other] < 0) if y.ndim == 2 else False)
                same_label = bool(np.all(same))
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


def _judge_findings(
    images: _Images, config: AuditConfig
) -> tuple[Judge | None, tuple[LabelError, ...], tuple[str, ...]]:
    """Likely label errors of every finding, each judged as two classes, and how good the models are on average."""
    judges: dict[str, Judge] = {}
    errors, skipped = list[LabelError](), list[str]()
    for c, name in enumerate(images.class_names):
        judge, own, _ = _judge(images.finding(c), config)
        if judge is None:
            skipped.append(name)
        else:
            judges[name] = judge
            errors += [replace(error, finding=name) for error in own]
    needed = f"{config.folds} groups with and {config.folds} without it are needed in training"
    notes = [f"labels are not judged of {', '.join(skipped)}: {needed}"] if skipped else []
    if not judges:
        return None, (), tuple(notes)
    weak = tuple(name for name, judge in judges.items() if judge.too_weak)
    if weak and len(weak) < len(judges):
        notes.append(f"nothing is left out because of {', '.join(weak)}: the models are too weak")
    each = list(judges.values())
    judge = Judge(
        labels=sum(j.labels for j in each), test_labels=sum(j.test_labels for j in each),
        found=sum(j.found for j in each), test_found=sum(j.test_found for j in each),
        share=float(np.mean([j.share for j in each])),
        balanced_accuracy=float(np.mean([j.balanced_accuracy or 0.0 for j in each])),
        too_weak=len(weak) == len(each), weak=weak,
    )  # fmt: skip
    errors.sort(key=lambda e: e.p_label - e.p_proposed)
    train, test = ([e for e in errors if (e.split == "test") == of][: config.most] for of in (False, True))
    listed = sorted([*train, *test], key=lambda e: e.p_label - e.p_proposed)
    return judge, tuple(listed), tuple(notes)


def _judge_number(images: _Images, config: AuditConfig) -> tuple[Judge | None, tuple[Residual, ...], tuple[str, ...]]:
    """Numbers far from what ridge regressions that did not see the image predict, and how good these are."""
    y, n = images.labels, images.n
    groups = len(set(images.groups[:n].tolist()))
    if groups < config.folds:
        return None, (), (f"numbers are not judged: {config.folds} groups are needed in training, there are {groups}",)
    parts, predicted = images.folds(config.folds, config.seed), np.zeros(len(y))
    for held, val in zip(parts, [*parts[1:], parts[0]], strict=True):
        train, others = np.setdiff1d(np.arange(n), np.concatenate([held, val])), np.append(held, np.arange(n, len(y)))
        found = _logits(images, train, others, Ridge(), val, "rmse")[:, 0]
        predicted[held] = found[: len(held)]
        predicted[n:] += found[len(held) :] / config.folds
    errors, spread = predicted - y, float(((y[:n] - y[:n].mean()) ** 2).sum())
    r2 = 1 - float((errors[:n] ** 2).sum()) / spread if spread > 0 else 0.0
    middle = float(np.median(errors[:n]))
    deviations = (errors - middle) / max(1.4826 * float(np.median(np.abs(errors[:n] - middle))), 1e-12)
    far = np.abs(deviations) > FAR
    order = np.argsort(-np.abs(deviations), kind="stable")
    rows = np.arange(len(y))
    listed = {i for side in (rows < n, rows >= n) for i in order[(far & side)[order]][: config.most].tolist()}
    residuals = [
        Residual(str(images.ids[i]), float(y[i]), float(predicted[i]), float(deviations[i]), str(images.split[i]))
        for i in order.tolist() if i in listed
    ]  # fmt: skip
    share = float(far[:n].mean())
    judge = Judge(
        labels=n, test_labels=len(y) - n, found=int(far[:n].sum()), test_found=int(far[n:].sum()), share=share,
        balanced_accuracy=None, too_weak=r2 <= 0 or share > CREDIBLE, r2=r2,
    )  # fmt: skip
    return judge, tuple(residuals), ()


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
    images: _Images, train: IntArray, others: IntArray, head: ClosedFormHead, val: IntArray | None = None,
    metric: str = "",
) -> Float:  # fmt: skip
    """Logits (len(others), C) of a head trained on some rows, its strength chosen on ``val``."""
    x, held = {"features": images.x}, np.zeros(0, np.int64) if val is None else val
    job = Job(torch.from_numpy(train), torch.from_numpy(held), "audit", 1.0)
    (model,) = train_heads(head, x, torch.from_numpy(images.labels), [job], images.task, metric, Schedule())
    return predict_logits(head, model.params, x, torch.from_numpy(others)).astype(np.float64)


def _exclude(
    images: _Images, pairs: Sequence[Pair], errors: Sequence[LabelError], residuals: Sequence[Residual],
    outliers: Sequence[Outlier],
) -> tuple[tuple[str, str], ...]:  # fmt: skip
    """Training images to leave out, each with its first reason."""
    here = images.labels[: images.n]
    common = np.ones(images.n, dtype=bool)
    if images.task.kind not in ("findings", "number"):
        # An image of a rare class is far from others only because there are few like it.
        common = (np.bincount(here, minlength=len(images.class_names)) > NEIGHBORS)[here]
    usual, names = set(images.ids[: images.n][common].tolist()), images.class_names

    def proposed(e: LabelError) -> str:
        return f"no {e.finding}" if e.finding and not e.proposed else e.finding or names[e.proposed]

    found = [
        # Of a pair across splits the training image comes first.
        *((p.one, f"near-duplicate of the test image {p.other}") for p in pairs if p.kind == "across splits"),
        *((e.id, f"likely label error ({proposed(e)}: p = {e.p_proposed:.3f})")
          for e in errors if e.split != "test"),
        *((r.id, f"{names[0]} {r.value:.6g}, predicted {r.predicted:.6g} ({abs(r.deviations):.1f} deviations)")
          for r in residuals if r.split != "test"),
        *((o.id, f"outlier ({o.deviations:.1f} deviations)") for o in outliers if o.id in usual),
    ]  # fmt: skip
    first = dict(reversed(found))
    return tuple((id_, first[id_]) for id_ in dict(found))


def _effect(images: _Images, excluded: set[str], metric: str, config: AuditConfig) -> tuple[Effect | None, str]:
    """What leaving training images out does to the test metric, or why it cannot be measured."""
    y, test, task = images.labels, np.arange(images.n, len(images.labels)), images.task
    out = np.isin(images.ids.astype(str), list(excluded))
    parts = [(np.setdiff1d(np.arange(images.n), val), val) for val in images.folds(config.folds, config.seed)]
    gone = {c for train, _ in parts for c in set(task.absent(y[train[~out[train]]])) - set(task.absent(y[train]))}
    if gone:
        return None, f"{', '.join(images.class_names[c] for c in sorted(gone))} would be gone"

    words = {"number": ("all of one value", "of one value"), "findings": ("without a finding that can be scored",) * 2}
    of_test, of_fold = words.get(task.kind, ("not of two classes", "of one class only"))
    if alike(y[test], task):
        return None, f"the labeled test images are {of_test}"
    if any(alike(y[val[~out[val]]], task) for _, val in parts):
        return None, f"a fold would have images {of_fold} to validate on"
    head: ClosedFormHead = Ridge() if task.kind == "number" else LogReg(Cs=_STRENGTHS)
    scores = np.array([
        [
            score(metric, y[test], _logits(images, rows, test, head, held, metric), of=task)
            for rows, held in ((train, val), (train[~out[train]], val[~out[val]]))
        ]
        for train, val in parts
    ])  # fmt: skip
    before, after = ((float(mean), float(sd)) for mean, sd in zip(scores.mean(0), scores.std(0, ddof=1), strict=True))
    return Effect(metric, before, after), ""
