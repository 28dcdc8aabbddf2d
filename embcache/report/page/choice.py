"""Which model is best at a number of labels: chosen on validation, then compared with the others on the test set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from embcache.errors import EmbcacheError
from embcache.probe.results import ProbeResult
from embcache.probe.statistics import RESAMPLES
from embcache.report.compare import Comparison, Tested, compare_tested, load_tested, same_test
from embcache.report.page.collect import Part, Task

LEVEL = 0.05
"""A corrected p below it counts as beyond chance."""


@dataclass(frozen=True, eq=False)
class Rival:
    """One model at one size.

    Attributes
    ----------
    name : str
        Of the model.
    tested : Tested
        Its result and predictions.
    row : Comparison
        Beside the chosen model, which is its own reference.
    """

    name: str
    tested: Tested
    row: Comparison

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
    """Models at one number of training labels, all trained, validated and tested on the same images.

    Attributes
    ----------
    subset : str
    n_train, labels_used : int
        Training labels, and with those of validation.
    rivals : tuple of Rival
        By falling validation score: the first is the chosen one. The test set plays no part in the order.
    apart : tuple of str
        Names of models at this size that cannot be ranked with these, for they were validated or tested on others.
    problems : tuple of str
        Runs whose predictions cannot be read.
    """

    subset: str
    n_train: int
    labels_used: int
    rivals: tuple[Rival, ...]
    apart: tuple[str, ...] = ()
    problems: tuple[str, ...] = field(default=())

    @property
    def chosen(self) -> Rival:
        """The best on validation."""
        return self.rivals[0]


def choose(task: Task, part: Part, *, resamples: int = RESAMPLES) -> list[Choice]:
    """The choice at every number of training labels of a task, ascending.

    Sizes at which nothing can be ranked are left out. Models are ranked that share the digest of their splits, so that
    one's validation score is comparable with another's; where there are several such families the largest is taken, of
    equal ones that with the most labels.
    """
    sizes: dict[int, dict[str, ProbeResult]] = {}
    for name, members in task.models.items():
        for result in members:
            if result.kind != "kaggle" and result.val_mean is not None:
                sizes.setdefault(result.n_train, {})[name] = result
    found = (_choice(at, part, resamples) for _, at in sorted(sizes.items()))
    return [choice for choice in found if choice is not None]


def _choice(at: Mapping[str, ProbeResult], part: Part, resamples: int) -> Choice | None:
    families: dict[str, list[str]] = {}
    for name, result in at.items():
        families.setdefault(str(result.request.get("splits", "")), []).append(name)
    family = max(families.values(), key=lambda names: (len(names), at[names[0]].labels_used))
    tested: dict[str, Tested] = {}
    problems = []
    for name in family:
        try:
            tested[name] = load_tested(at[name], part.run_folder(at[name]))
        except EmbcacheError as error:
            problems.append(f"{name}: {error.problem}")
    apart = [name for name in at if name not in family]
    order = sorted(tested, key=lambda name: (-(at[name].val_mean or 0.0), name))
    alike = [name for name in order if same_test(tested[order[0]], tested[name])]
    if not alike:
        return None
    rows = compare_tested([tested[name] for name in alike], resamples=resamples)
    rivals = tuple(Rival(name, tested[name], row) for name, row in zip(alike, rows, strict=True))
    first = rivals[0].result
    apart += [name for name in order if name not in alike]
    return Choice(first.subset, first.n_train, first.labels_used, rivals, tuple(apart), tuple(problems))


def beyond(row: Comparison) -> bool:
    """Whether the 95 % interval of a difference leaves 0 out."""
    bounds = None if row.difference is None else row.difference.interval
    return bounds is not None and (bounds[0] > 0 or bounds[1] < 0)


def told_apart(row: Comparison) -> bool:
    """Whether a difference holds after Holm's correction for all models compared at this size."""
    return row.p_holm is not None and row.p_holm < LEVEL
