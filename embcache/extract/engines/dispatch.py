"""The driver of workers in other processes: hands out shards, and those of lost workers again.

Whether a lost worker has committed its shard is asked of the store. That a worker is thought lost and still computes
does no harm: one commit wins.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from embcache.errors import EmbcacheError
from embcache.extract.engines.engine import OnRows, OwedShard, OwedShards, ShardOutcome
from embcache.extract.engines.local import Stop
from embcache.extract.scan import Shard
from embcache.log import log
from embcache.store.commit import is_committed

# How long a shard that another process is computing is left alone.
_POLL_SECONDS = 1.0
# A shard that took so many workers with it, by the memory that it needs perhaps, is not handed out again.
_MOST_LOSSES = 3


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


class Dispatch:
    """The bookkeeping of one run: every shard is waiting, with one worker, or settled."""

    def __init__(
        self, pool: WorkerPool, shards: OwedShards, stop: Stop, most: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._pool, self._shards, self._stop, self._most, self._clock = pool, shards, stop, most, clock
        self._waiting = deque((key, list(stores)) for key, stores in shards.waiting.items())
        self._elsewhere: list[tuple[tuple[Shard, int], list[int]]] = []  # other processes compute these
        self._look_again = 0.0  # when to ask for them once more
        self._opening: set[int] = set()
        self._ready: dict[int, str] = {}  # where each worker is
        self._busy: dict[int, tuple[tuple[Shard, int], OwedShard]] = {}
        self._failed: list[EmbcacheError | str] = []  # of workers that never were ready, or were lost
        self._unready = 0  # workers that never were: they are not replaced
        self._losses: Counter[tuple[Shard, int]] = Counter()

    def run(self, on_rows: OnRows) -> Iterator[tuple[OwedShard, ShardOutcome]]:
        """Yield what becomes of every shard, until all are settled or the run is to stop."""
        while self._waiting or self._elsewhere or self._busy:
            if self._elsewhere and self._clock() >= self._look_again:
                self._waiting.extend(self._elsewhere)
                self._elsewhere.clear()
            if self._stop.requested:
                if not self._busy:
                    return
            else:
                self._recruit()
                for worker in [each for each in self._ready if each not in self._busy]:
                    if self._waiting:
                        key, stores = self._waiting.popleft()
                        self._busy[worker] = key, self._shards.shard(key, stores)
                        self._pool.give(worker, self._busy[worker][1])
            for worker, answer in self._pool.wait(_POLL_SECONDS / 4):
                yield from self._settle(worker, answer, on_rows)
        self._stop.complete = True

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
        left = [shard for (shard, _), _ in (*self._waiting, *self._elsewhere)]
        images = sum(len(shard.ids) for shard in left)
        return EmbcacheError(
            f"all workers are gone; {len(left):,} shards ({images:,} images) are left",
            code="workers-gone", found="\n".join(map(str, self._failed)) or "no node has room for a worker",
            fix="start nodes again, then run the same command: what is committed stays",
        )  # fmt: skip

    def _settle(
        self, worker: int, answer: Ready | ShardOutcome | Lost | EmbcacheError, on_rows: OnRows
    ) -> Iterator[tuple[OwedShard, ShardOutcome]]:
        if isinstance(answer, Ready):
            self._opening.discard(worker)
            self._ready[worker] = answer.where
            return
        (key, shard), lost = self._busy.pop(worker, (None, None)), isinstance(answer, Lost)
        if isinstance(answer, Lost | EmbcacheError):
            if isinstance(answer, EmbcacheError) and shard is not None:
                raise answer
            self._pool.end(worker)
            where = self._ready.pop(worker, "a worker")
            self._failed.append(answer if isinstance(answer, EmbcacheError) else f"{where}: {answer.reason}")
            if worker in self._opening:
                self._opening.discard(worker)
                if not (isinstance(answer, Lost) and answer.node):  # else there is less room, and nothing wrong with it
                    self._unready += 1
                    log.warning(f"a worker could not begin: {_line(answer)}")
            if key is None or shard is None:
                return
            stores = self._shards.stores
            committed = tuple(i for i in shard.stores if is_committed(stores[i].path, shard.number))
            again = len(committed) < len(shard.stores)
            fate = "is handed out again" if again else "was committed before"
            log.warning(
                f"{where} was lost ({_line(answer)}): shard {shard.number} {fate}; workers left: {len(self._ready)}"
            )
            self._losses[key] += 1
            if again and self._losses[key] >= _MOST_LOSSES:
                raise EmbcacheError(
                    f"{_MOST_LOSSES} workers were lost while they computed shard {shard.number}",
                    code="shard-loses-workers", found=_line(answer), where=stores[shard.stores[0]].path,
                    fix="give a worker more memory or a smaller --batch-size, then run the same command",
                )  # fmt: skip
            answer = ShardOutcome(committed, committed)
        if key is not None and shard is not None:
            left = [index for index in shard.stores if index not in answer.settled]
            if left and lost:
                self._waiting.appendleft((key, left))
            elif left:
                self._elsewhere.append((key, left))
                self._look_again = self._clock() + _POLL_SECONDS
            on_rows(len(shard.sources) * len(answer.settled))
            yield self._shards.count(shard, answer)


def _line(answer: Lost | EmbcacheError) -> str:
    text = answer.reason if isinstance(answer, Lost) else answer.problem + (f": {answer.found}" if answer.found else "")
    return " ".join(text.split())[:200]
