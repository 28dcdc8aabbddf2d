"""The file formats of a store, and what each of them does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from embcache.errors import UsageError
from embcache.store import hdf5_format, zarr_format
from embcache.store.rows import RowIndex, ShardRows


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

    def decode_index(self, files: Mapping[str, bytes]) -> RowIndex:
        """Rows without their features."""

    def decode_features(self, files: Mapping[str, bytes]) -> np.ndarray:
        """Features ``(n, *row_shape)``."""

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
        """Files and links of the view over all shards."""


FORMATS: dict[str, StoreFormat] = {module.name: module for module in (zarr_format, hdf5_format)}


def find_format(name: str) -> StoreFormat:
    """Format called ``name``.

    Raises
    ------
    UsageError
        There is none.
    """
    if name not in FORMATS:
        raise UsageError(
            "unknown store format", expected=" | ".join(FORMATS), found=repr(name), fix=f"--format {min(FORMATS)}"
        )
    return FORMATS[name]
