"""The paper's figures: t-SNE maps of embeddings (Figures 2, D1, D2) and DVME's mean attention (Figure F1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embcache.errors import EmbcacheError
from embcache.figures.attention import mass_table, mean_attention
from embcache.figures.maps import NEIGHBORS, decimals, embed_map, neighbor_accuracy
from embcache.figures.plots import Map, plot_attention, plot_maps
from embcache.figures.shown import LIMIT, Shown, fused_features, shown_images
from embcache.paths import home_dir, slug
from embcache.probe.inputs import load_features, open_stores
from embcache.results.grid import Grid
from embcache.results.layout import Marks, Table
from embcache.runs.folders import load_heads, runs_dir
from embcache.study.study_plan import DatasetState, in_a_line

_HEADERS = {
    True: ("dataset", "embedding", "dimensions", "test images", "k-NN accuracy"),
    False: ("dataset", "from", "to: share of its attention", "test images"),
}
_NOTES = {
    True: f"k-NN accuracy: balanced accuracy of the majority of the {NEIGHBORS} nearest test images of other groups "
    "(standardized features); of the embedding, not of its map",
    False: "attention that the tokens of one backbone give to all tokens of another, mean over its tokens, the test "
    "images and the folds; rows sum to 1",
}

Drawn = list[tuple[tuple[str, ...], dict[str, Any]]]
"""Rows of the table, and the same as records."""


def draw_figure(grid: Grid, states: Sequence[DatasetState], target: Path | None = None) -> tuple[Table, list[Path]]:
    """Draw a figure, one file per dataset, of what is there; a table of what it shows, and the files."""
    marks = Marks()
    rows: list[tuple[str, ...]] = []
    records: list[Mapping[str, Any]] = []
    paths = []
    maps = grid.name != "F1"
    for state in states:
        reasons = [state.problem, *state.refused.values()]
        drawn: Drawn = []
        if state.ds is not None:
            if target is None:
                path = home_dir(state.home) / slug(state.ds.name) / "figures" / f"{grid.name}.png"
            else:
                own = f"{target.stem}-{slug(state.ds.name)}{target.suffix}"
                path = target.with_name(own) if len(states) > 1 else target
            try:
                drawn = (_draw_maps if maps else _draw_attention)(grid, state, path, marks)
            except EmbcacheError as error:
                reasons.append(in_a_line(error))
            paths += [path] * bool(drawn)
        for reason in dict.fromkeys(filter(None, reasons)):
            rows.append((state.name, f"—{marks.mark(reason)}", *[""] * (len(_HEADERS[maps]) - 2)))
            records.append({"dataset": state.name, "reason": reason})
        rows += [row for row, _ in drawn]
        records += [record for _, record in drawn]
    columns = dict.fromkeys(name for record in records for name in record)
    even = tuple({name: record.get(name) for name in columns} for record in records)
    notes = (*marks.notes(), _NOTES[maps])
    return Table(grid.name, grid.title, _HEADERS[maps], tuple(rows), notes, even), paths


def _inputs(grid: Grid, state: DatasetState, most: int | None) -> tuple[Shown, dict[str, torch.Tensor]] | None:
    """The labeled test images, and their features (n, D) of each backbone that is there, whole; None without any."""
    assert state.ds is not None
    names = dict.fromkeys(name for model in grid.models for name in model.backbones)
    there = [[name] for name in names if name not in state.broken and name not in state.owed]
    stores = open_stores(state.ds, there, state.home, state.config.recipe)
    if not stores:
        return None
    config = state.config
    shown = shown_images(
        state.ds, list(stores.values()), most=most, seed=config.seed, test=config.test,
        exclude_test_overlap=config.exclude_test_overlap,
    )  # fmt: skip
    return shown, {name: load_features(store, state.ds, shown.ids) for name, store in stores.items()}


def _draw_maps(grid: Grid, state: DatasetState, path: Path, marks: Marks) -> Drawn:
    assert state.ds is not None
    inputs = _inputs(grid, state, LIMIT)
    if inputs is None:
        return []
    shown, loaded = inputs
    features = {name: x.numpy() for name, x in loaded.items()}
    panels = []
    for model in grid.models:
        result = state.results.get((model, state.subset_of[grid.subsets[0]]))
        if model.kind == "features" and model.backbones[0] in features:
            panels.append((model.label, features[model.backbones[0]], ""))
        elif result is not None and set(model.backbones) <= set(features):
            run = runs_dir(result.dataset, state.home) / result.id
            fold, fused = fused_features(result, run, {name: features[name] for name in model.backbones})
            panels.append((model.label, fused, f"trained with labels (fold {fold}, subset {result.subset})"))
    maps = [
        Map(label + (f"\n{remark}" if remark else ""), embed_map(x), shown.labels) for label, x, remark in panels
    ]  # fmt: skip
    synthetic = " (synthetic)" if state.ds.synthetic else ""
    plot_maps(maps, state.ds.class_names, f"{grid.title}, {state.ds.name}{synthetic}, n = {len(shown.ids):,}", path)
    drawn: Drawn = []
    for label, x, remark in panels:
        score = neighbor_accuracy(x, shown.labels, shown.groups)
        row = (
            state.name, label + marks.mark(remark), str(x.shape[1]), f"{len(shown.ids):,}{marks.mark(shown.remark)}",
            decimals(score, 3),
        )  # fmt: skip
        record = {"dataset": state.name, "embedding": label, "dimensions": x.shape[1], "n_test": len(shown.ids),
                  "knn_accuracy": score, "figure": str(path)}  # fmt: skip
        drawn.append((row, record))
    return drawn


def _draw_attention(grid: Grid, state: DatasetState, path: Path, marks: Marks) -> Drawn:
    assert state.ds is not None
    (model,) = grid.models
    result = state.results.get((model, state.subset_of[grid.subsets[0]]))
    inputs = _inputs(grid, state, None)
    if result is None or inputs is None:
        return []
    shown, features = inputs
    x = {name: features[name] for name in model.backbones}
    heads = [params for params in load_heads(runs_dir(state.ds.name, state.home) / result.id) if params]
    weights = np.mean([mean_attention(params, x) for params in heads], axis=0).astype(np.float32)
    mass = mass_table(weights, len(model.backbones))
    synthetic = " (synthetic)" if state.ds.synthetic else ""
    title = f"{state.ds.name}{synthetic}, {len(heads)} folds trained on {result.subset}"
    plot_attention(weights, mass, model.backbones, (title, grid.title), path)
    drawn: Drawn = []
    for name, shares in zip(model.backbones, mass, strict=True):
        to = {other: float(share) for other, share in zip(model.backbones, shares, strict=True)}
        words = ", ".join(f"{other} {share:.3f}" for other, share in to.items())
        row = (state.name, name, words, f"{len(shown.ids):,}{marks.mark(shown.remark)}")
        record = {"dataset": state.name, "from": name, "n_test": len(shown.ids), "folds": len(heads), "run": result.id}
        drawn.append((row, {**record, **{f"to {other}": share for other, share in to.items()}, "figure": str(path)}))
    return drawn
