"""The paper's numbers as printed, with the slips flagged (``paper.json``), and cells of scores beside them."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from operator import itemgetter
from typing import Any

from embcache.data.classes import class_words
from embcache.probe.schedule import GENTLE, Schedule, gentle, rates_of
from embcache.runs.folders import Result

PAPER_NAMES = {
    "random": "Random", "supervised": "Supervised ImageNet", "swav": "SwAV", "simclr": "SimCLR", "dino": "DINO",
    "dvme": "DVME", "dvme-noattn": "DVME w/o self-attention",
}  # fmt: skip
"""What the paper calls its backbones, which it probes with ``linear``, and its fusing heads."""

PAPER_FOLDS = 5

PAPER_TEST = {"pneumonia": 624, "nih": 1613, "patchcam": 57_458, "aptos": 1928}
"""Test images of the paper's datasets (nih: without those of more than one finding)."""

_COMPLETE = 0.95  # of the test images: a few unreadable ones do not make another test set


@dataclass(frozen=True)
class PaperValue:
    """One number of the paper."""

    table: str  # where it is printed: ``table1`` … ``table4``, ``B1`` … ``B8``, ``C1`` … ``C4``, ``G1``
    dataset: str = ""  # empty in G1
    model: str = ""  # A backbone of the paper, ``dvme``, ``dvme-noattn`` or ``best`` (the best single baseline)
    subset: str = ""  # ``S``, ``M``, ``F`` or a number of images
    printed: str = ""  # the row's or cell's own words where they differ: ``50 (S)``, ``3.6 M``
    mean: float | None = None
    std: float | None = None
    count: int | None = None  # images, in Table 1
    flag: str = ""  # what is wrong with it; empty where nothing is


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper."""

    name: str
    kind: str
    flags: tuple[str, ...]  # slips of the table as a whole, or of the text about it
    values: tuple[PaperValue, ...]  # in the order printed


@functools.cache
def paper_tables() -> Mapping[str, PaperTable]:
    """Every table of the paper by its name."""
    content = json.loads(files("embcache.results").joinpath("paper.json").read_text(encoding="utf-8"))
    tables = {}
    for name, table in content["tables"].items():
        values = ({"subset" if key == "setting" else key: v for key, v in row.items()} for row in table["values"])
        found = tuple(PaperValue(table=name, **row) for row in values)
        tables[name] = PaperTable(name, table["kind"], tuple(table["flags"]), found)
    return tables


def find_value(table: str, dataset: str, model: str, subset: str) -> PaperValue | None:
    """The number printed in a table for a dataset's model at a subset; None where there is none."""
    return _index().get((table, dataset, model, subset))


@functools.cache
def _index() -> Mapping[tuple[str, str, str, str], PaperValue]:
    return {(v.table, v.dataset, v.model, v.subset): v for t in paper_tables().values() for v in t.values}


def named_subset(dataset: str, subset: str) -> str:
    """``S`` or ``M`` where a number is what Table 1 prints for them, else ``subset`` itself."""
    sizes = {v.subset: v.count for v in paper_tables()["table1"].values if v.dataset == dataset}
    return next((name for name in ("S", "M") if subset.isdigit() and sizes.get(name) == int(subset)), subset)


# Tables of scores: datasets × models × subsets, and the cells that fill them.


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
    ours, paper = cell.result, cell.paper
    if ours is None or ours.mean is None or paper is None or paper.mean is None:
        return cell
    withheld = next(_reasons_to_withhold(ours), "")
    if withheld or ours.std is None or paper.std is None:
        return replace(cell, withheld=withheld)
    return replace(cell, difference=(ours.mean - paper.mean) / math.hypot(ours.std, paper.std))


def _reasons_to_withhold(result: Result) -> Iterator[str]:
    """Why a result may not be printed as a difference from the paper's value: test set, folds, task, training."""
    expected = PAPER_TEST.get(result.dataset)
    if result.kind == "kaggle":
        expected = result.n_test  # the leaderboards score all of their images
    elif result.test_set != "official":
        yield "the test set is a local one, not the paper's"
    if expected is None or not _COMPLETE * expected <= result.n_test <= expected / _COMPLETE:
        yield f"the test set is not the paper's: {result.n_test:,} images" + (f" of {expected:,}" if expected else "")
    scored = sum(fold.score is not None for fold in result.folds)
    if scored < PAPER_FOLDS:
        yield f"{scored} folds, the paper has {PAPER_FOLDS}"
    request = trained_by(result)
    if request is None:
        yield "how the submitted run was trained is not known"
        return
    rates, classes = rates_of(request), request.get("classes")
    apart = {
        "validated on as many images as train, the paper on whole folds": request.get("val", "full") != "full",
        "the folds do not differ": not result.std,
        f"it predicts the column {request.get('target')}, not the labels": request.get("target"),
        f"it distinguishes other classes: {class_words(classes or {})}": classes,
        "trained without the images that share a group with the test set, the paper with them": request.get(
            "exclude_test_overlap"
        ),
        "the learning rate was chosen on validation, the paper fixes it": len(rates) > 1,
        f"trained on {request.get('views')} cached views of each image, which the paper does not have": (
            "views" in request
        ),
    }
    yield from (reason for reason, applies in apart.items() if applies)
    usual, tuned = asdict(Schedule()), request.get("kind") == "finetune"
    trained = (usual if tuned else {}) | (request.get("schedule") or {}) | ({"lr": rates[0]} if rates else {})
    usual |= GENTLE if tuned and gentle(result.models) else {}
    for name, value in trained.items():
        if value != usual.get(name):
            yield f"trained with {name.replace('_', ' ')} {value:g}, the paper with {usual.get(name):g}"
    transforms = {recipe.get("transform", {}).get("kind", "paper") for recipe in result.recipes.values()} - {"paper"}
    if transforms:
        yield f"features of images under the transform {', '.join(sorted(transforms))}, not the paper's"
    precisions = {recipe.get("precision", "fp32") for recipe in result.recipes.values()} - {"fp32"}
    if precisions:
        yield f"computed in {', '.join(sorted(precisions))}, the paper in fp32"


def trained_by(result: Result) -> Mapping[str, Any] | None:
    """The request that trained a result's models; of a leaderboard's result that of the submitted run, or None."""
    if result.kind != "kaggle":
        return result.request
    of = result.request.get("of")
    return of if isinstance(of, Mapping) else None


def choose_best(cells: Sequence[Cell], by: str) -> Cell | None:
    """The cell with the highest test or validation score; the first of equals; None where none is scored."""
    scores = [(cell.result.mean if by == "test" else cell.result.val_mean, cell) for cell in cells if cell.result]
    return max(((value, cell) for value, cell in scores if value is not None), key=itemgetter(0), default=(0, None))[1]
