"""``embcache tsne``: cached backbones and fused embeddings side by side, each with its scores."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from embcache.data.classes import class_flags, class_words
from embcache.data.dataset import ImageDataset
from embcache.errors import StoreNotFoundError, UsageError
from embcache.figures.coordinates import cached_map
from embcache.figures.maps import METHODS, PERPLEXITY, MapScores, decimals, score_map
from embcache.figures.shown import Shown, fused_features, shown_images
from embcache.paths import PathLike, home_dir, slug
from embcache.probe.inputs import cached_backbones, load_features, open_stores
from embcache.runs.folders import ProbeResult, find_run_anywhere
from embcache.store.feature_store import extract_command

NAMES = {"tsne": "t-SNE", "umap": "UMAP", "pca": "PCA"}


@dataclass(frozen=True, eq=False)
class Panel:
    """One embedding and its map."""

    label: str  # backbone, or what a run fuses
    remark: str  # what a reader must know, such as that it was trained with labels
    dim: int  # of the embedding
    coordinates: NDArray[np.float32]  # (n, 2)
    scores: MapScores
    source: dict[str, Any]  # fingerprint of the recipe; or run, fold and fingerprints


@dataclass(frozen=True, eq=False)
class Maps:
    """Maps of the same images."""

    dataset: str
    method: str
    shown: Shown  # the images
    panels: tuple[Panel, ...]
    paths: tuple[Path, ...]  # the figure, once in each format asked for

    def table(self) -> pd.DataFrame:
        """One row an image and embedding: ``embedding, id, label, x, y``."""
        parts = [
            pd.DataFrame(
                {
                    "embedding": panel.label,
                    "id": self.shown.ids,
                    "label": self.shown.labels,
                    "x": panel.coordinates[:, 0],
                    "y": panel.coordinates[:, 1],
                }
            )
            for panel in self.panels
        ]
        return pd.concat(parts, ignore_index=True)


def draw_maps(
    ds: ImageDataset,
    backbones: Sequence[str] = (),
    runs: Sequence[str] = (),
    *,
    method: str = "tsne",
    rows: str = "test",
    most: int | None = None,
    seed: int = 0,
    perplexity: float = PERPLEXITY,
    home: PathLike | None = None,
    recipe: str | None = None,
    targets: Sequence[PathLike] = (),
) -> Maps:
    """Map cached embeddings of the same images, and draw the maps side by side."""
    if method not in METHODS:
        raise UsageError("there is no such method", expected=", ".join(METHODS), found=method, fix="--method tsne")
    found = [find_run_anywhere(run, home) for run in runs]
    for result, _ in found:
        _check_run(result, ds, found[0][0])
    names = list(dict.fromkeys(backbones)) or ([] if runs else cached_backbones(ds.name, home))
    needed = list(dict.fromkeys([*names, *(b for result, _ in found for b in result.backbones)]))
    if not needed:
        raise StoreNotFoundError(
            f"no features are cached for {ds.name}",
            where=home_dir(home) / slug(ds.name),
            fix=extract_command("NAME", ds, home),
        )
    stores = open_stores(ds, [needed], home, recipe)
    protocol: dict[str, Any] = {"seed": seed}
    if found:
        asked = found[0][0].request
        protocol = {key: asked[key] for key in ("seed", "test") if key in asked}
    shown = shown_images(ds, list(stores.values()), rows=rows, most=most, **protocol)
    features = {name: load_features(store, ds, shown.ids).numpy() for name, store in stores.items()}
    folder = home_dir(home) / slug(ds.name) / "figures"
    panels = []
    for name in names:
        source = {"recipe": stores[name].recipe.fingerprint}
        panels.append(_panel(name, "", features[name], source, shown, method, seed, perplexity, folder))
    for result, path in found:
        fold, fused = fused_features(result, path, {name: features[name] for name in result.backbones})
        source = {
            "run": result.id,
            "fold": str(fold),
            **{name: stores[name].recipe.fingerprint for name in result.backbones},
        }
        remark = f"trained with labels ({result.subset}, fold {fold})"
        label = f"{result.head}: {' + '.join(result.backbones)}"
        panels.append(_panel(label, remark, fused, source, shown, method, seed, perplexity, folder))
    paths = tuple(Path(target) for target in targets) or (folder / f"{method}.png",)
    _draw(ds, method, shown, panels, paths)
    return Maps(ds.name, method, shown, tuple(panels), paths)


def _check_run(result: ProbeResult, ds: ImageDataset, first: ProbeResult) -> None:
    if result.dataset != ds.name:
        raise UsageError("a run of another dataset", expected=ds.name, found=f"{result.id} of {result.dataset}")
    classes = result.request.get("classes", {})
    if classes != ds.renamed:
        raise UsageError(
            "a run that tells other classes apart has other test images",
            expected=class_words(ds.renamed) or "all classes as they are",
            found=f"{result.id}: {class_words(classes) or 'all classes as they are'}",
            fix=shlex.join(class_flags(classes)) or "leave --drop-class and --merge-class out",
        )
    protocols = [{key: r.request.get(key) for key in ("folds", "seed", "val", "test")} for r in (first, result)]
    if protocols[0] != protocols[1]:
        raise UsageError(
            "runs of different protocols have different test images",
            expected=f"{first.id}: {protocols[0]}",
            found=f"{result.id}: {protocols[1]}",
            fix="one figure each",
        )


def _panel(
    label: str,
    remark: str,
    features: NDArray[np.float32],
    source: dict[str, Any],
    shown: Shown,
    method: str,
    seed: int,
    perplexity: float,
    folder: Path,
) -> Panel:
    coordinates = cached_map(
        folder / "coordinates", source, shown.ids, features, method, seed=seed, perplexity=perplexity
    )
    scores = score_map(features, coordinates, shown.labels, shown.groups)
    return Panel(label, remark, features.shape[1], coordinates, scores, source)


def _draw(ds: ImageDataset, method: str, shown: Shown, panels: Sequence[Panel], paths: Sequence[Path]) -> None:
    from embcache.figures.plots import Map, plot_maps

    maps = []
    for panel in panels:
        s = panel.scores
        silhouette, accuracy = decimals(s.silhouette, 2), decimals(s.knn_accuracy, 3)
        caption = f"silhouette {silhouette} · k-NN {accuracy} · trust {s.trustworthiness:.3f}"
        title = panel.label + (f"\n{panel.remark}" if panel.remark else "")
        maps.append(Map(title, panel.coordinates, shown.labels, caption))
    synthetic = " (synthetic)" if ds.synthetic else ""
    title = f"{NAMES[method]}, {ds.name}{synthetic}: {shown.remark}, n = {len(shown.ids):,}"
    for path in paths:
        plot_maps(maps, ds.class_names, title, path)
