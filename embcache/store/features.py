"""The rows of a store as an array that is read, and verified, when indexed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from embcache.cores import usable_cores
from embcache.store.header import StoreHeader
from embcache.store.reading import read_features, read_rows
from embcache.store.verified import Scratch

Rows = slice | SupportsIndex | np.ndarray | list[int]

_THREADS = 4  # reading and checking are at the speed of the memory long before there are more
_FEW = 2  # shards that are read one by one, the last of them kept for whoever asks for the next rows


class Features:
    """A view over the live rows of a store's shards, as an array that is read when indexed.

    ``features[:]``, ``features[3]``, ``features[10:20]``, ``features[[4, 2]]`` and boolean masks select rows and return
    numpy arrays. Shards that hold none of the selected rows are not read; those that do are verified first.
    """

    def __init__(self, path: Path, header: StoreHeader, shards: np.ndarray, positions: np.ndarray) -> None:
        self._path, self._header, self._shards, self._positions = path, header, shards, positions
        self._last: tuple[int, np.ndarray] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, *row_shape)."""
        return (len(self._shards), *self._header.row_shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def shards(self) -> np.ndarray:
        """Number of the shard that each row lies in, int64 (N,); not to be written to."""
        shards = self._shards.view()
        shards.flags.writeable = False
        return shards

    @property
    def dtype(self) -> np.dtype[Any]:
        """As stored."""
        return np.dtype(self._header.recipe.dtype)

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, rows: Rows) -> np.ndarray:
        chosen = np.arange(len(self))[rows]
        flat = np.atleast_1d(chosen).ravel()
        out = np.empty((len(flat), *self._header.row_shape), self.dtype)
        order = np.argsort(self._shards[flat], kind="stable")
        starts = np.flatnonzero(np.diff(self._shards[flat][order], prepend=-1))
        parts = np.split(order, starts[1:]) if len(order) else []  # places in out, one part a shard
        if len(parts) <= _FEW:
            for part in parts:
                out[part] = self._shard(int(self._shards[flat[part[0]]]))[self._positions[flat[part]]]
        else:
            self._last = None
            self._read(flat, parts, out)
        return out.reshape(*np.shape(chosen), *self._header.row_shape)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("features are read from disk: an array of them is always a copy")
        return self[:].astype(dtype or self.dtype, copy=False)

    def __repr__(self) -> str:
        return f"Features({self.shape} {self.dtype}; index to read, [:] for all)"

    def _read(self, flat: np.ndarray, parts: Sequence[np.ndarray], out: np.ndarray) -> None:
        """Read rows ``flat`` into ``out``, several shards at a time."""

        def work(mine: Sequence[np.ndarray]) -> None:
            scratch = Scratch()
            for part in mine:
                rows, first = flat[part], int(part[0])
                run = int(part[-1]) - first == len(part) - 1  # ascending, so without gaps
                target = out[first : first + len(part)] if run else np.empty((len(part), *out.shape[1:]), out.dtype)
                shard = int(self._shards[rows[0]])
                read_rows(self._path, self._header, shard, self._positions[rows], target, scratch)
                if not run:
                    out[part] = target

        threads = min(_THREADS, usable_cores(), len(parts))
        if threads == 1:
            work(parts)
            return
        with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
            list(pool.map(work, [parts[k::threads] for k in range(threads)]))  # the first error is raised

    def _shard(self, number: int) -> np.ndarray:
        # Row after row is a common way to read; shards are immutable, so the last one need not be read again.
        last, self._last = self._last, None
        if last is None or last[0] != number:
            last = None  # let go of before the next is read: a shard of pixels takes 25 MB
            last = (number, read_features(self._path, self._header, number))
        self._last = last
        return last[1]
