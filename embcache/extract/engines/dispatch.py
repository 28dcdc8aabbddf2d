"""The driver of workers in other processes: hands out shards, and those of lost workers again.

Whether a lost worker has committed its shard is asked of the store. That a worker is thought lost and still computes
does no harm: one commit wins.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from embcache.errors import EmbcacheError
from embcache.extract.engines.engine import OnRows, OwedShard, OwedShards, ShardOutcome
from embcache.extract.engines.local import Stop
from embcache.extract.scan import Shard
from embcache.log import log
from embcache.store.commit import is_committed
from embcache.store.lease import holder

# How long a shard that another process is computing is left alone.
_POLL_SECONDS = 1.0
# A shard that took so many workers with it, by the memory that it needs perhaps, is not handed out again.
_MOST_LOSSES = 3
# After which a warning says that no worker is ready: Ray itself prints nothing.
_UNREADY_SECONDS = 30.0


@dataclass(frozen=True)
class Ready:
    """A worker has opened its job."""

    where: str  # words for people


@dataclass(frozen=True)
class Lost:
    """A worker is gone, or cannot be reached."""

    reason: str
    node: bool = False  # so is its node, as far as is known


class WorkerPool(ABC):
    """Workers in other processes, by number."""

    @abstractmethod
    def room(self) -> int:
        """How many workers there may be, those that there are included; a node that is gone has no room."""

    @abstractmethod
    def start(self) -> int:
        """Let another worker open the job as soon as there is room."""

    @abstractmethod
    def give(self, worker: int, shard: OwedShard) -> None:
        """Let a worker compute a shard."""

    @abstractmethod
    def wait(self, seconds: float) -> Sequence[tuple[int, Ready | ShardOutcome | Lost | EmbcacheError]]:
        """What workers answer within some seconds; an error is one that a user can fix."""

    @abstractmethod
    def end(self, worker: int) -> None:
        """Let go of a worker that is lost or not needed."""


@dataclass(eq=False)
class _Task:
    """A shard, for those of its stores in which it is not settled."""

    owner: OwedShards
    key: tuple[Shard, int]
    stores: list[int]
    losses: int = 0  # of workers that were computing it
    holder: bytes = b""  # the last of them


class Dispatch:
    """The bookkeeping of one run: every shard is waiting, with one worker, or settled."""

    def __init__(
        self, pool: WorkerPool, owed: Iterable[OwedShards], stop: Stop, most: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._pool, self._stop, self._most, self._clock = pool, stop, most, clock
        self._owed: Iterator[OwedShards] | None = iter(owed)
        self._fault: Exception | None = None  # of planning: it ends the run when what has gone out is settled
        self._waiting = deque[_Task]()
        self._elsewhere: list[_Task] = []  # other processes compute these
        self._look_again = 0.0  # when to ask for them once more
        self._opening: set[int] = set()
        self._ready: dict[int, str] = {}  # where each worker is
        self._proven: set[int] = set()  # workers that have answered for a shard
        self._busy: dict[int, tuple[_Task, OwedShard]] = {}
        self._failed: list[EmbcacheError | str] = []  # of workers that never were ready, or were lost
        self._unready = 0  # workers that never were: they are not replaced
        self._losses = 0
        self._unready_since: float | None = clock()  # None once one was ready, or the warning was printed
        self._last = True  # whether nothing follows what was planned last

    def run(self, on_rows: OnRows) -> Iterator[OwedShards]:
        """Yield what was owed for a dataset once all of it is settled, until everything is or the run is to stop."""
        while True:
            if self._elsewhere and self._clock() >= self._look_again:
                self._waiting.extend(self._elsewhere)
                self._elsewhere.clear()
            if not self._stop.requested:
                self._take_more()
            if self._fault is not None and not (self._waiting or self._busy):
                raise self._fault
            settled = not (self._waiting or self._elsewhere or self._busy)
            self._stop.complete = settled and self._last
            if settled or (self._stop.requested and not self._busy):
                return
            if not self._stop.requested:
                self._recruit()
                for worker in [each for each in self._ready if each not in self._busy]:
                    if self._waiting:
                        task = self._waiting.popleft()
                        self._busy[worker] = task, task.owner.shard(task.key, task.stores)
                        self._pool.give(worker, self._busy[worker][1])
            for worker, answer in self._pool.wait(_POLL_SECONDS / 4):
                yield from self._settle(worker, answer, on_rows)
            if self._unready_since is not None and self._clock() > self._unready_since + _UNREADY_SECONDS:
                self._unready_since = None
                log.warning("no worker is ready yet: they load their networks, or wait for cores that others use")

    def _take_more(self) -> None:
        """Once everything has gone out, plan what is owed next while the last shards are computed."""
        while self._owed is not None and not self._waiting:
            if len({id(task.owner) for task in (*self._elsewhere, *(task for task, _ in self._busy.values()))}) > 1:
                return  # tables of more would fill the memory
            try:
                shards = next(self._owed, None)
            except Exception as error:
                shards, self._fault = None, error
            if shards is None:
                self._owed = None
            else:
                self._last = shards.last
                self._waiting.extend(_Task(shards, key, list(stores)) for key, stores in shards.waiting.items())

    def _recruit(self) -> None:
        """Start the workers that are lacking; `EmbcacheError` where none is there and none can come."""
        room = self._pool.room()
        there = len(self._ready) + len(self._opening)
        for _ in range(min(there - room, len(self._opening))):  # their node is gone: they would wait forever
            self._pool.end(self._opening.pop())
        wanted = min(room, self._most or room, len(self._waiting) + len(self._elsewhere) + len(self._busy))
        for _ in range(wanted - self._unready - there):
            self._opening.add(self._pool.start())
        if not self._ready and not self._opening:
            raise self._all_gone()

    def _all_gone(self) -> EmbcacheError:
        errors = [each for each in self._failed if isinstance(each, EmbcacheError)]
        if errors and not self._losses:
            return errors[0]
        left = [task.key[0] for task in (*self._waiting, *self._elsewhere)]
        images = sum(len(shard.ids) for shard in left)
        return EmbcacheError(
            f"all workers are gone; {len(left):,} shards ({images:,} images) are left"
            + (", and what is not planned yet" if self._owed is not None else ""),
            code="workers-gone", found="\n".join(map(str, self._failed)) or "no node has room for a worker",
            fix="run the same command again, on a cluster after its nodes have started: what is committed stays",
        )  # fmt: skip

    def _settle(
        self, worker: int, answer: Ready | ShardOutcome | Lost | EmbcacheError, on_rows: OnRows
    ) -> Iterator[OwedShards]:
        if isinstance(answer, Ready):
            self._opening.discard(worker)
            self._ready[worker], self._unready_since = answer.where, None
            return
        task, shard = self._busy.pop(worker, (None, None))
        if isinstance(answer, ShardOutcome):
            outcome, lost = answer, False
            self._proven.add(worker)
        else:
            if isinstance(answer, EmbcacheError) and task is not None:
                raise answer
            where, lost = self._let_go(worker, answer), True
            outcome = self._look(worker, task, shard, answer, where) if task and shard else ShardOutcome((), ())
        if task is None or shard is None:
            return
        task.stores = [index for index in task.stores if index not in outcome.settled]
        if task.stores and lost:
            self._waiting.appendleft(task)
        elif task.stores:
            self._elsewhere.append(task)
            self._look_again = self._clock() + _POLL_SECONDS
        on_rows(len(shard.sources) * len(outcome.settled))
        task.owner.settle(shard, outcome)
        if not task.owner.left:
            yield task.owner

    def _let_go(self, worker: int, answer: Lost | EmbcacheError) -> str:
        """Forget a worker that is lost, or could not begin; says where it was."""
        self._pool.end(worker)
        where = self._ready.pop(worker, "a worker")
        self._failed.append(answer if isinstance(answer, EmbcacheError) else f"{where}: {answer.reason}")
        if worker in self._opening:
            self._opening.discard(worker)
            if not (isinstance(answer, Lost) and answer.node):  # else there is less room, and nothing wrong with it
                self._unready += 1
                log.warning(f"a worker could not begin: {_line(answer)}")
        return where

    def _look(
        self, worker: int, task: _Task, shard: OwedShard, answer: Lost | EmbcacheError, where: str
    ) -> ShardOutcome:
        """What a worker that was lost has committed of its shard."""
        stores = task.owner.stores
        committed = tuple(i for i in shard.stores if is_committed(stores[i].path, shard.number))
        again = len(committed) < len(shard.stores)
        fate = "is handed out again" if again else "was committed before"
        log.warning(
            f"{where} was lost ({_line(answer)}): shard {shard.number} {fate}; workers left: {len(self._ready)}"
        )
        before, task.holder = task.holder, b"".join(holder(stores[i].path, shard.number) for i in shard.stores)
        # One that worked before and has no lease died while it waited for work: this shard is not the cause.
        task.losses += worker not in self._proven or task.holder not in (b"", before)
        self._losses += 1
        if again and task.losses >= _MOST_LOSSES:
            raise EmbcacheError(
                f"{_MOST_LOSSES} workers were lost while they computed shard {shard.number}",
                code="shard-loses-workers", found=_line(answer), where=stores[shard.stores[0]].path,
                fix="give a worker more memory or a smaller --batch-size, then run the same command",
            )  # fmt: skip
        return ShardOutcome(committed, committed)


def _line(answer: Lost | EmbcacheError) -> str:
    text = answer.reason if isinstance(answer, Lost) else answer.problem + (f": {answer.found}" if answer.found else "")
    return " ".join(text.split())[:200]
