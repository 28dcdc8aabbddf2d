"""CSV for people and their spreadsheets."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

# Apostrophes and characters without ink do not keep a spreadsheet from taking what follows for a formula.
_BEFORE = re.compile(r"(?:[\s'\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]|[\x00-\x1f\x7f-\x9f])*")


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]], *, guard: bool = True) -> str:
    r"""Rows as comma-separated text with ``\n`` line ends; floats by ``repr``, nothing for None."""
    lines = [[guard_cell(name) if guard else name for name in header]]
    lines += [[guard_cell(cell) if guard and isinstance(cell, str) else _plain(cell) for cell in row] for row in rows]
    return "".join(",".join(map(_quoted, line)) + "\n" for line in lines)


def guard_cell(text: str) -> str:
    """``text``, behind an apostrophe where `is_formula` says so; taking that off gives it back."""
    return f"'{text}" if is_formula(text) else text


def is_formula(text: str) -> bool:
    """Whether a spreadsheet may take text for a formula: ``= + - @``, full-width and small ones too, a tab or line end.

    What stands before and is not seen (spaces, a byte order mark) and apostrophes make no difference.
    """
    start = text[_BEFORE.match(text).end() :][:1]  # type: ignore[union-attr]  # it matches nothing, too
    lines = text.lstrip("'").startswith(("\t", "\r", "\n"))
    return lines or unicodedata.normalize("NFKC", start).startswith(("=", "+", "-", "@"))


def _plain(cell: object) -> str:
    return repr(float(cell)) if isinstance(cell, float) else "" if cell is None else str(cell)


def _quoted(text: str) -> str:
    # Python's csv writer leaves a carriage return bare, and readers take that for the end of the row.
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\r\n') else text
