"""A table of scores as data: datasets × models × subsets, and the cells that fill it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from embcache.data.classes import class_words
from embcache.finetune.finetune_plan import GENTLE, gentle
from embcache.probe.schedule import Schedule, rates_of
from embcache.results.paper import PaperValue
from embcache.runs.folders import Result

PAPER_FOLDS = 5

PAPER_TEST = {"pneumonia": 624, "nih": 1613, "patchcam": 57_458, "aptos": 1928}
"""Test images of the paper's datasets (nih: without those of more than one finding)."""

_COMPLETE = 0.95  # of the test images: a few unreadable ones do not make another test set


@dataclass(frozen=True)
class Model:
    """What is trained, as one row or column of a table."""

    label: str  # as printed
    kind: str  # ``features`` trains nothing: cached features suffice
    head: str  # A name that ``embcache heads`` lists
    backbones: tuple[str, ...]  # exactly one for a head that does not fuse
    paper: str = ""  # the paper's name for it; empty where the paper has no such model
    seed: int | None = None  # instead of the seed of the whole table
    among: tuple[Model, ...] = ()  # not trained, but chosen for each dataset and subset: the best of these …
    by: str = ""  # … by this score


@dataclass(frozen=True)
class Grid:
    """A table of scores, still empty."""

    name: str  # ``table2``, ``B3`` …, or the name of the TOML file
    title: str
    datasets: tuple[str, ...]
    models: tuple[Model, ...]
    subsets: tuple[str, ...]  # ``S``, ``M``, ``F`` or numbers, in the order printed
    across: str  # what the columns are; the rest goes down
    leaderboard: bool = True  # whether a leaderboard's result may stand in a cell


@dataclass(frozen=True)
class Cell:
    """One place of a table."""

    dataset: str
    model: Model
    subset: str
    result: Result | None = None
    reason: str = ""  # why there is no result, and what to do
    paper: PaperValue | None = None  # what the paper has there
    difference: float | None = None  # (ours − paper) / √(s₁² + s₂²), both deviations over folds
    withheld: str = ""  # why the difference is not printed though both values are known


def compare_with_paper(cell: Cell) -> Cell:
    """The cell with its difference from the paper, or with the reason why that is withheld."""
    if cell.result is None or cell.result.mean is None or cell.paper is None or cell.paper.mean is None:
        return cell
    withheld, ours, paper = _why_withheld(cell.result), cell.result, cell.paper
    if withheld or ours.mean is None or ours.std is None or paper.mean is None or paper.std is None:
        return replace(cell, withheld=withheld)
    return replace(cell, difference=(ours.mean - paper.mean) / math.hypot(ours.std, paper.std))


def _why_withheld(result: Result) -> str:
    """Why a result may not be printed as a difference from the paper's value; empty where it may."""
    scored = sum(fold.score is not None for fold in result.folds)
    expected = PAPER_TEST.get(result.dataset)
    if result.kind == "kaggle":
        expected = result.n_test  # the leaderboards score all of their images
    elif result.test_set != "official":
        return "the test set is a local one, not the paper's"
    if expected is None or not _COMPLETE * expected <= result.n_test <= expected / _COMPLETE:
        return f"the test set is not the paper's: {result.n_test:,} images" + (f" of {expected:,}" if expected else "")
    if scored < PAPER_FOLDS:
        return f"{scored} folds, the paper has {PAPER_FOLDS}"
    request = trained_by(result)
    if request is None:
        return "how the submitted run was trained is not known"
    if request.get("val", "full") != "full":
        return "validated on as many images as train, the paper on whole folds"
    if not result.std:
        return "the folds do not differ"
    return _other_task(request) or _other_training(result, request)


def trained_by(result: Result) -> Mapping[str, Any] | None:
    """The request that trained a result's models: its own, or of a leaderboard's result that of the submitted run.

    None for a leaderboard's result that does not contain it.
    """
    if result.kind != "kaggle":
        return result.request
    of = result.request.get("of")
    return of if isinstance(of, Mapping) else None


def _other_task(request: Mapping[str, Any]) -> str:
    """How the images or the labels differ from the paper's."""
    if request.get("target"):
        return f"it predicts the column {request['target']}, not the labels"
    if request.get("classes"):
        return f"it distinguishes other classes: {class_words(request['classes'])}"
    if request.get("exclude_test_overlap"):
        return "trained without the images that share a group with the test set, the paper with them"
    return ""


def _other_training(result: Result, request: Mapping[str, Any]) -> str:
    """How training or extraction differ from the paper."""
    rates = rates_of(request)
    if len(rates) > 1:
        return "the learning rate was chosen on validation, the paper fixes it"
    if "views" in request:
        return f"trained on {request['views']} cached views of each image, which the paper does not have"
    expected = asdict(Schedule())
    if request.get("kind") == "finetune" and gentle(result.backbones):
        expected |= GENTLE
    schedule = {**(request.get("schedule") or {}), **({"lr": rates[0]} if rates else {})}
    for name, value in schedule.items():
        if value != expected.get(name):
            return f"trained with {name.replace('_', ' ')} {value:g}, the paper with {expected.get(name):g}"
    kinds = {recipe.get("transform", {}).get("kind", "paper") for recipe in result.recipes.values()} - {"paper"}
    if kinds:
        return f"features of images under the transform {', '.join(sorted(kinds))}, not the paper's"
    precisions = {recipe.get("precision", "fp32") for recipe in result.recipes.values()} - {"fp32"}
    if precisions:
        return f"computed in {', '.join(sorted(precisions))}, the paper in fp32"
    return ""


def choose_best(cells: Sequence[Cell], by: str) -> Cell | None:
    """The cell with the highest test or validation score; the first of equals; None where none is scored."""

    def score(cell: Cell) -> float | None:
        if cell.result is None:
            return None
        return cell.result.mean if by == "test" else cell.result.val_mean

    scored = [(value, cell) for cell in cells if (value := score(cell)) is not None]
    return max(scored, key=lambda pair: pair[0])[1] if scored else None
