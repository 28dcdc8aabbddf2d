"""Numbers as text, and tables: cells laid out with marks, notes and plain records, as Markdown, LaTeX and CSV.

No cell becomes markup, or a formula in a spreadsheet.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from embcache.errors import check_choice, printable, printed_width
from embcache.probe.metrics import metric_title
from embcache.results.paper import Cell, Grid, paper_tables

# Numbers.


def signed(value: float, digits: int, *, plus: bool = False) -> str:
    """A number with a true minus sign, and optionally a plus."""
    return f"{value:{'+' * plus}.{digits}f}".replace("-", "−")


def score(mean: float, std: float | None, digits: int = 3) -> str:
    """``0.934 ± 0.012``, or without a deviation."""
    return signed(mean, digits) + ("" if std is None else f" ± {std:.{digits}f}")


def bounds(interval: tuple[float, float] | None, *, digits: int = 3, plus: bool = False, between: str = " to ") -> str:
    """``0.912 to 0.951``; nothing of no interval."""
    return between.join(signed(bound, digits, plus=plus) for bound in interval or ())


# Tables.


@dataclass(frozen=True)
class Table:
    """A finished table."""

    name: str
    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]  # each as long as ``headers``
    notes: tuple[str, ...] = ()  # printed beneath, those with a mark in the table as ``[a] …``
    records: tuple[Mapping[str, Any], ...] = ()  # the same in plain data, one per cell, for CSV and JSON


@dataclass
class Marks:
    """Letters for remarks, each remark once."""

    letters: dict[str, str] = field(default_factory=dict)

    def mark(self, remark: str) -> str:
        """`` [a]`` for a remark, `` [b]`` for the next one; nothing for an empty one."""
        if not remark:
            return ""
        first, second = divmod(len(self.letters), 26)
        letter = ("" if not first else string.ascii_lowercase[first - 1]) + string.ascii_lowercase[second]
        return f" [{self.letters.setdefault(remark, letter)}]"

    def notes(self) -> list[str]:
        """The remarks in the order in which they were first marked."""
        return [f"[{letter}] {remark}" for remark, letter in self.letters.items()]


def lay_out(grid: Grid, cells: Sequence[Cell]) -> Table:
    """Arrange cells as the paper does: ours, the paper's value and the difference beneath each other."""
    at = {(cell.dataset, cell.model, cell.subset): cell for cell in cells}
    marks, rows, down = Marks(), list[tuple[str, ...]](), grid.across == "models"
    several = len(grid.datasets) > 1 or not down
    for dataset in grid.datasets:
        own = [cell for cell in cells if cell.dataset == dataset]
        metrics = dict.fromkeys(metric_title(cell.result.metric) for cell in own if cell.result)
        name = [dataset + (f" ({', '.join(metrics)})" if metrics else "")] * several
        if down:
            across = [[at[dataset, model, subset] for model in grid.models] for subset in grid.subsets]
            lines = [([*name, _printed_subset(line[0]), _labels_used(line)], line) for line in across]
        else:
            lines = [([*name, m.label], [at[dataset, m, subset] for subset in grid.subsets]) for m in grid.models]
            used = [_labels_used([cell for cell in own if cell.subset == subset]) for subset in grid.subsets]
            rows += [(*name, "labels used", "", *used)] * any(used)
        for begin, line in lines:
            blank = [""] * len(begin)
            rows.append((*begin, "ours", *(_ours(cell, marks) for cell in line)))
            if any(cell.paper is not None for cell in line):
                rows.append((*blank, "paper", *(_paper(cell, marks) for cell in line)))
            if any(cell.difference is not None or cell.withheld for cell in line):
                rows.append((*blank, "difference", *(_difference(cell, marks) for cell in line)))
    columns = ["samples", "labels used", "", *(m.label for m in grid.models)] if down else ["method", "", *grid.subsets]
    headers = (*["dataset"] * several, *columns)
    return Table(grid.name, grid.title, headers, tuple(rows), tuple(_notes(grid, cells, marks)), (*map(record, cells),))


def _ours(cell: Cell, marks: Marks) -> str:
    if cell.result is None:
        return "—" + marks.mark(cell.reason)
    chosen = " + ".join(cell.result.backbones) + " " if cell.model.among else ""
    if cell.result.mean is None:
        return f"{chosen}not scored"
    kaggle = marks.mark("scored on the competition's leaderboards") if cell.result.kind == "kaggle" else ""
    return f"{chosen}{score(cell.result.mean, cell.result.std, 4)}{kaggle}"


def _paper(cell: Cell, marks: Marks) -> str:
    value = cell.paper
    if value is None or value.mean is None:
        return ""
    table = value.table.removeprefix("table")
    return score(value.mean, value.std, 4) + marks.mark(f"as printed in Table {table}: {value.flag}" * bool(value.flag))


def _difference(cell: Cell, marks: Marks) -> str:
    if cell.difference is not None:
        return signed(cell.difference, 1, plus=True)
    return f"withheld{marks.mark(cell.withheld)}" if cell.withheld else ""


def _printed_subset(cell: Cell) -> str:
    """The subset as the paper prints it where it does, else its name."""
    if cell.paper is not None and cell.paper.printed:
        return cell.paper.printed
    if cell.subset == "F":
        return "Full"
    named = cell.result is not None and not cell.subset.isdigit()
    return f"{cell.result.n_train:,} ({cell.subset})" if named and cell.result else cell.subset


def _labels_used(cells: Sequence[Cell]) -> str:
    pairs = dict.fromkeys((c.result.n_train, c.result.labels_used - c.result.n_train) for c in cells if c.result)
    return ", ".join(f"{train:,} + {validation:,}" for train, validation in pairs)


def _notes(grid: Grid, cells: Sequence[Cell], marks: Marks) -> list[str]:
    notes, results = marks.notes(), [cell.result for cell in cells if cell.result is not None]
    if any(cell.difference is not None for cell in cells):
        notes.append("difference: (ours − paper) / √(s₁² + s₂²), with s the standard deviations over folds")
    if results:
        metrics = dict.fromkeys(f"{r.dataset}: {metric_title(r.metric)}" for r in results)
        tests = dict.fromkeys(f"{r.dataset}: {r.test_set} test set of {r.n_test:,} images" for r in results)
        folds = dict.fromkeys(len(r.folds) for r in results)
        notes.append(f"mean ± sd over {' or '.join(map(str, folds))} folds; " + "; ".join([*metrics, *tests]))
        notes.append("labels used: training + validation images per fold")
    paper = paper_tables().get(grid.name)
    if paper is not None and any(cell.paper for cell in cells):
        notes += [f"slip in the paper: {flag}" for flag in paper.flags]
    several = len(grid.datasets) > 1
    return [*notes, *dict.fromkeys((f"{r.dataset}: " if several else "") + n for r in results for n in r.notes)]


def record(cell: Cell) -> dict[str, Any]:
    """A cell as plain data; None where a value is not known."""
    r, v, model = cell.result, cell.paper, cell.model
    own = vars(r) if r is not None else {}
    found = r.estimate if r is not None else None
    low, high = own.get("interval") or (None, None)
    these_low, these_high = (found.these_models if found is not None else None) or (None, None)
    return {
        "dataset": cell.dataset, "model": model.label, "kind": own.get("kind", model.kind),
        "head": own.get("head", model.head), "backbones": "+".join(own.get("backbones", model.backbones)),
        "subset": cell.subset, **{name: own.get(name) for name in ("n_train", "n_val", "labels_used", "n_test")},
        "test_set": own.get("test_set"), "folds": len(r.folds) if r is not None else None,
        **{name: own.get(name) for name in ("metric", "mean", "std")}, "low": low, "high": high,
        "these_models_low": these_low, "these_models_high": these_high,
        "positive": (found.positive or None) if found is not None else None, "val_mean": own.get("val_mean"),
        "paper_mean": v.mean if v else None, "paper_std": v.std if v else None, "paper_table": v.table if v else None,
        "paper_flag": (v.flag or None) if v else None, "difference": cell.difference,
        "withheld": cell.withheld or None, "reason": cell.reason or None, "run": own.get("id"),
    }  # fmt: skip


# As text.

_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"$|$",
    "±": r"$\pm$", "−": "$-$", "×": r"$\times$", "√": r"$\surd$", "²": "$^2$", "₁": "$_1$", "₂": "$_2$", "≥": r"$\geq$",
    "…": r"\ldots{}", "–": "--", "—": "---", "·": r"$\cdot$", "“": "``", "”": "''", "→": r"$\to$",
})  # fmt: skip
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
    check_choice("--format", form, FORMATS)
    return FORMATS[form](table)


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
    lines = [
        r"\begin{table}[ht]", r"\centering", rf"\caption{{{escape_latex(_name(table) + ' ' + table.title)}}}",
        rf"\begin{{tabular}}{{{'l' * len(table.headers)}}}", r"\hline", _latex_row(table.headers), r"\hline",
        *map(_latex_row, table.rows), r"\hline", r"\end{tabular}",
    ]  # fmt: skip
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
    plain = re.sub("-(?=-)", "-\0", text).translate(_LATEX)
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


_NUMBERS = re.compile(r"[+-]?[0-9]+\.[0-9]+( [–±] [+-]?[0-9]+\.[0-9]+)?")


def guard_cell(text: str) -> str:
    """``text``, behind an apostrophe where it is a formula (`is_formula`); removing that restores it."""
    return f"'{text}" if is_formula(text) else text


def is_formula(text: str) -> bool:
    """Whether a spreadsheet may take text for a formula: ``= + - @``, full-width and small ones too, a tab or line end.

    What stands before and is not seen (spaces, a byte order mark) and apostrophes make no difference. Decimals with
    a sign, and intervals of them, are none.
    """
    if _NUMBERS.fullmatch(text):
        return False
    start = text[_BEFORE.match(text).end() :][:1]  # type: ignore[union-attr]  # it matches nothing, too
    lines = text.lstrip("'").startswith(("\t", "\r", "\n"))
    return lines or unicodedata.normalize("NFKC", start).startswith(("=", "+", "-", "@"))


def _plain(cell: object) -> str:
    return repr(float(cell)) if isinstance(cell, float) else "" if cell is None else str(cell)


def _quoted(text: str) -> str:
    # Python's csv writer leaves a carriage return bare, and readers take that for the end of the row.
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\r\n') else text
