"""Extraction, top to bottom: dataset → transforms → networks → recipes → stores → owed shards → features."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import embcache
from embcache.data.dataset import ImageDataset
from embcache.data.images import DECODER_VERSION
from embcache.extract.backbones import find_backbone, load_backbone
from embcache.extract.batching import Source
from embcache.extract.plan import Plan, Shard, decode_scan, encode_scan, image_sizes, plan_store, scan_images
from embcache.extract.request import check_numbers, image_root, none_readable, weights_by_name
from embcache.extract.transforms import choose_transform
from embcache.extract.worker import NUMERICS, FrozenNetwork, compute_shard, freeze
from embcache.paths import PathLike, home_dir, slug
from embcache.store.commit import commit_shard, create_store, write_scan, write_snapshot, write_view
from embcache.store.feature_store import FeatureStore
from embcache.store.lease import Lease
from embcache.store.recipe import Recipe

# Small batches keep a network's activations near the processor's caches; a GPU wants to be filled (docs/log.md).
BATCH_SIZES = {"cpu": 16, "cuda": 64}
# 512 rows: some 4 MB of 2048-d features, and at most a minute of a laptop's work to lose.
ROWS_PER_SHARD = 512
# How long to wait before looking again at shards that another process is computing.
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Extraction:
    """What one backbone's extraction found and did."""

    backbone: str
    store: FeatureStore
    computed: int  # images that went through the network in this run
    cached: int  # images that were in the store before
    added: int
    changed: int
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
    format: str | None = None,
    part: tuple[int, int] | None = None,
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
        ``auto``, ``cpu``, ``cuda:0``, …
    precision : {"fp32", "tf32", "bf16", "fp16"}
        Part of the recipe: another precision is another store.
    batch_size : int, optional
        Default: the one recorded in the store; for a new one 16 on a CPU, 64 on a GPU.
    workers : int, optional
        Threads that decode images; default: one per core, 8 at most.
    format : {"zarr", "hdf5"}, optional
        Default: the one the store has, Zarr for a new one.
    part : (int, int), optional
        ``(i, n)``: compute only every n-th shard, from the i-th (1-based), to share work between machines.

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
        batch_size=batch_size, workers=workers, format=format, part=part,
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
    format: str | None = None,
    part: tuple[int, int] | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> list[Extraction]:
    """As :func:`extract_features`, reporting what was done; ``say`` is told each thing worth knowing as it happens."""
    started = time.monotonic()
    root = image_root(dataset)
    overrides = weights_by_name(names, weights)
    check_numbers(batch_size, workers, part)
    folder = home_dir(home) / slug(dataset.name)
    with ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 8)) as pool:
        scan = scan_images(dataset, root, decode_scan(folder / "scan.parquet"), pool)
        sizes = image_sizes(scan)
        if not sizes:
            raise none_readable(dataset, root)
        jobs = []
        for name in names:
            spec = find_backbone(name)
            if dataset.kind in spec.contaminated:
                say(f"{name} was pretrained on images of {dataset.kind}: its scores there are contaminated")
            chosen = choose_transform(spec, transform, sizes)
            loaded = load_backbone(name, weights=overrides.get(name), home=home, image_size=chosen.size)
            network = freeze(loaded, chosen, device, precision)
            store = _store(folder, network, format, batch_size)
            if not store.committed():
                _say_what_differs(store, folder, say)
            jobs.append(_Job(network, store, plan_store(store, dataset, root, scan), batch_size or store.batch_size))
        write_snapshot(folder, dataset.to_parquet_bytes())
        write_scan(folder, encode_scan(scan))
        computed = _compute_all(jobs, dataset, root, pool, part, say)
    return [_summary(job, dataset, computed[i], time.monotonic() - started) for i, job in enumerate(jobs)]


def make_recipe(network: FrozenNetwork) -> Recipe:
    """All that determines the values of a network's features."""
    spec = network.backbone.spec
    return Recipe(
        backbone=spec.name,
        architecture=spec.network,
        weights_sha256=network.backbone.weights_sha256,
        transform=network.transform.to_dict(),
        decoder=DECODER_VERSION,
        pooling=spec.pooling,
        precision=network.precision,
        dtype="float32",
        numerics=NUMERICS,
    )


def _store(folder: Path, network: FrozenNetwork, format: str | None, batch_size: int | None) -> FeatureStore:
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
        row_shape=(network.backbone.spec.dim,),
        rows_per_shard=ROWS_PER_SHARD,
        batch_size=batch_size or BATCH_SIZES.get(network.device.type, 64),
        threads=torch.get_num_threads(),
        provenance=provenance,
    )
    return FeatureStore(path)


def _compute_all(
    jobs: Sequence[_Job],
    dataset: ImageDataset,
    root: Path,
    pool: Executor,
    part: tuple[int, int] | None,
    say: Callable[[str], object],
) -> list[int]:
    """Compute and commit every owed shard of every job; return the images computed per job.

    Jobs that owe the same shard share one decoding of its images.
    """
    columns = [dataset.table[name].tolist() for name in ("id", "path", "member")]
    sources = {image: Source(image, path, member) for image, path, member in zip(*columns, strict=True)}
    passes: dict[tuple[Shard, int], list[int]] = {}
    for index, job in enumerate(jobs):
        for shard in job.plan.shards:
            if part is None or shard.number % part[1] == part[0] - 1:
                passes.setdefault((shard, job.batch_size), []).append(index)
    decodings = sum(len(shard.ids) for shard, _ in passes)
    once = len({image for shard, _ in passes for image in shard.ids})
    if decodings > once:
        say(f"the backbones do not owe the same shards: {decodings - once} images are decoded in a second pass")
    computed = [0] * len(jobs)
    total = sum(len(shard.ids) * len(sharing) for (shard, _), sharing in passes.items())
    with tqdm(total=total, unit="img", desc=f"extract {dataset.name}", disable=None, smoothing=0.05) as bar:
        while passes:
            progress = False
            for (shard, batch_size), sharing in list(passes.items()):
                with ExitStack() as leases:
                    mine = [index for index in sharing if _lease(leases, jobs[index].store, shard.number)]
                    # A shard that another process committed since the plan was read costs nothing.
                    owed = [index for index in mine if shard.number not in jobs[index].store.committed()]
                    if owed:
                        _compute([jobs[index] for index in owed], shard, batch_size, root, sources, pool, bar.update)
                for index in owed:
                    computed[index] += len(shard.ids)
                left = [index for index in sharing if index not in mine]
                if left:
                    passes[shard, batch_size] = left
                else:
                    del passes[shard, batch_size]
                progress |= bool(mine)
            if not progress:
                time.sleep(_POLL_SECONDS)
    for job, count in zip(jobs, computed, strict=True):
        if count or not any(job.store.path.glob("view.*")):
            write_view(job.store.path)
    return computed


def _compute(
    jobs: Sequence[_Job],
    shard: Shard,
    batch_size: int,
    root: Path,
    sources: Mapping[str, Source],
    pool: Executor,
    on_rows: Callable[[int], object],
) -> None:
    # An image that left the dataset after its shard was planned keeps its row, marked unreadable.
    wanted = [sources.get(image, Source(image, "", -1)) for image in shard.ids]
    networks = [job.network for job in jobs]
    rows = compute_shard(root, wanted, networks, batch_size=batch_size, pool=pool, on_rows=on_rows)
    for job, shard_rows in zip(jobs, rows, strict=True):
        commit_shard(job.store.path, shard.number, shard_rows)


def _lease(stack: ExitStack, store: FeatureStore, number: int) -> bool:
    lease = Lease.acquire(store.path, number)
    if lease is None:
        return False
    stack.callback(lease.release)
    return True


def _summary(job: _Job, dataset: ImageDataset, computed: int, seconds: float) -> Extraction:
    store = FeatureStore(job.store.path).restrict(dataset.table["id"].tolist())
    name = job.network.backbone.spec.name
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
        dict(store.quarantined),
        seconds,
        tuple(notes),
    )


def _say_what_differs(store: FeatureStore, folder: Path, say: Callable[[str], object]) -> None:
    """Tell why the features of a backbone that is cached already are computed anew: a stale cache is never served."""
    for path in sorted(folder.glob(f"{slug(store.recipe.backbone)}-*")):
        other = FeatureStore(path)
        if path == store.path or other.recipe.backbone != store.recipe.backbone or not other.committed():
            continue
        differences = store.recipe.differences(other.recipe)
        what = ", ".join(f"{name} {theirs} there, {mine} now" for name, (mine, theirs) in differences.items())
        say(
            f"{store.recipe.backbone} is cached under another recipe ({path.name}: {what}); "
            "all images are extracted under this one, and `embcache probe --recipe PREFIX` tells the two apart"
        )
