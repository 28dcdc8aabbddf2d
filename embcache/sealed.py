"""Files that carry checksums of their own, so that no flipped bit goes unnoticed: small JSON, and Parquet."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c

from embcache.errors import CorruptStoreError, RecipeError
from embcache.io import open_regular, read_regular
from embcache.typed import parse

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_CHUNK = 1 << 20
_LEAVES = (str, int, float, type(None))


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no whitespace, characters as they are and floats by ``repr``: one text per value."""
    try:
        _refuse_other_keys(value)
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (TypeError, ValueError) as error:
        raise RecipeError(
            "a recipe's value cannot be written as JSON",
            expected="finite numbers, strings, booleans, null, lists, and objects with string keys",
            found=str(error),
        ) from error
    return text


def _refuse_other_keys(value: Any) -> None:
    # json.dumps would turn the keys 1 and "1" into the same text, hence two recipes into one.
    if isinstance(value, (list, tuple)):
        for item in value:
            if not isinstance(item, _LEAVES):  # a plan has thousands of them
                _refuse_other_keys(item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"key {key!r} is not a string")
            _refuse_other_keys(item)


def crc32c(data: bytes) -> str:
    """Castagnoli checksum of ``data``, 8 hex digits."""
    return f"{google_crc32c.value(data):08x}"


def file_checksum(path: Path) -> dict[str, Any]:
    """Size and crc32c of a file, read in pieces: models do not fit in memory twice."""
    size, checksum = 0, 0
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            size, checksum = size + len(chunk), google_crc32c.extend(checksum, chunk)
    return {"size": size, "crc32c": f"{checksum:08x}"}


def read_sealed(path: Path, fix: str, *, indent: int | None = 1, most: int = 1 << 28) -> dict[str, Any]:
    """Content of a sealed file of at most ``most`` bytes; raises as `unseal`, and OSError where it cannot be read."""
    return unseal(read_regular(path, most=most), path, fix, indent=indent)


def seal(content: dict[str, Any], *, indent: int | None = 1) -> bytes:
    """JSON of ``content`` with a last key ``crc32c`` over all the others; the same bytes for equal content."""
    return _text(content, _checksum(content), indent)


def _checksum(content: dict[str, Any]) -> str:
    return crc32c(canonical_json(content).encode("utf-8"))


def _text(content: dict[str, Any], checksum: str, indent: int | None) -> bytes:
    text = json.dumps({**content, "crc32c": checksum}, indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def unseal(data: bytes, where: Path, fix: str, *, indent: int | None = 1) -> dict[str, Any]:
    """Content of sealed bytes, without its checksum."""
    try:
        content = parse(data)
        found = content.pop("crc32c")
        # Comparing the whole text also catches a flip in the whitespace, which parsing would forgive.
        intact = found == _checksum(content) and _text(content, found, indent) == data
    except Exception as error:  # whatever a flipped bit makes of the parser
        raise CorruptStoreError(
            "a file of the feature store is damaged", found=f"{type(error).__name__}: {error}", where=where, fix=fix
        ) from error
    if not intact:
        raise CorruptStoreError(
            "a file of the feature store is damaged",
            expected="the bytes that its checksum was taken from",
            found=f"{len(data)} bytes with another checksum",
            where=where,
            fix=fix,
        )
    return dict(content)


def open_parquet(data: bytes, columns: list[str] | None = None) -> tuple[pq.ParquetFile, pa.Table]:
    """A Parquet file that others can write, and its table."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
    names = file.schema_arrow.names
    if len(set(names)) < len(names) or file.metadata.num_rows > 4 * len(data):
        raise ValueError(f"{file.metadata.num_rows:,} rows and {len(names):,} columns in {len(data):,} bytes")
    return file, file.read(columns=columns)
