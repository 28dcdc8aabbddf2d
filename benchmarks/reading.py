"""How fast cached features come into memory, their checksums verified: as a share of what `np.load` does.

Writes a store of each format and one ``.npy`` file of the same numbers, then reads all of them in turns, so that all
see the same machine. Everything is in the system's page cache: this measures the reader, not the disk. Every array is
let go of before the next is read, as `np.load` would be.

    python benchmarks/reading.py [--rows 100000] [--dim 1536] [--repeats 7] [--folder FOLDER] [--zarr]
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from embcache.store.commit import commit_shard, create_store, publish_plan
from embcache.store.feature_store import FeatureStore
from embcache.store.recipe import Recipe
from embcache.store.rows import PlanEntry, ShardRows

ROWS_PER_SHARD = 512  # what extraction uses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="Where to write three times the features. [default: temporary]")
    parser.add_argument("--zarr", action="store_true", help="Read the store's view with zarr as well: slow.")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        run(folder, options.rows, options.dim, options.repeats, options.zarr)
    finally:
        shutil.rmtree(folder)


def run(folder: Path, rows: int, dim: int, repeats: int, with_zarr: bool) -> None:
    features = np.random.default_rng(0).standard_normal((rows, dim), dtype=np.float32)
    np.save(folder / "features.npy", features)
    stores = {format: write_store(folder / format, format, features) for format in ("zarr", "hdf5")}
    shuffled = np.random.default_rng(1).permutation(rows)
    for store in stores.values():
        assert np.array_equal(store.features[:], features)
    del features
    ways: dict[str, Callable[[], object]] = {
        "`np.load`, nothing verified": lambda: np.load(folder / "features.npy"),
        "Zarr store": lambda: stores["zarr"].features[:],
        "HDF5 store": lambda: stores["hdf5"].features[:],
        "Zarr store, rows in random order": lambda: stores["zarr"].features[shuffled],
        "Zarr store, opened anew": lambda: FeatureStore(stores["zarr"].path).features[:],
        "HDF5 store, opened anew": lambda: FeatureStore(stores["hdf5"].path).features[:],
    }
    if with_zarr:
        import zarr

        from embcache.store.commit import write_view

        write_view(stores["zarr"].path)
        view = stores["zarr"].path / "view.zarr"
        ways["the store's view by zarr, nothing verified"] = lambda: zarr.open_group(view, mode="r")["features"][:]
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, read in ways.items():
            began = time.perf_counter()
            array = read()
            taken[name].append(time.perf_counter() - began)
            del array
    base = statistics.median(taken["`np.load`, nothing verified"])
    size = rows * dim * 4
    print(
        f"{rows:,} × {dim} float32 ({size / 1e6:,.0f} MB), {ROWS_PER_SHARD} rows a shard, median of {repeats}; ", end=""
    )
    print(f"{machine()}\n")
    print("| read by | speed, share of `np.load` | seconds | GB/s |\n|---|---|---|---|")
    for name, seconds in taken.items():
        median = statistics.median(seconds)
        print(f"| {name} | {base / median:.2f} | {median:.3f} | {size / median / 1e9:.2f} |")


def write_store(home: Path, format: str, features: np.ndarray) -> FeatureStore:
    """A store of these rows as extraction leaves it."""
    recipe = Recipe(
        backbone="random",
        architecture="none",
        weights_sha256="0" * 64,
        transform={"kind": "paper"},
        decoder="none",
        pooling="avg",
        precision="fp32",
        dtype="float32",
        numerics=1,
    )
    path = create_store(
        home / "benchmark",
        recipe,
        format=format,
        row_shape=features.shape[1:],
        rows_per_shard=ROWS_PER_SHARD,
        batch_size=64,
        threads=1,
        provenance={},
    )
    for number, start in enumerate(range(0, len(features), ROWS_PER_SHARD)):
        part = features[start : start + ROWS_PER_SHARD]
        ids = tuple(f"train/image_{start + i:07d}.png" for i in range(len(part)))
        publish_plan(path, number, [PlanEntry(id_, 1, 1, None) for id_ in ids])
        commit_shard(
            path, number, ShardRows(ids, part, np.ones(len(part), bool), ("ab" * 32,) * len(part), ("",) * len(part))
        )
    return FeatureStore(path)


def machine() -> str:
    """Cores, processor and versions, for the caption."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "zarr", "h5py", "google-crc32c"))
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        model = next(
            (x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), model
        )
    return f"{cores} cores of {model}, CPython {platform.python_version()}, {packages}"


if __name__ == "__main__":
    main()
