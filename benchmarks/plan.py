"""What it costs to know what is owed: from the root of a folder of images to published plans, stage by stage.

Makes N tiny PNG files that all differ (140 bytes each, 8×8 pixels, in two class folders), then, in a process of its own
each time, does what an extraction does before its first image is decoded: load the dataset, look at every file, publish
the plan of a store, write the snapshot and the scan. The first run finds nothing; the second one finds its plans and
its scan; before the third one a row is committed for every image. What the scan and the plan allocate, and hold at the
end, is counted by tracemalloc in processes of their own, for it takes time itself.

    python benchmarks/plan.py [--images 100000] [--sizes one|two] [--folder FOLDER] [--repeats 1]

``--sizes two`` makes the first image larger than the others, as in nearly every collection: a transform is settled as
soon as two sizes are seen. Of images of one size, of at most 224 pixels, every header must be read.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import machine

STAGES = ("load", "scan", "plan", "snapshot", "scan kept")


def picture(number: int, side: int) -> bytes:
    """A gray PNG that no other number gives: its rows are stored, not compressed."""
    pixels = b"".join(
        b"\0" + ((number * 0x9E3779B97F4A7C15 + row) % 2**64).to_bytes(8, "big") * (side // 8) for row in range(side)
    )
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(pixels, 0)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def make_images(root: Path, count: int, two_sizes: bool) -> None:
    for label in "ab":
        (root / label).mkdir(parents=True)
    for number in range(count):
        side = 16 if two_sizes and not number else 8
        with open(f"{root}/{'ab'[number % 2]}/image{number:07d}.png", "wb") as file:  # noqa: PTH123  # a million of them
            file.write(picture(number, side))


def fill(store: Path, root: Path) -> None:
    """Commit a row for every image that a store owes, with the digests of the files."""
    import numpy as np

    from embcache.store.commit import ShardRows, commit_shard
    from embcache.store.feature_store import FeatureStore

    for number, entries in FeatureStore(store).plans().items():
        ids, n = tuple(entry.id for entry in entries), len(entries)
        digests = tuple(hashlib.sha256((root / id_).read_bytes()).hexdigest() for id_ in ids)
        rows = ShardRows(ids, np.ones((n, 8), np.float32), np.ones(n, bool), digests, ("",) * n)
        commit_shard(store, number, rows)


def measure(root: Path, home: Path, trace: bool) -> None:
    """One run; prints its stages as JSON."""
    import numpy as np  # noqa: F401  # imports are not what is measured

    from embcache.backbones.catalog import find_backbone
    from embcache.backbones.transforms import choose_transform
    from embcache.data.dataset import load_dataset
    from embcache.extract.scan import plan_store, scan_dataset
    from embcache.paths import slug
    from embcache.store.commit import create_store, write_snapshot
    from embcache.store.feature_store import FeatureStore
    from embcache.store.schema import Recipe

    seconds: dict[str, float] = {}  # of processors, too: a busy machine does not see them
    used: dict[str, float] = {}
    began, spent = time.perf_counter(), time.process_time()

    def lap(stage: str) -> None:
        nonlocal began, spent
        seconds[stage], used[stage] = time.perf_counter() - began, time.process_time() - spent
        began, spent = time.perf_counter(), time.process_time()

    ds = load_dataset("folder", root, home=home)
    lap("load")
    if trace:
        tracemalloc.start()
    with ThreadPoolExecutor(2) as pool:
        files = scan_dataset(ds, home, pool)
        transform = choose_transform(find_backbone("random"), None, files.sizes)
    lap("scan")
    recipe = Recipe("random", "resnet50", "0" * 64, transform.to_dict(), "x", "avg", "fp32", "float32", 1)
    folder = home / slug(ds.name)
    path = create_store(folder, recipe, row_shape=(8,), rows_per_shard=512, batch_size=16, threads=2)
    plan = plan_store(FeatureStore(path), ds, files.scan)
    owed = sum(len(shard.ids) for shard in plan.shards)
    lap("plan")
    held, most = (size / len(ds) for size in tracemalloc.get_traced_memory())
    write_snapshot(folder, ds.to_parquet_bytes())
    lap("snapshot")
    files.keep()
    lap("scan kept")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    found = {"seconds": seconds, "processor": used, "peak": peak, "held": held, "most": most, "owed": owed}
    print(json.dumps({**found, "store": str(path)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--sizes", choices=["one", "two"], default="two")
    parser.add_argument("--folder", type=Path, help="where the images are made, such as /dev/shm: 4 kB each there")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        measure(*asked.measure, asked.trace)
        return
    with tempfile.TemporaryDirectory() as temporary, tempfile.TemporaryDirectory(dir=asked.folder) as place:
        root = Path(place) / "images"
        make_images(root, asked.images, asked.sizes == "two")
        runs: dict[str, list[dict[str, Any]]] = {"first": [], "second": [], "third": []}
        traced = {}
        for number in range(asked.repeats + 1):
            for name in runs:
                command = [sys.executable, __file__, "--measure", str(root), str(Path(temporary) / f"home{number}")]
                command += [] if number else ["--trace"]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                assert found["owed"] == (0 if name == "third" else asked.images)
                if number:
                    runs[name].append(found)
                else:
                    traced[name] = found
                if name == "second":
                    fill(Path(found["store"]), root)
    heads = [*STAGES, "all, s", "peak MB", "scan and plan, processor ms per image", "they hold, B per image", "at most"]
    print(f"| {asked.images:,} images, {asked.sizes} size(s) | {' | '.join(heads)} |")
    print("|---" * (len(heads) + 1) + "|")
    for name, measured in runs.items():
        cells = [f"{statistics.median(run['seconds'][stage] for run in measured):.2f}" for stage in STAGES]
        cells.append(f"{statistics.median(sum(run['seconds'].values()) for run in measured):.1f}")
        cells.append(f"{max(run['peak'] for run in measured):.0f}")
        spent = statistics.median(run["processor"]["scan"] + run["processor"]["plan"] for run in measured)
        cells += [f"{1000 * spent / asked.images:.3f}", f"{traced[name]['held']:.0f}", f"{traced[name]['most']:.0f}"]
        print(f"| {name} run | {' | '.join(cells)} |")
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
