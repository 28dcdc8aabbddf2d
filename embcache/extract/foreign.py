"""Features that were made elsewhere, as a store: matched to a dataset's images by their names, planned and committed.

Such a store is marked foreign in its recipe, which holds a digest of names and features in place of that of weights:
equal features are one store whatever the file, others are another. They are never compared with images.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import embcache
from embcache.backbones.catalog import OWN_NAME, backbones
from embcache.config import ImportConfig
from embcache.data.dataset import ImageDataset, named_dataset
from embcache.errors import DatasetError, UsageError, first_few
from embcache.extract.feature_files import ForeignFeatures, read_features_file
from embcache.extract.quarantine import LEFT, parse_max_bad
from embcache.paths import PathLike, home_dir, slug
from embcache.sealed import canonical_json
from embcache.store.commit import (
    PlanEntry,
    ShardRows,
    commit_shard,
    create_store,
    publish_plan,
    refresh_view,
    write_snapshot,
)
from embcache.store.feature_store import FeatureStore, import_command, list_stores
from embcache.store.schema import FOREIGN, Recipe

_T = TypeVar("_T")
_ROWS_PER_SHARD = 4096
_SUFFIX = re.compile(r"(\.(ome|nii))?\.[A-Za-z][A-Za-z0-9]{0,5}$", re.IGNORECASE)
NO_FEATURES = "no features were imported for it"


@dataclass(frozen=True)
class Imported:
    """What an import found and did."""

    store: FeatureStore  # shows the images of the dataset
    features: int  # images of the dataset that have features
    added: int  # rows that this import wrote, those without features too
    matched_by: str  # what names of the file were compared with
    ignored: tuple[str, ...]  # names of the file that the dataset does not have
    without: tuple[str, ...]  # images of the dataset that the file does not have
    notes: tuple[str, ...]


def import_features(
    file: PathLike,
    dataset: ImageDataset | str,
    *,
    backbone: str,
    home: PathLike | None = None,
    config: ImportConfig | None = None,
    **options: Any,
) -> FeatureStore:
    """Take features that were made elsewhere as those of a backbone; they are probed and compared like any others.

    Parameters
    ----------
    file : path-like
        npz, npy, Parquet, CSV, HDF5 or Zarr with features (n, D) and names of images; TRIDENT's folder of HDF5 files,
        or kaiko-eva's of tensors.
    dataset : ImageDataset or str
        Names are compared with its ids, else with its paths, else with either without suffix.
    backbone : str
        Under which the features are cached; no name of ``embcache backbones``.
    home : path-like, optional
        Folder of stores; default ``$EMBCACHE_HOME``, else ``~/.cache/embcache``.
    config : ImportConfig, optional
        All options at once.
    **options
        Fields of `embcache.config.ImportConfig`, each an option of ``embcache import``: ``ids``, ``mean``, ``max_bad``,
        ``format``.

    Returns
    -------
    FeatureStore
        Rows float32 (or float16) of shape (D,), in the dataset's order. Images without features are left out and listed
        in ``quarantined``. The same features again change nothing; after the dataset grew, rows are added.

    Raises
    ------
    UsageError
        The file is not there, its format is not known, or the name is taken.
    DatasetError
        The file cannot be read, or its names do not match the dataset's.
    StoreError
        The store cannot be written.
    """
    dataset = named_dataset(dataset, home)
    return import_file(Path(file), dataset, backbone, ImportConfig.make(config, options), home=home).store


def import_file(
    file: Path, dataset: ImageDataset, backbone: str, config: ImportConfig, *, home: PathLike | None = None
) -> Imported:
    """As `import_features`, and what was done."""
    if not OWN_NAME.fullmatch(backbone) or backbone in backbones:
        raise UsageError(
            f"{backbone!r} cannot be the name of imported features", code="import-name",
            expected="letters, digits, dots, hyphens and underscores, and no name of `embcache backbones`",
            fix=f"--backbone-name my-{slug(backbone)}",
        )  # fmt: skip
    read = read_features_file(file, ids=config.ids, mean=config.mean)
    rows, rule, ignored = match_names(read.names, dataset, file)
    without = [id_ for id_ in dataset.table["id"].tolist() if id_ not in rows]
    allowed = parse_max_bad(config.max_bad, len(dataset))
    if len(without) > allowed:
        raise DatasetError(
            f"too many images have no features: {len(without):,} of {len(dataset):,}", code="import-incomplete",
            expected=f"at most {allowed:,} (--max-bad {config.max_bad})", found=first_few(without), where=file,
            fix=f"import a file with all of them; or go on without them: --max-bad {len(without)}",
        )  # fmt: skip
    folder = home_dir(home) / slug(dataset.name)
    path = create_store(
        folder, foreign_recipe(backbone, read), format=config.format, row_shape=read.features.shape[1:],
        rows_per_shard=min(_ROWS_PER_SHARD, max(len(dataset), 64)), batch_size=1, threads=1,
        provenance={"imported_from": str(file.resolve()), "embcache": embcache.__version__},
    )  # fmt: skip
    write_snapshot(folder, (dataset.whole or dataset).to_parquet_bytes())
    added = _fill(path, dataset.table["id"].tolist(), rows, read.features)
    refresh_view(path)
    notes = [*read.notes, *_others(path, backbone, home)]
    store = FeatureStore(path).restrict(dataset.table["id"])
    return Imported(store, len(rows), added, rule, tuple(ignored), tuple(without), tuple(notes))


def foreign_recipe(backbone: str, read: ForeignFeatures) -> Recipe:
    """The recipe of features that no network of this machine made: their digest takes the place of that of weights."""
    features = np.ascontiguousarray(read.features, read.features.dtype.newbyteorder("<"))
    digest = hashlib.sha256(canonical_json([features.dtype.str, features.shape[1]]).encode())
    for row in sorted(range(len(read.names)), key=lambda row: read.names[row].encode()):
        digest.update(read.names[row].encode() + b"\0" + features[row].tobytes())
    return Recipe(
        backbone=backbone, architecture=FOREIGN, weights_sha256=digest.hexdigest(), transform={"kind": "imported"},
        decoder="none", pooling="none", precision="fp32", dtype=str(read.features.dtype), numerics=1,
    )  # fmt: skip


# Which name is which image


def _stem(name: str) -> str:
    return _SUFFIX.sub("", name)


def _grouped(pairs: Iterable[tuple[str, _T]]) -> dict[str, list[_T]]:
    groups: dict[str, list[_T]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def match_names(names: Sequence[str], dataset: ImageDataset, file: Path) -> tuple[dict[str, int], str, list[str]]:
    """Row of the file by id of the image, what names were compared with, and names that no image has.

    All names are compared alike, as most images are found so: with ids, else paths, else either without suffix.
    """
    table, root = dataset.table, f"{dataset.root}/"

    def as_path(name: str) -> str:
        return name.replace("\\", "/").removeprefix(root).removeprefix("./")

    # The path of a container is that of many images.
    images = [
        (id_, () if place else (path,))
        for id_, path, place in zip(table["id"], table["path"], table["place"], strict=True)
    ]
    rules: list[tuple[str, Callable[[str], str], Callable[[str, tuple[str, ...]], set[str]]]] = [
        ("ID", str, lambda id_, path: {id_}),
        ("path", as_path, lambda id_, path: set(path)),
        ("ID or path without suffix", lambda name: _stem(as_path(name)),
         lambda id_, path: {_stem(id_), *map(_stem, path)}),
        ("file name without suffix", lambda name: _stem(as_path(name).rpartition("/")[2]),
         lambda id_, path: {_stem(each.rpartition("/")[2]) for each in path}),
    ]  # fmt: skip
    best: tuple[str, dict[str, list[str]], dict[str, list[int]]] = ("", {}, {})
    for rule, of_name, of_image in rules:
        known = _grouped((key, id_) for id_, path in images for key in of_image(id_, path))
        hits = {name: known.get(of_name(name), []) for name in names}
        found = _grouped((id_, row) for row, name in enumerate(names) for id_ in hits[name])
        if len(found) > len(best[2]):
            best = rule, hits, found
        if len(found) == len(images):
            break
    rule, hits, found = best
    if not found:
        raise DatasetError(
            f"no name of the file is that of an image of {dataset.name}", code="import-no-match", where=file,
            expected="IDs or paths such as " + first_few(table["id"].tolist(), 3), found=first_few(names, 3),
            fix="name the images as `embcache datasets` and `embcache export` do",
        )  # fmt: skip
    twice = [f"{name} is {' and '.join(ids[:3])}" for name, ids in hits.items() if len(ids) > 1]
    twice += [
        f"{' and '.join(names[row] for row in rows[:3])} are {id_}" for id_, rows in found.items() if len(rows) > 1
    ]
    if twice:
        raise DatasetError(
            f"names of the file fit several images by {rule}", code="import-ambiguous", where=file,
            expected="one name for each image", found=first_few(twice, 3), fix="name the images by their IDs",
        )  # fmt: skip
    return {id_: rows[0] for id_, rows in found.items()}, rule, [name for name, ids in hits.items() if not ids]


# Plan, rows, commit


def _fill(path: Path, ids: Sequence[str], rows: dict[str, int], features: np.ndarray) -> int:
    """Commit what a store lacks, first what an interrupted import has planned; the number of rows."""
    known, added = set(ids), 0
    while True:
        store = FeatureStore(path)
        committed, plans = set(store.committed()), store.plans()
        for number in sorted(plans.keys() - committed):
            owed = [entry.id for entry in plans[number]]
            added += len(owed) if commit_shard(path, number, _shard_rows(owed, known, rows, features)) else 0
        if plans.keys() - committed:
            continue  # another import may have committed some of them
        there, bad = set(store.ids.tolist()), store.quarantined
        fresh = [id_ for id_ in ids if id_ not in there and (id_ in rows or id_ not in bad or bad[id_] == LEFT)]
        if not fresh:
            return added
        first, size = max([*plans, *committed], default=-1) + 1, store.rows_per_shard
        for number, start in enumerate(range(0, len(fresh), size), start=first):
            if not publish_plan(path, number, [PlanEntry(id_, -1, -1) for id_ in fresh[start : start + size]]):
                break  # another process plans at the same moment: look again


def _shard_rows(owed: Sequence[str], known: set[str], rows: dict[str, int], features: np.ndarray) -> ShardRows:
    valid = np.array([id_ in rows for id_ in owed], dtype=bool)
    values = np.zeros((len(owed), *features.shape[1:]), features.dtype)
    values[valid] = features[[rows[id_] for id_ in owed if id_ in rows]]
    reasons = tuple("" if id_ in rows else NO_FEATURES if id_ in known else LEFT for id_ in owed)
    return ShardRows(tuple(owed), values, valid, ("",) * len(owed), reasons)


def _others(path: Path, backbone: str, home: PathLike | None) -> list[str]:
    stores = [store for store in list_stores(home, path.parent.name) if store.recipe.backbone == backbone]
    others = ", ".join(store.path.name for store in stores if store.path != path)
    said = f"other features are cached under the same name ({others}): --recipe {path.name[-12:]} chooses these, "
    return [said + "and rm -r drops a store that is not wanted"] if others else []


def refuse_foreign(names: Sequence[str], dataset: ImageDataset, home: PathLike | None) -> None:
    """`UsageError` where a name that is not a backbone's is that of imported features: they are not extracted."""
    unknown = [name for name in names if ":" not in name and name not in backbones]
    for store in list_stores(home, dataset.name) if unknown else []:
        if store.recipe.foreign and store.recipe.backbone in unknown:
            raise UsageError(
                f"the features of {store.recipe.backbone} were imported, and no network is known that makes them",
                code="foreign-features", where=store.path, found=f"--backbone {store.recipe.backbone}",
                fix=f"{import_command(store, dataset, home)}   (adds the features of new images, if the file has them)",
            )  # fmt: skip
