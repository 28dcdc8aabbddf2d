"""``--batch-size auto`` and ``--workers auto``: a short trial when a store is made, then its settings stay."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from embcache.cores import usable_cores
from embcache.data.dataset import ImageDataset
from embcache.data.images import Source, image_sources
from embcache.extract.batching import prepare
from embcache.extract.scan import DatasetFiles
from embcache.extract.worker import FrozenNetwork
from embcache.memory import is_shortage
from embcache.paths import slug
from embcache.store.feature_store import FeatureStore
from embcache.store.recipe import Recipe

SIZES = {"cpu": (8, 16, 32), "cuda": (32, 64, 128, 256)}
_IMAGES = 32  # decoded with each number of threads
_GAIN = 1.03  # a larger setting must be so much faster: below it lies noise


def tune_batch_size(network: FrozenNetwork, sizes: Sequence[int] | None = None) -> int:
    """The batch size at which a network is fastest on its device; of equally fast ones the smallest.

    Sizes for which there is no memory are passed over.

    Parameters
    ----------
    network : FrozenNetwork
        Ready to extract.
    sizes : sequence of int, optional
        To be tried, ascending; default: some that suit the device.
    """
    tried = tuple(sizes or SIZES.get(network.device.type, SIZES["cuda"]))
    rng = np.random.default_rng(0)
    rates: list[tuple[int, float]] = []
    for size in tried:
        pixels = rng.integers(0, 256, (size, *network.transform.size, 3), dtype=np.uint8)
        try:
            network.features(pixels)  # the first pass allocates
            rates.append((size, size / _seconds(lambda batch=pixels: network.features(batch))))  # type: ignore[misc]
        except (RuntimeError, MemoryError) as error:
            if not is_shortage(error) or not rates:
                raise
            break
    return smallest_of_the_fastest(rates)


def tune_workers(root: Path, sources: Sequence[Source], network: FrozenNetwork) -> int:
    """The number of threads that decode a dataset's first images fastest; of equally fast ones the smallest."""
    sample = list(sources[:_IMAGES])
    geometry = [network.looks.frame.geometry]
    rates: list[tuple[int, float]] = []
    for workers in sorted({1, 2, 4, 8, usable_cores()}):
        if workers > 2 * usable_cores() and rates:
            break
        with ThreadPoolExecutor(workers) as pool:

            def decode(pool: ThreadPoolExecutor = pool) -> None:
                list(pool.map(lambda source: prepare(root, source, geometry), sample))

            decode()  # the disk's cache is filled for all of them alike
            rates.append((workers, 1 / _seconds(decode)))
    return smallest_of_the_fastest(rates)


def settle(
    batch_size: int | str | None,
    workers: int | str | None,
    threads: int,
    network: FrozenNetwork,
    recipe: Recipe,
    files: DatasetFiles,
    dataset: ImageDataset,
    say: Callable[[str], object],
) -> tuple[int | None, int]:
    """Batch size (None: the store's, or the default) and threads that decode; tried out only for a store to be made.

    Parameters
    ----------
    batch_size, workers : int, "auto" or None
        As asked for.
    threads : int
        Where ``workers`` is not ``"auto"``.
    network, recipe
        What computes the store, and its recipe.
    files, dataset
        Whose first images are decoded.
    say : callable
        Told what was chosen.
    """
    path = files.folder / f"{slug(recipe.backbone)}-{recipe.fingerprint[:12]}"
    known = FeatureStore(path) if "auto" in (batch_size, workers) and path.is_dir() else None
    chosen = []
    size = batch_size if isinstance(batch_size, int) else None
    if batch_size == "auto" and known is None:
        size = tune_batch_size(network)
        chosen.append(f"batches of {size}")
    if workers == "auto":
        kept = known.provenance.get("workers") if known is not None else None
        if isinstance(kept, int) and 1 <= kept <= 64:
            return size, kept
        threads = tune_workers(files.root, image_sources(dataset.table.head(_IMAGES)), network)
        chosen.append(f"{threads} decoding threads")
    if chosen:
        say(f"{recipe.backbone}: {' and '.join(chosen)} were fastest here; they stay with the store")
    return size, threads


def smallest_of_the_fastest(rates: Sequence[tuple[int, float]]) -> int:
    """Of settings with their rates the smallest that no larger one beats by more than noise."""
    best = max(rate for _, rate in rates)
    return min(setting for setting, rate in rates if rate * _GAIN >= best)


def _seconds(work: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return max(min(times), 1e-9)
