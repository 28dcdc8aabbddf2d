"""Zarr v3 arrays as embcache writes them, read without zarr: one chunk, its values as they lie in memory.

It exists for speed: opening and reading 5,840 rows of 2,048 float32 in 92 shards takes 0.2 processor seconds, by zarr
1.3 (docs/log.md). Arrays with any other metadata (another codec, several chunks, an unknown key) are left to zarr.
Nothing here touches the disk, and the bytes that come in are verified.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from embcache.store.rows import Bytes

_KEYS = {
    "shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs", "attributes", "zarr_format",
    "node_type", "storage_transformers",
}  # fmt: skip
_NUMBERS = {
    name: np.dtype(name)
    for name in (
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32",
        "float64", "complex64", "complex128",
    )
}  # fmt: skip


@dataclass(frozen=True)
class PlainArray:
    """An array whose values lie in one chunk, as they are."""

    shape: tuple[int, ...]  # at least one axis
    chunk_rows: int  # rows that the chunk holds, at least those of the array; the rest is padding
    dtype: np.dtype[Any] | None  # none for strings

    @property
    def chunk(self) -> str:
        """The chunk's file, relative to the array."""
        return "c" + "/0" * len(self.shape)

    @property
    def chunk_bytes(self) -> int:
        """Size of a chunk of numbers."""
        return 0 if self.dtype is None else self.chunk_rows * math.prod(self.shape[1:]) * self.dtype.itemsize


@functools.lru_cache(maxsize=64)  # shards of a store have the same metadata but for the last
def parse_array(metadata: bytes) -> PlainArray | None:
    """The array that a ``zarr.json`` describes; None where its values must be read by zarr."""
    try:
        content = json.loads(metadata)
        shape, chunks = content["shape"], content["chunk_grid"]["configuration"]["chunk_shape"]
        (codec,) = content["codecs"]
        name = content["data_type"]
        dtype = None if name == "string" else _NUMBERS[name]
    # A data type that is no text cannot be a key of a dictionary; brackets can be nested deeper than the stack is.
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    sides = [*shape, *chunks] if isinstance(shape, list) and isinstance(chunks, list) else []
    usual = (
        set(content) == _KEYS
        and content["zarr_format"] == 3
        and content["node_type"] == "array"
        and content["storage_transformers"] == []
        and content["chunk_grid"] == {"name": "regular", "configuration": {"chunk_shape": chunks}}
        and content["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
        and bool(sides)
        and all(type(side) is int and side > 0 for side in sides)
        and shape[1:] == chunks[1:]
        and shape[0] <= chunks[0]
        and codec in _codecs(dtype)
    )
    if not usual or (dtype is None and shape != chunks):
        return None
    return PlainArray(tuple(shape), chunks[0], dtype)


def decode_array(files: Mapping[str, Bytes], array: str) -> Any:
    """Values of the array at ``array`` (a path in ``files``): an ndarray over its bytes, or a tuple of strings.

    None where zarr must read it, and say what is wrong with it if something is.
    """
    plain = parse_array(bytes(files.get(f"{array}/zarr.json", b"")))
    chunk = None if plain is None else files.get(f"{array}/{plain.chunk}")
    if plain is None or chunk is None:
        return None
    if plain.dtype is None:
        return _strings(bytes(chunk), plain.shape[0]) if len(plain.shape) == 1 else None
    if len(chunk) != plain.chunk_bytes:
        return None
    return np.frombuffer(chunk, plain.dtype).reshape(plain.chunk_rows, *plain.shape[1:])[: plain.shape[0]]


@functools.lru_cache(maxsize=64)
def is_group(metadata: bytes) -> bool:
    """Whether a ``zarr.json`` is that of a plain group."""
    try:
        content = json.loads(metadata)
    except (ValueError, RecursionError):
        return False
    usual = isinstance(content, dict) and set(content) == {"attributes", "zarr_format", "node_type"}
    return usual and content["zarr_format"] == 3 and content["node_type"] == "group"


def _codecs(dtype: np.dtype[Any] | None) -> list[dict[str, Any]]:
    """The codecs that leave values as they lie in this machine's memory, as metadata spells them."""
    if dtype is None:
        return [{"name": "vlen-utf8", "configuration": {}}, {"name": "vlen-utf8"}]
    ordered = [{"name": "bytes", "configuration": {"endian": "little"}}] if sys.byteorder == "little" else []
    return [*ordered, {"name": "bytes"}, {"name": "bytes", "configuration": {}}] if dtype.itemsize == 1 else ordered


def _strings(chunk: bytes, n: int) -> tuple[str, ...] | None:
    """Strings of a ``vlen-utf8`` chunk: their number, then length and bytes of each, lengths as uint32."""
    if int.from_bytes(chunk[:4], "little") != n or len(chunk) < 4 + 4 * n:
        return None
    if len(chunk) == 4 + 4 * n and not any(chunk[4:]):
        return ("",) * n
    values, start = [], 4
    try:
        for _ in range(n):
            end = start + 4 + int.from_bytes(chunk[start : start + 4], "little")
            if end > len(chunk):
                return None
            values.append(chunk[start + 4 : end].decode("utf-8"))
            start = end
    except UnicodeDecodeError:
        return None
    return tuple(values) if start == len(chunk) else None
