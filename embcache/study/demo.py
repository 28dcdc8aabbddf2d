"""The demonstration: the whole journey on the built-in synthetic sample, offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embcache.config import ProbeConfig
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.extract.extract import extract
from embcache.figures.maps import embed_map
from embcache.figures.plots import Map, plot_maps
from embcache.log import log
from embcache.paths import PathLike, home_dir, slug
from embcache.probe.probe import probe
from embcache.runs.folders import Result

# All that a machine with nothing but PyPI can run: no download is ever needed.
DEMO_BACKBONES = ("random", "effnet_lite0", "effnet_lite1", "effnet_lite2")


@dataclass(frozen=True)
class DemoOutcome:
    """What the demonstration made, and where it lies."""

    dataset: ImageDataset
    results: tuple[Result, ...]
    figure: Path
    home: Path


def run_demo(*, home: PathLike | None = None) -> DemoOutcome:
    """Extract, probe, fuse and draw the built-in synthetic sample. Offline."""
    folder = home_dir(home)
    log.info("1/4  images: the built-in sample (synthetic, drawn by embcache)")
    dataset = load_dataset("sample", home=home)
    log.info(f"2/4  extract: {len(dataset)} images through {', '.join(DEMO_BACKBONES)}")
    extractions = extract(dataset, DEMO_BACKBONES, home=home)
    log.info("3/4  probe: linear at S, M and F for each backbone, DVME over the three pretrained ones at S")
    results = probe(dataset, [[name] for name in DEMO_BACKBONES], ["S", "M", "F"], ProbeConfig(), home=home)
    results += probe(dataset, [DEMO_BACKBONES[1:]], ["S"], ProbeConfig(head="dvme"), home=home)
    log.info("4/4  t-SNE of the test images")
    maps = []
    for extraction in extractions:
        features, labels, _ = extraction.store.arrays(dataset, split="test")
        maps.append(Map(extraction.backbone, embed_map(features), labels))
    title = f"t-SNE of the cached features, {len(maps[0].labels)} test images of the synthetic sample"
    figure = plot_maps(maps, dataset.class_names, title, folder / slug(dataset.name) / "figures" / "tsne.png")
    return DemoOutcome(dataset, tuple(results), figure, folder)


def pivot_results(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Results of one dataset: backbones and heads down, subsets across; cells are mean ± sd over folds."""
    columns: dict[str, tuple[int, int]] = {}
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for result in results:
        column = (result.n_train, result.labels_used - result.n_train)
        columns[result.subset] = max(columns.get(result.subset, column), column)
        model = (result.head, " + ".join(result.backbones))
        scored = result.mean is not None and result.std is not None
        cell = f"{result.mean:.3f} ± {result.std:.3f}" if scored else "not scored"
        cells.setdefault(model, {})[result.subset] = cell
    subsets = sorted(columns, key=lambda subset: columns[subset])
    headers = ["head", "backbones", *(f"{s}: {columns[s][0]:,} + {columns[s][1]:,} labels" for s in subsets)]
    return headers, [[*model, *(row.get(subset, "") for subset in subsets)] for model, row in cells.items()]
