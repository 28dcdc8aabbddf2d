"""Rows ⇄ the bytes of a Zarr v3 group. Nothing here touches the disk.

A shard is ``data.zarr/{features,ids,valid,digest,reason}``, each array in one chunk without compression. The features'
chunk always spans ``rows_per_shard`` rows, zero-padded, so that the view over all shards can link to it as it is.

zarr writes. What it wrote in this way, and nothing else, is read here without it: opening and reading 5,840 rows of
2,048 float32 in 92 shards takes 0.16 to 0.22 s, with zarr 1.2 to 1.5 s (docs/log.md); and no hostile metadata can have
a decoder make much of little.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from embcache.store.schema import Digests, RowIndex, ShardRows, StoreHeader, digests_to_bytes

if TYPE_CHECKING:
    import zarr
    from zarr.storage import MemoryStore

name = "zarr"
view = "view.zarr"
ROOT = "data.zarr/"
_ONE_AXIS, _TWO_AXES = ("zarr.json", "c/0"), ("zarr.json", "c/0/0")
_INDEX = {"ids": _ONE_AXIS, "valid": _ONE_AXIS, "reason": _ONE_AXIS, "digest": _TWO_AXES}
index_files = (ROOT + "zarr.json", *(f"{ROOT}{name}/{file}" for name, files in _INDEX.items() for file in files))

_NUMBERS = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
    "complex64", "complex128",
)  # fmt: skip


def encode_shard(rows: ShardRows, rows_per_shard: int) -> dict[str, bytes]:
    """Files of a shard; see `StoreFormat`."""
    store, group = _new_group({})
    _put(group, "features", rows.features, chunk_rows=rows_per_shard)
    _put_strings(group, "ids", rows.ids)
    _put(group, "valid", rows.valid)
    _put(group, "digest", digests_to_bytes(rows.digests))
    _put_strings(group, "reason", rows.reasons)
    return _files(store, ROOT)


def decode_index(files: Mapping[str, bytes]) -> RowIndex:
    """Everything but the features of a shard."""
    _check_group(bytes(files[ROOT + "zarr.json"]))
    ids, reasons = _decode(files, "ids"), _decode(files, "reason")
    return RowIndex(ids, _decode(files, "valid"), Digests(_decode(files, "digest")), reasons)


def decode_features(files: Mapping[str, bytes]) -> np.ndarray:
    """Features ``(n, *row_shape)`` of a shard."""
    _check_group(bytes(files[ROOT + "zarr.json"]))
    features: np.ndarray = _decode(files, "features")
    return features


def encode_view(
    header: StoreHeader, ids: Sequence[str], valid: np.ndarray, shard_rows: Mapping[int, int],
    attributes: Mapping[str, Any],
) -> tuple[dict[str, bytes], dict[str, str]]:  # fmt: skip
    """Files of ``view.zarr`` and, for each chunk of its features, a link to the file of its shard."""
    store, group = _new_group(attributes)
    shape = header.row_shape
    _create(group, "features", (len(ids), *shape), (header.rows_per_shard, *shape), header.dtype)
    _put_strings(group, "ids", ids)
    _put(group, "valid", valid)
    tail = "/0" * len(shape)
    return _files(store, view + "/"), {
        f"{view}/features/c/{n}{tail}": f"shards/{n:06d}/{ROOT}features/c/0{tail}" for n in shard_rows
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


@functools.lru_cache(maxsize=64)  # shards of a store have the same metadata but for the last
def _parse(metadata: bytes) -> tuple[tuple[int, ...], int, np.dtype[Any] | None]:
    """Shape of the array that a ``zarr.json`` describes, rows of its one chunk, and dtype: none for strings.

    The chunk holds at least the rows of the array, and in addition only padding.
    """
    content = json.loads(metadata)
    shape, chunks, kind = content["shape"], content["chunk_grid"]["configuration"]["chunk_shape"], content["data_type"]
    dtype = np.dtype(kind).newbyteorder("<") if kind in _NUMBERS else None
    codecs: list[dict[str, Any]] = [{"name": "bytes"}, {"name": "bytes", "configuration": {}}]
    if dtype is None:
        codecs = [{"name": "vlen-utf8"}, {"name": "vlen-utf8", "configuration": {}}]
    elif dtype.itemsize > 1:
        codecs = [{"name": "bytes", "configuration": {"endian": "little"}}]
    usual = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": kind if dtype is not None else "string",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": next(([codec] for codec in codecs if content["codecs"] == [codec]), None),
        "storage_transformers": [],
        **{key: content.get(key) for key in ("fill_value", "attributes")},
    }
    sides = [*shape, *chunks] if isinstance(shape, list) and isinstance(chunks, list) else []
    one_chunk = sides and all(type(side) is int and side > 0 for side in sides) and shape[1:] == chunks[1:]
    fits = one_chunk and (shape == chunks or (dtype is not None and shape[0] < chunks[0]))
    if content != usual or not fits:
        raise ValueError("an array does not lie in its file as embcache writes it: in one piece, not compressed")
    return tuple(shape), chunks[0], dtype


def _decode(files: Mapping[str, bytes], name: str) -> Any:
    """Values of an array: an ndarray over its bytes, or a tuple of strings."""
    shape, chunk_rows, dtype = _parse(bytes(files[f"{ROOT}{name}/zarr.json"]))
    chunk = files[f"{ROOT}{name}/c" + "/0" * len(shape)]
    if dtype is None and len(shape) == 1:
        return _strings(chunk, shape[0])
    if dtype is None or len(chunk) != chunk_rows * math.prod(shape[1:]) * dtype.itemsize:
        raise ValueError(f"{name!r} does not fill its chunk")
    return np.frombuffer(chunk, dtype).reshape(chunk_rows, *shape[1:])[: shape[0]]


@functools.lru_cache(maxsize=64)
def _check_group(metadata: bytes) -> None:
    """Raise a ValueError unless a ``zarr.json`` is that of a plain group."""
    content = json.loads(metadata)
    if content != {"attributes": content["attributes"], "zarr_format": 3, "node_type": "group"}:
        raise ValueError("the shard is no plain group of arrays")


def _strings(chunk: bytes, n: int) -> tuple[str, ...]:
    """Strings of a ``vlen-utf8`` chunk: their number, then length and bytes of each, lengths as uint32."""
    if len(chunk) == 4 + 4 * n and int.from_bytes(chunk[:4], "little") == n and not any(chunk[4:]):
        return ("",) * n  # nearly all reasons
    values, start = [], 4
    # Room is made for what is there, not for as many strings as a chunk claims to hold.
    for _ in range(n if len(chunk) >= 4 + 4 * n else 0):
        end = start + 4 + int.from_bytes(chunk[start : start + 4], "little")
        values.append(chunk[start + 4 : end].decode("utf-8"))
        start = end
    if int.from_bytes(chunk[:4], "little") != n or len(values) != n or start != len(chunk):
        raise ValueError(f"a chunk does not hold the {n} strings that it should")
    return tuple(values)
