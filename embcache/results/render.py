"""Tables as text: Markdown, LaTeX and CSV."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from embcache.errors import check_choice, printable, printed_width
from embcache.results.csvfile import csv_text
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


def render(table: Table, form: str) -> str:
    """A table as text that ends in a newline."""
    check_format(form)
    return FORMATS[form](table)


def check_format(form: str) -> None:
    """Refuse a format that is none, before anything is done."""
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
