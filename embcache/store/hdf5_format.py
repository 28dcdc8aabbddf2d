"""Rows ⇄ the bytes of an HDF5 file. Nothing here touches the disk.

A shard is one file ``data.h5`` with the datasets ``features, ids, valid, digest, reason``, contiguous and uncompressed.
Strings have a fixed length, in UTF-8: variable ones live in a heap whose bytes are not settled by their values.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from embcache.store.schema import NUMERIC_KINDS, Digests, RowIndex, ShardRows, StoreHeader, digests_to_bytes

name = "hdf5"
view = "view.h5"
FILE = "data.h5"
index_files = (FILE,)
LIBVER = ("v110", "v110")  # the oldest with virtual datasets; fixed, so that equal rows give equal bytes


def encode_shard(rows: ShardRows, rows_per_shard: int) -> dict[str, bytes]:
    """Files of a shard; see `StoreFormat`."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=LIBVER) as file:
        _put(file, "features", rows.features)
        _put(file, "ids", _strings(rows.ids))
        _put(file, "valid", rows.valid)
        _put(file, "digest", digests_to_bytes(rows.digests))
        _put(file, "reason", _strings(rows.reasons))
    return {FILE: buffer.getvalue()}


def decode_index(files: Mapping[str, bytes]) -> RowIndex:
    """Everything but the features of a shard."""
    data = files[FILE]
    with h5py.File(_Verified(data), "r") as file:
        valid = _get(file, "valid", data)
        if valid.dtype != np.bool_ or (valid.view(np.uint8) > 1).any():
            raise ValueError("'valid' holds other values than true and false")
        ids, reasons = (
            tuple(value.decode("utf-8") for value in _get(file, name, data).tolist()) for name in ("ids", "reason")
        )
        return RowIndex(ids, valid, Digests(_get(file, "digest", data)), reasons)


def decode_features(files: Mapping[str, bytes]) -> np.ndarray:
    """Features ``(n, *row_shape)`` of a shard."""
    data = files[FILE]
    with h5py.File(_Verified(data), "r") as file:
        return _get(file, "features", data)


def encode_view(
    header: StoreHeader, ids: Sequence[str], valid: np.ndarray, shard_rows: Mapping[int, int],
    attributes: Mapping[str, Any],
) -> tuple[dict[str, bytes], dict[str, str]]:  # fmt: skip
    """File ``view.h5``, with a virtual dataset of features over the shards' files and no links."""
    dtype, row_shape = header.dtype, header.row_shape
    # h5py's own way to make a virtual dataset stamps it with the time: its bytes could not be compared.
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_obj_track_times(False)
    layout.set_fill_value(np.zeros(1, dtype.newbyteorder("<")))
    space = h5py.h5s.create_simple((len(ids), *row_shape))
    for number, n in shard_rows.items():
        space.select_hyperslab((number * header.rows_per_shard, *(0 for _ in row_shape)), (n, *row_shape))
        # Relative names are looked for beside the file that holds the virtual dataset.
        source = h5py.h5s.create_simple((n, *row_shape))
        layout.set_virtual(space, f"shards/{number:06d}/{FILE}".encode(), b"features", source)
    space.select_all()
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=LIBVER) as file:
        file.attrs.update(attributes)
        h5py.h5d.create(file.id, b"features", h5py.h5t.py_create(dtype.newbyteorder("<")), space, dcpl=layout)
        file.create_dataset("ids", data=np.array(ids, dtype=object), dtype=h5py.string_dtype("utf-8"))
        _put(file, "valid", valid)
    return {view: buffer.getvalue()}, {}


class _Verified(io.BytesIO):
    """A file of verified bytes, which are not copied."""

    def readinto(self, buffer: Any) -> int:
        found = super().readinto(buffer)
        if found < memoryview(buffer).nbytes:
            # HDF5 takes as much memory as a header claims, and fills with zeros what is not there.
            raise ValueError("the HDF5 file claims more than it holds")
        return found


def _put(file: Any, name: str, values: np.ndarray) -> None:
    file.create_dataset(name, data=values, dtype=values.dtype.newbyteorder("<"), track_times=False)


def _strings(values: Sequence[str]) -> np.ndarray:
    encoded = [value.encode("utf-8") for value in values]
    return np.array(encoded, dtype=h5py.string_dtype("utf-8", max([1, *map(len, encoded)])))


def _get(file: Any, name: str, data: bytes) -> np.ndarray:
    """An array's values, over the file's bytes.

    HDF5 only says where the array begins: its filters and conversions, which hostile bytes can crash or have unpack to
    any size, never run. Links, external storage and virtual datasets, which could lead to other files, are refused.
    """
    link = file.get(name, getlink=True)
    array = file[name] if isinstance(link, h5py.HardLink) else None
    if not isinstance(array, h5py.Dataset) or array.external or array.is_virtual:
        raise ValueError(f"{name!r} is no array with its values in the shard's own file")
    start, dtype = array.id.get_offset(), np.dtype(array.dtype)
    as_written = (
        start is not None
        and array.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
        and dtype.kind in NUMERIC_KINDS + "S"
        and dtype.itemsize > 0
        and array.id.get_storage_size() == array.nbytes
        and start + array.nbytes <= len(data)
    )
    if not as_written:
        raise ValueError(f"{name!r} does not lie in the file as embcache writes it: in one piece, not compressed")
    return np.frombuffer(data, dtype, array.size, start).reshape(array.shape)
