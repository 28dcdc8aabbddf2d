"""Peak memory and time an image of `embcache extract`, as a dataset grows: both should stay as they are.

Grey PNG files of 32 × 32 pixels that all differ, and timm's smallest test network with made-up weights, so that what is
measured is embcache's own: each number of images is extracted from the shell by a process of its own, and then asked
for once more, when nothing is owed. What a process takes to start is that of the smallest run, and is subtracted.

    python benchmarks/memory.py [--images 1000,10000,100000] [--folder FOLDER] [--format zarr|hdf5]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import timm
import torch
from common import Cost, machine, shell
from plan import picture

NETWORK = "timm:test_resnet"
FEWEST = 64


def make_images(root: Path, count: int) -> None:
    for label in "ab":
        (root / label).mkdir(parents=True)
    for number in range(count):
        with open(f"{root}/{'ab'[number % 2]}/image{number:07d}.png", "wb") as file:  # noqa: PTH123
            file.write(picture(number, 32))


def extract(root: Path, home: Path, weights: Path, format: str) -> Cost:
    places = ["--data-root", str(root), "--home", str(home), "--weights", str(weights)]
    asked = ["--backbone", NETWORK, "--dataset", "folder", "--transform", "paper", "--device", "cpu"]
    return shell("-m", "embcache", "extract", *asked, *places, "--format", format)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="1000,10000,100000")
    parser.add_argument("--folder", type=Path, help="where images and stores are made; default: the usual one")
    parser.add_argument("--format", choices=["zarr", "hdf5"], default="zarr")
    asked = parser.parse_args()
    print("| images | first run, s | ms per image | of a processor, ms | peak, MB | second run, s | peak, MB |")
    print("|---" * 7 + "|")
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        torch.manual_seed(0)
        torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), folder / "weights.pth")
        start: Cost | None = None
        for count in [FEWEST, *map(int, asked.images.split(","))]:
            root, home = folder / f"images{count}", folder / f"home{count}"
            make_images(root, count)
            first, second = (extract(root, home, folder / "weights.pth", asked.format) for _ in range(2))
            start = start or first
            more = max(count - FEWEST, 1)
            wall, cpu = (1000 * (a - b) / more for a, b in [(first.wall, start.wall), (first.cpu, start.cpu)])
            cells = [f"{count:,}", f"{first.wall:.1f}", f"{wall:.2f}", f"{cpu:.2f}", f"{first.peak:.0f}"]
            print(f"| {' | '.join([*cells, f'{second.wall:.1f}', f'{second.peak:.0f}'])} |", flush=True)
    print(f"\n{machine(('torch', 'timm', 'zarr', 'h5py'))}")


if __name__ == "__main__":
    main()
