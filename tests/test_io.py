"""Processes that meet at every call to the filesystem: the slower one finds what the other left, and no debris."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embcache import io as disk
from embcache.io import create_exclusive, replace_file
from embcache.store.commit import commit_shard, create_store, refresh_view, view_is_current, write_view
from embcache.store.feature_store import FeatureStore
from embcache.store.reading import read_header
from tests.crash.faults import Call, between
from tests.store.build import FORMATS, add, make_rows, make_store, plan, quick_disk, recipe, tree

__all__ = ["quick_disk"]
pytestmark = pytest.mark.usefixtures("quick_disk")


def meeting(mine: Callable[[], Any], other: Callable[[], Any], at: int) -> tuple[Any, list[str]]:
    """Run ``mine`` and, before its ``at``-th call to the filesystem, all of ``other``; the result and mine's calls."""
    calls: list[str] = []
    busy = False

    def hook(call: Call, do: Callable[[], Any]) -> Any:
        nonlocal busy
        if not busy:
            calls.append(call.name)
            if len(calls) - 1 == at:
                busy = True
                other()
                busy = False
        return do()

    with between(hook):
        return mine(), calls


def calls_to_meet_at(prepare: Callable[[], Path], mine: Callable[[Path], Any], most: int = 16) -> list[int]:
    """At most so many of the calls to the filesystem that ``mine`` makes: the last ones, where names change, all."""
    path = prepare()
    count = len(meeting(lambda: mine(path), lambda: None, -1)[1])
    return sorted({*range(0, count, max(1, 2 * count // most)), *range(max(0, count - most // 2), count)})


@pytest.mark.parametrize("format", FORMATS)
def test_overtaken_at_any_call_a_commit_leaves_the_winner_alone(format: str, tmp_path: Path) -> None:
    mine, others = make_rows(["a", "b"], seed=1), make_rows(["a", "b"], seed=2)

    def prepare(name: str) -> Path:
        path = make_store(tmp_path / name, format)
        plan(path, 0, ["a", "b"])
        return path

    results = []
    for at in calls_to_meet_at(lambda: prepare("n"), lambda path: commit_shard(path, 0, mine)):
        path = prepare(str(at))
        won: list[bool] = []

        def other(path: Path = path, won: list[bool] = won) -> None:
            won.append(commit_shard(path, 0, others))

        first, _ = meeting(lambda path=path: commit_shard(path, 0, mine), other, at)
        assert sorted([first, *won]) == [False, True]
        assert np.array_equal(FeatureStore(path).features[:], (mine if first else others).features)
        assert list((path / "staging").iterdir()) == []
        results.append(first)
    assert {True, False} == set(results)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("exchange", [True, False])
def test_overtaken_at_any_call_the_view_shows_all_that_is_committed(
    format: str, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(disk, "_rename_at", lambda one, other, flags: False)

    def prepare(name: str) -> Path:
        path = make_store(tmp_path / name, format)
        add(path, 0, ["a", "b"])
        write_view(path)
        add(path, 1, ["c"])
        plan(path, 2, ["d", "e"])
        return path

    def other(path: Path) -> None:
        commit_shard(path, 2, make_rows(["d", "e"], seed=2))
        write_view(path)

    whole = prepare("whole")
    other(whole)
    for at in calls_to_meet_at(lambda: prepare("n"), write_view):
        path = prepare(str(at))
        meeting(lambda path=path: write_view(path), lambda path=path: other(path), at)
        assert view_is_current(path, read_header(path))
        assert tree(path) == tree(whole)
        assert list((path / "staging").iterdir()) == []


def test_overtaken_at_any_call_a_store_is_created_once(tmp_path: Path) -> None:
    for at in calls_to_meet_at(lambda: tmp_path / "n", make_store):
        home = tmp_path / str(at)
        meeting(lambda home=home: make_store(home), lambda home=home: make_store(home), at)
        (store,) = (home / "ds").iterdir()
        assert sorted(path.name for path in store.iterdir()) == ["leases", "plan", "recipe.json", "shards", "staging"]


@pytest.mark.parametrize("links", ["hard", "renameat2", "neither"])
def test_overtaken_at_any_call_a_name_is_taken_once(
    links: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if links != "hard":
        monkeypatch.setattr(os, "link", _refuse_links)
    if links == "neither":
        monkeypatch.setattr(disk, "_rename_at", lambda one, other, flags: False)

    def prepare(name: str) -> Path:
        for part in ("plan", "staging"):
            (tmp_path / name / part).mkdir(parents=True)
        return tmp_path / name

    def take(folder: Path, data: bytes) -> bool:
        return create_exclusive(folder / "plan" / "7", data, staging=folder / "staging")

    for at in calls_to_meet_at(lambda: prepare("n"), lambda folder: take(folder, b"mine")):
        folder = prepare(str(at))
        won: list[bool] = []

        def other(folder: Path = folder, won: list[bool] = won) -> None:
            won.append(take(folder, b"other"))

        mine, _ = meeting(lambda folder=folder: take(folder, b"mine"), other, at)
        assert tree(folder) == {"plan/7": b"mine" if mine else b"other"}
        # Without links and without such a rename, both may think that they have it: the later one has.
        assert sorted([mine, *won]) == [False, True] or (links == "neither" and mine)


def _refuse_links(*_: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def test_overtaken_at_any_call_a_file_is_replaced_whole(tmp_path: Path) -> None:
    for at in calls_to_meet_at(lambda: tmp_path / "n" / "file", lambda path: replace_file(path, b"mine")):
        path = tmp_path / str(at) / "file"
        meeting(lambda path=path: replace_file(path, b"mine"), lambda path=path: replace_file(path, b"other"), at)
        assert [p.name for p in path.parent.iterdir()] == ["file"]
        assert path.read_bytes() in (b"mine", b"other")


def test_a_folder_that_another_process_removes_never_comes_back_in_part(tmp_path: Path) -> None:
    root = tmp_path / "staged"
    files = {"a/b/one": b"1", "a/c/two": b"2", "three": b"3"}
    calls = calls_to_meet_at(lambda: tmp_path / "n", lambda path: disk.write_tree(path, files, ["empty"]))
    for at in calls[1:]:
        # The last two calls are on a folder that is open already.
        with pytest.raises(FileNotFoundError) if at < calls[-2] else nullcontext():
            meeting(lambda: disk.write_tree(root, files, ["empty"]), lambda: disk.remove(root), at)
        assert list(tmp_path.iterdir()) == [tmp_path / "n"]


def test_a_store_that_lost_its_empty_folders_is_mended(tmp_path: Path) -> None:
    path = make_store(tmp_path)
    for name in ("plan", "shards", "leases", "staging"):
        (path / name).rmdir()
    arguments = {"row_shape": [3], "rows_per_shard": 4, "batch_size": 2, "threads": 1}
    assert create_store(path.parent, recipe(), **arguments) == path  # type: ignore[arg-type]
    add(path, 0, ["a"])
    assert FeatureStore(path).ids.tolist() == ["a"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_view_is_written_anew_when_shards_were_added(format: str, tmp_path: Path) -> None:
    path = make_store(tmp_path, format)
    assert refresh_view(path)
    add(path, 0, ["a"])
    assert refresh_view(path)
    assert not refresh_view(path)
    add(path, 1, ["a"])
    assert refresh_view(path)


def test_a_filesystem_that_cannot_flush_folders_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flush(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", flush)
    add(make_store(tmp_path), 0, ["a"])
