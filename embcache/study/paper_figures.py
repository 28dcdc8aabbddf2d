"""The paper's figures: t-SNE maps of embeddings (Figures 2, D1, D2) and DVME's mean attention (Figure F1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embcache.errors import EmbcacheError, UsageError
from embcache.figures.attention import mass_table, mean_attention
from embcache.figures.maps import NEIGHBORS, decimals, embed_map, neighbor_accuracy
from embcache.figures.plots import AttentionPanel, Map, plot_attention, plot_maps
from embcache.figures.shown import LIMIT, Shown, fused_features, shown_images
from embcache.paths import home_dir, slug
from embcache.probe.inputs import load_features, open_stores
from embcache.results.grid import Grid, Model
from embcache.results.layout import Marks, Table
from embcache.results.paper import PAPER_NAMES
from embcache.runs.folders import load_heads, runs_dir
from embcache.store.feature_store import FeatureStore
from embcache.study.definitions import Figure
from embcache.study.settings import Settings, in_a_line
from embcache.study.study import Progress, Say, carry_out
from embcache.study.study_plan import DatasetState, look


@dataclass(frozen=True)
class Drawn:
    """Figures that were made, and a table of what they say."""

    paths: tuple[Path, ...]  # one a dataset
    table: Table


@dataclass(frozen=True, eq=False)
class _Panel:
    label: str
    features: NDArray[np.float32]  # (n, D)
    remark: str = ""


def figure_grid(figure: Figure) -> Grid:
    """What a figure needs, as a grid: features of single backbones, and a fused head."""
    models = [Model(PAPER_NAMES.get(name, name), "features", "", (name,)) for name in figure.backbones]
    if figure.fused:
        models.append(Model(PAPER_NAMES["dvme"], "probe", "dvme", figure.fused))
    return Grid(
        figure.name, figure.title, figure.datasets, tuple(models), (figure.subset,), "models", leaderboard=False
    )


def narrow_figure(
    figure: Figure, datasets: Sequence[str] = (), backbones: Sequence[str] = (), subsets: Sequence[str] = ()
) -> Figure:
    """A figure of other datasets, backbones (each alone, and all fused) or of DVME trained on another subset."""
    if len(subsets) > 1:
        raise UsageError("a figure shows one subset", found=", ".join(subsets), fix=f"--subset {subsets[0]}")
    if len(backbones) == 1 and figure.kind == "attention":
        raise UsageError(
            f"{figure.name} shows how DVME fuses backbones", expected="two or more", found=backbones[0],
            fix=f"--backbone {backbones[0]},…",
        )  # fmt: skip
    if backbones:
        alone = tuple(backbones) if figure.kind == "maps" else ()
        figure = replace(figure, backbones=alone, fused=tuple(backbones) if len(backbones) > 1 else ())
    return replace(figure, datasets=tuple(datasets) or figure.datasets, subset=(*subsets, figure.subset)[0].upper())


def draw_figure(
    figure: Figure,
    settings: Settings,
    *,
    target: Path | None = None,
    states: Sequence[DatasetState] | None = None,
    say: Say = lambda line: None,
    progress: Progress | None = None,
) -> Drawn:
    """Do what a figure lacks and draw it, one file a dataset."""
    grid = figure_grid(figure)
    states = look(grid, settings) if states is None else states
    marks = Marks()
    rows: list[tuple[str, ...]] = []
    records: list[Mapping[str, Any]] = []
    paths = []
    draw = _draw_maps if figure.kind == "maps" else _draw_attention
    without: dict[str, str] = {}
    for state in states:
        carry_out(state, grid.models, settings, without=without, say=say, progress=progress)
        reasons = [state.problem, *state.refused.values()]
        for reason in dict.fromkeys(filter(None, reasons)):
            rows.append((state.asked, f"—{marks.mark(reason)}", *[""] * (len(_HEADERS[figure.kind]) - 2)))
            records.append({"dataset": state.asked, "reason": reason})
        if state.ds is None:
            continue
        path = _path(figure, state, settings, target, several=len(states) > 1)
        try:
            drawn = draw(figure, grid, state, settings, path, marks)
        except EmbcacheError as error:
            rows.append((state.asked, f"—{marks.mark(in_a_line(error))}", *[""] * (len(_HEADERS[figure.kind]) - 2)))
            records.append({"dataset": state.asked, "reason": in_a_line(error)})
            continue
        if drawn:
            paths.append(path)
            rows += [row for row, _ in drawn]
            records += [record for _, record in drawn]
    columns = list(dict.fromkeys(name for record in records for name in record))
    even = tuple({name: record.get(name) for name in columns} for record in records)
    notes = (*marks.notes(), *_NOTES[figure.kind])
    table = Table(figure.name, figure.title, _HEADERS[figure.kind], tuple(rows), notes, even)
    return Drawn(tuple(paths), table)


_HEADERS = {
    "maps": ("dataset", "embedding", "dimensions", "test images", "k-NN accuracy"),
    "attention": ("dataset", "from", "to: share of its attention", "test images"),
}
_NOTES = {
    "maps": (
        f"k-NN accuracy: balanced accuracy of the majority of the {NEIGHBORS} nearest test images of other groups "
        "(standardized features); of the embedding, not of its map",
    ),
    "attention": ("attention that the tokens of one backbone give to all tokens of another, mean over its tokens, the "
                  "test images and the folds; rows sum to 1",),
}  # fmt: skip


def _path(figure: Figure, state: DatasetState, settings: Settings, target: Path | None, *, several: bool) -> Path:
    assert state.ds is not None
    if target is None:
        return home_dir(settings.home) / slug(state.ds.name) / "figures" / f"{figure.name}.png"
    return target.with_name(f"{target.stem}-{slug(state.ds.name)}{target.suffix}") if several else target


def _draw_maps(
    figure: Figure, grid: Grid, state: DatasetState, settings: Settings, path: Path, marks: Marks
) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    assert state.ds is not None
    stores = _stores(grid, state, settings)
    if not stores:
        return []
    test = _shown(state, stores, settings, most=LIMIT)
    features = {name: load_features(store, state.ds, test.ids).numpy() for name, store in stores.items()}
    panels = []
    for model in grid.models:
        result = state.results.get((model, state.subset_of[figure.subset]))
        if model.kind == "features" and model.backbones[0] in features:
            panels.append(_Panel(model.label, features[model.backbones[0]]))
        elif result is not None and set(model.backbones) <= set(features):
            run = runs_dir(result.dataset, settings.home) / result.id
            fold, fused = fused_features(result, run, {name: features[name] for name in model.backbones})
            panels.append(_Panel(model.label, fused, f"trained with labels (fold {fold}, subset {result.subset})"))
    maps = []
    for panel in panels:
        title = panel.label + (f"\n{panel.remark}" if panel.remark else "")
        maps.append(Map(title, embed_map(panel.features), test.labels))
    synthetic = " (synthetic)" if state.ds.synthetic else ""
    plot_maps(maps, state.ds.class_names, f"{figure.title}, {state.ds.name}{synthetic}, n = {len(test.ids):,}", path)
    drawn: list[tuple[tuple[str, ...], dict[str, Any]]] = []
    for panel in panels:
        score = neighbor_accuracy(panel.features, test.labels, test.groups)
        words = (state.asked, panel.label + marks.mark(panel.remark), str(panel.features.shape[1]))
        row: tuple[str, ...] = (*words, f"{len(test.ids):,}{marks.mark(test.remark)}", decimals(score, 3))
        record = {"dataset": state.asked, "embedding": panel.label, "dimensions": panel.features.shape[1],
                  "n_test": len(test.ids), "knn_accuracy": score, "figure": str(path)}  # fmt: skip
        drawn.append((row, record))
    return drawn


def _draw_attention(
    figure: Figure, grid: Grid, state: DatasetState, settings: Settings, path: Path, marks: Marks
) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    assert state.ds is not None
    (model,) = grid.models
    result = state.results.get((model, state.subset_of[figure.subset]))
    if result is None:
        return []
    stores = _stores(grid, state, settings)
    test = _shown(state, stores, settings, most=None)
    x = {name: load_features(stores[name], state.ds, test.ids) for name in model.backbones}
    heads = [params for params in load_heads(runs_dir(state.ds.name, settings.home) / result.id) if params]
    weights = np.mean([mean_attention(params, x) for params in heads], axis=0).astype(np.float32)
    mass = mass_table(weights, len(model.backbones))
    synthetic = " (synthetic)" if state.ds.synthetic else ""
    folds = f"{len(heads)} folds trained on {result.subset}"
    panel = AttentionPanel(f"{state.ds.name}{synthetic}, {folds}", model.backbones, weights, mass)
    plot_attention([panel], figure.title, path)
    drawn: list[tuple[tuple[str, ...], dict[str, Any]]] = []
    for name, shares in zip(model.backbones, mass, strict=True):
        words = ", ".join(f"{other} {share:.3f}" for other, share in zip(model.backbones, shares, strict=True))
        row = (state.asked, name, words, f"{len(test.ids):,}{marks.mark(test.remark)}")
        record = {"dataset": state.asked, "from": name, "n_test": len(test.ids), "folds": len(heads), "run": result.id}
        record |= {f"to {other}": float(share) for other, share in zip(model.backbones, shares, strict=True)}
        drawn.append((row, {**record, "figure": str(path)}))
    return drawn


def _stores(grid: Grid, state: DatasetState, settings: Settings) -> dict[str, FeatureStore]:
    """Stores of the figure's backbones that are there, whole."""
    assert state.ds is not None
    names = dict.fromkeys(name for model in grid.models for name in model.backbones)
    there = [[name] for name in names if name not in state.broken and name not in state.owed]
    return open_stores(state.ds, there, settings.home, settings.recipe)


def _shown(state: DatasetState, stores: Mapping[str, FeatureStore], settings: Settings, *, most: int | None) -> Shown:
    """The labelled test images of the protocol, all of them or so many at most."""
    assert state.ds is not None
    return shown_images(
        state.ds,
        list(stores.values()),
        most=most,
        seed=settings.seed,
        test=settings.test,
        exclude_test_overlap=settings.exclude_test_overlap,
    )
