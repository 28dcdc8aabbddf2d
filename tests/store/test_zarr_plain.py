"""Reading Zarr without zarr: the same values, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from embcache.errors import CorruptStoreError
from embcache.store import zarr_format
from embcache.store.reading import read_features, read_header
from embcache.store.schema import ShardRows
from tests.refusal import refused
from tests.store.build import add, make_store

DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
    "complex64", "complex128",
)  # fmt: skip
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)


_buffer = default_buffer_prototype().buffer.from_bytes


def by_zarr(files: dict[str, bytes], array: str) -> Any:
    """What zarr itself makes of the files."""
    store = MemoryStore({k.removeprefix("data.zarr/"): _buffer(v) for k, v in files.items()}, read_only=True)
    return np.asarray(zarr.open_group(store, mode="r", zarr_format=3)[array][...])


def rows_of(values: np.ndarray, ids: list[str], bad: list[bool]) -> ShardRows:
    return ShardRows(
        tuple(ids),
        values,
        ~np.array(bad),
        tuple("" if b else "0f" * 32 for b in bad),
        tuple(f"broken: {i}" if b else "" for i, b in zip(ids, bad, strict=True)),
    )


@given(
    dtype=st.sampled_from(DTYPES),
    row_shape=st.lists(st.integers(1, 4), max_size=3).map(tuple),
    ids=st.lists(TEXTS, min_size=1, max_size=6, unique=True),
    padding=st.integers(0, 3),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_a_shard_is_read_as_zarr_reads_it(
    dtype: str, row_shape: tuple[int, ...], ids: list[str], padding: int, data: st.DataObject
) -> None:
    raw = np.random.default_rng(len(ids)).bytes(
        len(ids) * int(np.prod(row_shape, dtype=int)) * np.dtype(dtype).itemsize
    )
    values = np.frombuffer(raw, np.uint8 if dtype == "bool" else dtype).reshape(len(ids), *row_shape)
    values = (values % 2).astype(bool) if dtype == "bool" else values  # any bits of a number, NaN and infinities too
    bad = [data.draw(st.booleans()) for _ in ids]
    files = zarr_format.encode_shard(rows_of(values, ids, bad), len(ids) + padding)
    expected, found = by_zarr(files, "features"), zarr_format.decode_features(files)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes() == values.tobytes()
    index = zarr_format.decode_index(files)
    assert list(index.ids) == [str(value) for value in by_zarr(files, "ids")] == ids
    assert list(index.reasons) == [str(value) for value in by_zarr(files, "reason")]
    assert index.valid.tolist() == by_zarr(files, "valid").tolist() == [not b for b in bad]
    assert [bool(digest) for digest in index.digests] == by_zarr(files, "digest").any(1).tolist()


def stored(shape: tuple[int, ...], **options: Any) -> dict[str, bytes]:
    """Files of a shard whose features are stored by zarr itself."""
    store = MemoryStore()
    group = zarr.create_group(store=store, zarr_format=3)
    usual = {"chunks": shape, "compressors": None, "filters": (), "fill_value": 0}
    array = group.create_array("features", shape=shape, dtype="float32", **{**usual, **options})
    if np.prod(shape) < 1e3:
        array[...] = np.ones(shape, np.float32)
    return {"data.zarr/" + key: value.to_bytes() for key, value in store._store_dict.items()}


def test_plain_features_stored_by_zarr_itself_are_read() -> None:
    assert zarr_format.decode_features(stored((4, 3))).tolist() == [[1.0] * 3] * 4


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4, 3), {"compressors": zarr.codecs.ZstdCodec()}),
        ((4, 4), {"chunks": (2, 4), "shards": (4, 4), "compressors": zarr.codecs.ZstdCodec()}),
        ((200_000, 1), {"chunks": (1, 1)}),
        ((4, 3), {"serializer": zarr.codecs.BytesCodec(endian="big")}),
        ((4, 3), {"filters": [zarr.codecs.TransposeCodec(order=(1, 0))]}),
    ],
)
def test_what_is_stored_otherwise_is_refused(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="as embcache writes it"):
        zarr_format.decode_features(stored(shape, **options))


def test_an_array_that_claims_more_than_its_file_holds_is_refused() -> None:
    with pytest.raises((ValueError, KeyError)):
        zarr_format.decode_features(stored((10**6, 10**6)))


@pytest.mark.parametrize("change", [b"", b"\xff\xff\xff\xff", b"\x03\0\0\0"])
def test_strings_that_do_not_fill_their_chunk_are_refused(change: bytes) -> None:
    files = zarr_format.encode_shard(rows_of(np.zeros((2, 3), np.float32), ["a", "béta"], [False, False]), 2)
    chunk = files["data.zarr/ids/c/0"]
    for damaged in (change + chunk[4:], chunk[:-1], chunk + b"x", chunk[:-1] + b"\xff"):
        with pytest.raises(ValueError):
            zarr_format.decode_index({**files, "data.zarr/ids/c/0": damaged})


def test_what_a_format_raises_is_an_error_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_store(tmp_path)
    add(path, 0, ["a", "b", "c"])
    header = read_header(path)
    with pytest.raises(RecursionError):  # metadata nested deeper than the stack
        zarr_format.decode_index({zarr_format.ROOT + "zarr.json": b"[" * 200_000})

    def fail(*_: Any) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr(zarr_format, "decode_features", fail)
    with refused(CorruptStoreError, "shard-damaged"):
        read_features(path, header, 0)
