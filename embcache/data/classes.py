"""What a dataset's labels are: classes from texts, classes left out or merged, and other columns in their place.

All of them are other questions to the same images, groups and cached features.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embcache.config import DatasetRef
from embcache.data.groups import may_name_people, overlap_notes
from embcache.data.tables import COLUMNS, SPLITS, as_text, match_column
from embcache.errors import DatasetError, UsageError, first_few

if TYPE_CHECKING:
    from embcache.data.dataset import ImageDataset

MAX_VALUES = 20
"""A column of text with more distinct values names things (a file, a patient) rather than groups of images."""

FEW_NUMBERS = 5
"""A column of numbers with so many distinct values or fewer is taken value by value."""

AGE_BANDS = ((18.0, "<18"), (40.0, "18-39"), (60.0, "40-59"), (80.0, "60-79"), (math.inf, "80+"))
MAX_AGE = 120.0
"""NIH lists ages up to 414: ages above any possible one are no value."""

_NO_VALUE = {"", "nan", "none", "null", "na", "n/a"}
_MISSING_WORDS = {"nan", "na", "n/a", "null", "<na>"}
_SEPARATORS = "|;,/+"


# Classes from texts


def class_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Distinct labels as class names: by value when all are whole numbers, else alphabetically. Empty is no label."""
    names = {label for label in labels if label}
    if all(name.removeprefix("-").isdecimal() and len(name) < 100 for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def label_numbers(labels: Sequence[str], class_names: Sequence[str], *, ids: Sequence[str], where: Path) -> list[int]:
    """Index of each label among ``class_names``; -1 where it is empty."""
    number = {name: c for c, name in enumerate(class_names)} | {"": -1}
    unknown = [f"{i}: {label!r}" for i, label in zip(ids, labels, strict=True) if label not in number]
    if unknown:
        raise DatasetError(
            f"unknown label in {len(unknown):,} rows", code="unknown-label",
            expected=" or ".join(class_names) + ", or empty for unlabeled", found=first_few(unknown), where=where,
        )  # fmt: skip
    return [number[label] for label in labels]


def label_notes(labels: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """Notes on labels that may not be what was meant: several in one, decimals, texts that occur once."""
    counts = Counter(filter(None, labels))
    notes = [
        f"class {name!r} ({counts[name]:,} images) reads like a missing value: leave such cells empty, or "
        f"embcache probe --drop-class {name}"
        for name in class_names
        if name.casefold() in _MISSING_WORDS
    ]
    parts = Counter(part.strip() for name in class_names for s in _SEPARATORS if s in name for part in name.split(s))
    several = {
        name: counts[name]
        for name in class_names
        for s in _SEPARATORS
        if s in name and (s == "|" or any(p.strip() in counts or parts[p.strip()] > 1 for p in name.split(s)))
    }
    if several:
        notes.append(
            f"{sum(several.values()):,} labels seem to hold several findings ({first_few(list(several), 2)}): each "
            "combination is one class; with one column per finding (yes, no), --target COLUMN predicts one finding"
        )
    decimals = [name for name in class_names if re.fullmatch(r"[+-]?[0-9]*[.,][0-9]+", name)]
    if len(decimals) > max(2, len(class_names) // 2):
        notes.append(
            f"labels are decimals ({first_few(decimals, 2)}), and each value is a class; in a column of its own, "
            "--target COLUMN cuts such numbers at their quarters"
        )
    single = sum(n == 1 for n in counts.values())
    if single > max(10, len(counts) // 2) and not decimals:
        notes.append(
            f"{single:,} of {len(counts):,} classes have one image: is this the column of the labels? "
            "--label-column names another, --target another column to predict"
        )
    return notes


def same_but_for_case(
    labels: Sequence[str], merge: Sequence[str], *, where: object
) -> tuple[dict[str, str], tuple[str, ...], list[str]]:
    """Classes that differ only in letter case: merged where the user said so, else refused."""
    counts = Counter(filter(None, labels))
    merged, done, notes = dict[str, str](), list[str](), list[str]()
    for text in merge:
        ((name, members),) = _merges([text], list(counts)).items()
        if set(members) <= counts.keys() and len({member.casefold() for member in members}) == 1 < len(members):
            merged |= dict.fromkeys(members, name)
            done.append(text)
            notes.append(f"classes {', '.join(members)} are one class, {name}, as --merge-class says")
    alike: dict[str, list[str]] = {}
    for name in sorted({merged.get(name, name) for name in counts}):
        alike.setdefault(name.casefold(), []).append(name)
    several = [names for names in alike.values() if len(names) > 1]
    if several:
        flags = [f"{'+'.join(names)}={max(names, key=lambda n: counts[n])}" for names in several]
        raise DatasetError(
            "classes differ only in letter case", code="classes-differ-in-case", expected="one spelling per class",
            found="; ".join(", ".join(f"{name} ({counts[name]:,})" for name in names) for names in several),
            where=where, fix=" ".join(f"--merge-class {shlex.quote(flag)}" for flag in flags),
        )  # fmt: skip
    return merged, tuple(done), notes


# Classes left out or merged


def with_ref(ds: ImageDataset, ref: DatasetRef) -> ImageDataset:
    """The dataset with the target and the classes of a reference; see `retarget` and `ImageDataset.with_classes`."""
    ds = retarget(ds, ref.target) if ref.target is not None else ds
    merge = [text for text in ref.merge_class if text not in ds.ref.merge_class]  # the others were merged at loading
    if not (ref.drop_class or merge):
        return ds
    dropped = [name for text in ref.drop_class for name in _names(text, ",", ds.class_names)]
    return ds.with_classes(dropped, _merges(merge, ds.class_names))


def _merges(texts: Iterable[str], known: Sequence[str]) -> dict[str, list[str]]:
    """Members of each class that ``a+b=c`` makes; `UsageError` where a text is malformed."""
    merge: dict[str, list[str]] = {}
    for text in texts:
        members, equals, name = (part.strip() for part in text.rpartition("="))
        if not (members and equals and name) or name in merge:
            raise UsageError(
                "--merge-class is malformed", code="merge-class", where="--merge-class", found=repr(text),
                expected="the classes with + between, = and their new name, which is given once", fix=_example(known),
            )  # fmt: skip
        merge[name] = _names(members, "+", known)
    return merge


def _names(text: str, separator: str, known: Sequence[str]) -> list[str]:
    """The names in a text; a class may have the separator in its own name."""
    parts, names = text.split(separator), list[str]()
    while parts:
        ends = [end for end in range(len(parts), 0, -1) if separator.join(parts[:end]).strip() in known]
        end = ends[0] if ends else 1
        names.append(separator.join(parts[:end]).strip())
        parts = parts[end:]
    return names


def _example(names: Iterable[str]) -> str:
    return "--merge-class " + shlex.quote("+".join(list(names)[:2]) + "=NEW")


def new_names(ds: ImageDataset, drop: Iterable[str], merge: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """New name of each class that is dropped (empty) or merged, in the order of the classes."""
    dropped = list(dict.fromkeys(drop))
    merged = {name: list(dict.fromkeys(members)) for name, members in merge.items()}
    named = [*dropped, *(member for members in merged.values() for member in members)]
    for name in (name for name in named if name not in ds.class_names):
        near = difflib.get_close_matches(name, ds.class_names, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise UsageError(
            f"{ds.name} has no class {name!r}{hint}", code="unknown-class", expected=", ".join(ds.class_names)
        )
    twice = [name for name, count in Counter(named).items() if count > 1]
    if twice:
        raise UsageError(
            f"class {twice[0]!r} is named in two changes", code="class-named-twice",
            expected="each class dropped or merged once",
        )  # fmt: skip
    for name, members in merged.items():
        found = f"{' + '.join(members)} = {name}"
        if len(members) < 2 or not name.strip():
            raise UsageError(
                "a merge needs two classes or more, and a name for them", code="merge-class", found=found,
                fix=_example(dict.fromkeys((*members, *ds.class_names))),
            )  # fmt: skip
        if name in ds.class_names and name not in members:
            raise UsageError(
                f"{ds.name} already has a class {name!r}, which is not one of those to merge", code="class-name-taken",
                expected="a new name, or that of one of " + ", ".join(members), found=found,
                fix=f"another name, or merge {name!r} too",
            )  # fmt: skip
    new = {name: "" for name in dropped} | {m: name for name, members in merged.items() for m in members}
    left = {new.get(name, name) for name in ds.class_names} - {""}
    if len(left) < 2:
        raise UsageError(
            f"fewer than two classes of {ds.name} would be left", code="too-few-classes",
            expected="two classes or more", found=", ".join(left) or "none",
            fix="drop or merge fewer of " + ", ".join(ds.class_names),
        )  # fmt: skip
    return {name: new[name] for name in ds.class_names if name in new}


def rename_classes(ds: ImageDataset, names: Mapping[str, str]) -> ImageDataset:
    """The dataset with classes named as `new_names` says; those with an empty name are left out with their images."""
    if not names:
        return ds
    of = [names.get(name, name) for name in ds.class_names]
    class_names = tuple(dict.fromkeys(name for name in of if name))
    number = {name: c for c, name in enumerate(class_names)} | {"": -2}
    labels = np.array([*(number[name] for name in of), -1], dtype=np.int64)[ds.labels]  # unlabeled is −1, the last
    table = ds.table.assign(label=labels)[labels >= -1]
    notes = [note for note in ds.notes if note not in overlap_notes(ds.table)]
    notes += _rename_notes(ds, of) + (overlap_notes(table) if len(notes) < len(ds.notes) else [])
    before = {**ds.renamed, **{name: name for name in ds.class_names if name not in ds.renamed.values()}}
    renamed = {old: names.get(name, name) for old, name in before.items() if old in ds.renamed or name in names}
    metric = "auc" if ds.metric == "macro_auc" and len(class_names) == 2 else ds.metric
    return replace(
        ds, class_names=class_names, metric=metric, table=table, leaderboard_alpha=None, notes=tuple(notes),
        renamed=renamed, whole=ds.whole or ds,
    )  # fmt: skip


def _rename_notes(ds: ImageDataset, of: Sequence[str]) -> list[str]:
    notes = []
    for new in dict.fromkeys(of):
        old = [c for c, name in enumerate(of) if name == new]
        if new and len(old) < 2:
            continue
        names = ", ".join(ds.class_names[c] for c in old)
        split = ds.table["split"][np.isin(ds.labels, old)]
        counts = ", ".join(f"{n:,} {name}" for name in SPLITS if (n := int((split == name).sum())))
        images = f"{len(split):,} images" + (f" ({counts})" if counts else "")
        several = f"classes {names} are" if len(old) > 1 else f"class {names} is"
        notes.append(f"{several} one class, {new}: {images}" if new else f"{several} left out: {images}")
    return notes


def change_notes(ds: ImageDataset) -> list[str]:
    """The notes on what sets a dataset apart from the one that was loaded: its target and its classes."""
    return [] if ds.whole is None else [note for note in ds.notes if note not in ds.whole.notes]


def class_words(names: Mapping[str, str]) -> str:
    """Changes of classes, as `ImageDataset.renamed` has them, in words: ``a + b = c, without d``; empty without any."""
    merged, dropped = _by_new_name(names)
    words = [f"{' + '.join(members)} = {name}" for name, members in merged.items()]
    return ", ".join([*words, *([f"without {', '.join(dropped)}"] if dropped else [])])


def target_words(request: Mapping[str, Any]) -> str:
    """What a run of this request predicts, in words; empty where it is the dataset's labels as they are."""
    return ", ".join(filter(None, [request.get("target", ""), class_words(request.get("classes", {}))]))


def class_flags(names: Mapping[str, str]) -> list[str]:
    """The words of a command that changes classes so, as `ImageDataset.renamed` has them."""
    merged, dropped = _by_new_name(names)
    words = [word for name in dropped for word in ("--drop-class", name)]
    return words + [w for name, members in merged.items() for w in ("--merge-class", f"{'+'.join(members)}={name}")]


def _by_new_name(names: Mapping[str, str]) -> tuple[dict[str, list[str]], list[str]]:
    members: dict[str, list[str]] = {}
    for old in sorted(names):
        members.setdefault(names[old], []).append(old)
    return members, members.pop("", [])


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


def column_values(ds: ImageDataset, column: str) -> Column:
    """The values of a column: text as it is, ages in bands, other numbers in quartiles."""
    own = columns(ds)
    add = None if own else "add columns to the table of your images (docs/results.md), or use another dataset"
    name = match_column(column, own, ds.name, fix=add)
    texts = [as_text(value) for value in ds.table[name].tolist()]
    texts = ["" if text.lower() in _NO_VALUE else text for text in texts]
    known = set(texts) - {""}
    if not known:
        raise DatasetError(
            f"no image of {ds.name} has a value in column {name!r}", code="column-empty", where=ds.origin or ds.root
        )
    # A number that names a patient (3459) is not more than another.
    numbers = None if re.search(r"(^|[^a-z])id$", name.lower()) else _numbers(texts)
    if numbers is not None and re.search(r"(^|[^a-z])age([^a-z]|$)", name.lower()):
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


def retarget(ds: ImageDataset, column: str) -> ImageDataset:
    """The same images with the values of a column as their labels.

    Name, groups and splits stay, so that cached features and folds can still be used; the metric is the AUC, or the
    macro AUC of more than two values. Images without a value are unlabeled, and so are those of the validation and
    test splits whose value no image for training has. There is no leaderboard for a column. A dataset that has this
    target is returned as it is.
    """
    found = column_values(ds, column)
    if found.name == ds.target:
        return ds
    if ds.renamed:
        raise UsageError(
            "classes were dropped or merged before the target was chosen", code="target-after-classes",
            expected="the classes of the target", found=class_words(ds.renamed),
            fix=f"embcache.data.classes.retarget(dataset, {column!r}).with_classes(…)",
        )  # fmt: skip
    seen = set(found.of[ds.table["split"].to_numpy(dtype=object) == "train"].tolist())
    names = tuple(value for value in found.values if value in seen)
    if len(names) < 2:
        raise DatasetError(
            f"column {found.name!r} of {ds.name} has one value only, so there is nothing to predict",
            code="too-few-classes", expected="two values or more among the images for training",
            found=", ".join(names) or "none",
            fix="another column: " + ", ".join(c for c in columns(ds) if c != found.name),
        )  # fmt: skip
    number = {value: c for c, value in enumerate(names)}
    labels = np.array([number.get(value, -1) for value in found.of], dtype=np.int64)
    notes = [f"the labels are the column {found.name!r}, not those of the dataset", *found.notes]
    unknown = int((labels < 0).sum())
    if unknown:
        notes.append(f"{unknown:,} of {len(ds):,} images have no value of {found.name!r} that training has")
    return replace(
        ds, class_names=names, metric="auc" if len(names) == 2 else "macro_auc", table=ds.table.assign(label=labels),
        leaderboard_alpha=None, notes=(*ds.notes, *notes), target=found.name, whole=ds.whole or ds,
    )  # fmt: skip


def as_in_run(ds: ImageDataset, request: Mapping[str, Any]) -> ImageDataset:
    """The dataset with the labels of a run: its target column, its classes dropped or merged."""
    request = request.get("of", request)
    ds = retarget(ds, request["target"]) if request.get("target") else ds
    return rename_classes(ds, request.get("classes", {}))


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
