"""The local engine: owed shards of one or more stores, computed here and shared with other processes by leases.

It stops between two shards: the first signal lets the current shard be committed, the second does not wait.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

from tqdm import tqdm

from embcache.cores import is_shortage, out_of_memory
from embcache.data.dataset import ImageDataset
from embcache.data.images import ImageRef, image_refs
from embcache.extract.scan import Plan, Shard
from embcache.log import log
from embcache.store.commit import ShardRows, commit_shard, is_committed, refresh_view
from embcache.store.feature_store import FeatureStore
from embcache.store.lease import Lease

# How long to wait before looking again at shards that another process is computing.
_POLL_SECONDS = 1.0

R = TypeVar("R")


class Stop:
    """Whether a run is to end after the current shard; other threads may request it at any time."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.busy = False  # with a shard, from its lease to its commit
        self.others = self.killed = self.complete = False
        self._requested = threading.Event()
        self._callbacks: list[Callable[[], object]] = []

    @property
    def requested(self) -> bool:
        """Whether no further shard is to begin."""
        return self._requested.is_set()

    def request(self) -> None:
        """Let no further shard begin."""
        self._requested.set()
        for callback in self._callbacks:
            callback()

    def on_request(self, callback: Callable[[], object]) -> None:
        """Call something at the request, or now if there was one."""
        self._callbacks.append(callback)
        if self.requested:
            callback()

    def wait(self, seconds: float) -> None:
        """Sleep, unless the run is to end."""
        self._requested.wait(seconds)


@contextmanager
def stop_on_signals(stop: Stop) -> Iterator[Stop]:
    """SIGINT and SIGTERM request a stop; a second one, or one between shards, ends the run at once.

    If everything is computed, the first one is only noted. Outside the main thread, where Python allows no handlers,
    nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        first, stop.signal = stop.signal is None, number
        if not first or not (stop.busy or stop.others or stop.complete):
            stop.request()  # Python drops what is raised while an object is finalized: then no further shard begins
            raise SystemExit(exit_status(number))
        if stop.complete and not stop.busy:
            return  # what remains takes a moment
        # Straight to the descriptor: a handler may interrupt Python's own writing to the stream.
        with suppress(OSError):  # the reader is gone
            os.write(2, b"\nstopping after the current shard; again stops at once\n")
        stop.request()

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_status(number: int) -> int:
    """What shells expect of a process that a signal ended: 128 plus its number."""
    return 128 + int(number)


@dataclass(frozen=True)
class OwedStore:
    """A store with what it owes, and the images per batch."""

    store: FeatureStore
    plan: Plan
    batch_size: int
    runtime: str = "eager"  # what executes the network


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
        table = self._dataset.table
        places = dict.fromkeys((image for shard, _ in waiting for image in shard.ids), -1)  # rows of the table
        for row, image in enumerate(table["id"].tolist() if places else ()):
            if image in places:
                places[image] = row
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
                    with ExitStack() as leases:
                        stop.busy = True
                        leases.callback(setattr, stop, "busy", False)
                        leased = [
                            index for index in sharing
                            if (lease := Lease.acquire(self._owed[index].store.path, shard.number))
                            and leases.enter_context(lease)
                        ]  # fmt: skip
                        # A shard that another process committed since the plan was read costs nothing.
                        owed = [i for i in leased if not is_committed(self._owed[i].store.path, shard.number)]
                        if owed:
                            # An image that left the dataset after its shard was planned keeps its row, as unreadable.
                            known = iter(image_refs(table.iloc[[places[id_] for id_ in shard.ids if places[id_] >= 0]]))
                            wanted = [next(known) if places[id_] >= 0 else ImageRef(id_, "", "") for id_ in shard.ids]
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

    def compute(self, shard: LeasedShard, compute: Callable[..., R]) -> tuple[R, int]:
        """What ``compute(batch_size=…, on_rows=…)`` makes of a shard, and the batch size, halved if memory is short.

        There are never two sizes in one shard, so that the recorded one decides its rows.
        """
        size = min(shard.batch_size, self._largest or shard.batch_size)
        while True:
            shown = self._bar.n
            try:
                return compute(batch_size=size, on_rows=self._bar.update), size
            except BaseException as error:
                self._bar.update(shown - self._bar.n)  # these rows are computed again, or not at all
                if not is_shortage(error):
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                if size == 1:
                    raise out_of_memory(error) from error
            # Outside the clause: the error keeps the tensors of its frames alive.
            size = self._largest = size // 2
            log.warning(f"out of memory ({reason}): the batch is {size} from here on, recorded with each shard")
            if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
                torch.cuda.empty_cache()

    def commit(self, shard: LeasedShard, rows: Sequence[ShardRows], batch_size: int) -> None:
        """Write the rows of a shard to each store that owes it."""
        for index, each in zip(shard.stores, rows, strict=True):
            path = self._owed[index].store.path
            runtime = self._owed[index].runtime
            commit_shard(path, shard.number, each, batch_size=batch_size, threads=self._threads, runtime=runtime)
            self.computed[index] += len(each.ids)


def in_part(number: int, part: tuple[int, int] | None) -> bool:
    """Whether a shard belongs to the I-th of N parts."""
    return part is None or number % part[1] == part[0] - 1
