"""Reading label tables: CSV and Parquet files as text, and what their labels mean."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from embcache.data.checks import first_few
from embcache.errors import DatasetError


def read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV file (comma, or tab for ``.tsv``): every field as text, blank lines left out.

    UTF-8 with or without a byte order mark; any line ending.

    Raises
    ------
    DatasetError
        The file is empty or not UTF-8, or a row has not as many fields as the header.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(
            "a label file cannot be read", expected="comma-separated UTF-8 text", found=str(error), where=path
        ) from error
    lines = [line for line in lines if any(field.strip() for field in line)]
    if not lines:
        raise DatasetError("a label file is empty", expected="a header and one row an image", where=path)
    header = [name.strip() for name in lines[0]]
    if len(lines) > 1 and len(lines[1]) > len(
        header
    ):  # quoted names with commas in them: `OriginalImage[Width,Height]`
        header = [name.strip() for name in ",".join(lines[0]).split(",")]
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise DatasetError(
                f"row {number} of a label file has {len(line)} fields",
                expected=f"{len(header)}, as the header has",
                found=first_few([ascii(field)[:40] for field in line]),
                where=path,
            )
    return header, lines[1:]


def read_table(path: Path, required: Sequence[str]) -> pd.DataFrame:
    """A CSV, TSV or Parquet file as a table of stripped text, empty where there is no value.

    Raises
    ------
    DatasetError
        It cannot be read, repeats a column, or lacks a required one.
    """
    if path.suffix.lower() in (".parquet", ".pq"):
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise DatasetError("not a Parquet file", found=str(error).split("\n")[0], where=path) from error
        header = [str(c) for c in table.column_names]
        columns = [[as_text(v) for v in column.to_pylist()] for column in table.columns]
    else:
        header, rows = read_rows(path)
        columns = [[row[i].strip() for row in rows] for i in range(len(header))]
    if len(set(header)) < len(header):
        repeated = [c for i, c in enumerate(header) if c in header[:i]]
        raise DatasetError("a label file repeats a column", found=first_few(repeated), where=path)
    absent = [c for c in required if c not in header]
    if absent:
        raise DatasetError(
            f"a label file lacks the column {absent[0]!r}",
            expected=",".join(required),
            found=",".join(header),
            where=path,
            fix=_header_advice(header, required),
        )
    return pd.DataFrame(dict(zip(header, columns, strict=True)), columns=header)


def _header_advice(header: Sequence[str], required: Sequence[str]) -> str:
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        return "save the table with commas between the columns"
    lower = {name.lower(): name for name in header}
    renamed = [f"{lower[name]} to {name}" for name in required if name not in header and name in lower]
    return "rename the column " + ", ".join(renamed) if renamed else "name the columns in the first line"


def as_text(value: object) -> str:
    """A cell as text: empty for none and NaN, whole numbers without a decimal point."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()


def class_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Distinct labels as class names: by value when all are whole numbers, else alphabetically. Empty is no label."""
    names = {label for label in labels if label}
    if all(name.removeprefix("-").isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def label_numbers(labels: Sequence[str], class_names: Sequence[str], *, ids: Sequence[str], where: Path) -> list[int]:
    """Index of each label among ``class_names``; -1 where it is empty.

    Raises
    ------
    DatasetError
        A label is none of them; the message names the first five with their ids.
    """
    number = {name: c for c, name in enumerate(class_names)} | {"": -1}
    unknown = [f"{i}: {label!r}" for i, label in zip(ids, labels, strict=True) if label not in number]
    if unknown:
        raise DatasetError(
            f"unknown label in {len(unknown):,} rows",
            expected=" or ".join(class_names) + ", or empty for unlabelled",
            found=first_few(unknown),
            where=where,
        )
    return [number[label] for label in labels]
