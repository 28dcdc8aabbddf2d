"""Numbers as text, and cells laid out as a table with marks, notes and plain records."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from embcache.probe.metrics import metric_title
from embcache.results.grid import Cell, Grid
from embcache.results.paper import paper_tables

DIFFERENCE_NOTE = "difference: (ours − paper) / √(s₁² + s₂²), with s the standard deviations over folds"


@dataclass(frozen=True)
class Table:
    """A finished table."""

    name: str
    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]  # each as long as ``headers``
    notes: tuple[str, ...] = ()  # printed beneath, those with a mark in the table as ``[a] …``
    records: tuple[Mapping[str, Any], ...] = ()  # the same in plain data, one per cell, for CSV and JSON


@dataclass
class Marks:
    """Letters for remarks, each remark once."""

    letters: dict[str, str] = field(default_factory=dict)

    def mark(self, remark: str) -> str:
        """`` [a]`` for a remark, `` [b]`` for the next one; nothing for an empty one."""
        if not remark:
            return ""
        first, second = divmod(len(self.letters), 26)
        letter = ("" if not first else string.ascii_lowercase[first - 1]) + string.ascii_lowercase[second]
        return f" [{self.letters.setdefault(remark, letter)}]"

    def notes(self) -> list[str]:
        """The remarks in the order in which they were first marked."""
        return [f"[{letter}] {remark}" for remark, letter in self.letters.items()]


def lay_out(grid: Grid, cells: Sequence[Cell]) -> Table:
    """Arrange cells as the paper does: ours, the paper's value and the difference beneath each other."""
    at = {(cell.dataset, cell.model, cell.subset): cell for cell in cells}
    marks = Marks()
    rows: list[tuple[str, ...]] = []
    several = len(grid.datasets) > 1 or grid.across == "subsets"
    for dataset in grid.datasets:
        of_dataset = [cell for cell in cells if cell.dataset == dataset]
        name = [_dataset_words(dataset, of_dataset)] if several else []
        if grid.across == "models":
            for subset in grid.subsets:
                line = [at[dataset, model, subset] for model in grid.models]
                labels = _labels_used(line)
                rows += _block([*name, printed_subset(line[0]), labels], line, marks)
        else:
            lines = {model: [at[dataset, model, subset] for subset in grid.subsets] for model in grid.models}
            used = [_labels_used([at[dataset, model, subset] for model in grid.models]) for subset in grid.subsets]
            if any(used):
                rows.append((*name, "labels used", "", *used))
            for model, line in lines.items():
                rows += _block([*name, model.label], line, marks)
    headers = ["dataset"] if several else []
    if grid.across == "models":
        headers += ["samples", "labels used", "", *(model.label for model in grid.models)]
    else:
        headers += ["method", "", *grid.subsets]
    records = tuple(map(record, cells))
    return Table(grid.name, grid.title, tuple(headers), tuple(rows), tuple(_notes(grid, cells, marks)), records)


def _block(begin: Sequence[str], line: Sequence[Cell], marks: Marks) -> list[tuple[str, ...]]:
    """The rows of one line of cells: ours, and where the paper has values theirs and the difference."""
    blank = [""] * len(begin)
    block = [(*begin, "ours", *(_ours(cell, marks) for cell in line))]
    if any(cell.paper is not None for cell in line):
        block.append((*blank, "paper", *(_paper(cell, marks) for cell in line)))
    if any(cell.difference is not None or cell.withheld for cell in line):
        block.append((*blank, "difference", *(_difference(cell, marks) for cell in line)))
    return block


def _ours(cell: Cell, marks: Marks) -> str:
    if cell.result is None:
        return "—" + marks.mark(cell.reason)
    chosen = " + ".join(cell.result.backbones) + " " if cell.model.among else ""
    if cell.result.mean is None:
        return f"{chosen}not scored"
    kaggle = marks.mark("scored on the competition's leaderboards") if cell.result.kind == "kaggle" else ""
    return f"{chosen}{score(cell.result.mean, cell.result.std, 4)}{kaggle}"


def _paper(cell: Cell, marks: Marks) -> str:
    value = cell.paper
    if value is None or value.mean is None:
        return ""
    flag = marks.mark(f"as printed in {table_words(value.table)}: {value.flag}" if value.flag else "")
    return f"{score(value.mean, value.std, 4)}{flag}"


def _difference(cell: Cell, marks: Marks) -> str:
    if cell.difference is not None:
        return signed(cell.difference, 1, plus=True)
    return f"withheld{marks.mark(cell.withheld)}" if cell.withheld else ""


def signed(value: float, digits: int, *, plus: bool = False) -> str:
    """A number with a true minus sign, and optionally a plus."""
    text = f"{value:+.{digits}f}" if plus else f"{value:.{digits}f}"
    return text.replace("-", "−")


def score(mean: float, std: float | None, digits: int = 3) -> str:
    """``0.934 ± 0.012``, or without a deviation."""
    return signed(mean, digits) + ("" if std is None else f" ± {std:.{digits}f}")


def bounds(interval: tuple[float, float] | None, *, digits: int = 3, plus: bool = False, between: str = " to ") -> str:
    """``0.912 to 0.951``; nothing of no interval."""
    return between.join(signed(bound, digits, plus=plus) for bound in interval or ())


def table_words(name: str) -> str:
    """``Table 2`` for ``table2``, ``Table B3`` for ``B3``."""
    return f"Table {name.removeprefix('table')}"


def printed_subset(cell: Cell) -> str:
    """The subset as the paper prints it where it does, else its name."""
    if cell.paper is not None and cell.paper.printed:
        return cell.paper.printed
    if cell.subset.isdigit():
        return cell.subset
    if cell.subset == "F":
        return "Full"
    return f"{cell.result.n_train:,} ({cell.subset})" if cell.result is not None else cell.subset


def _labels_used(cells: Sequence[Cell]) -> str:
    """Training + validation labels per fold; every distinct pair where models differ."""
    pairs = dict.fromkeys((c.result.n_train, c.result.labels_used - c.result.n_train) for c in cells if c.result)
    return ", ".join(f"{train:,} + {validation:,}" for train, validation in pairs)


def _dataset_words(dataset: str, cells: Sequence[Cell]) -> str:
    metrics = dict.fromkeys(metric_title(c.result.metric) for c in cells if c.result)
    return f"{dataset} ({', '.join(metrics)})" if metrics else dataset


def _notes(grid: Grid, cells: Sequence[Cell], marks: Marks) -> list[str]:
    notes = marks.notes()
    results = [cell.result for cell in cells if cell.result is not None]
    if any(cell.difference is not None for cell in cells):
        notes.append(DIFFERENCE_NOTE)
    if results:
        metrics = dict.fromkeys(f"{r.dataset}: {metric_title(r.metric)}" for r in results)
        tests = dict.fromkeys(f"{r.dataset}: {r.test_set} test set of {r.n_test:,} images" for r in results)
        folds = dict.fromkeys(len(r.folds) for r in results)
        notes.append(f"mean ± sd over {' or '.join(map(str, folds))} folds; " + "; ".join([*metrics, *tests]))
        notes.append("labels used: training + validation images per fold")
    paper = paper_tables().get(grid.name)
    if paper is not None and any(cell.paper for cell in cells):
        notes += [f"slip in the paper: {flag}" for flag in paper.flags]
    several = len(grid.datasets) > 1
    return [*notes, *dict.fromkeys((f"{r.dataset}: " if several else "") + n for r in results for n in r.notes)]


def record(cell: Cell) -> dict[str, Any]:
    """A cell as plain data; None where a value is not known."""
    r, v = cell.result, cell.paper
    low, high = r.interval if r is not None and r.interval is not None else (None, None)
    found = r.estimate if r is not None else None
    these = (found.these_models if found is not None else None) or (None, None)
    return {
        "dataset": cell.dataset,
        "model": cell.model.label,
        "kind": r.kind if r else cell.model.kind,
        "head": r.head if r else cell.model.head,
        "backbones": "+".join(r.backbones if r else cell.model.backbones),
        "subset": cell.subset,
        "n_train": r.n_train if r else None,
        "n_val": r.n_val if r else None,
        "labels_used": r.labels_used if r else None,
        "n_test": r.n_test if r else None,
        "test_set": r.test_set if r else None,
        "folds": len(r.folds) if r else None,
        "metric": r.metric if r else None,
        "mean": r.mean if r else None,
        "std": r.std if r else None,
        "low": low,
        "high": high,
        "these_models_low": these[0],
        "these_models_high": these[1],
        "positive": found.positive or None if found is not None else None,
        "val_mean": r.val_mean if r else None,
        "paper_mean": v.mean if v else None,
        "paper_std": v.std if v else None,
        "paper_table": v.table if v else None,
        "paper_flag": v.flag or None if v else None,
        "difference": cell.difference,
        "withheld": cell.withheld or None,
        "reason": cell.reason or None,
        "run": r.id if r else None,
    }
