"""A whole study: look at what is there, do what is missing, lay out the table, draw the figures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embcache.backbones.catalog import load_backbone
from embcache.config import DatasetRef, ExtractConfig, StudyConfig
from embcache.errors import EmbcacheError, UsageError
from embcache.extract.extract import extract
from embcache.fields import Config, parse_weights
from embcache.figures.plots import plot_curves
from embcache.figures.run_plots import table_curves
from embcache.finetune.finetune import finetune
from embcache.log import log
from embcache.paths import PathLike
from embcache.probe.probe import probe
from embcache.results.curves import band_words
from embcache.results.grid import Cell, Grid, Model, choose_best, compare_with_paper
from embcache.results.layout import Table, lay_out
from embcache.results.paper import find_value, named_subset
from embcache.runs.folders import Result
from embcache.study.counts import table1, table_g1
from embcache.study.definitions import FIGURES, GRIDS, find_name, narrow, narrow_figure, own_grid, read_study
from embcache.study.paper_figures import draw_figure
from embcache.study.study_plan import (
    DatasetState,
    finetune_config,
    in_a_line,
    look,
    plan_lines,
    plan_table,
    probe_config,
)

Progress = Callable[[int, int, str], Any]
"""Called with steps settled, steps planned, and what is being trained."""


@dataclass(frozen=True)
class Study:
    """What came of a study."""

    table: Table  # the table, or the plan
    figures: tuple[Path, ...] = ()  # files that were written
    empty: bool = False  # whether nothing of the table could be had


def run_study(
    name: str | Path,
    config: StudyConfig | None = None,
    ref: DatasetRef | None = None,
    *,
    home: PathLike | None = None,
    figure: Path | None = None,
    dry_run: bool = False,
    given: Collection[str] = (),
    progress: Progress | None = None,
) -> Study:
    """Make a table or a figure of the paper, or your own grid: plan it, do what is missing, lay it out.

    Every result is saved when it is made and found again by its ID, so that an interrupted study continues where it
    stopped. A cell that cannot be had shows the reason, and the others are made.

    Parameters
    ----------
    name : str or path
        ``table1``, ``B3``, ``fig2`` …, or a TOML file whose keys are the fields of `StudyConfig` and `DatasetRef`.
    config, ref
        Options; those that differ from their defaults, or are ``given``, take precedence over the file's.
    home : path-like, optional
        Folder of stores and runs.
    figure : path, optional
        File of the figure; for a table its learning curves are drawn there.
    dry_run : bool
        Only make the plan, as a table.
    given : collection of str
        Names of options that take precedence over those of the file even where they equal their defaults.
    progress : callable, optional
        Called with steps settled, steps planned, and what is being trained.

    Raises
    ------
    UsageError
        An unknown table, backbone, head, subset or key.
    """
    config, ref = config or StudyConfig(), ref or DatasetRef()
    if str(name).endswith(".toml"):
        path = Path(name).expanduser()
        in_file, of_dataset = read_study(path)
        config = StudyConfig.make(None, in_file | _set(config, given))
        ref = DatasetRef.make(None, of_dataset | _set(ref, given))
        grid = own_grid(path, config)
    else:
        name = find_name(str(name))
        own = [key for key in _set(config, ()) if key in ("title", "seeds", "kind", "metric", "positive", "splits")]
        if own:
            raise UsageError(
                f"{name} is a table of the paper: {own[0]} is for your own studies", code="option-of-own-studies",
                found=own[0], fix="write it into a TOML file: embcache run FILE.toml",
            )  # fmt: skip
        if name not in GRIDS and config.heads:
            raise UsageError(
                f"{name} has no heads to choose", code="no-heads", found=f"--head {', '.join(config.heads)}",
                fix="leave --head out",
            )  # fmt: skip
        if name in ("table1", "G1"):
            return _count(name, config, ref, home, figure)
        grid = narrow(GRIDS[name], config) if name in GRIDS else narrow_figure(FIGURES[name], config)
    states = look(grid, config, ref, home)
    if dry_run:
        return Study(plan_table(grid, states))
    for line in plan_lines(states):
        log.info(line)
    without: dict[str, str] = {}  # backbones whose weights cannot be had, known from the first dataset on
    for state in states:
        carry_out(state, without, progress)
    if name in FIGURES:
        table, paths = draw_figure(grid, states, figure)
        return Study(table, tuple(paths), not paths)
    cells = fill(grid, states)
    table = lay_out(grid, cells)
    results = [cell.result for cell in cells if cell.result is not None]
    panels = table_curves(grid, cells) if figure is not None else []
    drawn = (plot_curves(panels, table.title, figure, bands=band_words(results)),) if figure and panels else ()
    return Study(table, drawn, not results)


def _set(config: Config, given: Collection[str]) -> dict[str, Any]:
    """Options that are given or differ from their defaults."""
    usual = vars(type(config)())
    return {name: value for name, value in vars(config).items() if name in given or value != usual[name]}


def _count(name: str, config: StudyConfig, ref: DatasetRef, home: PathLike | None, figure: Path | None) -> Study:
    """A table that needs no training."""
    if figure is not None:
        raise UsageError(
            f"{name} has no figure", code="no-figure", found=f"--figure {figure}", fix="leave --figure out"
        )
    if name == "G1":
        return Study(table_g1([name for names in config.backbones for name in names]))
    table = table1(config, ref, home)
    return Study(table, empty=all(record["images"] is None for record in table.records))


def carry_out(state: DatasetState, without: dict[str, str], progress: Progress | None = None) -> None:
    """Extract, finetune and probe what a dataset lacks; ``state`` is brought up to date."""
    if state.ds is None:
        return
    _extract(state, without)
    for model in state.models:
        subsets = [subset for key, subset in state.missing if key == model]
        if subsets and model.kind != "features":
            _train(state, model, subsets, progress)


def _extract(state: DatasetState, without: dict[str, str]) -> None:
    """Extract what probes lack; backbones whose weights cannot be had are added to ``without``."""
    needed = dict.fromkeys(name for model, _ in state.missing if model.kind != "finetune" for name in model.backbones)
    config, owed = state.config, []
    weights = parse_weights(config.weights)
    for backbone in needed:
        if backbone not in state.owed:
            continue
        if backbone not in without:
            try:
                load_backbone(backbone, weights=weights.get(backbone), home=state.home)
            except EmbcacheError as error:
                without[backbone] = f"{backbone}: {in_a_line(error)}"
                log.warning(without[backbone])
        if backbone in without:
            state.broken[backbone] = without[backbone]
        else:
            owed.append(backbone)
    if owed and state.live is not None:
        log.info(f"extract   {state.name}: {', '.join(owed)}")
        try:
            files = tuple(f"{name}={weights[name]}" for name in owed if name in weights)
            options = ExtractConfig(
                weights=files, transform=config.transform, device=config.device, workers=config.workers
            )
            extract(state.live, owed, options, home=state.home)
        except UsageError:
            raise
        except EmbcacheError as error:
            state.broken |= dict.fromkeys(owed, in_a_line(error))
            log.warning(in_a_line(error))
    if needed:
        state.owed.clear()
        state.look_at_stores()
        state.look_at_runs()


def _train(state: DatasetState, model: Model, subsets: Sequence[str], progress: Progress | None) -> None:
    """Train a model at its missing subsets; where several fail together, one by one: each has its own reason."""
    assert state.ds is not None
    if model.kind == "finetune" and len(subsets) > 1:
        for subset in subsets:
            _train(state, model, [subset], progress)
        return
    try:
        if model.kind == "finetune":
            results = [
                finetune(
                    state.ds, model.backbones, subsets[0], finetune_config(state.config, model), home=state.home,
                    source=state.read_from, progress=progress,
                )
            ]  # fmt: skip
        else:
            config = probe_config(state.config, model)
            results = probe(state.ds, [model.backbones], subsets, config, home=state.home, progress=progress)
    except EmbcacheError as error:
        if len(subsets) > 1:
            for subset in subsets:
                _train(state, model, [subset], progress)
            return
        del state.missing[model, subsets[0]]
        state.refused[model, subsets[0]] = in_a_line(error)
        log.warning(f"{model.kind:<8}  {state.name}: {model.label}, {subsets[0]}: {in_a_line(error)}")
        return
    for subset, result in zip(subsets, results, strict=True):
        del state.missing[model, subset]
        state.results[model, subset] = result
        reached = "not scored" if result.mean is None else f"{result.mean:.4f}"
        log.info(
            f"{model.kind:<8}  {state.name}: {model.label}, {subset}: {reached} ({result.seconds:.1f} s, {result.id})"
        )


def fill(grid: Grid, states: Sequence[DatasetState]) -> list[Cell]:
    """Every cell of a grid, dataset by dataset, with what there is of it."""
    cells = []
    for state in states:
        for subset in grid.subsets:
            for model in grid.models:
                best = choose_best([_cell(grid, state, m, subset) for m in model.among], model.by)
                cells.append(compare_with_paper(_cell(grid, state, model, subset, best.result if best else None)))
    return cells


def _cell(grid: Grid, state: DatasetState, model: Model, subset: str, chosen: Result | None = None) -> Cell:
    key = model, state.subset_of.get(subset, subset)
    result = chosen or state.results.get(key)
    reason = ""
    if result is None:
        lacking = "none of the baselines is there" if model.among else "not done yet"
        reason = state.problem or state.refused.get(key) or lacking
    paper = find_value(grid.name, state.name, model.paper, named_subset(state.name, subset))
    return Cell(state.name, model, subset, result, reason, paper)
