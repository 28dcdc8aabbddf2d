"""Commits under adversity: killed or failing at every call to the filesystem, and several writers at once."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from embcache import io as disk
from embcache.errors import StoreError
from embcache.sealed import seal, unseal
from embcache.store.commit import (
    PlanEntry,
    ShardRows,
    commit_shard,
    create_store,
    publish_plan,
    refresh_view,
    write_scan,
    write_snapshot,
    write_view,
)
from embcache.store.feature_store import FeatureStore, list_stores
from embcache.store.schema import plan_entries, plan_rows
from tests.refusal import refused
from tests.store.build import FORMATS, add, make_rows, make_store, plan, quick_disk, recipe, tree

__all__ = ["quick_disk"]

# Everything in io.py that changes the disk goes through one of these.
CALLS = [
    (os, "open"), (os, "write"), (os, "fsync"), (os, "mkdir"), (os, "rename"), (os, "replace"), (os, "link"),
    (os, "symlink"), (os, "unlink"), (os, "rmdir"), (os, "utime"), (disk, "_rename_at"),
]  # fmt: skip


class Killed(BaseException):
    """Stands for SIGKILL: nothing the process would still do reaches the disk."""


@contextmanager
def failing(at: int, *, after: bool, error: Callable[[], BaseException], forever: bool) -> Iterator[list[str]]:
    """Fail the ``at``-th call to the filesystem, before or after it happens; and all later ones if ``forever``."""
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in CALLS:
            original = getattr(owner, name)

            def wrapped(*args: Any, _original: Any = original, _name: str = name, **keywords: Any) -> Any:
                calls.append(_name)
                fail = len(calls) - 1 == at or (forever and len(calls) - 1 > at)
                if fail and not (after and len(calls) - 1 == at):
                    raise error()
                result = _original(*args, **keywords)
                if fail:
                    if _name == "open":
                        os.close(result)
                    raise error()
                return result

            patch.setattr(owner, name, wrapped)
        yield calls


def everything(home: Path, format: str) -> None:
    """A small extraction: two shards, one of them superseding a row, a snapshot and a view."""
    path = make_store(home, format, rows_per_shard=2)
    plan(path, 0, ["a", "b"])
    plan(path, 1, ["b"])
    commit_shard(path, 0, make_rows(["a", "b"], seed=0, bad=["a"]))
    commit_shard(path, 1, make_rows(["b"], seed=1))
    write_snapshot(path.parent, b"snapshot")
    write_view(path)


def check_only_whole_things_are_seen(home: Path, done: dict[str, bytes]) -> None:
    """What readers see is a subset of the finished store, whole shard by whole shard."""
    for store in list_stores(home):
        assert all(done[f"{store.path.relative_to(home)}/plan/{n:06d}.json"] for n in store.plans())
        store.sources()
        assert np.isfinite(store.features[:]).all()
        for name, data in tree(store.path / "shards").items():
            assert done[f"{store.path.relative_to(home)}/shards/{name}"] == data
    snapshot = home / "ds" / "dataset.parquet"
    assert not snapshot.exists() or snapshot.read_bytes() == b"snapshot"


def points(home: Path, format: str, every: int = 15) -> list[int]:
    """Calls of :func:`everything` to fail at: all that rename, link or remove, and some of those that fill staging."""
    with failing(-1, after=False, error=Killed, forever=False) as calls:
        everything(home, format)
    assert len(calls) > 60
    return [at for at, name in enumerate(calls) if at % every == 0 or name not in ("open", "write", "mkdir", "fsync")]


@pytest.mark.usefixtures("quick_disk")
@pytest.mark.parametrize(("format", "after"), [("zarr", False), ("hdf5", True)])
def test_killed_at_any_call_a_rerun_ends_as_if_it_had_not_been(format: str, after: bool, tmp_path: Path) -> None:
    at_calls = points(tmp_path / "whole", format)
    done = tree(tmp_path / "whole")
    for at in at_calls:
        home = tmp_path / str(at)
        with failing(at, after=after, error=Killed, forever=True), pytest.raises(Killed):
            everything(home, format)
        check_only_whole_things_are_seen(home, done)
        everything(home, format)
        assert tree(home) == done


@pytest.mark.parametrize("format", FORMATS)
def test_of_many_writers_of_one_shard_exactly_one_wins(format: str, tmp_path: Path) -> None:
    path = make_store(tmp_path, format)
    for number in range(3):
        barrier = threading.Barrier(4)

        def write(
            seed: int, number: int = number, barrier: threading.Barrier = barrier
        ) -> tuple[bool, bool, ShardRows]:
            rows = make_rows(["a", "b"], seed=seed)
            barrier.wait()
            planned = plan(path, number, ["a", "b"])
            return planned, commit_shard(path, number, rows), rows

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(write, range(4)))
        assert sorted(planned for planned, _, _ in results) == [False, False, False, True]
        (winner,) = [rows for _, won, rows in results if won]
        assert np.array_equal(FeatureStore(path).features[:], winner.features)
    assert list((path / "staging").iterdir()) == []


def test_where_folders_cannot_be_exchanged_the_view_is_replaced_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_rename_at", lambda one, other, flags: False)
    path = make_store(tmp_path)
    write_view(path)
    add(path, 0, ["a"])
    write_view(path)
    assert (path / "view.zarr" / "features" / "c" / "0" / "0").is_symlink()
    assert list((path / "staging").iterdir()) == []


def test_a_view_is_old_once_a_repair_commits_other_rows_under_the_same_number(tmp_path: Path) -> None:
    path = make_store(tmp_path)
    add(path, 0, ["a", "b"])
    assert refresh_view(path)
    commit_shard(path, 0, make_rows(["a", "b"], bad=["b"]), damaged=True)  # and is killed before it writes the view
    assert zarr.open_group(path / "view.zarr", mode="r")["valid"][:2].tolist() == [True, True]
    assert refresh_view(path)
    assert zarr.open_group(path / "view.zarr", mode="r")["valid"][:2].tolist() == [True, False]
    assert not refresh_view(path)


def test_names_cannot_leave_their_folder(tmp_path: Path) -> None:
    path = make_store(tmp_path, backbone="../../x/timm:hf-hub:A/b")
    assert path.parent == tmp_path / "ds"
    assert path.resolve() == path


@pytest.mark.parametrize("changes", [{"row_shape": (0,)}, {"dtype": "object"}, {"dtype": "nonsense"}])
def test_impossible_stores_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with refused(StoreError, "store-dtype" if "dtype" in changes else "store-header"):
        make_store(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("id_", ["", "a\0b", "\ud800"])
def test_ids_that_no_file_can_hold_are_refused(id_: str) -> None:
    with refused(StoreError, "id-not-storable"):
        PlanEntry(id_, 0, 0)
    with refused(StoreError, "id-not-storable"):
        make_rows(["a", "b"]).__class__(("a", id_), np.zeros((2, 1)), np.ones(2, bool), ("", ""), ("", ""))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"valid": np.array([True, True, False])}, "shard-rows"),
        ({"features": np.zeros((3, 1), np.float32)}, "shard-rows"),
        ({"digests": ("ab", "")}, "digest"),
        ({"ids": ("a", "a")}, "id-repeated"),
        ({"reasons": ("", "")}, "shard-rows"),
    ],
)
def test_rows_that_contradict_themselves_are_refused(change: dict[str, Any], code: str) -> None:
    fields: dict[str, Any] = {
        "ids": ("a", "b"),
        "features": np.zeros((2, 1), np.float32),
        "valid": np.array([True, False]),
        "digests": ("", ""),
        "reasons": ("", "bad"),
    }
    with refused(StoreError, code):
        ShardRows(**{**fields, **change})


@given(
    st.lists(
        st.one_of(
            st.builds(PlanEntry, st.sampled_from(["a", "x7", "9"]), st.just(4), st.just(5)),
            st.builds(lambda n, w, p: PlanEntry(f"{p}{n:0{w}d}", 8, 9, None, str(n)), st.integers(0, 12),
                      st.integers(1, 3), st.sampled_from(["", "train-", "1"])),
            st.builds(PlanEntry, st.sampled_from(["a7", "٣"]), st.just(1), st.just(2), st.just(None),
                      st.sampled_from(["7", "07", "٣", "x"])),
            st.builds(PlanEntry, st.just("a7"), st.just(1), st.just(2), st.just("ab" * 32), st.just("7")),
        ),
        max_size=12,
    )
)  # fmt: skip
def test_entries_of_a_plan_survive_as_ranges(entries: list[PlanEntry]) -> None:
    assert plan_entries(json.loads(json.dumps(plan_rows(entries)))) == entries


def test_rows_of_one_container_are_one_range() -> None:
    entries = [PlanEntry(f"train-{n:06d}", 10, 11, None, str(n)) for n in range(90, 1100)]
    assert plan_rows(entries) == [[["train-", 6], [90, 1010], 10, 11, None]]


@pytest.mark.parametrize(
    "row",
    [[["a", 6], [0, 2**40], 1, 1, None], [["a", 0], [0, 1], 1, 1, None], [["a", 6], [-1, 2], 1, 1, None],
     [["a", 6], [0, True], 1, 1, None], [[1, 6], [0, 1], 1, 1, None], [["a", 6], "0", 1, 1, None]],
)  # fmt: skip
def test_a_hostile_range_is_refused_before_it_takes_memory(row: list[Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        plan_entries([row])


@pytest.mark.parametrize("form", [1, "2"])
def test_a_store_of_another_form_is_refused_with_what_to_type(form: object, tmp_path: Path) -> None:
    path = make_store(tmp_path)
    content = unseal((path / "recipe.json").read_bytes(), path, "")
    content.pop("form") if form is None else content.update(form=form)
    (path / "recipe.json").write_bytes(seal(content))
    with refused(StoreError, "store-form") as caught:
        FeatureStore(path)
    assert f"rm -r {path}" in str(caught.value.fix)
    assert list_stores(tmp_path) == []


@pytest.mark.parametrize("format", FORMATS)
def test_a_reason_with_odd_characters_is_kept_escaped(format: str, tmp_path: Path) -> None:
    path = make_store(tmp_path, format)
    rows = ShardRows(("a",), np.zeros((1, 3), np.float32), np.array([False]), ("",), ("\udcff\0 é\n",))
    plan(path, 0, ["a"])
    commit_shard(path, 0, rows)
    assert FeatureStore(path).quarantined == {"a": "\\udcff\\x00 é\n"}


def test_an_unchanged_snapshot_is_not_written_again(tmp_path: Path) -> None:
    write_snapshot(tmp_path / "ds", b"one")
    before = (tmp_path / "ds" / "dataset.parquet").stat()
    write_snapshot(tmp_path / "ds", b"one")
    assert (tmp_path / "ds" / "dataset.parquet").stat().st_ino == before.st_ino
    write_snapshot(tmp_path / "ds", b"two")
    write_scan(tmp_path / "ds", b"scan")
    assert tree(tmp_path / "ds") == {"dataset.parquet": b"two", "scan.parquet": b"scan"}


def test_a_dtype_of_big_endian_bytes_is_refused_rather_than_turned(tmp_path: Path) -> None:
    path = make_store(tmp_path)
    publish_plan(path, 0, [PlanEntry("a", 1, 1)])
    rows = ShardRows(("a",), np.zeros((1, 3), ">f4"), np.ones(1, bool), ("",), ("",))
    with refused(StoreError, "features-mismatch"):
        commit_shard(path, 0, rows)


def test_batch_threads_and_rows_per_shard_are_those_of_creation(tmp_path: Path) -> None:
    path = create_store(tmp_path, recipe(), row_shape=[3], rows_per_shard=10, batch_size=8, threads=2)
    assert create_store(tmp_path, recipe(), row_shape=[3], rows_per_shard=99, batch_size=1, threads=1) == path
    store = FeatureStore(path)
    assert (store.format, store.rows_per_shard, store.batch_size, store.threads) == ("zarr", 10, 8, 2)
