"""Which model is best at a number of labels: chosen on validation, then compared with the others on the test set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from embcache.errors import EmbcacheError
from embcache.probe.statistics import RESAMPLES
from embcache.report.collect import Part, Task
from embcache.results.advice import BackboneAdvice, advise_backbone, comparable
from embcache.results.compare import Comparison, Difference, Tested, compare_tested, difference, load_tested, same_test
from embcache.runs.folders import ProbeResult


@dataclass(frozen=True, eq=False)
class Rival:
    """One model at one size."""

    name: str  # of the model
    tested: Tested  # its result and predictions
    row: Comparison  # beside the chosen model, which is its own reference

    @property
    def result(self) -> ProbeResult:
        """Its result."""
        return self.tested.result

    @property
    def validated(self) -> float:
        """Mean validation score over folds."""
        return float(self.result.val_mean or 0.0)


@dataclass(frozen=True, eq=False)
class Choice:
    """Models at one number of training labels, all trained, validated and tested on the same images."""

    subset: str
    n_train: int
    labels_used: int
    rivals: tuple[Rival, ...]  # the best on validation, which is the chosen one, first
    advice: BackboneAdvice  # what sets the chosen one apart from the others on the test set
    change: Difference | None = None
    apart: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()  # runs whose predictions cannot be read

    @property
    def chosen(self) -> Rival:
        """The best on validation."""
        return self.rivals[0]


def choose(task: Task, part: Part, *, resamples: int = RESAMPLES) -> list[Choice]:
    """The choice at every number of training labels of a task, ascending.

    Sizes at which nothing can be ranked are left out. Models are ranked that share their splits, so that one's
    validation score is comparable with another's (`embcache.results.advice.comparable`).
    """
    sizes: dict[int, dict[str, ProbeResult]] = {}
    for name, members in task.models.items():
        for result in members:
            if result.kind != "kaggle" and result.val_mean is not None:
                sizes.setdefault(result.n_train, {})[name] = result
    choices: list[Choice] = []
    for _, at in sorted(sizes.items()):
        choice = _choice(at, part, resamples)
        if choice is not None:
            choices.append(replace(choice, change=_change(choices[-1], choice, resamples)) if choices else choice)
    return choices


def _choice(at: Mapping[str, ProbeResult], part: Part, resamples: int) -> Choice | None:
    family = comparable(at)
    tested: dict[str, Tested] = {}
    problems = []
    for name in family:
        try:
            tested[name] = load_tested(at[name], part.run_folder(at[name]))
        except EmbcacheError as error:
            problems.append(f"{name}: {error.problem}")
    order = list(tested)
    alike = [name for name in order if same_test(tested[order[0]], tested[name])]
    if not alike:
        return None
    rows = compare_tested([tested[name] for name in alike], resamples=resamples)
    rivals = tuple(Rival(name, tested[name], row) for name, row in zip(alike, rows, strict=True))
    first = rivals[0].result
    apart = [name for name in at if name not in family or (name in tested and name not in alike)]
    advice = advise_backbone(alike, rows, first.n_train)
    return Choice(first.subset, first.n_train, first.labels_used, rivals, advice, None, tuple(apart), tuple(problems))


def _change(before: Choice, after: Choice, resamples: int) -> Difference | None:
    b, own = after.chosen.tested, [rival.tested for rival in before.rivals if rival.name == after.chosen.name]
    if not own or not same_test(own[0], b):
        return None
    a = own[0]
    against, scores = (t.predictions.scores(t.result.metric, resamples) for t in (a, b))
    return difference(a, against, b, scores)
