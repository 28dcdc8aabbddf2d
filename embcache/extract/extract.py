"""Extraction, top to bottom: scan → networks → stores and what they owe → shard by shard: compute, check, commit."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from embcache.backbones.catalog import (
    BACKBONES,
    LIBRARIES,
    Backbone,
    find_backbone,
    load_backbone,
    repool,
    weights_status,
)
from embcache.backbones.pooling import Pooling
from embcache.backbones.runtimes import choose_runtime, departure, runtime_version
from embcache.backbones.transforms import Transform, choose_transform
from embcache.backbones.weights import weights_by_name
from embcache.config import ExtractConfig
from embcache.cores import default_workers
from embcache.data.budget import Decoding, check_max_pixels
from embcache.data.dataset import ImageDataset, named_dataset
from embcache.data.images import DECODER_VERSION, image_refs
from embcache.errors import EmbcacheError, RecipeError, UsageError
from embcache.extract.canaries import canary_features, check_canaries, environment
from embcache.extract.engines.devices import Crew, split_devices
from embcache.extract.engines.local import LocalEngine, OwedStore, Stop, in_part
from embcache.extract.foreign import refuse_foreign
from embcache.extract.pixels import CurrentPixels, current_pixels
from embcache.extract.quarantine import Quarantine
from embcache.extract.scan import DatasetFiles, image_root, plan_store, scan_dataset
from embcache.extract.worker import NUMERICS, FrozenNetwork, compute_shard, first_batch, freeze
from embcache.fields import bare_name
from embcache.log import log, shown
from embcache.paths import PathLike, slug, weights_dir
from embcache.sealed import canonical_json
from embcache.store.commit import create_store, store_path, write_snapshot
from embcache.store.feature_store import PIXELS, FeatureStore, list_stores
from embcache.store.reading import read_header
from embcache.store.schema import Recipe

# Small batches keep a network's activations near the processor's caches; a GPU needs large ones (docs/log.md).
BATCH_SIZES = {"cpu": 16, "cuda": 64}
# Seconds of work to finish before an interrupted run ends, or to lose. They are larger if that would make more shards
# than it should take to open a store (docs/benchmarks.md).
ROWS_PER_SHARD = {"cpu": 64, "cuda": 4096}
_MOST_SHARDS = 2048


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


def extract_features(
    backbones: str | Backbone | Sequence[str | Backbone],
    dataset: ImageDataset | str,
    *,
    home: PathLike | None = None,
    config: ExtractConfig | None = None,
    **options: Any,
) -> FeatureStore | dict[str, FeatureStore]:
    """Run frozen backbones once over all images of a dataset, computing only what is not cached.

    Parameters
    ----------
    backbones : str, Backbone, or a sequence of these
        One gives a store, a sequence gives a dict of them by name; images are decoded once for all.
    dataset : ImageDataset or str
        From :func:`embcache.load_dataset`, or the name of a cached one.
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
    dataset, one = named_dataset(dataset, home), isinstance(backbones, str | Backbone)
    chosen = [backbones] if isinstance(backbones, str | Backbone) else list(backbones)
    done = extract(dataset, chosen, ExtractConfig.make(config, options), home=home)
    stores = {extraction.backbone: extraction.store for extraction in done}
    return done[0].store if one else stores


def extract(
    dataset: ImageDataset,
    backbones: Sequence[str | Backbone],
    config: ExtractConfig | None = None,
    *,
    home: PathLike | None = None,
    stop: Stop | None = None,
) -> list[Extraction]:
    """Extract as `extract_features` does, and return what was done; ``stop`` ends the run after the current shard."""
    started, config, stop = time.monotonic(), config or ExtractConfig(), stop or Stop()
    devices, decoding = split_devices(config.device), Decoding(check_max_pixels(config.max_pixels))
    threads = config.workers or max(1, default_workers() // len(devices))
    others = _configs_of_others(backbones, devices, config, threads)
    quarantine = Quarantine(dataset, image_root(dataset), config, home)
    with ThreadPoolExecutor(threads) as pool:
        files = scan_dataset(dataset, home, pool, decoding)
        networks = open_networks(backbones, dataset, files, config, home=home)
        owed = [_open_store(network, dataset, files, config, home, pool) for network in networks]
        networks = [
            network.executed_by(each.runtime, _kept(network, home)) if each.plan.shards else network
            for network, each in zip(networks, owed, strict=True)
        ]
        write_snapshot(files.folder, (dataset.whole or dataset).to_parquet_bytes())
        files.keep()
        cached = _cached_pixels(networks, owed, dataset, files)
        engine = LocalEngine(owed, dataset, part=config.part, stop=stop, threads=torch.get_num_threads())
        helpers = others if any(each.plan.shards for each in owed) else []
        names = [backbone if isinstance(backbone, str) else backbone.name for backbone in backbones]
        crew = Crew(helpers, dataset, names, home, stop)
        with files.learning(), crew, closing(engine.shards()) as shards:
            for shard in shards:
                run = partial(
                    compute_shard, files.root, shard.sources, [networks[i] for i in shard.stores], pool=pool,
                    cached={key: pixels.read for key, pixels in cached.items()}, decoding=decoding,
                )  # fmt: skip
                rows, batch_size = engine.compute(shard, run)
                files.scan.learn(shard.sources, rows[0].digests)
                quarantine.check([owed[i].store for i in shard.stores], rows, shard.sources)
                engine.commit(shard, rows, batch_size)
                del rows  # before those of the next shard are made
    for note in decoding.notes():
        log.warning(note)
    computed = [sum(images) for images in zip(engine.computed, *crew.computed, strict=True)]
    seconds = time.monotonic() - started
    return [_summarize(o, dataset, images, config, seconds) for o, images in zip(owed, computed, strict=True)]


def open_networks(
    backbones: Sequence[str | Backbone],
    dataset: ImageDataset,
    files: DatasetFiles,
    config: ExtractConfig,
    *,
    home: PathLike | None = None,
) -> list[FrozenNetwork]:
    """The networks of an extraction, in the order of ``backbones``; nothing is computed."""
    names = [bare_name(backbone) if isinstance(backbone, str) else backbone.name for backbone in backbones]
    if repeated := [b for b in backbones if isinstance(b, str) and bare_name(b) != b and names.count(bare_name(b)) > 1]:
        raise UsageError("a backbone is named twice", code="repeated-backbone", found=", ".join(repeated))
    refuse_foreign(names, dataset, home)
    weights = weights_by_name(names, config.weights)
    found = [_find(each, weights.get(name), files.folder, home) for each, name in zip(backbones, names, strict=True)]
    specs = [repool(spec, config.tokens, config.layers) for spec in found]
    device, networks = split_devices(config.device)[0], list[FrozenNetwork]()
    precision = config.precision
    if precision != "fp32" and config.runtime not in ("auto", "eager"):
        precision += f"+{config.runtime}"
    for given, name, spec in zip(backbones, names, specs, strict=True):
        transform = choose_transform(spec, config.transform, files.sizes)
        spec = spec.at(transform.size)
        what = spec if spec.module is not None or spec.library else given  # a module is built once
        loaded = load_backbone(what, weights=weights.get(name), home=home, image_size=transform.size)
        views = (config.views, dataset.augment, config.feature_dtype)
        if spec.module is not None:  # before it is rewritten, and after
            loaded.module.to("cpu")
            canary_features(FrozenNetwork(loaded, transform, torch.device("cpu"), "fp32"))
        networks.append(freeze(loaded, transform, device, precision, *views))
        _check_own_name(make_recipe(networks[-1]), files.folder)
        if dataset.layout in loaded.spec.contaminated:
            log.info(f"{spec.name} was pretrained on images of {dataset.layout}: its scores there are contaminated")
        if loaded.inferred:
            log.info(f"{spec.name}: {loaded.inferred}")
    return networks


def _cached_as(name: str, folder: Path) -> list[FeatureStore]:
    """The stores of a dataset whose features have a name."""
    stores = [FeatureStore(path) for path in sorted(folder.glob(f"{slug(name)}-*"))]
    return [store for store in stores if store.recipe.backbone == name]


def _find(given: str | Backbone, weights: Path | None, folder: Path, home: PathLike | None) -> Backbone:
    """The backbone of a name; for one of the user's own, that only stores know, a message that says what to type."""
    try:
        return find_backbone(given, folder=weights, home=home)
    except UsageError as unknown:
        for store in _cached_as(str(given), folder) if unknown.code == "unknown-backbone" else ():
            if store.recipe.model:
                raise UsageError(
                    f"{given} is a name of your own: say what it stands for", code="own-name-alone", where=store.path,
                    expected=store.recipe.typed, found=str(given), fix=f"--backbone {shlex.quote(store.recipe.typed)}",
                ) from unknown  # fmt: skip
        raise


def _check_own_name(recipe: Recipe, folder: Path) -> None:
    """Refuse a name of the user's own that another model has in this dataset already."""
    network = (recipe.architecture, recipe.weights_sha256)
    for store in _cached_as(recipe.backbone, folder) if recipe.model else ():
        other = store.recipe
        if other.model != recipe.model and (other.architecture, other.weights_sha256) != network:
            free = f"free the name: rm -r {shlex.quote(str(store.path))}"
            raise UsageError(
                f"the name {recipe.backbone} is taken by another model of this dataset", code="own-name-taken",
                expected=other.typed, found=recipe.typed, where=store.path,
                fix=(f"--backbone {recipe.backbone}2={recipe.model}", free),
            )  # fmt: skip


def _open_store(
    network: FrozenNetwork,
    dataset: ImageDataset,
    files: DatasetFiles,
    config: ExtractConfig,
    home: PathLike | None,
    pool: Executor,
) -> OwedStore:
    """The store of a network's recipe, created if it is not there, and what it owes: published as plans."""
    recipe, device = make_recipe(network), network.device.type
    path = store_path(files.folder, recipe)
    usual = read_header(path).runtime if path.is_dir() else None
    requested = "eager" if network.backbone.spec.fixed and config.runtime == "auto" else config.runtime
    runtime = usual if requested == "auto" else None
    runtime = runtime or choose_runtime(requested, device, network.precision, len(dataset))
    if runtime not in ("eager", usual):
        sources = image_refs(dataset.table.iloc[: config.batch_size or BATCH_SIZES["cpu"]])
        see = partial(first_batch, files.root, sources, network, pool, Decoding(check_max_pixels(config.max_pixels)))
        runtime = _gate(network.executed_by(runtime, _kept(network, home)), see, requested)
    canaries = cache(partial(canary_features, network))
    path = create_store(
        files.folder, recipe, format=config.format, canaries=canaries, row_shape=network.row_shape,
        rows_per_shard=config.rows_per_shard or default_rows(device, len(dataset)),
        batch_size=config.batch_size or BATCH_SIZES.get(device, 64), threads=torch.get_num_threads(), runtime=runtime,
        provenance={
            "weights": network.backbone.weights_source, **environment(network), **runtime_version(runtime),
            **({"checkpoint": network.backbone.given} if network.backbone.given else {}),
        },
    )  # fmt: skip
    store = FeatureStore(path)
    if store.recipe.backbone != recipe.backbone:
        log.info(
            f"{recipe.backbone} has the same weights as {store.recipe.backbone}, and these features are used: "
            f"embcache probe --backbone {store.recipe.backbone}"
        )
    if config.rows_per_shard not in (None, store.rows_per_shard):
        log.info(f"{recipe.backbone}: the store was created with {store.rows_per_shard} rows per shard, and keeps them")
    if not store.committed():
        _log_differences(store, files.folder)
    plan = plan_store(store, dataset, files.scan, retry_quarantined=config.retry_quarantined)
    if plan.shards:
        check_canaries(path, network, canaries)
        if runtime != store.runtime:
            log.info(
                f"{recipe.backbone}: the store was created with the runtime {store.runtime}; this run uses {runtime}"
            )
    return OwedStore(store, plan, config.batch_size or store.batch_size, runtime)


def _gate(network: FrozenNetwork, see: Callable[[], torch.Tensor], requested: str) -> str:
    """The runtime of a network where its features of real images are those of torch's own execution, else eager."""
    name, pixels = network.backbone.spec.name, see()
    try:
        problem = departure(network.forward(pixels), network.executed_by("eager").forward(pixels), network.precision)
    except UsageError as error:
        if requested != "auto":
            raise
        problem = f"{error.problem}: {error.found}"
    if problem and requested != "auto":
        raise UsageError(
            f"{network.runtime} does not compute the features of {name}", code="runtime-departs", found=problem,
            fix="--runtime eager",
        )  # fmt: skip
    if problem:
        log.info(f"{name}: {network.runtime} is not used: {problem}")
    return "eager" if problem else network.runtime


def _kept(network: FrozenNetwork, home: PathLike | None) -> Path | None:
    """How names of files begin that a runtime keeps of a network's conversion, beside the weights.

    None of a module of the user's own, of which nothing says whether its code has changed.
    """
    backbone = network.backbone
    if backbone.spec.module is not None:
        return None
    versions = environment(network).values()  # of the libraries whose code is converted
    parts = (backbone.spec.network, backbone.weights_sha256, backbone.spec.pooling, NUMERICS, *versions)
    digest = hashlib.sha256(canonical_json([*map(str, parts), network.precision]).encode()).hexdigest()
    return weights_dir(home) / "converted" / digest[:16]


def default_rows(device: str, images: int) -> int:
    """Rows per shard of a new store, by the type of the device: ``cpu``, ``cuda``, ….

    Doubled until there are not too many shards; at most the number of images (but 64), for a shard takes the memory of
    all its rows.
    """
    rows = ROWS_PER_SHARD.get(device, ROWS_PER_SHARD["cuda"])
    while images > rows * _MOST_SHARDS:
        rows *= 2
    return min(rows, max(images, 64))


def _log_differences(store: FeatureStore, folder: Path) -> None:
    """Log why the features of a backbone that is cached already are computed anew: a stale cache is never used."""
    recipe, found = store.recipe, list[str]()
    for other in _cached_as(recipe.backbone, folder):
        if other.path == store.path or other.views != store.views or not other.committed():
            continue  # views are requested by number, so the two are never confused
        differences = recipe.differences(other.recipe)
        what = ", ".join(f"{name} {theirs} there, {mine} now" for name, (mine, theirs) in differences.items())
        found.append(f"{other.path.name}: {what}")
    if found:
        others = "another recipe" if len(found) == 1 else f"{len(found)} other recipes"
        log.info(
            f"{recipe.backbone} is cached under {others} ({'; '.join(found)}); all images are extracted "
            f"under this one, and `embcache probe --recipe PREFIX` chooses one"
        )


def _cached_pixels(
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


def _configs_of_others(
    backbones: Sequence[str | Backbone], devices: Sequence[str], config: ExtractConfig, threads: int
) -> list[ExtractConfig]:
    """The configs of the processes of further devices."""
    unnamed = [backbone.name for backbone in backbones if isinstance(backbone, Backbone)]
    if unnamed and len(devices) > 1:
        raise UsageError(
            "a backbone that is an object exists in one process only, and several devices need one each",
            code="backbone-in-process", found=", ".join(unnamed), expected="package.module:function",
            fix="--device cuda:0",
        )  # fmt: skip
    # This process has planned the retries: another plan would compute an image twice that is still unreadable.
    return [replace(config, device=device, workers=threads, retry_quarantined=False) for device in devices[1:]]


def _summarize(
    owed: OwedStore, dataset: ImageDataset, computed: int, config: ExtractConfig, seconds: float
) -> Extraction:
    store, plan = FeatureStore(owed.store.path).restrict(dataset.table["id"].tolist()), owed.plan
    name, committed, threads = store.recipe.backbone, set(store.committed()), torch.get_num_threads()
    left = [shard for shard in plan.shards if shard.number not in committed]
    if computed and (owed.batch_size, threads) != (store.batch_size, store.threads):
        log.warning(
            f"{name}: this run used batch {owed.batch_size} and {threads} threads, the store began with batch "
            f"{store.batch_size} and {store.threads}: features may differ in the last bits"
        )
    return Extraction(
        name, store, computed, plan.cached, plan.added, plan.changed, plan.retried,
        left=sum(len(shard.ids) for shard in left),
        undone=sum(len(shard.ids) for shard in left if in_part(shard.number, config.part)),
        quarantined=dict(store.quarantined), seconds=seconds,
    )  # fmt: skip


def make_recipe(network: FrozenNetwork) -> Recipe:
    """Everything that determines the values of a network's features."""
    spec, transform = network.backbone.spec, network.transform.to_dict()
    if network.augmentation is not None:
        transform |= {"views": network.views, "augment": network.augmentation.describe()}
    precision = network.precision
    if precision != "fp32" and network.runtime != "eager":
        precision += f"+{network.runtime}"
    return Recipe(
        backbone=spec.name, architecture=spec.network, weights_sha256=network.backbone.weights_sha256,
        transform=transform, decoder=DECODER_VERSION, pooling=spec.pooling, precision=precision,
        dtype=network.dtype, numerics=NUMERICS, model=spec.model,
    )  # fmt: skip


def require_checkpoints(recipes: Iterable[Recipe], named: Container[str], home: PathLike | None = None) -> None:
    """Refuse recipes of checkpoints of the user's own that are not ``named``: what is published is another file."""
    stores = list_stores(home)
    own = [(each, _own_checkpoint(each, stores, home)) for each in recipes if each.backbone not in named]
    lacking = {each.backbone: (each, file) for each, file in own if file is not None}
    if lacking:
        was = {file: f", {file}" if file else "" for _, file in lacking.values()}
        raise RecipeError(
            "the features were made with checkpoints of your own: say where they are", code="own-checkpoint",
            expected="\n".join(f"{name}: {each.weights_words}{was[file]}" for name, (each, file) in lacking.items()),
            found="no --weights for " + ", ".join(lacking),
            fix=" ".join(each.weights_option(file) for each, file in lacking.values()),
        )  # fmt: skip


def _own_checkpoint(recipe: Recipe, stores: Sequence[FeatureStore], home: PathLike | None) -> str | None:
    """Where the checkpoint of the user's own was that a recipe is of, empty if that is not known; of others None.

    Stores of the recipe record it. Without one, what is published is another file if it has another digest, and is not
    fetched for a name of the user's own.
    """
    model = recipe.model or recipe.backbone
    row = BACKBONES.get(model)
    published = row.weights.sha256 if row else ""
    made = [store.provenance for store in stores if store.recipe.fingerprint == recipe.fingerprint]
    if files := [str(provenance.get("checkpoint", "")) for provenance in made]:
        return files[0] if all(files) else None
    absent = recipe.model and model.partition(":")[0] in {*LIBRARIES, *BACKBONES}
    absent = absent and weights_status(model, home).startswith("not here")
    return "" if absent or not recipe.weights_sha256.startswith(published) else None


def recipe_network(
    recipe: Recipe,
    *,
    home: PathLike | None = None,
    weights: PathLike | None = None,
    device: str = "auto",
    views: int = 1,
    augment: str = "generic",
    imports: bool = False,
) -> FrozenNetwork:
    """The network that a recipe names, with the weights on this machine; the caller compares its recipe."""
    transform, spec = recipe_transform(recipe), recipe_backbone(recipe, weights, imports, home)
    what = spec.at(transform.size) if spec.library else recipe.typed
    loaded = load_backbone(what, weights=weights, home=home, image_size=transform.size, imports=imports)
    return freeze(loaded, transform, device, recipe.precision, views, augment, recipe.dtype)


def recipe_backbone(
    recipe: Recipe, weights: PathLike | None = None, imports: bool = False, home: PathLike | None = None
) -> Backbone:
    """The backbone that a recipe names, pooled as it says; ``weights`` may be the folder of its files."""
    folder = None if weights is None else Path(weights)
    spec = find_backbone(recipe.typed, imports=imports, folder=folder, home=home)
    if not spec.library or recipe.pooling == spec.pooling:
        return spec
    pooling = Pooling.parse(recipe.pooling)
    return repool(spec, pooling.tokens, ",".join(map(str, pooling.layers)) or None)


def recipe_transform(recipe: Recipe) -> Transform:
    """The transform that a recipe names; for pixels only the part that decides them."""
    data = {name: value for name, value in recipe.transform.items() if name not in ("views", "augment")}
    if recipe.backbone == PIXELS:
        data = {"kind": "paper", "mean": [0.0] * 3, "std": [1.0] * 3} | data
    try:
        return Transform.from_dict(data)
    except ValueError as error:
        raise RecipeError(
            f"the recipe of {recipe.backbone} does not describe how images are transformed", code="recipe-transform",
            expected="resize, crop, size, interpolation, mean, std", found=str(error),
            fix="extract and probe again with this version of embcache",
        ) from error  # fmt: skip


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
