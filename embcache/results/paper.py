"""The paper's numbers: Tables 1–4, B1–B8, C1–C4 and G1 as printed, with the slips flagged (``paper.json``)."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

PAPER_NAMES = {
    "random": "Random", "supervised": "Supervised ImageNet", "swav": "SwAV", "simclr": "SimCLR", "dino": "DINO",
    "dvme": "DVME", "dvme-noattn": "DVME w/o self-attention",
}  # fmt: skip
"""What the paper calls its backbones, which it probes with ``linear``, and its fusing heads."""


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
    caption: str
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
        tables[name] = PaperTable(name, table["caption"], table["kind"], tuple(table["flags"]), found)
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
