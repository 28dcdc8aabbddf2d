"""Where training takes its features from: memory, or shards on disk that are streamed.

Training and scoring ask for rows by number and never for the whole, so that both are the same to them.

Streaming serves features larger than memory: all heads share one stream of shards, shuffled on two levels. An epoch
takes the shards in a random order, which follows from the epoch and the seed, as many at a time as a buffer holds; of
the rows in the buffer every head takes its own draws in its own random order. What a head draws in an epoch is what it
would draw from memory, row for row; only the order is bound to that of the shards. A thread fills a second buffer
while the rows of the first are used. Draws that do not fill a batch wait in front of the buffer for the next shards: a
batch for each head, in addition to the rows of the buffer.

A unit of reading is a shard of the first backbone's store. If other stores list images in another order, the rows of a
unit lie in several of their shards, and each of those is read as a whole: slower, with the same result.
"""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embcache.probe.layers import Tensors

IntArray = NDArray[np.int64]
T = TypeVar("T")

CHUNK = 1024  # rows scored at a time


def stream_generator(stream: str, purpose: str) -> torch.Generator:
    """A random stream of its own for each (stream, purpose), on the CPU whatever the device."""
    digest = hashlib.sha256(f"{stream}\0{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True, eq=False)
class Step:
    """One batch of some neighboring heads, equally long for all of them."""

    heads: slice  # which of the heads
    rows: Tensor  # (k, B); the rows that each of them takes, on the device of the features
    x: dict[str, Tensor]  # (k, B, D); their features


@dataclass(frozen=True, eq=False)
class Chunk:
    """Features of some rows of a set of rows."""

    number: int  # which of the sets
    places: Tensor  # (B,); where in the set the rows stand
    x: dict[str, Tensor]  # (B, D); their features; of several views the first, the image as it is


class FeatureRows(ABC):
    """Features of N rows, of which training and scoring take what they need."""

    x: Mapping[str, Any]  # (N, D) or (N, V, D) of each backbone

    @property
    def dims(self) -> dict[str, int]:
        """Features of each backbone, D."""
        return {backbone: features.shape[-1] for backbone, features in self.x.items()}

    @property
    @abstractmethod
    def n_views(self) -> int:
        """V: views of each image that training draws from."""

    @abstractmethod
    def steps(self, orders: list[Tensor], views: list[Tensor], size: int, epoch: int) -> Iterator[Step]:
        """One epoch of several heads, batch by batch; ``orders`` and ``views`` of each head are of shape (n_k,)."""

    @abstractmethod
    def chunks(self, sets: Sequence[Tensor]) -> Iterator[Chunk]:
        """Features of several sets of rows, in parts, every row of every set once."""

    def gather(self, rows: Tensor) -> dict[str, Tensor]:
        """Features of rows, float32 (n, D) of each backbone, all at once; of several views the first."""
        x = {backbone: torch.empty(0, dim) for backbone, dim in self.dims.items()}
        for chunk in self.chunks([rows]):
            for backbone, features in chunk.x.items():
                if not len(x[backbone]):
                    x[backbone] = features.new_empty(len(rows), features.shape[1])
                x[backbone][chunk.places.to(features.device)] = features
        return x


@dataclass(frozen=True, eq=False)
class Resident(FeatureRows):
    """Features in memory (or on a device), of any floating dtype: rows are gathered, then widened to float32."""

    x: Tensors  # never copied whole

    @property
    def n_views(self) -> int:
        """Views of each image."""
        return max((f.shape[1] if f.dim() == 3 else 1 for f in self.x.values()), default=1)

    def steps(self, orders: list[Tensor], views: list[Tensor], size: int, epoch: int) -> Iterator[Step]:
        """One epoch of several heads."""
        device, several = next(iter(self.x.values())).device, self.n_views > 1
        # Whole epochs go to the device once; neighbors of one length are one matrix, of which a batch is a slice.
        runs = [
            (heads, torch.stack(orders[heads]).to(device), torch.stack(views[heads]).to(device) if several else None)
            for heads in equal_runs([len(order) for order in orders])
        ]
        for start in range(0, max(map(len, orders), default=0), size):
            # No batch is padded: it would be rounded otherwise than the one a head has alone.
            for heads in equal_runs([min(size, max(0, len(order) - start)) for order in orders]):
                parts = [(r[:, start : start + size], v) for h, r, v in runs if heads.start <= h.start < heads.stop]
                rows = parts[0][0] if len(parts) == 1 else torch.cat([r for r, _ in parts])
                view = None
                if parts[0][1] is not None:
                    view = torch.cat([v[:, start : start + size] for _, v in parts if v is not None])
                yield Step(heads, rows, {b: take(f, rows, view) for b, f in self.x.items()})

    def chunks(self, sets: Sequence[Tensor]) -> Iterator[Chunk]:
        """Features of several sets of rows."""
        for number, rows in enumerate(sets):
            for start in range(0, len(rows), CHUNK):
                part = rows[start : start + CHUNK]
                x = {b: take(f, part.to(f.device)) for b, f in self.x.items()}
                yield Chunk(number, torch.arange(start, start + len(part)), x)


@dataclass(frozen=True, eq=False)
class Streamed(FeatureRows):
    """Features on disk, read whenever they are needed."""

    x: Mapping[str, Any]  # arrays that are read when indexed, as `embcache.store.feature_store.Features`
    places: Mapping[str, IntArray]  # (N,); where each row lies in them
    shards: IntArray  # (N,); the shard that each row is read with
    shard_rows: Mapping[int, int]  # how many rows each shard has, wanted or not
    buffer_rows: int  # rows that the buffer holds; a single larger shard is taken whole
    n_views: int = 1  # more than one: views (n, V, D) that training draws from, else the plain images
    stream: str = "0"  # names the random stream of the order of shards
    device: str = "cpu"  # where batches go
    _sorted: dict[int, tuple[Tensor, IntArray, IntArray]] = field(default_factory=dict, init=False, repr=False)

    def steps(self, orders: list[Tensor], views: list[Tensor], size: int, epoch: int) -> Iterator[Step]:
        """One epoch of several heads."""
        block_of, n_blocks = self._blocks(epoch)
        queues = [
            _Queue(order, view if self.n_views > 1 else None, block_of[self.shards[order.numpy()]], n_blocks)
            for order, view in zip(orders, views, strict=True)
        ]
        # Rows that any head draws, block by block: each is read once, and only those are.
        drawn = np.zeros(len(self.shards), dtype=bool)
        for queue in queues:
            drawn[queue.rows] = True
        wanted = np.flatnonzero(drawn)
        wanted = wanted[np.lexsort((self.shards[wanted], block_of[self.shards[wanted]]))]
        bounds = np.searchsorted(block_of[self.shards[wanted]], np.arange(n_blocks + 1))
        front = len(queues) * size  # where draws wait
        # One is filled while the other is used.
        buffers = [self._empty(front + int(np.diff(bounds).max(initial=0))) for _ in range(min(2, n_blocks))]
        at = np.zeros(len(self.shards), dtype=np.int64)  # row → place in the buffer

        def fill(block: int) -> IntArray:
            rows: IntArray = wanted[bounds[block] : bounds[block + 1]]
            self._read_into(buffers[block % 2], front, rows)
            return rows

        for block, rows in enumerate(one_ahead(fill, range(n_blocks))):
            held, last = buffers[block % 2], block == n_blocks - 1
            at[rows] = np.arange(front, front + len(rows))
            lies = [queue.places(block, at, k * size) for k, queue in enumerate(queues)]
            ready = [places[: len(places) if last else len(places) // size * size] for places in lies]
            for start in range(0, max(map(len, ready)), size):
                for heads in equal_runs([min(size, max(0, len(r) - start)) for r in ready]):
                    yield self._step(held, queues, ready, heads, slice(start, start + size))
            for k, queue in enumerate(queues):
                queue.done += len(ready[k])
                left = torch.from_numpy(lies[k][len(ready[k]) :])
                for backbone, features in held.items() if len(left) else ():
                    buffers[1 - block % 2][backbone][k * size : k * size + len(left)] = features[left]

    def chunks(self, sets: Sequence[Tensor]) -> Iterator[Chunk]:
        """Features of several sets of rows, shard by shard."""
        numbers = np.array(sorted(self.shard_rows))
        orders, bounds = zip(*self._by_shard(sets, numbers), strict=True) if sets else ((), ())

        def read(rank: int) -> tuple[list[IntArray], list[IntArray], IntArray, dict[str, Tensor]]:
            parts = [order[b[rank] : b[rank + 1]] for order, b in zip(orders, bounds, strict=True)]
            wanted = [rows.numpy()[part] for rows, part in zip(sets, parts, strict=True)]
            rows = np.unique(np.concatenate(wanted)) if wanted else np.zeros(0, np.int64)
            return parts, wanted, rows, self._read(rows) if len(rows) else {}

        for parts, wanted, rows, held in one_ahead(read, range(len(numbers))):
            for number, (part, these) in enumerate(zip(parts, wanted, strict=True)):
                for start in range(0, len(part), CHUNK):
                    places = torch.from_numpy(np.searchsorted(rows, these[start : start + CHUNK]))
                    x = {b: take(f, places).to(self.device) for b, f in held.items()}
                    yield Chunk(number, torch.from_numpy(part[start : start + CHUNK]), x)

    def _by_shard(self, sets: Sequence[Tensor], numbers: IntArray) -> list[tuple[IntArray, IntArray]]:
        """For each set its places, shard by shard, and where in them each shard begins; kept for the next epoch."""
        known, found = dict(self._sorted), []
        self._sorted.clear()
        for rows in sets:
            # By identity, and with the set itself, so that no other takes its number while it is kept.
            kept, order, bounds = known.get(id(rows), (None, None, None))
            if kept is not rows or order is None or bounds is None:
                of_rank = np.searchsorted(numbers, self.shards[rows.numpy()])
                order = np.argsort(of_rank, kind="stable")
                bounds = np.searchsorted(of_rank[order], np.arange(len(numbers) + 1))
            self._sorted[id(rows)] = rows, order, bounds
            found.append((order, bounds))
        return found

    def _blocks(self, epoch: int) -> tuple[IntArray, int]:
        """Which fill of the buffer each shard belongs to in an epoch, by shard number, and how many there are."""
        numbers = np.array(sorted(self.shard_rows))
        order = torch.randperm(len(numbers), generator=stream_generator(self.stream, f"shards {epoch}")).numpy()
        block_of = np.zeros(int(numbers.max()) + 1, dtype=np.int64)
        block, filled = 0, 0
        for number in numbers[order].tolist():
            if filled and filled + self.shard_rows[number] > self.buffer_rows:
                block, filled = block + 1, 0
            block_of[number] = block
            filled += self.shard_rows[number]
        return block_of, block + 1

    def _empty(self, n: int) -> dict[str, Tensor]:
        """Room for n rows of each backbone: half precision is kept as it is, all else as float32."""
        shapes = {b: s.shape[1:] if self.n_views > 1 else s.shape[-1:] for b, s in self.x.items()}
        return {
            b: torch.empty((n, *shape), dtype=torch.float16 if self.x[b].dtype == np.float16 else torch.float32)
            for b, shape in shapes.items()
        }

    def _read_into(self, held: Tensors, start: int, rows: IntArray) -> None:
        """Read rows, shard by shard where they are listed so: never more than one shard beside the buffers."""
        edges = np.flatnonzero(np.diff(self.shards[rows], prepend=-1, append=-1))
        for a, b in itertools.pairwise(edges.tolist()):
            for backbone, read in self._read(rows[a:b]).items():
                held[backbone][start + a : start + b] = read

    def _read(self, rows: IntArray) -> dict[str, Tensor]:
        """Features of rows: half precision as it is, all else as float32; of several views the first, or all."""
        found = {}
        for backbone, stored in self.x.items():
            read = stored[self.places[backbone][rows]]
            read = read[:, 0] if read.ndim == 3 and self.n_views == 1 else read  # the image as it is
            kept = np.float16 if read.dtype == np.float16 else np.float32
            found[backbone] = torch.from_numpy(np.ascontiguousarray(read, kept))
        return found

    def _step(self, held: Tensors, queues: list[_Queue], ready: list[IntArray], heads: slice, part: slice) -> Step:
        places = torch.from_numpy(np.stack([lies[part] for lies in ready[heads]]))
        rows = torch.from_numpy(np.stack([queue.rows[queue.done :][part] for queue in queues[heads]]))
        view = None
        if self.n_views > 1:
            view = torch.from_numpy(np.stack([queue.views[queue.done :][part] for queue in queues[heads]]))
        return Step(heads, rows.to(self.device), {b: take(f, places, view).to(self.device) for b, f in held.items()})


class _Queue:
    """The draws of one head in an epoch, in the order of the blocks: ``done`` of them have been trained on."""

    def __init__(self, order: Tensor, views: Tensor | None, blocks: IntArray, n_blocks: int) -> None:
        narrow = blocks.astype(np.int16) if n_blocks < 2**15 else blocks  # what numpy sorts in linear time
        by_block = np.argsort(narrow, kind="stable")
        self.rows: IntArray = order.numpy()[by_block]
        self.views: IntArray = np.zeros(0, np.int64) if views is None else views.numpy()[by_block]
        self.ends: IntArray = np.searchsorted(blocks[by_block], np.arange(n_blocks), side="right")
        self.done = 0

    def places(self, block: int, at: IntArray, front: int) -> IntArray:
        """Where in the buffer the draws lie: those that waited, then those of the block."""
        before = int(self.ends[block - 1]) if block else 0
        waited = np.arange(front, front + before - self.done)
        return np.concatenate([waited, at[self.rows[before : self.ends[block]]]])


def one_ahead(work: Callable[[int], T], numbers: Iterable[int]) -> Iterator[T]:
    """The result of each piece of work, in order; the next one is done by a thread while one is used."""
    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
        pending = None
        for number in numbers:
            following = pool.submit(work, number)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def as_rows(x: Tensors | FeatureRows) -> FeatureRows:
    """Tensors of features as rows; rows as they are."""
    return Resident(x) if isinstance(x, Mapping) else x


def take(features: Tensor, rows: Tensor, view: Tensor | None = None) -> Tensor:
    """Rows of features (N, D) or (N, V, D), as float32 of shape (*rows.shape, D); of views ``view``, or the first."""
    if features.dim() == 2:
        # A lookup copies whole rows; indexing by a matrix takes four times as long.
        return torch.nn.functional.embedding(rows, features).float()
    return (features[rows, view] if view is not None else features[rows, 0]).float()


def equal_runs(lengths: list[int]) -> list[slice]:
    """Neighbors that are equally long; those of length 0 are left out."""
    starts = [k for k in range(len(lengths)) if k == 0 or lengths[k] != lengths[k - 1]]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(lengths)], strict=True) if lengths[a] > 0]
