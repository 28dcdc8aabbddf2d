"""Machines, each a process with a cache folder of its own, that race for the shards of one store in an object store.

Every machine computes other bytes: of the attempts at a shard exactly one may count, and all that is read must be its.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embcache.mirror import open_mirror
from embcache.paths import home_dir
from embcache.store.commit import commit_shard
from embcache.store.feature_store import FeatureStore
from tests.store.build import make_rows, make_store, plan

ROWS = 4


def ids(shard: int) -> list[str]:
    return [f"{shard}-{row}" for row in range(ROWS)]


@dataclass(frozen=True)
class Race:
    """What came of it, by shard."""

    winners: dict[int, list[int]]  # machines for which their attempt counts
    errors: Counter[str]
    read: dict[int, list[int]]  # machines whose bytes another machine reads
    attempts: int  # at all shards, that lie in the place

    @property
    def sole(self) -> int:
        """Shards with one winner."""
        return sum(len(won) == 1 for won in self.winners.values())

    @property
    def whole(self) -> int:
        """Shards whose rows are those of their one winner."""
        return sum(len(won) == 1 and won == self.read[shard] for shard, won in self.winners.items())


def race(url: str, folder: Path, shards: int, machines: int) -> Race:
    """Let machines commit every shard of a new store at once, and read it by a further one."""
    store = make_store(_become(url, folder / "first"), row_shape=(64,), rows_per_shard=ROWS)
    for shard in range(shards):
        assert plan(store, shard, ids(shard))
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(machines), context.Queue()
    processes = [
        context.Process(target=_run, args=(url, folder / f"{machine}", machine, shards, start, answers))
        for machine in range(machines)
    ]
    for process in processes:
        process.start()
    winners, errors = {shard: list[int]() for shard in range(shards)}, Counter[str]()
    for _ in processes:
        machine, won, failed = answers.get(timeout=600)
        errors += failed
        for shard in won:
            winners[shard].append(machine)
    for process in processes:
        process.join(60)
    reader = _become(url, folder / "last") / "ds" / store.name
    features, read = FeatureStore(reader), dict[int, list[int]]()
    for shard in range(shards):
        found = features.features[features.rows_of(ids(shard))]
        made = [make_rows(ids(shard), row_shape=(64,), seed=machine).features for machine in range(machines)]
        read[shard] = [machine for machine in range(machines) if np.array_equal(made[machine], found)]
    keys = {tuple(entry.key.split("/")[3:5]) for entry in open_mirror(url).place.list("attempts")}
    return Race(winners, errors, read, len(keys))


def _become(url: str, cache: Path) -> Path:
    os.environ["EMBCACHE_CACHE_DIR"] = str(cache)
    open_mirror.cache_clear()
    return home_dir(url)


def _run(url: str, cache: Path, machine: int, shards: int, start: Any, answers: Any) -> None:
    won, errors = list[int](), Counter[str]()
    (store,) = (_become(url, cache) / "ds").glob("random-*")
    start.wait(120)
    for shard in range(shards):
        try:
            if commit_shard(store, shard, make_rows(ids(shard), row_shape=(64,), seed=machine)):
                won.append(shard)
        except Exception as error:
            errors[getattr(error, "code", type(error).__name__)] += 1
    answers.put((machine, won, errors))
