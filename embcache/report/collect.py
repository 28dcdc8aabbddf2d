"""What a report shows: saved results task by task, the best model of each size, and what may be written about them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from embcache.config import DatasetRef
from embcache.data.columns import Column, column_values, columns
from embcache.data.dataset import ImageDataset, find_dataset
from embcache.data.groups import may_name_people, overlap_notes
from embcache.errors import EmbcacheError, ProtocolError, StoreNotFoundError, UsageError
from embcache.paths import PathLike, home_dir
from embcache.probe.metrics import find_metric
from embcache.probe.statistics import RESAMPLES
from embcache.probe.summary import in_metric, training_notes
from embcache.results.advice import BackboneAdvice, advise_backbone, comparable, load_alike, rankable
from embcache.results.compare import Comparison, Difference, Tested, compare_tested, difference, same_test
from embcache.results.curves import by_task, named_curves
from embcache.runs.folders import Result, list_results, list_unreadable, runs_dir
from embcache.targets import Target

HIDDEN = "a note that names patients or images is left out of this page; `embcache results` prints it"

_FILE = re.compile(r"\.(png|jpe?g|tiff?|webp|bmp|gif|jp2|dcm|dicom|h5|hdf5|csv|parquet)\b", re.IGNORECASE)
_ELSEWHERE = re.compile(r"unreadable images |\d training images? (of .* left out|share .* with the official test set)")
_FOLD = re.compile(r"\bfold (\d+)\b")


@dataclass(frozen=True, eq=False)
class Task:
    """Results that can be compared in one table: of one dataset, target and metric."""

    dataset: str
    target: str
    metric: str
    class_names: tuple[str, ...]
    models: dict[str, list[Result]]  # by the model's name, which says what distinguishes it from the others
    others: tuple[str, ...] = ()  # metrics that are shown in addition; empty for the usual ones

    @property
    def title(self) -> str:
        """Dataset, and the target where it is not the label."""
        return self.dataset + (f", {self.target}" if self.target else "")

    @property
    def results(self) -> list[Result]:
        """All results, model by model."""
        return [result for members in self.models.values() for result in members]

    @property
    def of(self) -> Target:
        """What is predicted."""
        return self.results[0].task

    def is_of(self, dataset: ImageDataset | None) -> bool:
        """Whether the labels of the dataset are what is predicted, with its own classes."""
        first = self.results[0]
        changed = first.target or first.request.get("of", first.request).get("classes")
        return dataset is not None and not changed and _family(self.of.kind) == _family(dataset.kind)


def _family(kind: str) -> str:
    return {"ordinal": "classes"}.get(kind, kind)


@dataclass(frozen=True, eq=False)
class Part:
    """One dataset of a report."""

    name: str
    dataset: ImageDataset | None  # None where neither its files nor a snapshot are there; ``problem`` says why
    read_from: str  # "live", "snapshot" or empty
    problem: str
    results: tuple[Result, ...]  # all that can be read, those without a score too
    tasks: tuple[Task, ...]  # of the scored ones
    unreadable: int  # runs that were made by another version, or are damaged
    home: Path  # folder of stores and runs

    def run_folder(self, result: Result) -> Path:
        """Where a result's files are."""
        return runs_dir(result.dataset, self.home) / result.id


@dataclass(frozen=True, eq=False)
class Rival:
    """One model at one size."""

    name: str  # of the model
    tested: Tested  # its result and predictions
    row: Comparison  # beside the chosen model, which is its own reference

    @property
    def result(self) -> Result:
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
    advice: BackboneAdvice  # how the chosen one differs from the others on the test set
    change: Difference | None = None  # from the size before, of the same model
    apart: tuple[str, ...] = ()  # models of other splits
    problems: tuple[str, ...] = ()  # runs whose predictions cannot be read

    @property
    def chosen(self) -> Rival:
        """The best on validation."""
        return self.rivals[0]


def collect_parts(
    datasets: Sequence[str], metrics: Sequence[str] = (), *, home: PathLike | None, ref: DatasetRef = DatasetRef()
) -> list[Part]:
    """Gather the saved results of datasets, by default of all that have any."""
    folder = home_dir(home)
    names = list(dict.fromkeys(datasets)) or list(dict.fromkeys(r.dataset for r in list_results(folder)))
    if ref.data_root is not None and len(names) != 1:
        several = ", ".join(names) or "none"
        raise UsageError("--data-root is for one dataset", code="several-datasets", found=several, fix="--dataset NAME")
    if not names:
        raise StoreNotFoundError(
            "there are no saved results to report", code="no-results", where=folder,
            fix="embcache probe --head linear --subset S,M,F, or embcache demo",
        )  # fmt: skip
    return [_part(name, metrics, folder, ref) for name in names]


def _part(name: str, metrics: Sequence[str], home: Path, ref: DatasetRef) -> Part:
    results = list_results(home, name)
    if not results:
        raise StoreNotFoundError(
            f"there are no saved results of {name}", code="no-results",
            expected=", ".join(dict.fromkeys(r.dataset for r in list_results(home))) or "none of any dataset",
            where=runs_dir(name, home), fix=f"embcache probe --head linear --subset S,M,F --dataset {name}",
        )  # fmt: skip
    dataset, read_from, problem = None, "", ""
    try:
        dataset, read_from = find_dataset(name, replace(ref, allow_missing=True), home=home)
    except UsageError:
        raise
    except EmbcacheError as error:
        problem = error.problem
    scored = results
    for metric in metrics:
        if not any(_fits(metric, result) for result in results):
            find_metric(metric, results[0].task)  # says why
    if metrics:  # results of a target that it does not fit keep their own
        fits = {result.id: _fits(metrics[0], result) for result in results}
        found = [in_metric(result, metrics[0], home) if fits[result.id] else result for result in results]
        # A leaderboard gave its own metric alone.
        scored = [r for r in found if not fits[r.id] or r.metric == find_metric(metrics[0], r.task).key]
    tasks, unreadable = make_tasks(scored, metrics[1:]), len(list_unreadable(home, name))
    return Part(name, dataset, read_from, problem, tuple(results), tuple(tasks), unreadable, home)


def _fits(metric: str, result: Result) -> bool:
    """Whether a metric is of the kind of a result's target; other misfits are refused."""
    try:
        find_metric(metric, result.task)
    except ProtocolError as error:
        if error.code != "metric-does-not-fit":
            raise
        return False
    return True


def make_tasks(results: Sequence[Result], others: Sequence[str] = ()) -> list[Task]:
    """Scored results by dataset, target and metric, the labels first."""
    ordered = sorted(by_task(results).items(), key=lambda pair: (pair[0][1] != "", pair[0]))
    return [
        Task(
            *key, models=named_curves(members),
            others=tuple(find_metric(name, members[0].task).key for name in others if _fits(name, members[0])),
        )
        for key, members in ordered
    ]  # fmt: skip


def choose(task: Task, part: Part, *, resamples: int = RESAMPLES) -> list[Choice]:
    """The best model on validation at every number of training labels of a task, ascending.

    Sizes at which nothing can be ranked are left out. Models are ranked that share their splits, so that their
    validation scores are comparable (`embcache.results.advice.comparable`).
    """
    sizes: dict[int, dict[str, Result]] = {}
    for name, members in task.models.items():
        for result in members:
            if rankable(result):
                sizes.setdefault(result.n_train, {})[name] = result
    choices: list[Choice] = []
    for n_train, at in sorted(sizes.items()):
        alike, unread = load_alike({name: at[name] for name in comparable(at)}, part.home)
        if not alike:
            continue
        rows = compare_tested([*alike.values()], resamples=resamples)
        rivals = tuple(Rival(name, alike[name], row) for name, row in zip(alike, rows, strict=True))
        choice = Choice(
            rivals[0].result.subset, n_train, rivals[0].result.labels_used, rivals,
            advise_backbone([*alike], rows, n_train),
            apart=tuple(name for name in at if name not in alike and name not in unread),
            problems=tuple(f"{name}: {problem}" for name, problem in unread.items()),
        )  # fmt: skip
        choices.append(replace(choice, change=_change(choices[-1], choice, resamples)) if choices else choice)
    return choices


def _change(before: Choice, after: Choice, resamples: int) -> Difference | None:
    b, own = after.chosen.tested, [rival.tested for rival in before.rivals if rival.name == after.chosen.name]
    if not own or not same_test(own[0], b):
        return None
    against, scores = (t.predictions.scores(t.result.metric, resamples) for t in (own[0], b))
    return difference(own[0], against, b, scores)


def notes_of(part: Part, ranked: Collection[str], *, ids: bool) -> list[str]:
    """The notes of a dataset and of its results, each once, folds of one fact together; none names a patient.

    Left out is what other places of the page say: notes of one training (beside its run, or where it is ``ranked``,
    by ID), and how many images are unreadable or of patients of the test set.
    """
    notes = dict[str, None]()
    if part.dataset is not None:
        notes = dict.fromkeys(note for note in part.dataset.notes if note not in overlap_notes(part.dataset.table))
    heads: dict[str, dict[str, None]] = {}
    for result in part.results:
        own = training_notes(result)
        for note in result.notes:
            if note.startswith("subset "):
                heads.setdefault(note, {})[result.head] = None
            elif note not in own and not _ELSEWHERE.search(note):
                notes[note] = None
        if result.id not in ranked:
            notes |= dict.fromkeys(f"{result.id}: {note}" for note in own)
    notes |= dict.fromkeys(f"{note} ({', '.join(of)})" for note, of in heads.items())
    folds: dict[str, list[str]] = {}
    for note in without_names(list(notes), part, ids=ids):
        fold = _FOLD.search(note)
        folds.setdefault(_FOLD.sub("fold \0", note, count=1), []).append(fold[1] if fold else "")
    lines = []
    for fact, numbers in folds.items():
        if len(numbers) > 1:
            fact = fact.replace("fold \0 predicts", "fold \0 predict").replace("fold \0", "folds \0")
        lines.append(fact.replace("\0", ", ".join(numbers), 1))
    return lines


def without_names(notes: Sequence[str], part: Part, *, ids: bool) -> list[str]:
    """Notes that name no patient, and without ``ids`` no image or file; one line replaces the others."""
    names = secret_words(part, ids=ids)
    long = [name for name in names if len(_words(name)) > 3]  # a name of several words is looked for as it is
    # Without a table it is not known what an ID is.
    kept = [note for note in notes if ids or (part.dataset is not None and not _FILE.search(note))]
    kept = [note for note in kept if not names & _words(note) and not any(name in note for name in long)]
    return kept + [HIDDEN] * (len(kept) < len(notes))


def _words(note: str) -> set[str]:
    """Every run of characters of a note that could be an ID: split at spaces, quotes, commas and brackets."""
    parts = re.split(r"[\s'\"“”,;:()\[\]…]+", note)
    return {*parts, *(part.strip(".") for part in parts), *(piece for part in parts for piece in part.split("/")), note}


def secret_words(part: Part, *, ids: bool) -> set[str]:
    """What may not be on a page: groups, and without ``ids`` also IDs, paths, and file names with and without suffix.

    Where every image is a group of its own, with its ID as the group's name, that is the name of the image.
    """
    if part.dataset is None:
        return set()
    table = part.dataset.table
    images = {str(value) for name in ("id", "path") for value in table[name].tolist()}
    images |= {str(path) for path in part.dataset.missing}
    groups = {str(value) for value in table["group"].tolist()}
    if ids:
        return groups - images - {""}
    images |= {name for path in list(images) for name in (PurePosixPath(path).name, PurePosixPath(path).stem)}
    return (images | groups) - {""}


def shown_columns(dataset: ImageDataset, secret: set[str]) -> list[Column]:
    """The columns of a dataset's own table that make groups of images and name no patient; see `hidden_columns`."""
    found = []
    for name in columns(dataset):
        try:
            column = None if may_name_people(name) else column_values(dataset, name)
        except EmbcacheError:
            column = None  # text with too many values, or without any
        if column is None:
            continue
        members = [set(dataset.groups[column.of == value].tolist()) for value in column.values]
        names_patients = len(members) > 2 and all(len(of) == 1 for of in members)
        if not names_patients and not secret & set(column.values):
            found.append(column)
    return found


def hidden_columns(dataset: ImageDataset) -> list[str]:
    """A note on the columns that a page leaves out because of their names, or none."""
    names = [name for name in columns(dataset) if may_name_people(name)]
    return [f"columns left out, which may name patients: {', '.join(names)}"] if names else []
