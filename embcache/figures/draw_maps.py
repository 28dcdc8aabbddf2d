"""``embcache tsne``: cached backbones and fused embeddings side by side, each with its scores."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from embcache.config import MapConfig
from embcache.data.classes import class_flags, class_words
from embcache.data.dataset import ImageDataset
from embcache.errors import UsageError
from embcache.figures.maps import MapScores, cached_map, decimals, score_map
from embcache.figures.plots import Map, plot_maps
from embcache.figures.shown import Shown, backbones_or_cached, fused_features, shown_images
from embcache.paths import PathLike, home_dir, slug
from embcache.probe.inputs import load_features, open_stores
from embcache.runs.folders import Result, find_run_anywhere

NAMES = {"tsne": "t-SNE", "umap": "UMAP", "pca": "PCA"}


@dataclass(frozen=True, eq=False)
class MapPanel:
    """One embedding and its map."""

    label: str  # backbone, or what a run fuses
    remark: str  # such as that it was trained with labels
    dim: int  # of the embedding
    coordinates: NDArray[np.float32]  # (n, 2)
    scores: MapScores
    source: dict[str, Any]  # fingerprint of the recipe; or run, fold and fingerprints


@dataclass(frozen=True, eq=False)
class Maps:
    """Maps of the same images."""

    dataset: str
    method: str
    class_names: tuple[str, ...]
    shown: Shown  # the images
    panels: tuple[MapPanel, ...]
    paths: tuple[Path, ...]  # the figure, once in each format

    def table(self) -> pd.DataFrame:
        """One row per image and embedding: ``embedding, id, label, class_name, x, y``."""
        names = [self.class_names[label] for label in self.shown.labels]
        images = pd.DataFrame({"id": self.shown.ids, "label": self.shown.labels, "class_name": names})
        parts = []
        for panel in self.panels:
            part = images.assign(x=panel.coordinates[:, 0], y=panel.coordinates[:, 1])
            part.insert(0, "embedding", panel.label)
            parts.append(part)
        return pd.concat(parts, ignore_index=True)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        panels = [
            {
                "embedding": p.label, "remark": p.remark, "dimensions": p.dim, **asdict(p.scores), "source": p.source,
                "coordinates": p.coordinates.tolist(),
            }
            for p in self.panels
        ]  # fmt: skip
        return {
            "dataset": self.dataset, "method": self.method, "rows": self.shown.remark, "ids": self.shown.ids,
            "labels": self.shown.labels.tolist(), "class_names": list(self.class_names), "panels": panels,
            "figures": [str(path) for path in self.paths],
        }  # fmt: skip


def draw_maps(
    ds: ImageDataset,
    backbones: Sequence[str] = (),
    config: MapConfig | None = None,
    *,
    home: PathLike | None = None,
    targets: Sequence[PathLike] = (),
    **options: Any,
) -> Maps:
    """Map cached embeddings of the same images and draw the maps side by side; ``options`` are fields of ``config``."""
    config = MapConfig.make(config, options)
    found = [find_run_anywhere(run, home) for run in config.run]
    for result, _ in found:
        _check_run(result, ds, found[0][0])
    names = list(dict.fromkeys(backbones)) if backbones or found else backbones_or_cached(ds, (), home)
    needed = list(dict.fromkeys([*names, *(b for result, _ in found for b in result.backbones)]))
    stores = open_stores(ds, [needed], home, config.recipe)
    protocol: dict[str, Any] = {"seed": config.seed}
    if found:
        request = found[0][0].request
        protocol = {key: request[key] for key in ("seed", "test") if key in request}
    shown = shown_images(ds, list(stores.values()), rows=config.rows, most=config.limit, **protocol)
    features = {name: load_features(store, ds, shown.ids).numpy() for name, store in stores.items()}
    folder = home_dir(home) / slug(ds.name) / "figures"

    def panel(label: str, remark: str, x: NDArray[np.float32], source: dict[str, Any]) -> MapPanel:
        coordinates = cached_map(
            folder / "coordinates", source, shown.ids, x, config.method, seed=config.seed, perplexity=config.perplexity
        )
        scores = score_map(x, coordinates, shown.labels, shown.groups)
        return MapPanel(label, remark, x.shape[1], coordinates, scores, source)

    prints = {name: store.recipe.fingerprint for name, store in stores.items()}
    panels = [panel(name, "", features[name], {"recipe": prints[name]}) for name in names]
    for result, path in found:
        fold, fused = fused_features(result, path, {name: features[name] for name in result.backbones})
        source = {"run": result.id, "fold": str(fold), **{name: prints[name] for name in result.backbones}}
        remark = f"trained with labels ({result.subset}, fold {fold})"
        panels.append(panel(f"{result.head}: {' + '.join(result.backbones)}", remark, fused, source))
    paths = tuple(Path(target) for target in targets) or (folder / f"{config.method}.png",)
    synthetic = " (synthetic)" if ds.synthetic else ""
    title = f"{NAMES[config.method]}, {ds.name}{synthetic}: {shown.remark}, n = {len(shown.ids):,}"
    for target in paths:
        plot_maps([_map(p, shown) for p in panels], ds.class_names, title, target)
    return Maps(ds.name, config.method, tuple(ds.class_names), shown, tuple(panels), paths)


def _map(panel: MapPanel, shown: Shown) -> Map:
    s = panel.scores
    silhouette, accuracy = decimals(s.silhouette, 2), decimals(s.knn_accuracy, 3)
    caption = f"silhouette {silhouette} · k-NN {accuracy} · trust {s.trustworthiness:.3f}"
    return Map(panel.label + (f"\n{panel.remark}" if panel.remark else ""), panel.coordinates, shown.labels, caption)


def _check_run(result: Result, ds: ImageDataset, first: Result) -> None:
    if result.dataset != ds.name:
        raise UsageError("a run of another dataset", code="other-dataset", expected=ds.name,
                         found=f"{result.id} of {result.dataset}")  # fmt: skip
    classes = result.request.get("classes", {})
    if classes != ds.renamed:
        raise UsageError(
            "a run with other classes has other test images", code="other-classes",
            expected=class_words(ds.renamed) or "all classes as they are",
            found=f"{result.id}: {class_words(classes) or 'all classes as they are'}",
            fix=shlex.join(class_flags(classes)) or "leave --drop-class and --merge-class out",
        )  # fmt: skip
    protocols = [{key: r.request.get(key) for key in ("folds", "seed", "val", "test")} for r in (first, result)]
    if protocols[0] != protocols[1]:
        raise UsageError(
            "runs of different protocols have different test images", code="different-test-sets",
            expected=f"{first.id}: {protocols[0]}", found=f"{result.id}: {protocols[1]}",
            fix="draw one figure for each",
        )  # fmt: skip
