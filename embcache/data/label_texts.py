"""Class names from the texts of labels: their order, their spellings, and what may not be what was meant."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from embcache.errors import DatasetError, UsageError, first_few
from embcache.targets.findings import SEPARATORS

_DECIMAL = re.compile(r"[+-]?[0-9]*[.,][0-9]+")
_MISSING_WORDS = {"nan", "na", "n/a", "null", "<na>"}


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
        numbers = len(class_names) > 5 and all(name.removeprefix("-").isdecimal() for name in class_names)
        raise DatasetError(
            f"unknown label in {len(unknown):,} rows", code="unknown-label",
            expected=" or ".join(class_names[:20]) + ", or empty for unlabeled", found=first_few(unknown), where=where,
            fix="--task number, for training need not have every number" if numbers else None,
        )  # fmt: skip
    return [number[label] for label in labels]


def label_notes(labels: Sequence[str], class_names: Sequence[str]) -> list[str]:
    """Notes on labels that may not be what was meant; see `unclear_labels`."""
    counts = Counter(filter(None, labels))
    notes = [
        f"class {name!r} ({counts[name]:,} images) reads like a missing value: leave such cells empty, or "
        f"embcache probe --drop-class {name}"
        for name in class_names
        if name.casefold() in _MISSING_WORDS
    ]
    return notes + [note for note, _ in unclear_labels(labels, class_names)]


def unclear_labels(labels: Sequence[str], class_names: Sequence[str]) -> list[tuple[str, str]]:
    """What labels may be instead of classes, in words, and the task: several findings, decimals, texts of one image."""
    counts, notes = Counter(filter(None, labels)), list[tuple[str, str]]()
    parts = Counter(part.strip() for name in class_names for s in SEPARATORS if s in name for part in name.split(s))
    several = {
        name: counts[name]
        for name in class_names
        for s in SEPARATORS
        if s in name
        and not _DECIMAL.fullmatch(name)
        and (s == "|" or any(p.strip() in counts or parts[p.strip()] > 1 for p in name.split(s)))
    }
    if several:
        note = f"{sum(several.values()):,} labels seem to hold several findings ({first_few(list(several), 2)}): each "
        note += "combination is one class; --task findings predicts each of them"
        notes.append((note, "findings"))
    decimals = [name for name in class_names if _DECIMAL.fullmatch(name)]
    if len(decimals) > max(2, len(class_names) // 2):
        note = f"labels are decimals ({first_few(decimals, 2)}), and each value is a class; --task number predicts them"
        note += ", once they are written with a point" if any("," in name for name in decimals) else ""
        notes.append((note, "number"))
    single = sum(n == 1 for n in counts.values())
    if single > max(10, len(counts) // 2) and not decimals:
        note = f"{single:,} of {len(counts):,} classes have one image: is this the column of the labels? "
        notes.append((note + "--label-column names another, --target another column to predict", ""))
    return notes


def same_but_for_case(
    labels: Sequence[str], merge: Sequence[str], *, where: object
) -> tuple[dict[str, str], tuple[str, ...], list[str]]:
    """Classes that differ only in letter case: merged where the user said so, else refused."""
    counts = Counter(filter(None, labels))
    merged, done, notes = dict[str, str](), list[str](), list[str]()
    for text in merge:
        ((name, members),) = merges_of([text], list(counts)).items()
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


def merges_of(texts: Iterable[str], known: Sequence[str]) -> dict[str, list[str]]:
    """Members of each class that ``a+b=c`` makes; `UsageError` where a text is malformed."""
    merge: dict[str, list[str]] = {}
    for text in texts:
        members, equals, name = (part.strip() for part in text.rpartition("="))
        if not (members and equals and name) or name in merge:
            raise UsageError(
                "--merge-class is malformed", code="merge-class", where="--merge-class", found=repr(text),
                expected="the classes with + between, = and their new name, which is given once",
                fix=merge_example(known),
            )  # fmt: skip
        merge[name] = names_in(members, "+", known)
    return merge


def names_in(text: str, separator: str, known: Sequence[str]) -> list[str]:
    """The names in a text; a class may have the separator in its own name."""
    parts, names = text.split(separator), list[str]()
    while parts:
        ends = [end for end in range(len(parts), 0, -1) if separator.join(parts[:end]).strip() in known]
        end = ends[0] if ends else 1
        names.append(separator.join(parts[:end]).strip())
        parts = parts[end:]
    return names


def merge_example(names: Iterable[str]) -> str:
    """A merge of two classes, as it is typed."""
    return "--merge-class " + shlex.quote("+".join(list(names)[:2]) + "=NEW")
