"""Classes left out of a dataset or merged: another question to the same images, groups and cached features."""

from __future__ import annotations

import difflib
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from embcache.data.checks import SPLITS
from embcache.data.groups import overlap_notes
from embcache.errors import DatasetError, UsageError

if TYPE_CHECKING:
    from embcache.data.dataset import ImageDataset


@dataclass(frozen=True)
class ClassOptions:
    """``--drop-class`` and ``--merge-class`` as they were typed: what they name, only a dataset tells."""

    drop: tuple[str, ...] = ()  # class names, or several with commas between
    merge: tuple[str, ...] = ()  # ``a+b=c``

    def of(self, ds: ImageDataset) -> ImageDataset:
        """The dataset with these classes; see `ImageDataset.with_classes`."""
        merge = [text for text in self.merge if text not in ds.columns.merge_class]  # the others were merged at loading
        if not (self.drop or merge):
            return ds
        dropped = [name for text in self.drop for name in _names(text, ",", ds.class_names)]
        return ds.with_classes(dropped, _merges(merge, ds.class_names))


def _merges(texts: Iterable[str], known: Sequence[str]) -> dict[str, list[str]]:
    """Members of each class that ``a+b=c`` makes; `UsageError` where a text is malformed."""
    merge: dict[str, list[str]] = {}
    for text in texts:
        members, equals, name = (part.strip() for part in text.rpartition("="))
        if not (members and equals and name) or name in merge:
            raise UsageError(
                "classes to merge are not given as they should be",
                expected="the classes with + between, = and their new name, which is given once",
                found=repr(text),
                where="--merge-class",
                fix=_example(known),
            )
        merge[name] = _names(members, "+", known)
    return merge


def same_but_for_case(
    labels: Sequence[str], merge: Sequence[str], *, where: object
) -> tuple[dict[str, str], tuple[str, ...], list[str]]:
    """Classes that differ only in letter case: merged where the user said so, else refused."""
    counts = Counter(label for label in labels if label)
    merged, done, notes = dict[str, str](), list[str](), list[str]()
    for text in merge:
        for name, members in _merges([text], list(counts)).items():
            if set(members) <= counts.keys() and len({member.casefold() for member in members}) == 1 < len(members):
                merged |= dict.fromkeys(members, name)
                done.append(text)
                notes.append(f"classes {', '.join(members)} are one class, {name}, as --merge-class says")
    alike: dict[str, list[str]] = {}
    for name in sorted(dict.fromkeys(merged.get(name, name) for name in counts)):
        alike.setdefault(name.casefold(), []).append(name)
    several = [names for names in alike.values() if len(names) > 1]
    if several:
        flags = [f"{'+'.join(names)}={max(names, key=lambda n: counts[n])}" for names in several]
        raise DatasetError(
            "classes differ only in letter case",
            expected="one spelling per class",
            found="; ".join(", ".join(f"{name} ({counts[name]:,})" for name in names) for names in several),
            where=where,
            fix=" ".join(f"--merge-class {shlex.quote(flag)}" for flag in flags),
        )
    return merged, tuple(done), notes


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
    """What each class that is dropped or merged is called afterwards, in the order of the classes; empty if dropped."""
    dropped = list(dict.fromkeys(drop))
    merged = {name: list(dict.fromkeys(members)) for name, members in merge.items()}
    named = [*dropped, *(member for members in merged.values() for member in members)]
    for name in named:
        if name not in ds.class_names:
            near = difflib.get_close_matches(name, ds.class_names, n=3, cutoff=0.5)
            raise UsageError(
                f"{ds.name} has no class {name!r}"
                + (f"; did you mean {' or '.join(map(repr, near))}?" if near else ""),
                expected=", ".join(ds.class_names),
            )
    twice = [name for name, count in Counter(named).items() if count > 1]
    if twice:
        raise UsageError(f"class {twice[0]!r} is named in two changes", expected="each class dropped or merged once")
    for name, members in merged.items():
        if len(members) < 2:
            raise UsageError(
                "a merge needs two classes or more",
                found=f"{' + '.join(members)} = {name}",
                fix=_example(dict.fromkeys((*members, *ds.class_names))),
            )
        if name in ds.class_names and name not in members:
            raise UsageError(
                f"{ds.name} already has a class {name!r}, which is not one of those to merge",
                expected="a new name, or that of one of " + ", ".join(members),
                found=f"{' + '.join(members)} = {name}",
                fix=f"another name, or merge {name!r} too",
            )
        if not name.strip():
            raise UsageError("a class needs a name", found=repr(name), fix=_example(members))
    new = {name: "" for name in dropped} | {m: name for name, members in merged.items() for m in members}
    left = {new.get(name, name) for name in ds.class_names} - {""}
    if len(left) < 2:
        raise UsageError(
            f"fewer than two classes of {ds.name} would be left",
            expected="two classes or more to tell apart",
            found=", ".join(left) or "none",
            fix="drop or merge fewer of " + ", ".join(ds.class_names),
        )
    return {name: new[name] for name in ds.class_names if name in new}


def renamed(ds: ImageDataset, names: Mapping[str, str]) -> ImageDataset:
    """The dataset with classes named as `new_names` says; those with an empty name are left out with their images."""
    if not names:
        return ds
    of = [names.get(name, name) for name in ds.class_names]
    class_names = tuple(dict.fromkeys(name for name in of if name))
    number = {name: c for c, name in enumerate(class_names)} | {"": -2}
    labels = np.array([*(number[name] for name in of), -1], dtype=np.int64)[ds.labels]  # unlabelled is −1, the last
    table = ds.table.assign(label=labels)[labels >= -1]
    notes = [note for note in ds.notes if note not in overlap_notes(ds.table)]
    notes += _notes(ds, of) + (overlap_notes(table) if len(notes) < len(ds.notes) else [])
    before = {**ds.renamed, **{name: name for name in ds.class_names if name not in ds.renamed.values()}}
    return replace(
        ds,
        class_names=class_names,
        metric="auc" if ds.metric == "macro_auc" and len(class_names) == 2 else ds.metric,
        table=table,
        leaderboard_alpha=None,
        notes=tuple(notes),
        renamed={old: names.get(name, name) for old, name in before.items() if old in ds.renamed or name in names},
        whole=ds.whole or ds,
    )


def change_notes(ds: ImageDataset) -> list[str]:
    """The notes that tell what sets a dataset apart from the one that was loaded: its target and its classes."""
    return [] if ds.whole is None else [note for note in ds.notes if note not in ds.whole.notes]


def _notes(ds: ImageDataset, of: Sequence[str]) -> list[str]:
    """What to say of classes that are now called ``of``: how many images that is, by split."""
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


def class_words(names: Mapping[str, str]) -> str:
    """Changes of classes, as `ImageDataset.renamed` has them, in words: ``a + b = c, without d``; empty without any."""
    merged, dropped = _by_new_name(names)
    told = [f"{' + '.join(members)} = {name}" for name, members in merged.items()]
    return ", ".join([*told, *([f"without {', '.join(dropped)}"] if dropped else [])])


def target_words(request: Mapping[str, Any]) -> str:
    """What a run of this request tells apart, in words; empty where it is the dataset's labels as they are."""
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
