"""The worker of every engine, and the local engine: owed shards, computed in this process, shared by leases.

It stops between two shards: the first signal lets the current shard be committed, the second does not wait.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

from tqdm import tqdm

from embcache.cores import is_shortage, out_of_memory
from embcache.data.budget import Decoding
from embcache.extract.engines.engine import Engine, OnRows, OwedShard, OwedShards, ShardJob, ShardOutcome
from embcache.extract.quarantine import LEFT
from embcache.io import mirror_of
from embcache.log import log
from embcache.store.commit import ShardRows, commit_shard, is_committed
from embcache.store.feature_store import FeatureStore
from embcache.store.lease import Lease

# How long to wait before looking again at shards that another process is computing: on a disk, and at most in an object
# store, where each look at a lease is seven requests.
_POLL_SECONDS, _MOST_POLL_SECONDS = 1.0, 30.0


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

    def forget(self, callback: Callable[[], object]) -> None:
        """Call it no more."""
        self._callbacks.remove(callback)

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


@dataclass
class Worker:
    """Computes and commits shards in one process."""

    stores: Sequence[FeatureStore]
    compute: Callable[..., list[ShardRows]]  # of an `OwedShard` with ``batch_size=``, ``on_rows=``
    check: Callable[[Sequence[FeatureStore], Sequence[ShardRows], OwedShard], None] = lambda *_: None
    runtimes: Sequence[str | None] = ()  # per store, where features have one
    threads: int | None = None
    decoding: Decoding = field(default_factory=Decoding)
    _largest: int | None = None  # batch that the memory holds

    def run(self, shard: OwedShard, on_rows: OnRows = lambda rows: None) -> ShardOutcome:
        """Lease a shard in its stores, compute it where it is not committed yet, check the rows and commit them."""
        with ExitStack() as leases:
            held = tuple(
                index for index in shard.stores
                if (lease := Lease.acquire(self.stores[index].path, shard.number)) and leases.enter_context(lease)
            )  # fmt: skip
            # A shard that another process committed since the plan was read costs nothing.
            owed = tuple(index for index in held if not is_committed(self.stores[index].path, shard.number))
            on_rows(len(shard.sources) * (len(held) - len(owed)))
            if not owed:
                return ShardOutcome(held, ())
            rows, batch_size = self._compute(replace(shard, stores=owed), on_rows)
            self.check([self.stores[index] for index in owed], rows, shard)
            computed = tuple(
                index for index, each in zip(owed, rows, strict=True)
                if commit_shard(
                    self.stores[index].path, shard.number, each, batch_size=batch_size, threads=self.threads,
                    runtime=self.runtimes[index] if self.runtimes else None,
                )
            )  # fmt: skip
            bad = max(sum(why not in ("", LEFT) for why in each.reasons) for each in rows)
            return ShardOutcome(held, computed, rows[0].digests, bad) if computed else ShardOutcome(held, ())

    def _compute(self, shard: OwedShard, on_rows: OnRows) -> tuple[list[ShardRows], int]:
        """The rows of a shard, and the batch size, halved if memory is short.

        There are never two sizes in one shard, so that the recorded one decides its rows.
        """
        size = min(shard.batch_size, self._largest or shard.batch_size)
        while True:
            counted = list[int]()

            def count(rows: int, counted: list[int] = counted) -> None:
                counted.append(rows)
                on_rows(rows)

            try:
                return self.compute(shard, batch_size=size, on_rows=count), size
            except BaseException as error:
                on_rows(-sum(counted))  # these rows are computed again, or not at all
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


class LocalEngine(Engine):
    """Goes through the owed shards in this process."""

    def __init__(self, label: str, stop: Stop | None = None) -> None:
        self._label, self._stop = label, stop or Stop()

    def run(self, owed: Iterable[OwedShards], job: ShardJob) -> Iterator[OwedShards]:
        """Compute every owed shard that no process has committed, those of one dataset after the other.

        A shard that another process is computing is waited for: if that process dies, the shard is computed here.
        """
        with progress_bar(self._label) as bar, job.open() as worker:
            for shards in owed:
                lengthen(bar, shards.rows)
                self._run(shards, worker, bar.update)
                if self._stop.requested:
                    return
                yield shards

    def _run(self, shards: OwedShards, worker: Worker, on_rows: OnRows) -> None:
        pause, shared = _POLL_SECONDS, mirror_of(shards.stores[0].path) is not None
        stop, waiting = self._stop, {key: list(sharing) for key, sharing in shards.waiting.items()}
        while waiting and not stop.requested:
            progress = False
            for key, sharing in list(waiting.items()):
                if stop.requested:
                    break
                stop.busy = True  # from its lease on: a signal meanwhile waits for its commit
                try:
                    shard = shards.shard(key, sharing)
                    outcome = worker.run(shard, on_rows)
                    waiting[key] = [index for index in sharing if index not in outcome.settled]
                    if not waiting[key]:
                        del waiting[key]
                    stop.complete = shards.last and not waiting
                    shards.settle(shard, outcome)
                finally:
                    stop.busy = False
                progress |= bool(outcome.settled)
            if waiting and not progress:
                stop.wait(pause)
            pause = min(2 * pause, _MOST_POLL_SECONDS) if shared and not progress else _POLL_SECONDS


def progress_bar(label: str) -> tqdm[Any]:
    """A bar over the rows of a run, on a terminal; see `lengthen`."""
    return tqdm(total=0, unit="img", desc=label, disable=None, smoothing=0.05)


def lengthen(bar: tqdm[Any], rows: int) -> None:
    """Let a bar have more rows."""
    bar.total = (bar.total or 0) + rows
    bar.refresh()
