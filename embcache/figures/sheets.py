"""Contact sheets: the images behind rows of a cache, where they are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from embcache.data.dataset import ImageDataset
from embcache.data.images import read_image
from embcache.errors import ImageError
from embcache.figures.neighbors import Neighbour, Neighbours
from embcache.figures.plots import Cell, plot_sheet

SIDE = 192  # pixels of a thumbnail


def thumbnail(ds: ImageDataset, id_: str, side: int = SIDE) -> NDArray[np.uint8] | None:
    """An image of a dataset scaled to fit a square, uint8 (h, w, 3); None where it is not here or cannot be read."""
    if ds.root is None:
        return None
    found = ds.table[ds.table["id"] == id_]
    if found.empty:
        return None
    row = found.iloc[0]
    try:
        pixels, _ = read_image(ds.root, str(row["path"]), str(row["place"]))
    except (ImageError, OSError):
        return None
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side))
    return np.asarray(picture)


def draw_neighbours(ds: ImageDataset, found: Sequence[Neighbours], target: Path) -> Path:
    """A row for each backbone: the image, then its neighbours; a frame marks those of another class."""
    rows = []
    for each in found:
        cells = [_cell(ds, each.image, each.image, "the image")]
        for near in each.nearest:
            remark = f"{near.similarity:.2f}" + (" · same group" if near.group == each.image.group else "")
            cells.append(_cell(ds, near, each.image, remark))
        rows.append((each.backbone, cells))
    return plot_sheet(rows, f"nearest in cached features: {_short(found[0].image.id)}", target)


def draw_pictures(
    dataset: ImageDataset, captions: Sequence[tuple[str, str]], title: str, target: Path, *, columns: int = 6
) -> int:
    """Images by id with a caption each, row by row."""
    cells = [Cell(thumbnail(dataset, id_), f"{_short(id_)}\n{caption}") for id_, caption in captions]
    found = sum(cell.pixels is not None for cell in cells)
    if found:
        rows = [("", cells[start : start + columns]) for start in range(0, len(cells), columns)]
        plot_sheet(rows, title, target)
    return found


def _cell(ds: ImageDataset, image: Neighbour, query: Neighbour, remark: str) -> Cell:
    name = ds.class_names[image.label] if image.label >= 0 else "no label"
    differs = image.label != query.label and min(image.label, query.label) >= 0
    return Cell(thumbnail(ds, image.id), f"{_short(image.id)}\n{name} · {image.split}\n{remark}", differs)


def _short(text: str, most: int = 22) -> str:
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return printable if len(printable) <= most else "…" + printable[-most + 1 :]
