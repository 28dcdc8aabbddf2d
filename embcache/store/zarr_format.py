"""Rows ⇄ the bytes of a Zarr v3 group. Nothing here touches the disk.

A shard is ``data.zarr/{features,ids,valid,digest,reason}``, each array in one chunk without compression. The features'
chunk always spans ``rows_per_shard`` rows, zero-padded, so that the view over all shards can link to it as it is.

zarr writes; what it wrote in this way is read here without it, for speed: opening and reading 5,840 rows of 2,048
float32 in 92 shards takes 0.16 to 0.22 s, with zarr 1.2 to 1.5 s (docs/log.md). Numbers in any other layout (another
codec, several chunks, an unknown key) are read by zarr, which is imported only then.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from embcache.store.schema import (
    Bytes,
    PlainFeatures,
    RowIndex,
    ShardRows,
    StoreHeader,
    ViewRows,
    digests_from_bytes,
    digests_to_bytes,
)

if TYPE_CHECKING:
    import zarr
    from zarr.storage import MemoryStore

name = "zarr"
view = "view.zarr"
ROOT = "data.zarr/"

# What zarr may undo: none of these can make much of little, as a compressor can.
_CODECS = {"bytes", "crc32c", "transpose", "sharding_indexed"}
_SLACK = 1 << 20  # bytes that an array may have beyond those of its files: chunks of fill values are not written
_MOST_CHUNKS = 10_000
_NUMBERS = {
    name: np.dtype(name)
    for name in (
        "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32",
        "float64", "complex64", "complex128",
    )
}  # fmt: skip


def encode_shard(rows: ShardRows, rows_per_shard: int) -> dict[str, bytes]:
    """Files of a shard; see `StoreFormat`."""
    store, group = _new_group({})
    _put(group, "features", rows.features, chunk_rows=rows_per_shard)
    _put_strings(group, "ids", rows.ids)
    _put(group, "valid", rows.valid)
    _put(group, "digest", digests_to_bytes(rows.digests))
    _put_strings(group, "reason", rows.reasons)
    return _files(store, ROOT)


def decode_index(files: Mapping[str, Bytes]) -> RowIndex:
    """Everything but the features of a shard."""
    found = {name: decode_array(files, ROOT + name) for name in ("ids", "reason", "valid", "digest")}
    if not is_group(bytes(files.get(ROOT + "zarr.json", b""))) or found["ids"] is None or found["reason"] is None:
        # zarr makes room for as many strings as a chunk claims to hold before it looks at them.
        raise ValueError("the ids and reasons do not lie in their files as embcache writes them")
    found |= {name: _by_zarr(files, name) for name in ("valid", "digest") if found[name] is None}
    return RowIndex(
        tuple(map(str, found["ids"])),
        found["valid"],
        digests_from_bytes(found["digest"]),
        tuple(map(str, found["reason"])),
    )


def decode_features(files: Mapping[str, Bytes]) -> np.ndarray:
    """Features ``(n, *row_shape)`` of a shard."""
    plain = decode_array(files, ROOT + "features") if is_group(bytes(files.get(ROOT + "zarr.json", b""))) else None
    return plain if isinstance(plain, np.ndarray) else _by_zarr(files, "features")


def plain_features(files: Mapping[str, Bytes], sizes: Mapping[str, int]) -> PlainFeatures | None:
    """Which file is the features as they lie in memory, if one is."""
    array = parse_array(bytes(files.get(ROOT + "features/zarr.json", b"")))
    if array is None or array.dtype is None or sizes.get(f"{ROOT}features/{array.chunk}") != array.chunk_bytes:
        return None
    return PlainFeatures(f"{ROOT}features/{array.chunk}", array.shape, array.dtype)


def encode_view(header: StoreHeader, rows: ViewRows) -> tuple[dict[str, bytes], dict[str, str]]:
    """Files of ``view.zarr`` and, for each chunk of its features, a link to the file of its shard."""
    store, group = _new_group(rows.attributes)
    shape = header.row_shape
    _create(group, "features", (len(rows.ids), *shape), (header.rows_per_shard, *shape), header.dtype)
    _put_strings(group, "ids", rows.ids)
    _put(group, "valid", rows.valid)
    tail = "/0" * len(shape)
    return _files(store, view + "/"), {
        f"{view}/features/c/{n}{tail}": f"shards/{n:06d}/{ROOT}features/c/0{tail}" for n in rows.shard_rows
    }


def _new_group(attributes: Mapping[str, Any]) -> tuple[MemoryStore, zarr.Group]:
    import zarr
    from zarr.storage import MemoryStore

    store = MemoryStore()
    return store, zarr.create_group(store=store, zarr_format=3, attributes=dict(attributes))


def _create(group: zarr.Group, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: Any) -> Any:
    # Empty chunks are written too: a shard of zeros must have the same files as any other.
    return group.create_array(
        name,
        shape=shape,
        chunks=tuple(max(1, size) for size in chunks),
        dtype=dtype,
        compressors=None,
        filters=None if dtype == "string" else (),
        fill_value="" if dtype == "string" else 0,
        config={"write_empty_chunks": True},
    )


def _put(group: zarr.Group, name: str, values: np.ndarray, chunk_rows: int | None = None) -> None:
    chunks = (chunk_rows or len(values), *values.shape[1:])
    _create(group, name, values.shape, chunks, values.dtype.newbyteorder("<"))[...] = values


def _put_strings(group: zarr.Group, name: str, values: Iterable[str]) -> None:
    array = np.array(list(values), dtype=object)
    _create(group, name, array.shape, array.shape, "string")[...] = array


def _files(store: MemoryStore, prefix: str) -> dict[str, bytes]:
    return {prefix + key: store._store_dict[key].to_bytes() for key in sorted(store._store_dict)}


def _by_zarr(files: Mapping[str, Bytes], name: str) -> np.ndarray:
    """An array of numbers in any layout, read by zarr."""
    import zarr
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import MemoryStore

    mine = [file for file in files if file == ROOT + "zarr.json" or file.startswith(f"{ROOT}{name}/")]
    held = {file.removeprefix(ROOT): bytes(files[file]) for file in mine}
    make = default_buffer_prototype().buffer.from_bytes
    store = MemoryStore({file: make(data) for file, data in held.items()}, read_only=True)
    array = zarr.open_group(store, mode="r", zarr_format=3)[name]
    if not isinstance(array, zarr.Array):
        raise ValueError(f"{name!r} is no array")
    whole = sum(map(len, held.values())) + _SLACK
    inner = math.prod(-(-side // max(1, chunk)) for side, chunk in zip(array.shape, array.chunks, strict=True))
    codecs = _codec_names(json.loads(held[f"{name}/zarr.json"])["codecs"])
    if not codecs <= _CODECS or array.nbytes > whole or inner > _MOST_CHUNKS:
        raise ValueError(
            f"{name!r} has {array.nbytes} bytes in {inner} chunks by the codecs {', '.join(sorted(codecs))}: embcache "
            "writes one chunk and does not compress it"
        )
    return np.asarray(array[...])


def _codec_names(tree: Any) -> set[str]:
    """Names of all codecs in metadata, those inside others too."""
    if isinstance(tree, list):
        return set().union(*map(_codec_names, tree))
    if not isinstance(tree, dict):
        return {str(tree)}
    inside = tree.get("configuration") or {}
    return {str(tree.get("name"))}.union(
        *(_codec_names(inside[key]) for key in ("codecs", "index_codecs") if key in inside)
    )


@dataclass(frozen=True)
class PlainArray:
    """An array whose values lie in one chunk, as they are in memory."""

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
        dtype = None if content["data_type"] == "string" else _NUMBERS[content["data_type"]]
    # A data type that is no text cannot be a key of a dictionary; brackets can be nested deeper than the stack is.
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    sides = [*shape, *chunks] if isinstance(shape, list) and isinstance(chunks, list) else []
    usual = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": content["data_type"],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [codec],
        "storage_transformers": [],
        **{key: content.get(key) for key in ("fill_value", "attributes")},
    }
    if content != usual or codec not in _codecs(dtype) or not all(type(side) is int and side > 0 for side in sides):
        return None
    fits = bool(sides) and shape[1:] == chunks[1:] and (shape == chunks or (dtype is not None and shape[0] < chunks[0]))
    if not fits:
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
