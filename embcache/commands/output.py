"""What a command prints: text, notes, tables, JSON, progress bars.

All of it passes here, so that no name from a file reaches the terminal as a control sequence. Work never ends because
output is not read: where a stream is closed, full or has lost its reader, the rest of the output is dropped, which is
reported in the end for the standard output (`lost_output`).
"""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

from embcache.errors import one_line, printable, printed_width
from embcache.io import write_output
from embcache.log import log
from embcache.paths import addressed

_T = TypeVar("_T")
# How a command's tables are printed: (all columns whatever the width, as CSV); None where it offers no choice.
_style: tuple[bool, bool] | None = None
_bar: Any = None  # the progress bar on the terminal


@contextmanager
def table_style(wide: bool | None = None, csv: bool = False) -> Iterator[None]:
    """Print tables in this style while the block runs: with all columns, or as CSV with all else on stderr."""
    global _style
    before, _style = _style, None if wide is None else (wide, csv)
    try:
        yield
    finally:
        _style = before


def may_guide() -> bool:
    """Whether what to type next may be printed: not with ``--quiet``."""
    return log.level < logging.WARNING


def prints_csv() -> bool:
    """Whether tables are printed as CSV, where every row must be complete."""
    return _style is not None and _style[1]


def echo(text: str = "", *, err: bool = False, nl: bool = True) -> None:
    """Print text to stdout, or stderr, with control characters shown escaped."""
    _write(text + "\n" * nl, err=err or prints_csv())


def _write(text: str, *, err: bool = False) -> None:
    stream = sys.stderr if err else sys.stdout
    if stream is not None:
        stream.write(printable(addressed(text)))
        stream.flush()


def print_note(text: str) -> None:
    """Print ``note: text`` to stderr, above a progress bar."""
    if _bar is not None:
        _bar.clear()
    echo(f"note: {text}", err=True)
    if _bar is not None:
        _bar.refresh()


def echo_data(text: str, keep: str) -> None:
    """Print a file's text to stdout; where that cannot show it as it is, a note names the option that ``keep`` it."""
    shown = printable(text)
    if shown != text or _fitting(text) != text:
        echo(f"note: characters that cannot be shown are escaped; {keep} keeps them as they are", err=True)
    echo(shown, nl=False)


def plain(value: Any) -> Any:
    """JSON data from dataclasses, mappings and sequences; None for numbers that are not finite."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(data: Any, target: str) -> None:
    """Write ``data``, made `plain`, as indented JSON to the file ``target``, or to stdout when it is ``-``."""
    if target == "-":
        _write(json_text(plain(data), shown=True))
    else:
        write_output(Path(target), json_text(plain(data)))


def json_text(data: Any, *, indent: int = 2, shown: bool = False) -> str:
    """Indented JSON, with escapes for what is not printable or, if ``shown``, what stdout's encoding lacks."""
    text = addressed(json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False))

    def escaped(match: re.Match[str]) -> str:
        character = match[0]
        if character.isprintable() and (not shown or _fitting(character) == character):
            return character
        units = character.encode("utf-16-be", "surrogatepass").hex()
        return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))

    return re.sub(r"[^\x20-\x7e\n]", escaped, text) + "\n"


def _fitting(text: str) -> str:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def echo_each(items: Iterable[_T], show: Callable[[_T], object]) -> None:
    """Show items one after the other, an empty line between them."""
    for number, item in enumerate(items):
        echo("", nl=number > 0)
        show(item)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]], *, notes: Sequence[str] = ()) -> None:
    """Print a table to stdout, its notes beneath; on a terminal as wide as that."""
    if prints_csv():
        from embcache.results.layout import csv_text

        _write(csv_text(headers, [[_text(value) for value in row] for row in rows]))
    elif sys.stdout.isatty() and not (_style is not None and _style[0]):
        width = shutil.get_terminal_size().columns
        echo(fit_table(headers, rows, width, drop=_style is not None))
    else:
        echo(format_table(headers, rows))
    echo_notes(notes)


def print_objects(items: Iterable[Any], columns: Mapping[str, Any], *, notes: Sequence[str] = ()) -> None:
    """Print a table of objects: a column is a format string, in which ``{0}`` is the object, or a function of it."""
    rows = [[how.format(item) if isinstance(how, str) else how(item) for how in columns.values()] for item in items]
    print_table(list(columns), rows, notes=notes)


def echo_pairs(pairs: Iterable[tuple[str, object]]) -> None:
    """Print names and values, the values below each other and wrapped; nothing where a value is empty."""
    for line in _pair_lines(pairs, 100):
        echo(line)


def _pair_lines(pairs: Iterable[tuple[str, object]], width: float) -> Iterator[str]:
    shown = [(one_line(name), one_line(str(value))) for name, value in pairs if value not in ("", None)]
    margin = 2 + max((printed_width(name) for name, _ in shown if len(name) <= 40), default=0)
    for name, value in shown:
        lines = [value] if len(value) <= width else _wrap(value, int(width))
        for label, line in zip([name, *[""] * len(lines)], lines, strict=False):
            yield (label + " " * (margin - printed_width(label)) + line).rstrip()


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def echo_notes(notes: Iterable[str]) -> None:
    """Print notes, one per line."""
    for note in notes:
        echo(f"· {note}")


def counted(n: int, noun: str) -> str:
    """``1 store``, ``2 stores``."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def size_words(number: int) -> str:
    """A number of bytes as people say it: ``12.3 MB``."""
    size, units = float(number), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" or size >= 100 else f"{size:.1f} {units[0]}"


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns two spaces apart, headers underlined; columns of numbers are right-aligned."""
    return _lay_out(headers, [[_text(value) for value in row] for row in rows])


_KEPT = ("run", "id", "mean ± sd", "difference")  # columns that a narrow terminal shows, too


def fit_table(headers: Sequence[str], rows: Sequence[Sequence[object]], width: int, *, drop: bool = True) -> str:
    """A table that fits a terminal.

    Columns in which all rows agree stand once above the table. Text is wrapped; if that is not enough, columns at the
    right are left out where ``drop`` allows it, but never IDs and scores. A single row becomes one line per column.
    """
    cells = [[_text(value) for value in row] for row in rows]
    if not cells:
        return _lay_out(headers, cells)
    if len(cells) == 1 and sum(_widths(headers, cells)) + 2 * (len(headers) - 1) > width:
        return "\n".join(_pair_lines(zip(headers, cells[0], strict=True), math.inf))
    above = _constant(cells) if len(cells) > 1 else []
    lines = []
    if shared := " · ".join(f"{headers[k]}: {cells[0][k]}" for k in above if cells[0][k]):
        lines += [*textwrap.wrap(shared, max(width, 20)), ""]
    shown = [k for k in range(len(headers)) if k not in above]
    left_out: list[str] = []
    while shown:
        names, part = [headers[k] for k in shown], [[row[k] for k in shown] for row in cells]
        limits = _limits(names, part, width)
        droppable = [k for k in shown[1:] if drop and headers[k] not in _KEPT]
        if limits is not None or not droppable:
            break
        left_out.insert(0, headers[droppable[-1]])
        shown.remove(droppable[-1])
    if shown:
        lines.append(_lay_out(names, part, limits))
    if left_out:
        lines.append(f"· not shown: {', '.join(left_out)} (--wide shows all columns)")
    return "\n".join(lines)


def _text(value: object) -> str:
    return "" if value is None else one_line(str(value))


def _constant(cells: Sequence[Sequence[str]]) -> list[int]:
    """Columns in which all rows agree; a row without a first cell continues the one above, whose cells it shares."""
    first = cells[0]
    columns = [k for k, cell in enumerate(first) if all(row[k] == cell or not (row[0] or row[k]) for row in cells)]
    return columns if len(columns) < len(first) else columns[:-1]


def _widths(headers: Sequence[str], cells: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(printed_width, column)) for column in zip(headers, *cells, strict=True)]


def _limits(headers: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """Widths of columns that fit when text is wrapped between words; None where they cannot."""
    widths = _widths(headers, cells)
    least: list[int] = []
    for name, column, longest in zip(headers, zip(*cells, strict=True), widths, strict=True):
        words = [name, *(word for cell in column for word in re.findall(r"^ *\S*|\S+", cell))]
        least.append(longest if _is_numeric(column) else min(longest, max(12, *map(printed_width, words))))
    excess = sum(widths) + 2 * (len(widths) - 1) - width
    if excess > sum(widths) - sum(least):
        return None
    for _ in range(excess):  # the widest column that can be narrower
        _, widest = max((w if w > low else -1, k) for k, (w, low) in enumerate(zip(widths, least, strict=True)))
        widths[widest] -= 1
    return widths


def _lay_out(headers: Sequence[str], cells: Sequence[Sequence[str]], limits: Sequence[int] | None = None) -> str:
    right = [_is_numeric(column) for column in (zip(*cells, strict=True) if cells else [()] * len(headers))]
    widths = limits or _widths(headers, cells)

    def lines(row: Sequence[str]) -> list[str]:
        wrapped = [[v] if printed_width(v) <= w else _wrap(v, w) for v, w in zip(row, widths, strict=True)]
        printed = []
        for k in range(max(map(len, wrapped), default=0)):
            parts = [part[k] if k < len(part) else "" for part in wrapped]
            padded = (
                " " * (w - printed_width(v)) + v if r else v + " " * (w - printed_width(v))
                for v, w, r in zip(parts, widths, right, strict=True)
            )
            printed.append("  ".join(padded).rstrip())
        return printed

    body = [line for row in cells for line in lines(row)]
    return "\n".join([*lines(headers), "  ".join("─" * w for w in widths), *body])


def _is_numeric(column: Sequence[str]) -> bool:
    return any(column) and all(not text or text.strip("+-−").replace(",", "")[:1].isdigit() for text in column)


def spread(mean: float | None, std: float | None) -> str:
    """``mean ± sd``, as tables show it; empty where there is none, or it is not defined."""
    if mean is None or not math.isfinite(mean):
        return ""
    return f"{mean:.4f}" + ("" if std is None else f" ± {std:.4f}")


def bounds(interval: tuple[float, float] | None, sign: str = "") -> str:
    """``low – high``, as tables show it."""
    return "" if interval is None else f"{interval[0]:{sign}.4f} – {interval[1]:{sign}.4f}"


class ProgressBar:
    """A bar with rate and time left, on stderr and only on a terminal; it restarts where what is counted changes.

    ``stopped`` is what is said where the user stops the work.
    """

    def __init__(self, unit: str, stopped: str = "") -> None:
        self._unit, self._stopped = unit, stopped
        self._counts: tuple[int, str] | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        global _bar
        if self._stopped and kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit):
            echo(f"\nstopped: {self._stopped}", err=True)
        if _bar is not None:
            _bar.close()
            _bar = None

    def update(self, done: int, total: int, label: str = "") -> None:
        """Show that ``done`` of ``total`` units of ``label`` are finished."""
        global _bar
        if not sys.stderr.isatty():
            return
        if self._counts is None or self._counts[0] != total or (done < _bar.n and self._counts[1] != label):
            from tqdm import tqdm

            if _bar is not None:
                _bar.close()
            _bar = tqdm(total=total, unit=self._unit, leave=False, file=sys.stderr, smoothing=0.05)
        self._counts = (total, label)
        _bar.set_description(label, refresh=False)
        _bar.update(done - _bar.n)


class Screen(io.TextIOBase):
    """Replaces stdout or stderr: characters that its encoding lacks, and control characters, are shown escaped.

    What libraries write (warnings, logs, progress bars) passes here, too. A line's end, and a return to its beginning
    at the start of what is written, as progress bars make, are kept.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.lost: Exception | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]
        """How characters that the encoding lacks are written."""
        return "backslashreplace"

    def write(self, text: str) -> int:
        """Write text, as far as the stream takes it."""
        start = "\r" if text.startswith("\r") else ""
        shown = (start + printable(text[len(start) :])).encode(self.encoding, "backslashreplace").decode(self.encoding)
        self._try(lambda stream: stream.write(shown))
        return len(text)

    def flush(self) -> None:
        """Flush what was written, as far as the stream takes it."""
        self._try(lambda stream: stream.flush())

    def _try(self, call: Callable[[TextIO], object]) -> None:
        if self._stream is not None and self.lost is None:
            try:
                call(self._stream)
            except (OSError, ValueError) as error:  # the disk is full, the reader has gone, it is closed
                self.lost = error

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def fileno(self) -> int:
        """Descriptor of the stream."""
        if self._stream is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._stream.fileno()

    def writable(self) -> bool:
        """Whether it can be written to: always."""
        return True


def guard_streams() -> None:
    """Put a `Screen` before stdout and stderr, and something behind descriptors that the process was started without.

    The next file that is opened would else get the number of a closed stderr, and what a library in C says to it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    sys.stdout, sys.stderr = Screen(sys.stdout), Screen(sys.stderr)


def lost_output() -> bool:
    """Flush both streams; True, with a message on stderr, where some of the standard output could not be written."""
    sys.stdout.flush()
    error = sys.stdout.lost if isinstance(sys.stdout, Screen) else None
    if error is not None and not isinstance(error, BrokenPipeError):
        echo(f"embcache: not all of the output could be written: {getattr(error, 'strerror', None) or error}", err=True)
    sys.stderr.flush()
    return error is not None
