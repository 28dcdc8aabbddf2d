"""Which images train, validate and test: the paper's five-fold protocol (Sections 5.3 and A) as one pure function.

The order of decisions::

    labeled, readable rows ─► test set (official, or a local fifth) ─► pool (patchcam: 50,000 drawn) ─► folds of groups
    fold f: training rows drawn from the other folds, balanced and nested; validation is fold f

Every random choice is an order by hash (`embcache.data.groups`), so that a seed means the same images on any machine
and for every backbone and head.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from embcache.config import ProtocolConfig
from embcache.data.classes import class_flags
from embcache.data.groups import (
    IntArray,
    hash_order,
    merge_groups,
    overlap_notes,
    spread_order,
    stratified_group_folds,
    water_fill,
)
from embcache.errors import ProtocolError, UsageError, first_few
from embcache.fields import unknown_subset
from embcache.io import read_regular, write_output
from embcache.sealed import parse, typed
from embcache.targets import Target, make_target

if TYPE_CHECKING:
    from embcache.data.dataset import ImageDataset

StrArray = NDArray[np.object_]
Key = tuple[int, str]  # (fold, subset)

FORMAT = "embcache-splits-1"


@dataclass(frozen=True, eq=False)
class Splits:
    """The rows that test, and for every fold and subset those that train and validate; they index ``ids``."""

    dataset: str
    class_names: tuple[str, ...]
    ids: StrArray = field(repr=False)  # (N,)
    labels: NDArray[Any] = field(repr=False)  # values (N,) or (N, L); −1, of a number NaN, where unlabeled
    groups: StrArray = field(repr=False)  # (N,); the dataset's, merged where stored digests showed identical bytes
    test: IntArray = field(repr=False)  # rows of the test set, in the dataset's order
    test_set: str  # "official" or "local"
    train: Mapping[Key, IntArray] = field(
        repr=False
    )  # in drawing order: a smaller subset is its beginning, class by class
    val: Mapping[Key, IntArray] = field(repr=False)
    subsets: tuple[str, ...]  # "S", "M", "F" or a number of training images
    n_folds: int
    seed: int
    val_mode: str  # "full" or "matched"
    notes: tuple[str, ...] = ()  # what a reader of the results must know
    everything: frozenset[str] = frozenset()  # subsets that are F under another name: all that may train do
    target: Target | None = None  # by default classes

    @property
    def task(self) -> Target:
        """What is predicted."""
        return self.target or make_target("classes", self.class_names)

    @property
    def test_ids(self) -> tuple[str, ...]:
        """Ids of the test set."""
        return tuple(self.ids[self.test])

    @property
    def test_labeled(self) -> bool:
        """Whether test scores can be computed; False for predictions to submit."""
        return bool(self.task.known(self.labels[self.test]).any())

    def train_ids(self, fold: int, subset: str) -> tuple[str, ...]:
        """Ids that train in ``fold`` at ``subset``, in drawing order."""
        return tuple(self.ids[self.train[fold, subset]])

    def val_ids(self, fold: int, subset: str) -> tuple[str, ...]:
        """Ids that validate in ``fold`` at ``subset``."""
        return tuple(self.ids[self.val[fold, subset]])

    def used(self, subset: str) -> IntArray:
        """All rows that train, validate or test at ``subset``, ascending."""
        parts = [self.test, *(part[f, subset] for f in range(self.n_folds) for part in (self.train, self.val))]
        return np.unique(np.concatenate(parts))

    def digest(self, subset: str) -> str:
        """SHA-256 (hex) of the ids and labels that train, validate and test at ``subset``, and of the test groups."""
        rows = [self.test, *(np.sort(p[f, subset]) for f in range(self.n_folds) for p in (self.train, self.val))]
        content = [
            [[self.ids[i], value] for i, value in zip(part, self.task.plain(self.labels[part]), strict=True)]
            for part in rows
        ]
        text = json.dumps([list(self.class_names), content, list(self.groups[self.test])], ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()

    def name_of(self, subset: str) -> str:
        """What `name_everything` calls a subset: F, where it is that."""
        return subset if subset in self.subsets else "F"

    def rename(self, names: Mapping[str, str]) -> Splits:
        """The same splits with subsets called by other names; two that get one name must be the same images."""
        train, val = ({(f, names.get(s, s)): rows for (f, s), rows in p.items()} for p in (self.train, self.val))
        subsets = tuple(dict.fromkeys(names.get(s, s) for s in self.subsets))
        return replace(self, train=train, val=val, subsets=subsets)

    def check(self) -> Splits:
        """Return these splits if no group is on two sides of any fold and every part can be used."""
        if not len(self.test):
            raise ProtocolError(
                "the test set is empty", code="no-test-set", expected="one readable test image at least", found="none"
            )
        task, y = self.task, self.labels[self.test]
        known = y[task.known(y)]
        if len(known) and len(task.absent(known)) == len(task.names):
            raise ProtocolError(
                f"the labeled test images have no {task.noun} that varies", code="constant-target",
                expected=f"two values of a {task.noun}", found=task.words(known[0]), fix="label more test images",
            )  # fmt: skip
        if len(known) and known.ndim == 1 and len(np.unique(known)) < 2:
            local = "label images of the other classes: the local test set is a fifth of all"
            raise ProtocolError(
                "the labeled test images are all of one class", code="one-class", expected="two classes at least",
                found=f"{len(known)} of {self.class_names[known[0]]!r}",
                fix=local if self.test_set == "local" else "add test images of the other classes",
            )  # fmt: skip
        test_rows, test_groups = set(self.test.tolist()), set(self.groups[self.test])
        for (fold, subset), train in self.train.items():
            val, where = self.val[fold, subset], f"fold {fold}, subset {subset}"
            shared = {"training and validation": set(self.groups[train]) & set(self.groups[val])}
            for side, rows in (("training", train), ("validation", val)):
                if not test_rows.isdisjoint(rows.tolist()):
                    raise ProtocolError(
                        f"{where}: an image is in {side} and in the test set", code="test-image-in-fold"
                    )
                shared[f"{side} and test"] = (
                    set() if self.test_set == "official" else test_groups & set(self.groups[rows])
                )
                fix = ("fewer --folds", "a larger --subset", "label more images")
                task.check_part(self.labels[rows], f"{where}: {side}", fix)
            for sides, names in shared.items():
                if names:
                    raise ProtocolError(
                        f"a group is on both sides of {where}: {sides}", code="group-spans-split",
                        expected="every group (patient, slide, identical images) on one side",
                        found=first_few([repr(name) for name in sorted(names)]),
                        fix="draw the splits again: embcache splits export",
                    )  # fmt: skip
        return self

    def to_json(self) -> dict[str, Any]:
        """Ids only, as plain data: the content of a splits file."""
        folds = []
        for fold in range(self.n_folds):
            train = {subset: list(self.train_ids(fold, subset)) for subset in self.subsets}
            val = {subset: list(self.val_ids(fold, subset)) for subset in self.subsets}
            shared = next(iter(val.values()))
            same = all(ids == shared for ids in val.values())
            folds.append({"train": train, "val": {"*": shared} if same else val})
        return {
            "format": FORMAT, "dataset": self.dataset, "class_names": list(self.class_names),
            "test_set": self.test_set, "seed": self.seed, "val_mode": self.val_mode, "subsets": list(self.subsets),
            "notes": list(self.notes), "test": list(self.test_ids), "folds": folds,
        }  # fmt: skip


def name_everything(plans: Sequence[Splits]) -> tuple[Splits, ...]:
    """Plans in which a subset that trains on everything, in all of them, is called F: one computation has one name."""
    names = {s: "F" for s in plans[0].subsets if all(s in plan.everything for plan in plans)}
    return tuple(plan.rename(names) for plan in plans)


def write_splits(splits: Splits, path: Path) -> None:
    """Write a splits file, whole or not at all."""
    write_output(path, json.dumps(splits.to_json(), indent=1, ensure_ascii=False) + "\n", parents=True)


class _Fold(TypedDict):
    train: Mapping[str, list[str]]
    val: Mapping[str, list[str]]


class _SplitsFile(TypedDict):
    format: str
    dataset: str
    test_set: str
    notes: list[str]
    subsets: list[str]
    folds: list[_Fold]
    test: list[str]
    class_names: list[str]
    seed: int
    val_mode: str


def read_splits(
    path: Path,
    ds: ImageDataset,
    digests: Mapping[str, str] | None = None,
    unreadable: Collection[str] = (),
    exclude_test_overlap: bool = False,
) -> Splits:
    """Read a splits file for a dataset and check it; ``digests`` and ``unreadable`` images as its stores know them."""
    try:
        data = typed(_SplitsFile, parse(read_regular(path, follow=True)))
        if data["format"] != FORMAT or set(data) != set(_SplitsFile.__annotations__):
            raise ValueError(f"keys {sorted(data)}"[:300])
        subsets, folds, test = tuple(data["subsets"]), data["folds"], data["test"]
        class_names, seed, val_mode = tuple(data["class_names"]), data["seed"], data["val_mode"]
        if not subsets or len(folds) < 2 or any(set(fold["train"]) != set(subsets) for fold in folds):
            raise ValueError("every fold must list every subset, and there must be two folds at least")
        if any(set(fold["val"]) not in ({"*"}, set(subsets)) for fold in folds):
            raise ValueError("validation must be listed once ('*') or for every subset")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ProtocolError(
            "this is not a splits file", code="not-a-splits-file",
            expected=f"JSON written by embcache splits export (format {FORMAT!r})", found=str(reason), where=path,
            fix="embcache splits export --dataset NAME --output FILE",
        ) from error  # fmt: skip
    if class_names != tuple(ds.class_names):
        raise ProtocolError(
            "the splits file is for other classes", code="splits-of-other-classes", expected=", ".join(ds.class_names),
            found=", ".join(map(str, class_names)), where=path,
        )  # fmt: skip
    ids = np.array(ds.table["id"].tolist(), dtype=object)
    row_of = {name: row for row, name in enumerate(ids)}
    labels, task = ds.labels, ds.task
    gone, groups = set(unreadable), merged_groups(ds, digests)
    # the overlap is noted below, for what the file really uses
    notes = [f"splits read from {path.name}", *(note for note in ds.notes if note not in overlap_notes(ds.table))]

    def rows(names: Sequence[str], *, labeled: bool) -> IntArray:
        unknown = [name for name in names if name not in row_of]
        if unknown or len(set(names)) != len(names):
            what = f"{len(unknown)} images that {ds.name} has not" if unknown else "an image twice in one part"
            raise ProtocolError(
                f"the splits file names {what}", code="unknown-image" if unknown else "repeated-image",
                found=first_few(unknown) or None, where=path,
                fix=f"use the file with the dataset it was made for ({data['dataset']})",
            )  # fmt: skip
        found = np.array([row_of[name] for name in names if name not in gone], dtype=np.int64)
        known = task.known(labels[found])
        if labeled and not known.all():
            raise ProtocolError(
                "the splits file trains or validates on images without a label", code="unlabeled-image",
                found=first_few(ids[found[~known]].tolist()), where=path,
            )  # fmt: skip
        return found

    test_rows = rows(test, labeled=False)
    given = ds.table["split"].to_numpy(dtype=object)
    official = bool(len(test_rows)) and bool((given[test_rows] == "test").all())
    excluded = np.zeros(len(ids), bool)
    if official and exclude_test_overlap:
        excluded = np.isin(groups, np.unique(groups[test_rows]))
    keys = [(number, subset) for number in range(len(folds)) for subset in subsets]
    train = {(number, subset): rows(folds[number]["train"][subset], labeled=True) for number, subset in keys}
    val_of = [fold["val"] for fold in folds]
    val = {(k, subset): rows(val_of[k].get("*", val_of[k].get(subset, [])), labeled=True) for k, subset in keys}
    if dropped := {int(row) for part in (*train.values(), *val.values()) for row in part[excluded[part]]}:
        notes.append(f"{len(dropped)} images of groups that the official test set shares left out of the folds")
        train, val = ({key: part[~excluded[part]] for key, part in parts.items()} for parts in (train, val))
    for number in range(len(folds)):
        notes += absent_note(task, labels[val[number, subsets[0]]], f"validation of fold {number}")
    notes += absent_note(task, labels[test_rows], "the test set")
    named = {i for fold in folds for part in (fold["train"], fold["val"]) for names in part.values() for i in names}
    named |= set(test)
    if gone & named:
        notes.append(f"{len(gone & named)} unreadable images of the splits file left out")
    everything = {
        subset
        for subset in (subsets if "F" in subsets else ())
        if all(np.array_equal(np.sort(p[k, subset]), np.sort(p[k, "F"])) for k, _ in keys for p in (train, val))
    }
    return Splits(
        dataset=ds.name, class_names=class_names, ids=ids, labels=labels, groups=groups, test=test_rows,
        test_set="official" if official else "local", train=train, val=val, subsets=subsets, n_folds=len(folds),
        seed=seed, val_mode=val_mode, notes=tuple(dict.fromkeys(notes)), everything=frozenset(everything), target=task,
    ).check()  # fmt: skip


def absent_note(task: Target, y: NDArray[Any], where: str) -> list[str]:
    """One note where a class has no image among some rows, or a finding none with or without it; else nothing."""
    known = y[task.known(y)]
    absent = [task.names[c] for c in task.absent(known)] if len(known) else []
    if not absent or task.kind == "number":
        return []
    lacks = "no image of" if task.kind != "findings" else "no images with and without"
    return [f"{where} has {lacks} {', '.join(absent)}: scores there are over the other {task.nouns}"]


TEST_SEED = 20_210_823  # of the local test set: its own, so that no ``--seed`` moves an image between pool and test
TEST_PARTS = 5  # the local test set is one of five stratified, grouped parts: 20 %


@dataclass(frozen=True, eq=False)
class Sides:
    """The rows of a dataset that may train, those that validate in every fold, and those that test."""

    ids: StrArray
    labels: NDArray[Any]  # as `Splits.labels`
    strata: IntArray  # (N,), −1 where unlabeled; or membership (N, S): see `embcache.targets.target.Target.strata`
    groups: StrArray
    pool: IntArray
    own_val: IntArray
    test: IntArray
    test_set: str
    notes: tuple[str, ...]


def plan_splits(
    ds: ImageDataset,
    *,
    subsets: Sequence[str | int] = ("S", "M", "F"),
    config: ProtocolConfig | None = None,
    digests: Mapping[str, str] | None = None,
    unreadable: Collection[str] = (),
    **options: Any,
) -> Splits:
    """Draw test set, folds and subsets of a dataset; ``options`` are fields of `ProtocolConfig`."""
    config = ProtocolConfig.make(config, options)
    folds, seed, matched = config.folds, config.seed, config.val == "matched"
    sizes = subset_sizes(ds, subsets)
    numbers = {str(subset).strip() for subset in subsets}  # a subset given as a number must be there
    everything = set(sizes)
    sides = divide(ds, config=config, digests=digests, unreadable=unreadable)
    ids, labels, groups, notes = sides.ids, sides.labels, sides.groups, list(sides.notes)
    pool, own_val, test_rows, strata = sides.pool, sides.own_val, sides.test, sides.strata
    if len(own_val):
        notes.append(f"validation is the dataset's own val split ({len(own_val)} images) in every fold")
    _check_classes(ds, sides, folds)
    # Subsets of findings are the beginning of one order, which is made as far as it is needed.
    most = max((n for n in sizes.values() if n is not None), default=0)
    fold_of = stratified_group_folds(strata[pool], groups[pool].tolist(), folds, seed, "folds")
    train: dict[Key, IntArray] = {}
    val: dict[Key, IntArray] = {}
    for fold in range(folds):
        holdout = own_val if len(own_val) else pool[fold_of == fold]
        drawn = _orders(pool[fold_of != fold], strata, ids, seed, f"train/{fold}", most)
        held = _orders(holdout, strata, ids, seed, f"val/{fold}", most) if matched else []
        there = sum(map(len, drawn))
        for subset, n in sizes.items():
            where = f"fold {fold}, subset {subset}"
            if n is not None and str(n) not in numbers and n > there:
                # S and M are the dataset's own sizes: part of a dataset has less, a number asked for is an error
                notes.append(f"subset {subset} is {n} training images and the folds hold fewer: all of them train")
                n = None
            rows = train[fold, subset] = _draw(drawn, n, where, ds)
            if len(rows) < there:
                everything.discard(subset)
            val[fold, subset] = np.sort(_matched(held, len(rows), where, ds) if matched else holdout)
            if matched and len(holdout) < len(rows):
                notes.append(f"subset {subset}, fold {fold}: only {len(holdout)} images to validate, {len(rows)} train")
    for fold in range(folds):
        where = "the val split" if len(own_val) else f"validation of fold {fold}"
        notes += absent_note(ds.task, labels[val[fold, next(iter(sizes))]], where)
    notes += absent_note(ds.task, labels[test_rows], "the test set")
    return Splits(
        dataset=ds.name, class_names=tuple(ds.class_names), ids=ids, labels=labels, groups=groups, test=test_rows,
        test_set=sides.test_set, train=train, val=val, subsets=tuple(sizes), n_folds=folds, seed=seed,
        val_mode=config.val, notes=tuple(dict.fromkeys(notes)), everything=frozenset(everything), target=ds.task,
    ).check()  # fmt: skip


def divide(
    ds: ImageDataset,
    *,
    config: ProtocolConfig | None = None,
    digests: Mapping[str, str] | None = None,
    unreadable: Collection[str] = (),
    **options: Any,
) -> Sides:
    """Divide a dataset into pool and test set. Needs no folds, so any number of images of a class will do."""
    config, table = ProtocolConfig.make(config, options), ds.table
    ids = table["id"].to_numpy(dtype=object)
    labels = ds.labels
    known = ds.task.known(labels)
    given = table["split"].to_numpy(dtype=object)
    groups = merged_groups(ds, digests)
    # the overlap is noted below, for the test set that is really used
    notes = [note for note in ds.notes if note not in overlap_notes(table)]

    readable = ~np.isin(ids, np.asarray(sorted(unreadable), dtype=object)) if unreadable else np.ones(len(ids), bool)
    if not readable.all():
        notes.append(f"{(~readable).sum()} unreadable images left out")
    usable = readable & known
    pool, own_val = (np.flatnonzero((given == split) & usable) for split in ("train", "val"))
    official = np.flatnonzero((given == "test") & readable)
    if not ds.grouped:
        notes.append("ungrouped: images of one patient or slide may be on both sides")
    strata = ds.task.strata(labels, np.flatnonzero((given == "train") & usable), config.folds + 1)
    if known[official].any() or config.test == "official":
        test_rows, test_set = official, "official"
        pool, own_val, overlap = _official_overlap(ds, groups, official, pool, own_val, config.exclude_test_overlap)
        notes += overlap
    else:
        test_rows, test_set = _local_test(strata, groups, pool, own_val), "local"
        pool = np.setdiff1d(pool, test_rows)
    if len(own_val):
        kept = pool[~_sharing(groups, pool, own_val)]
        if len(kept) < len(pool):
            notes.append(f"{len(pool) - len(kept)} training images that share a group with the val split left out")
        pool = kept
    if ds.pool_limit is not None and len(pool) > ds.pool_limit:
        pool = np.sort(pool[hash_order(config.seed, "pool", ids[pool].tolist())[: ds.pool_limit]])
    return Sides(ids, labels, strata, groups, pool, own_val, test_rows, test_set, tuple(notes))


def subset_sizes(ds: ImageDataset, subsets: Sequence[str | int]) -> dict[str, int | None]:
    """Canonical names of subsets (a number that S or M is, is called so) with their images to train on; None for F."""
    known = {**{str(k).upper(): int(v) for k, v in ds.subset_sizes.items()}, "F": None}
    named = {size: name for name, size in reversed(known.items()) if size is not None}
    sizes: dict[str, int | None] = {}
    for subset in subsets:
        name = str(subset).strip().upper()
        if name.isascii() and name.isdigit() and int(name) > 0:
            sizes[named.get(int(name), str(int(name)))] = int(name)
        elif name in known:
            sizes[name] = known[name]
        else:
            raise unknown_subset(subset, known)
    if not sizes:
        raise UsageError("no subset was named", code="no-subset", fix="--subset S")
    return sizes


def merged_groups(ds: ImageDataset, digests: Mapping[str, str] | None) -> StrArray:
    """The dataset's groups, united wherever two rows have the same bytes; object array of shape (N,)."""
    groups = [str(g) for g in ds.table["group"]]
    if digests:
        groups = merge_groups(groups, [digests.get(i, "") for i in ds.table["id"]])
    return np.array(groups, dtype=object)


def _official_overlap(
    ds: ImageDataset, groups: StrArray, test: IntArray, pool: IntArray, own_val: IntArray, exclude: bool
) -> tuple[IntArray, IntArray, list[str]]:
    """Pool and own validation rows, without or with the groups of the official test set, and what to say of them."""
    if not len(test):
        raise ProtocolError(
            f"{ds.name} has no test set of its own", code="no-test-set", expected="images with the split 'test'",
            found="none that can be read", fix="--test local",
        )  # fmt: skip
    rows = np.concatenate([pool, own_val])
    shared = rows[_sharing(groups, rows, test)]
    if not len(shared):
        return pool, own_val, []
    names = len(set(groups[shared]))
    if exclude:
        note = f"{len(shared)} training images of {names} groups that the official test set shares left out"
        return np.setdiff1d(pool, shared), np.setdiff1d(own_val, shared), [note]
    note = f"{len(shared)} training images share {names} groups with the official test set"
    return pool, own_val, [note + "; embcache probe --exclude-test-overlap leaves them out"]


def _local_test(strata: IntArray, groups: StrArray, pool: IntArray, own_val: IntArray) -> IntArray:
    """A stratified, grouped fifth of the pool, ascending; the same whatever the seed."""
    free = pool[~_sharing(groups, pool, own_val)]
    part = stratified_group_folds(strata[free], groups[free].tolist(), TEST_PARTS, TEST_SEED, "test")
    return np.asarray(free[part == _nearest_fifth(strata[free], part)])


def _sharing(groups: StrArray, rows: IntArray, others: IntArray) -> NDArray[np.bool_]:
    # hashed: numpy sorts texts, which for a million rows takes minutes
    return np.asarray(pd.Index(groups[rows]).isin(groups[others]))


def _nearest_fifth(strata: IntArray, part: IntArray) -> int:
    """The part whose classes come nearest to a fifth of each; large groups can make parts unequal."""
    if strata.ndim == 1:
        strata = (strata[:, None] == np.unique(strata)).astype(np.int64)
    counts = np.zeros((TEST_PARTS, strata.shape[1]), dtype=np.int64)
    np.add.at(counts, part, strata)
    total = counts.sum(0)
    distance = ((TEST_PARTS * counts - total) ** 2 * (2**52 // np.maximum(total, 1) ** 2 // TEST_PARTS**2)).sum(1)
    return int(distance.argmin())


def _check_classes(ds: ImageDataset, sides: Sides, folds: int) -> None:
    """Refuse a pool that some fold could not train or validate every class on."""
    labels, groups, pool, own_val, task = sides.strata, sides.groups, sides.pool, sides.own_val, ds.task
    held_out = sides.test if sides.test_set == "local" else sides.test[:0]
    if task.kind in ("findings", "number"):
        where = f"the pool of {ds.name}"
        task.check_part(sides.labels[pool], where, ["label more images"])
        if task.kind == "findings":
            _check_findings(ds, sides, folds)
        return
    counts = np.bincount(labels[pool], minlength=len(ds.class_names))
    listing = ", ".join(f"{name}: {count}" for name, count in zip(ds.class_names, counts, strict=True)) or "no classes"
    if (counts > 0).sum() < 2:
        raise ProtocolError(
            f"{ds.name} has fewer than two classes in its pool", code="one-class",
            expected="labeled, readable training images of two classes or more", found=listing, where=ds.root,
            fix="label more images, or embcache datasets to see what was read",
        )  # fmt: skip
    if len(own_val) and len(np.unique(labels[own_val])) < 2:
        raise ProtocolError(
            f"the val split of {ds.name} holds fewer than two classes", code="one-class",
            expected="validation images of two classes or more",
            found=f"{len(own_val)} of {ds.class_names[labels[own_val[0]]]!r}", where=ds.root,
            fix="put images of the other classes into the val split, or its images into train: folds validate then",
        )  # fmt: skip
    # A fold leaves a part of the pool out: the others must have each class, and the part too where it validates.
    needed = 2 if len(own_val) else folds
    n_pool, n_held = ([len(set(groups[r[labels[r] == c]])) for c in range(len(counts))] for r in (pool, held_out))
    few = [c for c, n in enumerate(n_pool) if n < needed]
    if not few:
        return
    name, in_all = ds.class_names[few[0]], needed + bool(len(held_out))  # the local test set takes a group of most
    short = [c for c in range(len(counts)) if c in few or n_pool[c] + n_held[c] < in_all]
    advice = [f"--folds {min(n_pool)}"] if min(n_pool) >= 2 else []
    advice += [shlex.join(class_flags({ds.class_names[c]: "" for c in short}))] if len(counts) - len(short) > 1 else []
    advice += [shlex.join(["--merge-class", f"{name}+OTHER=NEW"])] if len(counts) > 2 else []
    held = f" (the local test set holds {n_held[few[0]]} more)" if n_held[few[0]] else ""
    raise ProtocolError(
        f"class {name!r} of {ds.name} is too small: a fold would train or validate without it", code="class-too-small",
        expected=f"at least {needed} groups (patients, slides …) of every class in the pool",
        found=f"{counts[few[0]]} images in {n_pool[few[0]]} groups{held}; all classes: {listing}", where=ds.root,
        fix=(*advice, f"more images: {in_all} groups of every class" + ", one for the test set" * bool(len(held_out))),
    )  # fmt: skip


def _check_findings(ds: ImageDataset, sides: Sides, folds: int) -> None:
    """Refuse findings that some fold could not train or validate on."""
    needed, y, groups = 2 if len(sides.own_val) else folds, sides.labels[sides.pool], sides.groups[sides.pool]
    few = dict[str, str]()
    for value, word in ((1, "with"), (0, "known to be without")):
        for name, column in zip(ds.class_names, y.T, strict=True):
            if (n := len(set(groups[column == value]))) < needed:
                few.setdefault(name, f"{name}: {n:,} groups {word} it")
    if few:
        raise ProtocolError(
            f"{len(few)} of {len(ds.class_names)} findings of {ds.name} are too rare for {folds} folds",
            code="class-too-small", expected=f"at least {needed} groups with and without every finding in the pool",
            found="; ".join(few.values()), where=ds.root,
            fix=[f"--drop-class {shlex.quote(','.join(few))}", "fewer --folds", "label more images"],
        )  # fmt: skip


def _orders(rows: IntArray, strata: IntArray, ids: StrArray, seed: int, purpose: str, most: int) -> list[IntArray]:
    """Rows of each class in drawing order; of findings all rows, so that the first n have them as equal as can be."""
    if strata.ndim == 2:
        order = hash_order(seed, purpose, ids[rows].tolist())
        first = spread_order(strata[rows], min(most, len(rows)), order)
        return [rows[np.concatenate([first, order[~np.isin(order, first)]])]]
    members = [rows[strata[rows] == c] for c in range(int(strata.max(initial=0)) + 1)]
    return [m[hash_order(seed, f"{purpose}/{c}", ids[m].tolist())] for c, m in enumerate(members)]


def _take(orders: Sequence[IntArray], n: int) -> IntArray:
    share = water_fill([len(order) for order in orders], n)
    return np.concatenate([order[:k] for order, k in zip(orders, share, strict=True)])


def _draw(orders: Sequence[IntArray], n: int | None, where: str, ds: ImageDataset) -> IntArray:
    there = sum(map(len, orders))
    least = len(orders) if ds.task.kind == "number" else len(ds.class_names)
    if n is not None and not least <= n <= there:
        raise ProtocolError(
            f"{n} training images are more than {ds.name} has, or fewer than "
            + ("the parts of its values" if ds.task.kind == "number" else f"its {ds.task.nouns}"),
            code="subset-too-large" if n > there else "subset-too-small",
            expected=f"{least} to {there} training images", found=str(n), where=where, fix="--subset F takes all",
        )  # fmt: skip
    return _take(orders, there if n is None else n)


def _matched(orders: Sequence[IntArray], n: int, where: str, ds: ImageDataset) -> IntArray:
    share = water_fill([len(order) for order in orders], min(n, sum(map(len, orders))))
    if share.min() < 2:
        name = "all" if len(orders) == 1 else ds.task.stratum(int(share.argmin()))
        raise ProtocolError(
            "matched validation would have fewer than two images of a class", code="matched-too-small",
            expected="two images of every class", found=f"{share.min()} of {name!r} among {share.sum()}", where=where,
            fix=("--val full", *(["a larger --subset"] if len(orders[int(share.argmin())]) > 1 else [])),
        )  # fmt: skip
    return _take(orders, int(share.sum()))
