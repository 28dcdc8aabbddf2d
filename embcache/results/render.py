"""Tables as text: Markdown, LaTeX and CSV; no cell becomes markup, or a formula in a spreadsheet."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence

from embcache.errors import check_choice, printable, printed_width
from embcache.results.layout import Table

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"$|$",
    "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "√": r"$\surd$", "²": "$^2$", "₁": "$_1$", "₂": "$_2$", "≥": r"$\geq$",
    "…": r"\ldots{}", "–": "--", "—": "---", "·": r"$\cdot$", "“": "``", "”": "''", "→": r"$\to$",
}  # fmt: skip
SUFFIXES = {"markdown": (".md", ".markdown", ".txt"), "latex": (".tex",), "csv": (".csv",)}
"""What a file of each format may be called."""
# What Markdown would read as markup inside a cell: cells, emphasis, code, strikethrough, math, tags, entities, links,
# images and, as GitHub has it, addresses and names of people.
_MARKUP = (
    (re.compile(r"\\(?=[!-/:-@\[-`{-~])"), r"\\\\"),
    (re.compile(r"&(?=#?\w+;)"), "&amp;"),
    (re.compile(r"[|*`~$]|!(?=\[)|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])"), r"\\\g<0>"),
    (re.compile("<"), "&lt;"),
    (re.compile("://"), "&#58;//"),
    (re.compile(r"(?i)\b(www)\."), r"\1&#46;"),
    (re.compile("@"), "&#64;"),
    (re.compile(r"[\r\n]+"), " "),
)
# Apostrophes and invisible characters do not keep a spreadsheet from taking what follows for a formula.
_BEFORE = re.compile(r"(?:[\s'\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]|[\x00-\x1f\x7f-\x9f])*")


def render(table: Table, form: str) -> str:
    """A table as text that ends in a newline."""
    check_format(form)
    return FORMATS[form](table)


def check_format(form: str) -> None:
    """Refuse an unknown format before anything is done."""
    check_choice("--format", form, FORMATS)


def to_markdown(table: Table) -> str:
    """A pipe table whose columns are aligned in the source too, a title above and notes beneath."""
    rows = [[escape_markdown(cell) for cell in row] for row in (table.headers, *table.rows)]
    widths = [max(3, *map(printed_width, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (cell + " " * (width - printed_width(cell)) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    lines = [f"**{_name(table)}** {escape_markdown(table.title)}", "", line(rows[0]), rule, *map(line, rows[1:])]
    if table.notes:
        lines += ["", *(f"- {escape_markdown(note)}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def escape_markdown(text: str) -> str:
    """Text as Markdown that shows it: nothing in it becomes a link, an image, markup or another cell."""
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return printable(text)


def to_latex(table: Table) -> str:
    r"""A ``table`` environment with a ``tabular``; needs no package but ``inputenc``'s UTF-8."""
    columns = "l" * len(table.headers)
    lines = [
        r"\begin{table}[ht]",
        r"\centering",
        rf"\caption{{{escape_latex(_name(table) + ' ' + table.title)}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\hline",
        _latex_row(table.headers),
        r"\hline",
        *map(_latex_row, table.rows),
        r"\hline",
        r"\end{tabular}",
    ]
    if table.notes:
        notes = [rf"{escape_latex(note)}\\" for note in table.notes]
        lines += ["", r"\smallskip", r"{\footnotesize\raggedright", *notes, "}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    # A row that begins with "[" would be read as the optional argument of the "\\" before it.
    text = " & ".join(map(escape_latex, cells))
    return ("{}" if text.startswith("[") else "") + text + r" \\"


def escape_latex(text: str) -> str:
    """Text as LaTeX: special characters escaped, ± as ``$\\pm$``, a true minus as ``$-$``."""
    text = printable(" ".join(re.split(r"[\r\n]+", text)))
    plain = "".join(_LATEX.get(character, character) for character in re.sub("-(?=-)", "-\0", text))
    return plain.replace("\0", "{}")  # two hyphens would become a dash: flags are spelled with them


def to_csv(table: Table) -> str:
    """The records as CSV with a header; without records the rows as they are laid out."""
    if not table.records:
        return csv_text(table.headers, table.rows)
    columns = list(table.records[0])
    return csv_text(columns, [[record[name] for name in columns] for record in table.records])


def _name(table: Table) -> str:
    """``Table 2.``, ``Table B3.``, ``Figure D1.`` for what the paper has; else the table's own name."""
    match = re.fullmatch(r"(table|fig)?([BCDFG]?\d)", table.name)
    if match is None:
        return f"{table.name}."
    figure = match[1] == "fig" or (match[1] is None and match[2][0] in "DF")
    return f"{'Figure' if figure else 'Table'} {match[2]}."


FORMATS: Mapping[str, Callable[[Table], str]] = {"markdown": to_markdown, "latex": to_latex, "csv": to_csv}


# CSV.


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]], *, guard: bool = True) -> str:
    r"""Rows as comma-separated text with ``\n`` line ends; floats by ``repr``, nothing for None."""
    lines = [[guard_cell(name) if guard else name for name in header]]
    lines += [[guard_cell(cell) if guard and isinstance(cell, str) else _plain(cell) for cell in row] for row in rows]
    return "".join(",".join(map(_quoted, line)) + "\n" for line in lines)


def guard_cell(text: str) -> str:
    """``text``, behind an apostrophe where it is a formula (`is_formula`); removing that restores it."""
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
