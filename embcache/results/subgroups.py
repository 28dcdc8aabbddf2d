"""Scores of a run within subgroups of its test images: by sex, age band, view position, or any column there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embcache.data.classes import column_values
from embcache.data.dataset import find_dataset
from embcache.errors import StoreError, UsageError
from embcache.paths import PathLike
from embcache.probe.statistics import RESAMPLES, estimate
from embcache.results.compare import Tested, corrected, difference, load_tested, same_test
from embcache.results.comparisons import Difference
from embcache.runs.folders import find_run_anywhere

NO_VALUE = "(no value)"


@dataclass(frozen=True)
class Subgroup:
    """One run within one subgroup."""

    run: str
    metric: str
    column: str
    value: str
    n_images: int
    n_groups: int
    mean: float | None
    std: float | None
    interval: tuple[float, float] | None  # 95 %, as tables show it; None with the reason in ``why``
    lacks: tuple[str, ...] = ()  # classes of the test set that the subgroup has not: it is too small to be scored
    labels_used: int = 0  # of a fold of the run, training and validation
    why: str = ""  # why there is no interval
    positive: str = ""  # the class that an asymmetric metric is of
    difference: Difference | None = None
    p_holm: float | None = None  # its p, corrected for all runs, metrics and subgroups

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, every field by its name."""
        return asdict(self)


def score_subgroups(
    runs: Sequence[str],
    by: Sequence[str],
    *,
    metrics: Sequence[str] = (),
    home: PathLike | None = None,
    data_root: PathLike | None = None,
    resamples: int = RESAMPLES,
) -> tuple[list[Subgroup], list[str]]:
    """Score runs within the subgroups that columns of the dataset's table make of the test images."""
    if not runs or not by:
        raise UsageError("subgroups need runs and columns", fix="embcache subgroups RUN --by sex,age")
    rows: list[Subgroup] = []
    first: Tested | None = None
    notes: dict[str, None] = {}
    for run in runs:
        result, path = find_run_anywhere(run, home)
        tested = load_tested(result, path)
        ds, _ = find_dataset(result.dataset, root=data_root, home=home)
        place = {image: row for row, image in enumerate(ds.ids)}
        gone = [image for image in tested.ids if image not in place]
        if gone:
            raise StoreError(
                f"{len(gone):,} test images of run {result.id} are no longer in {ds.name}",
                found=repr(gone[0]),
                where=ds.root,
                fix="name the folder that the run was made from with --data-root",
            )
        where = np.array([place[image] for image in tested.ids], dtype=np.int64)
        first = first or tested
        against = first if tested is not first and same_test(first, tested) else None
        notes |= dict.fromkeys(result.left_out)
        parts: list[tuple[str, str, NDArray[np.bool_]]] = [("", "all", np.ones(len(where), dtype=bool))]
        for name in by:
            column = column_values(ds, name)
            notes |= dict.fromkeys(column.notes)
            of = column.of[where]
            values = {value: np.asarray(of == value, dtype=bool) for value in (*column.values, "")}
            parts += [(column.name, value or NO_VALUE, members) for value, members in values.items() if members.any()]
        for metric in metrics or (result.metric,):
            rows += [_score(tested, metric, *part, against, resamples) for part in parts]
    return corrected(rows), list(notes)


def _score(
    t: Tested,
    metric: str,
    column: str,
    value: str,
    members: NDArray[np.bool_],
    against: Tested | None,
    resamples: int,
) -> Subgroup:
    """One row; without scores where a class of the test set is missing, for then it is another task."""
    found = t.predictions.take(members)
    names = t.result.class_names
    lacks = tuple(names[c] for c in sorted(set(t.labels.tolist()) - set(found.labels.tolist())))
    row = Subgroup(t.result.id, metric, column, value, len(found.ids), len(set(found.groups)), None, None, None, lacks,
                   t.result.labels_used)  # fmt: skip
    if lacks:
        return row
    scores = found.scores(metric, resamples)
    e = estimate(scores, found.overlap, found.folds)
    apart = None
    if against is not None:
        other = replace(against.predictions, positive=found.positive).take(members).scores(metric, resamples)
        apart = difference(against, other, t, scores)
    return replace(
        row,
        metric=e.metric,
        mean=e.mean,
        std=e.std,
        interval=e.interval,
        why=e.why,
        positive=e.positive,
        difference=apart,
    )
