"""Nearest neighbours of an image in cached features: what does a backbone take for alike?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embcache.data.dataset import ImageDataset
from embcache.errors import UsageError, check_number
from embcache.paths import PathLike
from embcache.probe.inputs import cached_backbones, open_stores
from embcache.probe.standard import standard_directions
from embcache.store.feature_store import FeatureStore


@dataclass(frozen=True)
class Neighbour:
    """One image near another."""

    id: str
    similarity: float  # cosine of the standardised features of the two, −1 … 1
    label: int  # −1 where there is none
    split: str
    group: str


@dataclass(frozen=True)
class Neighbours:
    """The nearest images of one image under one backbone, nearest first."""

    backbone: str
    image: Neighbour
    nearest: tuple[Neighbour, ...]


def find_neighbours(
    ds: ImageDataset,
    image: str,
    backbones: Sequence[str] = (),
    *,
    k: int = 8,
    home: PathLike | None = None,
    recipe: str | None = None,
) -> list[Neighbours]:
    """The k images nearest to one, under each backbone."""
    check_number("-k", k, 1, 1_000)
    id_ = _find(ds, image)
    names = list(dict.fromkeys(backbones)) or cached_backbones(ds.name, home)
    stores = open_stores(ds, [names], home, recipe)
    return [_nearest(ds, store, id_, k) for store in stores.values()]


def _find(ds: ImageDataset, image: str) -> str:
    ids = ds.table["id"].tolist()
    if image in set(ids):
        return image
    fits = [id_ for id_ in ids if image and id_.endswith(image)]
    if len(fits) != 1:
        raise UsageError(
            "several images are called so" if fits else f"{ds.name} has no such image",
            expected=", ".join((fits or ids)[:5]) + (" …" if len(fits or ids) > 5 else ""),
            found=repr(image),
            fix="--image ID",
        )
    return str(fits[0])


def _nearest(ds: ImageDataset, store: FeatureStore, id_: str, k: int) -> Neighbours:
    ids = store.ids.tolist()
    if id_ not in ids:
        reason = store.quarantined.get(id_, "it has no features yet")
        raise UsageError(
            f"{store.recipe.backbone} has no features of this image", found=f"{id_!r}: {reason}", where=store.path
        )
    x = store.features[:]
    directions = standard_directions(x if x.ndim == 2 else x[:, 0])
    place = ids.index(id_)
    similarity = directions @ directions[place]
    similarity[place] = -np.inf
    # Of equal similarity the earlier image comes first, on every machine.
    order = np.argsort(-similarity, kind="stable")[: min(k, len(ids) - 1)]
    rows = ds.table.set_index("id")

    def describe(i: int, value: float) -> Neighbour:
        row = rows.loc[ids[i]]
        return Neighbour(ids[i], value, int(row["label"]), str(row["split"]), str(row["group"]))

    nearest = tuple(describe(int(i), float(similarity[i])) for i in order)
    return Neighbours(store.recipe.backbone, describe(place, 1.0), nearest)
