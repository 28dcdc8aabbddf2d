"""Pixels for finetuning: which images can be read, their frames in memory or in a scratch file, and batches of them.

A *frame* is an image after resizing and before the crop: what a pixel store holds, and what augmentation starts from.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from embcache.backbones.transforms import Augmentation, Transform, center, frame
from embcache.data.dataset import ImageDataset
from embcache.data.images import image_refs
from embcache.errors import StoreError
from embcache.extract.pixels import decode_into, open_pixels
from embcache.extract.scan import DatasetFiles, plan_store
from embcache.extract.worker import prepare_batches
from embcache.paths import PathLike
from embcache.probe.inputs import KnownImages
from embcache.store.feature_store import FeatureStore, list_stores

Pixels = NDArray[np.uint8]

Draw = tuple[int, str | None]
"""One image of a batch: its row among the frames, and the key of its augmentation (None: the plain view)."""

_CHUNK = 256  # images decoded, or read from a store, at a time


@dataclass(frozen=True)
class Images:
    """What decoding tells of a dataset's images; see `KnownImages`."""

    digests: Mapping[str, str]
    quarantined: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Frames:
    """The frames of some images."""

    pixels: Pixels = field(repr=False)  # (n, H, W, 3); in memory, or mapped from a scratch file
    ids: tuple[str, ...]


def known_images(
    dataset: ImageDataset, transform: Transform, files: DatasetFiles, home: PathLike | None, pool: Executor
) -> KnownImages:
    """What any complete and current store knows of the images, else what decoding each of them once tells."""
    cached = cached_images(dataset, transform, files, home)
    if cached is not None:
        return cached
    for store in list_stores(home, dataset.name):
        if _complete(store, dataset, files):
            return store.restrict(dataset.table["id"])
    prepared = prepare_batches(files.root, image_refs(dataset.table), [], _CHUNK, pool, files.scan.decoding)
    found = [image for batch in prepared for image in batch]
    return _images(dataset.table["id"].tolist(), [image.digest for image in found], [image.reason for image in found])


def cached_images(
    dataset: ImageDataset, transform: Transform, files: DatasetFiles, home: PathLike | None
) -> FeatureStore | None:
    """The pixel store of the images, if it is complete and current."""
    store = open_pixels(dataset, transform, home)
    return store if store is not None and _complete(store, dataset, files) else None


def decode_frames(
    dataset: ImageDataset,
    transform: Transform,
    files: DatasetFiles,
    scratch: Path,
    pool: Executor,
    ids: Sequence[str] | None = None,
) -> tuple[Frames, Images]:
    """Decode all or some images of a dataset, without a store."""
    framing = frame(transform)
    wanted = None if ids is None else set(ids)
    sources = [source for source in image_refs(dataset.table) if wanted is None or source.id in wanted]
    names = [source.id for source in sources]
    pixels = allocate((len(sources), *framing.size, 3), scratch)
    digests, reasons = decode_into(
        pixels, files.root, sources, framing, pool, batch_size=_CHUNK, decoding=files.scan.decoding
    )
    return Frames(pixels, tuple(names)), _images(names, digests, reasons)


def stored_frames(store: FeatureStore, ids: Sequence[str], scratch: Path) -> Frames:
    """Frames of some images from a pixel store."""
    rows = store.rows_of(ids)
    absent = [name for name, row in zip(ids, rows, strict=True) if row < 0]
    if absent:
        raise StoreError(
            f"{len(absent)} images are not in the pixel store", code="rows-missing", found=repr(absent[0]),
            where=store.path,
        )  # fmt: skip
    # In the order of the store, so that each shard is read and verified once.
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


def batches(
    frames: Frames, plan: Sequence[Sequence[Draw]], augment: Augmentation, pool: ThreadPoolExecutor | None
) -> Iterator[torch.Tensor]:
    """Yield each planned batch as uint8 (B, H, W, 3), making the next two while one is used.

    Augmentation depends on the keys alone, so any number of threads, or none (``pool=None``), gives the same bytes.
    """

    def make(draw: Draw) -> Pixels:
        row, key = draw
        return center(frames.pixels[row], augment.size) if key is None else augment(frames.pixels[row], key)

    if pool is None:
        for batch in plan:
            yield torch.from_numpy(np.stack([make(draw) for draw in batch]))
        return
    waiting = iter(plan)
    pending = deque([pool.submit(make, draw) for draw in batch] for batch in islice(waiting, 2))
    try:
        while pending:
            made = [future.result() for future in pending.popleft()]
            pending.extend([pool.submit(make, draw) for draw in batch] for batch in islice(waiting, 1))
            yield torch.from_numpy(np.stack(made))
    finally:
        for future in (future for futures in pending for future in futures):
            future.cancel()


def _complete(store: FeatureStore, dataset: ImageDataset, files: DatasetFiles) -> bool:
    return not plan_store(store, dataset, files.root, files.scan, publish=False).shards


def _images(ids: Sequence[str], digests: Sequence[str], reasons: Sequence[str]) -> Images:
    return Images(
        {name: digest for name, digest, reason in zip(ids, digests, reasons, strict=True) if digest and not reason},
        {name: reason for name, reason in zip(ids, reasons, strict=True) if reason},
    )
