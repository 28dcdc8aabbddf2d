"""CSV files for people and their spreadsheets, written whole or not at all."""

from __future__ import annotations

import csv
import io
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from embcache.errors import UsageError

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What spreadsheets take for the beginning of a formula."""


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]], *, guard: bool = True) -> str:
    r"""Rows as comma-separated text with ``\n`` line ends; floats by ``repr``, nothing for None.

    Parameters
    ----------
    header : sequence of str
        Names of the columns.
    rows : iterable of sequences
        As long as the header each.
    guard : bool
        Put an apostrophe before text that a spreadsheet would run as a formula (see `guard_cell`). False where the
        text must stay as it is.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([guard_cell(name) if guard else name for name in header])
    for row in rows:
        writer.writerow([guard_cell(cell) if guard and isinstance(cell, str) else _plain(cell) for cell in row])
    return file.getvalue()


def guard_cell(text: str) -> str:
    """``text``, behind an apostrophe where its beginning makes spreadsheets take it for a formula."""
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


def write_text(path: Path, text: str) -> Path:
    """Write a text file (UTF-8; bytes of file names that are none are escaped), replacing what was there at once.

    Raises
    ------
    UsageError
        It cannot be written there.
    """
    aside = path.with_name(f".{path.name[:100]}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        try:
            with aside.open("x", encoding="utf-8", errors="backslashreplace", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            "the file cannot be written",
            found=str(error.strerror or error),
            where=path,
            fix="name a file in a folder that is there and can be written to",
        ) from error
    return path


def _plain(cell: object) -> object:
    return repr(float(cell)) if isinstance(cell, float) else "" if cell is None else cell
