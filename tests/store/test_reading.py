"""Reading shards whose files are out of the ordinary."""

from __future__ import annotations

from pathlib import Path

import pytest

from embcache.store.feature_store import open_store
from tests.store.build import add, make_store


def test_shards_of_rows_can_be_seen_and_not_changed(tmp_path: Path) -> None:
    path = make_store(tmp_path)
    add(path, 0, ["a", "b", "c", "d"])
    add(path, 1, ["e"])
    shards = open_store("random", "ds", home=tmp_path).features.shards
    assert shards.tolist() == [0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="read-only"):
        shards[0] = 1
