"""Tables as text (CSV, Parquet, Excel): their cells, spellings that mean the same, and which column is what.

Columns are found by the names that are usual in the field, or as the user says. What was inferred is named in a note;
two columns that could be meant are an error that lists them.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import itertools
import math
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import cast

import pandas as pd
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from embcache.config import DatasetRef
from embcache.data.published import ROLES, named_columns
from embcache.errors import DatasetError, UsageError, first_few

COLUMNS = ("id", "path", "place", "label", "group", "split")
SPLITS = ("train", "val", "test")
SPLIT_NAMES = {  # of folders and in a split column, compared in lower case
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
MOST_TABLE_ROWS = 5_000_000
"""Of a Parquet table that is held whole, which takes some 2 kB per row."""

MOST_COLUMNS = 10_000
"""A table of more is a matrix of values, not a list of images."""

_MARKS = (  # the longer first: one begins like another
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_JOINERS = "\u200c\u200d"  # invisible, and yet part of the spelling in some scripts
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


# Reading


def open_table(path: Path, rows: int | None = None) -> tuple[pd.DataFrame, list[str]]:
    """A CSV, TSV, Parquet or Excel file as a table of stripped text, empty where there is no value; and notes.

    CSV may be separated by commas, semicolons, tabs or vertical bars (the one that divides the first lines alike),
    in UTF-8, or in UTF-16 or UTF-32 with a byte order mark, with any line ends. Of a workbook the first sheet counts.
    """
    notes: list[str] = []
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".pq"):
        try:
            file = pq.ParquetFile(path)
            if rows is None and (n := file.metadata.num_rows) > MOST_TABLE_ROWS:
                raise DatasetError(
                    f"a table of {n:,} rows is too long to be held whole", code="table-too-long", where=path,
                    expected=f"at most {MOST_TABLE_ROWS:,} rows; `embcache extract` alone reads more, in partitions",
                    fix="a Parquet table of some of the rows, under the name that extraction shows: "
                    "--data-root TABLE --name NAME",
                )  # fmt: skip
            table = pq.read_table(path) if rows is None else file.schema_arrow.empty_table()
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, "not a Parquet file", error) from error
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
        repeated = first_few([c for i, c in enumerate(header) if c in header[:i]])
        raise DatasetError("a label file repeats a column", code="column-repeated", found=repeated, where=path)
    return pd.DataFrame(dict(zip(header, columns, strict=True)), columns=header, dtype=str), notes


def read_table(path: Path, required: Sequence[str]) -> pd.DataFrame:
    """The table of a published layout, whose columns are called as they are published; see `open_table`."""
    table, _ = open_table(path)
    absent = [name for name in required if name not in table.columns]
    if absent:
        lower = {str(name).lower(): name for name in table.columns}
        renamed = [f"{lower[name.lower()]} to {name}" for name in absent if name.lower() in lower]
        fix = "rename the column " + ", ".join(renamed) if renamed else "name the columns in the first line"
        raise lacks_column(path, absent, required, table, fix)
    return table


def read_large(path: Path, required: Sequence[str]) -> pd.DataFrame:
    """Only some columns, as text, of a large CSV file in UTF-8 that a program wrote, packed (``.csv.gz``) or not."""
    texts = pc.ConvertOptions(include_columns=[*required], column_types=dict.fromkeys(required, pa.string()))
    try:
        table: pd.DataFrame = pc.read_csv(path, convert_options=texts).to_pandas()
    except KeyError as error:
        header = pc.open_csv(path).schema.empty_table().to_pandas()
        absent = [name for name in required if name not in header.columns]
        raise lacks_column(path, absent, required, header, "get the file anew") from error
    except (pa.ArrowException, OSError) as error:
        expected = "columns separated by commas, in UTF-8"
        raise _unreadable(path, "a label file cannot be read", error, expected) from error
    return table


def as_numbers(table: pd.DataFrame, columns: Sequence[str], *, where: object) -> pd.DataFrame:
    """The table with columns of text as numbers, NaN where they are empty."""
    try:
        return table.assign(**{column: pd.to_numeric(table[column]) for column in columns})
    except ValueError as error:
        raise DatasetError("a number cannot be read", code="not-a-number", found=str(error), where=where) from error


def lacks_column(
    path: Path, absent: Sequence[str], required: Sequence[str], table: pd.DataFrame, fix: str
) -> DatasetError:
    """The error for a label file without some columns."""
    return DatasetError(
        f"a label file lacks the column {absent[0]!r}", code="column-missing", expected=", ".join(required),
        found=", ".join(map(str, table.columns)), where=path, fix=fix,
    )  # fmt: skip


def _unreadable(path: Path, problem: str, error: Exception, expected: str | None = None) -> DatasetError:
    found = str(error).split("\n")[0]
    return DatasetError(problem, code="table-unreadable", expected=expected, found=found, where=path)


def _lines(path: Path, rows: int | None) -> tuple[list[list[str]], list[str]]:
    text, encoding = _decoded(path, rows)
    preferred = "\t" if path.suffix.lower() == ".tsv" else ","
    delimiter = _delimiter(text, preferred)
    separated = f"columns separated by {_DELIMITERS[delimiter]}"
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=rows is None)
        lines = list(itertools.islice(reader, rows))
    except csv.Error as error:
        raise _unreadable(path, "a label file cannot be read", error, separated) from error
    inferred = [separated] * (delimiter != preferred) + [encoding.upper()] * (not encoding.startswith("utf-8"))
    return lines, [f"{path.name} is read as {' in '.join(inferred)}"] if inferred else []


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
        raise _unreadable(path, "not an Excel workbook", error) from error
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


# Cells


def as_text(value: object) -> str:
    """A cell as text: empty for none and NaN, whole numbers without a decimal point."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()


def unify(texts: Iterable[str]) -> dict[str, str]:
    """One spelling of the texts that differ only in Unicode form, spaces, invisible characters, or as numbers.

    It is in NFC, with single spaces and without invisible characters; of ``1`` and ``1.0`` it is ``1``, while ``01``
    and letter case are kept apart.
    """
    counts = Counter(texts)
    whole = "\n".join(counts)  # one look at all of them, for there may be a million
    if whole.isascii() and whole.count("\n") < len(counts) and not any(mark in whole for mark in ("  ", "\t", ".0")):
        return {text: text for text in counts}
    key = {text: _clean(text).translate(dict.fromkeys(map(ord, _JOINERS))) for text in counts}
    together: dict[str, Counter[str]] = {}
    for text in counts:
        together.setdefault(key[text], Counter())[_clean(text)] += counts[text]
    shown = {each: min(names, key=lambda n: (-names[n], n)) for each, names in together.items()}
    return {text: shown[each] for text, each in key.items()}


def _clean(text: str) -> str:
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
        text = "".join(c for c in text if c in _JOINERS or unicodedata.category(c) != "Cf")
    text = " ".join(text.split())
    return text.partition(".")[0] if re.fullmatch(r"[+-]?[0-9]+\.0+", text) else text


def spelling_notes(texts: Iterable[str], shown: Mapping[str, str]) -> list[str]:
    """Notes on class names of which several are one by `unify`, and on those that were read otherwise."""
    counts, spelled = Counter(texts), dict[str, list[str]]()
    for text in counts:
        spelled.setdefault(shown[text], []).append(text)
    notes = []
    for name, ways in spelled.items():
        if len(ways) > 1:
            listed = first_few([f"{t!a} ({counts[t]:,})" for t in sorted(ways)])
            notes.append(f"class {name!r} is written in {len(ways)} ways that are one: {listed}")
    alone = [(ways[0], name) for name, ways in spelled.items() if len(ways) == 1]
    odd = [f"{text!a} as {name!r}" for text, name in alone if unicodedata.normalize("NFC", text) != name]
    return notes + ([f"{len(odd):,} class names are read otherwise: {first_few(odd, 3)}"] if odd else [])


def check_strings(values: Sequence[object], column: str, *, where: object) -> list[str]:
    """``values`` as non-empty UTF-8 strings without NUL, else `DatasetError` naming the first that is not."""
    try:  # one look at all of them, for there may be a million
        if "" not in values and _is_plain("".join(cast("Sequence[str]", values))):
            return list(cast("Sequence[str]", values))
    except TypeError:  # one of them is no text
        pass
    bad = next(v for v in values if not isinstance(v, str) or not v or not _is_plain(v))
    problem = "is empty" if bad == "" else "is not UTF-8 text without NUL"
    raise DatasetError(
        f"the {column} of a row {problem}", code="cell-not-text", found=ascii(bad), where=where,
        fix=f"correct that {column}",
    )  # fmt: skip


def _is_plain(text: str) -> bool:
    try:
        return b"\0" not in text.encode("utf-8")
    except UnicodeEncodeError:
        return False


def check_unique(ids: Sequence[str], *, where: object) -> None:
    """Raise `DatasetError` when an id occurs twice, with the count and the first five."""
    if len(set(ids)) < len(ids):
        repeated = [f"{i} ({n} times)" for i, n in Counter(ids).items() if n > 1]
        raise DatasetError(
            f"duplicate ids: {len(repeated):,} ids occur more than once", code="duplicate-ids",
            expected="one row per id", found=first_few(repeated), where=where,
            fix="remove the repeated rows, or give each row an id of its own",
        )  # fmt: skip


# Which column is what


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
    named, notes = set(found), list[str]()
    for role in (role for role in _USUAL if role in roles and role not in found):
        free = [name for name in header if name not in found.values()]
        same = [role] if role in free else [name for name in free if plain_name(name) == role]
        choice = same or [name for name in free if plain_name(name) in _USUAL[role]]
        fit = [name for name in choice if _fits(role, table[name], own=name in same)]
        if role == "split" and choice and not fit:
            notes.append(f"not taken for the split, as not all values are train, val or test: {', '.join(choice)}")
        fit = fit[:1] if role == "id" else fit
        if len(fit) > 1:
            raise DatasetError(
                f"{len(fit)} columns could be the {role}", code="columns-ambiguous",
                expected=f"one column {role!r}, or the name of the one that is meant", found=", ".join(fit),
                where=where, fix=f"--{role}-column {shlex.quote(fit[0])}",
            )  # fmt: skip
        if fit:
            found[role] = fit[0]
    absent = [role for role in required if role not in found]
    if absent:
        flags = " ".join(f"--{role}-column NAME" for role in absent) + ", with NAME one of its columns"
        expected = [*required, "or columns with usual names such as filename and diagnosis"]
        fix = flags if len(header) > 1 else "name the columns in the first line"
        fix += ", or --target COLUMN[,COLUMN…] with what is predicted" if absent == ["label"] else ""
        raise lacks_column(where, absent, expected, table, fix)
    guessed = [f"{role} is {name!r}" for role, name in found.items() if name != role and role not in named]
    note = f"columns of {where.name} by their names: {', '.join(guessed)}; --path-column and the like name others"
    return found, ([note] if guessed else []) + notes


def named_column(header: Sequence[str], ref: DatasetRef, role: str) -> str:
    """The column that the user named for a role, in the table's own spelling; empty where none was named."""
    name = named_columns(ref).get(role, "")
    return name and match_column(name, header, "the table", where=f"--{role}-column")


def match_column(name: str, header: Sequence[str], table: str, where: str | None = None, fix: str | None = None) -> str:
    """The column of that name, or the only one that is spelled alike; `UsageError` where there is none."""
    alike = [name] if name in header else [column for column in header if plain_name(column) == plain_name(name)]
    if len(alike) == 1:
        return alike[0]
    near = difflib.get_close_matches(name, header, n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise UsageError(
        f"{table} has no column {name!r}{hint}", code="unknown-column", where=where, fix=fix,
        expected=", ".join(header) or "a table with such columns",
    )  # fmt: skip


def _fits(role: str, values: pd.Series[str], own: bool) -> bool:
    """Whether a column whose name is usual for a role, but not the role's own, has values for it."""
    if role == "split":
        return own or set(values.str.lower().unique()) <= {*SPLIT_NAMES, ""}
    if role != "id" or values.name == "id":
        return True
    # An id names each image; what could leave a folder is no name.
    return values.is_unique and not values.str.contains(r"^$|^[/\\]|\.\.|^.:").any()
