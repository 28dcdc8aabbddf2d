"""Partitions: the rows of a dataset that is too large to be one table, as immutable Parquet files.

::

    <home>/<dataset>/partitions/<digest>.parquet       at most `MOST_ROWS` rows; every column is text
                                <key>.scan.parquet     what the last scan saw of their files; it only saves work

A partition is named after its content, the first 16 digits of a sha256 over its columns: equal rows are one file,
whichever library writes it, and what is read is compared with the name. Plans refer to rows of partitions.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embcache.errors import CorruptStoreError
from embcache.io import cache_file, mirror_of, read_regular, replace_file
from embcache.sealed import canonical_json, open_parquet, parse, typed

if TYPE_CHECKING:
    import pyarrow as pa

MOST_ROWS = 1_000_000
PARTITION_ROWS = 1 << 19
"""Rows of a partition, but the last of each file; what is made of one partition at a time is held in memory."""

_META = b"embcache-columns"
_DIGEST = re.compile(r"[0-9a-f]{16}")
_GROUP_ROWS = 1 << 16


@dataclass(frozen=True)
class Partition:
    """What a dataset of one partition's rows knows of the whole."""

    digest: str
    current: tuple[str, ...]  # digests of all partitions
    total: int  # images of all partitions
    sizes: tuple[tuple[int, int], ...] = ()  # that decide the transform, see `embcache.extract.scan.read_sizes`
    bad: int = 0  # images of earlier partitions that are quarantined


def partition_path(dataset_dir: Path, digest: str) -> Path:
    """File of a partition."""
    return dataset_dir / "partitions" / f"{digest}.parquet"


def write_partition(dataset_dir: Path, table: pa.Table) -> str:
    """Write the rows of a partition, columns of text without nulls, unless they are there; returns their digest."""
    import pyarrow.parquet as pq

    columns = [[name, _digest(table[name])] for name in table.column_names]
    digest = _name(table.num_rows, columns)
    try:
        read_partition(dataset_dir, digest, anew=True)
    except CorruptStoreError:  # not there, or damaged
        sink = io.BytesIO()
        described = table.replace_schema_metadata({_META: canonical_json([table.num_rows, columns])})
        pq.write_table(described, sink, _GROUP_ROWS, compression="zstd", write_page_checksum=True)
        replace_file(partition_path(dataset_dir, digest), sink.getvalue())
    return digest


def read_partition(
    dataset_dir: Path, digest: str, columns: Sequence[str] | None = None, *, anew: bool = False
) -> pa.Table:
    """Rows of a partition, or some of their columns; `CorruptStoreError` unless they are those of its name.

    In an object store they are read from the copy on this machine, or ``anew``.
    """
    import pyarrow as pa

    path = partition_path(dataset_dir, digest)
    mirror = mirror_of(path) if anew else None
    try:
        data = read_regular(path) if mirror is None else mirror.read(path)
        if data is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(path))
        file, table = open_parquet(data, None if columns is None else [*columns], MOST_ROWS)
        rows, found = typed(tuple[int, list[tuple[str, str]]], parse((file.schema_arrow.metadata or {})[_META]), "")
        names = [name for name, _ in found]
        if (rows, names) != (file.metadata.num_rows, file.schema_arrow.names) or table.num_rows != rows:
            raise ValueError("other rows or columns than it says")
        if _name(rows, [list(each) for each in found]) != digest:
            raise ValueError("columns of another partition")
        for name in table.column_names:
            if _digest(table[name]) != dict(found)[name]:
                raise ValueError(f"other values in column {name!r}")
        if mirror is not None:
            cache_file(path, data)
        return table.replace_schema_metadata(None)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        absent = isinstance(error, FileNotFoundError)
        raise CorruptStoreError(
            f"a partition of a dataset is {'missing' if absent else 'damaged'}", code="partition-damaged",
            expected="the rows that its name was made from", found=str(error).partition("\n")[0][:200], where=path,
            fix="extract again with the table that it was made from, --data-root TABLE: it is then written anew",
        ) from error  # fmt: skip


@functools.lru_cache(maxsize=1 << 12)
def columns_key(dataset_dir: Path, digest: str, *columns: str) -> str:
    """The same 16 digits for partitions with the same values in some columns; its digest where it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(pa.BufferReader(read_regular(partition_path(dataset_dir, digest))))
        rows, found = typed(tuple[int, list[tuple[str, str]]], parse((schema.metadata or {})[_META]), "")
        if _name(rows, [list(each) for each in found]) != digest:
            raise ValueError("columns of another partition")
        return _name(rows, [[name, dict(found)[name]] for name in columns])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return digest


def partition_rows(dataset_dir: Path, digest: str, start: int, stop: int) -> tuple[list[str], list[str]]:
    """Ids and places of some rows of a partition."""
    path = partition_path(dataset_dir, digest)
    try:
        state = path.stat()
        table = _ids_and_places(path, digest, (state.st_ino, state.st_size, state.st_mtime_ns))
    except OSError:
        table = read_partition(dataset_dir, digest, ["id", "place"])  # it says what is wrong
    if not 0 <= start < stop <= table.num_rows:
        raise ValueError(f"rows {start} to {stop} of a partition of {table.num_rows}")
    part = table.slice(start, stop - start)
    return part["id"].to_pylist(), part["place"].to_pylist()


@functools.lru_cache(maxsize=2)  # there are hundreds of plans for each
def _ids_and_places(path: Path, digest: str, _: tuple[int, ...]) -> pa.Table:
    return read_partition(path.parents[1], digest, ["id", "place"]).combine_chunks()


def partitions_problem(dataset_dir: Path, digests: Sequence[str]) -> str:
    """What is wrong with some partitions of a dataset; empty where nothing is."""
    for name in digests:
        try:
            read_partition(dataset_dir, name, anew=True)
        except CorruptStoreError as error:
            return f"{name}: {error.problem}: {error.found}"
    return ""


def is_partition(digest: object) -> bool:
    """Whether a value of a file can be the name of a partition."""
    return isinstance(digest, str) and _DIGEST.fullmatch(digest) is not None


def _name(rows: int, columns: list[list[str]]) -> str:
    return hashlib.sha256(canonical_json([rows, columns]).encode()).hexdigest()[:16]


def text_bytes(column: pa.ChunkedArray) -> tuple[np.ndarray, list[Any]]:
    """Lengths of the texts of a column, int64 (n,), and their bytes, one buffer per chunk; a ValueError for others."""
    import pyarrow as pa

    lengths, texts = [np.zeros(0, np.int64)], []
    for chunk in column.chunks:
        if chunk.null_count or not (pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type)):
            raise ValueError(f"a column of {chunk.type} with {chunk.null_count} nulls")
        if not len(chunk):
            continue
        chunk.validate(full=True)  # UTF-8, too
        _, offsets, data = chunk.buffers()
        wide = np.int64 if pa.types.is_large_string(chunk.type) else np.int32
        ends = np.frombuffer(offsets, wide)[chunk.offset : chunk.offset + len(chunk) + 1].astype(np.int64)
        lengths.append(np.diff(ends))
        texts.append(memoryview(data)[ends[0] : ends[-1]] if data is not None else b"")
    return np.concatenate(lengths), texts


def _digest(column: pa.ChunkedArray) -> str:
    """Sha256 of the texts of a column, however they are cut into chunks."""
    lengths, texts = text_bytes(column)
    found = hashlib.sha256(lengths.astype("<i8").tobytes())
    for text in texts:
        found.update(text)
    return found.hexdigest()
