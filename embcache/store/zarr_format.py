"""Rows ⇄ the bytes of a Zarr v3 group. Nothing here touches the disk.

A shard is ``data.zarr/{features,ids,valid,digest,reason}``, each array in one chunk without compression. The features'
chunk always spans ``rows_per_shard`` rows, zero-padded, so that the view over all shards can link to it as it is.
What is written so is read without zarr (`embcache.store.zarr_plain`); arrays stored otherwise are read by zarr.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from embcache.store.rows import Bytes, PlainFeatures, RowIndex, ShardRows, digests_from_bytes, digests_to_bytes
from embcache.store.zarr_plain import decode_array, is_group, parse_array

# zarr is imported where it is used: whoever reads what embcache wrote does without it, and starts sooner.
if TYPE_CHECKING:
    import zarr
    from zarr.storage import MemoryStore

name = "zarr"
view = "view.zarr"
ROOT = "data.zarr/"
INDEX = ("ids", "valid", "digest", "reason")
TEXTS = ("ids", "reason")

# What zarr may undo: none of these can make much of little, as a compressor can.
_CODECS = {"bytes", "crc32c", "transpose", "sharding_indexed"}
_SLACK = 1 << 20  # bytes that an array may have beyond those of its files: chunks of fill values are not written
_MOST_CHUNKS = 10_000


def encode_shard(rows: ShardRows, rows_per_shard: int) -> dict[str, bytes]:
    """Files of a shard, ``{path inside the shard's folder: bytes}``; the same bytes for equal rows."""
    store, group = _new_group({})
    _put(group, "features", rows.features, chunk_rows=rows_per_shard)
    _put_strings(group, "ids", rows.ids)
    _put(group, "valid", rows.valid)
    _put(group, "digest", digests_to_bytes(rows.digests))
    _put_strings(group, "reason", rows.reasons)
    return _files(store, ROOT)


def index_files(names: Iterable[str]) -> list[str]:
    """Those files of a shard that :func:`decode_index` needs."""
    return [name for name in names if not name.startswith(ROOT + "features/")]


def feature_files(names: Iterable[str]) -> list[str]:
    """Those files of a shard that :func:`decode_features` needs."""
    return [name for name in names if name == ROOT + "zarr.json" or name.startswith(ROOT + "features/")]


def decode_index(files: Mapping[str, Bytes]) -> RowIndex:
    """Everything but the features of a shard, from its verified bytes."""
    plain = is_group(bytes(files.get(ROOT + "zarr.json", b"")))
    found = {name: decode_array(files, ROOT + name) for name in INDEX} if plain else {}
    if any(found.get(name) is None for name in TEXTS):
        # zarr makes room for as many strings as a chunk claims to hold before it looks at them.
        raise ValueError("the ids and reasons do not lie in their files as embcache writes them")
    if any(values is None for values in found.values()):
        group = _open(files, ROOT)
        found |= {name: _get(group, name, files) for name in INDEX if name not in TEXTS}
    return RowIndex(
        ids=tuple(map(str, found["ids"])),
        valid=found["valid"],
        digests=digests_from_bytes(found["digest"]),
        reasons=tuple(map(str, found["reason"])),
    )


def decode_features(files: Mapping[str, Bytes]) -> np.ndarray:
    """Features ``(n, *row_shape)`` of a shard, from its verified bytes."""
    plain = decode_array(files, ROOT + "features") if is_group(bytes(files.get(ROOT + "zarr.json", b""))) else None
    return plain if isinstance(plain, np.ndarray) else _get(_open(files, ROOT), "features", files)


def plain_features(read: Callable[[str], bytes], sizes: Mapping[str, int]) -> PlainFeatures | None:
    """Which file is the features as they lie in memory, if one is; see `embcache.store.formats.StoreFormat`."""
    if ROOT + "features/zarr.json" not in sizes:
        return None
    array = parse_array(read(ROOT + "features/zarr.json"))
    if array is None or array.dtype is None or sizes.get(f"{ROOT}features/{array.chunk}") != array.chunk_bytes:
        return None
    return PlainFeatures(f"{ROOT}features/{array.chunk}", array.shape, array.dtype)


def encode_view(
    ids: list[str],
    valid: np.ndarray,
    row_shape: tuple[int, ...],
    dtype: np.dtype[Any],
    rows_per_shard: int,
    shard_rows: Mapping[int, int],
    attributes: Mapping[str, Any],
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Files of ``view.zarr`` and, for each chunk of its features, a link to the shard's file; see `StoreFormat`."""
    store, group = _new_group(attributes)
    _create(group, "features", (len(ids), *row_shape), (rows_per_shard, *row_shape), dtype)
    _put_strings(group, "ids", ids)
    _put(group, "valid", valid)
    tail = "/0" * len(row_shape)
    links = {
        f"{view}/features/c/{number}{tail}": f"shards/{number:06d}/{ROOT}features/c/0{tail}" for number in shard_rows
    }
    return _files(store, view + "/"), links


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


def _get(group: zarr.Group, name: str, files: Mapping[str, Bytes]) -> np.ndarray:
    import zarr

    array = group[name]
    if not isinstance(array, zarr.Array):
        raise ValueError(f"{name!r} is no array")
    whole = sum(map(len, files.values())) + _SLACK
    inner = math.prod(-(-side // max(1, chunk)) for side, chunk in zip(array.shape, array.chunks, strict=True))
    codecs = _codec_names(json.loads(bytes(files[f"{ROOT}{name}/zarr.json"]))["codecs"])
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


def _files(store: MemoryStore, prefix: str) -> dict[str, bytes]:
    return {prefix + key: store._store_dict[key].to_bytes() for key in sorted(store._store_dict)}


def _open(files: Mapping[str, Bytes], prefix: str) -> zarr.Group:
    import zarr
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import MemoryStore

    make = default_buffer_prototype().buffer.from_bytes
    store = MemoryStore({name.removeprefix(prefix): make(bytes(data)) for name, data in files.items()}, read_only=True)
    return zarr.open_group(store, mode="r", zarr_format=3)
