"""What ``embcache run`` is asked for, from a name or a TOML file to a finished table and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embcache.backbones.catalog import weights_status
from embcache.errors import UsageError
from embcache.figures.draw_curves import table_curves
from embcache.figures.plots import plot_curves
from embcache.results.curves import band_words
from embcache.results.grid import Grid
from embcache.results.layout import Marks, Table
from embcache.study.counts import table1, table_g1
from embcache.study.definitions import FIGURES, GRIDS, find_name, narrow
from embcache.study.grids import read_grid
from embcache.study.paper_figures import draw_figure, figure_grid, narrow_figure
from embcache.study.settings import Settings
from embcache.study.study import Progress, Say, run_study
from embcache.study.study_plan import DatasetState, look


@dataclass(frozen=True)
class Order:
    """A request for a table or a figure."""

    what: str  # A name that `embcache.study.definitions.find_name` knows, or the path of a TOML file
    datasets: Sequence[str] = ()
    backbones: Sequence[str] = ()
    subsets: Sequence[str] = ()
    heads: Sequence[str] = ()
    options: Mapping[str, Any] | None = None  # fields of `Settings` that were given
    figure: Path | None = None  # where the figure is written: of a table its learning curves
    dry_run: bool = False  # only the plan


@dataclass(frozen=True)
class Delivery:
    """What came of an order."""

    table: Table  # the table, or the plan
    figures: tuple[Path, ...] = ()  # files that were written
    empty: bool = False  # nothing of what was asked could be had


def deliver(order: Order, *, say: Say = lambda line: None, progress: Progress | None = None) -> Delivery:
    """Plan an order, tell the plan, do what is missing and lay the answer out."""
    options = dict(order.options or {})
    if order.what.endswith(".toml"):
        own = read_grid(Path(order.what).expanduser())
        return _scores(order, own.grid, Settings(**{**own.options, **options}), say, progress)
    name, settings = find_name(order.what), Settings(**options)
    if name in GRIDS:
        return _scores(order, GRIDS[name], settings, say, progress)
    if order.heads:
        raise UsageError(f"{name} has no heads to choose", found=f"--head {', '.join(order.heads)}", fix="leave it out")
    if name in FIGURES:
        return _figure(order, settings, name, say, progress)
    if order.figure is not None:
        raise UsageError(f"{name} has no figure", found=f"--figure {order.figure}", fix="leave it out")
    if name == "G1":
        return Delivery(table_g1(order.backbones))
    table = table1(order.datasets, settings)
    return Delivery(table, empty=all(record["images"] is None for record in table.records))


def _scores(order: Order, own: Grid, settings: Settings, say: Say, progress: Progress | None) -> Delivery:
    grid = narrow(own, datasets=order.datasets, backbones=order.backbones, subsets=order.subsets, heads=order.heads)
    states = look(grid, settings)
    plan = make_plan(grid, states, settings)
    if order.dry_run:
        return Delivery(plan.table)
    plan.tell(say)
    study = run_study(grid, settings, states=states, say=say, progress=progress)
    figures: tuple[Path, ...] = ()
    panels = table_curves(grid, study.cells) if order.figure is not None else []
    if order.figure is not None and panels:
        bands = band_words([cell.result for cell in study.cells if cell.result is not None])
        figures = (plot_curves(panels, study.table.title, order.figure, bands=bands),)
    return Delivery(study.table, figures, empty=not study.results)


def _figure(order: Order, settings: Settings, name: str, say: Say, progress: Progress | None) -> Delivery:
    figure = narrow_figure(FIGURES[name], order.datasets, order.backbones, order.subsets)
    grid = figure_grid(figure)
    states = look(grid, settings)
    plan = make_plan(grid, states, settings)
    if order.dry_run:
        return Delivery(plan.table)
    plan.tell(say)
    drawn = draw_figure(figure, settings, target=order.figure, states=states, say=say, progress=progress)
    return Delivery(drawn.table, drawn.paths, empty=not drawn.paths)


@dataclass(frozen=True)
class Step:
    """One line of a plan: ``count`` images to extract, else results to make."""

    dataset: str
    action: str
    what: str
    count: int

    def __str__(self) -> str:
        unit = ("image" if self.action == "extract" else "result") + ("" if self.count == 1 else "s")
        return f"{self.action:<8}  {self.dataset}: {self.what}: {self.count:,} {unit}"


@dataclass(frozen=True)
class Plan:
    """What will be done for a table: its lines with, in the notes, what cannot be had, and the counts of results."""

    table: Table
    steps: tuple[Step, ...]
    there: int
    refused: int

    def __str__(self) -> str:
        missing = sum(step.count for step in self.steps if step.action != "extract")
        return f"plan: results that are there {self.there}, to make {missing}, that cannot be had {self.refused}"

    def tell(self, say: Say) -> None:
        """Say the plan, one line per step."""
        for line in (self, *self.steps):
            say(str(line))


def make_plan(grid: Grid, states: Sequence[DatasetState], settings: Settings) -> Plan:
    """The steps that a grid needs, as a table."""
    steps = tuple(step for state in states for step in _steps(state, settings))
    marks = Marks()
    rows = [(s.dataset, s.action, s.what, f"{s.count:,}") for s in steps]
    there = refused = 0
    for state in states:
        found = sum(model.kind != "features" for model, _ in state.results)
        there, refused = there + found, refused + len(state.refused)
        if found:
            rows.append((state.asked, "there", "saved results of the same request", f"{found:,}"))
        reasons: dict[str, int] = {state.problem: 0} if state.problem else {}
        for reason in state.refused.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        for reason, count in reasons.items():
            rows.append((state.asked, "cannot", f"see{marks.mark(reason)}", f"{count:,}" if count else "all"))
    records = tuple({"dataset": s.dataset, "step": s.action, "what": s.what, "count": s.count} for s in steps)
    notes = marks.notes() if steps else ("nothing is left to do", *marks.notes())
    headers = ("dataset", "step", "what", "count")
    return Plan(
        Table(grid.name, f"Plan: {grid.title}", headers, tuple(rows), tuple(notes), records), steps, there, refused
    )


def _steps(state: DatasetState, settings: Settings) -> list[Step]:
    """What is missing of a dataset: extractions, then finetunings and probes, the subsets of a head in one step."""
    if state.ds is None:
        return []
    steps = []
    cached = [model for model, _ in state.missing if model.kind != "finetune"]
    for backbone in dict.fromkeys(name for model in cached for name in model.backbones):
        if backbone in state.owed:
            absent = backbone not in settings.weights and "downloaded" in weights_status(backbone, settings.home)
            words = f"{backbone} (its weights are downloaded first)" if absent else backbone
            steps.append(Step(state.asked, "extract", words, state.owed[backbone]))
    for kind in ("finetune", "probe"):
        groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for model, subset in state.missing:
            if model.kind == kind:
                groups.setdefault((model.head, model.backbones), []).append(subset)
        for (head, backbones), subsets in groups.items():
            what = f"{' + '.join(backbones)}, {head}: {', '.join(dict.fromkeys(subsets))}"
            steps.append(Step(state.asked, kind, what, len(subsets)))
    return steps
