"""One CUDA card in under eight minutes: what its network could do, what an extraction does, and probes on it.

- Ceiling: pixels that are on the card, batch after batch, by precision and runtime, beside eager fp32.
- End to end: ``embcache extract`` of drawn JPEGs, 224 and 2000 pixels, whole and reduced decoding, with a store at the
  end; beside it the same images decoded by all cores with no network. The share of decoding is the time that decoding
  alone takes of the time that everything takes: near 1, the cores starve the card.
- Probes: linear, and DVME at S (50), five folds on synthetic features of the paper's dimensions.

Without a card it stops at once; ``--device cpu --quick`` runs the same code on small numbers, to see that it works.

    python benchmarks/gpu.py [--device cuda:0] [--quick] [--minutes 8]
"""

from __future__ import annotations

import embcache  # noqa: F401 - first, as it settles how torch's threads wait

# isort: split
import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from common import machine
from extraction import draw
from probing import GRID
from synthetic import make_dataset, put_store

from embcache.backbones.catalog import LoadedBackbone, find_backbone
from embcache.backbones.networks import build_network
from embcache.backbones.runtimes import RUNTIMES
from embcache.backbones.transforms import choose_transform
from embcache.cores import default_workers
from embcache.data.dataset import load_dataset
from embcache.data.images import image_refs
from embcache.errors import EmbcacheError
from embcache.extract.extract import extract_features
from embcache.extract.worker import freeze, prepare
from embcache.probe.probe import probe_features

NETWORKS = ("random", "dino", "effnet_lite0")
FUSED = ("simclr-like", "swav-like", "dino-like")
Row = tuple[str, str, str, str]


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time until the device is done."""
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def ceilings(device: torch.device, quick: bool) -> Iterator[Row]:
    """Images per second of networks with random weights on pixels that lie on the device."""
    precisions = ("fp32", "tf32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    batch, least = (2, 0.1) if quick else (64, 2.0)
    for name in NETWORKS[2:] if quick else NETWORKS:
        spec, usual = find_backbone(name), 0.0
        transform = choose_transform(spec, "paper", {(300, 300), (1, 1)})
        pixels = torch.randint(0, 256, (batch, *transform.size, 3), dtype=torch.uint8).to(device)
        for precision in precisions:
            for runtime in ("eager", "compile"):
                fits = RUNTIMES[runtime].precisions
                if fits and precision not in fits:
                    continue
                what = f"{name}, {precision}, {runtime}"
                torch.manual_seed(0)
                module = build_network(spec.network).eval().requires_grad_(False)
                loaded = LoadedBackbone(spec, module, "0" * 64, "random")
                try:
                    network = freeze(loaded, transform, str(device), precision).executed_by(runtime)
                    first = seconds(lambda n=network, p=pixels: n.forward(p), device)  # type: ignore[misc]
                    spent, done = 0.0, 0
                    while spent < least or done < 2:
                        spent += seconds(lambda n=network, p=pixels: [n.forward(p) for _ in range(2)], device)  # type: ignore[misc]
                        done += 2
                except (EmbcacheError, torch.cuda.OutOfMemoryError) as error:
                    yield what, f"not measured: {str(error).splitlines()[0]}", "", ""
                    continue
                rate = batch * done / spent
                usual = usual or rate
                yield what, f"{rate:,.1f} img/s", f"{rate / usual:.2f} × eager fp32", f"first batch {first:.1f} s"


def draw_classes(root: Path, number: int, side: int) -> Path:
    """JPEGs of two classes; of the same few drawings, as drawing takes longer than all else."""
    drawn = root.with_name(f"{root.name}-drawn")
    for folder in (root / "a", root / "b", drawn):
        folder.mkdir(parents=True)
    paths = draw(drawn, min(number, 32), side)
    for index in range(number):
        (root / "ab"[index % 2] / f"{index:05}.jpg").hardlink_to(paths[index % len(paths)])
    return root


def end_to_end(device: torch.device, quick: bool, folder: Path) -> Iterator[Row]:
    """Extraction into a store, and what decoding alone takes."""
    for side, number in ((224, 8), (2000, 4)) if quick else ((224, 2048), (2000, 512)):
        root = draw_classes(folder / f"images-{side}", number, side)
        dataset = load_dataset("folder", root, name=f"drawn-{side}")
        sources = image_refs(dataset.table)
        for decode in ("full", "reduced") if side > 512 else ("full",):
            transform = choose_transform(find_backbone("random"), "paper", {(side, side)}, decode)
            with ThreadPoolExecutor(default_workers()) as pool:
                works = [pool.submit(prepare, root, source, [transform]) for source in sources]
                alone = seconds(lambda works=works: [work.result() for work in works], torch.device("cpu"))  # type: ignore[misc]
            for precision in ("fp32",) if quick else ("fp32", "bf16"):
                asked = {"device": str(device), "precision": precision, "decode": decode}
                for turn in (
                    ("timed",) if quick else ("warm", "timed")
                ):  # the first one starts the device and settles cuDNN
                    home = folder / f"{turn}-{side}-{decode}-{precision}"
                    took = seconds(
                        lambda h=home, a=asked, d=dataset: extract_features("random", d, home=h, **a), device
                    )  # type: ignore[misc, arg-type]
                rate = f"{len(dataset) / took:,.1f} img/s"
                words = f"decoding alone {len(dataset) / alone:,.1f} img/s", f"share of decoding {alone / took:.2f}"
                yield f"extract random, {side} px, {decode}, {precision}", rate, *words


def probes(device: torch.device, quick: bool, folder: Path) -> Iterator[Row]:
    """Five folds on features that are cached."""
    dataset = make_dataset("drawn", 400 if quick else 5216, 100 if quick else 624, 0.74)
    for backbone in FUSED:
        put_store(folder / "home", dataset, backbone, 64 if quick else GRID[backbone])
    for head, backbones, subset in (("linear", FUSED[:1], "M"), ("dvme", FUSED, "S")):
        options = {"proj_dim": 32} if quick and head == "dvme" else None
        for where in dict.fromkeys(("cpu", str(device))):
            result, took = None, 0.0
            for _ in range(1 if quick else 2):  # the first one warms up
                begun = time.perf_counter()
                result = probe_features(
                    dataset, list(backbones), head=head, subset=subset, home=folder / "home", device=where,
                    save=False, folds=2 if quick else 5, head_options=options,
                )  # fmt: skip
                took = time.perf_counter() - begun
            assert result is not None
            yield f"probe {head}, {subset}, on {where}", f"{took:.2f} s", f"AUC {result.mean:.4f}", ""


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true", help="small numbers")
    parser.add_argument("--minutes", type=float, default=8, help="no further row is begun after this")
    asked = parser.parse_args()
    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device is here: run this on a machine with a card, or try it by --device cpu --quick")
    begun, quick = time.monotonic(), asked.quick
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "no card"
    print(f"{card}; {machine(('torch', 'torchvision', 'timm', 'pillow'))}\n")
    print("| work | measured | beside | |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = (
            end_to_end(device, quick, folder), probes(device, quick, folder), ceilings(device, quick),
        )  # fmt: skip
        for rows in parts:
            for row in rows:
                print(f"| {' | '.join(row)} |", flush=True)
                if time.monotonic() - begun > 60 * asked.minutes:
                    sys.exit(f"stopped after {asked.minutes:g} minutes: what is above is whole")
    print(f"\n{time.monotonic() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
