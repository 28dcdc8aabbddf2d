"""The snapshot's ids, read without pandas."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from embcache.data.dataset import ImageDataset, read_snapshot
from embcache.data.published import snapshot_ids
from embcache.errors import DatasetError
from embcache.paths import slug
from tests.refusal import refused
from tests.store.build import make_table


def test_name_and_ids_are_those_of_the_snapshot(home: Path) -> None:
    table = make_table(["b", "a/ü", "c"]).table.assign(path=["b", "a", "c"], place="")
    ds = ImageDataset("Chest X", None, ("no", "yes"), "auc", "generic", table)
    assert snapshot_ids("Chest X") is None
    (home / slug("Chest X")).mkdir(parents=True)
    (home / slug("Chest X") / "dataset.parquet").write_bytes(ds.to_parquet_bytes())
    whole = read_snapshot("Chest X")
    assert whole is not None
    assert snapshot_ids("Chest X") == (whole.name, whole.table["id"].tolist()) == ("Chest X", ["b", "a/ü", "c"])
    assert snapshot_ids(slug("Chest X"), home) == ("Chest X", ["b", "a/ü", "c"])


@pytest.mark.parametrize("damage", [b"", b"not parquet", b"PAR1"])
def test_a_damaged_snapshot_is_told(home: Path, damage: bytes) -> None:
    (home / "ds").mkdir(parents=True)
    (home / "ds" / "dataset.parquet").write_bytes(damage)
    with refused(DatasetError, "snapshot-damaged"):
        snapshot_ids("ds")


def test_a_flipped_byte_is_noticed_or_changes_nothing(home: Path) -> None:
    table = make_table(["b", "a/ü", "c"]).table.assign(path=["b", "a", "c"], place="", sex=["F", "M", "F"])
    ds = ImageDataset("mine", None, ("no", "yes"), "auc", "generic", table, notes=("seen",))
    data = ds.to_parquet_bytes()
    path = home / "mine" / "dataset.parquet"
    path.parent.mkdir(parents=True)
    noticed = 0
    for position in range(0, len(data), 31):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            again = ImageDataset.from_parquet_bytes(bytes(changed))
        except DatasetError:
            noticed += 1
            continue
        pd.testing.assert_frame_equal(again.table, ds.table)
        assert (again.name, again.class_names, again.notes) == (ds.name, ds.class_names, ds.notes)
        assert snapshot_ids("mine", home) == ("mine", ds.table["id"].tolist())
    assert noticed > len(data) / 62
