"""What is settled when a store is created: its recipe, its format and its sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from embcache.errors import StoreError
from embcache.store.recipe import Recipe
from embcache.store.rows import NUMERIC_KINDS, ShardRows

MOST_ROW_BYTES = 1 << 28
MOST_SHARD_ROWS = 1 << 20


@dataclass(frozen=True)
class StoreHeader:
    """What ``recipe.json`` says: the recipe, and what was settled when the store was created."""

    recipe: Recipe
    format: str
    row_shape: tuple[int, ...]
    rows_per_shard: int
    batch_size: int
    threads: int
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        sizes = (self.rows_per_shard, self.batch_size, self.threads, *self.row_shape)
        if not all(type(size) is int for size in sizes) or not (
            isinstance(self.format, str) and isinstance(self.provenance, Mapping)
        ):
            raise StoreError(
                "a store's sizes are whole numbers, its format a name, its provenance an object",
                found=repr((*sizes, self.format))[:200],
            )
        if min(sizes) < 1:
            raise StoreError(
                "a store needs positive sizes",
                expected="rows_per_shard, batch_size, threads and every side of row_shape at least 1",
                found=f"{self.rows_per_shard}, {self.batch_size}, {self.threads}, {self.row_shape}",
            )
        try:
            numeric = np.dtype(self.recipe.dtype).kind in NUMERIC_KINDS
        except TypeError:
            numeric = False
        if not numeric:
            raise StoreError("features need a dtype of numbers", expected="such as float32", found=self.recipe.dtype)
        row = np.dtype(self.recipe.dtype).itemsize * math.prod(self.row_shape)
        if row > MOST_ROW_BYTES or self.rows_per_shard > MOST_SHARD_ROWS:
            # Memory is set aside by these numbers before a shard is looked at.
            raise StoreError(
                "a store's rows or shards are too large to be true",
                expected=f"at most {MOST_ROW_BYTES:,} bytes a row and {MOST_SHARD_ROWS:,} rows a shard",
                found=f"{row:,} bytes a row, {self.rows_per_shard:,} rows a shard",
            )

    def check_rows(self, rows: ShardRows, planned: Sequence[str]) -> None:
        """Raise a StoreError unless ``rows`` are those of the plan, of this store's shape and dtype."""
        if list(rows.ids) != list(planned):
            raise StoreError(
                "a shard's rows are not those of its plan",
                expected=f"{len(planned)} ids in the plan's order",
                found=f"{len(rows.ids)} ids, {len(set(planned) & set(rows.ids))} of them planned",
            )
        if rows.features.shape[1:] != self.row_shape or rows.features.dtype != np.dtype(self.recipe.dtype):
            raise StoreError(
                "features do not fit their store",
                expected=f"{self.recipe.dtype} {(len(planned), *self.row_shape)}",
                found=f"{rows.features.dtype} {rows.features.shape}",
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, with the recipe's full fingerprint."""
        return {
            "fingerprint": self.recipe.fingerprint,
            "recipe": self.recipe.to_json(),
            "format": self.format,
            "row_shape": list(self.row_shape),
            "rows_per_shard": self.rows_per_shard,
            "batch_size": self.batch_size,
            "threads": self.threads,
            "provenance": dict(self.provenance),
        }
