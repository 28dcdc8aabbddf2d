"""What a probe reads: what is cached under which names, the splits over it, and features by row."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embcache.config import ProbeConfig, ProtocolConfig
from embcache.data.dataset import ImageDataset, read_snapshot
from embcache.data.groups import IntArray
from embcache.errors import DatasetError, StoreError, StoreNotFoundError, UsageError, first_few
from embcache.paths import PathLike, home_dir, skip, slug
from embcache.probe.feature_rows import Streamed
from embcache.probe.protocol import Sides, Splits, divide, plan_splits, read_splits, subset_sizes, write_splits
from embcache.store.feature_store import FeatureStore, fill_command, find_stores, list_stores, several_match

PAPER_SET = ("simclr", "swav", "dino")  # what a head fuses by default (Section 5.6)


class KnownImages(Protocol):
    """What splits must know of images; a store has it."""

    @property
    def digests(self) -> Mapping[str, str]:
        """Sha256 of the bytes, by id, where it is known."""

    @property
    def quarantined(self) -> Mapping[str, str]:
        """Why an image could not be read, by id."""


def cached_datasets(home: PathLike | None = None) -> list[str]:
    """Names of the datasets that have a feature store, sorted."""
    names = set()
    for folder in {store.path.parent for store in list_stores(home)}:
        try:
            snapshot = read_snapshot(folder.name, home)
            names.add(folder.name if snapshot is None else snapshot.name)
        except DatasetError as error:
            skip(folder, error)
    return sorted(names)


def cached_backbones(
    dataset: str, home: PathLike | None = None, views: int | None = None, *, plain: bool = False
) -> list[str]:
    """Backbones whose vectors are cached for a dataset, sorted; of several ``views`` only those with so many.

    ``plain`` leaves those out that are cached with several views alone, where ``views`` are not wanted.
    """
    return sorted({
        store.recipe.backbone
        for store in list_stores(home, dataset)
        if (store.row_shape[:-1] == (views,) if views and views > 1 else len(store.row_shape) in (1, 2 - plain))
        and not store.holds_patches
    })  # fmt: skip


def open_stores(
    ds: ImageDataset,
    sets: Sequence[Sequence[str]],
    home: PathLike | None = None,
    recipe: str | None = None,
    views: int = 1,
) -> dict[str, FeatureStore]:
    """The store of every backbone named in ``sets``."""
    wanted = list(dict.fromkeys(backbone for names in sets for backbone in names))
    prefixes = [prefix.strip() for prefix in recipe.split(",")] if recipe else []
    fingerprints: dict[str, list[str]] = {backbone: [] for backbone in wanted}
    for store in list_stores(home, ds.name) if prefixes else ():
        fingerprints.setdefault(store.recipe.backbone, []).append(store.recipe.fingerprint)
    prefix_of: dict[str, str] = {}
    for prefix in prefixes:
        fits = [b for b in wanted if any(fingerprint.startswith(prefix) for fingerprint in fingerprints[b])]
        if not fits or not prefix:
            known = ", ".join(f"{fingerprint[:12]} ({b})" for b in wanted for fingerprint in fingerprints[b])
            raise UsageError(
                "--recipe fits none of the backbones", code="unknown-recipe",
                expected=f"first digits of one of {known}", found=repr(prefix), fix="embcache ls",
            )  # fmt: skip
        prefix_of |= dict.fromkeys(fits, prefix)
    several = views if views > 1 else None
    found = {backbone: find_stores(backbone, ds, home, prefix_of.get(backbone), several) for backbone in wanted}
    if ambiguous := {backbone: matching for backbone, matching in found.items() if len(matching) > 1}:
        raise several_match(ambiguous, ds, sorted({*prefix_of.values()} - {*map(prefix_of.get, ambiguous)}))
    stores = {backbone: matching[0].restrict(ds.table["id"]) for backbone, matching in found.items()}
    for backbone, store in stores.items():
        if len(store.row_shape) not in (1, 2) or store.holds_patches:
            raise UsageError(
                f"the store of {backbone} does not hold vectors", code="not-vectors",
                found=f"rows of shape {store.row_shape}", where=store.path,
                fix=f"embcache extract --backbone {store.recipe.typed} --tokens mean …, one vector per image",
            )  # fmt: skip
    return stores


def plan_for(
    ds: ImageDataset,
    stores: Sequence[KnownImages],
    *,
    subsets: Sequence[str | int],
    config: ProtocolConfig | None = None,
    **options: Any,
) -> Splits:
    """The splits of a dataset as its stores know it: identical bytes grouped, unreadable images left out."""
    config = ProtocolConfig.make(config, options)
    digests, unreadable = _known(stores)
    if config.splits is None:
        return plan_splits(ds, subsets=subsets, config=config, digests=digests, unreadable=unreadable)
    plan = read_splits(Path(config.splits), ds, digests, unreadable, config.exclude_test_overlap)
    plan = plan.rename({str(size): name for name, size in ds.subset_sizes.items() if name not in plan.subsets})
    lacking = [name for name in (subset_sizes(ds, subsets) if subsets else ()) if name not in plan.subsets]
    if lacking:
        raise UsageError(
            f"the splits file does not list subset {', '.join(lacking)}", code="unknown-subset",
            expected=", ".join(plan.subsets), where=config.splits, fix=f"--subset {','.join(plan.subsets)}",
        )  # fmt: skip
    return plan


def divide_for(ds: ImageDataset, stores: Sequence[KnownImages], **options: Any) -> Sides:
    """Pool and test set of a dataset as its stores know it, without folds."""
    digests, unreadable = _known(stores)
    return divide(ds, digests=digests, unreadable=unreadable, **options)


def _known(stores: Sequence[KnownImages]) -> tuple[dict[str, str], set[str]]:
    digests = {name: digest for store in stores for name, digest in store.digests.items()}
    return digests, {name for store in stores for name in store.quarantined}


def plan_cached(
    ds: ImageDataset,
    *,
    home: PathLike | None = None,
    backbone: str | None = None,
    subsets: Sequence[str | int],
    **options: Any,
) -> tuple[Splits, FeatureStore | None]:
    """The splits that a probe of ``ds`` would draw; ``options`` as for `plan_for`."""
    stores = [s for s in list_stores(home, ds.name) if backbone in (None, s.recipe.backbone)]
    if backbone is not None and not stores:
        raise StoreNotFoundError(
            f"no features of {backbone} are cached for {ds.name}", code="store-not-found",
            found=", ".join(cached_backbones(ds.name, home)) or "nothing cached for this dataset",
            where=home_dir(home) / slug(ds.name), fix="leave --backbone out",
        )  # fmt: skip
    store = stores[0].restrict(ds.table["id"]) if stores else None
    return plan_for(ds, [] if store is None else [store], subsets=subsets, **options), store


@dataclass(frozen=True)
class ImportedSplits:
    """A splits file that was checked and kept."""

    name: str  # what ``--splits`` takes
    path: Path
    splits: Splits


def import_splits(file: Path, ds: ImageDataset, home: PathLike | None = None) -> ImportedSplits:
    """Check a splits file against a dataset and keep it under ``<home>/<dataset>/splits``."""
    splits, _ = plan_cached(ds, home=home, splits=file, subsets=())
    name = f"{file.stem}-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}"
    path = _splits_dir(ds, home) / f"{slug(name)}.json"
    write_splits(splits, path)
    return ImportedSplits(path.stem, path, splits)


def find_splits(name: str, ds: ImageDataset, home: PathLike | None = None) -> Path:
    """The splits file at path ``name``, or the imported one of that name."""
    imported = _splits_dir(ds, home) / f"{name}.json"
    if Path(name).expanduser().is_file():
        return Path(name).expanduser()
    if "/" not in name and imported.is_file():
        return imported
    known = sorted(path.stem for path in _splits_dir(ds, home).glob("*.json"))
    raise UsageError(
        "there is no such splits file", code="splits-not-found",
        expected="a file" + (f", or one of {', '.join(known)}" if known else ""), found=name, where="--splits",
        fix=f"embcache splits export --dataset {ds.name} --output FILE",
    )  # fmt: skip


def _splits_dir(ds: ImageDataset, home: PathLike | None) -> Path:
    return home_dir(home) / slug(ds.name) / "splits"


def load_features(
    store: FeatureStore,
    ds: ImageDataset,
    ids: Sequence[str] | NDArray[np.object_],
    views: int = 1,
    *,
    keep_half: bool = False,
) -> Tensor:
    """Features (n, D) of some images of a dataset, raw."""
    rows, stored = rows_of(store, ds, ids, views), store.features
    kept = np.dtype(np.float16) if stored.dtype == np.float16 and keep_half else np.dtype(np.float32)
    plain = stored.ndim == 3 and views == 1  # the first view is the image as it is
    if stored.dtype == kept and not plain:
        return torch.from_numpy(stored[rows])
    # What is not kept, other views and wider numbers, is not held for more rows than a few shards have.
    x = np.empty((len(rows), *(stored.shape[2:] if plain else stored.shape[1:])), kept)
    order = np.argsort(stored.shards[rows], kind="stable")
    first = np.flatnonzero(np.diff(stored.shards[rows[order]], prepend=-1))  # where each shard begins
    for part in np.split(order, first[4::4]) if len(order) else ():
        read = stored[rows[part]]
        x[part] = read[:, 0] if plain else read
    return torch.from_numpy(x)


def rows_of(
    store: FeatureStore, ds: ImageDataset, ids: Sequence[str] | NDArray[np.object_], views: int = 1
) -> IntArray:
    """Where in ``store.features`` some images of a dataset lie."""
    rows: IntArray = store.rows_of(ids)
    missing = [id_ for id_, row in zip(ids, rows, strict=True) if row < 0]
    if missing:
        raise StoreError(
            f"{len(missing):,} of {len(rows):,} images have no features of {store.recipe.backbone} yet",
            code="features-missing", found=f"no row for {first_few(missing)}", where=store.path,
            fix=fill_command(store, ds) + (f" --views {views}" if views > 1 else ""),
        )  # fmt: skip
    return rows


def stream_features(
    stores: Mapping[str, FeatureStore], ds: ImageDataset, ids: Sequence[str] | NDArray[np.object_], config: ProbeConfig
) -> Streamed:
    """Features of some images of a dataset, read shard by shard whenever they are needed."""
    assert config.buffer is not None
    places = {backbone: rows_of(store, ds, ids, config.views) for backbone, store in stores.items()}
    first = next(iter(stores))
    shards = stores[first].features.shards
    numbers, counts = np.unique(shards, return_counts=True)
    return Streamed(
        x={backbone: store.features for backbone, store in stores.items()}, places=places,
        shards=shards[places[first]], shard_rows=dict(zip(numbers.tolist(), counts.tolist(), strict=True)),
        buffer_rows=config.buffer, n_views=config.views, stream=str(config.seed), device=config.device,
    )  # fmt: skip


def digest_shards(stores: Mapping[str, FeatureStore], ds: ImageDataset, ids: NDArray[np.object_], views: int) -> str:
    """SHA-256 (hex) of the shard of each image, and of the rows of each shard: an epoch's order follows from both."""
    first = next(iter(stores.values()))
    lies = hashlib.sha256()
    numbers, counts = np.unique(first.features.shards, return_counts=True)
    for array in (numbers, counts, first.features.shards[rows_of(first, ds, ids, views)]):
        lies.update(np.asarray(array, dtype="<i8").tobytes())
    return lies.hexdigest()


def digest_images(stores: Mapping[str, KnownImages], ids: Sequence[str] | NDArray[np.object_]) -> str:
    """SHA-256 (hex) of which image bytes the features were made from: a replaced image makes another result."""
    images = hashlib.sha256()
    for backbone, store in stores.items():
        digests = store.digests
        images.update("".join([f"{backbone}\n", *(f"{name}\0{digests.get(name, '')}\n" for name in ids)]).encode())
    return images.hexdigest()
