"""Which images train, validate and test: the paper's five-fold protocol (Sections 5.3 and A) as one pure function.

The order of decisions::

    labeled, readable rows ─► test set (official, or a local fifth) ─► pool (patchcam: 50,000 drawn) ─► folds of groups
    fold f: training rows drawn from the other folds, balanced and nested; validation is fold f

Every random choice is an order by hash (`embcache.data.groups`), so that a seed means the same images on any machine
and for every backbone and head.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    stratified_group_folds,
    water_fill,
)  # fmt: skip
from embcache.errors import ProtocolError, UsageError
from embcache.fields import unknown_subset
from embcache.probe.splits import Key, Splits, StrArray, absent_note

if TYPE_CHECKING:
    from embcache.data.dataset import ImageDataset

TEST_SEED = 20_210_823
"""Seed of the local test set: its own, so that no ``--seed`` ever moves an image between pool and test."""

TEST_PARTS = 5
"""The local test set is one of five stratified, grouped parts: 20 %."""


@dataclass(frozen=True, eq=False)
class Sides:
    """The rows of a dataset that may train, those that validate in every fold, and those that test."""

    ids: StrArray
    labels: IntArray  # (N,); -1 where unlabeled
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
    sides = divide(
        ds, seed=seed, test=config.test, digests=digests, unreadable=unreadable,
        exclude_test_overlap=config.exclude_test_overlap,
    )  # fmt: skip
    ids, labels, groups, notes = sides.ids, sides.labels, sides.groups, list(sides.notes)
    pool, own_val, test_rows = sides.pool, sides.own_val, sides.test
    n_classes = len(ds.class_names)
    if len(own_val):
        notes.append(f"validation is the dataset's own val split ({len(own_val)} images) in every fold")
    _check_classes(ds, sides, folds)
    fold_of = stratified_group_folds(labels[pool], groups[pool].tolist(), folds, seed, "folds")
    train: dict[Key, IntArray] = {}
    validate: dict[Key, IntArray] = {}
    for fold in range(folds):
        candidates = pool[fold_of != fold]
        holdout = own_val if len(own_val) else pool[fold_of == fold]
        drawn = _class_orders(candidates, labels, ids, n_classes, seed, f"train/{fold}")
        held = _class_orders(holdout, labels, ids, n_classes, seed, f"val/{fold}")
        for subset, n in sizes.items():
            if n is not None and str(n) not in numbers and n > sum(map(len, drawn)):
                # S and M are the dataset's own sizes: part of a dataset has less, a number asked for is an error
                notes.append(f"subset {subset} is {n} training images and the folds hold fewer: all of them train")
                n = None
            rows = _draw(drawn, n, f"fold {fold}, subset {subset}", ds)
            train[fold, subset] = rows
            if len(rows) < sum(map(len, drawn)):
                everything.discard(subset)
            validate[fold, subset] = np.sort(holdout)
            if matched:
                validate[fold, subset] = np.sort(_matched(held, len(rows), f"fold {fold}, subset {subset}", ds))
            if matched and len(holdout) < len(rows):
                notes.append(f"subset {subset}, fold {fold}: only {len(holdout)} images to validate, {len(rows)} train")
    for fold in range(folds):
        where = "the val split" if len(own_val) else f"validation of fold {fold}"
        notes += absent_note(ds.class_names, labels[validate[fold, next(iter(sizes))]], where)
    if (labels[test_rows] >= 0).any():
        notes += absent_note(ds.class_names, labels[test_rows], "the test set")
    return Splits(
        dataset=ds.name, class_names=tuple(ds.class_names), ids=ids, labels=labels, groups=groups, test=test_rows,
        test_set=sides.test_set, train=train, val=validate, subsets=tuple(sizes), n_folds=folds, seed=seed,
        val_mode=config.val, notes=tuple(dict.fromkeys(notes)), everything=frozenset(everything),
    ).check()  # fmt: skip


def divide(
    ds: ImageDataset,
    *,
    seed: int = 0,
    test: str = "local",
    digests: Mapping[str, str] | None = None,
    unreadable: Collection[str] = (),
    exclude_test_overlap: bool = False,
) -> Sides:
    """Divide a dataset into pool and test set. Needs no folds, so any number of images of a class will do."""
    table = ds.table
    ids = table["id"].to_numpy(dtype=object)
    labels = table["label"].to_numpy(dtype=np.int64)
    given = table["split"].to_numpy(dtype=object)
    groups = merged_groups(ds, digests)
    # the overlap is noted below, for the test set that is really used
    notes = [note for note in ds.notes if note not in overlap_notes(table)]

    readable = ~np.isin(ids, np.asarray(sorted(unreadable), dtype=object)) if unreadable else np.ones(len(ids), bool)
    if not readable.all():
        notes.append(f"{(~readable).sum()} unreadable images left out")
    usable = readable & (labels >= 0)
    pool, own_val = (np.flatnonzero((given == split) & usable) for split in ("train", "val"))
    official = np.flatnonzero((given == "test") & readable)
    if not ds.grouped:
        notes.append("ungrouped: images of one patient or slide may be on both sides")
    if (labels[official] >= 0).any() or test == "official":
        test_rows, test_set = official, "official"
        pool, own_val, overlap = _official_overlap(ds, groups, official, pool, own_val, exclude_test_overlap)
        notes += overlap
    else:
        test_rows, test_set = _local_test(labels, groups, pool, own_val), "local"
        pool = np.setdiff1d(pool, test_rows)
    if len(own_val):
        kept = pool[~_sharing(groups, pool, own_val)]
        if len(kept) < len(pool):
            notes.append(f"{len(pool) - len(kept)} training images that share a group with the val split left out")
        pool = kept
    if ds.pool_limit is not None and len(pool) > ds.pool_limit:
        pool = np.sort(pool[hash_order(seed, "pool", ids[pool].tolist())[: ds.pool_limit]])
    return Sides(ids, labels, groups, pool, own_val, test_rows, test_set, tuple(notes))


def subset_sizes(ds: ImageDataset, subsets: Sequence[str | int]) -> dict[str, int | None]:
    """Canonical names of subsets with their numbers of training images; None for F, all there are.

    A number that S or M is in this dataset is called so: one computation has one name.
    """
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
            f"{ds.name} has no test set of its own", code="no-test-set", expected="images whose split is 'test'",
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


def _local_test(labels: IntArray, groups: StrArray, pool: IntArray, own_val: IntArray) -> IntArray:
    """A stratified, grouped fifth of the pool, ascending; the same whatever the seed."""
    free = pool[~_sharing(groups, pool, own_val)]
    part = stratified_group_folds(labels[free], groups[free].tolist(), TEST_PARTS, TEST_SEED, "test")
    return np.asarray(free[part == _nearest_fifth(labels[free], part)])


def _sharing(groups: StrArray, rows: IntArray, others: IntArray) -> NDArray[np.bool_]:
    """Which of ``rows`` share a group with any of ``others``."""
    # hashed: numpy sorts texts, which for a million rows takes minutes
    return np.asarray(pd.Index(groups[rows]).isin(groups[others]))


def _nearest_fifth(labels: IntArray, part: IntArray) -> int:
    """The part whose classes come nearest to a fifth of each; large groups can make parts unequal."""
    present, y = np.unique(labels, return_inverse=True)
    counts = np.zeros((TEST_PARTS, len(present)), dtype=np.int64)
    np.add.at(counts, (part, y.reshape(-1)), 1)
    total = counts.sum(0)
    distance = ((TEST_PARTS * counts - total) ** 2 * (2**52 // np.maximum(total, 1) ** 2 // TEST_PARTS**2)).sum(1)
    return int(distance.argmin())


def _check_classes(ds: ImageDataset, sides: Sides, folds: int) -> None:
    """Refuse a pool that some fold could not train or validate every class on."""
    labels, groups, pool, own_val = sides.labels, sides.groups, sides.pool, sides.own_val
    held_out = sides.test if sides.test_set == "local" else sides.test[:0]
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
    first = few[0]
    in_all = needed + (1 if len(held_out) else 0)  # the local test set takes a group of most classes
    short = [c for c in range(len(counts)) if c in few or n_pool[c] + n_held[c] < in_all]
    without = class_flags({ds.class_names[c]: "" for c in short})
    together = ["--merge-class", f"{ds.class_names[first]}+OTHER=NEW"]
    raise ProtocolError(
        f"class {ds.class_names[first]!r} of {ds.name} has fewer "
        + ("images" if counts[first] < needed else "groups")
        + (" than two to train on: a fold would train without it" if len(own_val) else " than there are folds"),
        code="class-too-small",
        expected=f"at least {needed} groups (patients, slides …) of every class in the pool",
        found=f"{counts[first]} images in {n_pool[first]} groups"
        + (f" (the local test set holds {n_held[first]} more)" if n_held[first] else "")
        + f"; all classes: {listing}",
        where=ds.root,
        fix=(
            *([f"--folds {min(n_pool)}"] if min(n_pool) >= 2 else []),
            *([shlex.join(without)] if len(counts) - len(short) > 1 else []),
            *([shlex.join(together)] if len(counts) > 2 else []),
            f"more images: {in_all} groups of every class" + (", one for the test set" if len(held_out) else ""),
        ),
    )


def _class_orders(rows: IntArray, labels: IntArray, ids: StrArray, n: int, seed: int, purpose: str) -> list[IntArray]:
    """For each class its rows in the one order in which every subset draws them."""
    members = [rows[labels[rows] == c] for c in range(n)]
    return [m[hash_order(seed, f"{purpose}/{c}", ids[m].tolist())] for c, m in enumerate(members)]


def _take(orders: Sequence[IntArray], n: int) -> IntArray:
    """Class-balanced draw of ``n`` rows: the first ones of each class's order."""
    share = water_fill([len(order) for order in orders], n)
    return np.concatenate([order[:k] for order, k in zip(orders, share, strict=True)])


def _draw(orders: Sequence[IntArray], n: int | None, where: str, ds: ImageDataset) -> IntArray:
    there = sum(map(len, orders))
    if n is not None and n > there:
        raise ProtocolError(
            f"the subset is larger than the pool of {ds.name}", code="subset-too-large",
            expected=f"at most {there} training images", found=str(n), where=where,
            fix="--subset F takes all there are",
        )  # fmt: skip
    if n is not None and n < len(ds.class_names):
        raise ProtocolError(
            f"{n} training images cannot hold the {len(ds.class_names)} classes of {ds.name}", code="subset-too-small",
            where=where, fix=f"--subset {len(ds.class_names)} or more",
        )  # fmt: skip
    return _take(orders, there if n is None else n)


def _matched(orders: Sequence[IntArray], n: int, where: str, ds: ImageDataset) -> IntArray:
    share = water_fill([len(order) for order in orders], min(n, sum(map(len, orders))))
    if share.min() < 2:
        name = ds.class_names[int(share.argmin())]
        raise ProtocolError(
            "matched validation would have fewer than two images of a class", code="matched-too-small",
            expected="two images of every class", found=f"{share.min()} of {name!r} among {share.sum()}", where=where,
            fix=("--val full", *(["a larger --subset"] if len(orders[int(share.argmin())]) > 1 else [])),
        )  # fmt: skip
    return _take(orders, int(share.sum()))
