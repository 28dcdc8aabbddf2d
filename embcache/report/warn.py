"""What a reader must be warned of, each fact once, and what may not be on a page: names of patients and images."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from embcache.data.classes import Column, column_values, columns
from embcache.data.dataset import ImageDataset
from embcache.data.groups import overlap_notes
from embcache.data.roles import may_name_people
from embcache.errors import EmbcacheError
from embcache.probe.summary import training_notes
from embcache.report.collect import Part
from embcache.store.feature_store import list_stores

IMBALANCE = 3.0
"""A class with so many times fewer images than the largest is told."""

HIDDEN = "a note that names patients or images is left out of this page; `embcache results` prints it"
_FILE = re.compile(r"\.(png|jpe?g|tiff?|webp|bmp|gif|jp2|dcm|dicom|h5|hdf5|csv|parquet)\b", re.IGNORECASE)
_MOST = 50  # quarantined images that are listed
_ELSEWHERE = re.compile(r"unreadable images |\d training images? (of .* left out|share .* with the official test set)")
_FOLD = re.compile(r"\bfold (\d+)\b")


@dataclass(frozen=True)
class Quarantine:
    """Images that some stores could not read."""

    backbones: tuple[str, ...]  # whose stores could not read just these
    rows: int
    bad: int
    reasons: tuple[tuple[str, int], ...]  # why, the commonest first
    images: tuple[tuple[str, str], ...]  # id and reason of the first fifty; empty where ids must not be told

    @property
    def words(self) -> str:
        """One line."""
        return f"{self.bad:,} of {self.rows + self.bad:,} images could not be read ({', '.join(self.backbones)})"


def quarantines(part: Part, *, ids: bool) -> tuple[list[Quarantine], list[str]]:
    """The quarantine of the stores of a dataset that have one, and what is wrong with stores that cannot be read."""
    found: dict[tuple[int, tuple[tuple[str, str], ...]], dict[str, None]] = {}
    problems = []
    try:
        stores = list_stores(part.home, part.name)
    except EmbcacheError as error:
        return [], [error.problem]
    for store in stores:
        shown = store if part.ds is None else store.restrict(part.ds.table["id"])
        try:
            bad, rows = shown.quarantined, len(shown)
        except EmbcacheError as error:
            problems.append(f"{store.recipe.backbone}: {error.problem}")
            continue
        if bad:
            found.setdefault((rows, tuple(sorted(bad.items()))), {})[store.recipe.backbone] = None
    listed = []
    for (rows, images), backbones in found.items():
        reasons = Counter(reason for _, reason in images).most_common() if ids else []
        listed.append(Quarantine(tuple(backbones), rows, len(images), tuple(reasons), images[:_MOST] if ids else ()))
    return listed, problems


def unequal_classes(part: Part) -> list[str]:
    """A line per split whose classes are of very unequal size."""
    if part.ds is None:
        return []
    told = []
    for split in ("train", "val", "test"):
        labels = part.ds.labels[part.ds.table["split"].to_numpy(dtype=object) == split]
        counts = dict(zip(part.ds.class_names, [int((labels == c).sum()) for c in range(len(part.ds.class_names))],
                          strict=True))  # fmt: skip
        most = max(counts.values(), default=0)
        few = [f"{name} ({n:,})" for name, n in counts.items() if IMBALANCE * n <= most]
        if most and few:
            largest = max(counts, key=lambda name: counts[name])
            told.append(f"the {split} images are of unequal classes: {', '.join(few)} against {largest} ({most:,})")
    return told


def notes_of(part: Part, ranked: Collection[str], *, ids: bool) -> list[str]:
    """The notes of a dataset and of its results, each once, folds of one fact together; none names a patient.

    What only one training did is told with its run, or where that is ``ranked`` (by its id), and how a subset was
    trained on with the heads. How many images could not be read or are of patients who are in the test set too is told
    elsewhere.
    """
    notes = dict[str, None]()
    if part.ds is not None:
        notes = dict.fromkeys(note for note in part.ds.notes if note not in overlap_notes(part.ds.table))
    heads: dict[str, dict[str, None]] = {}
    for result in part.results:
        own = training_notes(result)
        for note in result.notes:
            if note.startswith("subset "):
                heads.setdefault(note, {})[result.head] = None
            elif note not in own and not _ELSEWHERE.search(note):
                notes[note] = None
        if result.id not in ranked:
            notes |= dict.fromkeys(f"{result.id}: {note}" for note in own)
    notes |= dict.fromkeys(f"{note} ({', '.join(of)})" for note, of in heads.items())
    by_fact: dict[str, list[str]] = {}
    for note in without_names(list(notes), part, ids=ids):
        fold = _FOLD.search(note)
        fact = note if fold is None else _FOLD.sub("fold \0", note, count=1)
        by_fact.setdefault(fact, []).append("" if fold is None else fold[1])
    return [_folds_told(fact, folds) for fact, folds in by_fact.items()]


def _folds_told(fact: str, folds: Sequence[str]) -> str:
    if len(folds) > 1:
        fact = fact.replace("fold \0 predicts", "fold \0 predict").replace("fold \0", "folds \0")
    return fact.replace("\0", ", ".join(folds), 1)


def without_names(notes: Sequence[str], part: Part, *, ids: bool) -> list[str]:
    """Notes that name no patient, and without ``ids`` no image or file; the others are replaced by one that says so."""
    names = secret_words(part, ids=ids)
    # A name of several words is looked for as it is.
    long = [name for name in names if len(_words(name)) > 3]
    kept = [
        note
        for note in notes
        if (ids or (part.ds is not None and not _FILE.search(note)))  # without a table nobody knows what an id is
        and not names & _words(note)
        and not any(name in note for name in long)
    ]
    return kept + [HIDDEN] * (len(kept) < len(notes))


def secret_words(part: Part, *, ids: bool) -> set[str]:
    """What may not be on a page: groups, and without ``ids`` also ids, paths, names of files with and without suffix.

    Where every image is a group of its own, as ids tell it, a group's name is that of the image.
    """
    if part.ds is None:
        return set()
    table = part.ds.table
    images = {str(value) for name in ("id", "path") for value in table[name].tolist()}
    images |= {str(path) for path in part.ds.missing}
    groups = {str(value) for value in table["group"].tolist()}
    if ids:
        return {word for word in groups - images if word}
    images |= {name for path in list(images) for name in (PurePosixPath(path).name, PurePosixPath(path).stem)}
    return {word for word in images | groups if word}


def told_columns(ds: ImageDataset, secret: set[str]) -> list[Column]:
    """The columns of a dataset's own table that make groups of images and name no patient; see `hidden_columns`."""
    groups, told = ds.groups, []
    for name in columns(ds):
        if may_name_people(name):
            continue
        try:
            column = column_values(ds, name)
        except EmbcacheError:
            continue  # text with too many values, or without any
        members = [set(groups[column.of == value].tolist()) for value in column.values]
        names_patients = len(members) > 2 and all(len(of) == 1 for of in members)
        if not names_patients and not secret & set(column.values):
            told.append(column)
    return told


def hidden_columns(ds: ImageDataset) -> list[str]:
    """What a page says of columns that it leaves out by their names: one note, or none."""
    names = [name for name in columns(ds) if may_name_people(name)]
    return [f"columns left out, which may name patients: {', '.join(names)}"] if names else []


def _words(note: str) -> set[str]:
    """Every run of characters of a note that could be an id: split at spaces, quotes, commas and brackets."""
    parts = re.split(r"[\s'\"“”,;:()\[\]…]+", note)
    stripped = {part.strip(".") for part in parts}
    return {*parts, *stripped, *(piece for part in parts for piece in part.split("/")), note}
