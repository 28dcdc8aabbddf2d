"""What meets the hostile files. A target says how it ended; any exception that leaves it is a bug."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embcache.backbones.checkpoints import find_network, load_strictly, read_checkpoint
from embcache.data.images import decode_image, read_image, read_size
from embcache.errors import DatasetError, EmbcacheError, ImageError, StoreError, WeightsError
from tests.fuzz.image_seeds import array_seeds, dicom_seeds, image_seeds
from tests.fuzz.mutate import Change, Seed, mutate, random_changes
from tests.fuzz.store_seeds import damage, read_all, store_seeds
from tests.fuzz.weight_seeds import module, weight_seeds


@dataclass(frozen=True)
class Case:
    """One input, as plain data: which seed, and what is done to it."""

    target: str
    seed: int
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class Target:
    """A reader under test: its whole files, and what is done with a damaged one in a folder of its own."""

    name: str
    seeds: Callable[[], list[Seed]]
    meet: Callable[[Seed, Sequence[Change], Path], str]


def _image(seed: Seed, changes: Sequence[Change], folder: Path) -> str:
    data = mutate(seed, changes, image_seeds())
    try:
        pixels = decode_image(data, name=seed.name)
        outcome = "decoded"
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
    except (ImageError, DatasetError) as error:
        outcome = _reason(error)
    path = folder / f"image{Path(seed.name).suffix}"
    path.write_bytes(data)
    try:
        width, height = read_size(folder, path.name)
        assert width > 0
        assert height > 0
    except (ImageError, DatasetError) as error:
        _reason(error)
    return outcome


def _reason(error: EmbcacheError) -> str:
    """Kind of error; its message must be one short line that says something, as it is kept in stores and tables."""
    if isinstance(error, ImageError):
        assert len(error.problem) < 300, error.problem
        assert error.problem.isprintable(), error.problem
    return type(error).__name__


def _array(seed: Seed, changes: Sequence[Change], folder: Path) -> str:
    path = folder / "array.h5"
    path.write_bytes(mutate(seed, changes, array_seeds()))
    outcomes = []
    for place in ("1", "3"):
        try:
            read_size(folder, path.name, place)
            pixels, _ = read_image(folder, path.name, place)
            assert pixels.dtype == np.uint8
            outcomes.append("decoded")
        except (ImageError, DatasetError) as error:
            outcomes.append(_reason(error))
    return min(outcomes)


def _checkpoint(seed: Seed, changes: Sequence[Change], folder: Path) -> str:
    path = folder / f"weights{Path(seed.name).suffix}"
    path.write_bytes(mutate(seed, changes, weight_seeds()))
    try:
        network = module()
        load_strictly(network, find_network(read_checkpoint(path).state, network.state_dict()).state)
    except WeightsError as error:
        return type(error).__name__
    return "loaded"


def _store(format: str) -> Callable[[Seed, Sequence[Change], Path], str]:
    def meet(seed: Seed, changes: Sequence[Change], folder: Path) -> str:
        store = damage(seed, tuple(changes), folder, store_seeds(format), format)
        try:
            return read_all(store)
        except StoreError as error:
            return type(error).__name__

    return meet


TARGETS = {
    target.name: target
    for target in (
        Target("images", image_seeds, _image),
        Target("dicom", dicom_seeds, _image),
        Target("arrays", array_seeds, _array),
        Target("checkpoints", weight_seeds, _checkpoint),
        Target("zarr stores", lambda: store_seeds("zarr"), _store("zarr")),
        Target("hdf5 stores", lambda: store_seeds("hdf5"), _store("hdf5")),
    )
}


def draw(target: str, dice: random.Random) -> Case:
    """A random input."""
    return Case(target, dice.randrange(len(TARGETS[target].seeds())), random_changes(dice))


def run(case: Case, folder: Path) -> str:
    """How the target ended."""
    target = TARGETS[case.target]
    return target.meet(target.seeds()[case.seed], case.changes, folder)
