"""What a probe takes of ``--max-memory``: an estimate by which features are streamed, stacks narrowed, probes refused.

All of it is counted in bytes from sizes that are known before anything is read. What is not counted: what attention
holds besides the outputs of its layers, and what loading the labels took before training began.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod

import numpy as np

from embcache.probe.heads import Head, trainable
from embcache.probe.heads.knn import KNN
from embcache.probe.inputs import SHARDS, row_bytes
from embcache.probe.rows import CHUNK
from embcache.probe.solve import is_solved
from embcache.probe.stack import stream_generator
from embcache.store.feature_store import FeatureStore

FIXED = 20_000_000
"""Taken by torch and the allocator as soon as anything is trained, however little."""

FEATURES = 0.75
"""Share of the limit that features may take in memory, at most."""

_BUFFER = 0.125  # share of it that is the buffer of streamed features
_PER_IMAGE = 1000  # of the whole dataset: table, ids and digests, in the dataset and in each store's index
_PER_DRAW = 48  # of a head in a stack and a row that it trains on: its order, sorted, and what sorts it
_PER_JOB = 24  # of a head, waiting or not, and a row that it trains on: which row, its weight
_PER_TEST = 64  # of a head and a test row, besides its probabilities: the table of predictions
_COPIES = 6  # of a head that trains: values, gradients, two moments, and those copied while heads leave the stack
_KEPT = 2  # of a head that is done: its best epoch, and the bytes that are saved
_ACTIVATIONS = 16  # of each output of a layer: its value, its gradient, and what lies between
_NEIGHBOURS = 1024 * 4  # cosines of the images that are scored together, of each training image
_SCORED = 512  # rows that a head is applied to at a time where nothing is trained
_READERS = 4  # shards that are read at a time


@dataclass(frozen=True)
class Shape:
    """Sizes that a probe's memory follows from.

    Attributes
    ----------
    images : int
        Of the whole dataset.
    used : int
        Images whose features are read.
    train, val : int
        Most images that train and that validate one head.
    test : int
        Images that test.
    models : int
        Heads, all subsets together.
    batch : int
        Rows of a head's batch.
    n_classes, n_views : int
    """

    images: int
    used: int
    train: int
    val: int
    test: int
    models: int
    batch: int
    n_classes: int
    n_views: int


@dataclass(frozen=True)
class Need:
    """Bytes that a probe takes, part by part.

    Attributes
    ----------
    base : int
        Whatever is read and trained at a time.
    row : int
        One image's features.
    rows : int
        Images whose features are read.
    loading : int
        Beside features in memory: shards while they are read, rows that are scored together afterwards.
    streaming : int
        Beside the buffer: shards that are read, and rows scored together where they are more than it holds.
    largest : int
        Rows of the largest shard: the buffer holds one at least.
    head : int
        One head of a stack.
    batch : int
        Rows of a head's batch, as many of which wait in front of the buffer.
    solved : bool
        The head is solved on all features at once.
    """

    base: int
    row: int
    rows: int
    loading: int
    streaming: int
    largest: int
    head: int
    batch: int
    solved: bool

    @property
    def features(self) -> int:
        """All features in memory."""
        return self.rows * self.row

    @property
    def in_memory(self) -> int:
        """The least limit under which features are read into memory."""
        return max(ceil(self.features / FEATURES), self.base + self.loading + self.features + self.head)

    @property
    def streamed(self) -> int:
        """The least limit under which features can be streamed."""
        beside = self.base + self.streaming + self._streamed_head
        buffer = ceil(max(self.batch * self.row / _BUFFER, beside / (1 - _BUFFER)))
        return max(buffer, beside + self.largest * self.row)

    @property
    def least(self) -> int:
        """The least limit of all."""
        return self.in_memory if self.solved else min(self.in_memory, self.streamed)

    def buffer_rows(self, limit: int) -> int:
        """Rows of the buffer that features are streamed through."""
        return int(limit * _BUFFER / self.row)

    def width(self, limit: int, buffer_rows: int | None, rows: int | None = None) -> int:
        """Heads that may train as one stack: one at least, as a limit that is too small for one is refused before.

        ``rows`` are in memory, where more than those of this probe are; none of them where they are streamed.
        """
        if buffer_rows is None:
            features = max(self.rows, rows or 0) * self.row
            return max(1, int(limit - self.base - self.loading - features) // self.head)
        block = max(buffer_rows, self.largest) * self.row
        return max(1, int(limit - self.base - self.streaming - block) // self._streamed_head)

    @property
    def _streamed_head(self) -> int:
        return self.head + self.batch * self.row


def estimate(head: Head, stores: Mapping[str, FeatureStore], shape: Shape) -> Need:
    """What a head takes on these stores."""
    dims = {backbone: store.row_shape[-1] for backbone, store in stores.items()}
    numbers = sum(dims.values())
    shards = [_shard_bytes(store) for store in stores.values()]
    if is_solved(head):
        each, kept = _solved(head, numbers, shape), _bank(head, numbers, shape)
    else:
        each, kept = _trained(head, dims, shape)
    outcome = shape.test * (_PER_TEST + 32 * shape.n_classes)
    base = FIXED + _PER_IMAGE * shape.images + shape.models * (_PER_JOB * shape.train + kept + outcome)
    row, largest = row_bytes(stores, shape.n_views), largest_shard(next(iter(stores.values())))
    loading = [_loading(store, shape.n_views) for store in stores.values()]
    # The shard that was read last is kept, another is decoded, and its rows are copied; rows of a second backbone may
    # lie in several of its shards.
    reading = sum((3 if number == 0 else _READERS + 1) * size for number, size in enumerate(shards))
    return Need(
        base=base,
        row=row,
        rows=shape.used,
        loading=max(_chunk(head, dims, shape, max(shape.train, shape.val, shape.test)), *loading),
        streaming=reading + max(0, _chunk(head, dims, shape, largest) - largest * row),
        largest=largest,
        head=each,
        batch=shape.batch,
        solved=is_solved(head),
    )


def largest_shard(store: FeatureStore) -> int:
    """Rows of the largest shard."""
    return int(np.unique(store.features.shards, return_counts=True)[1].max(initial=0))


def megabytes(size: float) -> str:
    """A limit of at least ``size`` bytes, as ``--max-memory`` takes it: never rounded down."""
    return f"{max(1, ceil(size / 1e6))}MB"


def _shard_bytes(store: FeatureStore) -> int:
    return largest_shard(store) * prod(store.row_shape) * store.dtype.itemsize


def _loading(store: FeatureStore, n_views: int) -> int:
    """Bytes that are held beside the features of a backbone while they are read into memory."""
    as_kept = store.dtype in (np.float16, np.float32) and (len(store.row_shape) == 1 or n_views > 1)
    shards = len(np.unique(store.features.shards))
    return (min(_READERS, shards) + (0 if as_kept else min(SHARDS, shards))) * _shard_bytes(store)


def _chunk(head: object, dims: Mapping[str, int], shape: Shape, rows: int) -> int:
    """Bytes of rows that are scored together, widened; heads with constants standardise them, and sum them as float64.

    All heads share them; ``rows`` are the most that there are.
    """
    constants = hasattr(head, "constants") or is_solved(head)
    return min(CHUNK, rows) * ((24 if constants else 8) * sum(dims.values()) + 4 * _ACTIVATIONS * shape.n_classes)


def _trained(head: Head, dims: Mapping[str, int], shape: Shape) -> tuple[int, int]:
    """Bytes of one head that trains, and of one that is done."""
    params = trainable(head).init(stream_generator("", "count"), dims, shape.n_classes)
    size = 4 * (sum(p.numel() for p in params.values()) + (2 * sum(dims.values()) if hasattr(head, "constants") else 0))
    outputs = sum(p.shape[0] for p in params.values() if p.dim() > 1)
    # A batch is gathered as it is stored, widened, standardised and laid side by side.
    batch = 4 * shape.batch * (4 * sum(dims.values()) + _ACTIVATIONS * outputs)
    scored = (
        min(_SCORED, max(shape.val, shape.test))
        * 4
        * ((2 * sum(dims.values()) if hasattr(head, "constants") else 0) + 4 * outputs)
    )
    draws = shape.train * (_PER_DRAW + (16 if shape.n_views > 1 else 0))
    return _COPIES * size + max(batch, scored) + draws + shape.val * (32 + 4 * shape.n_classes), _KEPT * size


def _solved(head: object, numbers: int, shape: Shape) -> int:
    """Bytes beside the features while one head is solved: as float32 twice, three times while standardised, as float64.

    With fewer rows than features, logistic regression also decomposes them: two more matrices of float64.
    """
    copies = 4 + 4 + 4 + 8 + (16 if shape.train < numbers else 0)
    scored = shape.train * (4 * numbers + 2 * _NEIGHBOURS) if isinstance(head, KNN) else 0
    return (shape.train + shape.val) * numbers * copies + scored


def _bank(head: object, numbers: int, shape: Shape) -> int:
    """Bytes of one solved head: nearest neighbours keep the training rows, in half precision."""
    if isinstance(head, KNN):
        return _KEPT * shape.train * (2 * numbers + 4 * shape.n_classes)
    return _KEPT * 4 * numbers * (shape.n_classes + 2)
