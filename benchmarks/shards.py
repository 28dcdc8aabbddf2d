"""What the number of rows per shard costs: committing an image, and opening a store.

Commits shards of 2048-d float32 features (plan, lease, rows, flushed to disk, as an extraction does), and opens stores
of short rows whose index is that of many images: the ids, their validity and digests are what opening reads.

    python benchmarks/shards.py [--rows 64,256,512,4096] [--commit 8192] [--open 5840,1000000] [--folder FOLDER]

``--folder /dev/shm`` spares a million flushes while the stores are made; they are read from memory either way.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from common import machine

from embcache.store.commit import PlanEntry, ShardRows, commit_shard, create_store, publish_plan
from embcache.store.feature_store import FeatureStore
from embcache.store.lease import Lease
from embcache.store.schema import Recipe

DIGEST = "ab" * 32


def recipe(name: str) -> Recipe:
    return Recipe(name, "none", "0" * 64, {}, "none", "none", "fp32", "float32", 1)


def fill(folder: Path, images: int, rows: int, dim: int) -> tuple[Path, float, float]:
    """A store of so many images; with the seconds, of the clock and of the processor, that it took."""
    store = create_store(folder, recipe("x"), row_shape=(dim,), rows_per_shard=rows, batch_size=16, threads=1)
    features = np.random.default_rng(0).normal(size=(rows, dim)).astype(np.float32)
    began, spent = time.perf_counter(), time.process_time()
    for number, start in enumerate(range(0, images, rows)):
        ids = tuple(f"class/image{k:07d}.png" for k in range(start, min(start + rows, images)))
        publish_plan(store, number, [PlanEntry(id_, 1000, 1) for id_ in ids])
        lease = Lease.acquire(store, number)
        n = len(ids)
        commit_shard(store, number, ShardRows(ids, features[:n], np.ones(n, bool), (DIGEST,) * n, ("",) * n))
        if lease is not None:
            lease.release()
    return store, time.perf_counter() - began, time.process_time() - spent


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=numbers, default=[64, 256, 512, 4096])
    parser.add_argument("--commit", type=int, default=8192, help="images that are committed")
    parser.add_argument("--open", type=numbers, default=[5840, 1_000_000], help="images of the stores that are opened")
    parser.add_argument("--folder", type=Path, help="where the stores lie that are opened")
    asked = parser.parse_args()
    print("| rows per shard | commit, ms per image | its processor, ms | "
          + " | ".join(f"open {n:,}, s (shards)" for n in asked.open) + " |")  # fmt: skip
    print("|---" * (3 + len(asked.open)) + "|")
    for rows in asked.rows:
        with tempfile.TemporaryDirectory() as folder:
            _, clock, processor = fill(Path(folder) / "d", asked.commit, rows, 2048)
        cells = [f"{clock / asked.commit * 1000:.2f}", f"{processor / asked.commit * 1000:.2f}"]
        for images in asked.open:
            with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
                path, _, _ = fill(Path(folder) / "d", images, rows, 2)
                seconds = []
                for _ in range(3):
                    spent = time.process_time()
                    store = FeatureStore(path)
                    assert len(store.ids) == images
                    seconds.append(time.process_time() - spent)
            cells.append(f"{min(seconds):.2f} ({-(-images // rows):,})")
        print(f"| {rows} | {' | '.join(cells)} |", flush=True)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
