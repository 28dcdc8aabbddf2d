"""From a file to a network's pixels: processor time per image of each way, and what it changes in pixels and features.

Today's way (libjpeg, Pillow's antialiased resize to 256 × 256), `--decode reduced` as embcache has it, and those that
were tried: reduced to once the size instead of twice, Pillow's ``reducing_gap``, torch's antialiased resize of uint8.
One thread, ways in turns image by image, medians. Features are EfficientNet-Lite0's (pretrained, from PyPI), relative
to those of today's pixels. JPEGs are drawn (color, and gray with the grain of a sensor) unless folders are given.

    python benchmarks/decoding.py [FOLDER …] [--images 24] [--sides 1000,2000]
"""

from __future__ import annotations

import embcache  # noqa: F401 - first, as it settles how torch's threads wait

# isort: split
import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import machine
from extraction import draw
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional

from embcache.backbones.catalog import find_backbone, load_backbone
from embcache.backbones.transforms import center, choose_transform, normalize
from embcache.data.images import Least, decode_image

FULL = replace(
    choose_transform(find_backbone("effnet_lite0"), "paper", {(1, 1), (900, 900)}), crop=None, size=(256, 256)
)
Pixels = NDArray[np.uint8]


def by_pillow(least: Least, gap: float | None = None) -> Callable[[bytes], Pixels]:
    def way(data: bytes) -> Pixels:
        pixels = decode_image(data, least=least)
        if gap is None:
            return FULL.geometry(pixels)
        picture = Image.fromarray(pixels).resize((256, 256), Image.Resampling.BILINEAR, reducing_gap=gap)
        return np.asarray(picture)

    return way


def by_torch(least: Least) -> Callable[[bytes], Pixels]:
    def way(data: bytes) -> Pixels:
        batch = torch.from_numpy(np.ascontiguousarray(decode_image(data, least=least))).permute(2, 0, 1)[None]
        return functional.resize(batch, [256, 256], antialias=True)[0].permute(1, 2, 0).contiguous().numpy()

    return way


WAYS: dict[str, Callable[[bytes], Pixels]] = {
    "decoding alone": lambda data: decode_image(data),
    "decoding alone, reduced": lambda data: decode_image(data, least=(256, 256)),
    "full (today)": by_pillow(None),
    "**reduced**": by_pillow((256, 256)),
    "reduced to once the size": by_pillow((128, 128)),
    "full, reducing_gap 2": by_pillow(None, 2.0),
    "full, reducing_gap 3": by_pillow(None, 3.0),
    "full, torch": by_torch(None),
    "reduced, torch": by_torch((256, 256)),
    "reduced to once the size, torch": by_torch((128, 128)),
}


def draw_gray(folder: Path, number: int, side: int) -> list[Path]:
    rng, paths = np.random.default_rng(side), []
    for index in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 24), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((side, side * 4 // 5), Image.Resampling.BICUBIC)) + rng.normal(
            0, 5, (side * 4 // 5, side)
        )
        paths.append(folder / f"gray-{side}-{index:04}.jpg")
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(paths[-1], quality=92)
    return paths


@torch.inference_mode()
def features(module: torch.nn.Module, pixels: list[Pixels]) -> torch.Tensor:
    batch = torch.from_numpy(np.stack([center(each, (224, 224)) for each in pixels]))
    return torch.cat([module(normalize(part, FULL, "cpu")) for part in batch.split(8)]).double()


def measure(what: str, files: list[bytes], module: torch.nn.Module) -> None:
    """Print the rows of some images."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    made: dict[str, list[Pixels]] = {way: [] for way in WAYS}
    for turn in range(2):
        for data in files:
            for way, make in WAYS.items():
                start = time.thread_time()
                pixels = make(data)
                times[way].append(time.thread_time() - start)
                if turn and "alone" not in way:
                    made[way].append(pixels)
    cost = {way: 1000 * statistics.median(each) for way, each in times.items()}
    expected = features(module, made["full (today)"])
    for way in WAYS:
        line = f"| {what} | {way} | {cost[way]:.1f} | {cost['full (today)'] / cost[way]:.2f} |"
        if "alone" in way:
            print(line, "| | | |", flush=True)
            continue
        apart = [np.abs(a.astype(int) - b) for a, b in zip(made[way], made["full (today)"], strict=True)]
        found = features(module, made[way])
        relative = float(((found - expected).norm(dim=1) / expected.norm(dim=1)).mean())
        cosine = float(torch.nn.functional.cosine_similarity(found, expected).min())
        mean, most = np.mean([each.mean() for each in apart]), max(each.max() for each in apart)
        print(line, f"{mean:.3f} | {most} | {relative:.4f} | {cosine:.5f} |", flush=True)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--sides", default="1000,2000")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    module = load_backbone("effnet_lite0").module.eval()
    print("| images | way | ms per image | of today | pixels, mean | largest | features, relative | cosine, least |")
    print("|---" * 8 + "|")
    with tempfile.TemporaryDirectory() as name:
        for side in () if asked.folders else map(int, asked.sides.split(",")):
            measure(f"{side} px", [p.read_bytes() for p in draw(Path(name), asked.images, side)], module)
            measure(f"{side} px, gray", [p.read_bytes() for p in draw_gray(Path(name), asked.images, side)], module)
        for folder in asked.folders:
            files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
            measure(folder.name, [p.read_bytes() for p in files[: asked.images]], module)
    print(
        f"\n{machine(('torch', 'torchvision', 'pillow', 'simplejpeg'))}, ATen {torch.backends.cpu.get_cpu_capability()}"
    )


if __name__ == "__main__":
    main()
