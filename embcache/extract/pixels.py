"""Decoded and resized images, cached: a feature store with rows of pixels.

The frame of an image is kept: all of the transform but the crop, always uint8, so that cached equals direct. Finetuning
crops it anew in each epoch; an extraction takes its center, or augmented views of it. The store has plans, leases,
shards, quarantine and resume like any other, and follows the bytes of the image files like any other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray

import embcache
from embcache.backbones.catalog import Backbone
from embcache.backbones.transforms import Transform, choose_transform, frame
from embcache.config import ExtractConfig
from embcache.cores import default_workers
from embcache.data.budget import Decoding, check_max_pixels
from embcache.data.dataset import ImageDataset
from embcache.data.images import DECODER_VERSION, ImageRef
from embcache.errors import check_number
from embcache.extract.engines.engine import Engine, OnRows, OwedShard, OwedShards, OwedStore, ShardJob, in_part
from embcache.extract.engines.local import LocalEngine, Worker
from embcache.extract.scan import DatasetFiles, plan_store, scan_dataset
from embcache.extract.worker import FrozenNetwork, prepare_batches
from embcache.log import log
from embcache.paths import PathLike, home_dir, portable_home, slug
from embcache.store.commit import ShardRows, create_store, refresh_view, write_snapshot
from embcache.store.feature_store import PIXELS, FeatureStore
from embcache.store.schema import Recipe

# 25 MB, which are 128 rows at 256×256: at most a few seconds of decoding to lose, and one shard fits any memory.
SHARD_BYTES = 128 * 256 * 256 * 3
MAX_ROWS = 512
_BATCH = 16  # images decoded ahead, like for a network on a CPU
# Raised whenever the same decoded image gives other pixels: it is part of every recipe of pixels.
_NUMERICS = 1


def dataset_transform(
    backbone: Backbone, kind: str | None, dataset: ImageDataset, home: PathLike | None = None
) -> Transform:
    """The transform that an extraction of ``backbone`` over ``dataset`` would use."""
    with ThreadPoolExecutor(default_workers()) as pool:
        files = scan_dataset(dataset, home, pool)
    chosen = choose_transform(backbone, kind, files.sizes)
    files.keep()
    return chosen


def cache_pixels(
    dataset: ImageDataset,
    transform: Transform,
    *,
    ids: Sequence[str] | None = None,
    home: PathLike | None = None,
    workers: int | None = None,
    format: str | None = None,
    decoding: Decoding | None = None,
    engine: Engine | None = None,
) -> FeatureStore:
    """Decode and resize every image once, and keep the pixels; cached images are not decoded again.

    Parameters
    ----------
    dataset : ImageDataset
        Its images must be here.
    transform : Transform
        The frame of this one is kept; normalization and crop do not matter.
    ids : sequence of str, optional
        Only these images; default: all of the dataset.
    home, workers, format, decoding, engine : optional
        As in extraction: folder of stores, threads that decode, ``zarr`` or ``hdf5``, limits on the images,
        who decodes.

    Returns
    -------
    FeatureStore
        Rows uint8 (H, W, 3) of the frame, in the dataset's order; unreadable images are left out and listed in
        ``quarantined``. An `EmbcacheError` is raised if the images are not here, or the store cannot be written.
    """
    if workers is not None:
        check_number("--workers", workers, 1, 1 << 10)
    framing = frame(transform)
    # A partition is planned as a whole.
    some = dataset.table["id"].isin(set(ids)) if ids is not None and dataset.part is None else None
    wanted = dataset if some is None else replace(dataset, table=dataset.table[some])
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        files = scan_dataset(dataset, home, pool, decoding)
        row_shape = (*framing.size, 3)
        path = create_store(
            files.folder, pixel_recipe(framing), format=format, row_shape=row_shape,
            rows_per_shard=max(1, min(MAX_ROWS, SHARD_BYTES // prod(row_shape))), batch_size=_BATCH, threads=1,
            provenance={"pillow": PIL.__version__, "embcache": embcache.__version__},
        )  # fmt: skip
        store = FeatureStore(path)
        if dataset.part is None:
            write_snapshot(files.folder, (dataset.whole or dataset).to_parquet_bytes())
        plan = plan_store(store, wanted, files.scan)
        if ids is not None and dataset.part is not None:
            needed = set(ids)
            plan = replace(plan, shards=tuple(each for each in plan.shards if not needed.isdisjoint(each.ids)))
        files.keep()
        if owed := sum(len(shard.ids) for shard in plan.shards):
            size = f"{framing.size[1]}×{framing.size[0]}"
            room = owed * prod(row_shape) / 1e9
            log.info(f"{owed:,} images are decoded once and kept as {size} pixels: {room:.2f} GB in {store.path}")
        limits = decoding or Decoding()
        engine = engine or LocalEngine(f"decode {dataset.name}")
        threads = workers or (default_workers() if isinstance(engine, LocalEngine) else 1)
        job = PixelJob(
            str(files.root), framing, portable_home(home), dataset.name, threads, limits.max_pixels, limits,
        )  # fmt: skip
        shards = OwedShards([OwedStore(store, plan, _BATCH)], dataset, learn=files.scan.learn, last=False)
        with files.learning():
            for _ in engine.run([shards], job) if shards.waiting else ():
                pass
        refresh_view(path)
    return FeatureStore(path).restrict(wanted.table["id"])


def open_pixels(dataset: ImageDataset, transform: Transform, home: PathLike | None = None) -> FeatureStore | None:
    """The cached frames of a dataset under a transform, complete and current or not; None if there are none."""
    path = _path(home_dir(home) / slug(dataset.name), frame(transform))
    return FeatureStore(path).restrict(dataset.table["id"]) if path.is_dir() else None


def decode_into(
    pixels: NDArray[np.uint8],
    root: Path,
    sources: Sequence[ImageRef],
    framing: Transform,
    pool: Executor,
    *,
    batch_size: int = _BATCH,
    on_rows: Callable[[int], object] = lambda rows: None,
    decoding: Decoding | None = None,
) -> tuple[list[str], list[str]]:
    """Decode images into the rows of ``pixels``, zeros (n, H, W, 3), which stay if an image cannot be read."""
    digests: list[str] = []
    reasons: list[str] = []
    for batch in prepare_batches(root, sources, [framing], batch_size, pool, decoding):
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
    stale: tuple[str, ...]  # IDs of those whose files have
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path, stale: tuple[str, ...]) -> CurrentPixels:
        """Those of a store, except for images that are known to be stale."""
        store = FeatureStore(path)
        usable = set(store.digests).difference(stale)
        return cls(store, {id_: row for row, id_ in enumerate(store.ids.tolist()) if id_ in usable}, stale)

    def read(self, ids: Sequence[str]) -> dict[str, tuple[NDArray[np.uint8], str]]:
        """Frame, uint8 (H, W, 3), and digest of each image that is there; one batch at a time, holding one shard."""
        there = [id_ for id_ in ids if id_ in self.rows]
        if not there:
            return {}
        with self._lock:
            pixels = self.store.features[[self.rows[id_] for id_ in there]]
        digests = self.store.digests
        return {id_: (row, digests[id_]) for id_, row in zip(there, pixels, strict=True)}


def current_pixels(dataset: ImageDataset, transform: Transform, files: DatasetFiles) -> CurrentPixels | None:
    """The cached pixels that an extraction need not decode; None if there are none."""
    path = _path(files.folder, frame(transform))
    if not path.is_dir():
        return None
    store = FeatureStore(path)
    plan = plan_store(store, dataset, files.scan, publish=False)
    stale = {id_ for shard in plan.shards for id_ in shard.ids}
    usable = set(dataset.table["id"]) & set(store.digests)
    pixels = CurrentPixels.open(path, tuple(usable & stale))
    return pixels if usable - stale else None


def stage_pixels(
    networks: Sequence[FrozenNetwork], owed: Sequence[OwedStore], dataset: ImageDataset, files: DatasetFiles,
    config: ExtractConfig, *, home: PathLike | None, engine: Engine,
) -> None:  # fmt: skip
    """Decode every owed image, and keep its frame for each network; less if the engine is stopped."""
    transforms = {network.image_views.frame_key: network.transform for network in networks}
    for key, transform in transforms.items():
        wanted = {
            image
            for network, each in zip(networks, owed, strict=True) if network.image_views.frame_key == key
            for shard in each.plan.shards if in_part(shard.number, config.part)
            for image in shard.ids
        }  # fmt: skip
        decoding = Decoding(check_max_pixels(config.max_pixels))
        cache_pixels(
            dataset, transform, ids=list(wanted), home=home, workers=config.workers, decoding=decoding, engine=engine
        )
    files.recall()  # digests that decoding learned


def cached_pixels(
    networks: Sequence[FrozenNetwork], owed: Sequence[OwedStore], dataset: ImageDataset, files: DatasetFiles
) -> dict[str, CurrentPixels]:
    """By frame key, the pixels that finetuning has cached and that need no decoding."""
    images: dict[str, set[str]] = {}
    for network, each in zip(networks, owed, strict=True):
        known = images.setdefault(network.image_views.frame_key, set())
        known.update(image for shard in each.plan.shards for image in shard.ids)
    transforms = {network.image_views.frame_key: network.transform for network in networks}
    found = {}
    for key, wanted in images.items():
        pixels = current_pixels(dataset, transforms[key], files) if wanted else None
        if pixels is not None and (number := len(wanted & set(pixels.rows))):
            found[key] = pixels
            log.info(f"pixels of {number:,} images are cached ({pixels.store.path.name}): they are not decoded again")
    return found


def pixel_recipe(framing: Transform) -> Recipe:
    """Everything that determines the pixels of a frame."""
    return Recipe(
        backbone=PIXELS, architecture="none", weights_sha256="", transform=framing.geometry_dict(),
        decoder=DECODER_VERSION, pooling="none", precision="fp32", dtype="uint8", numerics=_NUMERICS,
    )  # fmt: skip


def _path(folder: Path, framing: Transform) -> Path:
    return folder / f"{PIXELS}-{pixel_recipe(framing).fingerprint[:12]}"


@dataclass(frozen=True)
class PixelJob(ShardJob):
    """The frames of images."""

    root: str  # folder of the images
    framing: Transform
    home: str  # of one in an object store each machine has a folder of its own
    dataset: str  # name
    workers: int  # threads that decode
    max_pixels: int
    here: Decoding | None = None  # that of the process that began the run

    @contextmanager
    def open(self) -> Iterator[Worker]:
        """Threads that decode."""
        decoding = self.here or Decoding(self.max_pixels)
        with ThreadPoolExecutor(self.workers) as pool:
            decode = partial(_pixel_rows, Path(self.root), self.framing, pool, decoding)
            store = FeatureStore(_path(home_dir(self.home) / slug(self.dataset), self.framing))
            yield Worker([store], decode, decoding=decoding)


def _pixel_rows(
    root: Path,
    framing: Transform,
    pool: Executor,
    decoding: Decoding,
    shard: OwedShard,
    *,
    batch_size: int,
    on_rows: OnRows,
) -> list[ShardRows]:
    return [pixel_rows(root, shard.sources, framing, pool, batch_size, on_rows, decoding)]


def pixel_rows(
    root: Path,
    sources: Sequence[ImageRef],
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
