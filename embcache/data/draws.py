"""Primitives from which splits are made: order by hash, group-respecting folds, balanced draws.

Everything here is integer arithmetic and SHA-256, so that the same dataset and seed give the same split on any machine
and under any version of any library. Which images they are applied to is decided in ``embcache.probe.protocol``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

IntArray = NDArray[np.int64]


def hash_order(seed: int, purpose: str, keys: Sequence[str]) -> IntArray:
    """Indices that put ``keys`` into a pseudo-random order: by SHA-256 of seed, purpose and key.

    Shapes: returns (n,).
    """
    prefix = hashlib.sha256(f"{seed}\0{purpose}\0".encode())
    digests = []
    for key in keys:
        digest = prefix.copy()
        digest.update(key.encode("utf-8"))
        digests.append(digest.digest())
    return np.asarray(sorted(range(len(digests)), key=digests.__getitem__), dtype=np.int64)


def water_fill(counts: ArrayLike, n: int) -> IntArray:
    """How many of each class to draw so that ``n`` are drawn in all and the classes are as equal as they can be.

    Classes fill like connected vessels: all to one level, a class that runs out stays at its count. What is left below
    a full level goes, one each, to the classes that have more (ties: the lower class index). Raising ``n`` never
    lowers a class, so draws of growing size are nested.

    Shapes: counts (n_classes,); returns (n_classes,).
    """
    have = np.asarray(counts, dtype=np.int64)
    if not 0 <= n <= have.sum():
        raise ValueError(f"cannot draw {n} of {have.sum()}")
    low, high = 0, int(have.max(initial=0))
    while low < high:  # the highest level whose filling takes at most n
        level = (low + high + 1) // 2
        low, high = (level, high) if np.minimum(have, level).sum() <= n else (low, level - 1)
    take = np.minimum(have, low)
    by_count = sorted(np.flatnonzero(have > low), key=lambda c: (-have[c], c))
    take[by_count[: n - int(take.sum())]] += 1
    return take


def stratified_group_folds(
    labels: ArrayLike, groups: Sequence[str], n_folds: int, seed: int, purpose: str = "folds"
) -> IntArray:
    """Assign every row to one of ``n_folds`` folds: classes spread evenly, no group divided.

    Groups of several rows are placed first, the ones that weigh most in their classes before the others, each into the
    fold that lacks most of its classes, else has the least of them; single rows then level the folds class by class.
    Among equals the order is by hash of seed and group.

    Shapes: labels (n,); returns (n,).
    """
    if n_folds < 2:
        raise ValueError(f"at least two folds are needed, not {n_folds}")
    y = np.unique(np.asarray(labels), return_inverse=True)[1].reshape(-1)
    names, group = np.unique(np.array([str(g) for g in groups], dtype=object), return_inverse=True)
    group = group.reshape(-1)
    if len(y) != len(group):
        raise ValueError(f"{len(y)} labels but {len(group)} groups")
    if not len(y):
        return np.empty(0, dtype=np.int64)
    n_classes = int(y.max()) + 1
    per_group = np.zeros((len(names), n_classes), dtype=np.int64)  # rows of each class in each group
    np.add.at(per_group, (group, y), 1)
    size = per_group.sum(1)
    # 2**52 is "all of a class, squared": fractions of a class as integers, so that no rounding differs between machines
    weight = 2**52 // per_group.sum(0) ** 2
    order = hash_order(seed, purpose, names.tolist())

    load = np.zeros((n_folds, n_classes), dtype=np.int64)  # rows of each class in each fold so far
    fold_of = np.empty(len(names), dtype=np.int64)
    large = order[size[order] > 1]
    for g in large[np.argsort(-(per_group[large] ** 2 * weight).sum(1), kind="stable")]:
        rows = per_group[g]
        lacking = ((load == 0) & (rows > 0)).sum(1)
        crowding = (load * rows * weight).sum(1)
        fold = int(np.lexsort((load.sum(1), crowding, -lacking))[0])
        fold_of[g] = fold
        load[fold] += rows
    single = order[size[order] == 1]
    class_of = per_group[single].argmax(1)
    for c in range(n_classes):
        members = single[class_of == c]
        share = _level(load[:, c], len(members), load.sum(1))
        fold_of[members] = np.repeat(np.arange(n_folds), share)
        load[:, c] += share
    return fold_of[group]


def _level(heights: IntArray, n: int, tie: IntArray) -> IntArray:
    """How many of ``n`` equal blocks to put on each column so that the tops are level; remainders by lowest ``tie``."""
    low, high = int(heights.min()), int(heights.max()) + n
    while low < high:  # the highest top that n blocks can pay for
        top = (low + high + 1) // 2
        low, high = (top, high) if np.maximum(top - heights, 0).sum() <= n else (low, top - 1)
    share = np.maximum(low - heights, 0)
    reachable = [f for f in np.argsort(tie, kind="stable") if heights[f] <= low]
    share[reachable[: n - int(share.sum())]] += 1
    return share
