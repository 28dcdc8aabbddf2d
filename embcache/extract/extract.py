"""Extraction, top to bottom: scan → networks → stores and what they owe → shard by shard: compute, check, commit.

Which recipe a backbone leads to is known once its network is built and its weights are hashed. It is kept beside the
stores, in ``networks.json``, with all that decides it: names, options, versions, and the state of the network's files.
While that is the same, a run over complete stores builds no network and imports no torch. Images are compared always;
what is taken from the file is which store to look at, and notes for people.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, groupby
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import embcache
from embcache.backbones.catalog import BACKBONES, LIBRARIES, Backbone, backbones, row_of
from embcache.backbones.weights import find_cached, find_model, find_weights, weights_by_name
from embcache.config import EngineConfig, ExtractConfig
from embcache.cores import cpu_flags, default_workers
from embcache.data.budget import Decoding, check_max_pixels
from embcache.data.dataset import ImageDataset, named_dataset
from embcache.data.files import file_state
from embcache.data.images import DECODER_VERSION, image_refs
from embcache.data.partitioned import PartitionedDataset
from embcache.errors import DatasetError, EmbcacheError
from embcache.extract.engines.devices import Crew, DevicesEngine, configs_of_others, ray_connection, split_devices
from embcache.extract.engines.engine import Engine, OwedShards, OwedStore, in_part
from embcache.extract.engines.local import LocalEngine, Stop
from embcache.extract.quarantine import Quarantine, unusable
from embcache.extract.scan import TICK_NS, DatasetFiles, decisive_sizes, plan_store, scan_dataset
from embcache.fields import bare_name
from embcache.io import keep_file, list_folder, mirror_of
from embcache.log import log, shown
from embcache.paths import PathLike, portable_home, slug, weights_dir
from embcache.sealed import canonical_json, plain, read_sealed, seal, typed
from embcache.store.commit import create_store, refresh_view, store_path, write_snapshot
from embcache.store.feature_store import FeatureStore
from embcache.store.reading import read_header
from embcache.store.schema import NUMERICS, Recipe

# What imports torch is imported where it is used: a run over complete stores needs none of it.
if TYPE_CHECKING:
    import pandas as pd

    from embcache.extract.jobs import FeatureJob
    from embcache.extract.worker import FrozenNetwork

# Small batches keep a network's activations near the processor's caches; a GPU needs large ones (docs/log.md).
BATCH_SIZES = {"cpu": 16, "cuda": 64}
# Seconds of work to finish before an interrupted run ends, or to lose. They are larger if that would make more shards
# than it should take to open a store (docs/benchmarks.md).
ROWS_PER_SHARD = {"cpu": 64, "cuda": 4096, "place": 4096}  # in an object store requests are what costs
_MOST_SHARDS = 2048
_MOST_KNOWN, _MOST_BYTES = 256, 1 << 24  # of what is kept in networks.json


@dataclass(frozen=True)
class Extraction:
    """What the extraction of one backbone found and did; numbers are of images."""

    backbone: str
    store: FeatureStore
    computed: int  # went through the network in this run
    cached: int  # were in the store before
    added: int
    changed: int
    retried: int
    left: int  # still owed: the run was stopped, or they are another part's
    undone: int  # of those, this run was to compute
    quarantined: Mapping[str, str]  # id → reason, of the whole dataset
    seconds: float

    def joined(self, other: Extraction) -> Extraction:
        """The extraction of this partition and another one."""
        counts = ("computed", "cached", "added", "changed", "retried", "left", "undone")
        added = {name: vars(self)[name] + vars(other)[name] for name in counts}
        return replace(self, quarantined={**self.quarantined, **other.quarantined}, **added)


def extract_features(
    backbones: str | Backbone | Sequence[str | Backbone],
    dataset: ImageDataset | PartitionedDataset | str,
    *,
    home: PathLike | None = None,
    config: ExtractConfig | None = None,
    **options: Any,
) -> FeatureStore | dict[str, FeatureStore]:
    """Run frozen backbones once over all images of a dataset, computing only what is not cached.

    Parameters
    ----------
    backbones : str, Backbone, or a sequence of these
        One gives a store, a sequence gives a dict of them by name; images are decoded once for all, or with
        ``decode="reduced"`` once per size that their transforms resize to.
    dataset : ImageDataset, PartitionedDataset or str
        From :func:`embcache.load_dataset` or `embcache.data.partitioned.load_partitioned`, or the name of a cached one.
    home : path-like, optional
        Folder of stores; default ``$EMBCACHE_HOME``, else ``~/.cache/embcache``.
    config : ExtractConfig, optional
        All options at once.
    **options
        Fields of `embcache.config.ExtractConfig`, each an option of ``embcache extract``: ``transform``, ``device``,
        ``precision``, ``batch_size``, ``views``, ``max_bad``, … ``weights`` may be a dict of paths by name.

    Returns
    -------
    FeatureStore or dict of str to FeatureStore
        Rows float32 (or float16) of shape (D,), or (V, D) with V views, in the dataset's order; unreadable images are
        left out and listed in ``quarantined``.

    Raises
    ------
    UsageError
        There is no such backbone or option, or its value cannot be used.
    WeightsError
        A checkpoint is missing, refused, or does not fit its network.
    DatasetError
        The images are not here, cannot be read for now, or too many of them are unusable.
    StoreError
        The store cannot be read or written.
    """
    one = isinstance(backbones, str | Backbone)
    dataset = named_dataset(dataset, home) if isinstance(dataset, str) else dataset
    chosen = [backbones] if isinstance(backbones, str | Backbone) else list(backbones)
    done = extract(dataset, chosen, ExtractConfig.make(config, options), home=home)
    stores = {extraction.backbone: extraction.store for extraction in done}
    return done[0].store if one else stores


def extract(
    dataset: ImageDataset | PartitionedDataset,
    backbones: Sequence[str | Backbone],
    config: ExtractConfig | None = None,
    *,
    home: PathLike | None = None,
    stop: Stop | None = None,
) -> list[Extraction]:
    """Extract as `extract_features` does, and return what was done; ``stop`` ends the run after the current shard."""
    started, config = time.monotonic(), config or ExtractConfig()
    with ExitStack() as closing:
        run = _Run(backbones, config, home, stop or Stop(), closing)
        begun = run.begin_each(dataset)
        # While pixels are staged, Ray may have no room for other workers.
        together = ((each[0], [each]) for each in begun) if config.stage else groupby(begun, itemgetter(0))
        for job, some in together:
            for shards in run.engine(job).run((shards for _, shards in some), job):
                run.finish(shards)
    return run.summary(len(dataset), time.monotonic() - started)


@dataclass(frozen=True)
class _Part:
    """A dataset, or one partition of it, in a run that owes something for it."""

    dataset: ImageDataset
    owed: Sequence[OwedStore]
    threads: int
    learning: ExitStack  # closing it keeps what was learned of the files


class _Run:
    """What the partitions of an extraction have in common, those that are begun, and what was done.

    ``closing`` keeps what was learned of the files however the run ends, and then leaves Ray.
    """

    def __init__(
        self, backbones: Sequence[str | Backbone], config: ExtractConfig, home: PathLike | None, stop: Stop,
        closing: ExitStack,
    ) -> None:  # fmt: skip
        self._backbones, self._config, self._home, self._stop = backbones, config, home, stop
        self._names = [backbone if isinstance(backbone, str) else backbone.name for backbone in backbones]
        devices, self._ray = split_devices(config.device), config.engine == "ray"
        self._workers = config.workers or max(1, default_workers() // len(devices))
        self._others = configs_of_others(backbones, devices, config, self._workers)
        self._decoding, self._closing = Decoding(check_max_pixels(config.max_pixels)), closing
        self._networks: list[FrozenNetwork] = []
        self._executed: dict[tuple[int, str], FrozenNetwork] = {}  # by the place of the network, and the runtime
        self._begun, self._images, self._done = dict[OwedShards, _Part](), 0, list[Extraction]()
        self._fault: DatasetError | None = None  # raised once the shards in work are committed
        self._unusable = 0

    def begin_each(self, dataset: ImageDataset | PartitionedDataset) -> Iterator[tuple[FeatureJob, OwedShards]]:
        """What is owed for each partition of a dataset, or for one that has none, and how it is computed.

        A partition is in memory only while it is planned or computed.
        """
        parts: Iterable[ImageDataset] = [dataset] if isinstance(dataset, ImageDataset) else self._partitions(dataset)
        for begun in map(self._begin, parts):
            if begun is not None:
                yield begun
            if self._fault:
                raise self._fault
            if self._stop.requested:
                return

    def _partitions(self, dataset: PartitionedDataset) -> Iterable[ImageDataset]:
        sizes = decisive_sizes(dataset, self._home, self._decoding)
        return map(self._counting, replace(dataset, sizes=sizes).parts())

    def _counting(self, dataset: ImageDataset) -> ImageDataset:
        """A partition that knows how many images of those that are finished are quarantined."""
        bad = max((len(unusable(one.quarantined)) for one in self._done), default=0)
        return replace(dataset, part=dataset.part and replace(dataset.part, bad=bad))

    def _begin(self, dataset: ImageDataset) -> tuple[FeatureJob, OwedShards] | None:
        """Scan the files, open the stores, and plan what they owe."""
        began, config, home = time.time_ns(), self._config, self._home
        self._stop.complete, self._images = False, self._images + len(dataset)
        with ThreadPoolExecutor(self._workers) as pool:
            files = scan_dataset(dataset, home, pool, self._decoding)
            models = _models(self._backbones, dataset, files, config, home)
            owed = _complete_stores(models, dataset, files, config)
            if not owed:
                networks, closing = self._open(dataset, files), self._closing
                owed = [_open_store(each, dataset, files, config, home, pool, closing) for each in networks]
                _remember(models, self._networks, dataset, files.folder, home, began)
        if dataset.part is None:  # partitions are kept when they are made
            write_snapshot(files.folder, (dataset.whole or dataset).to_parquet_bytes())
        files.keep()
        shards = OwedShards(owed, dataset, config.part, files.scan.learn, last=self._images == dataset.total)
        if not shards.waiting:
            self._stop.complete = shards.last and not self._begun
            self._add(dataset, owed, shards, 0)
            return None
        self._closing.enter_context(ray_connection(config))
        learning = self._closing.enter_context(ExitStack())
        learning.enter_context(files.learning())
        if config.stage:
            from embcache.extract.pixels import stage_pixels

            engine = self._engine(f"decode {dataset.name}", replace(config, gpus_per_worker=None), config.workers or 1)
            stage_pixels(self._networks, owed, dataset, files, config, home=home, engine=engine)
        job = self._job(dataset, files, owed)
        self._begun[shards] = _Part(dataset, owed, job.threads, learning)
        return job, shards

    def _open(self, dataset: ImageDataset, files: DatasetFiles) -> list[FrozenNetwork]:
        """The networks: those of one partition are those of all."""
        from embcache.extract.foreign import refuse_foreign
        from embcache.extract.recipes import Traits, open_networks

        if not self._networks:
            refuse_foreign(list(map(bare_name, self._names)), dataset, self._home)
            self._networks = open_networks(self._backbones, Traits.of(dataset, files), self._config, self._home)
        return self._networks

    def _job(self, dataset: ImageDataset, files: DatasetFiles, owed: Sequence[OwedStore]) -> FeatureJob:
        import torch

        from embcache.extract.jobs import FeatureJob, Here
        from embcache.extract.pixels import cached_pixels
        from embcache.extract.recipes import Traits, kept_conversion

        config, ray = self._config, self._ray
        threads = (config.cpus_per_worker or owed[0].store.threads) if ray else torch.get_num_threads()
        cached = cached_pixels(self._networks, owed, dataset, files)
        job = FeatureJob(
            dataset.name, dataset.total, dataset.part.current if dataset.part else (), tuple(self._backbones),
            Traits.of(dataset, files), config.to_json(),
            home=portable_home(self._home), root=str(files.root), threads=threads,
            stores=tuple((each.store.path.name, each.runtime) for each in owed),
            pixels=tuple((key, pixels.store.path.name, pixels.stale) for key, pixels in cached.items()),
            workers=config.workers or threads if ray else self._workers,
        )  # fmt: skip

        def ids(partition: str, known: pd.Series | None = None if dataset.part else dataset.table["id"]) -> list[str]:
            return job.ids(partition) if known is None else known.tolist()

        self._quarantine = Quarantine(job.images, ids, files.root, config, job.partitions)
        if ray:
            return job
        for key, network in zip(enumerate(each.runtime for each in owed), self._networks, strict=True):
            if key not in self._executed and (dataset.part or owed[key[0]].plan.shards):
                self._executed[key] = network.executed_by(key[1], kept_conversion(network, self._home))
        networks = [self._executed.get((k, each.runtime), self._networks[k]) for k, each in enumerate(owed)]
        return replace(job, here=Here(networks, cached, self._decoding, self._quarantine))

    def engine(self, job: FeatureJob) -> Engine:
        """Who computes."""
        engine, others = self._engine(f"extract {job.dataset}", self._config, job.threads), self._others
        if not others:
            return engine
        return DevicesEngine(engine, lambda dataset: Crew(others, dataset, self._names, self._home, self._stop))

    def _engine(self, label: str, config: ExtractConfig, threads: int) -> Engine:
        if not self._ray:
            return LocalEngine(label, self._stop)
        from embcache.extract.engines.ray_cluster import RayEngine

        return RayEngine(label, self._stop, config, threads)

    def finish(self, shards: OwedShards) -> None:
        """Keep what was learned, and count what was done."""
        part = self._begun.pop(shards)
        part.learning.close()
        self._stop.complete = self._images == part.dataset.total and not self._begun
        self._add(part.dataset, part.owed, shards, part.threads)

    def _add(self, dataset: ImageDataset, owed: Sequence[OwedStore], shards: OwedShards, threads: int) -> None:
        for store in shards.stores:
            refresh_view(store.path)
        done = [
            _summarize(each, dataset, computed, self._config, threads)
            for each, computed in zip(owed, shards.computed, strict=True)
        ]
        for note in self._decoding.notes():
            log.warning(note)
        self._done = [one.joined(other) for one, other in zip(self._done, done, strict=True)] if self._done else done
        self._unusable += shards.unusable
        if self._ray and shards.unusable:  # workers that checked at once did not know of each other's
            most = max((unusable(one.quarantined) for one in self._done), key=len)
            self._fault = self._quarantine.too_many(most, f"{self._unusable:,} of them found by this run")

    def summary(self, images: int, seconds: float) -> list[Extraction]:
        """What was done for a dataset of so many images; what was begun may not be complete."""
        for shards in list(self._begun):
            self.finish(shards)
        if self._fault and not self._stop.requested:
            raise self._fault
        rest = images - self._images
        return [replace(one, left=one.left + rest, undone=one.undone + rest, seconds=seconds) for one in self._done]


def _open_store(
    network: FrozenNetwork,
    dataset: ImageDataset,
    files: DatasetFiles,
    config: ExtractConfig,
    home: PathLike | None,
    pool: Executor,
    closing: ExitStack,
) -> OwedStore:
    """The store of a network's recipe, created if it is not there, and what it owes: published as plans."""
    import torch

    from embcache.backbones.runtimes import choose_runtime, runtime_version
    from embcache.extract.canaries import canary_features, check_canaries, environment
    from embcache.extract.recipes import kept_conversion, log_differences, make_recipe, safe_runtime
    from embcache.extract.worker import first_batch

    # Workers of a cluster may have GPUs where this process has none.
    recipe, device = make_recipe(network), "cuda" if config.gpus_per_worker else network.device.type
    threads = config.cpus_per_worker or torch.get_num_threads()
    path = store_path(files.folder, recipe)
    usual = read_header(path).runtime if path.is_dir() else None
    if usual is None and config.engine == "ray":  # before their number is recorded
        from embcache.extract.engines.ray_cluster import check_room

        closing.enter_context(ray_connection(config))
        check_room(threads, config.gpus_per_worker or 0)
    requested = "eager" if network.backbone.spec.fixed and config.runtime == "auto" else config.runtime
    runtime = usual if requested == "auto" else None
    runtime = runtime or choose_runtime(requested, device, network.precision, dataset.total)
    if runtime not in ("eager", usual):
        sources = image_refs(dataset.table.iloc[: config.batch_size or BATCH_SIZES["cpu"]])
        see = partial(first_batch, files.root, sources, network, pool, Decoding(check_max_pixels(config.max_pixels)))
        runtime = safe_runtime(network.executed_by(runtime, kept_conversion(network, home)), see, requested)
    canaries = cache(partial(canary_features, network))
    usual_rows = default_rows("place" if mirror_of(path) else device, dataset.total, network.row_shape)
    path = create_store(
        files.folder, recipe, format=config.format, canaries=canaries, row_shape=network.row_shape,
        rows_per_shard=config.rows_per_shard or usual_rows,
        batch_size=config.batch_size or BATCH_SIZES.get(device, 64), runtime=runtime,
        threads=threads,
        provenance={
            "weights": network.backbone.weights_source, **environment(network), **runtime_version(runtime),
            **({"checkpoint": network.backbone.given} if network.backbone.given else {}),
        },
    )  # fmt: skip
    store = FeatureStore(path)
    _log_continued(recipe.backbone, store, config)
    if not store.committed():
        log_differences(store, files.folder)
    plan = plan_store(store, dataset, files.scan, retry_quarantined=config.retry_quarantined)
    if plan.shards:
        check_canaries(path, network, canaries)
        if runtime != store.runtime:
            log.info(f"{recipe.backbone}: the store was created with the runtime {store.runtime}, not {runtime}")
    return OwedStore(store, plan, config.batch_size or store.batch_size, runtime)


def _log_continued(name: str, store: FeatureStore, config: ExtractConfig) -> None:
    """Log in what a store that a backbone of this name uses is not as the user may expect."""
    if store.recipe.backbone != name:
        log.info(
            f"{name} has the same weights as {store.recipe.backbone}, and these features are used: "
            f"embcache probe --backbone {store.recipe.backbone}"
        )
    if config.rows_per_shard not in (None, store.rows_per_shard):
        log.info(f"{name}: the store was created with {store.rows_per_shard} rows per shard, and keeps them")


def default_rows(device: str, images: int, row_shape: Sequence[int] = ()) -> int:
    """Rows per shard of a new store, by the type of the device (``cpu``, ``cuda``, …), or ``place`` in an object store.

    Doubled until there are not too many shards, but in an object store, where many workers are to share them; at most
    the number of images (but 64), and a gigabyte of float32, for a shard takes the memory of all its rows.
    """
    rows = ROWS_PER_SHARD.get(device, ROWS_PER_SHARD["cuda"])
    while images > rows * _MOST_SHARDS and device != "place":
        rows *= 2
    return min(rows, max(images, 64), max(1, (1 << 28) // prod(row_shape)))


def _summarize(
    owed: OwedStore, dataset: ImageDataset, computed: int, config: ExtractConfig, threads: int
) -> Extraction:
    plan, store = owed.plan, _shown(FeatureStore(owed.store.path) if owed.plan.shards else owed.store, dataset)
    name, committed = store.recipe.backbone, set(store.committed())
    left = [shard for shard in plan.shards if shard.number not in committed]
    if computed and (owed.batch_size, threads) != (store.batch_size, store.threads):
        log.warning(
            f"{name}: this run used batch {owed.batch_size} and {threads} threads, the store began with batch "
            f"{store.batch_size} and {store.threads}: features may differ in the last bits"
        )
    return Extraction(
        name, store if dataset.part is None else FeatureStore(store.path),
        computed, plan.cached, plan.added, plan.changed, plan.retried,
        left=sum(len(shard.ids) for shard in left),
        undone=sum(len(shard.ids) for shard in left if in_part(shard.number, config.part)),
        quarantined=dict(store.quarantined), seconds=0.0,
    )  # fmt: skip


def _shown(store: FeatureStore, dataset: ImageDataset) -> FeatureStore:
    """What a store has of a dataset, or of one partition."""
    store = store if dataset.part is None else store.of_part(dataset.part)
    return store.restrict(dataset.table["id"].tolist())


# What earlier runs learned


@dataclass(frozen=True)
class Known:
    """What a backbone led to in an earlier run."""

    recipe: Recipe
    notes: tuple[str, ...]  # for people
    files: Mapping[str, tuple[int, ...] | None]  # state of everything that its files were looked for in


def _models(
    names: Sequence[str | Backbone], dataset: ImageDataset, files: DatasetFiles, config: ExtractConfig,
    home: PathLike | None,
) -> dict[str, tuple[str, list[Path | None]]]:  # fmt: skip
    """What each backbone's library calls it, and its files that are named, by a digest of what else decides its recipe.

    None at all if code of others makes one of them, or a runtime is named.
    """
    if config.runtime != "auto" or not all(isinstance(name, str) for name in names):
        return {}
    versions = {"embcache": embcache.__version__, "decoder": DECODER_VERSION, "numerics": str(NUMERICS)}
    for package in ("torch", "torchvision", "timm", "transformers", "open_clip_torch"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    bare, sizes, flags = [bare_name(str(name)) for name in names], set(files.sizes), sorted(cpu_flags())
    given, found = weights_by_name(bare, config.weights), dict[str, tuple[str, list[Path | None]]]()
    options: dict[str, Any] = {**config.to_json(), **dict.fromkeys(("weights", "workers", "batch_size"))}
    for name in (*(f.name for f in fields(EngineConfig)), "stage"):  # who computes decides nothing
        del options[name]
    options["size"] = list(*sizes) if len(sizes) == 1 else None
    caches = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")
    places = [str(weights_dir(home)), sys.prefix, str(Path.home()), *map(os.environ.get, caches)]
    for name, own in zip(map(str, names), bare, strict=True):
        model = name[len(own) + 1 :] or name
        row = BACKBONES.get(model) or row_of(model)
        model = BACKBONES[model].model or model if model in BACKBONES else model
        prefix, _, text = model.partition(":")
        code = row is None and prefix not in {*LIBRARIES, "random"}
        # A file of ONNX may refer to others; a name of the user's own may have become that of a package.
        if code or prefix == "onnx" or (own != name and own in backbones.names()):
            return {}
        text = text.removeprefix("hf-hub:")
        there = [given.get(own), *([find_model(text, home), find_model(text)] if text else [])]
        named = [str(path and path.absolute()) for path in there]
        decisive = [name, repr(row), named, options, dataset.layout, dataset.augment, versions, places, flags]
        found[hashlib.sha256(canonical_json(decisive).encode()).hexdigest()] = text, there
    return found if len(found) == len(names) else {}


def _complete_stores(
    models: Mapping[str, object], dataset: ImageDataset, files: DatasetFiles, config: ExtractConfig
) -> list[OwedStore]:
    """The stores of known models, if all are there as a finished run leaves them and owe nothing; else none."""
    found, kept = list[tuple[Known, OwedStore]](), _read_known(files.folder) if models else {}
    for known in map(kept.get, models):
        if known is None or any(_state(path) != state for path, state in known.files.items()):
            return []
        path, name = store_path(files.folder, known.recipe), known.recipe.backbone
        if not path.is_dir() or list_folder(path / "staging"):
            return []
        store = FeatureStore(path)
        same = store.recipe.fingerprint == known.recipe.fingerprint and config.format in (None, store.format)
        if not same or (known.recipe.model and len(list(files.folder.glob(f"{slug(name)}-*"))) > 1):
            return []  # what else has a name of the user's own may be of another model
        plan = plan_store(store, dataset, files.scan, publish=False, retry_quarantined=config.retry_quarantined)
        if plan.shards:
            return []
        found.append((known, OwedStore(store, plan, config.batch_size or store.batch_size, store.runtime)))
    for note in chain.from_iterable(known.notes for known, _ in found):
        log.info(note)
    for known, each in found:
        _log_continued(known.recipe.backbone, each.store, config)
    return [each for _, each in found]


def _remember(
    models: Mapping[str, tuple[str, list[Path | None]]], networks: Sequence[FrozenNetwork], dataset: ImageDataset,
    folder: Path, home: PathLike | None, began: int,
) -> None:  # fmt: skip
    """Keep what each model led to in a run that began at a time, in nanoseconds."""
    from embcache.extract.recipes import make_recipe, notes_of

    learned = dict[str, Known]()
    for (key, (text, there)), network in zip(models.items(), networks, strict=False):
        spec, weights = network.backbone.spec, weights_dir(home)
        hub = [find_cached(each, "") for each in (text, spec.source) if each.count("/") == 1]
        places = [*there, there[0] or find_weights(spec.weights, weights), *hub]
        places += [each.parents[1] / "refs" for each in hub if each]
        places += [weights / (spec.weights.filename + end) for end in ("", ".sha256") if spec.weights.filename]
        paths = [place.expanduser().absolute() for place in places if place]
        paths += [inner for path in paths if path.is_dir() for inner in path.iterdir()]
        states = {str(path): _state(path) for path in paths}
        # Only what was as it is before the run began: a file may be replaced just after it was read.
        settled = all(max(state[1:3]) < began - TICK_NS for state in states.values() if state)
        if settled and (spec.seed is not None or any(path.is_file() for path in paths)):
            learned[key] = Known(make_recipe(network), tuple(notes_of(network.backbone, dataset.layout)), states)
    kept = _read_known(folder) if learned else {}
    if any(kept.get(key) != known for key, known in learned.items()):
        entries = list((kept | learned).items())[-_MOST_KNOWN:]
        keep_file(folder / "networks.json", seal({"networks": {key: plain(known) for key, known in entries}}))


def _state(path: PathLike) -> tuple[int, ...] | None:
    with suppress(OSError):
        return tuple(file_state(str(path)))
    return None


def _read_known(folder: Path) -> dict[str, Known]:
    """What is kept beside a dataset's stores: nothing if it cannot be read, since it only saves work."""
    with suppress(EmbcacheError, OSError, ValueError):
        kept = read_sealed(folder / "networks.json", "", most=_MOST_BYTES).get("networks")
        return typed(dict[str, Known], kept)  # type: ignore[no-any-return]
    return {}


def help_another() -> None:
    """The process of a further device: read the order, compute, report; stop when standard input is closed."""
    stop = Stop()
    for number in (signal.SIGINT, signal.SIGTERM):  # a cluster sends them to every process of a job
        signal.signal(number, lambda *_: stop.request())
    order = json.loads(sys.stdin.buffer.readline())
    dataset = ImageDataset.from_parquet_bytes(sys.stdin.buffer.read(order["bytes"]))

    def watch() -> None:
        # Not the buffered reader, whose lock the thread would still hold when the work is done and Python ends.
        os.read(sys.stdin.fileno(), 1)
        stop.request()

    threading.Thread(target=watch, daemon=True).start()
    config = ExtractConfig.from_json(order["config"])
    try:
        # The run itself shows what is not a warning.
        with shown(lambda text: _report("note", text=text), logging.WARNING):
            done = extract(dataset, order["backbones"], config, home=order["home"], stop=stop)
    except EmbcacheError as error:
        _report("error", text=str(error))
        raise SystemExit(1) from None
    _report("done", computed=[extraction.computed for extraction in done])


def _report(message: str, **content: object) -> None:
    sys.stdout.write(json.dumps({"embcache": message, **content}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    help_another()
