"""Groups: images that may never be on both sides of a split. Byte-identical files always belong together."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from embcache.data.checks import first_few

_PROBE = 4096  # bytes read from the start, middle and end of files of equal size before they are hashed whole


def merge_groups(groups: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Join all groups that share a key, directly or through others.

    Parameters
    ----------
    groups : sequence of str, length n
        Group of each row.
    keys : sequence of str, length n
        What rows may share (a digest, say); an empty key joins nothing.

    Returns
    -------
    list of str, length n
        Merged groups, each named after the smallest of its members: the names depend on neither the order of
        the rows nor that of the merges.
    """
    parent = {g: g for g in groups}

    def find(group: str) -> str:
        while parent[group] != group:
            parent[group] = parent[parent[group]]
            group = parent[group]
        return group

    first: dict[str, str] = {}
    for group, key in zip(groups, keys, strict=True):
        if key:
            a, b = find(group), find(first.setdefault(key, group))
            parent[max(a, b)] = min(a, b)
    return [find(group) for group in groups]


def identical_files(root: Path, sizes: Mapping[str, int]) -> dict[str, str]:
    """sha256 (hex) of each file that another file equals byte for byte; all others are absent.

    Only files of equal size, then of equal beginning, middle and end, are read whole.

    Parameters
    ----------
    root : Path
        The dataset's folder.
    sizes : mapping of str to int
        Size in bytes of each path relative to ``root``; empty files are never called equal.
    """
    by_size: dict[int, list[str]] = defaultdict(list)
    for path, size in sizes.items():
        if size:
            by_size[size].append(path)
    by_excerpt: dict[tuple[int, bytes], list[str]] = defaultdict(list)
    for size, paths in by_size.items():
        if len(paths) > 1:
            for path in paths:
                by_excerpt[size, _excerpt(root / path)].append(path)
    by_digest: dict[str, list[str]] = defaultdict(list)
    for paths in by_excerpt.values():
        if len(paths) > 1:
            for path in paths:
                by_digest[_digest(root / path)].append(path)
    return {path: digest for digest, paths in by_digest.items() if len(paths) > 1 for path in paths}


def duplicate_notes(table: pd.DataFrame, keys: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """What to say of byte-identical images: how many there are, and which carry different labels.

    Parameters
    ----------
    table : DataFrame
        With columns id and label.
    keys : sequence of str, one a row
        Digest of the files that another file equals, else empty.
    class_names : sequence of str
        Names of the labels.
    """
    twins = table.assign(key=list(keys))
    twins = twins[twins["key"] != ""]
    if twins.empty:
        return []
    sets = twins["key"].nunique()
    notes = [f"{len(twins):,} images are byte-identical copies in {sets:,} sets: each set is one group"]
    conflicts = []
    for _, copies in twins[twins["label"] >= 0].groupby("key", sort=False):
        if copies["label"].nunique() > 1:
            pairs = zip(copies["id"].tolist(), copies["label"].tolist(), strict=True)
            conflicts.append(" = ".join(f"{i} ({class_names[label]})" for i, label in pairs))
    if conflicts:
        notes.append(f"{len(conflicts):,} sets of identical images carry conflicting labels: {first_few(conflicts)}")
    return notes


def overlap_notes(table: pd.DataFrame) -> list[str]:
    """What to say of groups that occur in the test split and outside it."""
    test = table["split"] == "test"
    shared = set(table.loc[test, "group"].tolist()) & set(table.loc[~test, "group"].tolist())
    if not shared:
        return []
    in_training = int(table.loc[~test, "group"].isin(shared).sum())
    return [
        f"{len(shared):,} groups occur in both train and the official test set ({in_training:,} training images): "
        "--exclude-test-overlap leaves those out of training"
    ]


def _excerpt(path: Path) -> bytes:
    with path.open("rb", buffering=0) as file:  # three short reads: a buffer would only be filled and thrown away
        size = os.fstat(file.fileno()).st_size
        parts = []
        for start in (0, max(size // 2, 0), max(size - _PROBE, 0)):
            file.seek(start)
            parts.append(file.read(_PROBE))
    return hashlib.sha256(b"".join(parts)).digest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
