"""Cached features of the images that may be looked at before any test: the pool of the protocol, without folds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from embcache.config import DatasetRef
from embcache.data.classes import ClassOptions
from embcache.data.dataset import ImageDataset, find_dataset
from embcache.data.draws import IntArray, hash_order
from embcache.errors import StoreNotFoundError, UsageError
from embcache.paths import PathLike, home_dir, slug
from embcache.probe.inputs import cached_backbones, cached_datasets, divide_for, load_features, open_stores
from embcache.probe.protocol import Sides
from embcache.store.feature_store import FeatureStore, extract_command

MOST = 5_000
"""Training images that an answer in seconds looks at, at most: beyond it figures hardly move and time grows."""


@dataclass(frozen=True, eq=False)
class Pool:
    """The images of a dataset outside its test set, and the stores of several backbones over it."""

    ds: ImageDataset
    stores: dict[str, FeatureStore]
    sides: Sides
    rows: IntArray  # rows of the dataset that may train or validate, ascending; no test row among them

    def features(self, backbone: str, rows: IntArray) -> torch.Tensor:
        """Raw features of some rows, float32 (n, D)."""
        return load_features(self.stores[backbone], self.ds, self.sides.ids[rows])


def open_datasets(
    names: Sequence[str] = (),
    data_root: PathLike | None = None,
    home: PathLike | None = None,
    allow_missing: bool = False,
    dataset_name: str | None = None,
    classes: ClassOptions = ClassOptions(),
    columns: DatasetRef = DatasetRef(),
    *,
    several: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> list[ImageDataset]:
    """Datasets by name; default: every one with cached features.

    With ``several`` those with one backbone are left out, and ``say`` names them, unless no dataset has more.
    """
    asked = list(names or cached_datasets(home))
    if not names and several and len(asked) > 1:
        lacking = [name for name in asked if len(cached_backbones(name, home)) < 2]
        for name in lacking:
            say(f"{name} left out: fewer than two backbones cached")
        asked = [name for name in asked if name not in lacking] or asked
    if not asked:
        raise StoreNotFoundError(
            "nothing is cached",
            where=home_dir(home),
            fix="embcache extract --backbone NAME --dataset NAME, or embcache demo",
        )
    if len(asked) > 1 and (data_root is not None or dataset_name is not None):
        raise UsageError("--data-root and --name are for one dataset", found=", ".join(asked), fix="--dataset NAME")
    found = (
        find_dataset(
            name, root=data_root, home=home, allow_missing=allow_missing, dataset_name=dataset_name, columns=columns
        )[0]
        for name in asked
    )
    return [classes.of(ds) for ds in found]


def open_pool(
    ds: ImageDataset,
    backbones: Sequence[str] | None = None,
    *,
    home: PathLike | None = None,
    recipe: str | None = None,
    seed: int = 0,
) -> Pool:
    """Cached features of a dataset, of all backbones by default, without the test set that a probe would hold out."""
    names = list(dict.fromkeys(backbones or cached_backbones(ds.name, home)))
    if not names:
        raise StoreNotFoundError(
            f"no features are cached for {ds.name}",
            where=home_dir(home) / slug(ds.name),
            fix=extract_command("NAME", ds, home),
        )
    stores = open_stores(ds, [names], home, recipe)
    sides = divide_for(ds, list(stores.values()), seed=seed)
    return Pool(ds, stores, sides, np.union1d(sides.pool, sides.own_val))


def drawn(pool: Pool, seed: int) -> IntArray:
    """`MOST` rows of a pool, or all where it has fewer; ascending, drawn by hash with the seed."""
    if len(pool.rows) <= MOST:
        return pool.rows
    order = hash_order(seed, "analysis", pool.sides.ids[pool.rows].tolist())
    return np.sort(pool.rows[order[:MOST]])
