"""Reading the files of a store. Every byte is checked against its checksum before anything parses it.

::

    <store>/recipe.json            header: the recipe and how the store was created
            plan/000017.json       the rows that shard 17 owes
            shards/000017/         commit.json and the files that it vouches for
"""

from __future__ import annotations

import functools
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from embcache.errors import CorruptStoreError, StoreError
from embcache.io import is_folder, list_folder
from embcache.paths import home_dir
from embcache.sealed import unseal
from embcache.store.formats import FORMATS
from embcache.store.header import StoreHeader
from embcache.store.recipe import Recipe
from embcache.store.rows import Bytes, PlanEntry, RowIndex
from embcache.store.verified import Scratch, read_file, read_into, refusals_told

_T = TypeVar("_T")
FOLDERS = ("plan", "shards", "leases", "staging")
_SLACK = 1 << 20  # bytes of fill values that a shard stored otherwise need not hold
_NUMBER = re.compile(r"\d{6,}")


@dataclass(frozen=True)
class CommitRecord:
    """What ``commit.json`` says of a shard: its rows, and ``{name: (size, crc32c)}`` of each file.

    ``batch_size`` and ``threads`` are those that it was computed with, None where they are the store's.
    """

    rows: int
    files: Mapping[str, tuple[int, str]]
    batch_size: int | None = None
    threads: int | None = None


@dataclass(frozen=True)
class LiveRows:
    """The rows of a store that no later shard supersedes, in shard order."""

    ids: list[str]
    valid: np.ndarray  # (n,); false where the image could not be read
    digests: list[str]
    reasons: list[str]
    shards: np.ndarray
    positions: np.ndarray
    shard_rows: dict[int, int]  # rows of every committed shard, superseded ones included


def shard_name(number: int) -> str:
    """Folder of a shard, and stem of its plan: ``000017``."""
    return f"{number:06d}"


def misplaced(store: Path) -> list[Path]:
    """What lies where a store has its folders and is no real folder: a link could lead out of the home."""
    paths = [store / name for name in FOLDERS]
    return [path for path in paths if os.path.lexists(path) and not is_folder(path)]


def check_folders(store: Path) -> None:
    """Raise a CorruptStoreError where `misplaced` finds anything: nothing is read or written through it."""
    for path in misplaced(store):
        raise CorruptStoreError(
            "a folder of a feature store is not a real folder",
            expected="a folder",
            found="a link" if path.is_symlink() else "a file",
            where=path,
            fix="move the folder itself there, or remove what is in its place",
        )


def read_header(store: Path) -> StoreHeader:
    """Read and check ``recipe.json``."""
    check_folders(store)
    path = store / "recipe.json"
    fix = recipe_fix(store)
    content = unseal(read_file(path, fix), path, fix)
    try:
        recipe = Recipe.from_json(content["recipe"])
        header = StoreHeader(
            recipe=recipe,
            format=content["format"],
            row_shape=tuple(content["row_shape"]),  # what it holds is the header's to check
            rows_per_shard=content["rows_per_shard"],
            batch_size=content["batch_size"],
            threads=content["threads"],
            provenance=content["provenance"],
        )
    except KeyError as error:
        raise CorruptStoreError("recipe.json lacks a key", expected=str(error), where=path, fix=fix) from error
    except TypeError as error:  # sealed by who knows whom: the checksum says nothing of what it covers
        raise _not_ours("recipe.json", error, path, fix) from error
    if recipe.fingerprint != content.get("fingerprint") or not store.name.endswith("-" + recipe.fingerprint[:12]):
        raise CorruptStoreError(
            "a store's recipe is not the one that names it",
            expected=recipe.fingerprint,
            found=f"{str(content.get('fingerprint'))[:80]} in a folder called {store.name}",
            where=path,
            fix=fix,
        )
    if header.format not in FORMATS:
        raise StoreError(
            "a store has a format that this version of embcache does not read",
            expected=" | ".join(FORMATS),
            found=header.format,
            where=path,
            fix="pip install --upgrade embcache",
        )
    return header


def plan_numbers(store: Path) -> list[int]:
    """Numbers of the published plans, ascending."""
    listed = _listing(store / "plan", os.DirEntry.is_file)
    return _numbers(name.removesuffix(".json") for name in listed if name.endswith(".json"))


def committed_numbers(store: Path) -> list[int]:
    """Numbers of the committed shards, ascending."""
    return _numbers(_listing(store / "shards", os.DirEntry.is_dir))


def read_plan(store: Path, number: int) -> tuple[PlanEntry, ...]:
    """Read the rows that a shard owes."""
    path = store / "plan" / f"{shard_name(number)}.json"
    fix = f"`{repair_command(store)}`"
    content = unseal(read_file(path, fix), path, fix, indent=None)
    if content.get("number") != number:
        raise CorruptStoreError(
            "a plan lies under another number", found=f"plan {content.get('number')}", where=path, fix=fix
        )
    try:
        return tuple(PlanEntry(*row) for row in content["rows"])
    except (KeyError, TypeError, StoreError) as error:
        raise _not_ours("a plan", error, path, fix) from error


def read_commit(store: Path, number: int) -> CommitRecord:
    """Read what a shard's ``commit.json`` vouches for."""
    path = store / "shards" / shard_name(number) / "commit.json"
    try:
        return read_commit_file(path, _recompute(path.parent))
    except CorruptStoreError as error:
        if is_folder(path.parent):
            raise
        raise CorruptStoreError(
            "a shard is not there any more",
            found="no folder: `embcache gc` may have removed it since it was listed",
            where=path.parent,
            fix=f"run the same command again; if it fails again, {_recompute(path.parent)}",
        ) from error


def read_commit_file(path: Path, fix: str = "") -> CommitRecord:
    """As :func:`read_commit`, of a ``commit.json`` wherever it lies."""
    return _parse_commit(read_file(path, fix), path, fix)


# Read with the index and, streamed, each epoch: a cache with less room than there are shards would never be of use.
@functools.lru_cache(maxsize=1 << 15)
def _parse_commit(data: bytes, path: Path, fix: str) -> CommitRecord:
    content = unseal(data, path, fix)
    try:
        files = {name: (_count(entry["size"]), str(entry["crc32c"])) for name, entry in content["files"].items()}
        rows = _count(content["rows"])
        # Only where they differ from what the store was created with.
        batch_size, threads = (_count(content[k]) if k in content else None for k in ("batch_size", "threads"))
    except (KeyError, TypeError, AttributeError) as error:
        raise _not_ours("a commit", error, path, fix) from error
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise CorruptStoreError("a commit names a file outside its shard", found=name, where=path, fix=fix)
    return CommitRecord(rows, files, batch_size, threads)


def _count(value: object) -> int:
    """A number of bytes or rows as JSON has it; TypeError where it is none."""
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is not a number of bytes or rows")
    return value


def _not_ours(what: str, error: Exception, path: Path, fix: str) -> CorruptStoreError:
    """The error for a sealed file that embcache cannot have written."""
    found = f"lacks {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
    return CorruptStoreError(f"{what} is not as embcache writes it", found=found[:200], where=path, fix=fix)


def read_index(store: Path, header: StoreHeader, number: int) -> RowIndex:
    """Read a shard's rows without their features."""
    form, record = FORMATS[header.format], read_commit(store, number)
    # Arrays are made by these numbers before the features are looked at.
    row = np.dtype(header.recipe.dtype).itemsize * math.prod(header.row_shape)
    held = sum(size for size, _ in record.files.values())
    if record.rows > header.rows_per_shard or record.rows * row > held + _SLACK:
        _refuse(store, number, f"at most {header.rows_per_shard} rows of {row} bytes", f"{record.rows} in {held} bytes")
    names = form.index_files(record.files)
    files = _read_committed(store, number, record, names)
    _check_sizes(store, number, record, set(record.files).difference(names))
    index = _decode(form.decode_index, files, store, number)
    lengths = {len(index.ids), len(index.valid), len(index.digests), len(index.reasons), record.rows}
    if len(lengths) != 1 or index.valid.dtype != np.bool_:
        _refuse(store, number, f"{record.rows} rows", f"{len(index.ids)} ids, {len(index.valid)} of valid")
    return index


def read_features(store: Path, header: StoreHeader, number: int) -> np.ndarray:
    """Read a shard's features, ``(n, *row_shape)`` of the recipe's dtype, rows that are not valid included."""
    form, record = FORMATS[header.format], read_commit(store, number)
    files = _read_committed(store, number, record, form.feature_files(record.files))
    features = _decode(form.decode_features, files, store, number)
    _check_shape(store, header, number, record, features.shape, features.dtype)
    return features


def read_rows(
    store: Path, header: StoreHeader, number: int, positions: np.ndarray, out: np.ndarray, scratch: Scratch
) -> None:
    """Read some rows of a shard's features into an array: those of `read_features`, with fewer copies.

    Shapes: positions (m,); out (m, *row_shape).
    """
    form, record = FORMATS[header.format], read_commit(store, number)
    folder = store / "shards" / shard_name(number)
    fix = _recompute(folder)
    sizes = {name: size for name, (size, _) in record.files.items()}

    def verified(name: str) -> bytes:
        return read_file(folder / name, fix, record.files[name])

    plain = _decode(lambda _: form.plain_features(verified, sizes), {}, store, number)
    first, n = int(positions[0]), len(positions)
    run = bool((np.diff(positions) == 1).all())
    if plain is None:
        names = form.feature_files(record.files)
        _check_sizes(store, number, record, names)
        memory = np.split(scratch.take(sum(sizes[name] for name in names)), np.cumsum([sizes[name] for name in names]))
        for name, target in zip(names, memory, strict=False):
            read_into(folder / name, fix, record.files[name], [target])
        files = {name: data.data.toreadonly() for name, data in zip(names, memory, strict=False)}
        features = _decode(form.decode_features, files, store, number)
        _check_shape(store, header, number, record, features.shape, features.dtype)
        out[...] = features[first : first + n] if run else features[positions]
        return
    _check_shape(store, header, number, record, plain.shape, plain.dtype)
    _check_sizes(store, number, record, [plain.file])
    size, row = sizes[plain.file], out.dtype.itemsize * math.prod(header.row_shape)
    if run:
        head, body = first * row, n * row
        rest = scratch.take(max(head, size - head - body))  # read only to be checked
        targets = [rest[:head], out.reshape(-1).view(np.uint8), rest[: size - head - body]]
        read_into(folder / plain.file, fix, record.files[plain.file], targets)
    else:
        data = scratch.take(size)
        read_into(folder / plain.file, fix, record.files[plain.file], [data])
        out[...] = data[: record.rows * row].view(plain.dtype).reshape(plain.shape)[positions]


def unless_collected(store: Path, look: Callable[[], _T]) -> _T:
    """What ``look`` finds in a store, asked again where `embcache gc` removed what it had listed and not yet read."""
    while True:
        listed = {*plan_numbers(store)}, {*committed_numbers(store)}
        try:
            return look()
        except CorruptStoreError:
            if listed[0] <= {*plan_numbers(store)} and listed[1] <= {*committed_numbers(store)}:
                raise


def read_plans(store: Path) -> dict[int, tuple[PlanEntry, ...]]:
    """Rows that each published shard owes or owed, by number, ascending; raises as `read_plan`."""
    return unless_collected(store, lambda: {number: read_plan(store, number) for number in plan_numbers(store)})


def read_live(store: Path, header: StoreHeader, numbers: Sequence[int] | None = None) -> LiveRows:
    """Find the live rows: each id's row in the highest committed shard that holds it.

    With ``numbers``, ascending, as if only these shards were committed.
    """
    if numbers is None:
        return unless_collected(store, lambda: read_live(store, header, committed_numbers(store)))
    indexes = [read_index(store, header, number) for number in numbers]
    ids = [id_ for index in indexes for id_ in index.ids]
    lengths = [len(index.ids) for index in indexes]
    last = dict(zip(ids, range(len(ids)), strict=True))  # of the rows of an id, the last one stays
    kept = range(len(ids)) if len(last) == len(ids) else sorted(last.values())
    rows = np.array(kept, dtype=np.int64)
    digests = [digest for index in indexes for digest in index.digests]
    reasons = [reason for index in indexes for reason in index.reasons]
    return LiveRows(
        ids=[ids[k] for k in kept],
        valid=np.concatenate([np.zeros(0, bool), *(index.valid for index in indexes)])[rows],
        digests=[digests[k] for k in kept],
        reasons=[reasons[k] for k in kept],
        shards=np.repeat(np.array(numbers, dtype=np.int64), lengths)[rows],
        positions=np.concatenate([np.zeros(0, np.int64), *(np.arange(n) for n in lengths)])[rows],
        shard_rows=dict(zip(numbers, lengths, strict=True)),
    )


def row_sources(live: LiveRows, plans: Mapping[int, Sequence[PlanEntry]]) -> list[PlanEntry]:
    """The source of each live row: size and time as its own shard's plan has them, the digest that was decoded."""
    planned = {number: {entry.id: entry for entry in plans.get(number, ())} for number in set(live.shards.tolist())}
    rows = zip(live.ids, live.shards.tolist(), live.digests, strict=True)
    found = [(planned[shard].get(id_, PlanEntry(id_, -1, -1)), digest) for id_, shard, digest in rows]
    return [PlanEntry(entry.id, entry.size, entry.mtime_ns, digest or None) for entry, digest in found]


def _check_sizes(store: Path, number: int, record: CommitRecord, names: Iterable[str]) -> None:
    """Refuse files that are not as long as the commit says, before anything is read or memory taken for it."""
    for name in names:
        # Features are read when they are asked for; that none of them is cut short is known at once.
        size, path = record.files[name][0], store / "shards" / shard_name(number) / name
        with refusals_told(path, _recompute(path.parent)):
            try:
                there = path.lstat().st_size
            except (FileNotFoundError, NotADirectoryError):
                there = -1
        if there != size:
            _refuse(store, number, f"{size} bytes in {name}", f"{there} bytes" if there >= 0 else "no such file")


def _check_shape(
    store: Path, header: StoreHeader, number: int, record: CommitRecord, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> None:
    expected = (record.rows, *header.row_shape)
    if shape != expected or dtype != np.dtype(header.recipe.dtype):
        _refuse(store, number, f"{header.recipe.dtype} {expected}", f"{dtype} {shape}")


def _read_committed(store: Path, number: int, record: CommitRecord, names: Iterable[str]) -> dict[str, bytes]:
    folder = store / "shards" / shard_name(number)
    fix = _recompute(folder)
    # Joined as texts: there are thousands of files, and a Path takes longer to make than such a file to read.
    return {name: read_file(f"{folder}/{name}", fix, record.files[name]) for name in names}


def _decode(decode: Callable[[Mapping[str, Bytes]], _T], files: Mapping[str, Bytes], store: Path, number: int) -> _T:
    try:
        return decode(files)
    except StoreError:
        raise
    except Exception as error:  # zarr and h5py raise many kinds; the bytes match, so the shard was made elsewhere
        folder = store / "shards" / shard_name(number)
        raise CorruptStoreError(
            "a shard cannot be decoded", found=f"{type(error).__name__}: {error}", where=folder, fix=_recompute(folder)
        ) from error


def _refuse(store: Path, number: int, expected: str, found: str) -> None:
    folder = store / "shards" / shard_name(number)
    raise CorruptStoreError(
        "a shard does not hold what its store promises",
        expected=expected,
        found=found,
        where=folder,
        fix=_recompute(folder),
    )


def repair_command(store: Path) -> str:
    """The command that mends a store, to be typed."""
    return _repair_command(str(store), os.environ.get("EMBCACHE_HOME"))


def recipe_fix(store: Path) -> str:
    """What to do about a damaged ``recipe.json``: nothing else says what the features are."""
    return f"restore it from a copy, or move the store away and extract again: mv {shlex.quote(str(store))} FOLDER"


@functools.lru_cache(maxsize=256)  # asked for with each file that is read, told with the one that is damaged
def _repair_command(store: str, _: str | None) -> str:
    path = Path(store)
    backbone = re.sub(r"-[0-9a-f]{12}$", "", path.name)
    words = ["embcache", "verify", "--repair", "--dataset", path.parent.name, "--backbone", backbone]
    home = path.parent.parent
    return shlex.join(words if home == home_dir() else [*words, "--home", str(home)])


def _recompute(folder: Path) -> str:
    return f"`{repair_command(folder.parent.parent)}`: it recomputes this shard only"


def _listing(folder: Path, kind: Callable[..., bool]) -> list[str]:
    with refusals_told(folder, ""):
        return [entry.name for entry in list_folder(folder) if kind(entry, follow_symlinks=False)]


def _numbers(names: Iterable[str]) -> list[int]:
    return sorted(int(name) for name in names if _NUMBER.fullmatch(name) and name == shard_name(int(name)))
