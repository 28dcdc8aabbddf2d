"""Maps of embeddings in the plane (the paper's Figures 2, D1, D2) with their scores; coordinates are cached."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from sklearn.metrics import pairwise_distances_chunked

from embcache.config import MapConfig
from embcache.cores import usable_cores
from embcache.data.classes import class_flags, class_words
from embcache.data.dataset import ImageDataset
from embcache.errors import ProtocolError, StoreError, UsageError
from embcache.figures.shown import (
    Colors,
    Shown,
    backbones_or_cached,
    check_dataset,
    colors_of,
    fused_features,
    own_protocol,
    shown_images,
)
from embcache.io import keep_file
from embcache.paths import PathLike, home_dir, slug
from embcache.probe.inputs import load_features, open_stores
from embcache.probe.layers import standardized
from embcache.runs.folders import Result, find_run_anywhere
from embcache.sealed import read_sealed, seal

Points = NDArray[np.float32]  # (n, 2)
METHODS = {"tsne": ("t-SNE", "openTSNE"), "umap": ("UMAP", "umap-learn"), "pca": ("PCA", "scikit-learn")}
"""Methods, each with its name and the package that it is from."""

PERPLEXITY = 30.0
NEIGHBORS = 10
"""Of an image, wherever neighborhoods are looked at."""

MAP_VERSION = 3
"""Raised whenever `embed_map` would give other coordinates of the same features: cached ones are then computed anew."""

_COMPONENTS = 50
_ALONE = 2_000  # images up to which further threads gain nothing
_DISTANCES = 256  # MiB of distances held at a time
_FEW = 10_000  # images up to which exact neighbors and Barnes-Hut are faster (docs/log.md)


def embed_map(features: ArrayLike, method: str = "tsne", *, seed: int = 0, perplexity: float = PERPLEXITY) -> Points:
    """Two-dimensional map of standardized features (n, D) → (n, 2); the same for the same seed."""
    X = np.asarray(features, dtype=np.float32)
    if len(X) < 4:
        raise ProtocolError("too few images for a map", code="too-few-images", expected="at least 4",
                            found=str(len(X)))  # fmt: skip
    X = standardized(X)
    if method == "umap":
        return _umap(X, seed, max(2, min(round(perplexity / 2), len(X) - 1)))
    if method == "pca":
        return _principal(X, seed, 2)
    return _tsne(_principal(X, seed, _COMPONENTS), seed, min(perplexity, (len(X) - 1) / 3))


def _principal(X: NDArray[np.float32], seed: int, most: int) -> NDArray[np.float32]:
    """The first principal components, (n, 2 … most)."""
    if X.shape[1] == 1:
        return np.column_stack([X, np.zeros_like(X)])
    found = PCA(min(most, *X.shape), svd_solver="auto", random_state=seed).fit_transform(X)
    return np.asarray(found, dtype=np.float32)


def _tsne(X: NDArray[np.float32], seed: int, perplexity: float) -> Points:
    from openTSNE import TSNE

    start, few = X[:, :2], len(X) <= _FEW
    tsne = TSNE(
        perplexity=perplexity,
        neighbors="exact" if few else "auto",
        negative_gradient_method="bh" if few else "fft",
        # Scaled as openTSNE does itself: the deviation of the first axis is 1e-4.
        initialization=(start / max(float(start[:, 0].std()), 1e-12) * 1e-4).astype(np.float64),
        random_state=seed,
        n_jobs=usable_cores() if len(X) > _ALONE else 1,
    )
    return np.asarray(tsne.fit(X), dtype=np.float32)


def _umap(X: NDArray[np.float32], seed: int, neighbors: int) -> Points:
    try:
        from umap import UMAP
    except ImportError as error:
        raise UsageError("UMAP is not installed", code="missing-package", expected="the package umap-learn",
                         fix='pip install "embcache[umap]"') from error  # fmt: skip
    # One job: with a seed umap-learn takes no more, and warns about more.
    mapped = UMAP(n_neighbors=neighbors, random_state=seed, n_jobs=1).fit_transform(X)
    return np.asarray(mapped, dtype=np.float32)


def cached_map(
    folder: Path, source: Mapping[str, Any], ids: Sequence[str], features: NDArray[np.float32], method: str,
    *, seed: int, perplexity: float,
) -> Points:  # fmt: skip
    """`embed_map` of features (n, D), read where the same map was computed before; ``source`` names their origin."""
    try:
        package = version(METHODS[method][1])
    except PackageNotFoundError:
        package = ""
    images, content = "\0".join(ids).encode("utf-8"), np.ascontiguousarray(features).tobytes()
    key = {
        "source": dict(source), "images": hashlib.sha256(images).hexdigest(),
        "features": hashlib.sha256(content).hexdigest(), "method": method, "seed": seed, "perplexity": perplexity,
        "map": MAP_VERSION, "version": package,
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode("utf-8")).hexdigest()[:16]
    path = folder / f"{method}-{name}.json"
    try:
        kept = read_sealed(path, "")
        coordinates = np.asarray(kept["coordinates"], dtype=np.float32)
        if kept["key"] == key and coordinates.shape == (len(ids), 2) and np.isfinite(coordinates).all():
            return coordinates
    except (OSError, StoreError, KeyError, ValueError, TypeError):
        pass  # missing, or not as it was written: it only saves work
    coordinates = embed_map(features, method, seed=seed, perplexity=perplexity)
    keep_file(path, seal({"key": key, "coordinates": coordinates.tolist()}))
    return coordinates


@dataclass(frozen=True)
class MapScores:
    """Scores of an embedding and of its map, over the images shown."""

    silhouette: float | None  # mean silhouette of the classes in the standardized embedding, −1 … 1
    knn_accuracy: float | None  # `neighbor_accuracy` in the embedding, not in its map
    trustworthiness: float


def decimals(score: float | None, places: int) -> str:
    """A score as text; a dash where there is none."""
    return "–" if score is None else f"{score:.{places}f}"


def score_map(
    features: ArrayLike, coordinates: ArrayLike, labels: NDArray[np.int64] | None, groups: Sequence[str]
) -> MapScores:
    """Scores of an embedding (n, D) and of its map (n, 2), with the class, if any, and the group of each image."""
    X = standardized(features)
    silhouette, accuracy = (None, None) if labels is None else _scores_among_groups(X, labels, groups, NEIGHBORS)
    k = max(1, min(NEIGHBORS, (len(X) - 1) // 2))
    return MapScores(silhouette, accuracy, float(trustworthiness(X, np.asarray(coordinates), n_neighbors=k)))


def neighbor_accuracy(
    features: ArrayLike, labels: NDArray[np.int64], groups: Sequence[str], k: int = NEIGHBORS
) -> float | None:
    """Balanced accuracy of the majority class among each image's k nearest images of other groups.

    A patient's other images say nothing about the class, however near they are. Ties go to the nearer neighbors.
    """
    return _scores_among_groups(standardized(features), labels, groups, k)[1]


def _scores_among_groups(
    x: NDArray[np.float32], labels: NDArray[np.int64], groups: Sequence[str], k: int
) -> tuple[float | None, float | None]:
    """Silhouette and balanced accuracy of neighbors, in one pass over the distances between images of other groups."""
    classes, y = np.unique(labels, return_inverse=True)
    group, names = pd.factorize(np.asarray(groups, dtype=object).astype(str))
    one_hot = np.eye(len(classes))[y]  # (n, C)
    own_group = np.zeros((len(names), len(classes)))
    np.add.at(own_group, group, one_hot)
    counts = one_hot.sum(0) - own_group[group]  # (n, C) of images of other groups
    k = min(k, len(x) - 1)
    weights = 1 + np.arange(k, 0, -1) * 1e-6

    def summarize(distances: NDArray[np.floating], start: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        same = group[start : start + len(distances), None] == group
        sums = np.where(same, 0, distances) @ one_hot
        distances[same] = np.inf
        near = np.argpartition(distances, k - 1, axis=1)[:, :k]
        far = np.take_along_axis(distances, near, axis=1)
        order = np.argsort(far, axis=1, kind="stable")
        near, known = np.take_along_axis(near, order, axis=1), np.isfinite(np.take_along_axis(far, order, axis=1))
        return sums, ((known * weights)[:, :, None] * one_hot[near]).sum(1)

    parts = pairwise_distances_chunked(x, reduce_func=summarize, working_memory=_DISTANCES)
    sums, votes = (np.concatenate(part) for part in zip(*parts, strict=True))
    right, voted = votes.argmax(1) == y, votes.any(1)
    recalls = [right[voted & (y == c)].mean() for c in np.unique(y[voted])]  # balanced accuracy is their mean
    means = np.divide(sums, counts, out=np.full_like(sums, np.inf), where=counts > 0)
    rows = np.arange(len(x))
    within = means[rows, y]
    means[rows, y] = np.inf
    between = means.min(1)
    known = np.isfinite(within) & np.isfinite(between)
    silhouettes = np.zeros(len(x))  # 0 where there is nothing to compare, as in scikit-learn
    within, between = within[known], between[known]
    silhouettes[known] = (between - within) / np.maximum(np.maximum(within, between), 1e-30)
    return float(silhouettes.mean()) if known.any() else None, float(np.mean(recalls)) if recalls else None


# Side by side.


@dataclass(frozen=True, eq=False)
class MapPanel:
    """One embedding and its map."""

    label: str  # backbone, or what a run fuses
    remark: str  # such as that it was trained with labels
    dim: int  # of the embedding
    coordinates: Points
    scores: MapScores
    source: dict[str, Any]  # fingerprint of the recipe; or run, fold and fingerprints


@dataclass(frozen=True, eq=False)
class Maps:
    """Maps of the same images."""

    dataset: str
    method: str
    class_names: tuple[str, ...]
    shown: Shown  # the images
    colors: Colors  # what they are colored by
    panels: tuple[MapPanel, ...]
    paths: tuple[Path, ...]  # the figure, once in each format

    def table(self) -> pd.DataFrame:
        """One row per image and embedding: ``embedding, id, label, class_name, x, y``; of numbers no ``class_name``."""
        values, number = self.colors.values, self.colors.values.dtype.kind == "f"
        names = {} if number else {"class_name": [self.colors.names[value] for value in values]}
        images = {"id": self.shown.ids, "label": values, **names}
        parts = [
            pd.DataFrame({"embedding": p.label, **images, "x": p.coordinates[:, 0], "y": p.coordinates[:, 1]})
            for p in self.panels
        ]
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
            "labels": self.shown.labels.tolist(), "colors": self.colors.values.tolist(),
            "color_names": list(self.colors.names), "class_names": list(self.class_names), "panels": panels,
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
    from embcache.figures.plots import Map, plot_maps  # what only maps needs no matplotlib

    config = MapConfig.make(config, options)
    found = [find_run_anywhere(run, home) for run in config.run]
    for result, _ in found:
        _check_run(result, ds, found[0][0])
    names = list(dict.fromkeys(backbones)) if backbones or found else backbones_or_cached(ds, (), home)
    needed = list(dict.fromkeys([*names, *(b for result, _ in found for b in result.backbones)]))
    stores = open_stores(ds, [needed], home, config.recipe)
    protocol = own_protocol(found[0][0]) if found else {"seed": config.seed}
    shown = shown_images(ds, list(stores.values()), rows=config.rows, most=config.limit, **protocol)
    colors = colors_of(ds.task, shown.labels, config.positive)
    features = {name: load_features(store, ds, shown.ids).numpy() for name, store in stores.items()}
    prints = {name: store.recipe.fingerprint for name, store in stores.items()}
    embeddings = [(name, "", features[name], {"recipe": prints[name]}) for name in names]
    for result, path in found:
        fold, fused = fused_features(result, path, features)
        source = {"run": result.id, "fold": str(fold), **{name: prints[name] for name in result.backbones}}
        remark = f"trained with labels ({result.subset}, fold {fold})"
        embeddings.append((f"{result.head}: {' + '.join(result.backbones)}", remark, fused, source))
    folder, panels, maps = home_dir(home) / slug(ds.name) / "figures", [], []
    for label, remark, x, source in embeddings:
        coordinates = cached_map(
            folder / "coordinates", source, shown.ids, x, config.method, seed=config.seed, perplexity=config.perplexity
        )
        s = score_map(x, coordinates, colors.values if colors.classes else None, shown.groups)
        panels.append(MapPanel(label, remark, x.shape[1], coordinates, s, source))
        silhouette, accuracy = decimals(s.silhouette, 2), decimals(s.knn_accuracy, 3)
        caption = f"silhouette {silhouette} · k-NN {accuracy} · " * colors.classes + f"trust {s.trustworthiness:.3f}"
        maps.append(Map(f"{label}\n{remark}".rstrip(), coordinates, colors.values, caption))
    paths = tuple(Path(target) for target in targets) or (folder / f"{config.method}.png",)
    title = f"{METHODS[config.method][0]}, {ds.name}{' (synthetic)' * ds.synthetic}: {shown.remark}"
    for target in paths:
        plot_maps(maps, colors.names, f"{title}, n = {len(shown.ids):,}", target)
    return Maps(ds.name, config.method, tuple(ds.class_names), shown, colors, tuple(panels), paths)


def _check_run(result: Result, ds: ImageDataset, first: Result) -> None:
    check_dataset(result, ds)
    classes = result.request.get("classes", {})
    if classes != ds.renamed:
        raise UsageError(
            "a run with other classes has other test images", code="other-classes",
            expected=class_words(ds.renamed) or "all classes as they are",
            found=f"{result.id}: {class_words(classes) or 'all classes as they are'}",
            fix=shlex.join(class_flags(classes)) or "leave --drop-class and --merge-class out",
        )  # fmt: skip
    mine, others = ({key: r.request.get(key) for key in ("folds", "seed", "val", "test")} for r in (result, first))
    if mine != others:
        raise UsageError(
            "runs of different protocols have different test images", code="different-test-sets",
            expected=f"{first.id}: {others}", found=f"{result.id}: {mine}", fix="draw one figure for each",
        )  # fmt: skip
