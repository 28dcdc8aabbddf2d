"""Why an extraction would compute anything, field by field, and what it would cost (``embcache why``)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from embcache.data.dataset import ImageDataset
from embcache.errors import StoreError
from embcache.extract.plan import plan_store
from embcache.extract.request import check_numbers, default_workers
from embcache.extract.run import BATCH_SIZES, make_recipe, open_networks
from embcache.extract.scan import DatasetFiles, scan_dataset
from embcache.extract.worker import FrozenNetwork, compute_shard
from embcache.paths import PathLike
from embcache.store.feature_store import FeatureStore
from embcache.upkeep.networks import sources_of
from embcache.upkeep.verify import find_stores

_FIRST = 20  # ids of each kind that are kept
_ENOUGH_SECONDS = 4.0  # a first pass that takes so long is measured itself


@dataclass(frozen=True)
class Cached:
    """A store of the same backbone over the same dataset.

    Attributes
    ----------
    fingerprint, path : str, Path
    rows : int
        Images that it holds, readable or not.
    differs : mapping of str to (JSON, JSON)
        Fields in which the wanted recipe and the store's differ: ``{field: (wanted, cached)}``; empty for the store
        that an extraction would go on with.
    missing, removed : int
        Images of the dataset that it does not hold, and images it holds that the dataset has no more.
    problem : str
        Why it cannot be read; the rest means nothing then.
    """

    fingerprint: str
    path: Path
    rows: int
    differs: Mapping[str, tuple[Any, Any]]
    missing: int
    removed: int
    problem: str = ""


@dataclass(frozen=True)
class Cost:
    """What an extraction would take.

    Attributes
    ----------
    images : int
        To go through the network.
    rate : float or None
        Images a second, measured now on some of them; None where nothing is owed or none can be read.
    seconds : float or None
        Of the whole.
    bytes, free : int
        That the features take, and that are free where they go.
    device : str
    """

    images: int
    rate: float | None
    seconds: float | None
    bytes: int
    free: int
    device: str


@dataclass(frozen=True)
class Why:
    """The answer for one backbone.

    Attributes
    ----------
    backbone, fingerprint : str
        Whose features are wanted, and under which recipe.
    recipe : mapping
        All of its fields.
    cached : tuple of Cached
        Stores of the backbone, the most alike first.
    images, held : int
        Of the dataset, and those of them that the store of just this recipe holds already.
    added, changed, removed : tuple of str
        Ids: not in that store, in it with other bytes, in it and not in the dataset. All of the dataset is added
        where there is no such store.
    cost : Cost
    """

    backbone: str
    fingerprint: str
    recipe: Mapping[str, Any]
    cached: tuple[Cached, ...]
    images: int
    held: int
    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    cost: Cost

    @property
    def match(self) -> Cached | None:
        """The store of just this recipe."""
        return next((each for each in self.cached if not each.differs and not each.problem), None)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON data; of each kind of images their number and the first."""
        return {
            "backbone": self.backbone,
            "fingerprint": self.fingerprint,
            "recipe": dict(self.recipe),
            "match": None if self.match is None else str(self.match.path),
            "cached": [
                {
                    **asdict(each),
                    "path": str(each.path),
                    "differs": {
                        name: {"wanted": mine, "cached": theirs} for name, (mine, theirs) in each.differs.items()
                    },
                }
                for each in self.cached
            ],
            "images": self.images,
            "held": self.held,
            **{
                kind: {"number": len(ids), "first": list(ids[:_FIRST])}
                for kind, ids in (("added", self.added), ("changed", self.changed), ("removed", self.removed))
            },
            "cost": asdict(self.cost),
        }


def explain(
    names: Sequence[str],
    dataset: ImageDataset,
    *,
    home: PathLike | None = None,
    weights: PathLike | Mapping[str, PathLike] | None = None,
    transform: str | None = None,
    device: str = "auto",
    precision: str = "fp32",
    views: int = 1,
    feature_dtype: str = "float32",
    batch_size: int | None = None,
    workers: int | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> list[Why]:
    """Compare what an extraction with these arguments wants with what is cached; nothing is written.

    Parameters
    ----------
    names : sequence of str
        Backbones.
    dataset, home, weights, transform, device, precision, views, feature_dtype, batch_size, workers
        As for `embcache.extract.run.run_extraction`.
    say : callable
        Told what is measured.

    Raises
    ------
    EmbcacheError
        As an extraction: a name or value does not exist, images or weights are not here.
    """
    check_numbers(batch_size, workers, None, views)
    answers = []
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        files = scan_dataset(dataset, home, pool)
        networks = open_networks(
            names, dataset, files, home=home, weights=weights, transform=transform, device=device,
            precision=precision, views=views, feature_dtype=feature_dtype,
        )  # fmt: skip
        for name, network in zip(names, networks, strict=True):
            answers.append(_one(name, network, dataset, files, home, batch_size, pool, say))
    return answers


def _one(
    name: str,
    network: FrozenNetwork,
    dataset: ImageDataset,
    files: DatasetFiles,
    home: PathLike | None,
    batch_size: int | None,
    pool: Executor,
    say: Callable[[str], object],
) -> Why:
    recipe, ids = make_recipe(network), dataset.table["id"].tolist()
    cached, match, unreadable = [], None, []
    for path in find_stores(home, dataset.name, [name]):
        try:
            store = FeatureStore(path)
            held = set(store.ids.tolist()) | set(store.quarantined)
        except StoreError as error:
            unreadable.append(Cached(path.name[-12:], path, 0, {}, 0, 0, f"{error.problem}; try: {error.fix}"))
            continue
        differs = recipe.differences(store.recipe)
        missing, removed = len(set(ids) - held), len(held - set(ids))
        cached.append(Cached(store.recipe.fingerprint[:12], path, len(held), differs, missing, removed))
        match = store if not differs else match
    added, changed, removed_ids = tuple(ids), tuple[str, ...](), tuple[str, ...]()
    if match is not None:
        plan = plan_store(match, dataset, files.root, files.scan, publish=False)
        held, known = set(match.ids.tolist()) | set(match.quarantined), set(ids)
        owed = [image for shard in plan.shards for image in shard.ids]
        added = tuple(image for image in owed if image not in held)
        changed = tuple(image for image in owed if image in held and image in known)
        removed_ids = tuple(sorted(held - known))
    batch = batch_size or (match.batch_size if match else BATCH_SIZES.get(network.device.type, 64))
    cost = _cost(network, dataset, [*added, *changed], files, batch, pool, say)
    return Why(
        backbone=name,
        fingerprint=recipe.fingerprint,
        recipe=recipe.to_json(),
        cached=(*sorted(cached, key=lambda each: len(each.differs)), *unreadable),
        images=len(ids),
        held=len(ids) - len(set(added).union(changed).intersection(ids)),
        added=added,
        changed=changed,
        removed=removed_ids,
        cost=cost,
    )


def _cost(
    network: FrozenNetwork,
    dataset: ImageDataset,
    owed: Sequence[str],
    files: DatasetFiles,
    batch: int,
    pool: Executor,
    say: Callable[[str], object],
) -> Cost:
    size = len(owed) * prod(network.row_shape) * np.dtype(network.dtype).itemsize
    folder = next(path for path in (files.folder, *files.folder.parents) if path.exists())
    free, device = shutil.disk_usage(folder).free, str(network.device)
    if not owed:
        return Cost(0, None, None, 0, free, device)
    # From all over the dataset: its images may come in several sizes.
    places = np.unique(np.linspace(0, len(owed) - 1, min(len(owed), 2 * batch)).astype(int))
    say(f"{network.backbone.spec.name}: measuring {len(places)} images on {device}")
    sources = sources_of(dataset, [owed[place] for place in places])
    for _ in range(2):  # the first pass also warms up
        started = time.perf_counter()
        (rows,) = compute_shard(files.root, sources, [network], batch_size=batch, pool=pool)
        taken = time.perf_counter() - started
        if taken > _ENOUGH_SECONDS:
            break
    # A batch that is not full takes as long as one that is.
    computed = -(-len(sources) // batch) * batch if len(owed) > len(sources) else len(sources)
    rate = computed / taken if rows.valid.any() else None
    return Cost(len(owed), rate, None if rate is None else len(owed) / rate, size, free, device)
