"""The file of a dataset's snapshot, checked; and its name and ids, read without pandas: a listing needs no more."""

from __future__ import annotations

import difflib
import hashlib
import io
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from embcache.errors import DatasetError
from embcache.io import home_folders, read_regular
from embcache.paths import PathLike, home_dir, slug
from embcache.sealed import open_parquet, parse, typed

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa

FORM = 2
"""Of the file: columns of the table, keys of its JSON."""

_META, _CHECK = b"embcache", b"embcache-check"


def snapshot_path(name: str, home: PathLike | None = None) -> Path:
    """The snapshot that extraction keeps beside the stores of dataset ``name``."""
    return home_dir(home) / slug(name) / "dataset.parquet"


def damaged(problem: str, path: Path | None, found: str, code: str = "snapshot-damaged") -> DatasetError:
    """The error for a snapshot that cannot be used."""
    fix = "extract again and name the images: embcache extract --data-root FOLDER …"
    return DatasetError(problem, code=code, found=found, where=path, fix=fix)


def encode_snapshot(table: pa.Table, meta: dict[str, Any]) -> bytes:
    """A table and what belongs to it as a Parquet file in which a flipped byte does not go unnoticed.

    Parquet's own checksums cover the values; the footer holds one over everything else that is read.
    """
    import pyarrow.parquet as pq

    text = json.dumps({**meta, "form": FORM}, sort_keys=True)
    described = table.replace_schema_metadata({_META: text, _CHECK: _check(text, table.schema, table.num_rows)})
    sink = io.BytesIO()
    pq.write_table(described, sink, write_page_checksum=True)
    return sink.getvalue()


def decode_snapshot(data: bytes, columns: list[str] | None = None) -> tuple[pa.Table, dict[str, Any]]:
    """The inverse of `encode_snapshot`, with only some of the columns where they are named."""
    file, table = open_parquet(data, columns)
    described = file.schema_arrow.metadata or {}
    text = described[_META].decode("utf-8")
    meta = typed(dict[str, Any], parse(text.encode()), "snapshot")
    if (form := meta.pop("form", 1)) != FORM:
        raise damaged("the snapshot of a dataset is of another version", None, f"form {form!r:.20}", "snapshot-form")
    if described[_CHECK].decode("ascii") != _check(text, file.schema_arrow, file.metadata.num_rows):
        raise ValueError("its checksum is another")
    return table.replace_schema_metadata(None), meta


def _check(text: str, schema: pa.Schema, rows: int) -> str:
    """Sha256 of everything in a snapshot except its values: number of rows, columns, and its own JSON."""
    columns = [[field.name, str(field.type)] for field in schema]
    return hashlib.sha256(json.dumps([rows, columns, text]).encode()).hexdigest()


def snapshot_ids(name: str, home: PathLike | None = None) -> tuple[str, list[str]] | None:
    """The dataset's own name and the ids of its images, as extraction kept them; None where there is no snapshot."""
    import pyarrow as pa

    path = snapshot_path(name, home)
    try:
        table, meta = decode_snapshot(read_regular(path), ["id"])
        return typed(str, meta["name"], "name"), typed(list[str], table["id"].to_pylist(), "id")
    except FileNotFoundError:
        return None
    except (pa.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
        raise damaged("the snapshot of a dataset is damaged", path, str(error).split("\n")[0]) from error


def cached_names(home: PathLike | None = None) -> list[str]:
    """Names of the datasets that have a snapshot under ``home``, sorted; damaged ones are passed over."""
    names = []
    for folder in home_folders(home_dir(home)):
        try:
            found = snapshot_ids(folder.name, home)
        except DatasetError:
            continue
        names += [found[0]] if found is not None else []
    return sorted(names)


def near_names(name: str, names: Iterable[str]) -> list[str]:
    """Those of the names for which ``name`` may be a slip, or the beginning; the nearest first."""
    known = list(names)
    near = difflib.get_close_matches(name, known, n=5)
    return near + [other for other in known if other.startswith(f"{name}-") and other not in near]
