"""Extraction, top to bottom: dataset → transforms → networks → recipes → stores → owed shards → features."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

import embcache
from embcache.backbones.catalog import find_backbone, load_backbone
from embcache.backbones.transforms import Transform, choose_transform
from embcache.data.budget import Decoding, check_max_pixels
from embcache.data.dataset import ImageDataset
from embcache.data.images import DECODER_VERSION, ImageRef
from embcache.errors import RecipeError
from embcache.extract.engines.devices import Crew, split_devices
from embcache.extract.engines.local import Terms, compute_owed, is_asked
from embcache.extract.extract_request import (
    check_numbers,
    default_workers,
    image_root,
    say_what_differs,
    weights_by_name,
)
from embcache.extract.pixels import CurrentPixels, current_pixels
from embcache.extract.quarantine import Guard
from embcache.extract.scan import DatasetFiles, scan_dataset
from embcache.extract.shard_plan import Plan, plan_store
from embcache.extract.signals import Stop
from embcache.extract.worker import NUMERICS, FrozenNetwork, compute_shard, freeze
from embcache.paths import PathLike, home_dir
from embcache.store.commit import ShardRows, create_store, write_snapshot
from embcache.store.feature_store import PIXELS, FeatureStore
from embcache.store.recipe import Recipe

# Small batches keep a network's activations near the processor's caches; a GPU wants to be filled (docs/log.md).
BATCH_SIZES = {"cpu": 16, "cuda": 64}
# Seconds of work to finish before an interrupted run ends, or to lose. Where that makes more shards than it should take
# to open a store, they are larger (docs/benchmarks.md).
ROWS_PER_SHARD = {"cpu": 64, "cuda": 4096}
_MOST_SHARDS = 2048


@dataclass(frozen=True)
class Extraction:
    """What one backbone's extraction found and did."""

    backbone: str
    store: FeatureStore
    computed: int  # images that went through the network in this run
    cached: int  # images that were in the store before
    added: int
    changed: int
    retried: int
    left: int  # images that are owed still: the run was stopped, or they are another part's
    undone: int  # of those, images that this run was to compute
    quarantined: Mapping[str, str]  # id → reason, of the whole dataset
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Job:
    network: FrozenNetwork
    store: FeatureStore
    plan: Plan
    batch_size: int


def extract_features(
    backbones: str | Sequence[str],
    dataset: ImageDataset,
    *,
    home: PathLike | None = None,
    weights: PathLike | Mapping[str, PathLike] | None = None,
    transform: str | None = None,
    device: str = "auto",
    precision: str = "fp32",
    batch_size: int | None = None,
    workers: int | None = None,
    rows_per_shard: int | None = None,
    format: str | None = None,
    part: tuple[int, int] | None = None,
    views: int = 1,
    feature_dtype: str = "float32",
    on_error: str = "quarantine",
    max_bad: int | str = "1%",
    retry_quarantined: bool = False,
    max_pixels: int | None = None,
) -> FeatureStore | dict[str, FeatureStore]:
    """Run frozen backbones once over all images of a dataset, computing only what is not cached.

    Parameters
    ----------
    backbones : str or sequence of str
        A name gives one store, a sequence a dict of them; images are decoded once for all.
    dataset : ImageDataset
        From :func:`embcache.load_dataset`.
    home : path-like, optional
        Folder of stores; default ``$EMBCACHE_HOME``, else ``~/.cache/embcache``.
    weights : path-like or mapping of name to path-like, optional
        Checkpoints to use instead of those found or downloaded; a bare path when one backbone is asked for.
    transform : {"paper", "imagenet", "model"}, optional
        Default: ``paper``, and for ``timm:`` backbones the model's own preprocessing.
    device : str
        ``auto``, ``cpu``, ``cuda:0``, …; several, such as ``cuda:0,cuda:1``, share the work, in a process each.
    precision : {"fp32", "tf32", "bf16", "fp16"}
        Part of the recipe: another precision is another store.
    batch_size : int, optional
        Default: the one recorded in the store; for a new one 16 on a CPU, 64 on a GPU.
    workers : int, optional
        Threads that decode images; default: one per core, 8 at most.
    rows_per_shard : int, optional
        Images that are computed and committed together, settled when a store is created; default:
        :func:`default_rows`.
    format : {"zarr", "hdf5"}, optional
        Default: the one the store has, Zarr for a new one.
    part : (int, int), optional
        ``(i, n)``: compute only every n-th shard, from the i-th (1-based), to share work between machines.
    views : int
        More than one: a store of its own with rows (V, D). View 0 is the plain image, the others are augmented as the
        dataset's modality allows (:mod:`embcache.extract.augment`), the same in every run.
    feature_dtype : {"float32", "float16"}
        As which the features are kept, whatever computed them. Part of the recipe: float16 is a store of its own, of
        half the size; an image whose features it cannot hold is quarantined.
    on_error : {"quarantine", "fail"}
        What an image does that cannot be read, or whose features are not finite: it is left out, with the reason, or
        the run stops at the first.
    max_bad : int or str
        Quarantined images, or such as ``"1%"`` of the dataset (one at least), above which the run stops.
    retry_quarantined : bool
        Look at quarantined images again, though their files have not changed.
    max_pixels : int, optional
        Larger images are quarantined. No part of the recipe, and their sizes count for the transform all the same:
        with another limit those that it allows are looked at again. Default: ``$EMBCACHE_MAX_PIXELS``, else 89,478,485.

    Returns
    -------
    FeatureStore or dict of str to FeatureStore
        Rows in the dataset's order; unreadable images are left out and listed in ``quarantined``.

    Raises
    ------
    EmbcacheError
        See :mod:`embcache.errors`.
    """
    names = [backbones] if isinstance(backbones, str) else list(backbones)
    done = run_extraction(
        names, dataset, home=home, weights=weights, transform=transform, device=device, precision=precision,
        batch_size=batch_size, workers=workers, rows_per_shard=rows_per_shard, format=format, part=part, views=views,
        feature_dtype=feature_dtype, on_error=on_error, max_bad=max_bad, retry_quarantined=retry_quarantined,
        max_pixels=max_pixels,
    )  # fmt: skip
    stores = {extraction.backbone: extraction.store for extraction in done}
    return stores[names[0]] if isinstance(backbones, str) else stores


def run_extraction(
    names: Sequence[str],
    dataset: ImageDataset,
    *,
    home: PathLike | None = None,
    weights: PathLike | Mapping[str, PathLike] | None = None,
    transform: str | None = None,
    device: str = "auto",
    precision: str = "fp32",
    batch_size: int | None = None,
    workers: int | None = None,
    rows_per_shard: int | None = None,
    format: str | None = None,
    part: tuple[int, int] | None = None,
    views: int = 1,
    feature_dtype: str = "float32",
    on_error: str = "quarantine",
    max_bad: int | str = "1%",
    retry_quarantined: bool = False,
    max_pixels: int | None = None,
    only: Mapping[str, Collection[int]] | None = None,
    stop: Stop | None = None,
    say: Callable[[str], object] = lambda line: None,
    joining: bool = False,
) -> list[Extraction]:
    """As :func:`extract_features`, reporting what was done; ``say`` is told each thing worth knowing as it happens.

    With ``only``, shards by fingerprint of a store, no others are computed: what else is owed stays so. ``stop`` ends
    the run after the current shard. ``joining`` is for a process that helps another one: it tells what happens to it
    and not what the other tells anyway.
    """
    started = time.monotonic()
    weights, stop, devices = weights_by_name(names, weights), stop or Stop(), split_devices(device)
    check_numbers(batch_size, workers, part, views, rows_per_shard)
    decoding = Decoding() if max_pixels is None else Decoding(check_max_pixels(max_pixels))
    guard = Guard(dataset, image_root(dataset), on_error, max_bad, home)
    tell = (lambda line: None) if joining else say
    with ExitStack() as pools:
        threads = workers or max(1, default_workers() // len(devices))
        pool = pools.enter_context(ThreadPoolExecutor(threads))
        files = scan_dataset(dataset, home, pool, decoding)
        networks = open_networks(
            names, dataset, files, home=home, weights=weights, transform=transform, device=devices[0],
            precision=precision, views=views, feature_dtype=feature_dtype,
        )  # fmt: skip
        jobs = []
        for name, network in zip(names, networks, strict=True):
            if dataset.layout in network.backbone.spec.contaminated:
                tell(f"{name} was pretrained on images of {dataset.layout}: its scores there are contaminated")
            if network.backbone.inferred:
                tell(f"{name}: {network.backbone.inferred}")
            rows = rows_per_shard or default_rows(network.device.type, len(dataset))
            store = _store(files.folder, network, format, rows, batch_size)
            if rows_per_shard not in (None, store.rows_per_shard):
                tell(f"{name}: the store was created with {store.rows_per_shard} rows per shard, and keeps them")
            if not store.committed():
                say_what_differs(store, files.folder, tell)
            plan = plan_store(store, dataset, files.root, files.scan, retry_quarantined=retry_quarantined)
            jobs.append(_Job(network, store, plan, batch_size or store.batch_size))
        if not joining:
            write_snapshot(files.folder, (dataset.whole or dataset).to_parquet_bytes())
            files.keep()
        cached = _cached_pixels(jobs, dataset, files, tell)

        def compute(
            jobs: Sequence[_Job], sources: Sequence[ImageRef], batch_size: int, on_rows: Callable[[int], object]
        ) -> list[ShardRows]:
            networks = [job.network for job in jobs]
            rows = compute_shard(
                files.root, sources, networks, batch_size=batch_size, pool=pool, cached=cached, on_rows=on_rows,
                on_bad=guard.look, decoding=decoding,
            )  # fmt: skip
            files.scan.learn(sources, rows[0].digests)
            return rows

        terms = Terms(guard, stop, threads=torch.get_num_threads(), say=say, quiet=joining)
        owed = any(job.plan.shards for job in jobs)
        request = {
            "names": list(names), "home": str(home_dir(home)), "weights": {n: str(w) for n, w in weights.items()},
            "transform": transform, "precision": precision, "workers": threads,
            "batch_size": batch_size, "part": part, "views": views, "feature_dtype": feature_dtype,
            "on_error": on_error, "max_bad": max_bad,
            "max_pixels": decoding.max_pixels,
            "only": None if only is None else {fingerprint: list(numbers) for fingerprint, numbers in only.items()},
        }  # fmt: skip
        with files.learning(), Crew(devices[1:] if owed else (), dataset, request, stop, say) as crew:
            computed = compute_owed(jobs, dataset, compute, part=part, only=only, terms=terms)
    for note in decoding.notes():
        say(note)
    for _, images in crew.computed:
        computed = [ours + theirs for ours, theirs in zip(computed, images, strict=True)]
    return [_summary(job, dataset, computed[i], part, only, time.monotonic() - started) for i, job in enumerate(jobs)]


def default_rows(device: str, images: int) -> int:
    """Rows per shard of a new store for so many images, by the type of the device: ``cpu``, ``cuda``, ….

    64 on a CPU, 4,096 elsewhere; twice as many as often as it takes to have at most 2,048 shards; never more than there
    are images (but 64), for a shard takes the room of all of its rows.
    """
    rows = ROWS_PER_SHARD.get(device, ROWS_PER_SHARD["cuda"])
    while images > rows * _MOST_SHARDS:
        rows *= 2
    return min(rows, max(images, 64))


def open_networks(
    names: Sequence[str],
    dataset: ImageDataset,
    files: DatasetFiles,
    *,
    home: PathLike | None = None,
    weights: PathLike | Mapping[str, PathLike] | None = None,
    transform: str | None = None,
    device: str = "auto",
    precision: str = "fp32",
    views: int = 1,
    feature_dtype: str = "float32",
) -> list[FrozenNetwork]:
    """The networks that an extraction with the same arguments uses, in the order of ``names``; nothing is computed."""
    overrides = weights_by_name(names, weights)
    networks = []
    for name in names:
        chosen = choose_transform(find_backbone(name), transform, files.sizes)
        loaded = load_backbone(name, weights=overrides.get(name), home=home, image_size=chosen.size)
        networks.append(freeze(loaded, chosen, device, precision, views, dataset.augment, feature_dtype))
    return networks


def recipe_network(
    recipe: Recipe,
    *,
    home: PathLike | None = None,
    weights: PathLike | None = None,
    device: str = "auto",
    views: int = 1,
    augment: str = "generic",
) -> FrozenNetwork:
    """The network that a recipe names, with the weights that are here; the caller compares its recipe."""
    transform = recipe_transform(recipe)
    loaded = load_backbone(recipe.backbone, weights=weights, home=home, image_size=transform.size)
    return freeze(loaded, transform, device, recipe.precision, views, augment, recipe.dtype)


def recipe_transform(recipe: Recipe) -> Transform:
    """The transform that a recipe names, of pixels only what decides them; `RecipeError` where something is absent."""
    told: dict[str, Any] = {"kind": "paper", "mean": [0.0] * 3, "std": [1.0] * 3} if recipe.backbone == PIXELS else {}
    told |= recipe.transform
    absent = [field.name for field in fields(Transform) if field.name not in told]
    if absent or not isinstance(told["size"], list):
        raise RecipeError(
            f"the recipe of {recipe.backbone} does not say how images are transformed",
            expected=", ".join(field.name for field in fields(Transform)),
            found=f"no {', '.join(absent)}",
            fix="extract and probe again with this version of embcache",
        )
    values: dict[str, Any] = {
        field.name: tuple(value) if isinstance(value := told[field.name], list) else value
        for field in fields(Transform)
    }
    return Transform(**values)


def _cached_pixels(
    jobs: Sequence[_Job], dataset: ImageDataset, files: DatasetFiles, say: Callable[[str], object]
) -> dict[str, CurrentPixels]:
    """By frame key, the pixels that finetuning has left and that need no decoding."""
    found = {}
    for key in dict.fromkeys(job.network.looks.frame_key for job in jobs):
        sharing = [job for job in jobs if job.network.looks.frame_key == key]
        owed = {image for job in sharing for shard in job.plan.shards for image in shard.ids}
        cached = current_pixels(dataset, sharing[0].network.transform, files) if owed else None
        if cached is not None and (number := len(owed & set(cached.rows))):
            found[key] = cached
            say(f"pixels of {number:,} images are cached ({cached.store.path.name}): they are not decoded again")
    return found


def make_recipe(network: FrozenNetwork) -> Recipe:
    """All that determines the values of a network's features."""
    spec, transform = network.backbone.spec, network.transform.to_dict()
    if network.augmentation is not None:
        transform |= {"views": network.views, "augment": network.augmentation.describe()}
    return Recipe(
        backbone=spec.name,
        architecture=spec.network,
        weights_sha256=network.backbone.weights_sha256,
        transform=transform,
        decoder=DECODER_VERSION,
        pooling=spec.pooling,
        precision=network.precision,
        dtype=network.dtype,
        numerics=NUMERICS,
    )


def _store(
    folder: Path,
    network: FrozenNetwork,
    format: str | None,
    rows_per_shard: int,
    batch_size: int | None,
) -> FeatureStore:
    provenance = {
        "weights": network.backbone.weights_source,
        "device": str(network.device),
        "torch": torch.__version__,
        "embcache": embcache.__version__,
    }
    path = create_store(
        folder,
        make_recipe(network),
        format=format,
        row_shape=network.row_shape,
        rows_per_shard=rows_per_shard,
        batch_size=batch_size or BATCH_SIZES.get(network.device.type, 64),
        threads=torch.get_num_threads(),
        provenance=provenance,
    )
    return FeatureStore(path)


def _summary(
    job: _Job,
    dataset: ImageDataset,
    computed: int,
    part: tuple[int, int] | None,
    only: Mapping[str, Collection[int]] | None,
    seconds: float,
) -> Extraction:
    store = FeatureStore(job.store.path).restrict(dataset.table["id"].tolist())
    name, committed = job.network.backbone.spec.name, set(store.committed())
    owed = [shard for shard in job.plan.shards if shard.number not in committed]
    undone = [shard for shard in owed if is_asked(shard.number, store.recipe.fingerprint, part, only)]
    notes = []
    threads = torch.get_num_threads()
    if computed and (job.batch_size, threads) != (store.batch_size, store.threads):
        notes.append(
            f"{name}: this run used batch {job.batch_size} and {threads} threads, the store began with batch "
            f"{store.batch_size} and {store.threads}: features may differ in the last bits"
        )
    return Extraction(
        name,
        store,
        computed,
        job.plan.cached,
        job.plan.added,
        job.plan.changed,
        job.plan.retried,
        sum(len(shard.ids) for shard in owed),
        sum(len(shard.ids) for shard in undone),
        dict(store.quarantined),
        seconds,
        tuple(notes),
    )
