"""What a table needs and what of it is there: looks at datasets, stores and runs, and computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from embcache.backbones.catalog import find_backbone, weights_status
from embcache.data.dataset import ImageDataset, find_dataset
from embcache.errors import EmbcacheError, RecipeError, StoreNotFoundError, UsageError, WeightsError
from embcache.finetune.finetune import find_finetuned
from embcache.probe.inputs import open_stores
from embcache.probe.probe_plan import plan_probe
from embcache.probe.protocol import subset_sizes
from embcache.results.grid import Grid, Model, trained_by
from embcache.runs.folders import ProbeResult, list_results, run_id
from embcache.study.settings import Settings, in_a_line

Key = tuple[Model, str]
"""A model and the canonical name of a subset."""


@dataclass
class DatasetState:
    """One dataset of a table, and how far each of its cells is."""

    asked: str  # the name in the table
    leaderboard: bool = field(default=True, kw_only=True)
    ds: ImageDataset | None = None  # none where it cannot be had: ``problem`` says why
    source: str = ""
    problem: str = ""
    subset_of: dict[str, str] = field(default_factory=dict)  # canonical name of each asked subset
    owed: dict[str, int] = field(default_factory=dict)  # images of each backbone that have no features yet
    broken: dict[str, str] = field(default_factory=dict)  # backbones whose features cannot be had, and why
    results: dict[Key, ProbeResult] = field(default_factory=dict)  # what is there
    missing: dict[Key, str] = field(default_factory=dict)  # what is not, with the id of the run to be
    refused: dict[Key, str] = field(default_factory=dict)  # what cannot be had, and why

    @property
    def live(self) -> ImageDataset | None:
        """The dataset where its images are here."""
        return self.ds if self.ds is not None and self.ds.root is not None and self.ds.root.is_dir() else None


def trained_models(grid: Grid) -> tuple[Model, ...]:
    """Every model of a grid that is trained, those that others are chosen among included, each once."""
    return tuple(dict.fromkeys(m for model in grid.models for m in (model.among or (model,))))


def look(grid: Grid, settings: Settings, say: Callable[[str], object] = lambda line: None) -> list[DatasetState]:
    """What is there of each dataset of a grid; nothing is computed or written."""
    if len(grid.datasets) > 1 and (settings.data_root is not None or settings.dataset_name is not None):
        raise UsageError(
            "--data-root and --name are for one dataset", found=", ".join(grid.datasets), fix="--dataset NAME"
        )
    models = trained_models(grid)
    if any(model.kind == "finetune" for model in models):
        _check_finetuning(settings)
    states = []
    for name in grid.datasets:
        state = DatasetState(name, leaderboard=grid.leaderboard)
        states.append(state)
        try:
            state.ds, state.source = find_dataset(
                name,
                root=settings.data_root,
                home=settings.home,
                allow_missing=settings.allow_missing,
                dataset_name=settings.dataset_name,
                columns=settings.columns,
            )
            state.ds = settings.classes.of(state.ds)
        except EmbcacheError as error:
            if isinstance(error, UsageError):
                raise
            state.problem = in_a_line(error)
            continue
        state.subset_of = {subset: next(iter(subset_sizes(state.ds, [subset]))) for subset in grid.subsets}
        look_at_stores(state, models, settings)
        look_at_runs(state, models, settings)
    return states


def _check_finetuning(settings: Settings) -> None:
    """Refuse what only probes can do, before anything is done."""
    if settings.repeats != 1:
        raise UsageError("--repeats is for probes: finetuned models are trained once", fix="leave --repeats out")
    if not (settings.lr is None or isinstance(settings.lr, float | int)):
        raise UsageError("learning rates are swept by probes only", fix="one --lr for finetuning")


def look_at_stores(state: DatasetState, models: Sequence[Model], settings: Settings) -> None:
    """Fill in ``owed`` and ``broken`` for the backbones of the models."""
    if state.ds is None:
        return
    probed = dict.fromkeys(name for model in models if model.kind != "finetune" for name in model.backbones)
    for backbone in dict.fromkeys(name for model in models for name in model.backbones):
        find_backbone(backbone)  # a name that is none is told before anything is done
        if backbone in state.broken:
            continue
        owed = len(state.ds)
        if backbone in probed:
            try:
                store = open_stores(state.ds, [[backbone]], settings.home, settings.recipe)[backbone]
                owed = len(set(state.ds.table["id"]).difference(store.ids.tolist(), store.quarantined))
            except StoreNotFoundError:
                pass
            except RecipeError as error:
                state.broken[backbone] = in_a_line(error)
                continue
            if owed:
                state.owed[backbone] = owed
        if owed:
            reason = _why_not_computed(state, backbone, settings)
            if reason:
                state.broken[backbone] = reason
                state.owed.pop(backbone, None)


def _why_not_computed(state: DatasetState, backbone: str, settings: Settings) -> str:
    """Why a backbone's features cannot be computed here, as far as can be told without trying; empty where they can."""
    if state.live is None:
        return f"{backbone}: the images of {state.asked} are not here, only their table and what is cached"
    if backbone in settings.weights:
        return ""
    status = weights_status(backbone, settings.home)
    if status.startswith("not usable") or (status.startswith("not here") and "downloaded" not in status):
        return f"{backbone}: weights {status}"
    return ""


def look_at_runs(state: DatasetState, models: Sequence[Model], settings: Settings) -> None:
    """Sort every model and subset into ``results``, ``missing`` and ``refused``."""
    if state.ds is None:
        return
    for entries in (state.results, state.missing, state.refused):
        entries.clear()
    saved = list_results(settings.home, state.ds.name)
    for model in models:
        broken = next((state.broken[name] for name in model.backbones if name in state.broken), "")
        scored = _leaderboard_results(state, model, saved, settings)
        asked: list[str] = []
        for subset in dict.fromkeys(state.subset_of.values()):
            if subset in scored:
                state.results[model, subset] = scored[subset]
            elif broken and model.kind != "finetune":
                state.refused[model, subset] = broken
            elif model.kind != "finetune" and any(name in state.owed for name in model.backbones):
                state.missing[model, subset] = ""
            elif model.kind == "finetune" and not any(_same_model(result, model) for result in saved):
                # Its id would need every image decoded once; what has never been made cannot be there.
                _place(state, model, subset, "", broken)
            elif model.kind != "features":
                asked.append(subset)
        for subset, answer in _answers(state, model, asked, settings):
            _place(state, model, subset, answer, broken)


def _place(
    state: DatasetState, model: Model, subset: str, answer: ProbeResult | str | EmbcacheError, broken: str
) -> None:
    if isinstance(answer, ProbeResult):
        state.results[model, subset] = answer
    elif broken:
        state.refused[model, subset] = broken
    elif isinstance(answer, WeightsError) and model.kind == "finetune":
        state.missing[model, subset] = ""  # they are fetched when they are used, or the reason is told then
    elif isinstance(answer, EmbcacheError):
        state.refused[model, subset] = in_a_line(answer)
    else:
        state.missing[model, subset] = answer


def _same_model(result: ProbeResult, model: Model) -> bool:
    return (result.kind, result.head, result.backbones) == (model.kind, model.head, model.backbones)


def _leaderboard_results(
    state: DatasetState, model: Model, saved: Sequence[ProbeResult], settings: Settings
) -> dict[str, ProbeResult]:
    """Results of a model by subset that a competition scored, which stand in place of those on a local test set.

    Only where the run that was handed in is the very run that the cell would be with ``--test official``: the ids of
    runs hash all that decides.
    """
    if state.ds is None or state.ds.leaderboard_alpha is None or settings.test != "local" or not state.leaderboard:
        return {}
    scored = {}
    for result in saved:
        request = trained_by(result) if result.kind == "kaggle" else None
        if request is not None and (request.get("kind"), result.head, result.backbones) == (
            model.kind,
            model.head,
            model.backbones,
        ):
            scored[run_id(request)] = result
    there = not any(name in state.owed or name in state.broken for name in model.backbones)
    if not scored or not (there or model.kind == "finetune"):
        return {}
    found: dict[str, ProbeResult] = {}
    subsets = tuple(dict.fromkeys(state.subset_of.values()))
    for subset, answer in _answers(state, model, subsets, replace(settings, test="official")):
        run = answer.id if isinstance(answer, ProbeResult) else answer
        if isinstance(run, str) and run in scored:
            found[subset] = scored[run]
    return found


def _answers(
    state: DatasetState, model: Model, subsets: Sequence[str], settings: Settings
) -> Iterator[tuple[str, ProbeResult | str | EmbcacheError]]:
    """For each subset the saved result, the id of the run to be, or the error that stands in its way."""
    if not subsets or state.ds is None:
        return
    try:
        yield from zip(subsets, _find(state, model, subsets, settings), strict=True)
    except EmbcacheError as error:
        if len(subsets) == 1:
            yield subsets[0], error
            return
        for subset in subsets:  # one that cannot be drawn is no reason to give up the others
            yield from _answers(state, model, [subset], settings)


def _find(state: DatasetState, model: Model, subsets: Sequence[str], settings: Settings) -> list[ProbeResult | str]:
    assert state.ds is not None
    if model.kind == "finetune":
        options = settings.for_finetune(model)
        return [find_finetuned(state.ds, model.backbones, subset=subset, **options) for subset in subsets]
    plan = plan_probe(state.ds, [model.backbones], subsets, settings.for_probe(model), home=settings.home)
    return [plan.saved(cell) or cell.id for cell in plan.cells]
