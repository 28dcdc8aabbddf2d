"""Reading the files of a store. Every byte is checked against its checksum before anything parses it.

::

    <store>/recipe.json            header: the recipe and how the store was created
            plan/000017.json       the rows that shard 17 owes
            shards/000017/         commit.json and the files that it vouches for
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from embcache.errors import CorruptStoreError, StoreError
from embcache.store.formats import FORMATS
from embcache.store.recipe import Recipe
from embcache.store.rows import NUMERIC_KINDS, PlanEntry, RowIndex, ShardRows
from embcache.store.sealed import crc32c, unseal

_T = TypeVar("_T")
_NUMBER = re.compile(r"\d{6,}")


@dataclass(frozen=True)
class StoreHeader:
    """What ``recipe.json`` says: the recipe, and what was settled when the store was created.

    Raises
    ------
    StoreError
        A size is not positive, or the recipe's dtype is not one of numbers.
    """

    recipe: Recipe
    format: str
    row_shape: tuple[int, ...]
    rows_per_shard: int
    batch_size: int
    threads: int
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        if min(self.rows_per_shard, self.batch_size, self.threads, *self.row_shape) < 1:
            raise StoreError(
                "a store needs positive sizes",
                expected="rows_per_shard, batch_size, threads and every side of row_shape at least 1",
                found=f"{self.rows_per_shard}, {self.batch_size}, {self.threads}, {self.row_shape}",
            )
        try:
            numeric = np.dtype(self.recipe.dtype).kind in NUMERIC_KINDS
        except TypeError:
            numeric = False
        if not numeric:
            raise StoreError("features need a dtype of numbers", expected="such as float32", found=self.recipe.dtype)

    def check_rows(self, rows: ShardRows, planned: Sequence[str]) -> None:
        """Raise a StoreError unless ``rows`` are those of the plan, of this store's shape and dtype."""
        if list(rows.ids) != list(planned):
            raise StoreError(
                "a shard's rows are not those of its plan",
                expected=f"{len(planned)} ids in the plan's order",
                found=f"{len(rows.ids)} ids, {len(set(planned) & set(rows.ids))} of them planned",
            )
        if rows.features.shape[1:] != self.row_shape or rows.features.dtype != np.dtype(self.recipe.dtype):
            raise StoreError(
                "features do not fit their store",
                expected=f"{self.recipe.dtype} {(len(planned), *self.row_shape)}",
                found=f"{rows.features.dtype} {rows.features.shape}",
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, with the recipe's full fingerprint."""
        return {
            "fingerprint": self.recipe.fingerprint,
            "recipe": self.recipe.to_json(),
            "format": self.format,
            "row_shape": list(self.row_shape),
            "rows_per_shard": self.rows_per_shard,
            "batch_size": self.batch_size,
            "threads": self.threads,
            "provenance": dict(self.provenance),
        }


@dataclass(frozen=True)
class CommitRecord:
    """What ``commit.json`` says of a shard: its rows, and ``{name: (size, crc32c)}`` of each file."""

    rows: int
    files: Mapping[str, tuple[int, str]]


@dataclass(frozen=True)
class LiveRows:
    """The rows of a store that no later shard supersedes, in shard order.

    Parameters
    ----------
    ids, digests, reasons : list of str, length n
        As in the shards; a reason is ``""`` where the row is valid.
    valid : ndarray of bool, shape (n,)
        False where the image could not be read.
    shards, positions : ndarray of int64, shape (n,)
        Shard that holds the row, and its place in it.
    shard_rows : dict of int to int
        Rows of every committed shard, superseded ones included.
    """

    ids: list[str]
    valid: np.ndarray
    digests: list[str]
    reasons: list[str]
    shards: np.ndarray
    positions: np.ndarray
    shard_rows: dict[int, int]


def shard_name(number: int) -> str:
    """Folder of a shard, and stem of its plan: ``000017``."""
    return f"{number:06d}"


def read_header(store: Path) -> StoreHeader:
    """Read and check ``recipe.json``.

    Raises
    ------
    CorruptStoreError
        It is missing or damaged, does not hash to its fingerprint, or lies in another recipe's folder.
    """
    path = store / "recipe.json"
    fix = f"restore it from a copy; or `rm -r {shlex.quote(str(store))}` and extract again"
    content = unseal(_read(path, fix), path, fix)
    try:
        recipe = Recipe.from_json(content["recipe"])
        header = StoreHeader(
            recipe=recipe,
            format=content["format"],
            row_shape=tuple(content["row_shape"]),
            rows_per_shard=content["rows_per_shard"],
            batch_size=content["batch_size"],
            threads=content["threads"],
            provenance=content["provenance"],
        )
    except KeyError as error:
        raise CorruptStoreError("recipe.json lacks a key", expected=str(error), where=path, fix=fix) from error
    if recipe.fingerprint != content["fingerprint"] or not store.name.endswith("-" + recipe.fingerprint[:12]):
        raise CorruptStoreError(
            "a store's recipe is not the one that names it",
            expected=recipe.fingerprint,
            found=f"{content['fingerprint']} in a folder called {store.name}",
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
    return _numbers(path.stem for path in _listing(store / "plan") if path.suffix == ".json")


def committed_numbers(store: Path) -> list[int]:
    """Numbers of the committed shards, ascending."""
    return _numbers(path.name for path in _listing(store / "shards"))


def read_plan(store: Path, number: int) -> tuple[PlanEntry, ...]:
    """Read the rows that a shard owes.

    Raises
    ------
    CorruptStoreError
        The plan is missing or damaged.
    """
    path = store / "plan" / f"{shard_name(number)}.json"
    both = " ".join(shlex.quote(str(part)) for part in (path, store / "shards" / shard_name(number)))
    fix = f"`rm -rf {both}` and {_again(store)}: it plans and computes those images anew"
    content = unseal(_read(path, fix), path, fix, indent=None)
    if content.get("number") != number:
        raise CorruptStoreError(
            "a plan lies under another number", found=f"plan {content.get('number')}", where=path, fix=fix
        )
    return tuple(PlanEntry(*row) for row in content["rows"])


def read_commit(store: Path, number: int) -> CommitRecord:
    """Read what a shard's ``commit.json`` vouches for.

    Raises
    ------
    CorruptStoreError
        It is missing or damaged, or names a file outside its shard.
    """
    path = store / "shards" / shard_name(number) / "commit.json"
    fix = _recompute(path.parent)
    content = unseal(_read(path, fix), path, fix)
    files = {name: (entry["size"], entry["crc32c"]) for name, entry in content["files"].items()}
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CorruptStoreError("a commit names a file outside its shard", found=name, where=path, fix=fix)
    return CommitRecord(content["rows"], files)


def read_index(store: Path, header: StoreHeader, number: int) -> RowIndex:
    """Read a shard's rows without their features.

    Raises
    ------
    CorruptStoreError
        A file is missing or its bytes are not those that were committed.
    """
    form, record = FORMATS[header.format], read_commit(store, number)
    for name, (size, _) in record.files.items():
        # Features are read when they are asked for; that none of them is cut short is known at once.
        path = store / "shards" / shard_name(number) / name
        try:
            there = path.stat().st_size
        except FileNotFoundError:
            there = -1
        if there != size:
            _refuse(store, number, f"{size} bytes in {name}", f"{there} bytes" if there >= 0 else "no such file")
    files = _read_committed(store, number, record, form.index_files(record.files))
    index = _decode(form.decode_index, files, store, number)
    lengths = {len(index.ids), len(index.valid), len(index.digests), len(index.reasons), record.rows}
    if len(lengths) != 1 or index.valid.dtype != np.bool_:
        _refuse(store, number, f"{record.rows} rows", f"{len(index.ids)} ids, {len(index.valid)} of valid")
    return index


def read_features(store: Path, header: StoreHeader, number: int) -> np.ndarray:
    """Read a shard's features, ``(n, *row_shape)`` of the recipe's dtype, rows that are not valid included.

    Raises
    ------
    CorruptStoreError
        A file is missing or its bytes are not those that were committed.
    """
    form, record = FORMATS[header.format], read_commit(store, number)
    files = _read_committed(store, number, record, form.feature_files(record.files))
    features = _decode(form.decode_features, files, store, number)
    expected = (record.rows, *header.row_shape)
    if features.shape != expected or features.dtype != np.dtype(header.recipe.dtype):
        _refuse(store, number, f"{header.recipe.dtype} {expected}", f"{features.dtype} {features.shape}")
    return features


def read_live(store: Path, header: StoreHeader) -> LiveRows:
    """Find the live rows: each id's row in the highest committed shard that holds it."""
    indexes = {number: read_index(store, header, number) for number in committed_numbers(store)}
    where = {id_: (number, i) for number, index in indexes.items() for i, id_ in enumerate(index.ids)}
    places = sorted(where.values())
    return LiveRows(
        ids=[indexes[n].ids[i] for n, i in places],
        valid=np.array([indexes[n].valid[i] for n, i in places], dtype=bool),
        digests=[indexes[n].digests[i] for n, i in places],
        reasons=[indexes[n].reasons[i] for n, i in places],
        shards=np.array([n for n, _ in places], dtype=np.int64),
        positions=np.array([i for _, i in places], dtype=np.int64),
        shard_rows={number: len(index.ids) for number, index in indexes.items()},
    )


def _read_committed(store: Path, number: int, record: CommitRecord, names: Iterable[str]) -> dict[str, bytes]:
    folder = store / "shards" / shard_name(number)
    return {name: _read(folder / name, _recompute(folder), record.files[name]) for name in names}


def _read(path: Path, fix: str, expected: tuple[int, str] | None = None) -> bytes:
    try:
        size = path.stat().st_size
        # A wrong size is refused before reading: what grew to gigabytes is not loaded to be told so.
        data = path.read_bytes() if expected is None or size == expected[0] else b""
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CorruptStoreError("a file of the feature store is missing", where=path, fix=fix) from error
    except OSError as error:
        # Says nothing about the bytes: a disk that fails, a share that is gone, missing permission.
        raise StoreError(
            "a file of the feature store cannot be read",
            found=error.strerror or str(error),
            where=path,
            fix="check the disk and its permissions, then repeat the command",
        ) from error
    if expected is not None and (size != expected[0] or crc32c(data) != expected[1]):
        raise CorruptStoreError(
            "a file of the feature store is not the one that was committed",
            expected=f"{expected[0]} bytes, crc32c {expected[1]}",
            found=f"{size} bytes" + (f", crc32c {crc32c(data)}" if size == expected[0] else ""),
            where=path,
            fix=fix,
        )
    return data


def _decode(decode: Callable[[Mapping[str, bytes]], _T], files: Mapping[str, bytes], store: Path, number: int) -> _T:
    try:
        return decode(files)
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


def _recompute(folder: Path) -> str:
    return f"`rm -r {shlex.quote(str(folder))}` and {_again(folder.parent.parent)}: it recomputes this shard only"


def _again(store: Path) -> str:
    """Who fills a gap in a store: whatever finetunes decodes pixels again, and an extraction does without them."""
    return "run the same command again" if store.name.startswith("pixels-") else "run the same `embcache extract` again"


def _listing(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def _numbers(names: Iterable[str]) -> list[int]:
    return sorted(int(name) for name in names if _NUMBER.fullmatch(name) and name == shard_name(int(name)))
