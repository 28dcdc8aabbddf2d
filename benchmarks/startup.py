"""How long commands take to start: `--help`, `ls`, a refused flag, a probe until its first epoch is trained, `extract`.

Makes a home of synthetic features under a temporary folder, then starts each command in a process of its own, in
turns. What a probe is held to is a process that imports torch, zarr and sklearn.metrics and reads the same features by
`np.load`. `extract` finds three complete stores of gray PNGs of 32 × 32 pixels, as it is and with what it remembers of
the networks removed before (`networks.json`): then they are built and hashed. Modules are compiled beforehand, as an
installation does.

    python benchmarks/startup.py [--rows 5000] [--dim 1536] [--images 5840] [--repeats 7]
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import machine
from memory import make_images
from synthetic import make_dataset, put_store

from embcache.store.feature_store import FeatureStore

COMMAND = "import sys; sys.argv[0] = 'embcache'; from embcache.cli import main; main()"
PACKAGES = ("torch", "zarr", "scikit-learn", "pandas", "typer")
IMPORTS = "import torch, zarr, sklearn.metrics"
FORGET = "import sys; from pathlib import Path; [f.unlink() for f in Path(sys.argv[-1]).glob('*/networks.json')]\n"
NETWORKS = ("resnet18", "mobilenetv3_small_050", "test_resnet")  # of timm, with weights that are drawn
# Progress is reported after every epoch: the first word of it ends the process.
FIRST_EPOCH = """
import os, sys
import embcache.commands.training as command

class Ends(command.ProgressBar):
    def update(self, done, total, label=""):
        os._exit(0)

command.ProgressBar = Ends
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--images", type=int, default=5840)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options.rows, options.dim, options.images, options.repeats)


def extraction(folder: Path, images: int) -> list[str]:
    """Arguments of an extraction by three networks whose stores are complete."""
    import timm
    from safetensors.torch import save_file

    make_images(folder / "images", images)
    (folder / "extracted" / "weights").mkdir(parents=True)
    for name in NETWORKS:
        state = timm.create_model(name, num_classes=0).state_dict()
        save_file(state, folder / "extracted" / "weights" / f"{name}.safetensors")
    words = ["extract", *(word for name in NETWORKS for word in ("--backbone", f"timm:{name}")), "--transform", "paper"]
    words += ["--dataset", "folder", "--data-root", str(folder / "images"), "--home", str(folder / "extracted")]
    subprocess.run([sys.executable, "-m", "embcache", *words], check=True, capture_output=True)
    return words


def run(folder: Path, rows: int, dim: int, images: int, repeats: int) -> None:
    home = folder / "home"
    make_home(home, folder / "features.npy", rows, dim)
    load = f"import numpy; numpy.load({str(folder / 'features.npy')!r})"
    at = ["--home", str(home)]
    extract = extraction(folder, images)
    probe = ["probe", "--head", "linear", "--subset", "M", "--again", *at]
    ways: dict[str, tuple[str, list[str], int]] = {
        "`embcache --help`": (COMMAND, ["--help"], 0),
        "`embcache ls`": (COMMAND, ["ls", *at], 0),
        "`embcache probe --head lineer`: refused": (COMMAND, ["probe", "--head", "lineer", *at], 2),
        "`import torch`": ("import torch", [], 0),
        "`import torch, zarr, sklearn.metrics`, `np.load`": (f"{IMPORTS}; {load}", [], 0),
        "`embcache probe` until its first epoch is trained": (FIRST_EPOCH + COMMAND, probe, 0),
        "`embcache probe` from start to end": (COMMAND, probe, 0),
        "`embcache extract`, three complete stores": (COMMAND, extract, 0),
        "the same, nothing remembered": (FORGET + COMMAND, extract, 0),
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
    print(f"{rows:,} × {dim} float32 cached, 5 folds of the linear head; {images:,} images; median of {repeats}")
    print(f"{machine(PACKAGES)}\n")
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
    ds = make_dataset("startup", rows - rows // 5, rows // 5, 0.5)
    store = FeatureStore(put_store(home, ds, "any", dim))
    np.save(copy, store.features[:])


if __name__ == "__main__":
    main()
