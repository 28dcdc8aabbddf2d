"""Frozen networks executed by each runtime, relative to torch as it is: speed and largest difference, in one run.

Random weights where none are here (the speed is the same), drawn images, torch's number of threads. Runtimes take turns
batch by batch, and medians are compared. With ``--images FOLDER`` also `extract` end to end over those images.

    python benchmarks/runtimes.py [--networks random:16,dino:8,effnet_lite0:16] [--runtimes openvino,…]
    [--precisions fp32,bf16] [--turns 8] [--images FOLDER [--only-end-to-end]]
"""

from __future__ import annotations

import embcache  # noqa: F401 - first, as it settles how torch's threads wait

# isort: split
import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from common import machine

from embcache.backbones.catalog import LoadedBackbone, find_backbone, load_backbone, weights_status
from embcache.backbones.networks import build_network
from embcache.backbones.runtimes import RUNTIMES, is_installed
from embcache.backbones.transforms import choose_transform
from embcache.data.dataset import load_dataset
from embcache.errors import UsageError
from embcache.extract.extract import extract_features
from embcache.extract.worker import FrozenNetwork, freeze


def load(name: str) -> LoadedBackbone:
    """A backbone with its weights, or with random ones."""
    spec = find_backbone(name)
    if not weights_status(name).startswith("not here"):
        return load_backbone(name)
    torch.manual_seed(0)
    return LoadedBackbone(spec, build_network(spec.network).eval().requires_grad_(False), "0" * 64, "random")


def in_turns(runs: Mapping[str, Callable[[], object]], turns: int) -> dict[str, tuple[float, float]]:
    """Median wall and processor seconds of each."""
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in runs}
    for _ in range(turns):
        for way, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            found[way].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        way: (statistics.median(w for w, _ in each), statistics.median(c for _, c in each))
        for way, each in found.items()
    }


def compare(name: str, batch: int, runtimes: list[str], precisions: list[str], turns: int) -> None:
    """Print the rows of one network."""
    loaded = load(name)
    transform = choose_transform(loaded.spec, None, {(300, 300)})
    drawn = np.random.default_rng(0).integers(0, 256, (batch, *transform.size, 3), dtype=np.uint8)
    pixels, networks, began = torch.from_numpy(drawn), dict[str, FrozenNetwork](), dict[str, float]()
    for precision in precisions:
        for runtime in ["eager", *runtimes]:
            try:
                network = freeze(load(name), transform, "cpu", f"{precision}+{runtime}")
                start = time.perf_counter()
                network.forward(pixels)
            except UsageError as error:
                print(f"| {name}, {batch} | {runtime} {precision} | {error.problem}: {error.found} | | | | |")
                continue
            networks[f"{runtime} {precision}"] = network
            began[f"{runtime} {precision}"] = time.perf_counter() - start
    truth = networks["eager fp32"].forward(pixels).double()
    times = in_turns({way: lambda n=n: n.forward(pixels) for way, n in networks.items()}, turns)
    wall, cpu = times["eager fp32"]
    for way, network in networks.items():
        made = network.forward(pixels).double()
        difference = float((made - truth).abs().max() / truth.abs().max())
        cosine = float(torch.nn.functional.cosine_similarity(made, truth).min())
        print(
            f"| {name}, {batch} | {way} | {batch / times[way][0]:.1f} | {wall / times[way][0]:.2f} | "
            f"{cpu / times[way][1]:.2f} | {difference:.0e} | {cosine:.5f} | {began[way]:.1f} |", flush=True,
        )  # fmt: skip


def end_to_end(name: str, images: Path, runtimes: list[str]) -> None:
    """Print the rows of one network over real images; the second run of a runtime finds its conversion."""
    dataset, spent = load_dataset("folder", images, name="images"), dict[str, list[tuple[float, float]]]()
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(2):
            for runtime in ["eager", *runtimes]:
                wall, cpu, home = time.perf_counter(), time.process_time(), Path(folder) / runtime
                extract_features(name, dataset, home=home, runtime=runtime)
                took = (time.perf_counter() - wall, time.process_time() - cpu)
                spent.setdefault(runtime, []).append(took)
                for store in home.glob("images/*-*"):
                    store.rename(Path(folder) / f"{runtime}-{turn}")
    for runtime, runs in spent.items():
        (first, _), (second, cpu) = runs
        usual, usual_cpu = spent["eager"][1]
        rates = f"{len(dataset) / first:.1f} | {len(dataset) / second:.1f} | {len(dataset) / cpu:.1f}"
        print(f"| {name} | {runtime} | {rates} | {usual / second:.2f} | {usual_cpu / cpu:.2f} |", flush=True)


def main() -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="random:16,dino:8,effnet_lite0:16")
    parser.add_argument("--runtimes", default=",".join(name for name in RUNTIMES if name != "eager"))
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--only-end-to-end", action="store_true", help="with --images: without the first table")
    asked = parser.parse_args()
    networks = [each.rpartition(":") for each in asked.networks.split(",")]
    runtimes = [name for name in asked.runtimes.split(",") if name != "eager" and is_installed(name)]
    if not asked.only_end_to_end:
        print(
            "| network, batch | runtime | img/s | to eager fp32 | by CPU time | difference | cosine | first batch, s |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for name, _, batch in networks:
            compare(name, int(batch), runtimes, asked.precisions.split(","), asked.turns)
    if asked.images is not None:
        print("\n| extract | runtime | images/s, first run | second | per CPU second | to eager | by CPU time |")
        print("|---|---|---|---|---|---|---|")
        for name, _, _ in networks:
            if not weights_status(name).startswith("not here"):
                end_to_end(name, asked.images, runtimes)
    print(f"\n{machine()}, {torch.get_num_threads()} threads of torch")


if __name__ == "__main__":
    main()
