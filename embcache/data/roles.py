"""Which column of a table is what: by the names that are usual in the field, or as the user says.

What was inferred is named in a note; two columns that could be meant are an error that lists them.
"""

from __future__ import annotations

import difflib
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from embcache.config import DatasetRef
from embcache.data.groups import known_groups, merge_groups, unfit_groups
from embcache.data.tables import ROLES, named_columns
from embcache.errors import DatasetError, UsageError

SPLIT_NAMES = {  # of folders and in a split column, compared in lower case
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip

_USUAL = {  # plain names, see `plain_name`; the role's own name comes before all others
    "path": {
        "imagepath", "imgpath", "filepath", "filename", "file", "image", "img", "imagename", "imgname", "imagefile",
        "imgfile", "imagefilename", "imagefilepath", "imageindex", "relativepath", "relpath", "fullpath", "pathtoimage",
        "dicompath", "dicomfile", "dicomfilename", "dcmpath", "dcmfile", "pngpath", "pngfile", "jpgpath", "jpegpath",
        "tiffpath", "tilepath", "patchpath", "imagefilepathrelative", "fname", "filelocation", "imagelocation",
    },
    "label": {
        "labels", "class", "classname", "classlabel", "target", "diagnosis", "dx", "category", "finding", "findings",
        "findinglabel", "findinglabels", "groundtruth", "gt", "outcome", "disease", "condition", "pathology", "grade",
        "y", "labelname", "imagelabel", "diagnosticlabel", "diagnosislabel", "targetlabel", "annotation",
    },
    "split": {"splits", "set", "partition", "subset", "phase", "usage", "datasplit", "dataset", "traintest", "fold"},
    "id": {"imageid", "imgid", "imageuid", "sopinstanceuid", "instanceuid"},
}  # fmt: skip
_KEY = "(?:id|ids|uid|instanceuid|key|code|hash|identifier|barcode|anon|pseudonym)?"
_GROUPS = tuple(  # coarse to fine: of columns that nest in each other both ways the first is taken
    re.compile(pattern)
    for pattern in (
        rf"(?:anon(?:ymi[sz]ed)?|pseudo(?:nymi[sz]ed)?|deid(?:entified)?|dicom)?(?:patient|patienten|paciente|subject|subj|"
        rf"participant|proband|person|individual|donor|animal|mouse|case|empi|mrn)(?:{_KEY}|number|num|no|nr|name|index)",
        r"(?:pat|pt|group)(?:id|uid|key|code)",
        rf"(?:study|exam|examination|accession|acc)(?:{_KEY}|number)",
        rf"(?:specimen|biopsy|block){_KEY}",
        rf"(?:slide|wsi|wholeslide|wholeslideimage|slidename){_KEY}",
        rf"(?:series|volume|scan|video|clip){_KEY}",
        r"(?:eye|breast|knee|lesion|nodule|polyp|cell)(?:id|uid|key)",
    )
)


_PLACEHOLDERS = frozenset(
    ("unknown", "unk", "not known", "anonymous", "anonymized", "missing", "-", "--", "?", "0", "-1", "x", "xxx")
)
_PEOPLE = re.compile(
    r"birth|dob$|mrn|accession|address|phone|email|ssn$|insurance|physician|doctor|operator|surname|^name$|"
    r"(?:patients?|subject|person|participant|first|last|middle|family|given|full|maiden)names?$"
)


def plain_name(name: str) -> str:
    """A column's name without letter case, spaces, underscores, hyphens and dots: what names are compared by."""
    return re.sub(r"[\s_\-.]+", "", unicodedata.normalize("NFC", name).casefold())


def may_hold_labels(header: Sequence[str], ref: DatasetRef) -> bool:
    """Whether a table with these columns could be one of paths and labels."""
    plain, named = {plain_name(name) for name in header}, named_columns(ref)
    return all(plain & ({plain_name(named[r])} if r in named else {r, *_USUAL[r]}) for r in ("path", "label"))


def find_columns(
    table: pd.DataFrame,
    ref: DatasetRef,
    *,
    where: Path,
    required: Sequence[str] = ("path", "label"),
    roles: Sequence[str] = ROLES,
) -> tuple[dict[str, str], list[str]]:
    """The column of each role but the group's, and a note that names those that are not called after it."""
    header = [str(name) for name in table.columns]
    found = {role: name for role in roles if (name := named_column(header, ref, role))}
    notes = []
    for role, usual in _USUAL.items():
        if role in found or role not in roles:
            continue
        free = [name for name in header if name not in found.values()]
        same = [name for name in free if plain_name(name) == role]
        choice = [role] if role in same else same or [name for name in free if plain_name(name) in usual]
        if role == "split" and not same:
            unfit = [name for name in choice if not _fits(role, table[name])]
            choice = [name for name in choice if name not in unfit]
            if unfit and not choice:
                notes.append(f"not taken for the split, as not all values are train, val or test: {', '.join(unfit)}")
        elif role == "id" and choice != [role]:
            choice = [name for name in choice if _fits(role, table[name])]
        if len(choice) > 1 and role == "id":
            choice = choice[:1]
        if len(choice) > 1:
            raise DatasetError(
                f"{len(choice)} columns could be the {role}", code="columns-ambiguous",
                expected=f"one column {role!r}, or the name of the one that is meant", found=", ".join(choice),
                where=where, fix=f"--{role}-column {shlex.quote(choice[0])}",
            )  # fmt: skip
        if choice:
            found[role] = choice[0]
    absent = [role for role in required if role not in found]
    if absent:
        flags = " ".join(f"--{role}-column NAME" for role in absent)
        raise DatasetError(
            f"a label file lacks the column {absent[0]!r}", code="column-missing",
            expected=", ".join(required) + ", or columns with usual names such as filename and diagnosis",
            found=", ".join(header), where=where,
            fix=f"{flags}, with NAME one of its columns" if len(header) > 1 else "name the columns in the first line",
        )  # fmt: skip
    named = named_columns(ref)
    guessed = [f"{role} is {name!r}" for role, name in found.items() if name != role and role not in named]
    note = f"columns of {where.name} by their names: {', '.join(guessed)}; --path-column and the like name others"
    return found, ([note] if guessed else []) + notes


def named_column(header: Sequence[str], ref: DatasetRef, role: str) -> str:
    """The column that the user named for a role, in the table's own spelling; empty where none was named."""
    name = named_columns(ref).get(role, "")
    if not name or name in header:
        return name
    alike = [column for column in header if plain_name(column) == plain_name(name)]
    if len(alike) == 1:
        return alike[0]
    near = difflib.get_close_matches(name, header, n=3)
    raise UsageError(
        f"the table has no column {name!r}" + (f"; did you mean {' or '.join(map(repr, near))}?" if near else ""),
        code="unknown-column", expected=", ".join(header), where=f"--{role}-column",
    )  # fmt: skip


def _fits(role: str, values: pd.Series[str]) -> bool:
    """Whether a column whose name is usual for a role, but not the role's own, has values for it."""
    if role == "split":
        return set(values.str.lower().unique()) <= {*SPLIT_NAMES, ""}
    # An id names each image; what could leave a folder is no name.
    return values.is_unique and not values.str.contains(r"^$|^[/\\]|\.\.|^.:").any()


def find_groups(
    table: pd.DataFrame, ref: DatasetRef, labels: Sequence[int], ids: Sequence[str], *, where: Path, refuse: bool = True
) -> tuple[list[str] | None, str, list[str]]:
    """Groups by a column of a table (the one named, ``group``, or one with a usual name), the column, and notes.

    Of several the coarsest counts, if the others nest in it. One that is constant, follows from the label or has
    few values is only taken if it is named.
    """
    header = [str(name) for name in table.columns]
    own = [name for name in header if plain_name(name) == "group"]
    column = named_column(header, ref, "group") or ("group" if "group" in own else own[0] if len(own) == 1 else "")
    if column:
        values = table[column].tolist()
        groups, notes = _as_groups(values, ids)
        named = (
            [f"groups are those of the column {column!r} ({len(set(groups)):,} groups)"] if column != "group" else []
        )
        return groups, column, [*named, *notes, *_lacking(values, groups)]
    ranks = {name: rank for name in header if (rank := _rank(name)) is not None}
    candidates = {name: known_groups(table[name].tolist()) for name in sorted(ranks, key=lambda name: ranks[name])}
    notes = []
    for name in list(candidates):
        if why := unfit_groups(candidates[name], labels):
            notes.append(f"column {name!r} is not taken for groups: {why}; --group-column {shlex.quote(name)} takes it")
            del candidates[name]
    if not candidates:
        return None, "", notes
    coarsest = [c for c in candidates if all(_nests(candidates[other], candidates[c]) for other in candidates)]
    if not coarsest:
        problem = f"{len(candidates)} columns could be the groups, and they do not nest in one of them"
        seen = ", ".join(f"{name} ({len(set(v) - {''}):,} values)" for name, v in candidates.items())
        if not refuse:
            return None, "", [*notes, f"no groups: {problem}: {seen}; --group-column NAME takes one"]
        raise DatasetError(
            problem, code="columns-ambiguous", found=seen, where=where,
            expected="a column 'group', or the name of the one whose images must stay together",
            fix=f"--group-column {shlex.quote(next(iter(candidates)))}",
        )  # fmt: skip
    column = coarsest[0]
    groups, more = _as_groups(table[column].tolist(), ids)
    for other in candidates:  # an image that lacks its patient may still have its study
        groups = merge_groups(groups, candidates[other]) if "" in candidates[column] and other != column else groups
    over = ", ".join(repr(name) for name in candidates if name != column)
    note = f"groups are those of the column {column!r} ({len(set(groups)):,} groups)"
    note += (f", in which {over} nest" if over else "") + "; --group-column names another"
    return groups, column, [note, *more, *_lacking(candidates[column], groups, over), *notes]


def _as_groups(values: Sequence[str], ids: Sequence[str]) -> tuple[list[str], list[str]]:
    known = known_groups(values)
    # A row without a group is a group of its own, whatever other groups are called.
    taken = set(known)
    groups = [g or (i if i not in taken else f"{i} (no group)") for g, i in zip(known, ids, strict=True)]
    several = len({value for value, group in zip(values, known, strict=True) if group}) - len(taken - {""})
    # Notes count such groups without names: these may name patients, and notes are printed in reports.
    differ = f"{several:,} names of groups differ from others only in Unicode form, spaces or invisible characters"
    notes = [f"{differ}: they are one group"] if several else []
    size = Counter(groups)
    spellings = Counter(name.casefold() for name in size)
    alike = sum(n for n in spellings.values() if n > 1)
    notes += [f"{alike:,} groups differ from another only in letter case: each is a group of its own"] if alike else []
    return groups, notes + [
        f"{size[name]:,} images are one group called {name!r}: if that stands for not known, leave such cells empty"
        for name in sorted(size)
        if name.casefold() in _PLACEHOLDERS and size[name] > 1
    ]


def may_name_people(column: str) -> bool:
    """Whether a column's name suggests that its values identify patients or other people, or are dates of birth."""
    return _rank(column) is not None or _PEOPLE.search(plain_name(column)) is not None


def _lacking(values: Sequence[str], groups: Sequence[str], over: str = "") -> list[str]:
    """Notes on rows without a value: groups of their own, or those that the columns ``over`` put into one."""
    size = Counter(groups)
    lacking = [size[group] for value, group in zip(known_groups(values), groups, strict=True) if not value]
    alone, total = lacking.count(1), len(groups)
    notes = [f"{alone:,} of {total:,} images have no group: each is a group of its own"] if alone else []
    joined = f"{len(lacking) - alone:,} of {total:,} images lack it: they are in the group that {over} gives"
    return notes + ([joined] if over and len(lacking) > alone else [])


def _rank(name: str) -> int | None:
    plain = plain_name(name)
    return next((rank for rank, pattern in enumerate(_GROUPS) if pattern.fullmatch(plain)), None)


def _nests(fine: Sequence[str], coarse: Sequence[str]) -> bool:
    """Whether every value of ``fine`` lies in one value of ``coarse``, where both are known."""
    pairs = {(f, c) for f, c in zip(fine, coarse, strict=True) if f and c}
    return len(pairs) == len({f for f, _ in pairs})
