"""What a notebook shows for the objects of the public API: a small table of names and values, all of it escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from embcache.errors import printable


def html_table(title: str, rows: Iterable[tuple[str, object]], folds: Sequence[Sequence[object]] = ()) -> str:
    """HTML of a titled table with two columns; below it, if given, a second one whose first row is its header.

    Every value is text: control characters are shown escaped, and none of it is taken for markup.
    """
    lines = "".join(
        f'<tr><th style="text-align:left">{_text(name)}</th><td style="text-align:left">{_text(value)}</td></tr>'
        for name, value in rows
    )
    return f"<div><strong>{_text(title)}</strong><table>{lines}</table>{_grid(folds)}</div>"


def _grid(rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{_text(value)}</th>" for value in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{_text(value)}</td>" for value in row) + "</tr>" for row in rows[1:])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: object) -> str:
    return escape(printable(str(value)), quote=True).replace("\n", "<br>")
