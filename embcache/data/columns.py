"""Columns of a dataset's own table: subgroups of images by them, and a column as the label to probe for.

A view position that frozen features tell at AUC 0.99 is a shortcut worth knowing; a score that falls by thirty points
in one age band is too. Both ask the same thing of a column: a short list of values, and which image has which.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embcache.data.checks import COLUMNS
from embcache.data.classes import class_words, renamed
from embcache.data.dataset import ImageDataset
from embcache.data.labels import as_text, class_order
from embcache.data.roles import may_name_people
from embcache.errors import DatasetError, UsageError, first_few

MAX_VALUES = 20
"""A column of text with more distinct values names things (a file, a patient) rather than groups of images."""

FEW_NUMBERS = 5
"""A column of numbers with so many distinct values or fewer is taken value by value."""

AGE_BANDS = ((18.0, "<18"), (40.0, "18-39"), (60.0, "40-59"), (80.0, "60-79"), (math.inf, "80+"))
MAX_AGE = 120.0
"""NIH lists ages up to 414: what no one reaches is no value."""

_NO_VALUE = {"", "nan", "none", "null", "na", "n/a"}


@dataclass(frozen=True)
class Column:
    """A column as groups of images."""

    name: str
    values: tuple[str, ...]
    of: NDArray[np.object_]  # (n,); value of each image; ``""`` where it has none
    notes: tuple[str, ...] = ()  # what a reader must know of how the values came to be


def columns(ds: ImageDataset) -> tuple[str, ...]:
    """Names of the source's own columns: those beside id, path, member, label, group and split."""
    return tuple(str(name) for name in ds.table.columns if name not in COLUMNS)


def column_values(ds: ImageDataset, column: str) -> Column:
    """The values of a column: text as it is, ages in bands, other numbers in quartiles."""
    name = _find(ds, column)
    texts = [as_text(value) for value in ds.table[name].tolist()]
    texts = ["" if text.lower() in _NO_VALUE else text for text in texts]
    known = [text for text in texts if text]
    if not known:
        raise DatasetError(f"no image of {ds.name} has a value in column {name!r}", where=ds.origin or ds.root)
    numbers = None if _is_identifier(name) else _numbers(texts)
    if numbers is not None and _is_age(name):
        return _ages(name, numbers)
    if numbers is not None and len(set(known)) > FEW_NUMBERS:
        return _quartiles(name, numbers, ds.table["split"].to_numpy(dtype=object) == "train")
    values = class_order(known)
    if len(values) > MAX_VALUES:
        raise DatasetError(
            f"column {name!r} of {ds.name} has too many values to make groups of images",
            expected=f"numbers, or at most {MAX_VALUES} distinct values",
            found=f"{len(values):,}" + ("" if may_name_people(name) else f" ({first_few(values, 3)})"),
            fix="another column: " + ", ".join(c for c in columns(ds) if c != name),
        )
    return Column(name, values, np.array(texts, dtype=object))


def retarget(ds: ImageDataset, column: str) -> ImageDataset:
    """The same images with the values of a column as their labels.

    Name, groups and splits stay, so that cached features and folds serve as they are; the metric is the AUC, or the
    macro AUC of more than two values. Images without a value are unlabelled, and so are those of the validation and
    test splits whose value no image for training has. There is no leaderboard for a column. A dataset that has this
    target is returned as it is.
    """
    found = column_values(ds, column)
    if found.name == ds.target:
        return ds
    if ds.renamed:
        raise UsageError(
            "classes were dropped or merged before the target was chosen",
            expected="the classes of the target",
            found=class_words(ds.renamed),
            fix=f"embcache.data.columns.retarget(dataset, {column!r}).with_classes(…)",
        )
    training = ds.table["split"].to_numpy(dtype=object) == "train"
    seen = set(found.of[training].tolist())
    names = tuple(value for value in found.values if value in seen)
    if len(names) < 2:
        raise DatasetError(
            f"column {found.name!r} of {ds.name} has one value only, so there is nothing to tell apart",
            expected="two values or more among the images for training",
            found=", ".join(names) or "none",
            fix="another column: " + ", ".join(c for c in columns(ds) if c != found.name),
        )
    number = {value: c for c, value in enumerate(names)}
    labels = np.array([number.get(value, -1) for value in found.of], dtype=np.int64)
    notes = [f"the labels are the column {found.name!r}, not those of the dataset", *found.notes]
    unknown = int((labels < 0).sum())
    if unknown:
        notes.append(f"{unknown:,} of {len(ds):,} images have no value of {found.name!r} that training has")
    return replace(
        ds,
        class_names=names,
        metric="auc" if len(names) == 2 else "macro_auc",
        table=ds.table.assign(label=labels),
        leaderboard_alpha=None,
        notes=(*ds.notes, *notes),
        target=found.name,
        whole=ds.whole or ds,
    )


def as_in_run(ds: ImageDataset, request: Mapping[str, Any]) -> ImageDataset:
    """The dataset with the labels of a run: its target column, its classes dropped or merged."""
    request = request.get("of", request)
    ds = retarget(ds, request["target"]) if request.get("target") else ds
    return renamed(ds, request.get("classes", {}))


def _find(ds: ImageDataset, column: str) -> str:
    known = columns(ds)
    plain = {_plain(name): name for name in known}
    if column in known:
        return column
    if _plain(column) in plain:
        return plain[_plain(column)]
    near = [plain[match] for match in difflib.get_close_matches(_plain(column), plain, n=3)]
    raise UsageError(
        f"{ds.name} has no column {column!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""),
        expected=", ".join(known) or "a dataset whose table has columns of its own, such as sex or age",
        fix=None if known else "add columns to the table of your images (docs/results.md), or use another dataset",
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _is_age(name: str) -> bool:
    return bool(re.search(r"(^|[^a-z])age([^a-z]|$)", name.lower()))


def _is_identifier(name: str) -> bool:
    return bool(re.search(r"(^|[^a-z])id$", name.lower()))  # patient 3459 is not more than patient 1820


def _numbers(texts: Sequence[str]) -> NDArray[np.float64] | None:
    """The texts as numbers, NaN where empty; None unless every one that is not empty is a finite number."""
    try:
        numbers = np.array([float(text) if text else math.nan for text in texts], dtype=np.float64)
    except ValueError:
        return None
    return None if np.isinf(numbers).any() else numbers


def _ages(name: str, ages: NDArray[np.float64]) -> Column:
    possible = (ages >= 0) & (ages <= MAX_AGE)
    of = np.full(len(ages), "", dtype=object)
    for upper, band in reversed(AGE_BANDS):
        of[possible & (ages < upper)] = band
    present = set(of.tolist())
    impossible = int((~np.isnan(ages) & ~possible).sum())
    notes = (f"{impossible:,} images whose {name} is below 0 or above {MAX_AGE:g} have none",) if impossible else ()
    return Column(name, tuple(band for _, band in AGE_BANDS if band in present), of, notes)


def _quartiles(name: str, numbers: NDArray[np.float64], training: NDArray[np.bool_]) -> Column:
    known = ~np.isnan(numbers)
    basis = numbers[known & training] if (known & training).any() else numbers[known]
    cuts = [float(cut) for cut in np.unique(np.quantile(basis, (0.25, 0.5, 0.75), method="lower")) if cut < basis.max()]
    names = [f"up to {cuts[0]:g}"] if cuts else ["any"]
    names += [f"over {low:g} to {high:g}" for low, high in itertools.pairwise(cuts)]
    names += [f"over {cuts[-1]:g}"] if cuts else []
    band = np.searchsorted(np.array(cuts), numbers, side="left")  # NaN sorts last; masked below
    of = np.array(
        [names[b] if there else "" for b, there in zip(np.minimum(band, len(cuts)), known, strict=True)], dtype=object
    )
    present = set(of.tolist())
    note = f"{name} is cut at quarters of the images whose split is train: {', '.join(f'{cut:g}' for cut in cuts)}"
    return Column(name, tuple(n for n in names if n in present), of, (note,) if cuts else ())
