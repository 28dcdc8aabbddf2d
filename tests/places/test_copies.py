"""Copies of a home in an object store: old, cut, damaged or deleted ones are never taken for what is there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import embcache.mirror as mirrors
from embcache import io as disk
from embcache.errors import CorruptStoreError, UsageError
from embcache.io import replace_file
from embcache.mirror import Mirror, open_mirror
from embcache.paths import home_dir
from embcache.places import Entry, ObjectPlace
from embcache.store import reading
from embcache.store.feature_store import FeatureStore, list_stores
from tests.places.conftest import Machine, on, the_mirror, there
from tests.refusal import refused
from tests.store.build import add, make_store, quick_disk

__all__ = ["quick_disk"]
pytest.importorskip("obstore")
pytestmark = pytest.mark.usefixtures("quick_disk")


def test_a_copy_that_was_cut_is_brought_again(machine: Machine) -> None:
    store = make_store(machine("one"))
    rows = add(store, 0, ["a", "b"])
    (store / "shards/000000/data.zarr/features/c/0/0").write_bytes(b"")
    np.testing.assert_array_equal(FeatureStore(store).features[:], rows.features)


def test_a_document_that_was_cut_is_brought_again(machine: Machine) -> None:
    home = machine("one")
    store = make_store(home)
    rows = add(store, 0, ["a", "b"])
    paths = [store / name for name in ("recipe.json", "plan/000000.json", "shards/000000/commit.json")]
    before = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(b"")
    assert on(machine("one"), store) == store
    assert reading.read_header(store).rows_per_shard == 4
    np.testing.assert_array_equal(FeatureStore(store).features[:], rows.features)
    assert [disk.read_regular(path) for path in paths] == before


@pytest.mark.parametrize("known", [True, False])
def test_a_store_that_was_removed_and_made_again_is_another_one(machine: Machine, known: bool) -> None:
    store = make_store(machine("one"))
    add(store, 0, ["a", "b"])
    add(store, 1, ["x"])
    (store / "plan.gone").mkdir()  # a removal was killed
    if known:
        machine("one")
    other = on(machine("two"), store)
    for key in there(other):
        the_mirror(other).place.delete(key)
    shutil.rmtree(other)
    make_store(other.parents[1])
    add(other, 0, ["c", "d"])
    add(other, 1, ["e"])
    seen = FeatureStore(on(machine("one"), store))
    assert seen.ids.tolist() == ["c", "d", "e"]
    assert reading.read_plans(store)[0][0].id == "c"


def test_a_store_that_is_made_again_is_seen_in_one_process(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "_FRESH_SECONDS", 1000.0)
    store = make_store(machine("one"))
    add(store, 0, ["a", "b"])
    assert FeatureStore(store).ids.tolist() == ["a", "b"]
    mirror, seen = the_mirror(store), open_mirror(the_mirror(store).place.url)
    assert seen is mirror
    other = on(machine("two"), store)
    for key in there(other):
        the_mirror(other).place.delete(key)
    shutil.rmtree(other)
    make_store(other.parents[1])
    add(other, 0, ["c"])
    add(other, 1, ["d"])
    machine("one")
    disk._MIRRORS[f"{mirror.root}/"] = mirror
    mirror.refresh(again=True)
    assert FeatureStore(store).ids.tolist() == ["c", "d"]


def test_a_store_that_was_removed_is_gone_at_once(machine: Machine) -> None:
    store = make_store(machine("one"))
    add(store, 0, ["a", "b"])
    for key in there(store):
        the_mirror(store).place.delete(key)
    (store / "shards.gone").mkdir()
    machine("one")
    assert not (store / "recipe.json").exists()
    assert not list(store.glob("shards*"))
    assert not list_stores(store.parents[1])


def test_a_damaged_document_is_asked_for_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, read = list[str](), Mirror.read
    monkeypatch.setattr(Mirror, "read", lambda mirror, path: asked.append(path.name) or read(mirror, path))
    store = make_store(machine("one"))
    add(store, 0, ["a", "b"])
    place = the_mirror(store).place

    def damaged(key: str, most: int | None = None) -> bytes:
        if key.endswith("recipe.json"):
            raise CorruptStoreError("damaged", code="place-damaged", where=key)
        return get(key, most)

    other = on(machine("two"), store)
    get = the_mirror(other).place.get
    monkeypatch.setattr(ObjectPlace, "get", lambda _, key, most=None: damaged(key, most))
    shutil.rmtree(other)
    for _ in range(3):
        machine("two")
    assert place.url
    assert asked.count("recipe.json") == 2  # when it was well, and when it was not
    with refused(CorruptStoreError, "file-damaged"):
        reading.read_header(other)


def test_a_document_that_had_other_bytes_in_between_is_brought(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = ObjectPlace.list

    def by_content(place: ObjectPlace, *given: Any) -> Iterator[Entry]:  # as the tags of S3
        return (entry._replace(etag=place.get(entry.key).hex()) for entry in listed(place, *given))

    monkeypatch.setattr(ObjectPlace, "list", by_content)
    document = machine("one") / "ds" / "dataset.parquet"
    replace_file(document, b"first")
    machine("one")
    replace_file(document, b"other")
    replace_file(machine("two") / "ds" / "dataset.parquet", b"first")
    machine("one")
    assert document.read_bytes() == b"first"


def test_a_home_whose_copies_are_deleted_meanwhile_goes_on(machine: Machine) -> None:
    home = machine("one")
    store = make_store(home)
    rows = add(store, 0, ["a", "b"])
    shutil.rmtree(home)
    assert reading.read_header(store).rows_per_shard == 4
    add(store, 1, ["c"])
    np.testing.assert_array_equal(FeatureStore(store).features[:2], rows.features)
    assert FeatureStore(store).ids.tolist() == ["a", "b", "c"]


def test_all_commits_are_there_at_once_after_the_copies_were_deleted(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirrors, "_FRESH_SECONDS", 1000.0)
    home = machine("one")
    store = make_store(home)
    for number in range(3):
        add(store, number, [f"{number}"])
    assert FeatureStore(store).committed() == (0, 1, 2)
    shutil.rmtree(home)
    add(store, 3, ["3"])  # makes the folders again
    assert FeatureStore(store).committed() == (0, 1, 2, 3)
    assert home.stat().st_mode & 0o777 == 0o700
    assert home_dir(home) == home  # also to another process


def test_a_folder_where_no_copies_can_be_kept_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for folder in ("file", "file/x"):
        monkeypatch.setenv("EMBCACHE_CACHE_DIR", str(tmp_path / folder))
        with refused(UsageError, "cache-dir") as caught:
            home_dir("memory://nowhere/lab")
        assert "--cache-dir" in str(caught.value.fix)
