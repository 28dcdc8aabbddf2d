"""`Splits`: which rows train, validate and test; and the file that shares them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from embcache.data.groups import IntArray, overlap_notes
from embcache.errors import ProtocolError
from embcache.io import read_regular, write_output
from embcache.sealed import parse, typed

if TYPE_CHECKING:
    from embcache.data.dataset import ImageDataset

StrArray = NDArray[np.object_]
Key = tuple[int, str]  # (fold, subset)

FORMAT = "embcache-splits-1"


@dataclass(frozen=True, eq=False)
class Splits:
    """The rows that test, and for every fold and subset those that train and validate.

    All row numbers index ``ids``, ``labels`` and ``groups``, which hold every row of the dataset's table in its order.
    """

    dataset: str
    class_names: tuple[str, ...]
    ids: StrArray = field(repr=False)  # (N,)
    labels: IntArray = field(repr=False)  # (N,); −1 where unlabeled
    groups: StrArray = field(repr=False)  # (N,); the dataset's, merged where stored digests showed identical bytes
    test: IntArray = field(repr=False)  # rows of the test set, in the dataset's order
    test_set: str  # "official" or "local"
    train: Mapping[Key, IntArray] = field(repr=False)  # in drawing order: a smaller subset is a class-wise prefix
    val: Mapping[Key, IntArray] = field(repr=False)
    subsets: tuple[str, ...]  # "S", "M", "F" or a number of training images
    n_folds: int
    seed: int
    val_mode: str  # "full" or "matched"
    notes: tuple[str, ...] = ()  # what a reader of the results must know
    everything: frozenset[str] = frozenset()  # subsets that are F under another name: all that may train do

    @property
    def test_ids(self) -> tuple[str, ...]:
        """Ids of the test set."""
        return tuple(self.ids[self.test])

    @property
    def test_labeled(self) -> bool:
        """Whether test scores can be computed; False for predictions to submit."""
        return bool((self.labels[self.test] >= 0).any())

    def train_ids(self, fold: int, subset: str) -> tuple[str, ...]:
        """Ids that train in ``fold`` at ``subset``, in drawing order."""
        return tuple(self.ids[self.train[fold, subset]])

    def val_ids(self, fold: int, subset: str) -> tuple[str, ...]:
        """Ids that validate in ``fold`` at ``subset``."""
        return tuple(self.ids[self.val[fold, subset]])

    def used(self, subset: str) -> IntArray:
        """All rows that train, validate or test at ``subset``, ascending."""
        parts = [self.test, *(part[f, subset] for f in range(self.n_folds) for part in (self.train, self.val))]
        return np.unique(np.concatenate(parts))

    def digest(self, subset: str) -> str:
        """SHA-256 (hex) of the ids and labels that train, validate and test at ``subset``, and of the test groups."""
        rows = [self.test, *(np.sort(p[f, subset]) for f in range(self.n_folds) for p in (self.train, self.val))]
        content = [[[self.ids[i], int(self.labels[i])] for i in part] for part in rows]
        text = json.dumps([list(self.class_names), content, list(self.groups[self.test])], ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()

    def name_of(self, subset: str) -> str:
        """What `name_everything` calls a subset: F, where it is that."""
        return subset if subset in self.subsets else "F"

    def rename(self, names: Mapping[str, str]) -> Splits:
        """The same splits with subsets called by other names; two that get one name must be the same images."""
        train, val = ({(f, names.get(s, s)): rows for (f, s), rows in p.items()} for p in (self.train, self.val))
        subsets = tuple(dict.fromkeys(names.get(s, s) for s in self.subsets))
        return replace(self, train=train, val=val, subsets=subsets)

    def check(self) -> Splits:
        """Return these splits if no group is on two sides of any fold and every part can be used.

        Raises
        ------
        ProtocolError
            A group both trains and validates in a fold; an image of the test set, or a group of a local one, is in a
            fold; a part holds fewer than two classes.
        """
        if not len(self.test):
            raise ProtocolError(
                "the test set is empty", code="no-test-set", expected="one readable test image at least", found="none"
            )
        known = self.labels[self.test][self.labels[self.test] >= 0]
        if len(known) and len(np.unique(known)) < 2:
            local = "label images of the other classes: the local test set is a fifth of all"
            raise ProtocolError(
                "the labeled test images are all of one class", code="one-class", expected="two classes at least",
                found=f"{len(known)} of {self.class_names[known[0]]!r}",
                fix=local if self.test_set == "local" else "add test images of the other classes",
            )  # fmt: skip
        test_rows, test_groups = set(self.test.tolist()), set(self.groups[self.test])
        for (fold, subset), train in self.train.items():
            val = self.val[fold, subset]
            sides = {"training": train, "validation": val}
            shared = set(self.groups[train]) & set(self.groups[val])
            if shared:
                raise _divided_group("training and validation", fold, subset, shared)
            for side, rows in sides.items():
                if not test_rows.isdisjoint(rows.tolist()):
                    raise ProtocolError(
                        f"fold {fold}, subset {subset}: an image is in {side} and in the test set",
                        code="test-image-in-fold",
                    )
                if self.test_set != "official" and not test_groups.isdisjoint(self.groups[rows]):
                    raise _divided_group(f"{side} and test", fold, subset, test_groups & set(self.groups[rows]))
                if len(np.unique(self.labels[rows])) < 2:
                    raise ProtocolError(
                        f"fold {fold}, subset {subset}: {side} holds fewer than two classes", code="one-class",
                        found=f"{len(rows)} images of {len(np.unique(self.labels[rows]))} class",
                        fix=("fewer --folds", "a larger --subset", "label more images"),
                    )  # fmt: skip
        return self

    def to_json(self) -> dict[str, Any]:
        """Ids only, as plain data: the content of a splits file."""
        folds = []
        for fold in range(self.n_folds):
            train = {subset: list(self.train_ids(fold, subset)) for subset in self.subsets}
            val = {subset: list(self.val_ids(fold, subset)) for subset in self.subsets}
            shared = next(iter(val.values()))
            same = all(ids == shared for ids in val.values())
            folds.append({"train": train, "val": {"*": shared} if same else val})
        return {
            "format": FORMAT, "dataset": self.dataset, "class_names": list(self.class_names),
            "test_set": self.test_set, "seed": self.seed, "val_mode": self.val_mode, "subsets": list(self.subsets),
            "notes": list(self.notes), "test": list(self.test_ids), "folds": folds,
        }  # fmt: skip


def name_everything(plans: Sequence[Splits]) -> tuple[Splits, ...]:
    """Plans in which a subset that trains on everything, in all of them, is called F: one computation has one name."""
    names = {s: "F" for s in plans[0].subsets if all(s in plan.everything for plan in plans)}
    return tuple(plan.rename(names) for plan in plans)


def write_splits(splits: Splits, path: Path) -> None:
    """Write a splits file, whole or not at all."""
    write_output(path, json.dumps(splits.to_json(), indent=1, ensure_ascii=False) + "\n", parents=True)


class _Fold(TypedDict):
    train: Mapping[str, list[str]]
    val: Mapping[str, list[str]]


class _SplitsFile(TypedDict):
    """What a splits file holds; see `Splits.to_json`."""

    format: str
    dataset: str
    test_set: str
    notes: list[str]
    subsets: list[str]
    folds: list[_Fold]
    test: list[str]
    class_names: list[str]
    seed: int
    val_mode: str


def read_splits(
    path: Path,
    ds: ImageDataset,
    groups: StrArray,
    *,
    unreadable: Collection[str] = (),
    exclude_test_overlap: bool = False,
) -> Splits:
    """Read a splits file for a dataset and check it."""
    try:
        data = typed(_SplitsFile, parse(read_regular(path, follow=True)))
        if data["format"] != FORMAT or set(data) != set(_SplitsFile.__annotations__):
            raise ValueError(f"keys {sorted(data)}"[:300])
        subsets, folds, test = tuple(data["subsets"]), data["folds"], data["test"]
        class_names, seed, val_mode = tuple(data["class_names"]), data["seed"], data["val_mode"]
        if not subsets or len(folds) < 2 or any(set(fold["train"]) != set(subsets) for fold in folds):
            raise ValueError("every fold must list every subset, and there must be two folds at least")
        if any(set(fold["val"]) not in ({"*"}, set(subsets)) for fold in folds):
            raise ValueError("validation must be listed once ('*') or for every subset")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ProtocolError(
            "this is not a splits file", code="not-a-splits-file",
            expected=f"JSON written by embcache splits export (format {FORMAT!r})", found=str(reason), where=path,
            fix="embcache splits export --dataset NAME --output FILE",
        ) from error  # fmt: skip
    if class_names != tuple(ds.class_names):
        raise ProtocolError(
            "the splits file is for other classes", code="splits-of-other-classes", expected=", ".join(ds.class_names),
            found=", ".join(map(str, class_names)), where=path,
        )  # fmt: skip
    ids = np.array(ds.table["id"].tolist(), dtype=object)
    row_of = {name: row for row, name in enumerate(ids)}
    labels = ds.table["label"].to_numpy(dtype=np.int64)
    gone = set(unreadable)
    # the overlap is noted below, for what the file really uses
    notes = [f"splits read from {path.name}", *(note for note in ds.notes if note not in overlap_notes(ds.table))]

    def rows(names: Sequence[str], *, labeled: bool) -> IntArray:
        unknown = [name for name in names if name not in row_of]
        if unknown or len(set(names)) != len(names):
            what = f"{len(unknown)} images that {ds.name} has not" if unknown else "an image twice in one part"
            raise ProtocolError(
                f"the splits file names {what}", code="unknown-image" if unknown else "repeated-image",
                found=", ".join(map(repr, unknown[:5])) or None, where=path,
                fix=f"use the file with the dataset it was made for ({data['dataset']})",
            )  # fmt: skip
        found = np.array([row_of[name] for name in names if name not in gone], dtype=np.int64)
        if labeled and (labels[found] < 0).any():
            raise ProtocolError(
                "the splits file trains or validates on images without a label", code="unlabeled-image",
                found=", ".join(map(repr, ids[found[labels[found] < 0]][:5])), where=path,
            )  # fmt: skip
        return found

    test_rows = rows(test, labeled=False)
    given = ds.table["split"].to_numpy(dtype=object)
    official = bool(len(test_rows)) and bool((given[test_rows] == "test").all())
    excluded = np.zeros(len(ids), bool)
    if official and exclude_test_overlap:
        excluded = np.isin(groups, np.unique(groups[test_rows]))
    train: dict[Key, IntArray] = {}
    val: dict[Key, IntArray] = {}
    for number, fold in enumerate(folds):
        for subset in subsets:
            train[number, subset] = rows(fold["train"][subset], labeled=True)
            val[number, subset] = rows(fold["val"].get("*", fold["val"].get(subset, [])), labeled=True)
    if dropped := {int(row) for part in (*train.values(), *val.values()) for row in part[excluded[part]]}:
        notes.append(f"{len(dropped)} images of groups that the official test set shares left out of the folds")
        train, val = ({key: part[~excluded[part]] for key, part in parts.items()} for parts in (train, val))
    for number in range(len(folds)):
        notes += absent_note(ds.class_names, labels[val[number, subsets[0]]], f"validation of fold {number}")
    notes += absent_note(ds.class_names, labels[test_rows], "the test set") if (labels[test_rows] >= 0).any() else []
    named = {i for fold in folds for part in fold.values() for names in part.values() for i in names} | set(test)
    if gone & named:
        notes.append(f"{len(gone & named)} unreadable images of the splits file left out")
    everything = {
        subset
        for subset in (subsets if "F" in subsets else ())
        if all(set(p[f, subset].tolist()) == set(p[f, "F"].tolist()) for f in range(len(folds)) for p in (train, val))
    }
    return Splits(
        dataset=ds.name, class_names=class_names, ids=ids, labels=labels, groups=groups, test=test_rows,
        test_set="official" if official else "local", train=train, val=val, subsets=subsets, n_folds=len(folds),
        seed=seed, val_mode=val_mode, notes=tuple(dict.fromkeys(notes)), everything=frozenset(everything),
    ).check()  # fmt: skip


def _divided_group(sides: str, fold: int, subset: str, shared: Collection[str]) -> ProtocolError:
    names = sorted(shared)
    return ProtocolError(
        f"a group is on both sides of fold {fold}, subset {subset}: {sides}", code="group-spans-split",
        expected="every group (patient, slide, identical images) on one side",
        found=f"{len(names)} divided: {', '.join(map(repr, names[:5]))}{' …' if len(names) > 5 else ''}",
        fix="draw the splits again: embcache splits export",
    )  # fmt: skip


def absent_note(class_names: Sequence[str], labels: IntArray, where: str) -> list[str]:
    """One note where a class has no image among ``labels`` (−1 counts for none), else nothing."""
    counts = np.bincount(labels[labels >= 0], minlength=len(class_names))
    absent = [name for name, count in zip(class_names, counts, strict=True) if count == 0]
    return [f"{where} has no image of {', '.join(absent)}: scores there are over the other classes"] if absent else []
