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
from embcache.sealed import open_parquet
from embcache.typed import parse, typed

if TYPE_CHECKING:
    import pyarrow as pa

FILE = "dataset.parquet"
_META, _CHECK = b"embcache", b"embcache-check"


def encode_snapshot(table: pa.Table, meta: dict[str, Any]) -> bytes:
    """A table and what belongs to it as a Parquet file in which a flipped byte does not go unnoticed.

    Parquet's own checksums cover the values; the footer holds one over everything else that is read.
    """
    import pyarrow.parquet as pq

    text = json.dumps(meta, sort_keys=True)
    described = table.replace_schema_metadata({_META: text, _CHECK: _check(text, table)})
    sink = io.BytesIO()
    pq.write_table(described, sink, write_page_checksum=True)
    return sink.getvalue()


def decode_snapshot(data: bytes, columns: list[str] | None = None) -> tuple[pa.Table, dict[str, Any]]:
    """The inverse of `encode_snapshot`, with only some of the columns where they are named."""
    file, table = open_parquet(data, columns)
    described = file.schema_arrow.metadata or {}
    text = described[_META].decode("utf-8")
    # Snapshots of earlier versions have no check.
    if _CHECK in described and described[_CHECK].decode("ascii") != _check(text, file.schema_arrow, file.metadata):
        raise ValueError("its checksum is another")
    return table.replace_schema_metadata(None), parse(text.encode())


def _check(text: str, described: Any, footer: Any = None) -> str:
    """Sha256 of all that a snapshot says besides its values: number of rows, columns, and its own JSON."""
    schema = getattr(described, "schema", described)
    columns = [[field.name, str(field.type)] for field in schema]
    rows = (footer or described).num_rows
    return hashlib.sha256(json.dumps([rows, columns, text]).encode()).hexdigest()


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


def snapshot_ids(name: str, home: PathLike | None = None) -> tuple[str, list[str]] | None:
    """The dataset's own name and the ids of its images, as extraction kept them; None where there is no snapshot."""
    import pyarrow as pa

    path = home_dir(home) / slug(name) / FILE
    try:
        table, meta = decode_snapshot(read_regular(path), ["id"])
        return typed(str, meta["name"], "name"), typed(list[str], table["id"].to_pylist(), "id")
    except FileNotFoundError:
        return None
    except (pa.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
        raise DatasetError(
            "the snapshot of a dataset is damaged", found=str(error).split("\n")[0], where=path
        ) from error
