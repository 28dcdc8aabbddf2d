"""Two or more results on the same test images: differences on the same bootstrap resamples, Holm over one family.

Folds are no paired samples (their training sets overlap), so nothing is tested over folds. What is resampled are test
groups: each resample scores every result, so a difference is one of models that saw the same images (FACTS of the
protocol, "Uncertainty"; `embcache.probe.metrics.bootstrap`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from embcache.data.dataset import read_snapshot
from embcache.errors import ProtocolError, StoreError, UsageError
from embcache.paths import PathLike
from embcache.probe.metrics import RESAMPLES, bootstrap, interval
from embcache.probe.results import ProbeResult, find_run_anywhere, load_predictions

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Tested:
    """A result and its predictions of labelled test images.

    Attributes
    ----------
    result : ProbeResult
    ids, groups : object array of str of shape (n,)
        Sorted by id.
    labels : int64 array of shape (n,)
    p : float64 array of shape (K, n, C)
        Of every fold that has a model.
    """

    result: ProbeResult
    ids: NDArray[np.object_]
    groups: NDArray[np.object_]
    labels: NDArray[np.int64]
    p: FloatArray


@dataclass(frozen=True)
class Comparison:
    """One result beside the reference.

    Attributes
    ----------
    run, dataset, head, subset, metric : str
    backbones : tuple of str
    mean : float
        Over the folds.
    std : float or None
        Over the folds, ddof 1.
    interval : (float, float)
        95 % bootstrap interval of the mean.
    difference : float or None
        Mean less that of the reference; None for the reference, as what follows.
    difference_interval : (float, float) or None
        95 % bootstrap interval on the same resamples.
    p : float or None
        Two-sided bootstrap p of no difference.
    p_holm : float or None
        The same after Holm's correction for all results compared with the reference.
    notes : tuple of str
        What the result says of its test groups, on which all the rest depends.
    labels_used : int
        Of a fold, training and validation.
    """

    run: str
    dataset: str
    backbones: tuple[str, ...]
    head: str
    subset: str
    metric: str
    mean: float
    std: float | None
    interval: tuple[float, float]
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    p: float | None = None
    p_holm: float | None = None
    notes: tuple[str, ...] = ()
    labels_used: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, every field by its name."""
        return asdict(self)


def compare_runs(
    runs: Sequence[str],
    *,
    reference: str | None = None,
    home: PathLike | None = None,
    resamples: int = RESAMPLES,
) -> list[Comparison]:
    """Compare results with one reference on the same resamples of the same test images.

    Parameters
    ----------
    runs : sequence of str
        Ids of runs, or their beginnings.
    reference : str, optional
        The run that the others are compared with; default the first. It need not be among ``runs``.
    home : path, optional
        Folder of stores and runs.
    resamples : int
        Of the bootstrap.

    Returns
    -------
    list of Comparison
        The reference first, then the others in their order.

    Raises
    ------
    UsageError
        Fewer than two different runs.
    ProtocolError
        They were not tested on the same images by the same metric, or the labels are not known.
    """
    first = None if reference is None else find_run_anywhere(reference, home)
    found = [find_run_anywhere(run, home) for run in runs]
    ordered = {path: result for result, path in ([first] if first else []) + found}  # a run named twice counts once
    if len(ordered) < 2:
        raise UsageError(
            "a comparison needs two runs" + (", and these names are all of one" if len(found) > 1 else ""),
            found=", ".join(result.id for result in ordered.values()) or "none",
            fix="embcache compare RUN RUN …   (embcache results lists them)",
        )
    return compare_tested([load_tested(result, path, home) for path, result in ordered.items()], resamples=resamples)


def compare_tested(tested: Sequence[Tested], *, resamples: int = RESAMPLES) -> list[Comparison]:
    """Compare results whose predictions are read already with the first of them.

    Raises
    ------
    ProtocolError
        They were not tested on the same images by the same metric.
    """
    for other in tested[1:]:
        _check_same_test(tested[0], other)
    samples = [bootstrap(t.result.metric, t.labels, t.p, t.groups, resamples=resamples) for t in tested]
    rows = [_row(tested[0], samples[0])]
    p = [bootstrap_p(sample - samples[0]) for sample in samples[1:]]
    for t, sample, raw, corrected in zip(tested[1:], samples[1:], p, holm(p), strict=True):
        rows.append(_row(t, sample, tested[0], samples[0], raw, corrected))
    return rows


def bootstrap_p(differences: ArrayLike) -> float:
    """Two-sided p that a difference is 0, from its bootstrap samples.

    Twice the share of samples on the rarer side of 0 (those at 0 count on both), each share with one sample added, so
    that the smallest p of B samples is 2 / (B + 1); 1 at most.

    Parameters
    ----------
    differences : array-like of float, shape (B,)
        On each resample.
    """
    d = np.round(np.asarray(differences, dtype=np.float64), 12)  # equal scores may differ in their last bits
    rarer = min(int((d <= 0).sum()), int((d >= 0).sum()))
    return min(1.0, 2 * (rarer + 1) / (len(d) + 1))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the m p-values of one family, adjusted, in the order given.

    The k-th smallest is multiplied by m − k + 1; none becomes smaller than one before it, or more than 1.
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]


def load_tested(result: ProbeResult, path: Path, home: PathLike | None = None) -> Tested:
    """Predictions of a run on its labelled test images.

    Raises
    ------
    ProtocolError
        The labels of the test images are not known.
    StoreError
        The run's file cannot be read, or holds no groups and the dataset's snapshot is gone.
    """
    table = load_predictions(path)
    table = table[table["label"] >= 0].sort_values(["fold", "id"], kind="stable")
    if table.empty or result.kind == "kaggle":
        raise ProtocolError(
            f"the test labels of run {result.id} are not known, so its score cannot be resampled",
            expected="a run with --test local, or on a dataset whose test labels are public",
            found=f"{result.kind} on {result.dataset}, test set {result.test_set}",
            fix="embcache results",
        )
    first = table[table["fold"] == table["fold"].iloc[0]]
    chances = table[[f"p_{c}" for c in range(len(result.class_names))]].to_numpy(dtype=np.float64)
    ids = first["id"].to_numpy(dtype=object)
    groups = first["group"].to_numpy(dtype=object) if "group" in first else _snapshot_groups(result, ids, home)
    return Tested(
        result, ids, groups, first["label"].to_numpy(dtype=np.int64), chances.reshape(-1, len(ids), chances.shape[1])
    )


def _snapshot_groups(result: ProbeResult, ids: NDArray[np.object_], home: PathLike | None) -> NDArray[np.object_]:
    """Groups of a run made by a version that kept none with the predictions."""
    ds = read_snapshot(result.dataset, home)
    known = {} if ds is None else dict(zip(ds.table["id"], ds.table["group"], strict=True))
    if not set(ids) <= set(known):
        raise StoreError(
            f"run {result.id} was made by a version that kept no groups",
            fix=f"embcache probe --again --dataset {result.dataset} --head {result.head} --subset {result.subset}",
        )
    return np.array([str(known[i]) for i in ids], dtype=object)


def _check_same_test(a: Tested, b: Tested) -> None:
    words = {"dataset": "datasets", "target": "targets", "metric": "metrics", "class_names": "classes"}
    for what, several in words.items():
        mine, theirs = getattr(a.result, what), getattr(b.result, what)
        if mine != theirs:
            raise ProtocolError(
                f"runs of different {several} cannot be compared",
                found=f"{a.result.id}: {_told(mine)}\n{b.result.id}: {_told(theirs)}",
                fix="embcache results",
            )
    apart = set(a.ids) ^ set(b.ids)
    frames = [pd.DataFrame({"id": t.ids, "label": t.labels, "group": t.groups}) for t in (a, b)]
    if not apart and not frames[0].equals(frames[1]):
        apart = set(frames[0]["id"][(frames[0] != frames[1]).any(axis=1)])
    if apart:
        raise ProtocolError(
            "the runs were not tested on the same images, labels and groups",
            expected=f"{len(a.ids):,} test images of {a.result.id} ({a.result.test_set})",
            found=f"{len(b.ids):,} of {b.result.id} ({b.result.test_set}); {len(apart):,} differ: {min(apart)!r} …",
            fix="probe both again: embcache probe --again …, with the same --test and --splits",
        )


def _told(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value) or "the labels"


def _row(
    t: Tested,
    samples: FloatArray,
    reference: Tested | None = None,
    against: FloatArray | None = None,
    p: float | None = None,
    p_holm: float | None = None,
) -> Comparison:
    result = t.result
    assert result.mean is not None  # load_tested refuses results without scores
    row = Comparison(
        result.id,
        result.dataset,
        result.backbones,
        result.head,
        result.subset,
        result.metric,
        result.mean,
        result.std,
        interval(samples),
        notes=(
            *(note for note in result.notes if note.startswith(("few test groups", "ungrouped"))),
            *result.left_out,
        ),
        labels_used=result.labels_used,
    )
    if reference is None or against is None or reference.result.mean is None:
        return row
    return Comparison(
        **{
            **{name: getattr(row, name) for name in row.__dataclass_fields__},
            "difference": result.mean - reference.result.mean,
            "difference_interval": interval(samples - against),
            "p": p,
            "p_holm": p_holm,
        }
    )
