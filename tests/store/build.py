"""Small stores for tests: recipes, rows and datasets made up on the spot."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from embcache.store.commit import PlanEntry, ShardRows, commit_shard, create_store, publish_plan
from embcache.store.schema import Recipe

FORMATS = ("zarr", "hdf5")


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk: no power is lost in these tests."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


RECIPE = Recipe(
    backbone="random",
    architecture="torchvision resnet50",
    weights_sha256="ab" * 32,
    transform={"kind": "paper", "resize": (256, 256), "crop": (224, 224), "size": (224, 224), "mean": (0.485, 0.456)},
    decoder="pillow-1",
    pooling="avg",
    precision="fp32",
    dtype="float32",
    numerics=1,
)


def recipe(**changes: Any) -> Recipe:
    """The usual recipe with some fields changed."""
    return dataclasses.replace(RECIPE, **changes)


def digest(id_: str) -> str:
    """A sha256 to stand for that of the image's bytes."""
    return hashlib.sha256(id_.encode()).hexdigest()


def make_store(
    folder: Path, format: str = "zarr", *, row_shape: Sequence[int] = (3,), rows_per_shard: int = 4, **changes: Any
) -> Path:
    """An empty store under ``folder``/ds."""
    return create_store(
        folder / "ds",
        recipe(**changes),
        format=format,
        row_shape=row_shape,
        rows_per_shard=rows_per_shard,
        batch_size=2,
        threads=1,
        provenance={"device": "cpu"},
    )


def make_rows(
    ids: Sequence[str], *, row_shape: Sequence[int] = (3,), seed: int = 0, bad: Sequence[str] = ()
) -> ShardRows:
    """Rows of normal noise; those in ``bad`` could not be read."""
    features = np.random.default_rng(seed).normal(size=(len(ids), *row_shape)).astype(np.float32)
    return ShardRows(
        ids=tuple(ids),
        features=features,
        valid=np.array([id_ not in bad for id_ in ids], dtype=bool),
        digests=tuple("" if id_ in bad else digest(id_) for id_ in ids),
        reasons=tuple(f"truncated: {id_}" if id_ in bad else "" for id_ in ids),
    )


def plan(store: Path, number: int, ids: Sequence[str]) -> bool:
    """Publish a plan whose sizes and times tell the rows apart."""
    return publish_plan(store, number, [PlanEntry(id_, 100 * number + i, 7, None) for i, id_ in enumerate(ids)])


def add(store: Path, number: int, ids: Sequence[str], **keywords: Any) -> ShardRows:
    """Plan and commit one shard; return what was handed in."""
    rows = make_rows(ids, seed=number, **keywords)
    assert plan(store, number, ids)
    assert commit_shard(store, number, rows)
    return rows


@dataclasses.dataclass(frozen=True)
class Table:
    """The least that a store asks of a dataset."""

    table: pd.DataFrame
    name: str = "ds"


def make_table(ids: Sequence[str], *, test: Sequence[str] = ()) -> Table:
    """Labels by turns, every two rows a group."""
    return Table(
        pd.DataFrame(
            {
                "id": list(ids),
                "label": np.arange(len(ids)) % 2,
                "group": [f"p{i // 2}" for i in range(len(ids))],
                "split": ["test" if id_ in test else "train" for id_ in ids],
            }
        )
    )


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by its path in it; ``view.h5``, which h5py stamps with the time, without its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): b"" if p.name == "view.h5" else p.read_bytes() for p in files}
