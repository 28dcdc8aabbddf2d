"""What of the paper is no table of scores.

Counts of images (Table 1) and parameters (Table G1), which need no training; t-SNE maps of embeddings (Figures 2, D1,
D2) and DVME's mean attention (Figure F1).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embcache.backbones.catalog import find_backbone
from embcache.config import DatasetRef, StudyConfig
from embcache.data.dataset import ImageDataset, find_dataset
from embcache.errors import EmbcacheError, UsageError
from embcache.fields import bare_name
from embcache.figures.attention import mass_table, mean_attention
from embcache.figures.maps import NEIGHBORS, decimals, embed_map, neighbor_accuracy
from embcache.figures.plots import Map, plot_attention, plot_maps
from embcache.figures.shown import LIMIT, Shown, fused_features, one_root, shown_images
from embcache.paths import PathLike, home_dir, slug
from embcache.probe.heads import make_head
from embcache.probe.inputs import PAPER_SET, load_features, open_stores
from embcache.probe.protocol import plan_splits
from embcache.results.layout import Marks, Table
from embcache.results.paper import Grid, find_value
from embcache.runs.folders import load_heads, runs_dir
from embcache.study.definitions import COUNTS, DATASETS
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
    marks, maps, paths = Marks(), grid.name != "F1", list[Path]()
    rows, records = list[tuple[str, ...]](), list[dict[str, Any]]()
    for state in states:
        reasons = [state.problem, *state.refused.values()]
        drawn: Drawn = []
        if state.ds is not None:
            path = target or home_dir(state.home) / slug(state.ds.name) / "figures" / f"{grid.name}.png"
            if target is not None and len(states) > 1:
                path = target.with_name(f"{target.stem}-{slug(state.ds.name)}{target.suffix}")
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


# Tables that need no training.

_COLUMNS = ("S", "M", "F", "test")
_CLASSES = 5  # of Table G1


def table1(config: StudyConfig, ref: DatasetRef, home: PathLike | None = None) -> Table:
    """Images of the subsets and of the test set, beside the paper's; by labels alone, nothing is extracted."""
    names, marks = config.datasets or DATASETS, Marks()
    rows, records = list[tuple[str, ...]](), list[dict[str, Any]]()
    one_root(names, ref)
    for name in names:
        counts, reason = dict[str, int](), ""
        try:
            counts, remark = _count_images(find_dataset(name, ref, home)[0], config)
        except UsageError:
            raise
        except EmbcacheError as error:
            reason = remark = in_a_line(error)
        ours = [f"{counts[c]:,}" if c in counts else "—" for c in _COLUMNS]
        rows.append((name, f"ours{marks.mark(remark)}", *ours))
        values = {column: find_value("table1", name, "", column) for column in _COLUMNS}
        if any(values.values()):
            theirs = [
                f"{v.count:,}{marks.mark(f'as printed in Table 1: {v.flag}' if v.flag else '')}"
                for v in values.values()
                if v is not None and v.count is not None
            ]
            rows.append(("", "paper", *theirs))
        records += [
            {
                "dataset": name, "column": column, "images": counts.get(column),
                "paper": value.count if value else None, "paper_flag": value.flag or None if value else None,
                "reason": reason or None,
            }
            for column, value in values.items()
        ]  # fmt: skip
    pool = "S and M count training images of a fold; F counts the pool, as the paper does: a fold trains on "
    notes = (*marks.notes(), f"{pool}{config.folds - 1} of {config.folds} parts of it")
    return Table("table1", COUNTS["table1"], ("dataset", "", *_COLUMNS), tuple(rows), notes, tuple(records))


def _count_images(ds: ImageDataset, config: StudyConfig) -> tuple[dict[str, int], str]:
    """Images of S, M, F (the pool) and the test set, and what a reader must know of them."""
    plan = plan_splits(
        ds, subsets=("S", "M", "F"), folds=config.folds, seed=config.seed, test=config.test,
        exclude_test_overlap=config.exclude_test_overlap,
    )  # fmt: skip
    pool = len({row for fold in range(plan.n_folds) for row in plan.train[fold, "F"].tolist()})
    counts = {s: round(sum(len(plan.train[f, s]) for f in range(plan.n_folds)) / plan.n_folds) for s in ("S", "M")}
    remarks = [f"{plan.test_set} test set", *(note for note in plan.notes if "fewer: all of them" in note)]
    remarks += [note for note in ds.notes if "missing" in note]
    return {**counts, "F": pool, "test": len(plan.test)}, "; ".join(dict.fromkeys(remarks))


def table_g1(backbones: Sequence[str]) -> Table:
    """Trainable parameters of a linear probe, of finetuning and of DVME, exactly, beside the paper's rounded ones."""
    cases: list[tuple[str, tuple[str, ...], str]] = [(bare_name(name), (name,), "linear") for name in backbones]
    cases += [(f"DVME over {', '.join(map(bare_name, backbones))}", tuple(backbones), "dvme")] * (len(backbones) > 1)
    usual = ("ResNet50", ("supervised",), "linear"), ("ViT", ("dino",), "linear"), ("DVME", PAPER_SET, "dvme")
    marks, rows, records = Marks(), [], []
    for label, names, head in cases or usual:
        specs = {bare_name(name): find_backbone(name) for name in names}
        own = make_head(head).count_parameters({name: spec.dim for name, spec in specs.items()}, _CLASSES)
        whole = own + sum(spec.parameters for spec in specs.values())
        for setting, count in (("probe", own), ("finetune", whole)):
            value = find_value("G1", "", label, setting)
            printed, agrees = (value.printed, _agreement(count, value.printed)) if value else ("", "")
            flag = marks.mark(f"as printed in Table G1: {value.flag}" if value and value.flag else "")
            words = "linear evaluation" if setting == "probe" else "finetuning"
            rows.append((label if setting == "probe" else "", words, f"{count:,}", printed + flag, agrees))
            records.append(
                {"model": label, "backbones": "+".join(names), "head": head, "setting": setting, "parameters": count,
                 "paper": printed or None, "agrees": agrees or None}
            )  # fmt: skip
    headers = ("architecture", "evaluation", "ours", "paper", "agreement")
    notes = (*marks.notes(), f"with {_CLASSES} classes")
    return Table("G1", COUNTS["G1"], headers, tuple(rows), notes, tuple(records))


def _agreement(count: int, printed: str) -> str:
    """Whether an exact count is what is printed: ``rounded``, ``truncated`` or ``differs``."""
    match = re.fullmatch(r"(\d+)\.(\d+) ([KM])", printed)
    if match is None:
        return ""
    digits = len(match[2])
    scaled = count / {"K": 1e3, "M": 1e6}[match[3]]
    wanted = float(f"{match[1]}.{match[2]}")
    if round(scaled, digits) == wanted:
        return "rounded"
    return "truncated" if int(scaled * 10**digits) / 10**digits == wanted else "differs"
