"""t-SNE of `embcache tsne` (openTSNE) beside scikit-learn's on the same features: time, and trust in the map.

5,000 × 1536, standardized, both from a PCA initialization at perplexity 30 with all cores; in turns, medians. Features
are synthetic (classes on a curved sheet, with noise) unless a store's are given.

    python benchmarks/tsne.py [--images 5000] [--dim 1536] [--repeats 3] [--features FILE.npy]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import machine
from numpy.typing import NDArray
from sklearn.manifold import TSNE, trustworthiness
from sklearn.preprocessing import StandardScaler

from embcache.cores import usable_cores
from embcache.figures.maps import embed_map


def synthetic(images: int, dim: int) -> NDArray[np.float32]:
    """Features with a spectrum that falls as those of networks do: 32 factors, mixed by a ReLU layer, and noise."""
    rng = np.random.default_rng(0)
    factors = rng.normal(size=(images, 32)) * np.arange(1, 33) ** -0.5
    factors += 2 * rng.normal(size=(10, 32))[rng.integers(0, 10, images)] * np.arange(1, 33) ** -0.5
    mixed = np.maximum(factors @ rng.normal(size=(32, dim)) + rng.normal(size=dim), 0)
    return (mixed + 0.3 * rng.normal(size=mixed.shape)).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--features", type=Path, help="a .npy of float32 (n, D); the first images are taken")
    asked = parser.parse_args()
    if asked.features:
        features = np.load(asked.features, allow_pickle=False)[: asked.images]
    else:
        features = synthetic(asked.images, asked.dim)
    x = StandardScaler().fit_transform(features)
    works: dict[str, Callable[[int], NDArray[np.float32]]] = {
        "embcache": lambda seed: embed_map(features, seed=seed),
        "scikit-learn": lambda seed: TSNE(init="pca", random_state=seed, n_jobs=usable_cores()).fit_transform(x),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    trust: dict[str, list[float]] = {name: [] for name in works}
    for seed in range(asked.repeats):
        for name, work in works.items():
            began = time.perf_counter()
            found = work(seed)
            times[name].append(time.perf_counter() - began)
            trust[name].append(float(trustworthiness(x, found, n_neighbors=10)))
    print(f"| {len(x):,} × {x.shape[1]} | s | trustworthiness, 10 neighbors |\n|---|---|---|")
    for name in works:
        print(f"| {name} | {statistics.median(times[name]):.1f} | {statistics.median(trust[name]):.4f} |")
    ratios = [b / a for a, b in zip(times["embcache"], times["scikit-learn"], strict=True)]
    print(f"\nembcache is {statistics.median(ratios):.2f} times as fast (in each turn: "
          f"{', '.join(f'{r:.2f}' for r in ratios)}); {machine(('openTSNE', 'scikit-learn', 'numpy'))}")  # fmt: skip


if __name__ == "__main__":
    main()
