"""The tables that need no training: image counts (Table 1) and numbers of parameters (Table G1)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from embcache.backbones.catalog import find_backbone
from embcache.config import DatasetRef, StudyConfig
from embcache.data.dataset import ImageDataset
from embcache.errors import EmbcacheError, UsageError
from embcache.paths import PathLike
from embcache.probe.heads import make_head
from embcache.probe.inputs import PAPER_SET
from embcache.probe.protocol import plan_splits
from embcache.results.layout import Marks, Table
from embcache.results.paper import find_value
from embcache.study.definitions import COUNTS, DATASETS
from embcache.study.study_plan import in_a_line, one_root, read_dataset

_COLUMNS = ("S", "M", "F", "test")
_CLASSES = 5  # of Table G1


def table1(config: StudyConfig, ref: DatasetRef, home: PathLike | None = None) -> Table:
    """Images of the subsets and of the test set, beside the paper's; by labels alone, nothing is extracted."""
    names = config.datasets or DATASETS
    one_root(names, ref)
    marks = Marks()
    rows: list[tuple[str, ...]] = []
    records = []
    for name in names:
        counts: dict[str, int] = {}
        reason = ""
        try:
            counts, remark = count_images(read_dataset(name, ref, home)[0], config)
        except UsageError:
            raise
        except EmbcacheError as error:
            reason = remark = in_a_line(error)
        ours = [f"{counts[c]:,}" if c in counts else "—" for c in _COLUMNS]
        rows.append((name, f"ours{marks.mark(remark)}", *ours))
        values = {column: find_value("table1", name, "", column) for column in _COLUMNS}
        if any(values.values()):
            theirs = [
                f"{v.count:,}{marks.mark(f'as printed in Table 1: {v.flag}' if v.flag else '')}"
                for v in values.values()
                if v is not None and v.count is not None
            ]
            rows.append(("", "paper", *theirs))
        records += [
            {
                "dataset": name, "column": column, "images": counts.get(column),
                "paper": value.count if value else None, "paper_flag": value.flag or None if value else None,
                "reason": reason or None,
            }
            for column, value in values.items()
        ]  # fmt: skip
    notes = (
        *marks.notes(),
        "S and M count training images of a fold; F counts the pool, as the paper does: a fold trains on "
        f"{config.folds - 1} of {config.folds} parts of it",
    )
    headers = ("dataset", "", *_COLUMNS)
    return Table("table1", COUNTS["table1"], headers, tuple(rows), notes, tuple(records))


def count_images(ds: ImageDataset, config: StudyConfig) -> tuple[dict[str, int], str]:
    """Images of S, M, F (the pool) and the test set, and what a reader must know of them."""
    plan = plan_splits(
        ds, subsets=("S", "M", "F"), folds=config.folds, seed=config.seed, test=config.test,
        exclude_test_overlap=config.exclude_test_overlap,
    )  # fmt: skip
    pool = len({row for fold in range(plan.n_folds) for row in plan.train[fold, "F"].tolist()})
    counts = {
        subset: round(sum(len(plan.train[f, subset]) for f in range(plan.n_folds)) / plan.n_folds)
        for subset in ("S", "M")
    }
    remarks = [f"{plan.test_set} test set", *(note for note in plan.notes if "fewer: all of them" in note)]
    remarks += [note for note in ds.notes if "missing" in note]
    return {**counts, "F": pool, "test": len(plan.test)}, "; ".join(dict.fromkeys(remarks))


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
        own = make_head(head).count_parameters({name: spec.dim for name, spec in specs.items()}, _CLASSES)
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
    notes = (*marks.notes(), f"with {_CLASSES} classes")
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
