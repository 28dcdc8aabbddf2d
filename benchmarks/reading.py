"""How fast cached features come into memory, their checksums verified: as a share of what `np.load` does.

Writes a store of each format and one ``.npy`` file of the same numbers, then reads all of them in turns, so that all
see the same machine. Everything is in the system's page cache: this measures the reader, not the disk. Every array is
let go of before the next is read, as `np.load` would be.

    python benchmarks/reading.py [--rows 100000] [--dim 1536] [--repeats 7] [--folder FOLDER] [--zarr]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import machine
from synthetic import make_dataset, put_store

from embcache.store.feature_store import FeatureStore

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
    ds = make_dataset("reading", rows - 2, 2, 0.5)
    stores = {
        format: FeatureStore(
            put_store(folder / format, ds, "any", dim, shard=ROWS_PER_SHARD, format=format, features=features)
        )
        for format in ("zarr", "hdf5")
    }
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
        f"{rows:,} × {dim} float32 ({size / 1e6:,.0f} MB), {ROWS_PER_SHARD} rows/shard, median of {repeats}; ",
        end="",
    )
    print(f"{machine(('numpy', 'zarr', 'h5py', 'google-crc32c'))}\n")
    print("| read by | speed, share of `np.load` | seconds | GB/s |\n|---|---|---|---|")
    for name, seconds in taken.items():
        median = statistics.median(seconds)
        print(f"| {name} | {base / median:.2f} | {median:.3f} | {size / median / 1e9:.2f} |")


if __name__ == "__main__":
    main()
