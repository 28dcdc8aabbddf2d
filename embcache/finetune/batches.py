"""Pixels for finetuning: which images can be read, their frames in memory or in one scratch file, and batches of them.

A *frame* is an image after resizing and before the crop: what a pixel store holds, and what augmentation starts from.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import lcm
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from embcache.backbones.catalog import Backbone
from embcache.backbones.transforms import Transform, center, choose_transform, frame
from embcache.data.dataset import ImageDataset
from embcache.data.images import image_refs
from embcache.errors import StoreError, UsageError
from embcache.extract.augment import Augmentation
from embcache.extract.batching import prepare_batches
from embcache.extract.pixels import cache_pixels, decode_into, open_pixels
from embcache.extract.scan import DatasetFiles
from embcache.extract.shard_plan import plan_store
from embcache.paths import PathLike
from embcache.store.feature_store import FeatureStore, list_stores

Pixels = NDArray[np.uint8]

_CHUNK = 256  # images decoded, or read from a store, at a time


@dataclass(frozen=True)
class Images:
    """What is known of a dataset's images before anything is drawn."""

    digests: Mapping[str, str]  # sha256 (hex) of the bytes of the images that can be used
    quarantined: Mapping[str, str]  # why an image cannot be decoded or does not have the frame's size


@dataclass(frozen=True, eq=False)
class Frames:
    """The frames of some images."""

    pixels: Pixels = field(repr=False)  # (n, H, W, 3); in memory, or mapped from a scratch file
    ids: tuple[str, ...]  # names of the rows


def choose_transforms(
    specs: Sequence[Backbone], kind: str | None, sizes: Collection[tuple[int, int]]
) -> dict[str, Transform]:
    """One transform a backbone, all of the same geometry, so that every backbone sees the same augmented pixels."""
    # Images stay as they are only where the patches of all backbones divide them.
    patch = lcm(*(spec.patch for spec in specs))
    chosen = {spec.name: choose_transform(replace(spec, patch=patch), kind, sizes) for spec in specs}
    geometries = {(t.resize, t.crop, t.size, t.interpolation) for t in chosen.values()}
    if len(geometries) > 1:
        raise UsageError(
            "backbones that are trained together must see the same pixels",
            expected="one size and one way of resizing",
            found="; ".join(f"{n}: {t.kind}, {t.interpolation}, {t.size[1]}×{t.size[0]}" for n, t in chosen.items()),
            fix="--transform paper",
        )  # fmt: skip
    return chosen


def known_images(
    ds: ImageDataset,
    transform: Transform,
    files: DatasetFiles,
    home: PathLike | None,
    pool: Executor,
) -> Images:
    """What any store that is complete and current knows of the images, else what decoding each of them once tells."""
    cached = cached_images(ds, transform, files, home)
    if cached is not None:
        return cached
    for store in list_stores(home, ds.name):
        if _complete(store, ds, files):
            return store_images(store.restrict(ds.table["id"]))
    found = [image for batch in prepare_batches(files.root, image_refs(ds.table), [], _CHUNK, pool) for image in batch]
    names = ds.table["id"].tolist()
    return _images(names, [image.digest for image in found], [image.reason for image in found])


def cached_images(ds: ImageDataset, transform: Transform, files: DatasetFiles, home: PathLike | None) -> Images | None:
    """What the pixel store knows of the images, if it is complete and current."""
    store = open_pixels(ds, transform, home)
    return store_images(store) if store is not None and _complete(store, ds, files) else None


def store_images(store: FeatureStore) -> Images:
    """What a store knows of the images that it shows."""
    return Images(dict(store.digests), dict(store.quarantined))


def cached_frames(
    ds: ImageDataset,
    transform: Transform,
    home: PathLike | None,
    workers: int | None,
    say: Callable[[str], object],
) -> FeatureStore:
    """The dataset's pixel store, completed where images are missing from it."""
    return cache_pixels(ds, transform, home=home, workers=workers).restrict(ds.table["id"])


def decode_frames(
    ds: ImageDataset,
    transform: Transform,
    root: Path,
    scratch: Path,
    pool: Executor,
    ids: Sequence[str] | None = None,
) -> tuple[Frames, Images]:
    """Decode images of a dataset, all or some, without a store.

    Shapes: returns (Frames, Images).
    """
    framing = frame(transform)
    wanted = None if ids is None else set(ids)
    sources = [source for source in image_refs(ds.table) if wanted is None or source.id in wanted]
    pixels = allocate((len(sources), *framing.size, 3), scratch)
    digests, reasons = decode_into(pixels, root, sources, framing, pool, batch_size=_CHUNK)
    names = [source.id for source in sources]
    return Frames(pixels, tuple(names)), _images(names, digests, reasons)


def stored_frames(store: FeatureStore, ids: Sequence[str], scratch: Path) -> Frames:
    """Frames of some images from a pixel store."""
    rows = store.rows_of(ids)
    absent = [name for name, row in zip(ids, rows, strict=True) if row < 0]
    if absent:
        raise StoreError(f"{len(absent)} images are not in the pixel store", found=repr(absent[0]), where=store.path)
    # In the store's own order, so that each shard is read and verified once.
    order = np.argsort(rows)
    pixels = allocate((len(ids), *store.row_shape), scratch)
    for start in range(0, len(order), _CHUNK):
        chunk = order[start : start + _CHUNK]
        pixels[chunk] = store.features[rows[chunk]]
    return Frames(pixels, tuple(ids))


def allocate(shape: tuple[int, ...], scratch: Path) -> Pixels:
    """A uint8 array in memory where it takes at most half of it, else mapped from ``scratch``."""
    if int(np.prod(shape)) <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2:
        return np.zeros(shape, dtype=np.uint8)
    return np.memmap(scratch, dtype=np.uint8, mode="w+", shape=shape)


@dataclass(frozen=True)
class Draw:
    """One image of a batch: its row among the frames, and the key of its augmentation (None: the plain view)."""

    row: int
    key: str | None


def batches(
    frames: Frames,
    plan: Sequence[Sequence[Draw]],
    augment: Augmentation,
    pool: ThreadPoolExecutor | None,
) -> Iterator[torch.Tensor]:
    """Yield each planned batch as a uint8 Tensor (B, H, W, 3), making the next two while one is used.

    Augmentation depends on the keys alone, so any number of threads, or none (``pool=None``), gives the same bytes.
    """

    def make(draw: Draw) -> Pixels:
        pixels = frames.pixels[draw.row]
        return center(pixels, augment.size) if draw.key is None else augment(pixels, draw.key)

    if pool is None:
        for batch in plan:
            yield torch.from_numpy(np.stack([make(draw) for draw in batch]))
        return
    pending: list[list[Future[Pixels]]] = [[pool.submit(make, draw) for draw in batch] for batch in plan[:2]]
    try:
        for number in range(len(plan)):
            made = [future.result() for future in pending.pop(0)]
            if number + 2 < len(plan):
                pending.append([pool.submit(make, draw) for draw in plan[number + 2]])
            yield torch.from_numpy(np.stack(made))
    finally:
        for futures in pending:
            for future in futures:
                future.cancel()


def _complete(store: FeatureStore, ds: ImageDataset, files: DatasetFiles) -> bool:
    return not plan_store(store, ds, files.root, files.scan, publish=False).shards


def _images(ids: Sequence[str], digests: Sequence[str], reasons: Sequence[str]) -> Images:
    return Images(
        {name: digest for name, digest, reason in zip(ids, digests, reasons, strict=True) if digest and not reason},
        {name: reason for name, reason in zip(ids, reasons, strict=True) if reason},
    )
