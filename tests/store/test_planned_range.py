"""A plan that names rows of a partition: what is written is read, and what others may have written is refused."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from embcache.errors import CorruptStoreError
from embcache.io import replace_file
from embcache.partitions import Partition, write_partition
from embcache.sealed import seal
from embcache.store.commit import PlanEntry, PlannedRange, publish_plan, publish_range
from embcache.store.reading import numbers_of_part, plan_path, range_of, read_plan
from tests.refusal import refused
from tests.store.build import make_store, quick_disk

__all__ = ["quick_disk"]
pytestmark = pytest.mark.usefixtures("quick_disk")

IDS = [f"é{k}.png" for k in range(40)]
STATES = np.random.default_rng(0).integers(-(2**62), 2**62, (20, 2))


def keep(store: Path, ids: list[str]) -> str:
    columns = {"id": ids, "path": ids, "place": [str(k) for k in range(len(ids))]}
    return write_partition(store.parent, pa.table(columns, pa.schema([(name, pa.large_string()) for name in columns])))


def test_rows_and_states_are_read_as_they_were_planned(tmp_path: Path) -> None:
    store = make_store(tmp_path, rows_per_shard=32)
    digest = keep(store, IDS)
    assert publish_range(store, 3, PlannedRange(digest, 7, 27, STATES))
    assert not publish_range(store, 3, PlannedRange(digest, 0, 20, STATES))
    expected = [PlanEntry(IDS[7 + k], *map(int, STATES[k]), None, str(7 + k)) for k in range(20)]
    assert read_plan(store, 3) == tuple(expected)
    assert range_of(store, 3) == (digest, 7)


def test_only_plans_of_other_partitions_are_passed_over(tmp_path: Path) -> None:
    store = make_store(tmp_path, rows_per_shard=32)
    digests = [keep(store, IDS[start : start + 20]) for start in (0, 20)] + [keep(store, IDS[5:25])]
    for number, digest in enumerate(digests):
        publish_range(store, number, PlannedRange(digest, 0, 20, STATES))
    publish_plan(store, 3, [PlanEntry("a", -1, -1)])
    current = tuple(digests[:2])
    assert numbers_of_part(store, Partition(digests[0], current, 40)) == (4, [0, 2, 3])
    assert numbers_of_part(store, Partition(digests[1], current, 40)) == (4, [1, 2, 3])


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.pop("states"),
        lambda plan: plan.pop("partition"),
        lambda plan: plan.update(partition="../../../../etc"),
        lambda plan: plan.update(partition=7),
        lambda plan: plan.update(range=[7]),
        lambda plan: plan.update(range="07"),
        lambda plan: plan.update(range=[27, 7]),
        lambda plan: plan.update(range=[-1, 19]),
        lambda plan: plan.update(range=[7, 7 + 2**40]),
        lambda plan: plan.update(range=[True, 21]),
        lambda plan: plan.update(range=[30, 50]),  # the partition ends before
        lambda plan: plan.update(states="%%%"),
        lambda plan: plan.update(states=[1]),
        lambda plan: plan.update(states=base64.b64encode(b"no zlib").decode()),
        lambda plan: plan.update(states=base64.b64encode(zlib.compress(bytes(10**7))).decode()),
        lambda plan: plan.update(states=base64.b64encode(zlib.compress(bytes(16 * 19))).decode()),
    ],
)
def test_what_others_may_have_written_is_refused(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    store = make_store(tmp_path, rows_per_shard=32)
    content = {"number": 0, **PlannedRange(keep(store, IDS), 7, 27, STATES).to_json()}
    change(content)
    replace_file(plan_path(store, 0), seal(content, indent=None))
    with refused(CorruptStoreError, "file-foreign"):
        read_plan(store, 0)


def test_a_plan_of_a_partition_that_is_not_there_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path, rows_per_shard=32)
    publish_range(store, 0, PlannedRange("0" * 16, 7, 27, STATES))
    with refused(CorruptStoreError, "partition-damaged"):
        read_plan(store, 0)
