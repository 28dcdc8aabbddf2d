"""The contract of engines: owed shards go out, workers compute and commit them, outcomes come back.

`Engine.run` takes the shards that some stores owe and a `ShardJob`, from which any process makes the same `Worker`.
What a worker does with a shard is the same for all engines: lease it, compute it, check it, commit it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from embcache.data.dataset import ImageDataset
from embcache.data.images import ImageRef, image_refs
from embcache.extract.scan import Plan, Shard
from embcache.log import log
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
    part: str = ""  # digest of the partition that its images are of
    bad: int = 0  # images of other partitions that were quarantined when this one was planned


@dataclass(frozen=True)
class ShardOutcome:
    """What became of a shard."""

    settled: tuple[int, ...]  # stores in which it is committed; in the others another process is computing it
    computed: tuple[int, ...]  # those of them in which this worker committed it
    digests: tuple[str, ...] = ()  # of the images, where it was computed
    unusable: int = 0  # images, where it was computed


class OwedShards:
    """The shards that some stores owe for a dataset, or for one partition of it; of one part of them or of all.

    ``learn`` is called with images that were computed, and the digests of what was read. The run goes on after these
    shards unless they are its ``last``.
    """

    def __init__(
        self, owed: Sequence[OwedStore], dataset: ImageDataset, part: tuple[int, int] | None = None,
        learn: Callable[[Sequence[ImageRef], Sequence[str]], object] = lambda *_: None, last: bool = True,
    ) -> None:  # fmt: skip
        self.dataset, self._learn, self.last = dataset, learn, last
        self.stores = [each.store for each in owed]
        self.computed = [0] * len(owed)  # images per store that this run computed
        self.unusable = 0  # of them, in the store that has most
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
        self._places = dict.fromkeys((image for shard, _ in waiting for image in shard.ids), -1)  # rows of the table
        for row, image in enumerate(dataset.table["id"].tolist() if self._places else ()):
            if image in self._places:
                self._places[image] = row
        self.rows = sum(len(shard.ids) * len(sharing) for (shard, _), sharing in waiting.items())
        self.left = sum(map(len, waiting.values()))
        """Shards that are not settled yet, one for each store that owes them."""

    def shard(self, key: tuple[Shard, int], stores: Sequence[int]) -> OwedShard:
        """One of :attr:`waiting`, for some of its stores."""
        shard, batch_size = key
        rows = [row for id_ in shard.ids if (row := self._places[id_]) >= 0]
        known = iter(image_refs(self.dataset.table.iloc[rows]))
        # An image that left the dataset after its shard was planned keeps its row, as unreadable.
        sources = (next(known) if self._places[id_] >= 0 else ImageRef(id_, "", "") for id_ in shard.ids)
        part, bad = (self.dataset.part.digest, self.dataset.part.bad) if self.dataset.part else ("", 0)
        return OwedShard(shard.number, tuple(sources), tuple(stores), batch_size, part, bad)

    def settle(self, shard: OwedShard, outcome: ShardOutcome) -> None:
        """Count what became of a shard."""
        self.left -= len(outcome.settled)
        self.unusable += outcome.unusable
        for index in outcome.computed:
            self.computed[index] += len(shard.sources)
        if outcome.digests:
            self._learn(shard.sources, outcome.digests)
        if not self.left:  # table and IDs would stay in memory for as long as an engine refers to this
            del self.dataset, self._places, self._learn
            self.waiting = {}


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
    def run(self, owed: Iterable[OwedShards], job: ShardJob) -> Iterator[OwedShards]:
        """Let every owed shard be computed that no other process commits; yield those of each dataset once all are.

        The next ones are asked for when all of the last ones have gone out. A run that is stopped yields no more.
        """
