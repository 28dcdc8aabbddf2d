"""The embedding map of a dataset: points of cached and fused features, what was predicted of them, thumbnails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embcache.data.classes import target_words
from embcache.data.dataset import ImageDataset
from embcache.errors import EmbcacheError, StoreNotFoundError
from embcache.figures.maps import PERPLEXITY, MapScores, cached_map, decimals, score_map
from embcache.figures.shown import Shown, fused_features, shown_images
from embcache.paths import slug
from embcache.probe.inputs import cached_backbones, load_features, open_stores
from embcache.probe.metrics import merit
from embcache.report.choice import Choice
from embcache.report.collect import Part
from embcache.report.thumbs import ACROSS, Sheets
from embcache.results.layout import signed
from embcache.runs.folders import ProbeResult
from embcache.store.feature_store import FeatureStore

LIMIT = 6000
"""Images of a map: more make the page heavy and hide each other."""

FUSED = ("dvme", "dvme-token", "dvme-noattn", "dvme-identity")

_SEED = 0


@dataclass(frozen=True, eq=False)
class Panel:
    """One embedding: its name, what must be said of it, dimensions, coordinates (n, 2), scores."""

    label: str
    remark: str
    dim: int
    coordinates: NDArray[np.float32]
    scores: MapScores


@dataclass(frozen=True, eq=False)
class EmbeddingMap:
    """The map of one dataset."""

    ds: ImageDataset
    shown: Shown  # the images, in an order of their own that says nothing
    panels: tuple[Panel, ...]
    predicted: tuple[tuple[str, NDArray[np.int64], NDArray[np.float64]], ...]  # (n,)
    notes: tuple[str, ...]  # what could not be shown, and why

    def scores(self) -> list[list[str]]:
        """A row an embedding: name, dimensions, silhouette, k-NN accuracy, trustworthiness, remark."""
        return [
            [
                panel.label, f"{panel.dim:,}",
                "–" if panel.scores.silhouette is None else signed(panel.scores.silhouette, 3),
                decimals(panel.scores.knn_accuracy, 3), decimals(panel.scores.trustworthiness, 3), panel.remark,
            ]
            for panel in self.panels
        ]  # fmt: skip


def make_map(
    part: Part,
    choices: Sequence[Choice],
    *,
    rows: str = "test",
    most: int = LIMIT,
    say: Callable[[str], object] = lambda line: None,
) -> EmbeddingMap:
    """Map every cached backbone of a dataset, and what its best fused run makes of them."""
    ds = part.ds
    if ds is None:
        raise StoreNotFoundError(f"neither images nor a table of {part.name} are here", fix="embcache extract …")
    stores, notes = _stores(ds, part)
    request = choices[-1].chosen.result.request if choices else {}
    protocol: dict[str, Any] = {key: request[key] for key in ("seed", "test") if key in request}
    protocol["exclude_test_overlap"] = bool(request.get("exclude_test_overlap", False))
    shown = _mixed(shown_images(ds, list(stores.values()), rows=rows, most=most, **protocol))
    features = {name: load_features(store, ds, shown.ids).numpy() for name, store in stores.items()}
    folder = part.home / slug(ds.name) / "figures" / "coordinates"

    def panel(label: str, remark: str, x: NDArray[np.float32], source: dict[str, Any]) -> Panel:
        say(f"{ds.name}: t-SNE of {label}, {len(x):,} images")
        points = cached_map(folder, source, shown.ids, x, "tsne", seed=_SEED, perplexity=PERPLEXITY)
        return Panel(label, remark, x.shape[1], points, score_map(x, points, shown.labels, shown.groups))

    panels = [panel(name, "", x, {"recipe": stores[name].recipe.fingerprint}) for name, x in sorted(features.items())]
    fused = _fused_run(part, choices, features)
    if fused is not None:
        try:
            fold, x = fused_features(fused, part.run_folder(fused), {b: features[b] for b in fused.backbones})
            source = {"run": fused.id, "fold": str(fold)}
            remark = f"trained with labels ({fused.subset}, {fused.n_train:,} of them; fold {fold})"
            panels.append(panel(f"{fused.head}: {' + '.join(fused.backbones)}", remark, x, source))
        except EmbcacheError as error:
            notes.append(f"the embedding of run {fused.id} is not shown: {error.problem}")
    return EmbeddingMap(ds, shown, tuple(panels), tuple(_predictions(choices, shown.ids)), tuple(notes))


def _stores(ds: ImageDataset, part: Part) -> tuple[dict[str, FeatureStore], list[str]]:
    """A store of every backbone that is cached; of several recipes that of the results."""
    stores: dict[str, FeatureStore] = {}
    notes = []
    for name in cached_backbones(ds.name, part.home):
        used = [dict(map(tuple, r.request.get("recipes", []))).get(name) for r in part.results]
        for recipe in (None, *dict.fromkeys(fingerprint for fingerprint in used if fingerprint)):
            try:
                stores |= open_stores(ds, [[name]], part.home, recipe)
                break
            except EmbcacheError as error:
                problem = error.problem
        else:
            notes.append(f"{name} is not shown: {problem}")
    if not stores:
        raise StoreNotFoundError(f"no features are cached for {ds.name}", fix="embcache extract --backbone NAME …")
    return stores, notes


def _fused_run(part: Part, choices: Sequence[Choice], features: dict[str, NDArray[np.float32]]) -> ProbeResult | None:
    """The fused run of most training labels, of several the best on validation, whose backbones are all here."""
    runs = [
        r
        for r in part.results
        if r.kind == "probe" and r.head in FUSED and not target_words(r.request) and set(r.backbones) <= set(features)
    ]
    ranked = {rival.result.id for choice in choices for rival in choice.rivals}
    runs = [r for r in runs if r.id in ranked] or runs
    return max(runs, key=lambda r: (r.head == "dvme", r.n_train, merit(r.metric, r.val_mean)), default=None)


def _mixed(shown: Shown) -> Shown:
    """The same images in a seeded order, so that a point's number does not tell its place in the dataset."""
    order = np.random.Generator(np.random.PCG64(_SEED)).permutation(len(shown.ids))
    return Shown([shown.ids[i] for i in order], shown.labels[order], [shown.groups[i] for i in order], shown.remark)


def _predictions(
    choices: Sequence[Choice], ids: Sequence[str]
) -> list[tuple[str, NDArray[np.int64], NDArray[np.float64]]]:
    found = []
    for choice in reversed(choices):
        t = choice.chosen.tested
        mean = t.predictions.ensemble().p[0]  # (n, C)
        place = {name: row for row, name in enumerate(t.ids.tolist())}
        rows = np.array([place.get(name, -1) for name in ids], dtype=np.int64)
        classes = np.where(rows >= 0, mean.argmax(1)[rows], -1)
        chances = np.where(rows >= 0, mean.max(1)[rows], 0.0)
        found.append((f"{choice.subset}: {choice.chosen.name}", classes, chances))
    return found


def map_data(found: EmbeddingMap, sheets: Sheets | None, *, ids: bool) -> dict[str, Any]:
    """The map as JSON data for the page's script; without ids where these must not be told."""
    return {
        "ids": found.shown.ids if ids else None,
        "labels": found.shown.labels.tolist(),
        "classes": list(found.ds.class_names),
        "maps": [
            {"xy": [[round(float(v), 2) for v in axis] for axis in panel.coordinates.T], "remark": panel.remark}
            for panel in found.panels
        ],
        "predicted": [
            {"by": words, "label": classes.tolist(), "p": [round(float(v), 3) for v in chances]}
            for words, classes, chances in found.predicted
        ],
        "thumbs": None
        if sheets is None
        else {"side": sheets.side, "across": ACROSS, "sheets": list(sheets.sheets), "place": list(sheets.place)},
    }
