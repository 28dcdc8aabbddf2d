"""Extraction beside its ceiling: the same network on resident tensors, plus the decoding that the cores must also do.

For ResNet-50 (`random`) and DINO's ViT-S/8 (untrained), on 224-pixel JPEGs and on 2000 × 2000 ones, fp32 and bf16: the
network alone on a batch in memory, decoding and resizing alone with all threads, and `compute_shard`, which does both;
in turns, medians, wall and processor time. Then, unless ``--only-ceiling``, five backbones in one pass beside the sum
of their networks and one decoding, and a plain timm loop (`DataLoader` with workers, channels first, fp32).

    python benchmarks/extraction.py [--images 64] [--repeats 3] [--backbone random,dino] [--sizes 224,2000]
    [--precisions fp32,bf16] [--runtimes eager,openvino] [--decodes full,reduced] [--only-ceiling]
"""

from __future__ import annotations

import embcache  # noqa: F401 - first, as it settles how torch's threads wait

# isort: split
import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import timm
import torch
from common import machine
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from embcache.backbones.catalog import find_backbone, load_backbone
from embcache.backbones.networks import LastClassTokens
from embcache.backbones.transforms import choose_transform
from embcache.cores import usable_cores
from embcache.extract.worker import FrozenNetwork, ImageRef, compute_shard, freeze, prepare

BATCH = 16


class Files(Dataset):
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = Image.open(self.paths[index]).convert("RGB")
        if image.size != (224, 224):
            image = image.resize((256, 256), Image.Resampling.BILINEAR).crop((16, 16, 240, 240))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255).sub_(0.45).div_(0.225)


def draw(folder: Path, number: int, side: int) -> list[Path]:
    """JPEGs of smooth noise with some grain: their size a pixel is that of photographs."""
    rng, paths = np.random.default_rng(side), []
    for index in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = np.clip(pixels + rng.integers(-8, 9, pixels.shape), 0, 255).astype(np.uint8)
        paths.append(folder / f"{side}-{index:04}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=88)
    return paths


def network(
    name: str, precision: str, side: int, folder: Path, decode: str = "full", runtime: str = "eager"
) -> FrozenNetwork:
    weights = None
    if name == "dino":
        weights = folder / "dino.pth"
        if not weights.exists():
            torch.manual_seed(0)
            torch.save(LastClassTokens().state_dict(), weights)
    transform = choose_transform(find_backbone(name), "paper", {(side, side)}, decode)
    return freeze(load_backbone(name, weights=weights), transform, "cpu", precision).executed_by(runtime)


def medians(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    return {name: wall for name, (wall, _) in both_times(works, repeats).items()}


def both_times(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median wall and processor seconds."""
    walls: dict[str, list[float]] = {name: [] for name in works}
    cpus: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            if turn:  # the first one warms up
                walls[name].append(time.perf_counter() - wall)
                cpus[name].append(time.process_time() - cpu)
    return {name: (statistics.median(walls[name]), statistics.median(cpus[name])) for name in works}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--backbone", default="random,dino")
    parser.add_argument("--sizes", default="224,2000")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--runtimes", default="eager")
    parser.add_argument("--decodes", default="full")
    parser.add_argument("--only-ceiling", action="store_true")
    args = parser.parse_args()
    threads = usable_cores()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.images} images, batch {BATCH}")
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(threads) as pool:
        folder = Path(name)
        for side in map(int, args.sizes.split(",")):
            paths = draw(folder, args.images, side)
            sources = [ImageRef(path.name, path.name, "") for path in paths]
            settings = (args.backbone, args.precisions, args.decodes if side > 512 else "full", args.runtimes)
            for backbone, precision, decode, runtime in itertools.product(*(each.split(",") for each in settings)):
                net = network(backbone, precision, side, folder, decode, runtime)
                ceiling(net, folder, sources, pool, args.repeats)
            if not args.only_ceiling:
                plain_loop(paths, folder, sources, pool, args.repeats, side)
                five(folder, sources, pool, side)
    print(f"\n{machine(('torch', 'pillow', 'simplejpeg', 'openvino'))}")


def alone(net: FrozenNetwork, images: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, *net.transform.size, 3), dtype=np.uint8)
    for _ in range(0, images, BATCH):
        net.features(pixels)


def decoded(net: FrozenNetwork, folder: Path, sources: list[ImageRef], pool: ThreadPoolExecutor) -> None:
    list(pool.map(lambda source: prepare(folder, source, [net.image_views.frame]), sources))


def extracted(nets: list[FrozenNetwork], folder: Path, sources: list[ImageRef], pool: ThreadPoolExecutor) -> None:
    compute_shard(folder, sources, nets, batch_size=BATCH, pool=pool)


def ceiling(net: FrozenNetwork, folder: Path, sources: list[ImageRef], pool: ThreadPoolExecutor, repeats: int) -> None:
    n = len(sources)
    found = both_times(
        {
            "network": lambda: alone(net, n),
            "decode": lambda: decoded(net, folder, sources, pool),
            "both": lambda: extracted([net], folder, sources, pool),
        },
        repeats,
    )
    rates = [
        [n / found[what][which] for what in ("network", "decode", "both")]
        + [(found["network"][which] + found["decode"][which]) / found["both"][which]]
        for which in (0, 1)
    ]
    side = sources[0].path.partition("-")[0]
    print(
        f"{side:>5} px  {net.backbone.spec.name:12} {net.precision} {net.runtime:8} {net.transform.decode:7}  "
        + "  ".join(
            f"{clock}: network {a:6.1f} img/s  decoding {b:7.1f}  both {c:6.1f} = {d:.2f} of the ceiling"
            for clock, (a, b, c, d) in zip(("wall", "processor"), rates, strict=True)
        ),
        flush=True,
    )


def plain_loop(
    paths: list[Path], folder: Path, sources: list[ImageRef], pool: ThreadPoolExecutor, repeats: int, side: int
) -> None:
    model = timm.create_model("resnet50", pretrained=False, num_classes=0).eval()

    @torch.inference_mode()
    def loop() -> None:
        for batch in DataLoader(Files(paths), batch_size=32, num_workers=usable_cores()):
            model(batch)

    nets = {precision: network("random", precision, side, folder) for precision in ("fp32", "bf16")}
    works: dict[str, Callable[[], object]] = {"timm": loop}
    for precision, net in nets.items():
        works[precision] = lambda net=net: extracted([net], folder, sources, pool)  # type: ignore[misc]
    found = medians(works, repeats)
    print(
        f"{side:>5} px  plain timm loop {len(paths) / found['timm']:.1f} img/s; "
        f"fp32 {found['timm'] / found['fp32']:.2f} times, bf16 {found['timm'] / found['bf16']:.2f} times as fast"
    )


def five(folder: Path, sources: list[ImageRef], pool: ThreadPoolExecutor, side: int) -> None:
    nets = [network(name, "fp32", side, folder) for name in ("random", "random:1", "random:2", "random:3", "random:4")]
    found = medians(
        {
            "networks": lambda: [alone(net, len(sources)) for net in nets],
            "decode": lambda: decoded(nets[0], folder, sources, pool),
            "all": lambda: extracted(nets, folder, sources, pool),
        },
        1,
    )
    ratio = found["all"] / (found["networks"] + found["decode"])
    print(f"{side:>5} px  five backbones in one pass: {ratio:.3f} times the networks and one decoding")


if __name__ == "__main__":
    main()
