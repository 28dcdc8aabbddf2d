"""Freeing room never costs a row that is in use, whenever it is killed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import embcache.maintain.gc as gc
import embcache.store.commit as commit
from embcache.cli import app
from embcache.data.dataset import load_dataset
from embcache.errors import CorruptStoreError
from embcache.extract import recipes as run
from embcache.extract.scan import plan_store, scan_dataset
from embcache.io import bytes_under
from embcache.maintain.gc import collect
from embcache.maintain.verify import verify_store
from embcache.store.feature_store import FeatureStore
from embcache.store.schema import FORMATS
from tests.extract.conftest import draw
from tests.extract.tiny import load_tiny, run_extraction
from tests.store.build import add, make_rows, make_store, plan, quick_disk, tree

__all__ = ["quick_disk"]

pytestmark = pytest.mark.usefixtures("quick_disk")


def build(folder: Path, format: str = "zarr", **keywords: Any) -> Path:
    """Shards of which one is in full use, two in part, and one not at all; five rows are superseded."""
    path = make_store(folder, format, **keywords)
    add(path, 0, ["a", "b", "c", "d"], bad=["b"])
    add(path, 1, ["e", "f", "g", "h"])
    add(path, 2, ["i", "j"])
    add(path, 3, ["i", "j", "a"])
    add(path, 4, ["e", "f"])
    commit.write_view(path)
    return path


def held(path: Path) -> dict[str, Any]:
    """All that a store says of each image."""
    store = FeatureStore(path)
    features = dict(zip(store.ids.tolist(), store.features[:].tolist(), strict=True))
    sources = store.sources()
    return {
        id_: (features.get(id_), store.quarantined.get(id_), store.digests.get(id_), (entry.size, entry.mtime_ns))
        for id_, entry in sources.items()
    }


@pytest.mark.parametrize("format", list(FORMATS))
def test_superseded_rows_go_and_all_others_stay(format: str, tmp_path: Path) -> None:
    path = build(tmp_path, format)
    before = held(path)
    whole = {n: (path / "shards" / n).stat().st_ino for n in ("000003", "000004")}
    all_files = tree(tmp_path)
    promised = collect(path, dry_run=True)
    assert tree(tmp_path) == all_files
    size = bytes_under(path)
    done = collect(path)
    assert (done.superseded, done.moved, done.shards) == (promised.superseded, promised.moved, promised.shards)
    assert (done.superseded, done.moved, done.shards) == (5, 5, 3)
    assert held(path) == before
    assert FeatureStore(path).committed() == (3, 4, 5, 6)
    assert {n: (path / "shards" / n).stat().st_ino for n in whole} == whole
    check = verify_store(path)
    assert (check.damage, check.notes, check.rows) == ((), (), 10)
    assert done.freed == size - bytes_under(path)
    again = collect(path)
    assert (again.superseded, again.shards, again.freed) == (0, 0, 0)


def test_views_and_planned_shards_are_kept(tmp_path: Path) -> None:
    path = make_store(tmp_path, row_shape=(2, 3))
    add(path, 0, ["a", "b"], row_shape=(2, 3))
    add(path, 1, ["a"], row_shape=(2, 3))
    plan(path, 2, ["x", "y"])
    before = held(path)
    collect(path)
    assert held(path) == before
    assert set(FeatureStore(path).plans()) - set(FeatureStore(path).committed()) == {2}
    assert 3 in FeatureStore(path).committed()


@pytest.mark.parametrize("format", list(FORMATS))
def test_killed_at_any_step_nothing_is_lost_and_the_next_run_finishes(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = ("publish_plan", "commit_shard", "take_out", "discard", "refresh_view")
    originals = {name: getattr(gc, name) for name in steps}
    expected, left = None, 1
    moment, stride = 0, 1 if format == "hdf5" else 3
    while left == 1:
        path = build(tmp_path / str(moment), format)
        before = held(path)
        budget = [moment]

        def guard(name: str, budget: list[int] = budget) -> Any:
            def wrapped(*arguments: Any, **keywords: Any) -> Any:
                if budget[0] == 0:
                    raise KeyboardInterrupt
                budget[0] -= 1
                return originals[name](*arguments, **keywords)

            return wrapped

        with monkeypatch.context() as patch:
            for name in steps:
                patch.setattr(gc, name, guard(name))
            try:
                collect(path)
                left = 0
            except KeyboardInterrupt:
                left = 1
        assert held(path) == before, moment
        assert not verify_store(path).damage, moment
        # What a killed run has put aside is old enough to go at once.
        for entry in (path / "staging").iterdir():
            os.utime(entry, (1, 1))
        collect(path)
        collect(path)
        assert held(path) == before, moment
        committed = FeatureStore(path).committed()
        assert expected in (None, committed), moment
        expected = committed
        check = verify_store(path)
        assert (check.damage, check.notes, check.planned) == ((), (), 0), moment
        assert not commit.refresh_view(path), moment
        assert not list((path / "staging").iterdir()), moment
        moment += stride
    assert moment > 10


def test_whoever_has_the_store_open_is_never_served_other_rows(tmp_path: Path) -> None:
    path = build(tmp_path)
    store = FeatureStore(path)
    rows = {id_: row for row, id_ in enumerate(store.ids.tolist())}
    intact = store.features[:]
    features = FeatureStore(path).restrict(store.ids.tolist())
    assert len(features) == len(rows)
    collect(path)
    for id_, row in rows.items():
        try:
            found = features.features[row]
        except CorruptStoreError:
            continue
        assert np.array_equal(found, intact[row]), id_


def test_rows_that_a_plan_owes_stay_where_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = build(tmp_path)
    plan(path, 5, ["b"])  # of shard 0: its bytes changed, and nothing has computed it yet
    caplog.set_level(logging.INFO, "embcache")
    done = collect(path)
    assert (done.superseded, done.moved, done.shards) == (4, 2, 2)
    assert FeatureStore(path).committed() == (0, 3, 4, 6)
    assert "shards 0 hold rows that are planned to be computed again" in caplog.messages[0]
    commit.commit_shard(path, 5, make_rows(["b"], seed=5))
    assert collect(path).shards == 1
    assert FeatureStore(path).committed() == (3, 4, 5, 6, 7)
    assert held(path)["b"][3] == (500, 7)
    assert verify_store(path).damage == ()


def test_a_damaged_store_is_refused(tmp_path: Path) -> None:
    path = build(tmp_path)
    (path / "shards" / "000001" / "commit.json").write_bytes(b"{}")
    with pytest.raises(CorruptStoreError, match="verify --repair"):
        collect(path)
    assert (path / "shards" / "000000").is_dir()


def test_leftovers_and_dead_leases_go(tmp_path: Path) -> None:
    path = make_store(tmp_path)
    add(path, 0, ["a"])
    old = [path / "staging" / "shard-000009-00", path / "leases" / "000009.json"]
    for entry in (*old, path / "staging" / "shard-000010-00"):
        entry.parent.mkdir(exist_ok=True)
        entry.write_bytes(b"xyz")
    for entry in old:
        os.utime(entry, (1, 1))
    assert collect(path).leftovers == 2
    assert not any(entry.exists() for entry in old)
    assert [entry.name for entry in (path / "staging").iterdir()] == ["shard-000010-00"]


def test_the_command_says_what_it_frees(home: Path) -> None:
    path = build(home)
    (home / "ds" / f".dataset.parquet-{16 * '0'}").write_bytes(b"half")
    os.utime(home / "ds" / f".dataset.parquet-{16 * '0'}", (1, 1))
    run = CliRunner().invoke
    told = run(app, ["gc", "--dry-run", "--json", "-"], catch_exceptions=False)
    answer = json.loads(told.stdout)
    assert (told.exit_code, answer["dry_run"], answer["stores"][0]["superseded"]) == (0, True, 5)
    assert (path / "shards" / "000000").is_dir()
    told = run(app, ["gc", "--dataset", "ds"], catch_exceptions=False)
    assert told.exit_code == 0
    assert "freed in" in told.stdout
    assert not (home / "ds" / f".dataset.parquet-{16 * '0'}").exists()
    assert "nothing is cached" in run(app, ["gc", "--home", str(home / "none")], catch_exceptions=False).stdout


def test_files_exchanged_while_rows_are_copied_are_found_by_an_extraction(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "bitmaps"
    for index in range(4):
        draw(root / "ab"[index % 2] / f"{index}.bmp", index)
    monkeypatch.setattr(run, "load_backbone", load_tiny)
    ds = load_dataset("folder", root)
    (done,) = run_extraction(["random"], ds)
    draw(root / "b" / "3.bmp", 9)  # so that a row is superseded
    run_extraction(["random"], ds)
    one, other, original = root / "a" / "0.bmp", root / "b" / "1.bmp", gc.commit_shard
    for path in (one, other):
        os.utime(path, (1.6e9, 1.6e9))
    run_extraction(["random"], ds)
    owed: list[Any] = []

    def exchanged(*arguments: Any, **keywords: Any) -> None:
        pixels = one.read_bytes(), other.read_bytes()
        for path, content in zip((other, one), pixels, strict=True):
            entry = FeatureStore(done.store.path).sources()[path.relative_to(root).as_posix()]
            path.write_bytes(content)
            os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns))
        with ThreadPoolExecutor(1) as pool:
            scan = scan_dataset(ds, None, pool).scan
            owed.append(plan_store(FeatureStore(done.store.path), ds, scan))
        original(*arguments, **keywords)

    monkeypatch.setattr(gc, "commit_shard", exchanged)
    collect(done.store.path)
    monkeypatch.undo()
    monkeypatch.setattr(run, "load_backbone", load_tiny)
    assert owed[0].changed == 2
    run_extraction(["random"], ds, home=home)
    assert FeatureStore(done.store.path).digests == {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*.bmp")
    }
