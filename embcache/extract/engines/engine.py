"""The contract of engines: owed shards go out, workers compute and commit them, outcomes come back.

`Engine.run` takes the shards that some stores owe and a `ShardJob`, from which any process makes the same `Worker`.
What a worker does with a shard is the same for all engines: lease it, compute it, check it, commit it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from embcache.data.dataset import ImageDataset
from embcache.data.images import ImageRef, image_refs
from embcache.extract.scan import Plan, Shard
from embcache.log import log
from embcache.store.commit import refresh_view
from embcache.store.feature_store import FeatureStore

if TYPE_CHECKING:
    from embcache.extract.engines.local import Worker

OnRows = Callable[[int], object]
"""Called with the number of rows that were just computed; a negative one takes rows back."""


@dataclass(frozen=True)
class OwedStore:
    """A store with what it owes, and the images per batch."""

    store: FeatureStore
    plan: Plan
    batch_size: int
    runtime: str = "eager"  # what executes the network


@dataclass(frozen=True)
class OwedShard:
    """A shard to compute, for all stores that owe it: they share one decoding. All that travels to a worker."""

    number: int
    sources: tuple[ImageRef, ...]
    stores: tuple[int, ...]  # places in the list of stores
    batch_size: int


@dataclass(frozen=True)
class ShardOutcome:
    """What became of a shard."""

    settled: tuple[int, ...]  # stores in which it is committed; in the others another process is computing it
    computed: tuple[int, ...]  # those of them in which this worker committed it
    digests: tuple[str, ...] = ()  # of the images, where it was computed


class OwedShards:
    """The shards that some stores owe, of one part of them or of all."""

    def __init__(self, owed: Sequence[OwedStore], dataset: ImageDataset, part: tuple[int, int] | None = None) -> None:
        self.stores = [each.store for each in owed]
        self.computed = [0] * len(owed)  # images per store that this run computed
        waiting: dict[tuple[Shard, int], list[int]] = {}
        for index, each in enumerate(owed):
            for shard in each.plan.shards:
                if in_part(shard.number, part):
                    waiting.setdefault((shard, each.batch_size), []).append(index)
        self.waiting: Mapping[tuple[Shard, int], Sequence[int]] = waiting
        """Places of the stores that owe a shard, by shard and images per batch."""
        twice = sum(len(s.ids) for s, _ in waiting) - len({image for s, _ in waiting for image in s.ids})
        if twice:
            log.info(f"the backbones do not owe the same shards: {twice} images are decoded in a second pass")
        self._table = dataset.table
        self._places = dict.fromkeys((image for shard, _ in waiting for image in shard.ids), -1)  # rows of the table
        for row, image in enumerate(self._table["id"].tolist() if self._places else ()):
            if image in self._places:
                self._places[image] = row
        self.rows = sum(len(shard.ids) * len(sharing) for (shard, _), sharing in waiting.items())

    def shard(self, key: tuple[Shard, int], stores: Sequence[int]) -> OwedShard:
        """One of :attr:`waiting`, for some of its stores."""
        shard, batch_size = key
        rows = [row for id_ in shard.ids if (row := self._places[id_]) >= 0]
        known = iter(image_refs(self._table.iloc[rows]))
        # An image that left the dataset after its shard was planned keeps its row, as unreadable.
        sources = (next(known) if self._places[id_] >= 0 else ImageRef(id_, "", "") for id_ in shard.ids)
        return OwedShard(shard.number, tuple(sources), tuple(stores), batch_size)

    def count(self, shard: OwedShard, outcome: ShardOutcome) -> tuple[OwedShard, ShardOutcome]:
        """Count what was computed of a shard."""
        for index in outcome.computed:
            self.computed[index] += len(shard.sources)
        return shard, outcome

    def refresh_views(self) -> None:
        """Write the views of the stores that were added to."""
        for store in self.stores:
            refresh_view(store.path)


def in_part(number: int, part: tuple[int, int] | None) -> bool:
    """Whether a shard belongs to the I-th of N parts."""
    return part is None or number % part[1] == part[0] - 1


class ShardJob(ABC):
    """What is computed: plain data. A field ``here``, of what is open in this process, does not travel."""

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "here": None}

    @abstractmethod
    def open(self) -> AbstractContextManager[Worker]:
        """What computes shards of this job in this process, while a ``with`` block runs."""


class Engine(ABC):
    """Who calls the worker."""

    @abstractmethod
    def run(self, shards: OwedShards, job: ShardJob) -> Iterator[tuple[OwedShard, ShardOutcome]]:
        """Let every owed shard be computed that no other process commits; count, and yield what became of each."""
