"""The network and the pixels that a store was made with, made again from its recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embcache.cores import default_workers
from embcache.data.budget import Decoding, check_max_pixels
from embcache.data.dataset import ImageDataset
from embcache.data.images import Source, sources_of
from embcache.errors import RecipeError, StoreError
from embcache.extract.extract import make_recipe, recipe_network, recipe_transform
from embcache.extract.pixels import pixel_recipe, pixel_rows
from embcache.extract.scan import image_root
from embcache.extract.worker import compute_shard
from embcache.paths import PathLike
from embcache.store.commit import ShardRows
from embcache.store.feature_store import PIXELS, FeatureStore, extract_command
from embcache.store.header import StoreHeader
from embcache.store.reading import read_header
from embcache.store.recipe import Recipe

# Largest allowed |cached - computed| / max |computed| of an image, by precision: the same arithmetic in other batches.
TOLERANCES = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 5e-3, "bf16": 2e-2}
FLOAT16_TOLERANCE = 1e-3  # added where features are kept as float16: half a unit in the last place is 2**-11


# Makes rows of images, in their order.
Maker = Callable[[Sequence[Source], Executor, int, Callable[[int], object], Decoding], ShardRows]


def make_again(
    header: StoreHeader,
    dataset: ImageDataset,
    *,
    home: PathLike | None = None,
    weights: Mapping[str, PathLike] | None = None,
    device: str = "auto",
) -> Maker:
    """What makes the rows of a store again: the images and, for features, the network with its weights."""
    root, recipe = image_root(dataset), header.recipe
    if recipe.backbone == PIXELS:
        framing = recipe_transform(recipe)
        refuse_another(recipe, pixel_recipe(framing), dataset)
        return lambda sources, *how: pixel_rows(root, sources, framing, *how)
    network = recipe_network(
        recipe,
        home=home,
        weights=(weights or {}).get(recipe.backbone),
        device=device,
        views=int(recipe.transform.get("views", 1)),
        augment=dataset.augment,
    )
    refuse_another(recipe, make_recipe(network), dataset)

    def features(
        sources: Sequence[Source],
        pool: Executor,
        batch_size: int,
        on_rows: Callable[[int], object],
        decoding: Decoding,
    ) -> ShardRows:
        (rows,) = compute_shard(
            root, sources, [network], batch_size=batch_size, pool=pool, on_rows=on_rows, decoding=decoding
        )
        return rows

    return features


def refuse_another(recipe: Recipe, now: Recipe, dataset: ImageDataset) -> None:
    """Raise a RecipeError unless what is made now is what the store holds."""
    if now == recipe:
        return
    differences = recipe.differences(now)
    pixels = recipe.backbone == PIXELS
    again = "the command that needs the pixels keeps new ones" if pixels else extract_command(recipe.backbone, dataset)
    raise RecipeError(
        f"the {'pixels' if pixels else f'features of {recipe.backbone}'} cannot be made again as they were; "
        "the store was not touched",
        expected="\n".join(f"{name} = {there}" for name, (there, _) in differences.items()),
        found="\n".join(f"{name} = {here}" for name, (_, here) in differences.items()),
        fix=f"a new extraction, which keeps a store of its own: {again}"
        if not pixels and "weights_sha256" not in differences
        else f"the weights that it was made with: --weights {recipe.backbone}=FILE; or a new extraction: {again}"
        if not pixels
        else again,
    )


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """So many threads for torch: sums are taken in another order with another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def usable_threads(number: int) -> int:
    """Threads a store was made with, as far as this machine can start them."""
    return max(1, min(number, 4 * (os.cpu_count() or 1)))


@dataclass(frozen=True)
class SampleCheck:
    """Random cached rows against rows computed now."""

    compared: int
    changed: tuple[str, ...]  # images with other bytes than then: left out
    unreadable: tuple[str, ...]
    difference: float  # largest |cached - computed| / max |computed| of an image
    tolerance: float
    worst: str  # the image with that difference

    @property
    def well(self) -> bool:
        """Whether every row is what its image gives, within the tolerance."""
        return self.compared > 0 and not self.unreadable and self.difference <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON data."""
        return {**asdict(self), "well": self.well}


def check_sample(
    path: Path,
    dataset: ImageDataset,
    number: int,
    *,
    home: PathLike | None = None,
    weights: Mapping[str, PathLike] | None = None,
    device: str = "auto",
    max_pixels: int | None = None,
) -> SampleCheck:
    """Compute ``number`` random rows of a store again from their images; raises as `make_again`."""
    header = read_header(path)
    decoding = Decoding() if max_pixels is None else Decoding(check_max_pixels(max_pixels))
    maker = make_again(header, dataset, home=home, weights=weights, device=device)
    store = FeatureStore(path).restrict(dataset.table["id"])
    if not len(store):
        raise StoreError("the store holds no readable image of this dataset", where=path, fix="embcache ls")
    chosen = np.sort(np.random.default_rng(0).choice(len(store), min(number, len(store)), replace=False))
    ids = store.ids[chosen].tolist()
    with ThreadPoolExecutor(default_workers()) as pool, torch_threads(usable_threads(header.threads)):
        rows = maker(sources_of(dataset.table, ids), pool, header.batch_size, lambda rows: None, decoding)
    unreadable = [id_ for id_, valid in zip(ids, rows.valid, strict=True) if not valid]
    digests = zip(ids, rows.digests, strict=True)
    changed = [id_ for id_, digest in digests if id_ not in unreadable and digest != (store.digests.get(id_) or digest)]
    cached, computed = (a.reshape(len(ids), -1).astype(np.float64) for a in (store.features[chosen], rows.features))
    scale = np.maximum(np.abs(computed).max(axis=1), np.finfo(np.float32).tiny)
    differences = dict(zip(ids, (np.abs(cached - computed).max(axis=1) / scale).tolist(), strict=True))
    for id_ in (*changed, *unreadable):
        del differences[id_]
    worst = max(differences, key=lambda id_: differences[id_], default="")
    tolerance = 0.0 if store.holds_pixels else TOLERANCES[header.recipe.precision]
    tolerance += FLOAT16_TOLERANCE if header.recipe.dtype == "float16" else 0.0
    return SampleCheck(
        len(differences), tuple(changed), tuple(unreadable), differences.get(worst, 0.0), tolerance, worst
    )
