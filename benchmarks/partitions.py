"""What it costs to plan millions of images in partitions: flat memory, and seconds of a processor per million.

Makes a Parquet table of N images and what it names: N empty files, or HDF5 files of 10,000 places each, of which only
the states count here. Then, in a process of its own each time, does what an extraction does before its first image is
decoded, partition after partition: read the table and check it, look at every file, publish the plan of a store, and
keep the scan. The first run finds nothing; the second one its plans; before the third one a row is committed for every
image, with the digests that the kept scan has, and nothing is owed.

    python benchmarks/partitions.py [--images 100000,1000000,10000000] [--of places|files] [--rows 524288]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

IN_ONE_FILE = 10_000
STAGES = ("table", "scan", "plan", "keep")
SHARD_ROWS = 4096
_DIGEST = np.arange(32, dtype=np.uint8)


def make_table(root: Path, count: int, places: bool) -> None:
    """A table of ``path,label,id,row``, and the files that it names."""
    import h5py
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir()
    writer = None
    for start in range(0, count, 100 * IN_ONE_FILE):
        numbers = range(start, min(count, start + 100 * IN_ONE_FILE))
        if places:
            paths = [f"tiles{n // IN_ONE_FILE:04d}.h5" for n in numbers]
        else:
            paths = [f"{n // IN_ONE_FILE:04d}/image{n:08d}.png" for n in numbers]
        for folder in {path[:4] for path in paths} if not places else ():
            (root / folder).mkdir()
        for path in dict.fromkeys(paths):
            if places:
                with h5py.File(root / path, "w") as file:
                    file.create_dataset("x", (IN_ONE_FILE, 96, 96, 3), "u1", chunks=(1, 96, 96, 3))  # never written
            else:
                open(f"{root}/{path}", "wb").close()  # noqa: PTH123  # millions of them
        columns = {
            "path": paths, "label": ["ab"[n % 2] for n in numbers], "id": [f"image{n:08d}" for n in numbers],
            "row": [n % IN_ONE_FILE for n in numbers],
        }  # fmt: skip
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(root / "images.parquet", table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def measure(root: Path, home: Path, places: bool, rows: int, fill: bool) -> None:
    """One run; prints its stages as JSON. With ``fill`` it then commits what is owed, as if it had been computed."""
    from dataclasses import replace

    from embcache.data.partitioned import load_partitioned
    from embcache.extract.scan import plan_store, scan_dataset
    from embcache.store.commit import ShardRows, commit_shard, create_store
    from embcache.store.feature_store import FeatureStore
    from embcache.store.schema import Recipe

    used = dict.fromkeys(STAGES, 0.0)
    began, spent = time.perf_counter(), time.process_time()

    def lap(stage: str) -> None:
        nonlocal spent
        used[stage] += time.process_time() - spent
        spent = time.process_time()

    dataset = load_partitioned(root / "images.parquet", home=home, rows=rows, places="row" if places else "", name="m")
    dataset = replace(dataset, sizes=((96, 96),))  # headers of empty files say nothing
    lap("table")
    recipe = Recipe("random", "resnet50", "0" * 64, {}, "x", "avg", "fp32", "float32", 1)
    path = create_store(
        dataset.folder, recipe, row_shape=(1,), rows_per_shard=SHARD_ROWS, batch_size=64, threads=1, format="zarr"
    )
    owed = 0
    with ThreadPoolExecutor(2) as pool:
        for part in dataset.parts():
            files = scan_dataset(part, home, pool)
            lap("scan")
            plan = plan_store(FeatureStore(path), part, files.scan)
            owed += sum(len(shard.ids) for shard in plan.shards)
            lap("plan")
            if fill:
                files.scan.digests[:] = _DIGEST
                for shard in plan.shards:
                    n, digest = len(shard.ids), bytes(_DIGEST).hex()
                    features, valid = np.ones((n, 1), np.float32), np.ones(n, bool)
                    rows_ = ShardRows(shard.ids, features, valid, (digest,) * n, ("",) * n)
                    commit_shard(path, shard.number, rows_)
                spent = time.process_time()
            files.keep()
            lap("keep")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps({"seconds": time.perf_counter() - began, "processor": used, "peak": peak, "owed": owed}))


def main() -> None:
    from common import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="100000,1000000,10000000")
    parser.add_argument("--of", choices=["places", "files"], default="places")
    parser.add_argument("--rows", type=int, default=1 << 19, help="most rows of a partition")
    parser.add_argument("--folder", type=Path, help="where files and stores are made")
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--fill", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        measure(*asked.measure, asked.of == "places", asked.rows, asked.fill)
        return
    heads = [*STAGES, "all, processor s", "s", "peak MB", "owed"]
    print(f"| {asked.of} | run | {' | '.join(heads)} |\n{'|---' * (len(heads) + 2)}|", flush=True)
    for count in map(int, asked.images.split(",")):
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            root, home = Path(folder) / "images", Path(folder) / "home"
            make_table(root, count, asked.of == "places")
            for name in ("first", "second", "", "third"):
                command = [sys.executable, __file__, "--measure", str(root), str(home), "--of", asked.of]
                command += ["--rows", str(asked.rows), *([] if name else ["--fill"])]
                found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                if name:
                    assert found["owed"] == (0 if name == "third" else count)
                    used = found["processor"]
                    cells = [f"{used[stage]:.1f}" for stage in STAGES]
                    cells += [f"{sum(used.values()):.1f}", f"{found['seconds']:.1f}", f"{found['peak']:.0f}"]
                    print(f"| {count:,} | {name} | {' | '.join([*cells, format(found['owed'], ',')])} |", flush=True)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
