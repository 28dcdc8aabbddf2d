"""What a probe reads: the stores of the asked backbones, the splits over what they hold, and features by row."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from embcache.data.dataset import ImageDataset
from embcache.data.draws import IntArray
from embcache.errors import StoreError, UsageError
from embcache.paths import PathLike
from embcache.probe.protocol import Sides, divide, merged_groups, plan_splits, subset_sizes
from embcache.probe.splits import Splits, read_splits
from embcache.probe.stream import Streamed
from embcache.store.feature_store import FeatureStore, extract_command, list_stores, open_store

_SHARDS = 4  # read at a time where what is read is not what is kept


class KnownImages(Protocol):
    """What splits must know of images; a store has it."""

    @property
    def digests(self) -> Mapping[str, str]:
        """Sha256 of the bytes, by id, where it is known."""

    @property
    def quarantined(self) -> Mapping[str, str]:
        """Why an image could not be read, by id."""


def open_stores(
    ds: ImageDataset,
    sets: Sequence[Sequence[str]],
    home: PathLike | None = None,
    recipe: str | None = None,
    views: int = 1,
) -> dict[str, FeatureStore]:
    """The store of every backbone named in ``sets``."""
    asked = list(dict.fromkeys(backbone for names in sets for backbone in names))
    prefixes = [prefix.strip() for prefix in recipe.split(",")] if recipe else []
    fingerprints: dict[str, list[str]] = {backbone: [] for backbone in asked}
    for store in list_stores(home, ds.name) if prefixes else ():
        fingerprints.setdefault(store.recipe.backbone, []).append(store.recipe.fingerprint)
    prefix_of: dict[str, str] = {}
    for prefix in prefixes:
        fits = [b for b in asked if any(fingerprint.startswith(prefix) for fingerprint in fingerprints[b])]
        if not fits or not prefix:
            raise UsageError(
                "--recipe fits none of the backbones",
                expected="first digits of one of "
                + ", ".join(f"{fingerprint[:12]} ({b})" for b in asked for fingerprint in fingerprints[b]),
                found=repr(prefix),
                fix="embcache ls",
            )
        prefix_of |= dict.fromkeys(fits, prefix)
    wanted = views if views > 1 else None
    stores = {backbone: open_store(backbone, ds, home, prefix_of.get(backbone), wanted) for backbone in asked}
    for backbone, store in stores.items():
        if len(store.row_shape) not in (1, 2):
            raise UsageError(
                f"the store of {backbone} does not hold vectors",
                found=f"rows of shape {store.row_shape}",
                where=store.path,
            )
    return stores


def plan_for(
    ds: ImageDataset,
    stores: Sequence[KnownImages],
    *,
    subsets: Sequence[str | int],
    folds: int = 5,
    seed: int = 0,
    val: str = "full",
    test: str = "local",
    splits: PathLike | None = None,
    exclude_test_overlap: bool = False,
) -> Splits:
    """The splits of a dataset as its stores know it: identical bytes grouped, unreadable images left out."""
    digests, unreadable = _known(stores)
    if splits is None:
        return plan_splits(
            ds,
            subsets=subsets,
            folds=folds,
            seed=seed,
            val=val,
            test=test,
            digests=digests,
            unreadable=unreadable,
            exclude_test_overlap=exclude_test_overlap,
        )
    plan = read_splits(
        Path(splits),
        ds,
        merged_groups(ds, digests),
        unreadable=unreadable,
        exclude_test_overlap=exclude_test_overlap,
    )
    names = {str(size): name for name, size in ds.subset_sizes.items() if name not in plan.subsets}
    plan = plan.rename(names)
    lacking = [name for name in (subset_sizes(ds, subsets) if subsets else ()) if name not in plan.subsets]
    if lacking:
        raise UsageError(
            f"the splits file does not list subset {', '.join(lacking)}",
            expected=", ".join(plan.subsets),
            where=splits,
            fix=f"--subset {','.join(plan.subsets)}",
        )
    return plan


def divide_for(
    ds: ImageDataset,
    stores: Sequence[KnownImages],
    *,
    seed: int = 0,
    test: str = "local",
    exclude_test_overlap: bool = False,
) -> Sides:
    """Pool and test set of a dataset as its stores know it, without folds; parameters as of `plan_for`."""
    digests, unreadable = _known(stores)
    return divide(
        ds, seed=seed, test=test, digests=digests, unreadable=unreadable, exclude_test_overlap=exclude_test_overlap
    )


def _known(stores: Sequence[KnownImages]) -> tuple[dict[str, str], set[str]]:
    """Digests of images, and the images that could not be read."""
    digests = {name: digest for store in stores for name, digest in store.digests.items()}
    return digests, {name for store in stores for name in store.quarantined}


def load_features(
    store: FeatureStore,
    ds: ImageDataset,
    ids: Sequence[str] | NDArray[np.object_],
    views: int = 1,
    *,
    keep_half: bool = False,
) -> torch.Tensor:
    """Features of some images of a dataset, raw.

    Shapes: returns (n, D).
    """
    rows, stored = rows_of(store, ds, ids, views), store.features
    kept = np.dtype(np.float16) if stored.dtype == np.float16 and keep_half else np.dtype(np.float32)
    plain = stored.ndim == 3 and views == 1  # the first view is the image as it is
    if stored.dtype == kept and not plain:
        return torch.from_numpy(stored[rows])
    # What is not kept, other views and wider numbers, is not held for more rows than a few shards have.
    x = np.empty((len(rows), *(stored.shape[2:] if plain else stored.shape[1:])), kept)
    order = np.argsort(stored.shards[rows], kind="stable")
    first = np.flatnonzero(np.diff(stored.shards[rows[order]], prepend=-1))  # where each shard begins
    for part in np.split(order, first[_SHARDS::_SHARDS]) if len(order) else ():
        read = stored[rows[part]]
        x[part] = read[:, 0] if plain else read
    return torch.from_numpy(x)


def rows_of(
    store: FeatureStore, ds: ImageDataset, ids: Sequence[str] | NDArray[np.object_], views: int = 1
) -> IntArray:
    """Where in ``store.features`` some images of a dataset lie."""
    rows: IntArray = store.rows_of(ids)
    missing = [id_ for id_, row in zip(ids, rows, strict=True) if row < 0]
    if missing:
        raise StoreError(
            f"{len(missing):,} of {len(rows):,} images have no features of {store.recipe.backbone} yet",
            found=f"no row for {', '.join(map(repr, missing[:5]))}{' …' if len(missing) > 5 else ''}",
            where=store.path,
            fix=extract_command(store.recipe.backbone, ds) + (f" --views {views}" if views > 1 else ""),
        )
    return rows


def stream_features(
    stores: Mapping[str, FeatureStore],
    ds: ImageDataset,
    ids: Sequence[str] | NDArray[np.object_],
    *,
    buffer_rows: int,
    views: int = 1,
    stream: str = "0",
    device: str = "cpu",
) -> Streamed:
    """Features of some images of a dataset, to be read shard by shard whenever they are needed."""
    places = {backbone: rows_of(store, ds, ids, views) for backbone, store in stores.items()}
    first = next(iter(stores))
    shards = stores[first].features.shards
    numbers, counts = np.unique(shards, return_counts=True)
    return Streamed(
        stored={backbone: store.features for backbone, store in stores.items()},
        places=places,
        shards=shards[places[first]],
        shard_rows=dict(zip(numbers.tolist(), counts.tolist(), strict=True)),
        buffer_rows=buffer_rows,
        n_views=views,
        stream=stream,
        device=device,
    )


def digest_shards(stores: Mapping[str, FeatureStore], ds: ImageDataset, ids: NDArray[np.object_], views: int) -> str:
    """SHA-256 (hex) of which shard each image is streamed with, and of how many rows each shard has.

    The order of an epoch follows from both: the same images in other shards, or beside others, make another result.
    """
    first = next(iter(stores.values()))
    lies = hashlib.sha256()
    numbers, counts = np.unique(first.features.shards, return_counts=True)
    for array in (numbers, counts, first.features.shards[rows_of(first, ds, ids, views)]):
        lies.update(np.asarray(array, dtype="<i8").tobytes())
    return lies.hexdigest()


def digest_images(stores: Mapping[str, KnownImages], ids: Sequence[str] | NDArray[np.object_]) -> str:
    """SHA-256 (hex) of which image bytes the features were made from: a replaced image makes another result."""
    images = hashlib.sha256()
    for backbone, store in stores.items():
        digests = store.digests
        images.update(f"{backbone}\n".encode())
        for name in ids:
            images.update(f"{name}\0{digests.get(name, '')}\n".encode())
    return images.hexdigest()
