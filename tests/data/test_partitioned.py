"""A table that is read in partitions has the rows that it has as one table, and is checked as strictly."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embcache.config import DatasetRef
from embcache.data import partitioned, tables
from embcache.data.dataset import find_dataset, load_dataset
from embcache.data.partitioned import PartitionedDataset, find_partitioned, load_partitioned
from embcache.errors import CorruptStoreError, DatasetError
from embcache.maintain.verify import check_partitions
from embcache.partitions import partition_rows, read_partition
from embcache.sealed import read_sealed, seal
from tests.refusal import refused


def table(n: int = 50, start: int = 0) -> dict[str, list[object]]:
    """Columns of a table with the usual oddities: spaces, numbers, empty cells, other spellings of splits."""
    numbers = range(start, start + n)
    return {
        "image": [f" a/{k:03d}.png" if k % 7 == 0 else f"a/{k:03d}.png" for k in numbers],
        "diagnosis": [["mild ", "severe", None][k % 3] for k in numbers],
        "set": [["Train", "test", "", "validation"][k % 4] for k in numbers],
        "age": [float(k) if k % 5 else None for k in numbers],
        "group": [f"p{k // 2}" if k % 11 else "" for k in numbers],
        "weight": [k / 8 for k in numbers],
    }


def write(path: Path, columns: dict[str, list[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def whole(dataset: PartitionedDataset) -> pd.DataFrame:
    return pd.concat([part.table for part in dataset.parts()], ignore_index=True)


def as_lists(frame: pd.DataFrame) -> dict[str, list[object]]:
    return {str(name): frame[name].tolist() for name in frame}


def test_the_rows_are_those_of_one_table(tmp_path: Path, home: Path) -> None:
    file = write(tmp_path / "d" / "t.parquet", table())
    for name in table()["image"]:
        path = tmp_path / "d" / str(name).strip()
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(str(name).encode())
    one = load_dataset("folder", file)
    several = load_partitioned(file, rows=16)
    assert list(several.partitions.values()) == [16, 16, 16, 2]
    assert len(several) == 50
    assert (several.name, several.root, several.class_names) == (one.name, one.root, one.class_names)
    assert as_lists(whole(several)) == as_lists(one.table)
    assert [part.total for part in several.parts()] == [50] * 4


def test_equal_rows_are_one_file_that_is_written_once(tmp_path: Path, home: Path) -> None:
    folder = tmp_path / "d"
    write(folder / "0.parquet", table(20))
    first = load_partitioned(folder, rows=16, name="d")
    files = {path: path.stat().st_mtime_ns for path in (home / "d" / "partitions").iterdir()}
    write(folder / "1.parquet", table(20, start=20))  # another file: those of the first stay
    second = load_partitioned(folder, rows=16, name="d")
    assert list(second.partitions)[:2] == list(first.partitions)
    assert len(second) == 40
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    # How a file is cut into row groups, and which type its texts have, is not its content.
    kept = pa.table(table(20)).cast(pa.schema([(n, pa.large_string()) for n in ("image", "diagnosis", "set")] + [
        ("age", pa.float64()), ("group", pa.large_string()), ("weight", pa.float64()),
    ]))  # fmt: skip
    pq.write_table(kept, folder / "0.parquet", row_group_size=3)
    assert list(load_partitioned(folder, rows=16, name="d").partitions) == list(second.partitions)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda c: c["image"].__setitem__(40, c["image"][3]), "duplicate-ids"),
        (lambda c: c["image"].__setitem__(40, "../up.png"), "outside-root"),
        (lambda c: c["image"].__setitem__(40, "/etc/hosts"), "outside-root"),
        (lambda c: c["image"].__setitem__(40, ""), "cell-not-text"),
        (lambda c: c["image"].__setitem__(40, "a\0b.png"), "cell-not-text"),
        (lambda c: c["set"].__setitem__(40, "holdout"), "unknown-split"),
        (lambda c: c.pop("image"), "column-missing"),
        (lambda c: c.update(path=c["image"], filename=c.pop("image")), ""),
        (lambda c: c["diagnosis"].__setitem__(40, "Severe"), "classes-differ-in-case"),
    ],
)
def test_what_a_table_may_not_hold_is_refused_wherever_it_is(
    change: Callable[[dict[str, list[object]]], object], code: str, tmp_path: Path, home: Path
) -> None:
    columns = table()
    change(columns)
    if code == "unknown-split":  # a column whose first rows are splits
        columns["split"] = columns.pop("set")
    file = write(tmp_path / "t.parquet", columns)
    if not code:
        assert len(load_partitioned(file, rows=16)) == 50
        return
    with refused(DatasetError, code) as caught:
        load_partitioned(file, rows=16)
    assert code != "duplicate-ids" or "a/003.png (2 times)" in str(caught.value.found)


def test_ids_of_one_hash_are_compared(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pd.util, "hash_array", lambda values, categorize: np.zeros(len(values), np.uint64))
    columns = table()
    assert len(load_partitioned(write(tmp_path / "t.parquet", columns), rows=16)) == 50
    columns["image"][40] = columns["image"][3]
    with refused(DatasetError, "duplicate-ids"):
        load_partitioned(write(tmp_path / "t.parquet", columns), rows=16)


def test_the_same_partition_twice_is_refused(tmp_path: Path, home: Path) -> None:
    for name in "01":
        write(tmp_path / "d" / f"{name}.parquet", table(10))
    with refused(DatasetError, "duplicate-ids"):
        load_partitioned(tmp_path / "d")


def test_tables_with_other_columns_or_none_are_refused(tmp_path: Path, home: Path) -> None:
    write(tmp_path / "d" / "0.parquet", table(10))
    write(tmp_path / "d" / "1.parquet", {**table(10, 10), "more": ["x"] * 10})
    with refused(DatasetError, "columns-differ"):
        load_partitioned(tmp_path / "d")
    (tmp_path / "e").mkdir()
    with refused(DatasetError, "table-missing"):
        load_partitioned(tmp_path / "e")
    with refused(DatasetError, "table-empty"):
        load_partitioned(write(tmp_path / "t.parquet", {"path": [], "label": []}))
    (tmp_path / "t.parquet").write_bytes(b"PAR1 of no kind")
    with refused(DatasetError, "table-unreadable"):
        load_partitioned(tmp_path / "t.parquet")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


def _other(path: Path) -> None:
    other = pq.read_table(path).slice(1)
    pq.write_table(other, path)


@pytest.mark.parametrize("damage", [_flip, _other, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_partition_that_is_not_what_its_name_says_is_refused_and_written_anew(
    damage: Callable[[Path], object], tmp_path: Path, home: Path
) -> None:
    file = write(tmp_path / "t.parquet", table())
    dataset = load_partitioned(file, rows=16, name="d")
    digest = list(dataset.partitions)[1]
    before = read_partition(home / "d", digest)
    assert partition_rows(home / "d", digest, 2, 5)[0] == before["id"].to_pylist()[2:5]
    damage(home / "d" / "partitions" / f"{digest}.parquet")
    with refused(CorruptStoreError, "partition-damaged"):
        read_partition(home / "d", digest)
    with refused(CorruptStoreError, "partition-damaged"):
        list(dataset.parts())
    with refused(CorruptStoreError, "partition-damaged"):
        partition_rows(home / "d", digest, 2, 5)
    assert list(load_partitioned(file, rows=16, name="d").partitions) == list(dataset.partitions)
    assert read_partition(home / "d", digest).equals(before)


def test_verify_looks_at_partitions_and_repairs_them(tmp_path: Path, home: Path) -> None:
    file = write(tmp_path / "t.parquet", table())
    assert check_partitions(home / "d", None, False) is None
    digest = list(load_partitioned(file, rows=16, name="d").partitions)[1]
    whole = {"path": str(home / "d" / "partitions"), "problem": "", "repaired": False}
    assert check_partitions(home / "d", None, False) == whole
    _flip(home / "d" / "partitions" / f"{digest}.parquet")
    found = check_partitions(home / "d", None, False)
    assert found is not None
    assert digest in found["problem"]
    assert check_partitions(home / "d", None, True) == {**whole, "repaired": True}
    _flip(home / "d" / "partitions" / f"{digest}.parquet")
    file.unlink()
    found = check_partitions(home / "d", None, True)
    assert found is not None
    assert digest in found["problem"]


def test_partitions_that_are_lost_are_told(tmp_path: Path, home: Path) -> None:
    load_partitioned(write(tmp_path / "t.parquet", table()), rows=16, name="d")
    kept = home / "d"
    shutil.rmtree(kept / "partitions")
    found = check_partitions(kept, None, False)
    assert found is not None
    assert "a partition of a dataset is missing" in found["problem"]
    content = read_sealed(kept / "partitions.json", "")
    for hostile in ("../x", ["../../x"], [1]):
        (kept / "partitions.json").write_bytes(seal({**content, "partitions": hostile}))
        found = check_partitions(kept, None, False)
        assert found is not None
        assert "cannot be read" in found["problem"]
    (kept / "partitions.json").unlink()
    assert check_partitions(kept, None, False) is None


def test_only_large_tables_are_read_so_and_others_refuse_what_they_cannot_hold(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "d" / "t.parquet", table())
    ref = DatasetRef(data_root=file)
    assert find_partitioned("folder", ref) is None
    assert find_partitioned("pneumonia") is None
    monkeypatch.setattr(partitioned, "MOST_ROWS", 40)
    found = find_partitioned("folder", ref)
    assert found is not None
    assert len(found) == 50
    again = find_partitioned(found.name)
    assert again is not None
    assert again.partitions == found.partitions
    # It has no snapshot: by its name other commands read the table, as far as they can hold it.
    for name in table()["image"]:
        (tmp_path / "d" / str(name).strip()).parent.mkdir(exist_ok=True)
        (tmp_path / "d" / str(name).strip()).write_bytes(str(name).encode())
    assert as_lists(find_dataset(found.name)[0].table) == as_lists(whole(found))
    write(tmp_path / "e" / "0.parquet", table(30))
    write(tmp_path / "e" / "1.parquet", table(30, 30))
    parts = find_partitioned("folder", DatasetRef(data_root=tmp_path / "e"))
    assert parts is not None
    with refused(DatasetError, "dataset-partitioned"):
        find_dataset(parts.name)
    monkeypatch.setattr(tables, "MOST_TABLE_ROWS", 40)
    with refused(DatasetError, "table-too-long"):
        load_dataset("folder", file)
