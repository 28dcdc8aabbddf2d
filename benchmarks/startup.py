"""How long commands take to start: `--help`, `ls`, a refused flag, and a probe until its first epoch is trained.

Makes a home of synthetic features under a temporary folder, then starts each command in a process of its own, in
turns. What a probe is held to is a process that imports torch, zarr and sklearn.metrics and reads the same features by
`np.load`. Modules are compiled beforehand, as an installation does.

    python benchmarks/startup.py [--rows 5000] [--dim 1536] [--repeats 7]
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from embcache.data.dataset import ImageDataset
from embcache.store.commit import commit_shard, create_store, publish_plan
from embcache.store.recipe import Recipe
from embcache.store.rows import PlanEntry, ShardRows

COMMAND = "import sys; sys.argv[0] = 'embcache'; from embcache.cli import main; main()"
IMPORTS = "import torch, zarr, sklearn.metrics"
# The progress of a probe is told after every epoch: the first word of it ends the process.
FIRST_EPOCH = """
import os, sys
import embcache.commands.probe as command

class Ends(command.ProgressBar):
    def update(self, done, total, label=""):
        os._exit(0)

command.ProgressBar = Ends
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options.rows, options.dim, options.repeats)


def run(folder: Path, rows: int, dim: int, repeats: int) -> None:
    home = folder / "home"
    make_home(home, folder / "features.npy", rows, dim)
    load = f"import numpy; numpy.load({str(folder / 'features.npy')!r})"
    at = ["--home", str(home)]
    probe = ["probe", "--head", "linear", "--subset", "M", "--again", *at]
    ways: dict[str, tuple[str, list[str], int]] = {
        "`embcache --help`": (COMMAND, ["--help"], 0),
        "`embcache ls`": (COMMAND, ["ls", *at], 0),
        "`embcache probe --head lineer`: refused": (COMMAND, ["probe", "--head", "lineer", *at], 2),
        "`import torch`": ("import torch", [], 0),
        "`import torch, zarr, sklearn.metrics`, `np.load`": (f"{IMPORTS}; {load}", [], 0),
        "`embcache probe` until its first epoch is trained": (FIRST_EPOCH + COMMAND, probe, 0),
        "`embcache probe` from start to end": (COMMAND, probe, 0),
    }
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "compiled")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}  # seconds, and those of a processor
    for turn in range(repeats + 1):
        for name, (code, arguments, status) in ways.items():
            began, used = time.perf_counter(), processor_seconds()
            done = subprocess.run(
                [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
            )
            seconds, used = time.perf_counter() - began, processor_seconds() - used
            assert done.returncode == status, f"{name}: {done.returncode}\n{done.stderr}"
            if turn:  # the first one compiles
                taken[name].append((seconds, used))
    medians = {name: [statistics.median(kind) for kind in zip(*each, strict=True)] for name, each in taken.items()}
    base, base_used = medians["`import torch, zarr, sklearn.metrics`, `np.load`"]
    print(f"{rows:,} × {dim} float32 cached, 5 folds of the linear head, median of {repeats}; {machine()}\n")
    print("| process | seconds | of imports and `np.load` | processor seconds | of imports and `np.load` |")
    print("|---|---|---|---|---|")
    for name, (seconds, used) in medians.items():
        print(f"| {name} | {seconds:.2f} | {seconds / base:.2f} | {used:.2f} | {used / base_used:.2f} |")


def processor_seconds() -> float:
    """Of all processes that were started and have ended: on a busy machine they say more than the clock."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def make_home(home: Path, copy: Path, rows: int, dim: int) -> None:
    """A home with one dataset of two classes, its features cached, and the same features as a ``.npy`` file."""
    rng = np.random.default_rng(0)
    labels = np.arange(rows) % 2
    features = rng.standard_normal((rows, dim), dtype=np.float32)
    features[:, 0] += labels
    np.save(copy, features)
    ids = [f"image_{i:06d}.png" for i in range(rows)]
    split = np.where(np.arange(rows) % 10 < 8, "train", "test")
    table = pd.DataFrame({"id": ids, "path": ids, "member": -1, "label": labels, "group": ids, "split": split})
    ds = ImageDataset("startup", None, ("no", "yes"), "auc", "generic", table)
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
        home / "startup",
        recipe,
        format="zarr",
        row_shape=(dim,),
        rows_per_shard=512,
        batch_size=64,
        threads=1,
        provenance={},
    )
    for number, start in enumerate(range(0, rows, 512)):
        part = tuple(ids[start : start + 512])
        publish_plan(path, number, [PlanEntry(id_, 1, 1, None) for id_ in part])
        valid = np.ones(len(part), bool)
        commit_shard(
            path, number, ShardRows(part, features[start : start + 512], valid, ("",) * len(part), ("",) * len(part))
        )
    (home / "startup" / "dataset.parquet").write_bytes(ds.to_parquet_bytes())


def machine() -> str:
    """Cores, processor and versions, for the caption."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "zarr", "scikit-learn", "pandas", "typer"))
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        model = next(
            (x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), model
        )
    return f"{cores} cores of {model}, CPython {platform.python_version()}, {packages}"


if __name__ == "__main__":
    main()
