"""The network and the pixels that a store was made with, made again from its recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from embcache.data.budget import Decoding
from embcache.data.dataset import ImageDataset
from embcache.errors import RecipeError
from embcache.extract.backbones import load_backbone
from embcache.extract.batching import Source
from embcache.extract.pixels import decode_into, pixel_recipe
from embcache.extract.request import image_root
from embcache.extract.run import make_recipe
from embcache.extract.transforms import Transform
from embcache.extract.worker import FrozenNetwork, compute_shard, freeze
from embcache.paths import PathLike
from embcache.store.commit import ShardRows
from embcache.store.feature_store import PIXELS, extract_command
from embcache.store.header import StoreHeader
from embcache.store.recipe import Recipe


class Maker(Protocol):
    """Makes the rows of a store from the images."""

    def make(
        self,
        sources: Sequence[Source],
        pool: Executor,
        batch_size: int,
        on_rows: Callable[[int], object],
        decoding: Decoding | None = None,
    ) -> ShardRows:
        """Rows of some images, in their order; by default with the default limit on pixels."""


@dataclass(frozen=True)
class Features:
    """Features of a network."""

    root: Path
    network: FrozenNetwork

    def make(
        self,
        sources: Sequence[Source],
        pool: Executor,
        batch_size: int,
        on_rows: Callable[[int], object],
        decoding: Decoding | None = None,
    ) -> ShardRows:
        """Rows of some images, in their order."""
        (rows,) = compute_shard(
            self.root, sources, [self.network], batch_size=batch_size, pool=pool, on_rows=on_rows, decoding=decoding
        )
        return rows


@dataclass(frozen=True)
class Pixels:
    """Frames of images."""

    root: Path
    framing: Transform

    def make(
        self,
        sources: Sequence[Source],
        pool: Executor,
        batch_size: int,
        on_rows: Callable[[int], object],
        decoding: Decoding | None = None,
    ) -> ShardRows:
        """Rows of some images, in their order."""
        pixels = np.zeros((len(sources), *self.framing.size, 3), np.uint8)
        digests, reasons = decode_into(
            pixels, self.root, sources, self.framing, pool, batch_size=batch_size, on_rows=on_rows, decoding=decoding
        )
        valid = np.array([not reason for reason in reasons], dtype=bool)
        return ShardRows(tuple(source.id for source in sources), pixels, valid, tuple(digests), tuple(reasons))


def make_again(
    header: StoreHeader,
    dataset: ImageDataset,
    *,
    home: PathLike | None = None,
    weights: Mapping[str, PathLike] | None = None,
    device: str = "auto",
) -> Maker:
    """What makes the rows of a store again: the images and, for features, the network with its weights.

    Raises
    ------
    RecipeError
        What is made here and now differs from the store's recipe; the message says in what.
    DatasetNotFoundError, WeightsError, UsageError
        The images or the weights are not here, or the device is not.
    """
    root, recipe = image_root(dataset), header.recipe
    if recipe.backbone == PIXELS:
        framing = recipe_transform(recipe)
        refuse_another(recipe, pixel_recipe(framing), dataset)
        return Pixels(root, framing)
    network = recipe_network(recipe, dataset, home=home, weights=weights, device=device)
    refuse_another(recipe, make_recipe(network), dataset)
    return Features(root, network)


def recipe_network(
    recipe: Recipe,
    dataset: ImageDataset,
    *,
    home: PathLike | None = None,
    weights: Mapping[str, PathLike] | None = None,
    device: str = "auto",
) -> FrozenNetwork:
    """The network of a recipe, as far as weights and this version of embcache give it; the caller compares."""
    transform = recipe_transform(recipe)
    loaded = load_backbone(
        recipe.backbone, weights=(weights or {}).get(recipe.backbone), home=home, image_size=transform.size
    )
    views = int(recipe.transform.get("views", 1))
    return freeze(loaded, transform, device, recipe.precision, views, dataset.augment, recipe.dtype)


def recipe_transform(recipe: Recipe) -> Transform:
    """The transform that a recipe tells; of pixels only what decides them."""
    told = recipe.transform

    def sides(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    return Transform(
        kind=str(told.get("kind", "paper")),
        resize=sides(told["resize"]),
        crop=sides(told["crop"]),
        size=sides(told["size"]),
        interpolation=told["interpolation"],
        mean=sides(told.get("mean", (0.0, 0.0, 0.0))),
        std=sides(told.get("std", (1.0, 1.0, 1.0))),
    )


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


def as_full_precision(network: FrozenNetwork, dataset: ImageDataset) -> FrozenNetwork:
    """The same network, computing in fp32 and keeping float32."""
    return replace(network, precision="fp32", dtype="float32")


def sources_of(dataset: ImageDataset, ids: Sequence[str]) -> list[Source]:
    """Where images lie; those that the dataset has not have no path."""
    columns = [dataset.table[name].tolist() for name in ("id", "path", "member")]
    known = {image: Source(image, path, member) for image, path, member in zip(*columns, strict=True)}
    return [known.get(image, Source(image, "", -1)) for image in ids]


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
