"""Groups: images that may never be on both sides of a split; and splits by hash that respect them.

Groups come from a column of a table, from DICOM files, and from bytes: identical files always belong together.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import stat
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from embcache.config import DatasetRef
from embcache.data.files import has_dicom_suffix, is_image_name, is_object
from embcache.data.tables import named_column, plain_name, unify
from embcache.errors import DatasetError, first_few

if TYPE_CHECKING:
    from embcache.data.dataset import ImageDataset

_T = TypeVar("_T")
IntArray = NDArray[np.int64]

LOOKED_AT_LOADING = 200_000
"""Size of the largest dataset whose identical files are looked for at loading. In larger ones, the digests that are
taken while decoding group the same images when features are probed."""

FEWEST_GROUPS = 10
"""A column with fewer distinct values (a site, a scanner, left and right) is only taken for groups if it is named."""

UNGROUPED = "no group column: every image counts as a patient of its own"

_PROBE = 4096  # bytes read from the start, middle and end of files of equal size before they are hashed whole
_READERS, _TOGETHER = 4, 256  # threads that read files, and files per task of a thread
_NO_VALUE = {"", "nan", "none", "null", "na", "n/a", "<na>", "nat"}
_PLACEHOLDERS = frozenset(
    ("unknown", "unk", "not known", "anonymous", "anonymized", "missing", "-", "--", "?", "0", "-1", "x", "xxx")
)
_KEY = "(?:id|ids|uid|instanceuid|key|code|hash|identifier|barcode|anon|pseudonym)?"
_GROUPS = tuple(  # coarse to fine: of columns that nest in each other both ways the first is taken
    re.compile(pattern)
    for pattern in (
        rf"(?:anon(?:ymi[sz]ed)?|pseudo(?:nymi[sz]ed)?|deid(?:entified)?|dicom)?(?:patient|patienten|paciente|subject|subj|"
        rf"participant|proband|person|individual|donor|animal|mouse|case|empi|mrn)(?:{_KEY}|number|num|no|nr|name|index)",
        r"(?:pat|pt|group)(?:id|uid|key|code)",
        rf"(?:study|exam|examination|accession|acc)(?:{_KEY}|number)",
        rf"(?:specimen|biopsy|block){_KEY}",
        rf"(?:slide|wsi|wholeslide|wholeslideimage|slidename){_KEY}",
        rf"(?:series|volume|scan|video|clip){_KEY}",
        r"(?:eye|breast|knee|lesion|nodule|polyp|cell)(?:id|uid|key)",
    )
)
_PEOPLE = re.compile(
    r"birth|dob$|mrn|accession|address|phone|email|ssn$|insurance|physician|doctor|operator|surname|^name$|"
    r"(?:patients?|subject|person|participant|first|last|middle|family|given|full|maiden)names?$"
)


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
    spelling = unify(values)
    spelling |= {value: "" for value in spelling if len(value) < 9 and value.strip().casefold() in _NO_VALUE}
    return [spelling[value] for value in values]


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


# By a column


def find_groups(
    table: pd.DataFrame, ref: DatasetRef, labels: Sequence[int], ids: Sequence[str], *, where: Path, refuse: bool = True
) -> tuple[list[str] | None, str, list[str]]:
    """Groups by a column of a table (the one named, ``group``, or one with a usual name), the column, and notes.

    Of several the coarsest counts, if the others nest in it. One that is constant, follows from the label or has
    few values is only taken if it is named.
    """
    header = [str(name) for name in table.columns]
    own = [name for name in header if plain_name(name) == "group"]
    column = named_column(header, ref, "group") or ("group" if "group" in own else own[0] if len(own) == 1 else "")
    notes = list[str]()
    candidates = {column: known_groups(table[column].tolist())} if column else _candidates(table, labels, notes)
    if not candidates:
        return None, "", notes
    coarsest = [c for c in candidates if all(_nests(candidates[other], candidates[c]) for other in candidates)]
    if not coarsest:
        problem = f"{len(candidates)} columns could be the groups, and they do not nest in one of them"
        seen = ", ".join(f"{name} ({len(set(v) - {''}):,} values)" for name, v in candidates.items())
        if not refuse:
            return None, "", [*notes, f"no groups: {problem}: {seen}; --group-column NAME takes one"]
        raise DatasetError(
            problem, code="columns-ambiguous", found=seen, where=where,
            expected="a column 'group', or the name of the column by which images stay together",
            fix=f"--group-column {shlex.quote(next(iter(candidates)))}",
        )  # fmt: skip
    guessed, column = not column, coarsest[0]
    groups, more = _as_groups(table[column].tolist(), ids)
    finer = [name for name in candidates if name != column]
    for other in finer if "" in candidates[column] else ():  # an image that lacks its patient may still have its study
        groups = merge_groups(groups, candidates[other])
    over = ", ".join(map(repr, finer))
    note = f"groups are those of the column {column!r} ({len(set(groups)):,} groups)"
    note += f", in which {over} nest" if over else ""
    note += "; --group-column names another" if guessed else ""
    return groups, column, [
        *([note] if column != "group" else []), *more, *_lacking(candidates[column], groups, over), *notes,
    ]  # fmt: skip


def _candidates(table: pd.DataFrame, labels: Sequence[int], notes: list[str]) -> dict[str, list[str]]:
    """Values of the columns with usual names that may be groups, the coarsest first; ``notes`` gets the others."""
    ranks = {str(name): rank for name in table.columns if (rank := _rank(str(name))) is not None}
    found = {name: known_groups(table[name].tolist()) for name in sorted(ranks, key=lambda name: ranks[name])}
    for name, values in list(found.items()):
        if why := _unfit(values, labels):
            notes.append(f"column {name!r} is not taken for groups: {why}; --group-column {shlex.quote(name)} takes it")
            del found[name]
    return found


def _unfit(values: Sequence[str], labels: Sequence[int]) -> str:
    """Why values are not taken for groups unless they are named; empty where they may be."""
    distinct = set(values) - {""}
    if len(distinct) < 2:
        return f"it has {len(distinct)} value{'s' if not distinct else ''}"
    pairs = {(label, value) for label, value in zip(labels, values, strict=True) if label >= 0 and value}
    if pairs and len(pairs) == len({label for label, _ in pairs}):
        return "it follows from the label"
    return f"it has {len(distinct)} values, fewer than {FEWEST_GROUPS}" if len(distinct) < FEWEST_GROUPS else ""


def _as_groups(values: Sequence[str], ids: Sequence[str]) -> tuple[list[str], list[str]]:
    known = known_groups(values)
    # A row without a group is a group of its own, whatever other groups are called.
    taken = set(known)
    groups = [g or (i if i not in taken else f"{i} (no group)") for g, i in zip(known, ids, strict=True)]
    several = len({value for value, group in zip(values, known, strict=True) if group}) - len(taken - {""})
    # Notes count such groups without names: these may name patients, and notes are printed in reports.
    differ = f"{several:,} names of groups differ from others only in Unicode form, spaces or invisible characters"
    notes = [f"{differ}: they are one group"] if several else []
    size = Counter(groups)
    alike = sum(n for n in Counter(name.casefold() for name in size).values() if n > 1)
    notes += [f"{alike:,} groups differ from another only in letter case: each is a group of its own"] if alike else []
    return groups, notes + [
        f"{size[name]:,} images are one group called {name!r}: if that stands for not known, leave such cells empty"
        for name in sorted(size)
        if name.casefold() in _PLACEHOLDERS and size[name] > 1
    ]


def _lacking(values: Sequence[str], groups: Sequence[str], over: str) -> list[str]:
    """Notes on rows without a value: groups of their own, or those that the columns ``over`` put into one."""
    size = Counter(groups)
    lacking = [size[group] for value, group in zip(values, groups, strict=True) if not value]
    alone, total = lacking.count(1), len(groups)
    notes = [f"{alone:,} of {total:,} images have no group: each is a group of its own"] if alone else []
    joined = f"{len(lacking) - alone:,} of {total:,} images lack it: they are in the group that {over} gives"
    return notes + ([joined] if over and len(lacking) > alone else [])


def may_name_people(column: str) -> bool:
    """Whether a column's name suggests that its values identify patients or other people, or are dates of birth."""
    return _rank(column) is not None or _PEOPLE.search(plain_name(column)) is not None


def _rank(name: str) -> int | None:
    plain = plain_name(name)
    return next((rank for rank, pattern in enumerate(_GROUPS) if pattern.fullmatch(plain)), None)


def _nests(fine: Sequence[str], coarse: Sequence[str]) -> bool:
    """Whether every value of ``fine`` lies in one value of ``coarse``, where both are known."""
    pairs = {(f, c) for f, c in zip(fine, coarse, strict=True) if f and c}
    return len(pairs) == len({f for f, _ in pairs})


# By what files hold


def join_groups(ds: ImageDataset, sizes: Mapping[str, int | None], *, merge_identical: bool) -> ImageDataset:
    """Join the groups of one DICOM patient's images and of byte-identical files, with notes; ``sizes`` by path.

    Rows whose file is not there join nothing.
    """
    ds = _group_patients(ds, sizes) if UNGROUPED in ds.notes else ds
    notes = list[str]()
    if merge_identical and (why := _not_looked_at(ds)):
        notes.append(f"byte-identical images are not looked for at loading: {why}; those decoded are grouped by digest")
    elif merge_identical and ds.root is not None:
        digests = identical_files(ds.root, sizes)
        keys = [digests.get(path, "") for path in ds.table["path"].tolist()]
        ds = replace(ds, table=ds.table.assign(group=merge_groups(ds.table["group"].tolist(), keys)))
        notes += _duplicate_notes(ds, keys)
    return ds.with_notes(*notes, *overlap_notes(ds.table))


def _not_looked_at(ds: ImageDataset) -> str:
    """Why the content of a dataset's files is not read at loading; empty where it is."""
    objects = any(map(is_object, ds.table["path"].tolist()))
    return "images are in an object store" * objects or f"there are {len(ds):,} images" * (len(ds) > LOOKED_AT_LOADING)


def _group_patients(ds: ImageDataset, sizes: Mapping[str, int | None]) -> ImageDataset:
    """Groups by the PatientID of DICOM files, where there is no column.

    Each group is named after the first of its images: a PatientID is kept nowhere.
    """
    paths = ds.table["path"].tolist()
    if ds.root is None or not _may_be_dicom(paths):
        return ds
    if why := _not_looked_at(ds):
        return ds.with_notes(f"the PatientID of DICOM files is not looked at: {why}")
    try:
        patients = patient_keys(ds.root, [path if sizes[path] is not None else "" for path in paths])
    except DatasetError as error:  # pydicom is not installed: the features may be there without it
        return ds.with_notes(f"PatientID is not read: {error.problem}; {error.fix}")
    if patients is None:
        return ds
    if why := _unfit(patients, ds.labels.tolist()):
        return ds.with_notes(f"the PatientID of the DICOM files is not taken for groups: {why}")
    lacking, known = patients.count(""), len(set(patients) - {""})
    note = f"groups are those of the PatientID in the DICOM files ({known:,} patients), named after an image of each"
    notes = [note if each == UNGROUPED else each for each in ds.notes]
    notes += [f"{lacking:,} of {len(ds):,} images have no PatientID: each is a group of its own"] if lacking else []
    table = ds.table.assign(group=merge_groups(ds.table["id"].tolist(), patients))
    return replace(ds, table=table, notes=tuple(notes))


def identical_files(root: Path, sizes: Mapping[str, int | None]) -> dict[str, str]:
    """sha256 (hex) of each file that another file equals byte for byte; all others are absent.

    Only files of equal size, then of equal beginning, middle and end, are read whole.
    """
    alike = _not_alone({path: size for path, size in sizes.items() if size})
    excerpts = dict(zip(alike, _in_threads(_excerpt, root, alike), strict=True))
    alike = _not_alone({path: (sizes[path], excerpt) for path, excerpt in excerpts.items()})
    digests = dict(zip(alike, _in_threads(_digest, root, alike), strict=True))
    return {path: digests[path] for path in _not_alone(digests)}


def _not_alone(keys: Mapping[str, object]) -> list[str]:
    together = defaultdict[object, list[str]](list)
    for path, key in keys.items():
        together[key].append(path)
    return [path for paths in together.values() if len(paths) > 1 for path in paths]


def _duplicate_notes(ds: ImageDataset, keys: Sequence[str]) -> list[str]:
    rows = [row for row, key in enumerate(keys) if key]
    if not rows:
        return []
    shown = [ds.task.words(value) for value in ds.labels[rows]]
    twins = ds.table.iloc[rows].assign(key=[keys[row] for row in rows], shown=shown)
    sets = twins["key"].nunique()
    notes = [f"{len(twins):,} images are byte-identical copies in {sets:,} sets: each set is one group"]
    conflicts = []
    for _, copies in twins[twins["label"] >= 0].groupby("key", sort=False):
        if copies["shown"].nunique() > 1:
            pairs = zip(copies["id"].tolist(), copies["shown"].tolist(), strict=True)
            conflicts.append(" = ".join(f"{i} ({value})" for i, value in pairs))
    if conflicts:
        notes.append(f"{len(conflicts):,} sets of identical images carry conflicting labels: {first_few(conflicts)}")
    return notes


def _may_be_dicom(paths: Sequence[str]) -> bool:
    suffixes = {path[path.rfind(".") :] for path in paths if path}  # one look at them, for there may be many paths
    return not all(is_image_name(f"a{suffix}") and not has_dicom_suffix(suffix) for suffix in suffixes)


def patient_keys(root: Path, paths: Sequence[str]) -> list[str] | None:
    """PatientID of each path that is a DICOM file's, else empty; None where no path is one."""
    readable = [k for k, path in enumerate(paths) if path and (has_dicom_suffix(path) or not is_image_name(path))]
    if not readable or not _may_be_dicom(paths):
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
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123
        start = file.read(3 * _PROBE)
        if len(start) == 3 * _PROBE:
            size, start = os.fstat(file.fileno()).st_size, start[:_PROBE]
            for place in (size // 2, size - _PROBE):
                file.seek(place)
                start += file.read(_PROBE)
    return hashlib.sha256(start).digest()


def _digest(path: str) -> str:
    with open(path, "rb") as file:  # noqa: PTH123
        return hashlib.file_digest(file, "sha256").hexdigest()


# Splits: integer arithmetic and SHA-256 alone, so that the same dataset and seed give the same split on any machine and
# under any version of any library. Which images they are applied to is decided in `embcache.probe.protocol`.


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
    """Assign every row to one of ``n_folds`` folds: classes, or findings, spread evenly, no group divided.

    Groups of several rows are placed first, the ones that weigh most in their classes before the others, each into the
    fold that lacks most of its classes, else has the least of them; single rows then level the folds class by class.
    Among equals the order is by hash of seed and group. With membership 0/1 of several strata per row (iterative
    stratification), single rows are placed as groups are.

    Shapes: labels (n,) or membership (n, S); returns (n,).
    """
    if n_folds < 2:
        raise ValueError(f"at least two folds are needed, not {n_folds}")
    given = np.asarray(labels)
    several = given.ndim == 2
    y = given if several else np.unique(given, return_inverse=True)[1].reshape(-1)
    names, group = np.unique(np.array([str(g) for g in groups], dtype=object), return_inverse=True)
    group = group.reshape(-1)
    if len(y) != len(group):
        raise ValueError(f"{len(y)} labels but {len(group)} groups")
    if not len(y):
        return np.empty(0, dtype=np.int64)
    n_classes = y.shape[1] if several else int(y.max()) + 1
    per_group = np.zeros((len(names), n_classes), dtype=np.int64)  # rows of each class in each group
    np.add.at(per_group, group if several else (group, y), y if several else 1)
    size = np.bincount(group)
    # 2**52 is "all of a class, squared": fractions of a class as integers, so that no rounding differs between machines
    weight = 2**52 // np.maximum(per_group.sum(0), 1) ** 2
    order = hash_order(seed, purpose, names.tolist())

    load = np.zeros((n_folds, n_classes), dtype=np.int64)  # rows of each class in each fold so far
    fold_of = np.empty(len(names), dtype=np.int64)
    large = order if several else order[size[order] > 1]
    for g in large[np.argsort(-(per_group[large] ** 2 * weight).sum(1), kind="stable")]:
        rows = per_group[g]
        lacking = ((load == 0) & (rows > 0)).sum(1)
        crowding = (load * rows * weight).sum(1)
        fold = int(np.lexsort((load.sum(1), crowding, -lacking))[0])
        fold_of[g] = fold
        load[fold] += rows
    single = order[:0] if several else order[size[order] == 1]
    class_of = per_group[single].argmax(1)
    for c in range(n_classes):
        members = single[class_of == c]
        share = _level(load[:, c], len(members), load.sum(1))
        fold_of[members] = np.repeat(np.arange(n_folds), share)
        load[:, c] += share
    return fold_of[group]


def spread_order(membership: IntArray, n: int, order: IntArray) -> IntArray:
    """The first ``n`` of some rows, in an order in which every prefix has strata as equal as it can be.

    Each next row is of the stratum that has the fewest so far, of equals the one with the fewest rows left, and among
    its rows the first by ``order``: iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011) towards equal
    counts. Rows of no stratum come last.

    Shapes: membership (m, S) of 0 and 1; order (m,), all rows; returns (n,).
    """
    queues = [order[membership[order, s] > 0] for s in range(membership.shape[1])]
    at, left = [0] * len(queues), np.array([len(queue) for queue in queues])
    have, taken = np.zeros(len(queues), dtype=np.int64), np.zeros(len(order), dtype=bool)
    chosen = list[int]()
    while len(chosen) < n and left.any():
        open_ = np.flatnonzero(left)
        s = int(open_[np.lexsort((left[open_], have[open_]))[0]])
        while taken[queues[s][at[s]]]:
            at[s] += 1
        row = int(queues[s][at[s]])
        taken[row] = True
        chosen.append(row)
        have += membership[row]
        left -= membership[row]
    rest = [row for row in order.tolist() if not taken[row]] if len(chosen) < n else []
    return np.array([*chosen, *rest][:n], dtype=np.int64)


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
