"""What a report is of: the saved results of datasets, task by task, and the tables that their labels come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embcache.data.classes import target_words
from embcache.data.dataset import ImageDataset, find_dataset
from embcache.errors import EmbcacheError, StoreNotFoundError, UsageError
from embcache.paths import PathLike, home_dir
from embcache.probe.metrics import find_metric
from embcache.probe.summary import in_metric
from embcache.results.curves import named_curves
from embcache.runs.folders import ProbeResult, list_results, list_unreadable, runs_dir


@dataclass(frozen=True, eq=False)
class Task:
    """Results that may stand in one table: of one dataset, target and metric."""

    dataset: str
    target: str
    metric: str
    class_names: tuple[str, ...]
    models: dict[str, list[ProbeResult]]  # by the model's name, which tells what sets it apart from the others
    others: tuple[str, ...] = ()  # metrics that are shown besides; empty for the usual ones

    @property
    def title(self) -> str:
        """Dataset, and the target where it is not the label."""
        return self.dataset + (f", {self.target}" if self.target else "")

    @property
    def results(self) -> list[ProbeResult]:
        """All results, model by model."""
        return [result for members in self.models.values() for result in members]

    @property
    def synthetic(self) -> bool:
        """Whether the images are drawn, not taken."""
        return any(result.synthetic for result in self.results)


@dataclass(frozen=True, eq=False)
class Part:
    """One dataset of a report."""

    name: str
    ds: ImageDataset | None  # none where neither its files nor a snapshot are there; ``problem`` says why
    source: str
    problem: str
    results: tuple[ProbeResult, ...]  # all that can be read, those without a score too
    tasks: tuple[Task, ...]  # of the scored ones
    unreadable: int  # runs that were made by another version, or are damaged
    home: Path  # folder of stores and runs

    def run_folder(self, result: ProbeResult) -> Path:
        """Where a result's files lie."""
        return runs_dir(result.dataset, self.home) / result.id


def collect_parts(
    datasets: Sequence[str] = (),
    *,
    metrics: Sequence[str] = (),
    home: PathLike | None = None,
    data_root: PathLike | None = None,
) -> list[Part]:
    """Gather the saved results of datasets, by default of all that have any."""
    folder = home_dir(home)
    names = list(dict.fromkeys(datasets)) or list(dict.fromkeys(r.dataset for r in list_results(folder)))
    if data_root is not None and len(names) != 1:
        raise UsageError("--data-root is for one dataset", found=", ".join(names) or "none", fix="--dataset NAME")
    if not names:
        raise StoreNotFoundError(
            "there are no saved results to report", where=folder,
            fix="embcache probe --head linear --subset S,M,F, or embcache demo",
        )  # fmt: skip
    return [_part(name, metrics, folder, data_root) for name in names]


def _part(name: str, metrics: Sequence[str], home: Path, data_root: PathLike | None) -> Part:
    results = list_results(home, name)
    if not results:
        raise StoreNotFoundError(
            f"there are no saved results of {name}",
            expected=", ".join(dict.fromkeys(r.dataset for r in list_results(home))) or "none of any dataset",
            where=runs_dir(name, home),
            fix=f"embcache probe --head linear --subset S,M,F --dataset {name}",
        )
    ds, source, problem = None, "", ""
    try:
        ds, source = find_dataset(name, root=data_root, home=home, allow_missing=True)
    except UsageError:
        raise
    except EmbcacheError as error:
        problem = error.problem
    scored = results
    if metrics:  # a leaderboard gave its own metric alone
        found = [in_metric(result, metrics[0], home) for result in results]
        scored = [r for r in found if r.metric == find_metric(metrics[0], len(r.class_names)).key]
    return Part(name, ds, source, problem, tuple(results), tuple(make_tasks(scored, metrics[1:])),
                len(list_unreadable(home, name)), home)  # fmt: skip


def make_tasks(results: Sequence[ProbeResult], others: Sequence[str] = ()) -> list[Task]:
    """Scored results by dataset, target and metric, the labels first."""
    groups: dict[tuple[str, str, str, tuple[str, ...]], list[ProbeResult]] = {}
    for result in results:
        if result.mean is not None:
            key = (result.dataset, target_words(result.request), result.metric, result.class_names)
            groups.setdefault(key, []).append(result)
    ordered = sorted(groups.items(), key=lambda pair: (pair[0][1] != "", pair[0]))
    return [
        Task(*key, models=named_curves(members), others=tuple(find_metric(name, len(key[3])).key for name in others))
        for key, members in ordered
    ]
