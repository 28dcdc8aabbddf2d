"""The contract of a feature store under damage, run over every format: nothing wrong is ever served."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from embcache.errors import CorruptStoreError
from embcache.store.commit import commit_shard
from embcache.store.feature_store import FeatureStore
from embcache.store.schema import FORMATS, find_format
from tests.refusal import refused
from tests.store.build import add, make_store, quick_disk, tree

__all__ = ["quick_disk"]

pytestmark = [pytest.mark.parametrize("format", list(FORMATS)), pytest.mark.usefixtures("quick_disk")]


def _flip(path: Path, position: int, bit: int = 0) -> bytes:
    before = path.read_bytes()
    changed = bytearray(before)
    changed[position] ^= 1 << bit
    path.write_bytes(bytes(changed))
    return before


def _read_all(path: Path) -> object:
    store = FeatureStore(path)
    return store.features[:], store.quarantined, store.sources()


def test_any_flipped_byte_of_any_file_is_noticed_before_it_is_parsed(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_store(tmp_path, format)
    add(path, 0, ["a", "b"], bad=["b"])
    _read_all(path)
    form, checked = find_format(format), 0
    intact = {name.partition("shards/000000/")[2]: data for name, data in tree(path).items()}

    def only_intact(decode: Callable[[Mapping[str, bytes]], object]) -> Callable[[Mapping[str, bytes]], object]:
        def wrapped(files: Mapping[str, bytes]) -> object:
            assert all(intact[name] == data for name, data in files.items())
            return decode(files)

        return wrapped

    monkeypatch.setattr(form, "decode_index", only_intact(form.decode_index))
    monkeypatch.setattr(form, "decode_features", only_intact(form.decode_features))
    for name in tree(path):
        file = path / name
        size = file.stat().st_size
        for position in range(0, size, max(1, size // 20)):
            before = _flip(file, position, bit=position % 8)
            with pytest.raises(CorruptStoreError, match="try"):
                _read_all(path)
            file.write_bytes(before)
            checked += 1
    assert checked > 50
    _read_all(path)


@pytest.mark.parametrize("damage", ["truncate", "extend", "remove"])
def test_truncated_extended_and_missing_files_are_noticed(format: str, damage: str, tmp_path: Path) -> None:
    path = make_store(tmp_path, format)
    add(path, 0, ["a", "b"])
    for name, data in tree(path).items():
        file = path / name
        if name.startswith("plan") and damage == "remove":
            continue  # read as a shard without a plan: see below
        if damage == "remove":
            file.unlink()
        else:
            file.write_bytes(data[:-1] if damage == "truncate" else data + b"\0")
        with pytest.raises(CorruptStoreError, match=name.rpartition("/")[2]):
            _read_all(path)
        file.write_bytes(data)
    if damage == "remove":
        (path / "plan" / "000000.json").unlink()
        with refused(CorruptStoreError, "file-missing"):
            FeatureStore(path).sources()


def test_a_damaged_shard_says_how_to_mend_it_and_only_it_is_owed_without_it(format: str, tmp_path: Path) -> None:
    path = make_store(tmp_path, format)
    rows = add(path, 0, ["a", "b"])
    add(path, 1, ["c"])
    (path / "shards" / "000000" / "commit.json").write_text("{}")
    with pytest.raises(CorruptStoreError) as caught:
        _read_all(path)
    command = f"embcache verify --repair --dataset ds --backbone random --home {tmp_path}"
    assert command in str(caught.value.fix)
    shutil.rmtree(path / "shards" / "000000")
    store = FeatureStore(path)
    assert set(store.plans()) - set(store.committed()) == {0}
    commit_shard(path, 0, rows)
    assert len(FeatureStore(path)) == 3


def test_one_shard_in_anothers_place_is_noticed(format: str, tmp_path: Path) -> None:
    path = make_store(tmp_path, format)
    add(path, 0, ["a", "b"])
    add(path, 1, ["c"])
    (path / "plan" / "000001.json").replace(path / "plan" / "000000.json")
    with refused(CorruptStoreError, "plan-number"):
        FeatureStore(path).plans()


def test_reading_rows_of_one_shard_does_not_touch_the_others(format: str, tmp_path: Path) -> None:
    path = make_store(tmp_path, format)
    add(path, 0, ["a", "b", "c", "d"])
    rows = add(path, 1, ["e"])
    store = FeatureStore(path)
    assert len(store) == 5
    for file in (path / "shards" / "000000").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    assert np.array_equal(store.features[4:], rows.features)
    with pytest.raises(CorruptStoreError):
        store.features[0]


def test_the_next_commit_of_a_shard_removes_what_a_killed_one_left(format: str, tmp_path: Path) -> None:
    path = make_store(tmp_path, format)
    left = path / "staging" / "shard-000000-0123"
    (left / "data.zarr").mkdir(parents=True)
    (left / "data.zarr" / "zarr.json").write_text("half")
    other = path / "staging" / "shard-000001-0123"
    other.mkdir()
    add(path, 0, ["a"])
    assert not left.exists()
    assert other.exists()  # another writer may be at it
