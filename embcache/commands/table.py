"""Plain aligned tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from embcache.commands.output import echo
from embcache.errors import printable, printed_width


def _is_number(text: str) -> bool:
    return bool(text) and text.strip("+-−").replace(",", "")[:1].isdigit()


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns two spaces apart, headers underlined; columns of numbers are right-aligned.

    Control characters are shown escaped, so that no name can disturb the terminal.
    """
    cells = [["" if value is None else one_line(str(value)) for value in row] for row in rows]
    columns = list(zip(headers, *cells, strict=True)) if cells else [(h,) for h in headers]
    widths = [max(map(printed_width, column)) for column in columns]
    right = [len(c) > 1 and all(_is_number(v) or not v for v in c[1:]) and any(c[1:]) for c in columns]

    def line(values: Sequence[str]) -> str:
        padded = (
            " " * (w - printed_width(v)) + v if r else v + " " * (w - printed_width(v))
            for v, w, r in zip(values, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), line(["─" * w for w in widths]), *map(line, cells)])


def one_line(text: str) -> str:
    """Text with its control characters escaped, line ends too."""
    return printable(text).replace("\n", "\\n")


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, notes: Sequence[str] = ()) -> None:
    """Print a table to stdout, its notes beneath."""
    echo(format_table(headers, rows))
    for note in notes:
        echo(f"· {note}")


def spread(mean: float | None, std: float | None) -> str:
    """``mean ± sd``, as tables show it; empty where there is none, or it is not defined."""
    if mean is None or not math.isfinite(mean):
        return ""
    return f"{mean:.4f}" + ("" if std is None else f" ± {std:.4f}")


def bounds(interval: tuple[float, float] | None, sign: str = "") -> str:
    """``low – high``, as tables show it."""
    return "" if interval is None else f"{interval[0]:{sign}.4f} – {interval[1]:{sign}.4f}"


def print_note(text: str) -> None:
    """Print ``note: text`` to stderr, with control characters (of ids and paths, say) escaped in each line."""
    echo(f"note: {text}", err=True)
