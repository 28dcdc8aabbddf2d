"""Nearest neighbors in cached features, and contact sheets: the images behind rows of a cache, where they are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from embcache.config import NeighborsConfig
from embcache.data.dataset import ImageDataset
from embcache.data.images import read_image
from embcache.errors import ImageError, UsageError, first_few
from embcache.figures.plots import Picture, plot_sheet
from embcache.figures.shown import backbones_or_cached
from embcache.paths import PathLike
from embcache.probe.inputs import open_stores
from embcache.probe.layers import standard_directions
from embcache.results.mistakes import Miss, Mistake
from embcache.sealed import Plain
from embcache.store.feature_store import FeatureStore

SIDE = 192  # pixels of a thumbnail


@dataclass(frozen=True)
class Neighbor:
    """One image near another."""

    id: str
    similarity: float  # cosine of the standardized features of the two, −1 … 1
    label: Any  # value of the target as JSON data: -1 of a class that is not known, None of a number
    words: str  # the same for people; empty where it is not known
    split: str
    group: str


@dataclass(frozen=True)
class Neighbors(Plain):
    """The nearest images of one image under one backbone, nearest first."""

    backbone: str
    image: Neighbor
    nearest: tuple[Neighbor, ...]


def find_neighbors(
    ds: ImageDataset,
    image: str,
    backbones: Sequence[str] = (),
    config: NeighborsConfig | None = None,
    *,
    home: PathLike | None = None,
    **options: Any,
) -> list[Neighbors]:
    """The k images nearest to one (its ID, or a unique end of it) under each backbone, by default all cached ones."""
    config = NeighborsConfig.make(config, options)
    ids = ds.table["id"].tolist()
    fits = [image] if image in set(ids) else [id_ for id_ in ids if image and id_.endswith(image)]
    if len(fits) != 1:
        raise UsageError(
            "several images match" if fits else f"{ds.name} has no such image", code="unknown-image",
            expected=first_few(fits or ids), found=repr(image), fix="--image ID",
        )  # fmt: skip
    stores = open_stores(ds, [backbones_or_cached(ds, backbones, home)], home, config.recipe)
    return [_nearest(ds, store, str(fits[0]), config.k) for store in stores.values()]


def _nearest(ds: ImageDataset, store: FeatureStore, id_: str, k: int) -> Neighbors:
    ids = store.ids.tolist()
    if id_ not in ids:
        reason = store.quarantined.get(id_, "it has no features yet")
        raise UsageError(f"{store.recipe.backbone} has no features of this image", code="image-without-features",
                         found=f"{id_!r}: {reason}", where=store.path)  # fmt: skip
    x = store.features[:]
    directions = standard_directions(x if x.ndim == 2 else x[:, 0])
    place = ids.index(id_)
    similarity = directions @ directions[place]
    similarity[place] = -np.inf
    # Of equal similarity the earlier image comes first, on every machine.
    order = np.argsort(-similarity, kind="stable")[: min(k, len(ids) - 1)]
    similarity[place] = 1.0
    rows = ds.table.set_index("id").loc[[ids[i] for i in (place, *order)]]
    values = ds.task.values(rows)
    labels = zip(ds.task.plain(values), map(ds.task.words, values), strict=True)
    columns = zip(rows.index, labels, rows["split"], rows["group"], (place, *order), strict=True)
    image, *nearest = (Neighbor(id_, float(similarity[i]), *y, str(s), str(g)) for id_, y, s, g, i in columns)
    return Neighbors(store.recipe.backbone, image, tuple(nearest))


def draw_neighbors(ds: ImageDataset, found: Sequence[Neighbors], target: Path) -> Path:
    """One row per backbone: the image, then its neighbors; a frame marks those of another class, or other findings."""
    rows = []
    for each in found:
        query, pictures = each.image, []
        for near in (query, *each.nearest):
            remark = f"{near.similarity:.2f}" + (" · same group" if near.group == query.group else "")
            label, last = near.words or "no label", "the image" if near is query else remark
            text = f"{_short(near.id)}\n{label} · {near.split}\n{last}"
            differs = ds.kind != "number" and near.words != query.words and bool(near.words and query.words)
            pictures.append(Picture(thumbnail(ds, near.id), text, differs))
        rows.append((each.backbone, pictures))
    return plot_sheet(rows, f"nearest in cached features: {_short(found[0].image.id)}", target)


def draw_mistakes(ds: ImageDataset, mistakes: Sequence[Mistake] | Sequence[Miss], title: str, target: Path) -> int:
    """Draw the images of mistakes, with what is wrong beneath each; returns how many could be read."""
    pictures = [Picture(thumbnail(ds, m.id), f"{_short(m.id)}\n{m.words}") for m in mistakes]
    found = sum(picture.pixels is not None for picture in pictures)
    if found:
        plot_sheet([("", pictures[start : start + 6]) for start in range(0, len(pictures), 6)], title, target)
    return found


def thumbnail(ds: ImageDataset, id_: str, side: int = SIDE) -> NDArray[np.uint8] | None:
    """An image of a dataset scaled to fit a square, uint8 (h, w, 3); None where it is missing or cannot be read."""
    found = ds.table[ds.table["id"] == id_]
    if ds.root is None or found.empty:
        return None
    try:
        picture = Image.fromarray(read_image(ds.root, str(found["path"].iloc[0]), str(found["place"].iloc[0]))[0])
    except (ImageError, OSError):
        return None
    picture.thumbnail((side, side))
    return np.asarray(picture)


def _short(text: str, most: int = 22) -> str:
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return printable if len(printable) <= most else "…" + printable[-most + 1 :]
