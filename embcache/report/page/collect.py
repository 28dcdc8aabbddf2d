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
from embcache.probe.results import ProbeResult, list_results, list_unreadable, runs_dir
from embcache.probe.summary import in_metric
from embcache.report.curves import named_curves


@dataclass(frozen=True, eq=False)
class Task:
    """Results that may stand in one table: of one dataset, target and metric.

    Attributes
    ----------
    dataset, target, metric : str
        ``target`` is empty for the labels as they are, else `embcache.data.classes.target_words`.
    class_names : tuple of str
    models : dict of str to list of ProbeResult
        By the model's name, which tells what sets it apart from the others; results over sizes.
    others : tuple of str
        Metrics that are shown besides; empty for the usual ones.
    """

    dataset: str
    target: str
    metric: str
    class_names: tuple[str, ...]
    models: dict[str, list[ProbeResult]]
    others: tuple[str, ...] = ()

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
    """One dataset of a report.

    Attributes
    ----------
    name : str
    ds : ImageDataset or None
        None where neither its files nor a snapshot are there; ``problem`` says why.
    source : {"live", "snapshot", ""}
    problem : str
    results : tuple of ProbeResult
        All that can be read, those without a score too.
    tasks : tuple of Task
        Of the scored ones.
    unreadable : int
        Runs that were made by another version, or are damaged.
    home : Path
        Folder of stores and runs.
    """

    name: str
    ds: ImageDataset | None
    source: str
    problem: str
    results: tuple[ProbeResult, ...]
    tasks: tuple[Task, ...]
    unreadable: int
    home: Path

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
    """Gather the saved results of datasets, by default of all that have any.

    Parameters
    ----------
    datasets : sequence of str
        Names; empty for all.
    metrics : sequence of str
        The first scores all results anew, on validation too, so that it also chooses between models; default each
        result's own. The others are shown besides.
    home : path, optional
        Folder of stores and runs.
    data_root : path, optional
        The folder of the one dataset named.

    Raises
    ------
    StoreNotFoundError
        A dataset has no saved results.
    UsageError
        ``data_root`` with several datasets, or no such metric.
    ProtocolError
        A metric is for two classes, and a dataset has more.
    """
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
    scored = [in_metric(result, metrics[0], home) for result in results] if metrics else results
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
