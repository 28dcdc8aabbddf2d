"""The tables that need no training: image counts (Table 1) and numbers of parameters (Table G1)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from embcache.backbones.catalog import find_backbone
from embcache.data.dataset import ImageDataset, find_dataset
from embcache.errors import EmbcacheError, UsageError
from embcache.probe.heads import make_head
from embcache.probe.inputs import PAPER_SET
from embcache.probe.protocol import plan_splits
from embcache.results.layout import Marks, Table
from embcache.results.paper import find_value
from embcache.study.definitions import COUNTS, DATASETS
from embcache.study.settings import Settings, in_a_line

_COLUMNS = ("S", "M", "F", "test")
CLASSES = 5
"""Of Table G1."""


def table1(datasets: Sequence[str], settings: Settings) -> Table:
    """Images of the subsets and of the test set, beside the paper's; by labels alone, nothing is extracted."""
    names = tuple(datasets) or DATASETS
    if len(names) > 1 and (settings.data_root is not None or settings.dataset_name is not None):
        raise UsageError("--data-root and --name are for one dataset", found=", ".join(names), fix="--dataset NAME")
    marks = Marks()
    rows: list[tuple[str, ...]] = []
    records = []
    for name in names:
        counts: dict[str, int] = {}
        reason = ""
        try:
            ds, _ = find_dataset(
                name, root=settings.data_root, home=settings.home, allow_missing=settings.allow_missing,
                dataset_name=settings.dataset_name, columns=settings.columns,
            )  # fmt: skip
            counts, remark = count_images(settings.classes.of(ds), settings)
        except EmbcacheError as error:
            if isinstance(error, UsageError):
                raise
            reason = remark = in_a_line(error)
        ours = [f"{counts[c]:,}" if c in counts else "—" for c in _COLUMNS]
        rows.append((name, f"ours{marks.mark(remark)}", *ours))
        values = [find_value("table1", name, "", column) for column in _COLUMNS]
        if any(values):
            cells = [
                f"{v.count:,}{marks.mark(f'as printed in Table 1: {v.flag}' if v.flag else '')}"
                for v in values
                if v is not None and v.count is not None
            ]
            rows.append(("", "paper", *cells))
        for column, value in zip(_COLUMNS, values, strict=True):
            records.append(
                {
                    "dataset": name,
                    "column": column,
                    "images": counts.get(column),
                    "paper": value.count if value else None,
                    "paper_flag": value.flag or None if value else None,
                    "reason": reason or None,
                }
            )
    notes = [
        *marks.notes(),
        "S and M count training images of a fold; F counts the pool, as the paper does: a fold trains on "
        f"{settings.folds - 1} of {settings.folds} parts of it",
    ]
    return Table("table1", COUNTS["table1"], ("dataset", "", "S", "M", "F", "test"), tuple(rows), tuple(notes),
                 tuple(records))  # fmt: skip


def count_images(ds: ImageDataset, settings: Settings) -> tuple[dict[str, int], str]:
    """Images of S, M, F (the pool) and the test set, and what a reader must know of them."""
    plan = plan_splits(
        ds,
        subsets=("S", "M", "F"),
        folds=settings.folds,
        seed=settings.seed,
        test=settings.test,
        exclude_test_overlap=settings.exclude_test_overlap,
    )
    pool = len({row for fold in range(plan.n_folds) for row in plan.train[fold, "F"].tolist()})
    counts = {subset: round(sum(len(plan.train[f, subset]) for f in range(plan.n_folds)) / plan.n_folds)
              for subset in ("S", "M")}  # fmt: skip
    said = [f"{plan.test_set} test set", *(note for note in plan.notes if "fewer: all of them" in note)]
    said += [note for note in ds.notes if "missing" in note]
    return {**counts, "F": pool, "test": len(plan.test)}, "; ".join(dict.fromkeys(said))


def table_g1(backbones: Sequence[str]) -> Table:
    """Trainable parameters of a linear probe, of finetuning and of DVME, exactly, beside the paper's rounded ones."""
    cases: list[tuple[str, tuple[str, ...], str]]
    if backbones:
        cases = [(name, (name,), "linear") for name in backbones]
        if len(backbones) > 1:
            cases.append((f"DVME over {', '.join(backbones)}", tuple(backbones), "dvme"))
    else:
        cases = [("ResNet50", ("supervised",), "linear"), ("ViT", ("dino",), "linear"), ("DVME", PAPER_SET, "dvme")]
    marks = Marks()
    rows, records = [], []
    for label, names, head in cases:
        specs = {name: find_backbone(name) for name in names}
        own = make_head(head).count_parameters({name: spec.dim for name, spec in specs.items()}, CLASSES)
        whole = own + sum(spec.parameters for spec in specs.values())
        for setting, count in (("probe", own), ("finetune", whole)):
            value = find_value("G1", "", label, setting)
            printed, agrees = (value.printed, _agreement(count, value.printed)) if value else ("", "")
            flag = marks.mark(f"as printed in Table G1: {value.flag}" if value and value.flag else "")
            words = "linear evaluation" if setting == "probe" else "finetuning"
            rows.append((label if setting == "probe" else "", words, f"{count:,}", printed + flag, agrees))
            records.append(
                {"model": label, "backbones": "+".join(names), "head": head, "setting": setting, "parameters": count,
                 "paper": printed or None, "agrees": agrees or None}
            )  # fmt: skip
    headers = ("architecture", "evaluation", "ours", "paper", "agreement")
    notes = (*marks.notes(), f"with {CLASSES} classes")
    return Table("G1", COUNTS["G1"], headers, tuple(rows), notes, tuple(records))


def _agreement(count: int, printed: str) -> str:
    """Whether an exact count is what is printed: ``rounded``, ``truncated`` or ``differs``."""
    match = re.fullmatch(r"(\d+)\.(\d+) ([KM])", printed)
    if match is None:
        return ""
    digits = len(match[2])
    scaled = count / {"K": 1e3, "M": 1e6}[match[3]]
    wanted = float(f"{match[1]}.{match[2]}")
    if round(scaled, digits) == wanted:
        return "rounded"
    return "truncated" if int(scaled * 10**digits) / 10**digits == wanted else "differs"
