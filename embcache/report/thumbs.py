"""Thumbnails as sprite sheets: a few WebP pictures of many small images each, within a budget of bytes."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from embcache.cores import usable_cores
from embcache.data.dataset import ImageDataset
from embcache.data.images import ImageRef, image_refs_of, read_image
from embcache.errors import ImageError

BUDGET = 4_800_000
"""Bytes of all thumbnails of a page, as base64."""

ACROSS = 16  # thumbnails in a row of a sheet; a sheet is as high as wide
_GREY = (128, 128, 128)
_TRIES = ((72, 60), (64, 55), (56, 50), (48, 45), (40, 40), (32, 35), (24, 30))  # side in pixels, WebP quality


@dataclass(frozen=True)
class Sheets:
    """Thumbnails of a list of images."""

    sheets: tuple[str, ...]  # webP pictures as base64, ``ACROSS`` × ``ACROSS`` thumbnails each
    side: int  # of a thumbnail, in pixels
    place: tuple[int, ...]  # for each image its running number over all sheets; −1 without a thumbnail


def make_sheets(ds: ImageDataset, ids: Sequence[str], budget: int = BUDGET) -> Sheets | None:
    """Thumbnails of some images of a dataset, as large and as good as the budget allows."""
    root = ds.root
    if root is None or not root.is_dir() or not ids:
        return None
    sources = image_refs_of(ds.table, ids)
    largest = _TRIES[0][0]

    def small(source: ImageRef) -> Image.Image | None:
        try:
            pixels, _ = read_image(root, source.path, source.place)
        except (ImageError, OSError):
            return None
        picture = Image.fromarray(pixels)
        picture.thumbnail((largest, largest))
        return picture

    with ThreadPoolExecutor(usable_cores()) as pool:
        pictures = list(pool.map(small, sources))
    kept = [picture for picture in pictures if picture is not None]
    if not kept:
        return None
    numbers = iter(range(len(kept)))
    place = tuple(-1 if picture is None else next(numbers) for picture in pictures)
    sheets: list[str] = []
    side = largest
    for side, quality in _TRIES:
        # One sheet tells roughly what all will take; the last try is taken whatever it weighs.
        first = _sheet(kept[: ACROSS**2], side, quality)
        if len(first) * len(kept) / min(len(kept), ACROSS**2) > 1.1 * budget and (side, quality) != _TRIES[-1]:
            continue
        rest = [_sheet(kept[at : at + ACROSS**2], side, quality) for at in range(ACROSS**2, len(kept), ACROSS**2)]
        sheets = [first, *rest]
        if sum(map(len, sheets)) <= budget:
            break
    return Sheets(tuple(sheets), side, place)


def _sheet(pictures: Sequence[Image.Image], side: int, quality: int) -> str:
    sheet = Image.new("RGB", (ACROSS * side, -(-len(pictures) // ACROSS) * side), _GREY)
    for number, picture in enumerate(pictures):
        row, column = divmod(number, ACROSS)
        fitted = picture.copy()
        fitted.thumbnail((side, side))
        left, top = (side - fitted.width) // 2, (side - fitted.height) // 2
        sheet.paste(fitted, (column * side + left, row * side + top))
    data = BytesIO()
    sheet.save(data, "WEBP", quality=quality, method=4)  # no metadata is written
    return base64.b64encode(data.getvalue()).decode("ascii")
