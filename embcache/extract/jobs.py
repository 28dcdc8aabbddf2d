"""An extraction as a job: what any process needs to compute shards of features, as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from embcache.backbones.catalog import Backbone
from embcache.config import ExtractConfig
from embcache.data.budget import Decoding, check_max_pixels
from embcache.data.dataset import read_snapshot
from embcache.errors import RecipeError
from embcache.extract import worker
from embcache.extract.canaries import check_canaries
from embcache.extract.engines.engine import OnRows, OwedShard, ShardJob
from embcache.extract.engines.local import Worker
from embcache.extract.pixels import CurrentPixels
from embcache.extract.quarantine import Quarantine
from embcache.extract.recipes import Traits, kept_conversion, make_recipe, open_networks
from embcache.extract.worker import FrozenNetwork
from embcache.partitions import read_partition
from embcache.paths import home_dir, slug
from embcache.store.commit import ShardRows
from embcache.store.feature_store import FeatureStore


@dataclass(frozen=True)
class Here:
    """What is open in the process that began the run."""

    networks: Sequence[FrozenNetwork]
    pixels: Mapping[str, CurrentPixels]  # by frame key
    decoding: Decoding
    quarantine: Quarantine


@dataclass(frozen=True)
class FeatureJob(ShardJob):
    """The features of images under some backbones. Without ``here`` it is plain data, for other processes."""

    dataset: str  # name
    images: int  # of the dataset
    partitions: tuple[str, ...]  # their digests, where it has some
    backbones: tuple[str | Backbone, ...]
    traits: Traits
    config: Mapping[str, Any]  # of the extraction, as JSON
    home: str
    root: str  # folder of the images
    stores: tuple[tuple[str, str], ...]  # name and runtime, one per backbone
    pixels: tuple[tuple[str, str, tuple[str, ...]], ...]  # frame key, name of the store, IDs that are not current
    threads: int  # of torch
    workers: int  # threads that decode
    here: Here | None = field(default=None, compare=False)

    @contextmanager
    def open(self) -> Iterator[Worker]:
        """Networks that make what the stores hold, with everything else that a shard needs."""
        here = self.here or self._open()
        cached = {key: pixels.read for key, pixels in here.pixels.items()}
        with ThreadPoolExecutor(self.workers) as pool:
            compute = partial(_features, Path(self.root), here.networks, pool, cached, here.decoding)
            stores = [FeatureStore(self._folder / name) for name, _ in self.stores]
            runtimes = [runtime for _, runtime in self.stores]
            yield Worker(stores, compute, here.quarantine.check, runtimes, self.threads, here.decoding)

    @property
    def _folder(self) -> Path:
        """Folder of the stores; of a home in an object store another one on each machine."""
        return home_dir(self.home) / slug(self.dataset)

    def _open(self) -> Here:
        """The same in another process: a network that is not that of its store is refused."""
        config = ExtractConfig.from_json(self.config)
        networks = open_networks(self.backbones, replace(self.traits, folder=self._folder), config, self.home)
        for index, (name, runtime) in enumerate(self.stores):
            network, store = networks[index], FeatureStore(self._folder / name)
            if differences := make_recipe(network).differences(store.recipe):
                raise RecipeError(
                    f"the network {store.recipe.backbone} of this worker is not that of the store",
                    code="worker-recipe", where=store.path,
                    expected=", ".join(f"{name} {theirs}" for name, (_, theirs) in differences.items()),
                    found=", ".join(f"{name} {mine}" for name, (mine, _) in differences.items()),
                    fix="install the same versions and the same checkpoints on all nodes, or share EMBCACHE_WEIGHTS",
                )  # fmt: skip
            check_canaries(store.path, network)
            networks[index] = network.executed_by(runtime, kept_conversion(network, self.home))
        quarantine = Quarantine(self.images, self.ids, Path(self.root), config, self.partitions)
        pixels = {key: CurrentPixels.open(self._folder / name, stale) for key, name, stale in self.pixels}
        return Here(networks, pixels, Decoding(check_max_pixels(config.max_pixels)), quarantine)

    def ids(self, partition: str) -> list[str]:
        """The IDs of a partition, by its digest, or of the whole dataset."""
        if partition:
            return list(read_partition(self._folder, partition, ["id"])["id"].to_pylist())
        snapshot = read_snapshot(self.dataset, self.home)
        return [] if snapshot is None else snapshot.table["id"].tolist()


def _features(
    root: Path,
    networks: Sequence[FrozenNetwork],
    pool: Executor,
    cached: Mapping[str, Any],
    decoding: Decoding,
    shard: OwedShard,
    *,
    batch_size: int,
    on_rows: OnRows,
) -> list[ShardRows]:
    chosen = [networks[index] for index in shard.stores]
    return worker.compute_shard(
        root, shard.sources, chosen, batch_size=batch_size, pool=pool, cached=cached, on_rows=on_rows, decoding=decoding
    )
