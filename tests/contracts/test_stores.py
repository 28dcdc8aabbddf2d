"""The contract of a feature store, run over every format."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from embcache.errors import CorruptStoreError, StoreError
from embcache.store.commit import ShardRows, commit_shard, write_view
from embcache.store.feature_store import FeatureStore
from embcache.store.reading import read_features
from embcache.store.schema import FORMATS
from tests.refusal import refused
from tests.store.build import add, digest, make_rows, make_store, make_table, plan, quick_disk, tree

__all__ = ["quick_disk"]

pytestmark = [pytest.mark.parametrize("format", list(FORMATS)), pytest.mark.usefixtures("quick_disk")]

IDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=300)


def read_view(store: Path) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Features, ids and valid as a plain reader without embcache gets them."""
    if (store / "view.zarr").exists():
        group = zarr.open_group(store / "view.zarr", mode="r")
        return group["features"][:], [str(id_) for id_ in group["ids"][:]], group["valid"][:]
    with h5py.File(store / "view.h5") as file:
        return file["features"][:], list(file["ids"].asstr()[:]), file["valid"][:]


def test_rows_come_back_as_they_were_written(format: str, tmp_path: Path) -> None:
    path = make_store(tmp_path, format)
    first, second = add(path, 0, ["a", "b", "c", "d"], bad=["c"]), add(path, 1, ["e", "f"])
    store = FeatureStore(path)
    assert store.ids.tolist() == ["a", "b", "d", "e", "f"]
    expected = np.concatenate([first.features[[0, 1, 3]], second.features])
    assert store.features[:].tobytes() == expected.tobytes()
    assert store.features.dtype == np.float32
    assert store.quarantined == {"c": "truncated: c"}
    assert store.digests == {id_: digest(id_) for id_ in "abdef"}
    assert (store.format, store.rows_per_shard, store.batch_size, store.threads) == (format, 4, 2, 1)
    assert store.provenance == {"device": "cpu"}
    assert store.committed() == (0, 1)
    assert [entry.id for entry in store.plans()[1]] == ["e", "f"]


@pytest.mark.parametrize(("row_shape", "dtype"), [((2, 3), "float16"), ((4, 5, 3), "uint8"), ((), "float64")])
def test_any_row_shape_and_dtype_is_kept(format: str, row_shape: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    path = make_store(tmp_path, format, row_shape=row_shape, dtype=dtype)
    values = np.random.default_rng(0).integers(0, 200, (3, *row_shape)).astype(dtype)
    rows = ShardRows(("a", "b", "c"), values, np.ones(3, bool), ("",) * 3, ("",) * 3)
    plan(path, 0, rows.ids)
    commit_shard(path, 0, rows)
    write_view(path)
    store = FeatureStore(path)
    assert store.features.shape == (3, *row_shape)
    assert store.features[:].dtype == np.dtype(dtype)
    assert np.array_equal(store.features[:], values)
    assert np.array_equal(read_view(path)[0][:3], values)
    assert store.digests == {}


@given(data=st.data(), ids=st.lists(IDS, min_size=1, max_size=8, unique=True), rows_per_shard=st.integers(1, 3))
@settings(max_examples=15)
def test_reading_equals_a_dictionary_of_what_was_committed(
    format: str, data: st.DataObject, ids: list[str], rows_per_shard: int
) -> None:
    shards = data.draw(
        st.lists(st.lists(st.sampled_from(ids), min_size=1, max_size=rows_per_shard, unique=True), max_size=5)
    )
    order = data.draw(st.permutations(range(len(shards))))
    committed = order[: data.draw(st.integers(0, len(order)))]
    bad = data.draw(st.sets(st.sampled_from(ids)))
    with tempfile.TemporaryDirectory() as folder:
        path = make_store(Path(folder), format, rows_per_shard=rows_per_shard)
        for number, shard in enumerate(shards):
            assert plan(path, number, shard)
        for number in committed:
            assert commit_shard(path, number, make_rows(shards[number], seed=number, bad=sorted(bad)))
        expected: dict[str, np.ndarray] = {}
        origin: dict[str, int] = {}
        for number in sorted(committed):
            rows = make_rows(shards[number], seed=number)
            expected.update(zip(rows.ids, rows.features, strict=True))
            origin.update(dict.fromkeys(shards[number], number))
        store = FeatureStore(path)
        assert set(store.ids.tolist()) == set(expected) - bad
        assert len(store.ids) == len(store)
        assert set(store.quarantined) == set(expected) & bad
        for id_, row in zip(store.ids.tolist(), store.features[:], strict=True):
            assert row.tobytes() == expected[id_].tobytes()
        sources = store.sources()
        assert {id_: entry.size // 100 for id_, entry in sources.items()} == origin
        assert all(entry.digest == (None if id_ in bad else digest(id_)) for id_, entry in sources.items())
        write_view(path)
        features, view_ids, valid = read_view(path)
        assert len(features) == rows_per_shard * (max(committed, default=-1) + 1)
        assert {view_ids[i]: features[i].tobytes() for i in np.flatnonzero(valid)} == {
            id_: expected[id_].tobytes() for id_ in set(expected) - bad
        }


@given(rows=st.lists(st.integers(-18, 17), max_size=40), start=st.integers(-20, 20), stop=st.integers(-20, 20))
@settings(max_examples=12)
def test_rows_of_many_shards_are_those_of_an_array(
    format: str, rows: list[int], start: int, stop: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    key = f"{format} many"
    if key not in _STORES:
        path = make_store(tmp_path_factory.mktemp("many"), format)
        for number in range(6):
            add(path, number, [f"{number}{i}" for i in range(4 if number < 5 else 2)], bad=["21", "30", "33", "50"])
        _STORES[key] = FeatureStore(path)
    features = _STORES[key].features
    array = np.stack([features[i] for i in range(18)])
    for chosen in (np.array(rows, np.int64), slice(start, stop), slice(start, stop, -1), np.arange(18).reshape(6, 3)):
        assert np.array_equal(features[chosen], array[chosen])


_STORES: dict[str, FeatureStore] = {}


def _seven_rows(format: str, factory: pytest.TempPathFactory) -> FeatureStore:
    if format not in _STORES:
        path = make_store(factory.mktemp("seven"), format)
        add(path, 0, ["a", "b", "c", "d"], bad=["b"])
        add(path, 1, ["e", "f", "g", "h"])
        _STORES[format] = FeatureStore(path)
    return _STORES[format]


def test_features_behave_like_an_array(format: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    features = _seven_rows(format, tmp_path_factory).features
    array = features[:]
    assert features.shape == array.shape == (7, 3)
    assert (features.ndim, len(features)) == (2, 7)
    assert np.array_equal(np.asarray(features), array)
    assert np.asarray(features, dtype=np.float64).dtype == np.float64
    assert np.array_equal(np.stack(list(features)), array)
    mask = np.arange(7) % 2 == 0
    assert np.array_equal(features[mask], array[mask])
    assert "(7, 3)" in repr(features)
    with pytest.raises(IndexError):
        features[7]


def test_a_later_shard_supersedes_and_one_that_cannot_be_read_hides_the_old_row(format: str, tmp_path: Path) -> None:
    path = make_store(tmp_path, format)
    add(path, 0, ["a", "b", "c"])
    later = add(path, 5, ["b", "c"], bad=["c"])
    store = FeatureStore(path)
    assert store.ids.tolist() == ["a", "b"]
    assert np.array_equal(store.features[1], later.features[0])
    assert store.quarantined == {"c": "truncated: c"}
    assert store.sources()["b"].size == 500


def test_the_same_rows_give_the_same_bytes_in_any_order_of_commits(format: str, tmp_path: Path) -> None:
    shards = {0: ["a", "b", "c", "d"], 1: ["e", "a"], 2: ["f"]}
    trees = []
    for name, order in (("one", (0, 1, 2)), ("two", (2, 0, 1))):
        path = make_store(tmp_path / name, format)
        for number in order:
            add(path, number, shards[number], bad=["e"])
        trees.append(tree(path))
    assert trees[0] == trees[1]
    assert all(b"time" not in data for name, data in trees[0].items() if name.endswith("commit.json"))


def test_the_second_to_commit_a_shard_is_told_so_and_changes_nothing(format: str, tmp_path: Path) -> None:
    path = make_store(tmp_path, format)
    add(path, 0, ["a", "b"])
    before = tree(path)
    assert not commit_shard(path, 0, make_rows(["a", "b"], seed=9))
    assert tree(path) == before
    assert list((path / "staging").iterdir()) == []


def test_rows_other_than_the_planned_ones_are_refused(format: str, tmp_path: Path) -> None:
    path = make_store(tmp_path, format)
    plan(path, 0, ["a", "b"])
    for rows in (make_rows(["b", "a"]), make_rows(["a"]), make_rows(["a", "c"])):
        with refused(StoreError, "rows-not-planned"):
            commit_shard(path, 0, rows)
    with refused(StoreError, "features-mismatch"):
        commit_shard(path, 0, make_rows(["a", "b"], row_shape=(4,)))
    with refused(CorruptStoreError, "file-missing"):
        commit_shard(path, 1, make_rows(["a", "b"]))
    assert FeatureStore(path).committed() == ()


def test_a_number_is_planned_once(format: str, tmp_path: Path) -> None:
    path = make_store(tmp_path, format)
    assert plan(path, 3, ["a"])
    assert not plan(path, 3, ["b"])
    assert [entry.id for entry in FeatureStore(path).plans()[3]] == ["a"]
    with refused(StoreError, "plan-size"):
        plan(path, 4, ["a", "b", "c", "d", "e"])
    with refused(StoreError, "id-repeated"):
        plan(path, 4, ["a", "a"])
    with refused(StoreError, "shard-empty"):
        plan(path, 4, [])


def test_a_store_can_be_moved_with_its_view(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_store(tmp_path / "here", format)
    rows = add(path, 0, ["a", "b", "c"], bad=["b"])
    add(path, 2, ["c"])
    write_view(path)
    (tmp_path / "there" / "deep").mkdir(parents=True)
    shutil.move(tmp_path / "here" / "ds", tmp_path / "there" / "deep")
    monkeypatch.chdir(tmp_path)
    moved = tmp_path / "there" / "deep" / "ds" / path.name
    features, ids, valid = read_view(moved)
    assert np.flatnonzero(valid).tolist() == [0, 8]
    assert (ids[0], ids[1], ids[2], ids[8]) == ("a", "b", "", "c")
    assert np.array_equal(features[0], rows.features[0])
    assert len(FeatureStore(moved)) == 2


def test_rewriting_the_view_replaces_it_whole(format: str, tmp_path: Path) -> None:
    path = make_store(tmp_path, format)
    write_view(path)
    assert len(read_view(path)[0]) == 0
    add(path, 0, ["a"])
    write_view(path)
    write_view(path)
    assert read_view(path)[1][0] == "a"
    assert list((path / "staging").iterdir()) == []
    shutil.rmtree(path / "view.zarr", ignore_errors=True)
    assert len(FeatureStore(path)) == 1  # never read by embcache itself


def test_without_links_the_view_holds_copies(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_store(tmp_path, format)
    rows = add(path, 0, ["a", "b"])

    def refuse(*_: object, **__: object) -> None:
        raise OSError(1, "no symbolic links here")

    monkeypatch.setattr(os, "symlink", refuse)
    write_view(path)
    assert np.array_equal(read_view(path)[0][:2], rows.features)


def test_restricting_hides_and_orders(format: str, tmp_path: Path) -> None:
    path = make_store(tmp_path, format)
    add(path, 0, ["a", "b", "c", "d"], bad=["d"])
    whole = FeatureStore(path)
    some = whole.restrict(["c", "unknown", "d", "a"])
    assert some.ids.tolist() == ["c", "a"]
    assert np.array_equal(some.features[:], whole.features[:][[2, 0]])
    assert set(some.quarantined) == {"d"}
    assert set(some.digests) == {"a", "c"}
    assert "images: 2" in repr(some)
    assert len(whole.restrict(["c", "d"]).restrict(["b"])) == 1


def test_arrays_are_aligned_by_id(format: str, tmp_path: Path) -> None:
    path = make_store(tmp_path, format)
    add(path, 0, ["a", "b", "c", "d"], bad=["b"])
    add(path, 1, ["e"])
    store = FeatureStore(path)
    ds = make_table(["e", "d", "c", "b", "a"], test=["c", "e"])
    features, labels, groups = store.arrays(ds)
    assert np.array_equal(features, store.features[:][[3, 2, 1, 0]])
    assert labels.tolist() == [0, 1, 0, 0]
    assert labels.dtype == np.int64
    assert groups.tolist() == ["p0", "p0", "p1", "p2"]
    assert groups.dtype.kind == "U"
    assert store.arrays(ds, split="test")[1].tolist() == [0, 0]
    assert store.arrays(ds, split="val")[0].shape == (0, 3)
    with refused(StoreError, "features-incomplete"):
        store.arrays(make_table(["a", "new"]))


def test_an_unblanked_shard_is_written_with_zeros_where_rows_are_not_valid(format: str, tmp_path: Path) -> None:
    path = make_store(tmp_path, format, row_shape=(2, 2, 3), dtype="uint8")
    for number, bad in enumerate(([], ["b"])):
        values = np.full((2, 2, 2, 3), 7, np.uint8)
        valid = np.array([id_ not in bad for id_ in "ab"])
        reasons = tuple("broken" if id_ in bad else "" for id_ in "ab")
        plan(path, number, "ab")
        commit_shard(path, number, ShardRows(("a", "b"), values, valid, ("", ""), reasons))
        assert (values == 7).all()  # what was handed in is left as it is
        read = read_features(path, FeatureStore(path)._header, number)
        assert read[valid].min() == 7
        assert not read[~valid].any()


def test_shards_are_let_go_of_as_reading_moves_on(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_store(tmp_path, format)
    for number in range(3):
        add(path, number, [f"{number}{i}" for i in range(4)])
    held: list[weakref.ref[np.ndarray]] = []

    def watched(*arguments: Any) -> np.ndarray:
        assert not any(ref() is not None for ref in held)  # the one before is gone when the next is read
        shard = read_features(*arguments)
        held.append(weakref.ref(shard))
        return shard

    monkeypatch.setattr("embcache.store.reading.read_features", watched)
    features = FeatureStore(path).features
    for row in range(12):
        features[row]
    assert len(held) == 3
