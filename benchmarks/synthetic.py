"""Synthetic datasets and feature stores for benchmarks: the shapes of real questions, no image behind them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd

from embcache.data.dataset import ImageDataset
from embcache.store.commit import PlanEntry, ShardRows, commit_shard, create_store, publish_plan, write_snapshot
from embcache.store.schema import Recipe

PNEUMONIA = (1341, 3875, 624)
"""Images without and with pneumonia that train, and test images."""


def make_dataset(name: str, n_train: int, n_test: int, positive: float) -> ImageDataset:
    """Two classes, two images a group, no files."""
    n = n_train + n_test
    labels = (np.random.default_rng(0).random(n) < positive).astype(np.int64)
    ids = [f"i{k:07d}" for k in range(n)]
    table = pd.DataFrame(
        {
            "id": ids,
            "path": [f"{i}.png" for i in ids],
            "place": "",
            "label": labels,
            "group": [f"g{k // 2}" for k in range(n)],
            "split": ["train"] * n_train + ["test"] * n_test,
        }
    )
    return ImageDataset(
        name=name,
        root=None,
        class_names=("normal", "pneumonia"),
        augment="generic",
        table=table,
        metric="auc",
        subset_sizes={"S": 50, "M": 500},
    )


def pneumonia_like() -> ImageDataset:
    """As many images as the pneumonia dataset has."""
    normal, pneumonia, test = PNEUMONIA
    return make_dataset("pneumonia-like", normal + pneumonia, test, pneumonia / (normal + pneumonia))


def put_store(
    home: Path,
    ds: ImageDataset,
    backbone: str,
    dim: int,
    dtype: str = "float32",
    shard: int = 512,
    *,
    format: str = "zarr",
    features: np.ndarray | None = None,
) -> Path:
    """Commit features, shard by shard as extraction does; by default such as tell the classes apart like real ones."""
    folder = home / ds.name
    folder.mkdir(parents=True, exist_ok=True)
    write_snapshot(folder, ds.to_parquet_bytes())
    recipe = Recipe(
        backbone=backbone,
        architecture="none",
        weights_sha256=hashlib.sha256(backbone.encode()).hexdigest(),
        transform={"kind": "none"},
        decoder="none",
        pooling="none",
        precision="fp32",
        dtype=dtype,
        numerics=1,
    )
    shape = (dim,)
    store = create_store(folder, recipe, format=format, row_shape=shape, rows_per_shard=shard, batch_size=64, threads=1)
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(backbone.encode(), "little")))
    direction = rng.standard_normal(dim, np.float32) / np.sqrt(dim, dtype=np.float32)
    ids, signs = ds.table["id"].tolist(), 2 * ds.labels.astype(np.float32) - 1
    for number, start in enumerate(range(0, len(ids), shard)):
        part = tuple(ids[start : start + shard])
        if features is None:
            x = np.abs(0.4 * rng.standard_normal((len(part), dim), np.float32))
            x += 0.4 * signs[start : start + shard, None] * direction
        else:
            x = features[start : start + shard]
        publish_plan(store, number, [PlanEntry(i, 1, 1, None) for i in part])
        digests = tuple(hashlib.sha256(i.encode()).hexdigest() for i in part)
        rows = ShardRows(part, x.astype(dtype, copy=False), np.ones(len(part), bool), digests, ("",) * len(part))
        commit_shard(store, number, rows)
    return Path(store)
