"""The driver of workers in other processes, with workers that exist on paper only."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from embcache.config import ExtractConfig
from embcache.data.dataset import load_dataset
from embcache.errors import EmbcacheError
from embcache.extract.engines import dispatch
from embcache.extract.engines.dispatch import Dispatch, Lost, Ready, WorkerPool
from embcache.extract.engines.engine import OwedShard, OwedShards, OwedStore, ShardOutcome
from embcache.extract.engines.local import Stop, Worker
from embcache.extract.extract import extract
from embcache.extract.scan import Plan, Shard
from embcache.io import replace_file
from embcache.log import shown
from embcache.store.commit import ShardRows
from embcache.store.feature_store import FeatureStore
from tests.extract.conftest import draw
from tests.extract.slow_net import slow
from tests.refusal import refused
from tests.store.build import add, make_rows, make_store

Answer = Ready | ShardOutcome | Lost | EmbcacheError


@dataclass
class Paper(WorkerPool):
    """Answers as written down: by worker, what it says to one shard after another; 'done' for the rest."""

    store: Path
    nodes: int = 2
    script: dict[int, list[str]] = field(default_factory=dict)
    given: list[tuple[int, int]] = field(default_factory=list)  # worker, shard
    ended: list[int] = field(default_factory=list)
    stop: Stop | None = None
    late: list[tuple[int, OwedShard]] = field(default_factory=list)  # computed when all else is
    _answers: deque[tuple[int, Answer]] = field(default_factory=deque)
    _started: int = 0

    def room(self) -> int:
        return self.nodes

    def start(self) -> int:
        self._started += 1
        words = self.script.get(self._started, [])
        if words and words[0] == "never":  # only now is it known that the node is gone
            self.nodes -= 1
            return self._started
        if words and words[0] == "was on the node":
            self.nodes -= 1
            self._answers.append((self._started, Lost("its node has died", node=True)))
            return self._started
        refusal = EmbcacheError("other weights", code="worker-recipe")
        self._answers.append(
            (self._started, refusal if words and words[0] == "refused" else Ready(f"w{self._started}"))
        )
        return self._started

    def give(self, worker: int, shard: OwedShard) -> None:
        self.given.append((worker, shard.number))
        words = self.script.get(worker, [])
        word = words.pop(0) if words else "done"
        self.nodes += word == "another node joins"
        if word == "slow":
            self.late.append((worker, shard))
            return
        if word in ("done", "commits and is lost", "another node joins"):
            add(self.store, shard.number, [source.id for source in shard.sources])
        if "lost" in word:
            self.nodes -= "node" in word
            if "idle" not in word:
                replace_file(self.store / "leases" / f"{shard.number:06}.json", str(len(self.given)).encode())
            self._answers.append((worker, Lost("the node died")))
        elif word == "held":
            self._answers.append((worker, ShardOutcome((), ())))
        elif word == "error":
            self._answers.append((worker, EmbcacheError("the disk is full", code="disk-full")))
        elif word == "stop" and self.stop is not None:
            add(self.store, shard.number, [source.id for source in shard.sources])
            self.stop.request()
            self._answers.append((worker, ShardOutcome((0,), (0,))))
        else:
            self._answers.append((worker, ShardOutcome((0,), (0,), ("",) * len(shard.sources))))

    def wait(self, seconds: float) -> Sequence[tuple[int, Answer]]:
        if not self._answers and self.late:
            self.give(*self.late.pop(0))
        return [self._answers.popleft()] if self._answers else []

    def end(self, worker: int) -> None:
        self.ended.append(worker)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "_POLL_SECONDS", 0.0)
    return


@pytest.fixture
def split(tmp_path: Path) -> Callable[[Sequence[range]], list[OwedShards]]:
    """What one store owes for several datasets: ranges of twelve shards of two images."""
    for index in range(24):
        draw(tmp_path / "images" / "ab"[index % 2] / f"{index}.png", index, 8)
    dataset = load_dataset("folder", tmp_path / "images")
    ids = dataset.table["id"].tolist()
    store = FeatureStore(make_store(tmp_path / "home", rows_per_shard=2))

    def make(numbers: Sequence[range]) -> list[OwedShards]:
        shards = [tuple(Shard(n, tuple(ids[2 * n : 2 * n + 2])) for n in some) for some in numbers]
        return [OwedShards([OwedStore(store, Plan(some, 0, 2 * len(some), 0), 2)], dataset) for some in shards]

    return make


@pytest.fixture
def owed(split: Callable[[Sequence[range]], list[OwedShards]]) -> OwedShards:
    """Four shards of two images in one store."""
    return split([range(4)])[0]


def carry_out(pool: Paper, owed: OwedShards, most: int | None = None) -> tuple[list[int], list[str]]:
    """Numbers of the shards that came back as computed, and what was said."""
    said, stop, settle, computed = list[str](), pool.stop or Stop(), owed.settle, list[int]()

    def count(shard: OwedShard, outcome: ShardOutcome) -> None:
        computed.extend([shard.number] * bool(outcome.computed))
        settle(shard, outcome)

    with shown(said.append), pytest.MonkeyPatch.context() as patch:
        patch.setattr(owed, "settle", count)
        complete = list(Dispatch(pool, [owed], stop, most).run(lambda rows: None))
    assert complete == [owed] * (not owed.left)
    return computed, said


def test_every_shard_goes_out_once(owed: OwedShards) -> None:
    pool = Paper(owed.stores[0].path)
    computed, said = carry_out(pool, owed)
    assert (sorted(computed), said, owed.computed) == ([0, 1, 2, 3], [], [8])
    assert sorted(shard for _, shard in pool.given) == [0, 1, 2, 3]
    assert {worker for worker, _ in pool.given} == {1, 2}


def test_no_more_workers_than_wanted_or_needed(owed: OwedShards) -> None:
    pool = Paper(owed.stores[0].path, nodes=50)
    carry_out(pool, owed, most=1)
    assert pool._started == 1


def test_a_shard_of_a_worker_that_is_lost_before_its_commit_is_handed_out_again(owed: OwedShards) -> None:
    pool = Paper(owed.stores[0].path, script={1: ["lost with its node"]})
    computed, said = carry_out(pool, owed)
    assert sorted(computed) == [0, 1, 2, 3]
    first = pool.given[0][1]
    assert [shard for _, shard in pool.given].count(first) == 2
    assert said == [f"w1 was lost (the node died): shard {first} is handed out again; workers left: 1"]
    assert pool.ended == [1]


def test_a_shard_that_was_committed_before_its_worker_was_lost_is_not_computed_again(owed: OwedShards) -> None:
    pool = Paper(owed.stores[0].path, script={1: ["commits and is lost"]})
    computed, said = carry_out(pool, owed)
    assert sorted(computed) == [0, 1, 2, 3]
    assert sorted(shard for _, shard in pool.given) == [0, 1, 2, 3]
    assert said == ["w1 was lost (the node died): shard 0 was committed before; workers left: 1"]
    assert owed.computed == [8]


def test_another_worker_is_started_where_there_is_room(owed: OwedShards) -> None:
    pool = Paper(owed.stores[0].path, nodes=1, script={1: ["lost"]})
    computed, _ = carry_out(pool, owed)
    assert sorted(computed) == [0, 1, 2, 3]
    assert pool._started == 2


def test_a_worker_that_waits_for_a_node_that_is_gone_is_not_waited_for(owed: OwedShards) -> None:
    pool = Paper(owed.stores[0].path, script={1: ["lost"], 3: ["never"]})
    computed, _ = carry_out(pool, owed)
    assert sorted(computed) == [0, 1, 2, 3]
    assert pool.ended == [1, 3]


def test_of_a_lost_node_there_is_one_line(owed: OwedShards) -> None:
    pool = Paper(owed.stores[0].path, script={1: ["lost"], 3: ["was on the node"]})
    computed, said = carry_out(pool, owed)
    assert sorted(computed) == [0, 1, 2, 3]
    assert len(said) == 1


def test_a_worker_whose_node_vanishes_while_it_opens_is_replaced(owed: OwedShards) -> None:
    pool = Paper(owed.stores[0].path, script={1: ["was on the node"], 2: ["done", "another node joins"]})
    computed, said = carry_out(pool, owed)
    assert (sorted(computed), said) == ([0, 1, 2, 3], [])
    assert pool._started == 3


def test_when_all_are_gone_what_is_left_is_named(owed: OwedShards) -> None:
    pool = Paper(owed.stores[0].path, nodes=1, script={1: ["done", "lost with its node"]})
    with pytest.raises(EmbcacheError) as caught:
        carry_out(pool, owed)
    assert caught.value.code == "workers-gone"
    assert "3 shards (6 images) are left" in caught.value.problem
    assert "the node died" in str(caught.value.found)
    assert owed.stores[0].committed() == (0,)


def test_a_shard_that_takes_every_worker_with_it_is_given_up(owed: OwedShards) -> None:
    pool = Paper(owed.stores[0].path, nodes=1, script={number: ["lost"] for number in range(1, 4)})
    with refused(EmbcacheError, "shard-loses-workers"):
        carry_out(pool, owed)


def test_workers_that_died_idle_are_not_the_fault_of_a_shard(
    split: Callable[[Sequence[range]], list[OwedShards]],
) -> None:
    owed = split([range(4), range(4, 5)])
    lost = {worker: ["done", "lost idle with its node"] for worker in (1, 2, 3)}
    pool = Paper(owed[0].stores[0].path, nodes=4, script={**lost, 4: ["done", "lost", "done"]})
    assert list(Dispatch(pool, owed, Stop()).run(lambda rows: None)) == owed
    assert [worker for worker, shard in pool.given if shard == 4][:4] == [1, 2, 3, 4]
    assert owed[0].stores[0].committed() == (0, 1, 2, 3, 4)


def test_a_shard_that_kills_workers_which_computed_others_is_given_up(owed: OwedShards) -> None:
    pool = Paper(owed.stores[0].path, nodes=1, script={1: ["done", "lost"], 2: ["lost"], 3: ["lost"]})
    with refused(EmbcacheError, "shard-loses-workers"):
        carry_out(pool, owed)
    assert pool.given == [(1, 0), (1, 1), (2, 1), (3, 1)]


def test_losses_of_workers_that_left_a_lease_count(split: Callable[[Sequence[range]], list[OwedShards]]) -> None:
    owed = split([range(3), range(3, 4)])
    pool = Paper(owed[0].stores[0].path, nodes=3, script={number: ["done", "lost"] for number in (1, 2, 3)})
    with refused(EmbcacheError, "shard-loses-workers"):
        list(Dispatch(pool, owed, Stop()).run(lambda rows: None))
    assert [shard for _, shard in pool.given] == [0, 1, 2, 3, 3, 3]


def test_workers_that_die_before_they_begin_are_not_replaced_for_ever(owed: OwedShards) -> None:
    pool = Paper(owed.stores[0].path, nodes=1, script={number: ["lost idle"] for number in range(1, 9)})
    with refused(EmbcacheError, "shard-loses-workers"):
        carry_out(pool, owed)
    assert pool._started == 3


def test_that_no_worker_is_ready_is_said_once(owed: OwedShards) -> None:
    class Busy(Paper):
        seconds = 0.0

        def wait(self, seconds: float) -> Sequence[tuple[int, Answer]]:
            self.seconds += 10
            return super().wait(seconds) if self.seconds > 100 else []

    pool, said = Busy(owed.stores[0].path), list[str]()
    with shown(said.append):
        list(Dispatch(pool, [owed], Stop(), clock=lambda: pool.seconds).run(lambda rows: None))
    assert [line.split(":")[0] for line in said] == ["no worker is ready yet"]


def test_that_workers_are_ready_is_not_said(owed: OwedShards) -> None:
    pool, seconds, said = Paper(owed.stores[0].path), itertools.count(0, 20), list[str]()
    with shown(said.append):
        list(Dispatch(pool, [owed], Stop(), clock=lambda: next(seconds)).run(lambda rows: None))
    assert said == []


def test_a_worker_that_is_refused_leaves_the_work_to_others(owed: OwedShards) -> None:
    pool = Paper(owed.stores[0].path, script={2: ["refused"]})
    computed, said = carry_out(pool, owed)
    assert sorted(computed) == [0, 1, 2, 3]
    assert said == ["a worker could not begin: other weights"]
    assert pool._started == 2  # none in its place


def test_the_refusal_of_the_only_worker_is_the_error(owed: OwedShards) -> None:
    pool = Paper(owed.stores[0].path, nodes=1, script={1: ["refused"]})
    with refused(EmbcacheError, "worker-recipe"):
        carry_out(pool, owed)


def test_a_shard_that_another_process_holds_is_asked_for_again(owed: OwedShards) -> None:
    pool = Paper(owed.stores[0].path, nodes=1, script={1: ["held"]})
    computed, said = carry_out(pool, owed)
    assert (sorted(computed), said) == ([0, 1, 2, 3], [])
    assert len(pool.given) == 5


def test_others_are_computed_while_the_lease_of_a_lost_worker_stands(owed: OwedShards) -> None:
    pool = Paper(owed.stores[0].path, script={1: ["lost with its node"], 2: ["done", "held"]})
    computed, _ = carry_out(pool, owed)
    assert sorted(computed) == [0, 1, 2, 3]
    assert pool.given == [(1, 0), (2, 1), (2, 0), (2, 2), (2, 3), (2, 0)]


def test_an_error_of_the_work_ends_the_run(owed: OwedShards) -> None:
    with refused(EmbcacheError, "disk-full"):
        carry_out(Paper(owed.stores[0].path, script={1: ["error"]}), owed)


def test_a_stop_lets_what_is_handed_out_end_and_hands_out_no_more(owed: OwedShards) -> None:
    pool = Paper(owed.stores[0].path, script={1: ["stop"]}, stop=Stop())
    computed, _ = carry_out(pool, owed)
    assert 1 <= len(computed) == len(pool.given) <= 2


def test_what_is_owed_next_goes_out_while_the_last_shards_are_computed(
    split: Callable[[Sequence[range]], list[OwedShards]],
) -> None:
    owed = split([range(2), range(2, 4), range(4, 6)])
    pool = Paper(owed[0].stores[0].path, script={1: ["slow"]})
    complete = list(Dispatch(pool, owed, Stop()).run(lambda rows: None))
    assert complete == [*owed[1:], owed[0]]
    assert pool.given == [(1, 0), (2, 1), (2, 2), (2, 3), (2, 4), (2, 5), (1, 0)]
    assert pool._started == 2  # for all of them
    assert [each.computed for each in owed] == [[4], [4], [4]]


def test_no_more_than_two_datasets_are_open_while_one_is_planned(
    split: Callable[[Sequence[range]], list[OwedShards]],
) -> None:
    owed, done, unfinished = split([range(2 * k, 2 * k + 2) for k in range(6)]), list[OwedShards](), list[int]()

    def plan() -> Iterator[OwedShards]:
        for k, each in enumerate(owed):
            unfinished.append(k - len(done))
            yield each

    pool = Paper(owed[0].stores[0].path, nodes=3, script={1: ["slow", "slow"], 2: ["done", "slow"], 3: ["slow"]})
    for each in Dispatch(pool, plan(), Stop()).run(lambda rows: None):
        done.append(each)
    assert (len(done), max(unfinished)) == (6, 1)


def test_a_worker_is_lost_with_a_shard_of_an_earlier_dataset(
    split: Callable[[Sequence[range]], list[OwedShards]],
) -> None:
    owed = split([range(2), range(2, 4)])
    pool = Paper(owed[0].stores[0].path, nodes=2, script={1: ["slow", "lost with its node"]})
    assert {*Dispatch(pool, owed, Stop()).run(lambda rows: None)} == {*owed}
    assert sorted(shard for _, shard in pool.given) == [0, 0, 0, 1, 2, 3]


def test_planning_that_fails_ends_the_run_when_what_has_gone_out_is_committed(
    split: Callable[[Sequence[range]], list[OwedShards]],
) -> None:
    owed, complete = split([range(3)]), list[OwedShards]()

    def plan() -> Iterator[OwedShards]:
        yield from owed
        raise EmbcacheError("a partition is damaged", code="partition-damaged")

    pool = Paper(owed[0].stores[0].path, script={1: ["slow"], 2: ["done", "lost"]})
    with refused(EmbcacheError, "partition-damaged"):
        complete.extend(Dispatch(pool, plan(), Stop()).run(lambda rows: None))
    assert owed[0].stores[0].committed() == (0, 1, 2)
    assert owed[0].left == 0


def test_nothing_more_is_planned_after_a_stop(split: Callable[[Sequence[range]], list[OwedShards]]) -> None:
    owed, stop = split([range(2), range(2, 4)]), Stop()
    pool = Paper(owed[0].stores[0].path, script={2: ["stop"]}, stop=stop)
    assert list(Dispatch(pool, owed, stop).run(lambda rows: None)) == owed[:1]
    assert sorted(shard for _, shard in pool.given) == [0, 1]


def test_who_loses_a_race_for_a_shard_has_computed_nothing(owed: OwedShards) -> None:
    store = owed.stores[0]
    ((key, stores), *_) = owed.waiting.items()

    def compute(shard: OwedShard, **_: object) -> list[ShardRows]:
        ids = [source.id for source in shard.sources]
        add(store.path, shard.number, ids)  # another process is quicker, and the lease was too old
        return [make_rows(ids, seed=9)]

    outcome = Worker([store], compute).run(owed.shard(key, stores))
    assert outcome == ShardOutcome((0,), ())


def test_a_worker_has_one_device_and_builds_its_networks_by_name(tmp_path: Path) -> None:
    draw(tmp_path / "images" / "a" / "0.png", 0)
    draw(tmp_path / "images" / "b" / "1.png", 1)
    dataset = load_dataset("folder", tmp_path / "images")
    with refused(EmbcacheError, "device-list"):
        extract(dataset, ["random"], ExtractConfig(engine="ray", device="cpu,cpu"), home=tmp_path / "home")
    with refused(EmbcacheError, "backbone-in-process"):
        extract(dataset, [slow()], ExtractConfig(engine="ray"), home=tmp_path / "home")


def test_options_of_ray_need_ray() -> None:
    with refused(EmbcacheError, "option-without-ray"):
        ExtractConfig(address="10.0.0.1:6379")
