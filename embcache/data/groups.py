"""Groups: images that may never be on both sides of a split. Byte-identical files always belong together."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pandas as pd

from embcache.data.files import has_dicom_suffix, is_image_name
from embcache.data.tables import unify
from embcache.errors import DatasetError, first_few

if TYPE_CHECKING:
    from embcache.data.dataset import ImageDataset

_PROBE = 4096  # bytes read from the start, middle and end of files of equal size before they are hashed whole
_READERS, _TOGETHER = 4, 256  # threads that read files, and files per task of a thread

_T = TypeVar("_T")

UNGROUPED = "no group column: every image counts as a patient of its own"

_NO_VALUE = {"", "nan", "none", "null", "na", "n/a", "<na>", "nat"}

LOOKED_AT_LOADING = 200_000
"""Size of the largest dataset whose identical files are looked for at loading. In larger ones, the digests that are
taken while decoding group the same images when features are probed."""

DEFERRED = (
    "byte-identical images are not looked for at loading: there are too many; those decoded are grouped by digest"
)

FEWEST_GROUPS = 10
"""A column with fewer distinct values (a site, a scanner, left and right) is only taken for groups if it is named."""


def merge_groups(groups: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Join all groups that share a key, directly or through others."""
    if not any(keys):
        return list(groups)
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


def known_groups(values: Sequence[str]) -> list[str]:
    """Values of a column of groups in one spelling; empty where they say that there is none (nan, null, N/A …)."""
    spelling = unify(values).of
    spelling |= {value: "" for value in spelling if len(value) < 9 and value.strip().casefold() in _NO_VALUE}
    return [spelling[value] for value in values]


def unfit_groups(values: Sequence[str], labels: Sequence[int]) -> str:
    """Why values are not taken for groups unless they are named; empty where they may be."""
    distinct = set(values) - {""}
    if len(distinct) < 2:
        return f"it has {len(distinct)} value{'s' if not distinct else ''}"
    pairs = {(label, value) for label, value in zip(labels, values, strict=True) if label >= 0 and value}
    if pairs and len(pairs) == len({label for label, _ in pairs}):
        return "it follows from the label"
    return f"it has {len(distinct)} values, fewer than {FEWEST_GROUPS}" if len(distinct) < FEWEST_GROUPS else ""


def join_groups(ds: ImageDataset, sizes: Mapping[str, int | None], *, merge_identical: bool) -> ImageDataset:
    """Join the groups of one DICOM patient's images and of byte-identical files, with notes; ``sizes`` by path.

    Rows whose file is not there join nothing.
    """
    ds = _group_patients(ds, sizes) if UNGROUPED in ds.notes else ds
    if not merge_identical:
        return ds.with_notes(*overlap_notes(ds.table))
    if len(ds) > LOOKED_AT_LOADING:
        return ds.with_notes(DEFERRED, *overlap_notes(ds.table))
    digests = identical_files(ds.root, {path: size for path, size in sizes.items() if size}) if ds.root else {}
    keys = [digests.get(path, "") for path in ds.table["path"].tolist()]
    table = ds.table.assign(group=merge_groups(ds.table["group"].tolist(), keys))
    notes = duplicate_notes(table, keys, ds.class_names) + overlap_notes(table)
    return replace(ds, table=table).with_notes(*notes)


def _group_patients(ds: ImageDataset, sizes: Mapping[str, int | None]) -> ImageDataset:
    """Groups by the PatientID of DICOM files, where there is no column.

    Each group is named after the first of its images: a PatientID is kept nowhere.
    """
    paths = ds.table["path"].tolist()
    if ds.root is None or not may_be_dicom(paths):
        return ds
    if len(ds) > LOOKED_AT_LOADING:
        return ds.with_notes(f"the PatientID of DICOM files is not looked at: there are {len(ds):,} images")
    try:
        patients = patient_keys(ds.root, [path if sizes[path] is not None else "" for path in paths])
    except DatasetError as error:  # pydicom is not installed: the features may be there without it
        return ds.with_notes(f"PatientID is not read: {error.problem}; {error.fix}")
    if patients is None:
        return ds
    if why := unfit_groups(patients, ds.labels.tolist()):
        return ds.with_notes(f"the PatientID of the DICOM files is not taken for groups: {why}")
    lacking, known = patients.count(""), len(set(patients) - {""})
    note = f"groups are those of the PatientID in the DICOM files ({known:,} patients), named after an image of each"
    notes = [note if each == UNGROUPED else each for each in ds.notes]
    notes += [f"{lacking:,} of {len(ds):,} images have no PatientID: each is a group of its own"] if lacking else []
    table = ds.table.assign(group=merge_groups(ds.table["id"].tolist(), patients))
    return replace(ds, table=table, notes=tuple(notes))


def identical_files(root: Path, sizes: Mapping[str, int]) -> dict[str, str]:
    """sha256 (hex) of each file that another file equals byte for byte; all others are absent.

    Only files of equal size, then of equal beginning, middle and end, are read whole.
    """
    by_size: dict[int, list[str]] = defaultdict(list)
    for path, size in sizes.items():
        if size:
            by_size[size].append(path)
    alike = [path for paths in by_size.values() if len(paths) > 1 for path in paths]
    by_excerpt: dict[tuple[int, bytes], list[str]] = defaultdict(list)
    for path, excerpt in zip(alike, _in_threads(_excerpt, root, alike), strict=True):
        by_excerpt[sizes[path], excerpt].append(path)
    by_digest: dict[str, list[str]] = defaultdict(list)
    suspects = [path for paths in by_excerpt.values() if len(paths) > 1 for path in paths]
    for path, digest in zip(suspects, _in_threads(_digest, root, suspects), strict=True):
        by_digest[digest].append(path)
    return {path: digest for digest, paths in by_digest.items() if len(paths) > 1 for path in paths}


def duplicate_notes(table: pd.DataFrame, keys: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """Notes on byte-identical images: how many there are, and which carry different labels."""
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
    """A note on groups that occur in the test split and outside it."""
    test = table["split"] == "test"
    shared = set(table.loc[test, "group"].tolist()) & set(table.loc[~test, "group"].tolist())
    if not shared:
        return []
    in_training = int(table.loc[~test, "group"].isin(shared).sum())
    return [
        f"{len(shared):,} groups occur in both train and the official test set ({in_training:,} training images): "
        "embcache probe --exclude-test-overlap leaves those out of training"
    ]


def may_be_dicom(paths: Sequence[str]) -> bool:
    """Whether a path has a DICOM file's suffix, or none of an image."""
    suffixes = {path[path.rfind(".") :] for path in paths if path}  # one look at them, for there may be many paths
    return not all(is_image_name(f"a{suffix}") and not has_dicom_suffix(suffix) for suffix in suffixes)


def patient_keys(root: Path, paths: Sequence[str]) -> list[str] | None:
    """PatientID of each path that is a DICOM file's, else empty; None where no path is one."""
    if not may_be_dicom(paths):
        return None
    readable = [k for k, path in enumerate(paths) if path and (has_dicom_suffix(path) or not is_image_name(path))]
    if not readable:
        return None
    from embcache.data.dicom import dicom_patient, is_dicom  # imports a decoder

    def look(path: str) -> str | None:
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116  # a pipe would never answer
            return None
        with open(path, "rb") as file:  # noqa: PTH123
            known = is_dicom(file.read(132), path)
            file.seek(0)
            return dicom_patient(file, path) if known else None

    keys = [""] * len(paths)
    found = list(_in_threads(look, root, [paths[k] for k in readable]))
    for k, patient in zip(readable, found, strict=True):
        keys[k] = patient or ""
    return known_groups(keys) if any(patient is not None for patient in found) else None


def _in_threads(look: Callable[[str], _T], root: Path, paths: Sequence[str]) -> Iterator[_T]:
    """The result of ``look`` for each file, in order; several are read at once, for a disk has its latency."""
    base = os.path.join(root, "")  # noqa: PTH118  # paths are joined as texts: there are hundreds of thousands

    def some(start: int) -> list[_T]:
        return [look(base + path) for path in paths[start : start + _TOGETHER]]

    if len(paths) <= _TOGETHER:
        yield from some(0)
        return
    with ThreadPoolExecutor(_READERS) as pool:
        for found in pool.map(some, range(0, len(paths), _TOGETHER)):
            yield from found


def _excerpt(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        start = os.read(descriptor, 3 * _PROBE)
        if len(start) < 3 * _PROBE:
            return start if len(start) < 32 else hashlib.sha256(start).digest()
        size = os.fstat(descriptor).st_size
        parts = [start[:_PROBE]]
        for place in (size // 2, size - _PROBE):
            os.lseek(descriptor, place, os.SEEK_SET)
            parts.append(os.read(descriptor, _PROBE))
    finally:
        os.close(descriptor)
    return hashlib.sha256(b"".join(parts)).digest()


def _digest(path: str) -> str:
    with open(path, "rb") as file:  # noqa: PTH123
        return hashlib.file_digest(file, "sha256").hexdigest()
