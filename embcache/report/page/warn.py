"""What a reader must be warned of: images that could not be read, classes of few images, notes of the results."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from embcache.errors import EmbcacheError
from embcache.probe.statistics import FEWEST_GROUPS
from embcache.report.page.collect import Part
from embcache.store.feature_store import list_stores

IMBALANCE = 3.0
"""A class with so many times fewer images than the largest is told."""

HIDDEN = "a note that names images is left out of this page; `embcache results` prints it"
_FILE = re.compile(r"\.(png|jpe?g|tiff?|webp|bmp|gif|jp2|dcm|dicom|h5|hdf5|csv|parquet)\b", re.IGNORECASE)
_MOST = 50  # quarantined images that are listed


@dataclass(frozen=True)
class Quarantine:
    """Images that one store could not read.

    Attributes
    ----------
    backbone, fingerprint : str
    rows, bad : int
        Images with features, and those without.
    reasons : tuple of (str, int)
        Why, the commonest first.
    images : tuple of (str, str)
        Id and reason of the first fifty; empty where ids must not be told.
    """

    backbone: str
    fingerprint: str
    rows: int
    bad: int
    reasons: tuple[tuple[str, int], ...]
    images: tuple[tuple[str, str], ...]


def quarantines(part: Part, *, ids: bool) -> tuple[list[Quarantine], list[str]]:
    """The quarantine of every store of a dataset, and what is wrong with stores that cannot be read."""
    found, problems = [], []
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
        reasons = Counter(bad.values()).most_common()
        images = tuple(sorted(bad.items())[:_MOST]) if ids else ()
        found.append(
            Quarantine(
                store.recipe.backbone,
                store.recipe.fingerprint[:12],
                rows,
                len(bad),
                tuple(reasons) if ids else (),
                images,
            )
        )
    return found, problems


def balance(part: Part) -> tuple[list[tuple[str, list[int], int]], list[str]]:
    """Images of every class, and warnings of classes that are few.

    Returns
    -------
    rows : list of (str, list of int, int)
        Class, images by split (train, val, test), and groups over all splits.
    warnings : list of str
    """
    if part.ds is None:
        return [], []
    table, names = part.ds.table, part.ds.class_names
    rows, warnings = [], []
    for c, name in enumerate(names):
        own = table[table["label"] == c]
        rows.append((name, [int((own["split"] == s).sum()) for s in ("train", "val", "test")], own["group"].nunique()))
    if (table["label"] < 0).any():
        own = table[table["label"] < 0]
        rows.append(
            ("no label", [int((own["split"] == s).sum()) for s in ("train", "val", "test")], own["group"].nunique())
        )
    for place, split in enumerate(("train", "val", "test")):
        counts = [counted[place] for _, counted, _ in rows[: len(names)]]
        if not any(counts):
            continue
        for name, count in zip(names, counts, strict=True):
            if count == 0:
                warnings.append(f"{split}: no image of class {name}")
            elif max(counts) >= IMBALANCE * count:
                warnings.append(
                    f"{split}: {max(counts) / count:.1f} times fewer images of class {name} ({count:,}) than of the "
                    f"largest class ({max(counts):,})"
                )
    for name, _, groups in rows[: len(names)]:
        if 0 < groups < FEWEST_GROUPS:
            warnings.append(f"only {groups} groups of class {name}: any interval of its scores says little")
    return rows, warnings


def notes_of(part: Part, *, ids: bool) -> list[str]:
    """The notes of a dataset and of its results, each once; without ids those that name an image are left out."""
    notes = list(part.ds.notes) if part.ds is not None else []
    notes += [note for result in part.results for note in result.notes]
    notes = list(dict.fromkeys(notes))
    return notes if ids else without_ids(notes, part)


def without_ids(notes: Sequence[str], part: Part) -> list[str]:
    """Notes in which no id, path or file name occurs; the others are replaced by one that says so."""
    names = secret_words(part)
    # An id of several words is looked for as it is.
    long = [name for name in names if len(_words(name)) > 3]
    kept = [
        note
        for note in notes
        if part.ds is not None  # else nobody knows what an id is
        and not names & _words(note)
        and not _FILE.search(note)
        and not any(name in note for name in long)
    ]
    return kept + [HIDDEN] * (len(kept) < len(notes))


def secret_words(part: Part) -> set[str]:
    """What names an image: ids, paths, names of files with and without suffix, and groups."""
    if part.ds is None:
        return set()
    table = part.ds.table
    own = {str(value) for name in ("id", "path", "group") for value in table[name].tolist()}
    own |= {str(path) for path in part.ds.missing}
    own |= {name for path in list(own) for name in (PurePosixPath(path).name, PurePosixPath(path).stem)}
    return {word for word in own if word}


def _words(note: str) -> set[str]:
    """Every run of characters of a note that could be an id: split at spaces, quotes, commas and brackets."""
    parts = re.split(r"[\s'\"“”,;:()\[\]…]+", note)
    stripped = {part.strip(".") for part in parts}
    return {*parts, *stripped, *(piece for part in parts for piece in part.split("/")), note}
