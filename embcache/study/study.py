"""A table of scores from beginning to end: look at what is there, do what is missing, fill the cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from embcache.backbones.catalog import load_backbone
from embcache.errors import EmbcacheError, UsageError
from embcache.extract.extract import run_extraction
from embcache.finetune.finetune import finetune_images
from embcache.probe.probe import probe
from embcache.results.grid import Cell, Grid, Model, choose_best, compare_with_paper
from embcache.results.layout import Table, lay_out
from embcache.results.paper import find_value, named_subset
from embcache.runs.folders import ProbeResult
from embcache.study.settings import Settings, in_a_line
from embcache.study.study_plan import DatasetState, look, look_at_runs, look_at_stores, trained_models

Say = Callable[[str], object]
Progress = Callable[[int, int, str], Any]
"""Told (steps settled, steps planned, what is being trained)."""


def _silent(line: str) -> None:
    del line


@dataclass(frozen=True)
class Study:
    """A table that was filled as far as it could be."""

    grid: Grid
    cells: tuple[Cell, ...]
    table: Table

    @property
    def results(self) -> list[ProbeResult]:
        """Every result in the table, each once."""
        found = {cell.result.id: cell.result for cell in self.cells if cell.result is not None}
        return list(found.values())


def run_study(
    grid: Grid,
    settings: Settings,
    *,
    states: Sequence[DatasetState] | None = None,
    say: Say = _silent,
    progress: Progress | None = None,
) -> Study:
    """Do what a table lacks and lay the table out.

    Every result is saved as it is made and found again by its id: an interrupted study goes on where it stopped.
    A cell that cannot be had is told with the reason, and the others are done.
    """
    states = look(grid, settings) if states is None else states
    without: dict[str, str] = {}  # backbones whose weights cannot be had, known from the first dataset on
    for state in states:
        carry_out(state, trained_models(grid), settings, without=without, say=say, progress=progress)
    cells = fill(grid, states)
    return Study(grid, tuple(cells), lay_out(grid, cells))


def carry_out(
    state: DatasetState,
    models: Sequence[Model],
    settings: Settings,
    *,
    without: dict[str, str] | None = None,
    say: Say = _silent,
    progress: Progress | None = None,
) -> None:
    """Extract, finetune and probe what a dataset lacks; ``state`` is brought up to date."""
    if state.ds is None:
        return
    without = {} if without is None else without
    _extract(state, models, settings, without, say)
    for model in models:
        subsets = [subset for key, subset in state.missing if key == model]
        if not subsets or model.kind == "features":
            continue
        make = _finetune if model.kind == "finetune" else _probe
        make(state, model, subsets, settings, say, progress)


def _extract(
    state: DatasetState, models: Sequence[Model], settings: Settings, without: dict[str, str], say: Say
) -> None:
    needed = [name for model, _ in state.missing if model.kind != "finetune" for name in model.backbones]
    owed = []
    for backbone in dict.fromkeys(needed):
        if backbone not in state.owed:
            continue
        if backbone not in without:
            try:
                load_backbone(backbone, weights=settings.weights.get(backbone), home=settings.home)
            except EmbcacheError as error:
                without[backbone] = f"{backbone}: {in_a_line(error)}"
                say(without[backbone])
        if backbone in without:
            state.broken[backbone] = without[backbone]
        else:
            owed.append(backbone)
    if owed and state.live is not None:
        say(f"extract   {state.asked}: {', '.join(owed)}")
        try:
            run_extraction(
                owed,
                state.live,
                home=settings.home,
                weights={name: path for name, path in settings.weights.items() if name in owed} or None,
                transform=settings.transform,
                device=settings.device,
                workers=settings.workers,
                say=say,
            )
        except UsageError:
            raise
        except EmbcacheError as error:
            state.broken |= dict.fromkeys(owed, in_a_line(error))
            say(in_a_line(error))
    if needed:
        state.owed.clear()
        look_at_stores(state, models, settings)
        look_at_runs(state, models, settings)


def _probe(
    state: DatasetState, model: Model, subsets: Sequence[str], settings: Settings, say: Say, progress: Progress | None
) -> None:
    """Probe a model at its missing subsets at once; where that fails, one by one, so that each has its own reason."""
    assert state.ds is not None
    config = settings.for_probe(model)
    try:
        results = probe(state.ds, [model.backbones], subsets, config, home=settings.home, progress=progress)
    except EmbcacheError as error:
        if len(subsets) > 1:
            for subset in subsets:
                _probe(state, model, [subset], settings, say, progress)
            return
        _refuse(state, model, subsets[0], error, say)
        return
    for subset, result in zip(subsets, results, strict=True):
        _take(state, model, subset, result, say)


def _finetune(
    state: DatasetState, model: Model, subsets: Sequence[str], settings: Settings, say: Say, progress: Progress | None
) -> None:
    assert state.ds is not None
    for subset in subsets:
        try:
            result = finetune_images(
                state.ds,
                model.backbones,
                subset=subset,
                resume=None,
                keep_models=False,
                source=state.source,
                say=say,
                progress=progress,
                **settings.for_finetune(model),
            )
        except EmbcacheError as error:
            _refuse(state, model, subset, error, say)
            continue
        _take(state, model, subset, result, say)


def _take(state: DatasetState, model: Model, subset: str, result: ProbeResult, say: Say) -> None:
    del state.missing[model, subset]
    state.results[model, subset] = result
    reached = "not scored" if result.mean is None else f"{result.mean:.4f}"
    say(f"{model.kind:<8}  {state.asked}: {model.label}, {subset}: {reached} ({result.seconds:.1f} s, {result.id})")


def _refuse(state: DatasetState, model: Model, subset: str, error: EmbcacheError, say: Say) -> None:
    del state.missing[model, subset]
    state.refused[model, subset] = in_a_line(error)
    say(f"{model.kind:<8}  {state.asked}: {model.label}, {subset}: {in_a_line(error)}")


def fill(grid: Grid, states: Sequence[DatasetState]) -> list[Cell]:
    """Every cell of a grid, dataset by dataset, with what there is of it."""
    cells = []
    for state in states:
        for subset in grid.subsets:
            for model in grid.models:
                if model.among:
                    chosen = choose_best([_cell(grid, state, other, subset) for other in model.among], model.by)
                    cell = _cell(grid, state, model, subset, None if chosen is None else chosen.result)
                else:
                    cell = _cell(grid, state, model, subset)
                cells.append(compare_with_paper(cell))
    return cells


def _cell(grid: Grid, state: DatasetState, model: Model, subset: str, chosen: ProbeResult | None = None) -> Cell:
    key = model, state.subset_of.get(subset, subset)
    result = chosen or state.results.get(key)
    reason = ""
    if result is None:
        reason = state.problem or state.refused.get(key) or ("none of the baselines is there" if model.among else "")
    return Cell(
        dataset=state.asked,
        model=model,
        subset=subset,
        result=result,
        reason=reason or ("not done yet" if result is None else ""),
        paper=find_value(grid.name, state.asked, model.paper, named_subset(state.asked, subset)),
    )
