"""Decoded and resized images, kept: a feature store whose rows are pixels.

What is kept of an image is its frame: all of the transform but the crop, always uint8, so that cached equals direct.
Finetuning crops it anew each epoch; an extraction takes its centre, or augmented views of it. The store is like any
other (plans, leases, shards, quarantine, resume), and like any other it follows the bytes of the image files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray

import embcache
from embcache.backbones.transforms import Transform, frame
from embcache.data.budget import Decoding
from embcache.data.dataset import ImageDataset
from embcache.data.images import DECODER_VERSION, Source
from embcache.extract.batching import prepare_batches
from embcache.extract.engines.local import Terms, compute_owed
from embcache.extract.extract_request import check_numbers, default_workers
from embcache.extract.scan import DatasetFiles, scan_dataset
from embcache.extract.shard_plan import Plan, plan_store
from embcache.paths import PathLike, home_dir, slug
from embcache.store.commit import ShardRows, create_store, write_snapshot
from embcache.store.feature_store import PIXELS, FeatureStore
from embcache.store.recipe import Recipe

__all__ = [
    "CurrentPixels",
    "cache_pixels",
    "current_pixels",
    "decode_into",
    "frame",
    "open_pixels",
    "pixel_recipe",
    "pixel_rows",
]

# 25 MB, which are 128 rows at 256×256: at most a few seconds of decoding to lose, and one shard fits any memory.
SHARD_BYTES = 128 * 256 * 256 * 3
MAX_ROWS = 512
_BATCH = 16  # images decoded ahead, as for a network on a CPU
# Raised whenever the same decoded image gives other pixels: it is part of every recipe of pixels.
_NUMERICS = 1


@dataclass(frozen=True)
class _Job:
    store: FeatureStore
    plan: Plan
    batch_size: int = _BATCH


def cache_pixels(
    ds: ImageDataset,
    transform: Transform,
    *,
    ids: Sequence[str] | None = None,
    home: PathLike | None = None,
    workers: int | None = None,
    format: str | None = None,
    only: Collection[int] | None = None,
    decoding: Decoding | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> FeatureStore:
    """Decode and resize every image once, and keep the pixels; what is there already is not decoded again.

    Parameters
    ----------
    ds : ImageDataset
        Its images must be here.
    transform : Transform
        Whose frame is kept; normalisation and crop do not matter.
    ids : sequence of str, optional
        Only these images; default: all of the dataset.
    home : path-like, optional
        Folder of stores.
    workers : int, optional
        Threads that decode images; default: one a core, 8 at most.
    format : {"zarr", "hdf5"}, optional
        Default: the one the store has, Zarr for a new one.
    only : collection of int, optional
        Decode these shards and no other that is owed.
    decoding : Decoding, optional
        Limits on the images that are decoded.
    say : callable
        Told what is decoded, and how much room it takes.

    Returns
    -------
    FeatureStore
        Rows uint8 (H, W, 3) of the frame, of the asked images in the dataset's order; unreadable images are left out
        and listed in ``quarantined``.

    Raises
    ------
    EmbcacheError
        The images are not here, or the store cannot be read or written.
    """
    check_numbers(workers=workers)
    framing = frame(transform)
    wanted = ds if ids is None else replace(ds, table=ds.table[ds.table["id"].isin(set(ids))])
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        files = scan_dataset(ds, home, pool, decoding)
        store = _store(files.folder, framing, format)
        write_snapshot(files.folder, (ds.whole or ds).to_parquet_bytes())
        job = _Job(store, plan_store(store, wanted, files.root, files.scan))
        files.keep()
        owed = sum(len(shard.ids) for shard in job.plan.shards if only is None or shard.number in only)
        if owed:
            size = f"{framing.size[1]}×{framing.size[0]}"
            room = owed * prod(store.row_shape) / 1e9
            say(f"{owed:,} images are decoded once and kept as {size} pixels: {room:.2f} GB in {store.path}")

        def compute(
            jobs: Sequence[_Job], sources: Sequence[Source], batch_size: int, on_rows: Callable[[int], object]
        ) -> list[ShardRows]:
            rows = [pixel_rows(files.root, sources, framing, pool, batch_size, on_rows, decoding) for _ in jobs]
            files.scan.learn(sources, rows[0].digests)
            return rows

        wanted_shards = None if only is None else {store.recipe.fingerprint: only}
        with files.learning():
            compute_owed([job], ds, compute, only=wanted_shards, label="decode", terms=Terms(say=say))
    return FeatureStore(store.path).restrict(wanted.table["id"])


def open_pixels(ds: ImageDataset, transform: Transform, home: PathLike | None = None) -> FeatureStore | None:
    """The cached frames of a dataset under a transform, or None: what is there, complete and current or not."""
    path = _path(home_dir(home) / slug(ds.name), frame(transform))
    return FeatureStore(path).restrict(ds.table["id"]) if path.is_dir() else None


def decode_into(
    pixels: NDArray[np.uint8],
    root: Path,
    sources: Sequence[Source],
    framing: Transform,
    pool: Executor,
    *,
    batch_size: int = _BATCH,
    on_rows: Callable[[int], object] = lambda rows: None,
    decoding: Decoding | None = None,
) -> tuple[list[str], list[str]]:
    """Decode images, without keeping them, into zeros: a row each, left as it is where the image cannot be read.

    Shapes: pixels (n, H, W, 3).
    """
    digests: list[str] = []
    reasons: list[str] = []
    for batch in prepare_batches(root, sources, [framing.geometry], batch_size, pool, decoding):
        for row, prepared in enumerate(batch, start=len(digests)):
            if prepared.pixels:
                pixels[row] = prepared.pixels[0]
        digests += [prepared.digest for prepared in batch]
        reasons += [prepared.reason for prepared in batch]
        on_rows(len(batch))
    return digests, reasons


@dataclass(frozen=True)
class CurrentPixels:
    """Those rows of a store of pixels that were made from the files as they are now."""

    store: FeatureStore  # of pixels
    rows: Mapping[str, int]  # row of each readable image whose file has not changed
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def read(self, ids: Sequence[str]) -> dict[str, tuple[NDArray[np.uint8], str]]:
        """Frame, uint8 (H, W, 3), and digest of each image that is there; one batch at a time, holding one shard."""
        there = [id_ for id_ in ids if id_ in self.rows]
        if not there:
            return {}
        with self._lock:
            pixels = self.store.features[[self.rows[id_] for id_ in there]]
        digests = self.store.digests
        return {id_: (row, digests[id_]) for id_, row in zip(there, pixels, strict=True)}


def current_pixels(ds: ImageDataset, transform: Transform, files: DatasetFiles) -> CurrentPixels | None:
    """What the pixels cached of a dataset save an extraction from decoding; None where there are none."""
    path = _path(files.folder, frame(transform))
    if not path.is_dir():
        return None
    store = FeatureStore(path)
    stale = {id_ for shard in plan_store(store, ds, files.root, files.scan, publish=False).shards for id_ in shard.ids}
    usable = (set(ds.table["id"]) - stale) & set(store.digests)
    rows = {id_: row for row, id_ in enumerate(store.ids.tolist()) if id_ in usable}
    return CurrentPixels(store, rows) if rows else None


def pixel_recipe(framing: Transform) -> Recipe:
    """All that determines the pixels of a frame."""
    return Recipe(
        backbone=PIXELS,
        architecture="none",
        weights_sha256="",
        transform=framing.geometry_dict(),
        decoder=DECODER_VERSION,
        pooling="none",
        precision="fp32",
        dtype="uint8",
        numerics=_NUMERICS,
    )


def _path(folder: Path, framing: Transform) -> Path:
    return folder / f"{PIXELS}-{pixel_recipe(framing).fingerprint[:12]}"


def _store(folder: Path, framing: Transform, format: str | None) -> FeatureStore:
    row_shape = (*framing.size, 3)
    path = create_store(
        folder,
        pixel_recipe(framing),
        format=format,
        row_shape=row_shape,
        rows_per_shard=max(1, min(MAX_ROWS, SHARD_BYTES // prod(row_shape))),
        batch_size=_BATCH,
        threads=1,
        provenance={"pillow": PIL.__version__, "embcache": embcache.__version__},
    )
    return FeatureStore(path)


def pixel_rows(
    root: Path,
    sources: Sequence[Source],
    framing: Transform,
    pool: Executor,
    batch_size: int,
    on_rows: Callable[[int], object],
    decoding: Decoding | None = None,
) -> ShardRows:
    """Frames of images as the rows of a shard, uint8 (N, *size, 3)."""
    pixels = np.zeros((len(sources), *framing.size, 3), np.uint8)
    digests, reasons = decode_into(
        pixels, root, sources, framing, pool, batch_size=batch_size, on_rows=on_rows, decoding=decoding
    )
    valid = np.array([not reason for reason in reasons], dtype=bool)
    return ShardRows(tuple(source.id for source in sources), pixels, valid, tuple(digests), tuple(reasons))
