"""What it costs to know what is owed: from the root of a folder of images to published plans, stage by stage.

Makes N tiny PNG files that all differ (140 bytes each, 8×8 pixels, in two class folders), then, in a process of its own
each time, does what an extraction does before its first image is decoded: load the dataset, look at every file, publish
the plan of a store, write the snapshot and the scan. The first run finds nothing; the second one finds its plans and
its scan.

    python benchmarks/plan.py [--images 100000] [--sizes one|two] [--folder FOLDER] [--repeats 1]

``--sizes two`` makes the first image larger than the others, as in nearly every collection: a transform is settled as
soon as two sizes are seen. Of images of one size, of at most 224 pixels, every header must be read.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


def measure(root: Path, home: Path) -> None:
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
    with ThreadPoolExecutor(2) as pool:
        files = scan_dataset(ds, home, pool)
        transform = choose_transform(find_backbone("random"), None, files.sizes)
    lap("scan")
    recipe = Recipe("random", "resnet50", "0" * 64, transform.to_dict(), "x", "avg", "fp32", "float32", 1)
    folder = home / slug(ds.name)
    path = create_store(folder, recipe, row_shape=(2048,), rows_per_shard=512, batch_size=16, threads=2)
    plan = plan_store(FeatureStore(path), ds, files.root, files.scan)
    assert sum(len(shard.ids) for shard in plan.shards) == len(ds)
    lap("plan")
    write_snapshot(folder, ds.to_parquet_bytes())
    lap("snapshot")
    files.keep()
    lap("scan kept")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps({"seconds": seconds, "processor": used, "peak": peak, "transform": transform.to_dict()["resize"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--sizes", choices=["one", "two"], default="two")
    parser.add_argument("--folder", type=Path, help="where the images are made, such as /dev/shm: 4 kB each there")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        measure(*asked.measure)
        return
    with tempfile.TemporaryDirectory() as temporary, tempfile.TemporaryDirectory(dir=asked.folder) as place:
        root = Path(place) / "images"
        make_images(root, asked.images, asked.sizes == "two")
        runs: dict[str, list[dict[str, dict[str, float]]]] = {"first": [], "second": []}
        for number in range(asked.repeats):
            for name in runs:
                command = [sys.executable, __file__, "--measure", str(root), str(Path(temporary) / f"home{number}")]
                runs[name].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    print(f"| {asked.images:,} images, {asked.sizes} size(s) | {' | '.join(STAGES)} | all, s | peak MB |")
    print("|---" * (len(STAGES) + 3) + "|")
    for name, measured in runs.items():
        stages = [statistics.median(run["seconds"][stage] for run in measured) for stage in STAGES]
        total = statistics.median(sum(run["seconds"].values()) for run in measured)
        peak = max(run["peak"] for run in measured)
        print(f"| {name} run | {' | '.join(f'{s:.2f}' for s in stages)} | {total:.1f} | {peak:.0f} |")
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
