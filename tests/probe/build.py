"""Small datasets and real feature stores for the tests of probing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from embcache.config import DatasetRef, ProbeConfig
from embcache.data.dataset import ImageDataset
from embcache.probe.probe import probe, probe_cached
from embcache.probe.probe_plan import plan_probe
from embcache.probe.schedule import Schedule
from embcache.runs.folders import Result
from embcache.store.commit import PlanEntry, ShardRows, commit_shard, create_store, publish_plan, write_snapshot
from embcache.store.schema import Recipe


@dataclass(frozen=True)
class Brief(Schedule):
    """A schedule of three epochs, for tests of all else."""

    max_epochs: int = 3
    min_epochs: int = 3


def make_dataset(
    labels: Sequence[int],
    groups: Sequence[str] | None = None,
    split: Sequence[str] | str = "train",
    *,
    name: str = "toy",
    n_classes: int | None = None,
    **options: Any,
) -> ImageDataset:
    """A dataset without files; ids are ``i0, i1, …``, groups default to one per image."""
    y = np.asarray(labels, dtype=np.int64)
    n, n_classes = len(y), n_classes or int(y.max()) + 1
    ids = [f"i{k}" for k in range(n)]
    table = pd.DataFrame(
        {
            "id": ids,
            "path": [f"{i}.png" for i in ids],
            "place": "",
            "label": y,
            "group": list(groups) if groups is not None else ids,
            "split": [split] * n if isinstance(split, str) else list(split),
        }
    )
    options.setdefault("metric", "auc" if n_classes == 2 else "macro_auc")
    options.setdefault("subset_sizes", {"S": 20, "M": 60})
    return ImageDataset(
        name=name,
        root=None,
        class_names=tuple("abcdefgh"[:n_classes]),
        augment="generic",
        table=table,
        **options,
    )


def make_recipe(backbone: str, **changes: Any) -> Recipe:
    """A recipe that names no real network."""
    fields: dict[str, Any] = {
        "backbone": backbone,
        "architecture": "none",
        "weights_sha256": hashlib.sha256(backbone.encode()).hexdigest(),
        "transform": {"kind": "none"},
        "decoder": "none",
        "pooling": "none",
        "precision": "fp32",
        "dtype": "float32",
        "numerics": 1,
    }
    return Recipe(**{**fields, **changes})


def put_store(
    home: Path,
    ds: ImageDataset,
    backbone: str,
    features: np.ndarray,
    *,
    bad: Mapping[str, str] | None = None,
    digests: Mapping[str, str] | None = None,
    ids: Sequence[str] | None = None,
    recipe: Recipe | None = None,
) -> Path:
    """Commit ``features`` (rows as the dataset's) in two shards; ``bad`` ids are quarantined."""
    folder = home / ds.name
    folder.mkdir(parents=True, exist_ok=True)
    write_snapshot(folder, ds.to_parquet_bytes())
    recipe = recipe or make_recipe(backbone, dtype=str(features.dtype))
    names = list(ds.table["id"]) if ids is None else list(ids)
    rows = np.array([list(ds.table["id"]).index(name) for name in names])
    per_shard = -(-len(names) // 2)
    store = create_store(
        folder, recipe, row_shape=features.shape[1:], rows_per_shard=per_shard, batch_size=64, threads=1
    )
    bad = bad or {}
    for number, part in enumerate(np.array_split(np.arange(len(names)), [per_shard])):
        part_ids = tuple(names[k] for k in part)
        known = {i: (digests or {}).get(i, hashlib.sha256(i.encode()).hexdigest()) for i in part_ids}
        publish_plan(store, number, [PlanEntry(i, 1, 1, None) for i in part_ids])
        valid = np.array([i not in bad for i in part_ids], dtype=bool)
        block = np.where(valid.reshape(-1, *([1] * (features.ndim - 1))), features[rows[part]], 0).astype(
            features.dtype
        )
        reasons = tuple(bad.get(i, "") for i in part_ids)
        commit_shard(store, number, ShardRows(part_ids, block, valid, tuple(known.values()), reasons))
    return store


def make_features(ds: ImageDataset, dim: int = 16, *, shift: float = 1.5, seed: int = 0) -> np.ndarray:
    """Class-dependent Gaussians, float32 (n, dim)."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(len(ds.class_names) + 1, dim))
    centers *= shift / np.linalg.norm(centers, axis=1, keepdims=True)
    return (rng.normal(size=(len(ds), dim)) + centers[ds.labels]).astype(np.float32)


def probe_grid(
    ds: ImageDataset, sets: Sequence[Sequence[str]], *, subsets: Sequence[str | int] = ("S",), **options: Any
) -> list[Result]:
    """`probe` with the config's fields as keywords."""
    own = {name: options.pop(name) for name in ("home", "progress", "head") if name in options}
    if isinstance(own.get("head"), str):
        options["head"] = own.pop("head")
    return probe(ds, sets, subsets, ProbeConfig.make(options=options), **own)


def find_saved(
    ds: ImageDataset, sets: Sequence[Sequence[str]], *, subsets: Sequence[str | int] = ("S",), **options: Any
) -> list[Result | str]:
    """What `probe_grid` would not train: each saved result, or the id of the run to be."""
    home = options.pop("home", None)
    plan = plan_probe(ds, sets, subsets, ProbeConfig.make(options=options), home=home)
    return [plan.saved(cell) or cell.id for cell in plan.cells]


def run_cached(datasets: Sequence[str] = (), backbones: Sequence[str] = (), **options: Any) -> list[Result]:
    """`probe_cached` with the fields of both configs as keywords."""
    subsets, home = options.pop("subsets", ["S"]), options.pop("home", None)
    ref = {name: options.pop(name) for name in list(options) if name in DatasetRef.__dataclass_fields__}
    return probe_cached(datasets, backbones, subsets, ProbeConfig.make(options=options), DatasetRef(**ref), home=home)
