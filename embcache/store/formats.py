"""The file formats of a store, and what each of them does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any, Protocol, cast

import numpy as np

from embcache.errors import check_choice
from embcache.store.rows import Bytes, PlainFeatures, RowIndex, ShardRows


class StoreFormat(Protocol):
    """Rows ⇄ bytes. A module of functions signs it; none of them touches the disk."""

    name: str  # the value of --format
    view: str  # file or folder over all shards, for plain readers

    def encode_shard(self, rows: ShardRows, rows_per_shard: int) -> dict[str, bytes]:
        """Files of a shard; equal rows give equal bytes."""

    def index_files(self, names: Iterable[str]) -> list[str]:
        """Files needed by ``decode_index``."""

    def feature_files(self, names: Iterable[str]) -> list[str]:
        """Files needed by ``decode_features``."""

    def decode_index(self, files: Mapping[str, Bytes]) -> RowIndex:
        """Rows without their features."""

    def decode_features(self, files: Mapping[str, Bytes]) -> np.ndarray:
        """Features ``(n, *row_shape)``, often over the bytes given; not to be written to."""

    def plain_features(self, read: Callable[[str], bytes], sizes: Mapping[str, int]) -> PlainFeatures | None:
        """Which file of a shard can be read straight into an array; None where `decode_features` must be asked.

        ``read`` gives the verified bytes of a file by its name, ``sizes`` those of all files of the shard.
        """

    def encode_view(
        self,
        ids: list[str],
        valid: np.ndarray,
        row_shape: tuple[int, ...],
        dtype: np.dtype[Any],
        rows_per_shard: int,
        shard_rows: Mapping[int, int],
        attributes: Mapping[str, Any],
    ) -> tuple[dict[str, bytes], dict[str, str]]:
        """Files, and links with their targets, of the view over all shards; paths are relative to the store.

        Row ``N * rows_per_shard + i`` is row ``i`` of shard ``N``; where there is none its id is ``""``. ``valid`` is
        True for live rows that could be read, ``shard_rows`` are the rows of each committed shard.
        """


class _Formats(Mapping[str, StoreFormat]):
    """Formats by name, each imported when it is first asked for: whoever reads Zarr needs no HDF5."""

    _names = ("zarr", "hdf5")

    def __getitem__(self, name: str) -> StoreFormat:
        if name not in self._names:
            raise KeyError(name)
        return cast(StoreFormat, import_module(f"embcache.store.{name}_format"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


FORMATS: Mapping[str, StoreFormat] = _Formats()


def find_format(name: str) -> StoreFormat:
    """Format called ``name``."""
    check_choice("--format", name, sorted(FORMATS))
    return FORMATS[name]
