"""Cached features of the images that may be looked at before any test: the pool of the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from embcache.data.classes import ClassOptions
from embcache.data.dataset import ImageDataset, find_dataset
from embcache.data.splits import IntArray, hash_order
from embcache.errors import StoreNotFoundError, UsageError
from embcache.paths import PathLike, home_dir, slug
from embcache.probe.cached import cached_backbones, cached_datasets
from embcache.probe.inputs import load_features, open_stores, plan_for
from embcache.probe.splits import Splits
from embcache.store.feature_store import FeatureStore, extract_command

MOST = 5_000
"""Training images that an answer in seconds looks at, at most: beyond it figures hardly move and time grows."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Splits of a dataset and the stores of several backbones over it.

    Attributes
    ----------
    ds : ImageDataset
    stores : dict of backbone to FeatureStore
    plan : Splits
    rows : int64 array
        Rows of the dataset that train or validate in any fold, ascending; no test row among them.
    """

    ds: ImageDataset
    stores: dict[str, FeatureStore]
    plan: Splits
    rows: IntArray

    def features(self, backbone: str, rows: IntArray) -> torch.Tensor:
        """Raw features of some rows, float32 (n, D)."""
        return load_features(self.stores[backbone], self.ds, self.plan.ids[rows])


def open_datasets(
    names: Sequence[str] | None = None,
    *,
    data_root: PathLike | None = None,
    home: PathLike | None = None,
    allow_missing: bool = False,
    dataset_name: str | None = None,
    classes: ClassOptions = ClassOptions(),
) -> list[ImageDataset]:
    """Datasets by name, live or from the snapshot kept at extraction; default: every one with cached features.

    Parameters
    ----------
    names, data_root, home, allow_missing, dataset_name, classes
        As for `embcache.probe.cached.probe_cached`.

    Raises
    ------
    StoreNotFoundError
        Nothing is cached.
    UsageError
        ``data_root`` or ``dataset_name`` with several datasets.
    """
    asked = list(names or cached_datasets(home))
    if not asked:
        raise StoreNotFoundError(
            "nothing is cached",
            where=home_dir(home),
            fix="embcache extract --backbone NAME --dataset NAME, or embcache demo",
        )
    if len(asked) > 1 and (data_root is not None or dataset_name is not None):
        raise UsageError("--data-root and --name are for one dataset", found=", ".join(asked), fix="--dataset NAME")
    found = (
        find_dataset(name, root=data_root, home=home, allow_missing=allow_missing, dataset_name=dataset_name)[0]
        for name in asked
    )
    return [classes.of(ds) for ds in found]


def open_pool(
    ds: ImageDataset,
    backbones: Sequence[str] | None = None,
    *,
    subset: str | int = "F",
    home: PathLike | None = None,
    recipe: str | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Pool:
    """Open what is cached and draw the splits that a probe would.

    Parameters
    ----------
    ds : ImageDataset
        The dataset.
    backbones : sequence of str, optional
        Default: all that are cached.
    subset : str or int
        As for `embcache.probe.protocol.plan_splits`.
    home, recipe
        As for `embcache.probe.inputs.open_stores`.
    folds, seed : int
        Of the protocol.

    Raises
    ------
    StoreNotFoundError
        Nothing is cached.
    ProtocolError
        The dataset cannot carry folds or subset.
    """
    names = list(dict.fromkeys(backbones or cached_backbones(ds.name, home)))
    if not names:
        raise StoreNotFoundError(
            f"no features are cached for {ds.name}",
            where=home_dir(home) / slug(ds.name),
            fix=extract_command("NAME", ds, home),
        )
    stores = open_stores(ds, [names], home, recipe)
    plan = plan_for(ds, list(stores.values()), subsets=[subset], folds=folds, seed=seed)
    parts = [rows for side in (plan.train, plan.val) for rows in side.values()]
    return Pool(ds, stores, plan, np.unique(np.concatenate(parts)))


def drawn(pool: Pool) -> IntArray:
    """`MOST` rows of a pool, or all where it has fewer; ascending, drawn by hash with the pool's seed."""
    if len(pool.rows) <= MOST:
        return pool.rows
    order = hash_order(pool.plan.seed, "analysis", pool.plan.ids[pool.rows].tolist())
    return np.sort(pool.rows[order[:MOST]])
