"""What a table needs and what of it is there: looks at datasets, stores and runs, and computes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from embcache.backbones.catalog import find_backbone, weights_status
from embcache.config import DatasetRef, FinetuneConfig, ProbeConfig, StudyConfig
from embcache.data.dataset import ImageDataset, find_dataset
from embcache.errors import EmbcacheError, RecipeError, StoreNotFoundError, UsageError, WeightsError
from embcache.fields import bare_name, parse_weights
from embcache.figures.shown import one_root
from embcache.finetune.finetune import find_finetuned
from embcache.paths import PathLike
from embcache.probe.inputs import open_stores
from embcache.probe.probe_plan import plan_probe
from embcache.probe.protocol import subset_sizes
from embcache.results.layout import Marks, Table
from embcache.results.paper import Grid, Model, trained_by
from embcache.runs.folders import Result, list_results, run_id

Key = tuple[Model, str]
"""A model and the canonical name of a subset."""

Answer = Result | str | EmbcacheError | None
"""A saved result, the id of the run to be, what stands in its way; None where it was not looked up."""


@dataclass(kw_only=True)
class DatasetState:
    """One dataset of a table, and how far each of its cells is."""

    name: str  # in the table
    models: tuple[Model, ...]
    config: StudyConfig
    home: PathLike | None = None
    leaderboard: bool = True  # whether a leaderboard's result may stand in a cell
    ds: ImageDataset | None = None  # None where it cannot be had: ``problem`` says why
    read_from: str = ""  # "live" or "snapshot"
    problem: str = ""
    subset_of: dict[str, str] = field(default_factory=dict)  # canonical name of each subset of the table
    owed: dict[str, int] = field(default_factory=dict)  # images of each backbone that have no features yet
    broken: dict[str, str] = field(default_factory=dict)  # backbones whose features cannot be had, and why
    results: dict[Key, Result] = field(default_factory=dict)  # what is there
    missing: dict[Key, None] = field(default_factory=dict)  # what is not
    refused: dict[Key, str] = field(default_factory=dict)  # what cannot be had, and why

    @property
    def live(self) -> ImageDataset | None:
        """The dataset where its images are here."""
        return self.ds if self.ds is not None and self.ds.root is not None and self.ds.root.is_dir() else None

    def typed(self, backbone: str) -> str:
        """What to type where a backbone is loaded: its name, or ``NAME=MODEL`` as the study has it."""
        return next(
            (name for names in self.config.backbones for name in names if bare_name(name) == backbone), backbone
        )

    def look_at_stores(self) -> None:
        """Fill in ``owed`` and ``broken`` for the backbones of the models."""
        if self.ds is None:
            return
        weights = parse_weights(self.config.weights)
        probed = {name for model in self.models if model.kind != "finetune" for name in model.backbones}
        for backbone in dict.fromkeys(name for model in self.models for name in model.backbones):
            if backbone in self.broken:
                continue
            owed, foreign = len(self.ds), False
            if backbone in probed:
                try:
                    store = open_stores(self.ds, [[backbone]], self.home, self.config.recipe)[backbone]
                    owed = len(set(self.ds.table["id"]).difference(store.ids.tolist(), store.quarantined))
                    foreign = store.recipe.foreign
                except StoreNotFoundError:
                    pass
                except RecipeError as error:
                    self.broken[backbone] = in_a_line(error)
                    continue
            if not foreign:
                # An unknown name is an error before anything is done.
                find_backbone(self.typed(backbone), folder=weights.get(backbone), home=self.home)
            elif owed:
                self.broken[backbone] = f"{backbone}: features of {owed:,} images are yet to be imported"
                continue
            if owed and (reason := self._why_not_computed(backbone)):
                self.broken[backbone] = reason
            elif owed and backbone in probed:
                self.owed[backbone] = owed

    def _why_not_computed(self, backbone: str) -> str:
        """Why a backbone's features cannot be computed here, as far as can be known without trying; else empty."""
        if self.live is None:
            return f"{backbone}: the images of {self.name} are not here, only their table and what is cached"
        if backbone in parse_weights(self.config.weights):
            return ""
        status = weights_status(self.typed(backbone), self.home)
        unusable = status.startswith("not usable") or (status.startswith("not here") and "downloaded" not in status)
        return f"{backbone}: weights {status}" if unusable else ""

    def look_at_runs(self) -> None:
        """Sort every model and subset into ``results``, ``missing`` and ``refused``."""
        if self.ds is None:
            return
        for entries in (self.results, self.missing, self.refused):
            entries.clear()
        saved = list_results(self.home, self.ds.name)
        trained = {(result.kind, result.head, result.backbones) for result in saved}
        for model in self.models:
            whole = model.kind == "finetune"
            broken = next((self.broken[name] for name in model.backbones if name in self.broken), "")
            scored = self._leaderboard_results(model, saved)
            subsets = [*dict.fromkeys(self.subset_of.values())]
            answers: dict[str, Answer] = {subset: scored.get(subset) for subset in subsets}
            # A finetuned model's id would need every image decoded once; what was never made is not there.
            never = whole and ("finetune", model.head, model.backbones) not in trained
            if never or (not whole and (broken or any(name in self.owed for name in model.backbones))):
                pass
            elif model.kind == "features":
                answers.clear()
            else:
                answers |= self._answers(model, [s for s in subsets if s not in scored], self.config)
            for subset, answer in answers.items():
                fetched = isinstance(answer, WeightsError) and whole  # when they are used, or the reason is given then
                if isinstance(answer, Result):
                    self.results[model, subset] = answer
                elif broken:
                    self.refused[model, subset] = broken
                elif isinstance(answer, EmbcacheError) and not fetched:
                    self.refused[model, subset] = in_a_line(answer)
                else:
                    self.missing[model, subset] = None

    def _leaderboard_results(self, model: Model, saved: Sequence[Result]) -> dict[str, Result]:
        """Results of a model by subset that a competition scored, which stand in place of those on a local test set.

        Only where the run that was handed in is the very run that the cell would be with ``--test official``: the ids
        of runs hash all that decides.
        """
        if self.ds is None or self.ds.leaderboard_alpha is None or self.config.test != "local" or not self.leaderboard:
            return {}
        scored = {}
        for result in saved:
            request = trained_by(result) if result.kind == "kaggle" else None
            same = (model.head, model.backbones) == (result.head, result.backbones)
            if request is not None and same and request.get("kind") == model.kind:
                scored[run_id(request)] = result
        there = not any(name in self.owed or name in self.broken for name in model.backbones)
        if not scored or not (there or model.kind == "finetune"):
            return {}
        answers = self._answers(model, [*dict.fromkeys(self.subset_of.values())], replace(self.config, test="official"))
        runs = {subset: answer.id if isinstance(answer, Result) else answer for subset, answer in answers.items()}
        return {subset: scored[run] for subset, run in runs.items() if isinstance(run, str) and run in scored}

    def _answers(self, model: Model, subsets: Sequence[str], config: StudyConfig) -> dict[str, Answer]:
        """For each subset the saved result, the id of the run to be, or the error that stands in its way."""
        if not subsets or self.ds is None:
            return {}
        try:
            if model.kind == "finetune":
                own = finetune_config(config, model)
                typed = [*map(self.typed, model.backbones)]
                return {s: find_finetuned(self.ds, typed, s, own, home=self.home) for s in subsets}
            plan = plan_probe(self.ds, [model.backbones], subsets, probe_config(config, model), home=self.home)
            return {s: plan.saved(cell) or cell.id for s, cell in zip(subsets, plan.cells, strict=True)}
        except EmbcacheError as error:
            if len(subsets) == 1:
                return {subsets[0]: error}
            # One that cannot be drawn is no reason to give up the others.
            return {s: answer for subset in subsets for s, answer in self._answers(model, [subset], config).items()}


def look(grid: Grid, config: StudyConfig, ref: DatasetRef, home: PathLike | None) -> list[DatasetState]:
    """What is there of each dataset of a grid; nothing is computed or written."""
    one_root(grid.datasets, ref)
    models = tuple(dict.fromkeys(m for model in grid.models for m in (model.among or (model,))))
    if any(model.kind == "finetune" for model in models):
        once = "finetuned models are trained once"
        if config.repeats != 1:
            raise UsageError(once, code="repeats-of-finetuning", found="--repeats", fix="leave --repeats out")
        if len(config.lr) > 1:
            raise UsageError(once, code="sweep-of-finetuning", found="several --lr", fix="one --lr for finetuning")
    states = []
    for name in grid.datasets:
        state = DatasetState(name=name, models=models, config=config, home=home, leaderboard=grid.leaderboard)
        states.append(state)
        try:
            state.ds, state.read_from = find_dataset(name, ref, home)
        except UsageError:
            raise
        except EmbcacheError as error:
            state.problem = in_a_line(error)
            continue
        state.subset_of = {subset: next(iter(subset_sizes(state.ds, [subset]))) for subset in grid.subsets}
        state.look_at_stores()
        state.look_at_runs()
    return states


def _shared(config: StudyConfig, model: Model, kind: type[ProbeConfig] | type[FinetuneConfig]) -> dict[str, Any]:
    """The options of a study that probing or finetuning has, too, with the head and seed of a model."""
    names = {f.name for f in fields(kind)} & {f.name for f in fields(config)} - {"weights"}
    own = {name: value for name, value in vars(config).items() if name in names}
    return own | {"head": model.head, "seed": config.seed if model.seed is None else model.seed}


def probe_config(config: StudyConfig, model: Model) -> ProbeConfig:
    """How a model is probed."""
    return ProbeConfig(**_shared(config, model, ProbeConfig) | {"device": config.device.replace("auto", "cpu")})


def named(config: StudyConfig) -> StudyConfig:
    """The config with the names under which features and results of its backbones are kept."""
    return replace(config, backbones=tuple(tuple(map(bare_name, names)) for names in config.backbones))


def finetune_config(config: StudyConfig, model: Model) -> FinetuneConfig:
    """How a model is finetuned; the models themselves are not kept, and an interrupted run continues."""
    files = parse_weights(config.weights)
    own = {
        "weights": tuple(f"{name}={path}" for name, path in files.items() if name in model.backbones),
        "lr": config.lr[0] if config.lr else None, "models": False, "resume": None,
    }  # fmt: skip
    return FinetuneConfig(**_shared(config, model, FinetuneConfig) | own)


def in_a_line(error: EmbcacheError) -> str:
    """An error's problem and its remedy, for a note beneath a table."""
    fix = (error.fix or "").split("\n")[0]
    found = f" ({error.found.splitlines()[0]})" if error.found else ""
    return f"{error.problem}{found}" + (f"; try: {fix}" if fix else "")


def plan_table(grid: Grid, states: Sequence[DatasetState]) -> Table:
    """The steps that a grid needs, and in its notes what cannot be had."""
    marks, headers = Marks(), ("dataset", "step", "what", "count")
    steps = [(state.name, *step) for state in states for step in _steps(state)]
    rows = [(*words, f"{count:,}") for *words, count in steps]
    barred = any(state.problem or state.refused for state in states)
    notes = () if rows else ("nothing can be computed" if barred else "nothing is left to do",)
    for state in states:
        if found := _there(state):
            rows.append((state.name, "there", "saved results of the same request", f"{found:,}"))
        reasons = Counter(state.refused.values())
        for reason in dict.fromkeys([*filter(None, [state.problem]), *reasons]):
            number = f"{reasons[reason]:,}" if reasons[reason] else "all"
            rows.append((state.name, "cannot", f"see{marks.mark(reason)}", number))
    records = tuple(dict(zip(headers, step, strict=True)) for step in steps)
    return Table(grid.name, f"Plan: {grid.title}", headers, tuple(rows), (*notes, *marks.notes()), records)


def plan_lines(states: Sequence[DatasetState]) -> list[str]:
    """The counts of a plan, then one line per step."""
    steps = [(state.name, *step) for state in states for step in _steps(state)]
    missing = sum(count for _, step, _, count in steps if step != "extract")
    there, refused = sum(map(_there, states)), sum(len(state.refused) for state in states)
    lines = [f"plan: results that are there {there}, to make {missing}, that cannot be had {refused}"]
    for name, step, what, count in steps:
        unit = ("image" if step == "extract" else "result") + "s" * (count != 1)
        lines.append(f"{step:<8}  {name}: {what}: {count:,} {unit}")
    return lines


def _there(state: DatasetState) -> int:
    return sum(model.kind != "features" for model, _ in state.results)


def _steps(state: DatasetState) -> list[tuple[str, str, int]]:
    """What is missing of a dataset: extractions (in images), then finetunings and probes (in results)."""
    if state.ds is None:
        return []
    steps = []
    cached = [model for model, _ in state.missing if model.kind != "finetune"]
    for backbone in dict.fromkeys(name for model in cached for name in model.backbones):
        if backbone in state.owed:
            named = backbone in parse_weights(state.config.weights)
            absent = not named and "downloaded" in weights_status(state.typed(backbone), state.home)
            words = backbone + " (its weights are downloaded first)" * absent
            steps.append(("extract", words, state.owed[backbone]))
    for kind in ("finetune", "probe"):
        groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for model, subset in state.missing:
            if model.kind == kind:
                groups.setdefault((model.head, model.backbones), []).append(subset)
        for (head, backbones), subsets in groups.items():
            what = f"{' + '.join(backbones)}, {head}: {', '.join(dict.fromkeys(subsets))}"
            steps.append((kind, what, len(subsets)))
    return steps
