"""Columns of a dataset's table as groups of images: text as it is, ages in bands, other numbers in quarters."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from embcache.data.groups import may_name_people
from embcache.data.label_texts import class_order
from embcache.data.tables import COLUMNS, as_text, match_column
from embcache.errors import DatasetError, first_few
from embcache.targets.number import MAX_AGE, as_number, is_age

if TYPE_CHECKING:
    from embcache.data.dataset import ImageDataset

MAX_VALUES = 20
"""A column of text with more distinct values names things (a file, a patient) rather than groups of images."""

FEW_NUMBERS = 5
"""A column of numbers with so many distinct values or fewer is taken value by value."""

AGE_BANDS = ((18.0, "<18"), (40.0, "18-39"), (60.0, "40-59"), (80.0, "60-79"), (math.inf, "80+"))

NO_VALUE = {"", "nan", "none", "null", "na", "n/a"}


# Other columns: subgroups of images, or the labels. A view position that frozen features predict with an AUC of 0.99 is
# a shortcut; a score that falls by thirty points in one age band is a finding too.


@dataclass(frozen=True)
class Column:
    """A column as groups of images."""

    name: str
    values: tuple[str, ...]
    of: NDArray[np.object_]  # (n,); value of each image; ``""`` where it has none
    notes: tuple[str, ...] = ()  # how the values were made


def columns(ds: ImageDataset) -> tuple[str, ...]:
    """Names of the dataset's own columns: those beside id, path, place, label, group and split."""
    return tuple(str(name) for name in ds.table.columns if name not in COLUMNS)


def column_values(ds: ImageDataset, column: str, missing: Collection[str] = NO_VALUE) -> Column:
    """The values of a column: text as it is, ages in bands, other numbers in quartiles; ``missing`` ones are none."""
    own = columns(ds)
    add = None if own else "add columns to the table of your images (docs/results.md), or use another dataset"
    name = match_column(column, own, ds.name, fix=add)
    texts = column_texts(ds, name, missing)
    known = set(texts) - {""}
    # A number that names a patient (3459) is not more than another.
    numbers = None if re.search(r"(^|[^a-z])id$", name.lower()) else numbers_of(texts)
    if numbers is not None and is_age(name):
        return _ages(name, numbers)
    if numbers is not None and len(known) > FEW_NUMBERS:
        return _quartiles(name, numbers, ds.table["split"].to_numpy(dtype=object) == "train")
    values = class_order(known)
    if len(values) > MAX_VALUES:
        raise DatasetError(
            f"column {name!r} of {ds.name} has too many values to make groups of images", code="column-values",
            expected=f"numbers, or at most {MAX_VALUES} distinct values",
            found=f"{len(values):,}" + ("" if may_name_people(name) else f" ({first_few(values, 3)})"),
            fix="another column: " + ", ".join(c for c in own if c != name),
        )  # fmt: skip
    return Column(name, values, np.array(texts, dtype=object))


def column_texts(ds: ImageDataset, name: str, missing: Collection[str]) -> list[str]:
    """The texts of a column, ``missing`` ones as ``""``; a `DatasetError` where there is no other."""
    texts = [as_text(value) for value in ds.table[name].tolist()]
    texts = ["" if text.lower() in missing else text for text in texts]
    if not any(texts):
        raise DatasetError(
            f"no image of {ds.name} has a value in column {name!r}", code="column-empty", where=ds.origin or ds.root
        )
    return texts


def numbers_of(texts: Sequence[str], *, infinite: bool = False) -> NDArray[np.float64] | None:
    """The texts as numbers, NaN where empty; None unless every one that is not empty is a (finite) number."""
    try:
        numbers = np.array([as_number(text) for text in texts], dtype=np.float64)
    except ValueError:
        return None
    return None if np.isinf(numbers).any() and not infinite else numbers


def _ages(name: str, ages: NDArray[np.float64]) -> Column:
    possible = (ages >= 0) & (ages <= MAX_AGE)
    of = np.full(len(ages), "", dtype=object)
    for upper, band in reversed(AGE_BANDS):
        of[possible & (ages < upper)] = band
    present = set(of.tolist())
    impossible = int((~np.isnan(ages) & ~possible).sum())
    notes = (f"{impossible:,} images have no {name}: theirs is below 0 or above {MAX_AGE:g}",) if impossible else ()
    return Column(name, tuple(band for _, band in AGE_BANDS if band in present), of, notes)


def _quartiles(name: str, numbers: NDArray[np.float64], training: NDArray[np.bool_]) -> Column:
    known = ~np.isnan(numbers)
    basis = numbers[known & training] if (known & training).any() else numbers[known]
    cuts = [float(cut) for cut in np.unique(np.quantile(basis, (0.25, 0.5, 0.75), method="lower")) if cut < basis.max()]
    names = [f"up to {cuts[0]:g}"] if cuts else ["any"]
    names += [f"over {low:g} to {high:g}" for low, high in itertools.pairwise(cuts)]
    names += [f"over {cuts[-1]:g}"] if cuts else []
    band = np.searchsorted(np.array(cuts), numbers, side="left")  # NaN sorts last, beyond the names
    of = np.array([names[b] if there else "" for b, there in zip(band, known, strict=True)], dtype=object)
    present = set(of.tolist())
    note = f"{name} is cut at quarters of the images with the split train: {', '.join(f'{cut:g}' for cut in cuts)}"
    return Column(name, tuple(n for n in names if n in present), of, (note,) if cuts else ())
