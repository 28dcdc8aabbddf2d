"""Results and cells for the tests of tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from embcache.results.paper import Cell, Model
from embcache.runs.folders import FoldResult, Result


def make_result(scores: tuple[float, ...] = (0.8, 0.82, 0.84, 0.86, 0.88), **changes: Any) -> Result:
    """A result on the whole official test set of pneumonia, with these fold scores."""
    mean = sum(scores) / len(scores)
    std = (sum((s - mean) ** 2 for s in scores) / (len(scores) - 1)) ** 0.5
    folds = tuple(FoldResult(f, s, s, 30, 40, 50, 100, 1e-3, {"score": s}) for f, s in enumerate(scores))
    result = Result(
        id="linear-S-000000000000",
        kind="probe",
        dataset="pneumonia",
        backbones=("supervised",),
        head="linear",
        subset="S",
        n_train=50,
        n_val=100,
        n_test=624,
        labels_used=150,
        metric="auc",
        mean=mean,
        std=std,
        interval=(mean - 0.02, mean + 0.02),
        val_mean=mean,
        folds=folds,
        test_set="official",
        synthetic=False,
        notes=("a note",),
        class_names=("NORMAL", "PNEUMONIA"),
        request={"kind": "probe", "head": {"name": "linear"}, "subset": "S", "val": "full", "seed": 0},
        seconds=10.0,
        versions={},
        source="live",
    )
    return replace(result, **changes)


SUPERVISED = Model("Supervised ImageNet", "probe", "linear", ("supervised",), paper="supervised")


def make_cell(result: Result | None = None, **changes: Any) -> Cell:
    """A cell of pneumonia at S."""
    return replace(Cell("pneumonia", SUPERVISED, "S", result), **changes)
