"""The local engine: owed shards of one or more stores, computed here and shared with other processes by leases."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from tqdm import tqdm

from embcache.cores import is_shortage
from embcache.data.dataset import ImageDataset
from embcache.data.images import ImageRef, image_refs
from embcache.errors import EmbcacheError
from embcache.extract.shard_plan import Plan, Shard
from embcache.extract.signals import Stop
from embcache.log import log
from embcache.store.commit import ShardRows, commit_shard, is_committed, refresh_view
from embcache.store.feature_store import FeatureStore
from embcache.store.lease import Lease

# How long to wait before looking again at shards that another process is computing.
_POLL_SECONDS = 1.0

R = TypeVar("R")


@dataclass(frozen=True)
class OwedStore:
    """A store with what it owes, and the images per batch."""

    store: FeatureStore
    plan: Plan
    batch_size: int


@dataclass(frozen=True)
class LeasedShard:
    """A shard that this process holds, for all stores that owe it: they share one decoding."""

    number: int
    sources: Sequence[ImageRef]
    stores: Sequence[int]  # places in the engine's list of stores
    batch_size: int


class LocalEngine:
    """Goes through the owed shards of some stores; what their rows are made of is the caller's choice."""

    def __init__(
        self,
        owed: Sequence[OwedStore],
        dataset: ImageDataset,
        *,
        part: tuple[int, int] | None = None,
        stop: Stop | None = None,
        threads: int | None = None,
        label: str = "extract",
    ) -> None:
        self.computed = [0] * len(owed)  # images per store
        self._owed, self._dataset, self._part = owed, dataset, part
        self._stop, self._threads, self._label = stop or Stop(), threads, label
        self._largest: int | None = None  # batch that the memory holds

    def shards(self) -> Generator[LeasedShard, None, None]:
        """Yield every owed shard that no process has committed, each leased until the next one is taken.

        A shard that another process is computing is waited for: if that process dies, the shard is computed here. Close
        the generator if the work on a shard fails, so that its leases are free at once.
        """
        waiting: dict[tuple[Shard, int], list[int]] = {}
        for index, each in enumerate(self._owed):
            for shard in each.plan.shards:
                if in_part(shard.number, self._part):
                    waiting.setdefault((shard, each.batch_size), []).append(index)
        twice = sum(len(s.ids) for s, _ in waiting) - len({image for s, _ in waiting for image in s.ids})
        if twice:
            log.info(f"the backbones do not owe the same shards: {twice} images are decoded in a second pass")
        sources = {source.id: source for source in image_refs(self._dataset.table)}
        total = sum(len(shard.ids) * len(sharing) for (shard, _), sharing in waiting.items())
        name, stop = f"{self._label} {self._dataset.name}", self._stop
        with tqdm(total=total, unit="img", desc=name, disable=None, smoothing=0.05) as self._bar:
            stop.complete = not waiting
            while waiting and not stop.requested:
                progress = False
                for (shard, batch_size), sharing in list(waiting.items()):
                    if stop.requested:
                        break
                    # Current from its lease on: a signal meanwhile waits for its commit.
                    with stop.working_on(len(shard.ids)), ExitStack() as leases:
                        leased = [index for index in sharing if self._lease(leases, index, shard.number)]
                        # A shard that another process committed since the plan was read costs nothing.
                        owed = [i for i in leased if not is_committed(self._owed[i].store.path, shard.number)]
                        if owed:
                            # An image that left the dataset after its shard was planned keeps its row, as unreadable.
                            wanted = [sources.get(image, ImageRef(image, "", "")) for image in shard.ids]
                            yield LeasedShard(shard.number, wanted, owed, batch_size)
                    self._bar.update(len(shard.ids) * (len(leased) - len(owed)))
                    left = [index for index in sharing if index not in leased]
                    if left:
                        waiting[shard, batch_size] = left
                    else:
                        del waiting[shard, batch_size]
                        stop.complete = not waiting
                    progress |= bool(leased)
                if waiting and not progress:
                    stop.wait(_POLL_SECONDS)
        for each in self._owed:
            refresh_view(each.store.path)

    def _lease(self, leases: ExitStack, index: int, number: int) -> bool:
        lease = Lease.acquire(self._owed[index].store.path, number)
        if lease is not None:
            leases.callback(lease.release)
        return lease is not None

    def compute(self, shard: LeasedShard, compute: Callable[..., R]) -> tuple[R, int]:
        """What ``compute(batch_size=…, on_rows=…)`` makes of a shard, and the batch size, halved if memory is short.

        There are never two sizes in one shard, so that the recorded one decides its rows.
        """
        size = min(shard.batch_size, self._largest or shard.batch_size)
        while True:
            shown = self._bar.n
            try:
                return compute(batch_size=size, on_rows=partial(self._show, len(shard.stores))), size
            except BaseException as error:
                self._bar.update(shown - self._bar.n)  # these rows are computed again, or not at all
                if not is_shortage(error):
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                if size == 1:
                    raise EmbcacheError(
                        "the memory does not hold the network and one image", code="out-of-memory", found=reason,
                        fix=(
                            "--device cpu or another device",
                            "end other processes that use the memory; the same command then continues",
                        ),
                    ) from error  # fmt: skip
            # Outside the clause: the error keeps the tensors of its frames alive.
            size = self._largest = size // 2
            log.warning(f"out of memory ({reason}): the batch is {size} from here on, recorded with each shard")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _show(self, stores: int, images: int) -> None:
        self._bar.update(images)
        self._stop.computed(images / stores)

    def commit(self, shard: LeasedShard, rows: Sequence[ShardRows], batch_size: int) -> None:
        """Write the rows of a shard to each store that owes it."""
        for index, each in zip(shard.stores, rows, strict=True):
            path = self._owed[index].store.path
            commit_shard(path, shard.number, each, batch_size=batch_size, threads=self._threads)
            self.computed[index] += len(each.ids)


def in_part(number: int, part: tuple[int, int] | None) -> bool:
    """Whether a shard belongs to the I-th of N parts."""
    return part is None or number % part[1] == part[0] - 1
