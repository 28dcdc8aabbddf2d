"""What every dataset's table must satisfy, whoever made it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import cast

import pandas as pd

from embcache.errors import DatasetError, first_few

COLUMNS = ("id", "path", "member", "label", "group", "split")
SPLITS = ("train", "val", "test")


def check_table(table: pd.DataFrame, class_names: Sequence[str], *, where: object) -> None:
    """Raise `DatasetError` unless ``table`` keeps the contract of `ImageDataset.table`."""
    absent = [c for c in COLUMNS if c not in table.columns]
    if absent:
        raise DatasetError(
            "the table lacks columns", expected=", ".join(COLUMNS), found=f"no {', '.join(absent)}", where=where
        )
    ids = check_strings(table["id"].tolist(), "id", where=where)
    check_strings(table["group"].tolist(), "group", where=where)
    check_unique(ids, where=where)
    check_paths(ids, "id", where=where)
    check_paths(check_strings(table["path"].tolist(), "path", where=where), "path", where=where)
    for column in ("member", "label"):
        if table[column].dtype != "int64":
            raise DatasetError(
                f"column {column!r} must be int64", found=str(table[column].dtype), where=where, expected="int64"
            )
    if len(set(class_names)) < len(class_names) or not all(class_names):
        raise DatasetError("class names must be distinct and not empty", found=", ".join(class_names), where=where)
    labels = table["label"].tolist()
    if labels and not -1 <= min(labels) <= max(labels) < len(class_names):
        wrong = [f"{i}: {y}" for i, y in zip(ids, labels, strict=True) if not -1 <= y < len(class_names)]
        raise DatasetError(
            f"unknown label in {len(wrong):,} rows",
            expected=f"0 to {len(class_names) - 1} ({', '.join(class_names)}), or -1 for unlabelled",
            found=first_few(wrong),
            where=where,
        )
    unknown = sorted(set(table["split"].tolist()) - set(SPLITS))
    if unknown:
        raise DatasetError("unknown split", expected=", ".join(SPLITS), found=first_few(unknown), where=where)


def check_strings(values: Sequence[object], column: str, *, where: object) -> list[str]:
    """``values`` as non-empty UTF-8 strings without NUL, else `DatasetError` naming the first that is not."""
    try:  # one look at all of them, for there may be a million
        whole = "".join(cast("Sequence[str]", values))
        if "" not in values and "\0" not in whole and _is_utf8(whole):
            return list(cast("Sequence[str]", values))
    except TypeError:  # one of them is no text
        pass
    bad = next(v for v in values if not isinstance(v, str) or not v or "\0" in v or not _is_utf8(v))
    if not isinstance(bad, str):
        problem = "is not text"
    elif not bad:
        problem = "is empty"
    else:
        problem = "holds a NUL character" if "\0" in bad else "is not UTF-8"
    raise DatasetError(f"the {column} of a row {problem}", found=ascii(bad), where=where, fix=f"mend that {column}")


def check_unique(ids: Sequence[str], *, where: object) -> None:
    """Raise `DatasetError` when an id occurs twice, with the count and the first five."""
    if len(set(ids)) < len(ids):
        repeated = [f"{i} ({n} times)" for i, n in Counter(ids).items() if n > 1]
        raise DatasetError(
            f"duplicate ids: {len(repeated):,} ids occur more than once",
            expected="one row an id",
            found=first_few(repeated),
            where=where,
            fix="remove the repeated rows, or give each row an id of its own",
        )


def check_paths(paths: Sequence[str], column: str, *, where: object) -> None:
    """Raise `DatasetError` unless all ``paths`` are relative and, as written, stay inside the root.

    Ids are held to the same: they may contain slashes, and what is named after them never lands elsewhere.
    """
    whole = "\n" + "\n".join(paths)  # one look at all of them, for there may be a million
    if not any(mark in whole for mark in ("..", "\n/", "\n\\", ":/", ":\\")):
        return
    for path in paths:
        if is_absolute(path):
            raise refuse_outside(path, column, where=where)
        if ".." in path and ".." in path.replace("\\", "/").split("/"):
            raise refuse_outside(path, column, where=where)


def is_absolute(path: str) -> bool:
    """Whether a path is absolute on any system."""
    return path.startswith(("/", "\\")) or path[1:3] in (":/", ":\\")


def check_file_id(image_id: str, *, where: object) -> None:
    """Raise `DatasetError` unless an id, which becomes a file's name, can name nothing but a file in its folder."""
    if not image_id or "\0" in image_id:
        check_strings([image_id], "id", where=where)
    if "/" in image_id or "\\" in image_id or image_id in (".", ".."):
        raise refuse_outside(image_id, "id", where=where)


def refuse_outside(path: str, column: str = "path", *, where: object) -> DatasetError:
    """The error for a path, or an id read as one, that leads out of the dataset's root."""
    if column == "id":
        return DatasetError(
            "an id leaves the dataset's root and is refused",
            expected="an id that, read as a path, is relative and stays inside the root",
            found=repr(path),
            where=where,
            fix="correct the id",
        )
    return DatasetError(
        "a path leaves the dataset's root, or could, and is refused",
        expected="a path relative to the root, not absolute and without .., to a file inside it (links followed)",
        found=repr(path),
        where=where,
        fix="write the path as seen from the root, or copy the file into it",
    )


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
