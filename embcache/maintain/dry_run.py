"""What an extraction would compute, and why, field by field (``embcache extract --dry-run``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from embcache.config import ExtractConfig
from embcache.cores import default_workers
from embcache.data.dataset import ImageDataset
from embcache.errors import StoreError
from embcache.extract.extract import decoding_of, make_recipe, open_networks
from embcache.extract.scan import DatasetFiles, plan_store, scan_dataset
from embcache.extract.worker import FrozenNetwork
from embcache.maintain.verify import find_stores
from embcache.paths import PathLike
from embcache.sealed import plain
from embcache.store.feature_store import FeatureStore

_FIRST = 20  # ids of added, changed and removed images in the JSON


@dataclass(frozen=True)
class Cached:
    """A store of the same backbone over the same dataset."""

    fingerprint: str
    path: Path
    rows: int  # images that it holds, readable or not
    differs: Mapping[str, tuple[Any, Any]]  # field → (wanted, cached); empty where an extraction would continue it
    missing: int  # images of the dataset that it does not hold
    removed: int  # images that it holds and the dataset does not
    problem: str = ""  # why it cannot be read; the rest means nothing then


@dataclass(frozen=True)
class DryRun:
    """What an extraction by one backbone would do."""

    backbone: str
    fingerprint: str
    recipe: Mapping[str, Any]
    cached: tuple[Cached, ...]  # the most alike first
    images: int
    added: tuple[str, ...]  # all images where no store has this recipe
    changed: tuple[str, ...]  # cached, and to be computed again
    removed: tuple[str, ...]  # cached, and no longer in the dataset
    bytes: int  # that the new features take

    @property
    def match(self) -> Cached | None:
        """The store with this recipe."""
        return next((each for each in self.cached if not each.differs and not each.problem), None)

    @property
    def owed(self) -> int:
        """Images that would be computed."""
        return len(self.added) + len(self.changed)

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON data."""

        def differs(each: Cached) -> dict[str, Any]:
            return {name: {"wanted": mine, "cached": theirs} for name, (mine, theirs) in each.differs.items()}

        first = {"added": self.added, "changed": self.changed, "removed": self.removed}
        return {
            "backbone": self.backbone,
            "fingerprint": self.fingerprint,
            "recipe": plain(self.recipe),
            "match": None if self.match is None else str(self.match.path),
            "cached": [{**plain(each), "differs": differs(each)} for each in self.cached],
            "images": self.images,
            "owed": self.owed,
            "bytes": self.bytes,
            **{name: {"number": len(ids), "first": list(ids[:_FIRST])} for name, ids in first.items()},
        }


def dry_run(
    names: Sequence[str], dataset: ImageDataset, config: ExtractConfig | None = None, *, home: PathLike | None = None
) -> list[DryRun]:
    """Compare what an extraction with this config wants with what is cached; nothing is written."""
    config = config or ExtractConfig()
    with ThreadPoolExecutor(default_workers()) as pool:
        files = scan_dataset(dataset, home, pool, decoding_of(config))
        networks = open_networks(names, dataset, files, config, home=home)
        return [
            _one(name, network, dataset, files, home, config.retry_quarantined)
            for name, network in zip(names, networks, strict=True)
        ]


def _one(
    name: str,
    network: FrozenNetwork,
    dataset: ImageDataset,
    files: DatasetFiles,
    home: PathLike | None,
    retry_quarantined: bool,
) -> DryRun:
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
    added, changed, gone = ids, [], []
    if match is not None:
        plan = plan_store(match, dataset, files.root, files.scan, publish=False, retry_quarantined=retry_quarantined)
        held, known = set(match.ids.tolist()) | set(match.quarantined), set(ids)
        owed = [image for shard in plan.shards for image in shard.ids]
        added = [image for image in owed if image not in held]
        changed = [image for image in owed if image in held and image in known]
        gone = sorted(held - known)
    return DryRun(
        backbone=name,
        fingerprint=recipe.fingerprint,
        recipe=recipe.to_json(),
        cached=(*sorted(cached, key=lambda each: len(each.differs)), *unreadable),
        images=len(ids),
        added=tuple(added),
        changed=tuple(changed),
        removed=tuple(gone),
        bytes=(len(added) + len(changed)) * prod(network.row_shape) * np.dtype(network.dtype).itemsize,
    )
