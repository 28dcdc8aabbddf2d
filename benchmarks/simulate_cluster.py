"""A cluster in simulated time: the planner, the driver and the commits are the real ones, workers are played.

The images are places in HDF5 files that were never written. They are planned in partitions; `Dispatch` hands out the
shards, as it does for Ray; leases and commits go to a home in an object store that is memory. Only the clock, the work
of a network and what goes wrong are played. At the end every image has exactly one live row, that of the worker which
won the commit.

    even        all workers compute --rate images per second
    stragglers  a tenth of them compute a quarter of that
    preemption  each vanishes after --life hours on average and comes back after five minutes; a fifth just after a
                commit, so that its answer is lost; a fifth only cannot be reached, goes on and commits
    throttling  the object store serves --limit requests per second
    all         everything at once

Available time is that of all workers which are there, from the first second of planning to the last commit; useful time
is what the committed rows take on the workers that committed them.

    python -m benchmarks.simulate_cluster [--images 1000000] [--workers 64] [--rows-per-shard 4096] [--scenarios all]
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import logging
import math
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import obstore.store

from benchmarks.common import print_table
from benchmarks.partitions import make_table
from embcache import io as disk
from embcache.data.partitioned import PartitionedDataset, load_partitioned
from embcache.errors import EmbcacheError
from embcache.extract.engines.dispatch import Dispatch, Lost, Ready, WorkerPool
from embcache.extract.engines.engine import OwedShard, OwedShards, OwedStore, ShardOutcome
from embcache.extract.engines.local import Stop
from embcache.extract.scan import TICK_NS, plan_store, scan_dataset
from embcache.mirror import THREADS, Mirror
from embcache.places import Entry, ObjectPlace, Place
from embcache.store import reading
from embcache.store.commit import ShardRows, commit_shard, create_store, is_committed
from embcache.store.feature_store import FeatureStore
from embcache.store.lease import TTL_SECONDS, Lease
from embcache.store.schema import Recipe

SCENARIOS = ("even", "stragglers", "preemption", "throttling", "all")
LATENCY = 0.03  # seconds of a request
OPENING = 30.0  # seconds in which a worker starts and loads its networks
PLANNING = 4e-6  # seconds in which the driver plans an image (benchmarks/partitions.py)
BACK = 300.0  # seconds until there is another worker for one that vanished
RERUN = 300.0  # seconds until a run that ended with an error is begun again
NOTICED = 10.0  # seconds until the driver knows of a loss
_DIGEST = np.arange(32, dtype=np.uint8)


@dataclass(frozen=True)
class Options:
    """A cluster and its work."""

    workers: int = 64
    rate: float = 20.0  # images per second of a worker
    rows_per_shard: int = 4096
    life: float = 2.0  # hours, on average
    limit: float = 10.0  # requests per second
    seed: int = 0


class CountedPlace(Place):
    """A place that counts requests, and whose clock is the simulated one."""

    def __init__(self, clock: Callable[[], float], limit: float) -> None:
        self._place, self.url = ObjectPlace(obstore.store.MemoryStore(), "memory://cluster"), "memory://cluster"
        self._clock, self._limit, self._lock = clock, limit, threading.Lock()
        self.deaths: dict[str, float] = {}  # when the holder of a lease died: until then it has beaten
        self.requests, self._sequence, self._taken, self._free = 0, 0.0, 0, 0.0

    def _count(self) -> None:
        name = threading.current_thread().name
        if not name.startswith("lease "):  # they beat in real time; `Pool` counts the beats of simulated time
            with self._lock:
                self.requests += 1
                self._sequence += 1 / THREADS if name.startswith(("put", "get")) else 1

    def settle(self, beats: int = 0) -> float:
        """Seconds that the requests since the last call take; ``beats`` of leases are spread over a shard's time."""
        self.requests += beats
        made, self._taken = self.requests - self._taken, self.requests
        self._free = max(self._free, self._clock()) + made / self._limit
        waited, self._sequence = max(math.ceil(self._sequence) * LATENCY, self._free - self._clock()), 0.0
        return waited

    def put_new(self, key: str, data: bytes) -> bool:
        self._count()
        if created := self._place.put_new(key, data):
            self.deaths.pop(key, None)
        return created

    def put(self, key: str, data: bytes) -> None:
        self._count()
        self._place.put(key, data)

    def get(self, key: str) -> bytes:
        self._count()
        return self._place.get(key)

    def list(self, prefix: str = "", after: str = "") -> Iterator[Entry]:
        self._count()
        for entry in self._place.list(prefix, after):
            yield entry._replace(modified=self.deaths.get(entry.key, self._clock()))

    def delete(self, key: str) -> None:
        self._count()
        self._place.delete(key)


@dataclass
class Work:
    """A shard that a worker computes."""

    shard: OwedShard
    lease: Lease
    began: float
    ends: float
    fate: str = ""  # "lost": its worker is gone; "unanswered": gone after the commit; "cut off": it cannot be reached
    committed: bool = False


@dataclass
class Node:
    """Room for one worker."""

    speed: float
    there: bool = True
    worker: int | None = None
    work: Work | None = None


@dataclass
class Cluster:
    """Nodes, simulated time, and what happened so far."""

    options: Options
    stormy: bool  # whether workers vanish
    slow: bool  # whether some are stragglers
    limit: float
    now: float = 0.0
    available: float = 0.0
    useful: float = 0.0
    waited: float = 0.0
    in_vain: int = 0  # images
    fates: Counter[str] = field(default_factory=Counter)
    pool: Pool | None = None
    winners: dict[int, int] = field(default_factory=dict)  # of each shard
    abandoned: list[Lease] = field(default_factory=list)
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.random = random.Random(self.options.seed)
        self.place = CountedPlace(lambda: self.now, self.limit)
        rate, n = self.options.rate, self.options.workers
        self.nodes = [Node(rate / 4 if self.slow and k % 10 == 0 else rate) for k in range(n)]
        for node in self.nodes if self.stormy else ():
            self._live(node)

    def at(self, seconds: float, event: Callable[[], None]) -> None:
        """Let something happen after some seconds."""
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), event))

    def next_event(self, deadline: float) -> bool:
        """Let time pass to the next event, and no further than a deadline; False where there is none before it."""
        there = bool(self._events) and self._events[0][0] <= deadline
        then = self._events[0][0] if there else deadline
        self.available += (then - self.now) * sum(node.there for node in self.nodes)
        self.now = then
        if there:
            heapq.heappop(self._events)[2]()
        return there

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        deadline = self.now + seconds
        while self.next_event(deadline):
            pass

    def _live(self, node: Node) -> None:
        self.at(self.random.expovariate(1 / (3600 * self.options.life)), lambda: self._vanish(node))

    def _vanish(self, node: Node) -> None:
        work, draw = node.work, self.random.random()
        if work is not None and (draw < 0.2 or work.committed):
            work.fate = "unanswered"
            if not work.committed:
                return  # it vanishes when it has committed this shard
        elif work is not None and draw < 0.4:
            work.fate = "cut off"
        elif work is not None:
            work.fate = "lost"
            self.bury(work)
            self.in_vain += int(max(0.0, self.now - work.began) * node.speed)
        self.leave(node)

    def leave(self, node: Node) -> None:
        """A node vanishes, and comes back later."""
        self.fates[node.work.fate if node.work else "idle"] += 1
        node.there, node.work, worker, node.worker = False, None, node.worker, None
        if worker is not None and self.pool is not None:
            self.pool.lose(worker)

        def back() -> None:
            node.there = True
            self._live(node)

        self.at(BACK, back)

    def bury(self, work: Work) -> None:
        """A lease beats no more."""
        mirror = disk.mirror_of(work.lease.path)
        assert mirror is not None
        self.place.deaths[str(mirror.key(work.lease.path))] = self.now
        self.abandoned.append(work.lease)


Answer = Ready | ShardOutcome | Lost | EmbcacheError


class Pool(WorkerPool):
    """Workers of a simulated cluster."""

    def __init__(self, cluster: Cluster, store: Path, first: int) -> None:
        self._cluster, self._store = cluster, store
        self._answers = list[tuple[int, Answer]]()
        self._last, self._waiting, self._gone = first, list[int](), set[int]()
        cluster.pool = self

    def room(self) -> int:
        return sum(node.there for node in self._cluster.nodes)

    def start(self) -> int:
        self._last += 1
        self._waiting.append(self._last)
        self._place_workers()
        return self._last

    def _place_workers(self) -> None:
        free = [node for node in self._cluster.nodes if node.there and node.worker is None]
        for node in free[: len(self._waiting)]:
            node.worker = worker = self._waiting.pop(0)
            self._cluster.at(OPENING, lambda worker=worker: self._answer(worker, Ready(f"worker {worker}")))

    def _answer(self, worker: int, answer: Answer) -> None:
        if worker not in self._gone:
            self._answers.append((worker, answer))

    def lose(self, worker: int) -> None:
        """A worker vanished; what it was to answer is lost."""
        self._cluster.at(NOTICED, lambda: self._answers.append((worker, Lost("its node vanished"))))
        self._gone.add(worker)

    def give(self, worker: int, shard: OwedShard) -> None:
        cluster = self._cluster
        node = next((each for each in cluster.nodes if each.worker == worker), None)
        if node is None:
            return  # it is not known yet
        lease = Lease.acquire(self._store, shard.number)
        there = lease is not None and is_committed(self._store, shard.number)
        if lease is not None and there:
            lease.release()
        asked = cluster.place.settle()
        cluster.waited += asked
        if lease is None or there:
            outcome = ShardOutcome((0,), ()) if there else ShardOutcome((), ())
            cluster.at(asked, lambda: self._answer(worker, outcome))
            return
        seconds = len(shard.sources) / node.speed
        work = node.work = Work(shard, lease, cluster.now + asked, cluster.now + asked + seconds)
        cluster.at(asked + seconds, lambda: self._finish(node, worker, work))

    def _finish(self, node: Node, worker: int, work: Work) -> None:
        cluster, shard, n = self._cluster, work.shard, len(work.shard.sources)
        if work.fate == "lost":
            return
        features = np.full((n, 1), worker, np.float32)
        ids, digest = tuple(source.id for source in shard.sources), bytes(_DIGEST).hex()
        rows = ShardRows(ids, features, np.ones(n, bool), (digest,) * n, ("",) * n)
        if commit_shard(self._store, shard.number, rows):
            assert shard.number not in cluster.winners, "two commits of one shard count"
            cluster.winners[shard.number] = worker
            cluster.useful += n / node.speed if work.fate != "cut off" else 0.0  # of a worker that is not there
        else:
            cluster.in_vain += n
            cluster.fates["computed twice"] += 1
        work.committed = True
        if work.fate == "unanswered":
            cluster.bury(work)
        else:
            work.lease.release()
        seconds = cluster.place.settle(beats=2 * int(4 * (cluster.now - work.began) / TTL_SECONDS))
        cluster.waited += seconds
        if work.fate == "unanswered":
            cluster.leave(node)
        elif not work.fate:
            cluster.at(seconds, lambda: self._done(node, worker, work))

    def _done(self, node: Node, worker: int, work: Work) -> None:
        if node.work is work:  # else it vanished meanwhile
            node.work = None
            self._answer(worker, ShardOutcome((0,), (0,)))

    def wait(self, seconds: float) -> Sequence[tuple[int, Answer]]:
        deadline = self._cluster.now + seconds
        while not self._answers and self._cluster.next_event(deadline):
            self._place_workers()
        answers, self._answers = self._answers, []
        return answers

    def end(self, worker: int) -> None:
        self._gone.add(worker)
        self._waiting = [each for each in self._waiting if each != worker]
        for node in self._cluster.nodes:
            if node.worker == worker:
                node.worker = node.work = None

    def close(self) -> int:
        """End all workers; the number of the last one."""
        for node in self._cluster.nodes:
            node.worker = node.work = None
        self._answers, self._cluster.pool = [], None
        return self._last


@dataclass(frozen=True)
class Found:
    """What became of a scenario."""

    images: int
    shards: int
    hours: float
    utilization: float
    in_vain: int
    twice: int
    fates: Counter[str]
    reruns: int
    requests: int
    waited: float  # seconds of workers, for the object store
    real: float  # seconds of this processor per shard, for workers and store, too


def simulate(table: Path, folder: Path, scenario: str, options: Options) -> Found:
    """Extract the images of a table on a simulated cluster into a home under ``folder``, and verify the store."""
    both = scenario == "all"
    limit = options.limit if both or scenario == "throttling" else 1e9
    cluster = Cluster(options, both or scenario == "preemption", both or scenario == "stragglers", limit)
    mirror = Mirror(folder, cluster.place)
    disk.attach(folder, mirror)
    dataset = replace(load_partitioned(table, home=folder, places="row", name="m"), sizes=((96, 96),))
    recipe = Recipe("random", "resnet50", "0" * 64, {}, "x", "avg", "fp32", "float32", 1)
    path = create_store(
        dataset.folder, recipe, row_shape=(1,), rows_per_shard=options.rows_per_shard, batch_size=64, threads=1
    )
    cluster.place.settle()
    before, last, reruns, real = cluster.place.requests, 0, 0, time.process_time()

    def owed(threads: ThreadPoolExecutor) -> Iterator[OwedShards]:
        """What is owed for each partition, planned when the shards of those before it have gone out."""
        for part in dataset.parts():
            files = scan_dataset(part, folder, threads)
            plan = plan_store(FeatureStore(path), part, files.scan)
            files.scan.digests[:] = _DIGEST
            files.keep()
            cluster.wait(PLANNING * len(part) + cluster.place.settle())
            yield OwedShards([OwedStore(FeatureStore(path), plan, 64)], part)

    with ThreadPoolExecutor(2) as threads:
        while True:
            pool = Pool(cluster, path, last)
            try:
                for _ in Dispatch(pool, owed(threads), Stop(), clock=lambda: cluster.now).run(lambda rows: None):
                    pass
                break
            except EmbcacheError as error:  # a user sees it, and types the same command again
                if error.code not in ("shard-loses-workers", "workers-gone"):
                    raise
                reruns += 1
            finally:
                last = pool.close()
            cluster.wait(RERUN)
    real = time.process_time() - real
    requests, shards = cluster.place.requests - before, len(cluster.winners)
    for lease in cluster.abandoned:  # their threads still beat in real time
        lease.release()
    verify(dataset, path, cluster)
    twice = cluster.fates.pop("computed twice", 0)
    utilization = cluster.useful / cluster.available
    return Found(
        len(dataset), shards, cluster.now / 3600, utilization, cluster.in_vain, twice, cluster.fates, reruns, requests,
        cluster.waited, real / shards,
    )  # fmt: skip


def verify(dataset: PartitionedDataset, path: Path, cluster: Cluster) -> None:
    """Every image has one row in all shards, and every shard is that of the worker whose commit counted."""
    header, rows = reading.read_header(path), np.zeros(len(dataset), np.int64)
    assert reading.committed_numbers(path) == sorted(cluster.winners), "commits that no worker knows of"
    for number, worker in cluster.winners.items():
        rows[[int(id_[5:]) for id_ in reading.read_index(path, header, number).ids]] += 1
        assert (reading.read_features(path, header, number) == worker).all(), f"shard {number} is of another worker"
    assert (rows == 1).all(), f"{int((rows != 1).sum())} images do not have exactly one row"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=Options.workers)
    parser.add_argument("--rate", type=float, default=Options.rate, help="Images per second of a worker.")
    parser.add_argument("--rows-per-shard", type=int, default=Options.rows_per_shard)
    parser.add_argument("--life", type=float, default=Options.life, help="Hours after which a worker vanishes.")
    parser.add_argument("--limit", type=float, default=Options.limit, help="Requests per second, where throttled.")
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--seed", type=int, default=Options.seed)
    parser.add_argument("--folder", type=Path, help="Where files are made.")
    given = vars(parser.parse_args())
    images, scenarios, folder = given.pop("images"), given.pop("scenarios").split(","), given.pop("folder")
    options, rows = Options(**given), list[list[str]]()
    logging.getLogger("embcache").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        make_table(Path(made) / "images", images, places=True)
        time.sleep(1.5 * TICK_NS / 1e9)  # of a younger file a run that follows another one would read all images again
        for scenario in scenarios:
            began = time.perf_counter()
            found = simulate(Path(made) / "images" / "images.parquet", Path(made) / scenario, scenario, options)
            fates = ", ".join(f"{count} {fate}" for fate, count in sorted(found.fates.items()))
            rows.append(
                [
                    scenario, str(options.workers), f"{found.images:,}", f"{found.shards:,}", f"{found.hours:.2f}",
                    f"{100 * found.utilization:.0f} %", f"{found.in_vain:,}", str(found.twice), fates or "none",
                    str(found.reruns), f"{found.requests / found.shards:.0f}", f"{found.waited / 3600:.2f}",
                    f"{1000 * found.real:.0f}", f"{time.perf_counter() - began:.0f}",
                ]
            )  # fmt: skip
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    print_table(
        [
            "scenario", "workers", "images", "shards", "hours", "utilization", "images in vain", "shards twice",
            "workers that vanished", "reruns", "requests per shard", "waited for the store, worker hours",
            "real processor ms per shard", "real s",
        ],
        rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
