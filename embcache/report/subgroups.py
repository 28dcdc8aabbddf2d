"""Scores of a run within subgroups of its test images: by sex, age band, view position, or any column there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embcache.data.columns import column_values
from embcache.data.dataset import find_dataset
from embcache.errors import StoreError, UsageError
from embcache.paths import PathLike
from embcache.probe.metrics import RESAMPLES, evaluate, interval
from embcache.probe.results import find_run_anywhere
from embcache.report.compare import Tested, load_tested
from embcache.report.scorers import bootstrap_metric

METRICS = ("auc", "auprc", "accuracy", "balanced_accuracy", "sensitivity_at_95_specificity", "kappa")
"""What a subgroup can be scored by besides the dataset's own metric."""

NO_VALUE = "(no value)"


@dataclass(frozen=True)
class Subgroup:
    """One run within one subgroup.

    Attributes
    ----------
    run, metric : str
    column, value : str
        ``""`` and ``"all"`` for all test images.
    n_images, n_groups : int
    mean, std : float or None
        Over folds (ddof 1); None where the subgroup is too small.
    interval : (float, float) or None
        95 % bootstrap interval over the subgroup's groups.
    lacks : tuple of str
        Classes of the test set that the subgroup has not: it is too small to be scored.
    labels_used : int
        Of a fold of the run, training and validation.
    """

    run: str
    metric: str
    column: str
    value: str
    n_images: int
    n_groups: int
    mean: float | None
    std: float | None
    interval: tuple[float, float] | None
    lacks: tuple[str, ...] = ()
    labels_used: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, every field by its name."""
        return asdict(self)


def score_subgroups(
    runs: Sequence[str],
    by: Sequence[str],
    *,
    metric: str | None = None,
    home: PathLike | None = None,
    data_root: PathLike | None = None,
    resamples: int = RESAMPLES,
) -> tuple[list[Subgroup], list[str]]:
    """Score runs within the subgroups that columns of the dataset's table make of the test images.

    Parameters
    ----------
    runs : sequence of str
        Ids of runs, or their beginnings.
    by : sequence of str
        Columns; see `embcache.data.columns.column_values`.
    metric : str, optional
        One of `METRICS`, or ``macro_auc``; default the dataset's own.
    home : path, optional
        Folder of stores and runs.
    data_root : path, optional
        The dataset's own folder, where all runs are of one dataset.
    resamples : int
        Of the bootstrap.

    Returns
    -------
    rows : list of Subgroup
        For each run all test images, then the values of each column.
    notes : list of str
        What a reader must know.

    Raises
    ------
    UsageError
        No run, no column, or no such column or metric.
    ProtocolError
        A run's test labels are not known.
    StoreError
        A test image of a run is no longer in the dataset.
    """
    if not runs or not by:
        raise UsageError("subgroups need runs and columns", fix="embcache subgroups RUN --by sex,age")
    if metric is not None and metric not in (*METRICS, "macro_auc"):
        raise UsageError("no such metric", expected=", ".join(METRICS), found=metric, where="--metric")
    rows: list[Subgroup] = []
    notes: dict[str, None] = {}
    for run in runs:
        result, path = find_run_anywhere(run, home)
        tested = load_tested(result, path, home)
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
        asked = metric or result.metric
        notes |= dict.fromkeys(result.left_out)
        rows.append(_score(tested, asked, "", "all", np.ones(len(where), dtype=bool), resamples))
        for name in by:
            column = column_values(ds, name)
            notes |= dict.fromkeys(column.notes)
            of = column.of[where]
            for value in (*column.values, ""):
                members = np.asarray(of == value, dtype=bool)
                if members.any():
                    rows.append(_score(tested, asked, column.name, value or NO_VALUE, members, resamples))
    return rows, list(notes)


def _score(t: Tested, metric: str, column: str, value: str, members: NDArray[np.bool_], resamples: int) -> Subgroup:
    """One row; without scores where a class of the test set is missing, for then it is another task."""
    labels, p, groups = t.labels[members], t.p[:, members], t.groups[members]
    names = t.result.class_names
    lacks = tuple(names[c] for c in sorted(set(t.labels.tolist()) - set(labels.tolist())))
    row = Subgroup(t.result.id, metric, column, value, len(labels), len(set(groups)), None, None, None, lacks,
                   t.result.labels_used)  # fmt: skip
    if lacks:
        return row
    own = t.result.metric
    key = "score" if metric == own else "auc" if metric == "macro_auc" else metric
    scores = [evaluate(own, labels, q)[key] for q in p]
    samples = bootstrap_metric(metric, labels, p, groups, resamples=resamples)
    std = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
    found = {"mean": float(np.mean(scores)), "std": std, "interval": interval(samples)}
    return Subgroup(**{**{name: getattr(row, name) for name in row.__dataclass_fields__}, **found})
