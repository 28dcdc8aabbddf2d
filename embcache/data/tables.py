"""Tables as text (CSV, Parquet, Excel), checks of their cells, and spellings of one text that mean the same."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from embcache.config import DatasetRef
from embcache.errors import DatasetError, first_few

COLUMNS = ("id", "path", "place", "label", "group", "split")
SPLITS = ("train", "val", "test")
ROLES = ("path", "label", "group", "split", "id")
"""Of a table's columns; `DatasetRef` names the column of each."""

_MARKS = (  # the longer first: one begins like another
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_JOINERS = "\u200c\u200d"  # invisible, and yet part of the spelling in some scripts
MOST_COLUMNS = 10_000
"""A table of more is a matrix of values, not a list of images."""


def named_columns(ref: DatasetRef) -> dict[str, str]:
    """The column of each role for which the user names one."""
    return {role: name for role in ROLES if (name := vars(ref)[f"{role}_column"])}


def open_table(path: Path, rows: int | None = None) -> tuple[pd.DataFrame, list[str]]:
    """A CSV, TSV, Parquet or Excel file as a table of stripped text, empty where there is no value; and notes.

    CSV may be separated by commas, semicolons, tabs or vertical bars (the one that divides the first lines alike),
    in UTF-8, or in UTF-16 or UTF-32 with a byte order mark, with any line ends. Of a workbook the first sheet counts.
    """
    notes: list[str] = []
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".pq"):
        try:
            table = pq.read_table(path) if rows is None else pq.ParquetFile(path).schema_arrow.empty_table()
        except (pa.ArrowException, OSError) as error:
            found = str(error).split("\n")[0]
            raise DatasetError("not a Parquet file", code="table-unreadable", found=found, where=path) from error
        header = [str(c) for c in table.column_names]
        columns = [[as_text(v) for v in column.to_pylist()] for column in table.columns]
    else:
        lines, notes = _sheet(path) if suffix == ".xlsx" else _lines(path, rows)
        header, body = _header_and_rows(lines, path)
        columns = [[row[i].strip() for row in body] for i in range(len(header))]
    if len(header) > MOST_COLUMNS:
        raise DatasetError(
            f"a label file has {len(header):,} columns", code="table-too-wide", expected=f"at most {MOST_COLUMNS:,}",
            where=path, fix="keep the columns of paths, labels and groups, and those that are predicted or compared",
        )  # fmt: skip
    if len(set(header)) < len(header):
        repeated = [c for i, c in enumerate(header) if c in header[:i]]
        raise DatasetError(
            "a label file repeats a column", code="column-repeated", found=first_few(repeated), where=path
        )
    return pd.DataFrame(dict(zip(header, columns, strict=True)), columns=header, dtype=str), notes


def read_table(path: Path, required: Sequence[str]) -> pd.DataFrame:
    """The table of a published layout, whose columns are called as they are published; see `open_table`."""
    table, _ = open_table(path)
    header = [str(name) for name in table.columns]
    absent = [name for name in required if name not in header]
    if absent:
        lower = {name.lower(): name for name in header}
        renamed = [f"{lower[name.lower()]} to {name}" for name in absent if name.lower() in lower]
        raise DatasetError(
            f"a label file lacks the column {absent[0]!r}", code="column-missing", expected=",".join(required),
            found=",".join(header), where=path,
            fix="rename the column " + ", ".join(renamed) if renamed else "name the columns in the first line",
        )  # fmt: skip
    return table


def _lines(path: Path, rows: int | None) -> tuple[list[list[str]], list[str]]:
    """Fields of every line of a CSV file that is not blank, and what had to be inferred."""
    text, encoding = _decoded(path, rows)
    preferred = "\t" if path.suffix.lower() == ".tsv" else ","
    delimiter = _delimiter(text, preferred)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=rows is None)
        lines = list(reader) if rows is None else list(itertools.islice(reader, rows))
    except csv.Error as error:
        raise DatasetError(
            "a label file cannot be read", code="table-unreadable", found=str(error), where=path,
            expected=f"columns separated by {_DELIMITERS[delimiter]}",
        ) from error  # fmt: skip
    told = [f"columns separated by {_DELIMITERS[delimiter]}"] if delimiter != preferred else []
    told += [encoding.upper()] if not encoding.startswith("utf-8") else []
    return lines, [f"{path.name} is read as {' in '.join(told)}"] if told else []


def _decoded(path: Path, rows: int | None) -> tuple[str, str]:
    with path.open("rb") as file:
        data = file.read() if rows is None else file.read(rows << 12)
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding, errors="strict" if rows is None else "ignore")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        found, guess = f"byte 0x{data[error.start]:02x} in line {line}, which is not {encoding.upper()}", "WINDOWS-1252"
    else:
        if "\0" not in text:
            return text, encoding
        found, guess = "NUL characters, as UTF-16 without a byte order mark has them", "UTF-16LE"
    # Which of the many one-byte encodings it is, the bytes do not say: a guess would alter names.
    raise DatasetError(
        "a label file cannot be read", code="table-encoding", found=found, where=path,
        expected="text in UTF-8, or in UTF-16 with a byte order mark",
        fix=f"iconv -f {guess} -t UTF-8 '{path.name}' > '{path.stem}-utf8{path.suffix}'   (with the encoding it was "
        "saved in), or save it as “CSV UTF-8”",
    )  # fmt: skip


def _delimiter(text: str, preferred: str) -> str:
    """What divides the first lines into most columns, all lines into equally many; else the usual one."""
    best, most = preferred, 1
    for delimiter in sorted(_DELIMITERS, key=lambda d: d != preferred):
        reader = csv.reader(io.StringIO(text[: 1 << 16], newline=""), delimiter=delimiter)
        try:
            first = [line for line in itertools.islice(reader, 20) if any(field.strip() for field in line)]
        except csv.Error:
            continue
        if len(text) > 1 << 16 and len(first) > 1 and reader.line_num < 20:
            first.pop()  # cut short
        counts = {len(line) for line in first}
        if len(counts) == 1 and (n := counts.pop()) > most:
            best, most = delimiter, n
    return best


def _sheet(path: Path) -> tuple[list[list[str]], list[str]]:
    """Cells of the first sheet of an Excel workbook as text, and a note where there are others."""
    try:
        with pd.ExcelFile(path, engine="openpyxl") as workbook:
            names = workbook.sheet_names
            sheet = pd.read_excel(workbook, sheet_name=names[0], header=None, dtype=object, keep_default_na=False)
    except ImportError as error:
        raise DatasetError(
            "Excel files need openpyxl, which is not installed", code="package-missing", where=path,
            fix='pip install "embcache[excel]", or save the table as CSV UTF-8',
        ) from error  # fmt: skip
    except PermissionError:
        raise
    except Exception as error:  # whatever openpyxl raises on broken files
        found = str(error).split("\n")[0]
        raise DatasetError("not an Excel workbook", code="table-unreadable", found=found, where=path) from error
    lines = [[as_text(cell) for cell in row] for row in sheet.itertuples(index=False, name=None)]
    width = max((k + 1 for line in lines[:1] for k, cell in enumerate(line) if cell), default=0)
    if any(cell for line in lines for cell in line[width:]):
        raise DatasetError(
            "a sheet has values beyond its header", code="table-ragged", expected="a name over each column", where=path
        )
    lines = [(line + [""] * width)[:width] for line in lines]
    note = f"of {len(names)} sheets of {path.name} the first is read, {names[0]!r}"
    return lines, [note] if len(names) > 1 else []


def _header_and_rows(lines: list[list[str]], path: Path) -> tuple[list[str], list[list[str]]]:
    lines = [line for line in lines if any(field.strip() for field in line)]
    if not lines:
        raise DatasetError(
            "a label file is empty", code="table-empty", expected="a header and one row per image", where=path
        )
    header = [name.strip() for name in lines[0]]
    if len(lines) > 1 and len(lines[1]) > len(header):
        # quoted names with commas in them: `OriginalImage[Width,Height]`
        header = [name.strip() for name in ",".join(lines[0]).split(",")]
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise DatasetError(
                f"row {number} of a label file has {len(line)} fields", code="table-ragged",
                expected=f"{len(header)}, as the header has", where=path,
                found=first_few([ascii(field)[:40] for field in line]),
            )  # fmt: skip
    return header, lines[1:]


def as_text(value: object) -> str:
    """A cell as text: empty for none and NaN, whole numbers without a decimal point."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()


@dataclass(frozen=True)
class Spellings:
    """Texts that mean the same, and the one that stands for them."""

    of: dict[str, str]  # what stands for each text that occurs
    counts: Counter[str]  # how often each text occurs

    def notes(self) -> list[str]:
        """What to say of texts of which several are one class, and of those that were read otherwise."""
        spelled: dict[str, list[str]] = {}
        for text, name in self.of.items():
            spelled.setdefault(name, []).append(text)
        notes = []
        for name, texts in spelled.items():
            if len(texts) > 1:
                ways = first_few([f"{t!a} ({self.counts[t]:,})" for t in sorted(texts)])
                notes.append(f"class {name!r} is written in {len(texts)} ways that are one: {ways}")
        alone = [t for texts in spelled.values() if len(texts) == 1 for t in texts]
        odd = [f"{t!a} as {self.of[t]!r}" for t in alone if unicodedata.normalize("NFC", t) != self.of[t]]
        return notes + ([f"{len(odd):,} class names are read otherwise: {first_few(odd, 3)}"] if odd else [])


def unify(texts: Iterable[str]) -> Spellings:
    """Find texts that differ only in Unicode form, spaces, invisible characters, or as numbers (``1`` and ``1.0``).

    What stands for them is in NFC, with single spaces and without invisible characters, and a whole number without a
    decimal point; ``01`` and letter case are kept apart.
    """
    counts = Counter(texts)
    whole = "\n".join(counts)  # one look at all of them, for there may be a million
    if whole.isascii() and whole.count("\n") < len(counts) and not any(mark in whole for mark in ("  ", "\t", ".0")):
        return Spellings({text: text for text in counts}, counts)
    clean = {text: _clean(text) for text in counts}
    together: dict[str, Counter[str]] = {}
    for text, name in clean.items():
        key = name if name.isascii() else name.translate(dict.fromkeys(map(ord, _JOINERS)))
        together.setdefault(key, Counter())[name] += counts[text]
        clean[text] = key
    shown = {key: min(names, key=lambda n: (-names[n], n)) for key, names in together.items()}
    return Spellings({text: shown[key] for text, key in clean.items()}, counts)


def _clean(text: str) -> str:
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
        text = "".join(c for c in text if c in _JOINERS or unicodedata.category(c) != "Cf")
    text = " ".join(text.split())
    return text.partition(".")[0] if re.fullmatch(r"[+-]?[0-9]+\.0+", text) else text


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
    raise DatasetError(
        f"the {column} of a row {problem}", code="cell-not-text", found=ascii(bad), where=where,
        fix=f"correct that {column}",
    )  # fmt: skip


def check_unique(ids: Sequence[str], *, where: object) -> None:
    """Raise `DatasetError` when an id occurs twice, with the count and the first five."""
    if len(set(ids)) < len(ids):
        repeated = [f"{i} ({n} times)" for i, n in Counter(ids).items() if n > 1]
        raise DatasetError(
            f"duplicate ids: {len(repeated):,} ids occur more than once", code="duplicate-ids",
            expected="one row per id", found=first_few(repeated), where=where,
            fix="remove the repeated rows, or give each row an id of its own",
        )  # fmt: skip


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
