"""Every pair of commands on one home, one paused at some of its steps: `make torture` pauses it at each."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import embcache.maintain.gc as gc
from embcache.extract import scan as plan
from embcache.extract.scan import Scan
from embcache.store.feature_store import FeatureStore
from embcache.store.reading import plan_numbers
from embcache.store.schema import PlanEntry, StoreHeader
from tests.crash.interleave import COMMANDS, World, small


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, World]]:
    """A home of each format."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with small():
        yield {name: World(tmp_path_factory.mktemp(name), name) for name in ("zarr", "hdf5")}
    torch.set_num_threads(threads)


def test_no_pair_of_commands_serves_old_features_or_loses_rows(worlds: dict[str, World]) -> None:
    chance, change = random.Random(0), ("extract", "gc", "repair")
    pairs = list(itertools.product(change, repeat=2))
    for command in sorted(set(COMMANDS) - set(change)):  # each with one that changes the store, on either side
        pairs += [(command, chance.choice(change)), (chance.choice(change), command)]
    for number, (first, second) in enumerate(pairs):
        world = worlds["hdf5" if number % 4 else "zarr"]
        world.trial(first, second, chance.randrange(30 if first in ("probe", "export") else 150))
    totals = worlds["hdf5"].totals + worlds["zarr"].totals
    assert totals["trials"] == len(pairs) == 15
    assert totals["rows compared"] > 250


@pytest.mark.parametrize("at", [4, 60])
def test_gc_looks_again_when_an_extraction_has_planned_meanwhile(at: int, worlds: dict[str, World]) -> None:
    """Between what it reads and what it publishes: 27 of 40 changed images once served old features for good."""
    worlds["hdf5"].trial("gc", "extract", at)


def test_a_careless_gc_is_found(worlds: dict[str, World], monkeypatch: pytest.MonkeyPatch) -> None:
    """The trials notice what they are there for: rows read first, their plans and the highest number later."""

    def careless(path: Path, header: StoreHeader, seen: gc._Seen) -> Iterator[Any]:
        if len(seen.moving):
            sources, number = FeatureStore(path).sources(), max(plan_numbers(path)) + 1
            places = seen.moving[: header.rows_per_shard].tolist()
            entries = [sources[seen.live.ids[k]] for k in places]
            gc.publish_plan(path, number, entries)
            yield number, (seen.live, entries, places)

    def by_time(held: PlanEntry, owed: bool, scan: Scan, row: int) -> bool:
        return [held.size, held.mtime_ns] == scan.states[row, :2].tolist()

    monkeypatch.setattr(gc, "_new_shards", careless)
    monkeypatch.setattr(plan, "_same_bytes", by_time)  # digests would find it out at the next extraction
    world, found = worlds["hdf5"], []
    for at in range(24, 80, 8):
        try:
            world.trial("gc", "extract", at)
        except AssertionError as error:
            found.append(str(error))
            break
    assert "old" in found[0]
