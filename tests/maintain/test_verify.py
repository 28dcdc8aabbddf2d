"""Whatever becomes of a file of a store, verifying names it, and reading refuses it."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embcache.errors import CorruptStoreError
from embcache.maintain.listing import walk_stores
from embcache.maintain.verify import verify_store
from embcache.store.commit import write_view
from embcache.store.feature_store import FeatureStore
from embcache.store.schema import FORMATS, find_format
from tests.maintain.conftest import damage, files_of, flip
from tests.store.build import add, make_store, plan, quick_disk, tree

__all__ = ["quick_disk"]

FORMAT_NAMES = list(FORMATS)


def build(folder: Path, format: str) -> Path:
    """Three shards, one row of which is superseded and one unreadable, and a view."""
    path = make_store(folder, format)
    add(path, 0, ["a", "b", "c", "d"], bad=["b"])
    add(path, 1, ["e", "f", "g"])
    add(path, 2, ["a", "h"])
    write_view(path)
    return path


@functools.cache
def shared_store(format: str) -> Path:
    """One store for all examples of a property: each undoes what it did."""
    with mock.patch.object(os, "fsync"):
        return build(Path(tempfile.mkdtemp(prefix="embcache-test-")), format)


def read_all(path: Path) -> None:
    store = FeatureStore(path)
    assert store.features[:].shape == (7, 3)
    assert len(store.sources()) == 8


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_an_intact_store_is_well(format: str, tmp_path: Path, quick_disk: None) -> None:
    path = build(tmp_path, format)
    before = tree(tmp_path)
    check = verify_store(path)
    assert (check.damage, check.notes) == ((), ())
    assert (check.shards, check.rows, check.planned, check.backbone) == (3, 9, 0, "random")
    assert check.files == len(files_of(path))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("format", FORMAT_NAMES)
@settings(max_examples=25)
@given(data=st.data())
def test_any_flipped_bit_is_named_with_its_shard_and_rows(format: str, data: st.DataObject) -> None:
    path = shared_store(format)
    file = data.draw(st.sampled_from(files_of(path)))
    size = file.stat().st_size
    position, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7))
    intact = tree(path)
    form = find_format(format)

    def guarded(decode: Callable[[Mapping[str, bytes]], object]) -> Callable[[Mapping[str, bytes]], object]:
        def wrapped(files: Mapping[str, bytes]) -> object:
            for name, content in files.items():
                assert any(bytes(content) == intact[f"shards/{n:06d}/{name}"] for n in range(3)), name
            return decode(files)

        return wrapped

    before = flip(file, position, bit)
    try:
        with (
            mock.patch.object(form, "decode_index", guarded(form.decode_index)),
            mock.patch.object(form, "decode_features", guarded(form.decode_features)),
        ):
            check = verify_store(path)
            relative = file.relative_to(path)
            repair = "embcache verify --repair --dataset ds --backbone random"
            fix = "extract again: mv" if file.name == "recipe.json" else repair
            with pytest.raises(CorruptStoreError, match=fix):
                read_all(path)
    finally:
        file.write_bytes(before)
    (found,) = check.damage
    assert found.path == file
    if relative.parts[0] == "recipe.json":
        assert found.kind == "recipe"
        return
    number = int(relative.parts[1].removesuffix(".json"))
    first, last = [("a", "d"), ("e", "g"), ("a", "h")][number]
    count = [4, 3, 2][number]
    assert (found.kind, found.shard) == ("plan" if relative.parts[0] == "plan" else "shard", number)
    assert found.rows is not None
    assert (found.rows.first, found.rows.last, found.rows.count) == (4 * number, 4 * number + count - 1, count)
    assert (found.rows.first_id, found.rows.last_id) == (first, last)


@pytest.mark.parametrize(
    ("format", "how"), [("zarr", "cut"), ("hdf5", "lengthen"), ("hdf5", "empty"), ("zarr", "remove")]
)
def test_cut_lengthened_and_missing_files_are_named(format: str, how: str, tmp_path: Path, quick_disk: None) -> None:
    path = build(tmp_path, format)
    for file in files_of(path):
        before = damage(file, how)
        check = verify_store(path)
        assert [each.path for each in check.damage] == [file]
        file.write_bytes(before)
    assert not verify_store(path).damage


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_what_no_commit_names_is_told(format: str, tmp_path: Path, quick_disk: None) -> None:
    path = build(tmp_path, format)
    extra = [
        path / "shards" / "000001" / "more.bin",
        path / "shards" / "000001" / "deep" / "more.bin",
        path / "shards" / "notes.txt",
        path / "plan" / "copy of 000000.json",
    ]
    for file in extra:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x")
    (path / "shards" / "000002" / "hollow").mkdir()
    (path / "README").write_text("mine")
    (path / "shards" / "000001" / ".nfs0001").write_bytes(b"x")
    check = verify_store(path)
    assert {each.path for each in check.damage} == {*extra, path / "shards" / "000002" / "hollow"}
    assert {each.kind for each in check.damage} == {"extra"}
    assert any("README" in note for note in check.notes)
    read_all(path)


def test_an_unfinished_extraction_is_no_damage(tmp_path: Path, quick_disk: None) -> None:
    path = build(tmp_path, "zarr")
    plan(path, 3, ["x", "y"])
    (path / "staging" / "shard-000003-00").mkdir()
    os.utime(path / "staging" / "shard-000003-00", (1, 1))
    (path / "leases" / "000003.json").write_text("{}")
    os.utime(path / "leases" / "000003.json", (1, 1))
    check = verify_store(path)
    assert not check.damage
    assert check.planned == 2
    assert any("1 leases of processes that are gone" in note for note in check.notes)
    assert any("1 leftovers" in note for note in check.notes)


def test_a_missing_commit_and_swapped_shards_are_named(tmp_path: Path, quick_disk: None) -> None:
    path = build(tmp_path, "zarr")
    one, other = path / "shards" / "000000", path / "shards" / "000001"
    other.rename(path / "aside")
    one.rename(other)
    (path / "aside").rename(one)
    check = verify_store(path)
    assert [(each.shard, each.problem) for each in check.damage] == [
        (0, "its rows are not those of its plan"),
        (1, "its rows are not those of its plan"),
    ]


def test_stores_are_found_without_their_recipe(tmp_path: Path, quick_disk: None) -> None:
    path = build(tmp_path, "zarr")
    other = make_store(tmp_path, precision="bf16")
    (path / "recipe.json").unlink()
    (tmp_path / "ds" / "runs").mkdir()
    assert walk_stores(tmp_path)[0] == sorted([path, other])
    assert walk_stores(tmp_path, ["ds"], ["random"], path.name[-12:])[0] == [path]
    assert walk_stores(tmp_path, ["ds"], ["dino"])[0] == []
    assert walk_stores(tmp_path, ["other"])[0] == []
    (found,) = verify_store(path).damage
    assert (found.kind, found.path.name) == ("recipe", "recipe.json")
