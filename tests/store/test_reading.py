"""Reading shards whose files are out of the ordinary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import embcache.store.reading as reading
from embcache.errors import CorruptStoreError, StoreError
from embcache.store.schema import find_format
from embcache.store.zarr_format import ROOT, decode_index
from tests.refusal import refused
from tests.store.build import add, make_store

DEEP = b"[" * 200_000


def test_what_a_format_raises_is_an_error_of_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_store(tmp_path)
    add(path, 0, ["a", "b", "c"])
    header = reading.read_header(path)
    with pytest.raises(RecursionError):  # metadata nested deeper than the stack
        decode_index({ROOT + "zarr.json": DEEP})

    def fail(*_: Any) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr(find_format(header.format), "decode_features", fail)
    with refused(CorruptStoreError, "shard-damaged"):
        reading.read_features(path, header, 0)


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (NotADirectoryError(20, "Not a directory"), CorruptStoreError, "no such file"),
        (PermissionError(13, "Permission denied"), StoreError, "cannot be read"),
    ],
)
def test_features_that_cannot_be_looked_at_are_an_error_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, kind: type[StoreError], told: str
) -> None:
    path = make_store(tmp_path)
    add(path, 0, ["a", "b", "c"])
    header = reading.read_header(path)
    original = Path.stat

    def stat(self: Path, **options: Any) -> Any:
        if "features" in self.parts:
            raise error
        return original(self, **options)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(kind, match=told):
        reading.read_index(path, header, 0)
