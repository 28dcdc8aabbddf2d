"""A table of images with findings and a number, and features that know of both."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from embcache.data.classes import retarget
from embcache.data.dataset import ImageDataset
from tests.probe.build import make_dataset, put_store

N, TEST = 240, 80


def make_study(home: Path, **planted: float) -> tuple[ImageDataset, np.ndarray]:
    """A dataset of two classes with columns ``a``, ``b``, ``rare`` (findings), ``age``, ``grade``, and features.

    Two images are of one group. Features have a direction of each finding and of the number; ``planted`` sets the
    number of some images to another value, after the features are made.
    """
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, N), rng.integers(0, 2, N)
    age = rng.normal(50, 10, N).round(2)
    x = rng.normal(size=(N, 12)).astype(np.float32)
    x[:, 0] += 3 * a
    x[:, 1] += 3 * b
    x[:, 2] = (age - 50) / 10 + 0.2 * x[:, 2]
    ds = make_dataset(a.tolist(), [f"g{k // 2}" for k in range(N)], ["test"] * TEST + ["train"] * (N - TEST))
    for name, value in planted.items():
        age[int(name[1:])] = value
    unknown = rng.random(N) < 0.1
    ds.table["a"], ds.table["b"] = a.astype(str), np.where(unknown, "", b.astype(str))
    rare = (np.arange(N) % 40 == 0) | (np.arange(N) >= N - 20)
    ds.table["rare"], ds.table["age"] = rare.astype(int).astype(str), age.astype(str)
    ds.table["grade"] = np.digitize(age, [40, 50, 60]).astype(str)
    put_store(home, ds, "net", x)
    return ds, x


def findings_of(ds: ImageDataset, columns: str = "a,b,rare") -> ImageDataset:
    """The same images with findings as their target."""
    return retarget(ds, columns, "findings")


def number_of(ds: ImageDataset) -> ImageDataset:
    """The same images with the number as their target."""
    return retarget(ds, "age", "number")


def grades_of(ds: ImageDataset) -> ImageDataset:
    """The same images with ordered grades of the number as their target."""
    return retarget(ds, "grade", "ordinal")
