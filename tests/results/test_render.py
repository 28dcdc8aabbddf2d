"""Tables laid out and printed: Markdown, LaTeX, CSV."""

from __future__ import annotations

import csv
import io

import pytest

from embcache.results.layout import Marks, Table, escape_latex, lay_out, render
from embcache.results.paper import Cell, Grid, Model, compare_with_paper, find_value
from tests.results.build import SUPERVISED, make_cell, make_result

OTHER = Model("mine_1", "probe", "linear", ("mine",))
PAPER = find_value("B3", "pneumonia", "supervised", "S")


def cells() -> list[Cell]:
    ours = compare_with_paper(make_cell(make_result(), paper=PAPER))
    return [ours, make_cell(model=OTHER, reason="weights are not here")]


def grid(across: str) -> Grid:
    return Grid("B3", "Linear evaluation", ("pneumonia",), (SUPERVISED, OTHER), ("S",), across)


def test_ours_the_papers_value_and_the_difference_stand_beneath_each_other() -> None:
    table = lay_out(grid("models"), cells())
    assert table.headers == ("samples", "labels used", "", "Supervised ImageNet", "mine_1")
    assert table.rows == (
        ("50 (S)", "50 + 100", "ours", "0.8400 ± 0.0316", "— [a]"),
        ("", "", "paper", "0.8789 ± 0.0234", ""),
        ("", "", "difference", "−1.0", ""),
    )
    assert table.notes[0] == "[a] weights are not here"
    assert "a note" in table.notes


def test_a_flagged_value_of_the_paper_is_marked() -> None:
    slip = find_value("B6", "aptos", "random", "100")
    model = Model("Random", "finetune", "linear", ("random",), paper="random")
    table = lay_out(
        Grid("B6", "t", ("aptos",), (model,), ("100",), "models"), [Cell("aptos", model, "100", paper=slip)]
    )
    assert table.rows[1][-1] == "0.8080 ± 0.0759 [a]"
    assert any(note.startswith("[a] as printed in Table B6: 0.8080 stands between") for note in table.notes)
    assert any("Mean AUC" in note for note in table.notes)


def test_equal_remarks_share_a_letter_and_letters_never_run_out() -> None:
    marks = Marks()
    assert marks.mark("one") == marks.mark("one") == " [a]"
    assert marks.mark("") == ""
    letters = [marks.mark(f"remark {i}") for i in range(60)]
    assert letters[24:27] == [" [z]", " [aa]", " [ab]"]
    assert len(set(letters)) == 60


@pytest.mark.parametrize(
    "text",
    ["[x](http://y.example)", "![x](y.png)", "<img src=x onerror=y>", "<http://y.example>", "http://y.example",
     "www.y.example", "[x][y]", "[x]: http://y", "`code`", "*a* _b_ **c** __d__ ~~e~~", "a|b", r"\[x](y)", r"\\|",
     "&lt;b&gt;", "a\n# b", "me@y.example", "balanced_accuracy", "$x$", "Line [a]", "50 %, a & b; c < d"],
)  # fmt: skip
def test_markdown_shows_text_and_obeys_none_of_it(text: str) -> None:
    """By a parser of Markdown with GitHub's tables, strikethrough and bare addresses."""
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = parser.parse(render(Table("t", text, ("a", "b"), ((text, "n"),), (text,)), "markdown"))
    inline = [token for token in tokens if token.type == "inline"]
    assert [token.content for token in tokens if token.type == "html_block"] == []
    shown = ["".join(child.content for child in token.children) for token in inline]
    plain = text.replace("\n", " ")
    assert shown == [f"t. {plain}", "a", "b", plain, "n", plain]
    kinds = {child.type for token in inline[1:] for child in token.children}
    assert kinds <= {"text", "text_special"}


def test_latex_escapes_what_latex_would_read() -> None:
    assert escape_latex("a_b & 5 % ± −1 #{x} ~ ^ \\ $") == (
        r"a\_b \& 5 \% $\pm$ $-$1 \#\{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} \$"
    )
    assert escape_latex("--val ---") == "-{}-val -{}-{}-"
    text = render(lay_out(grid("models"), cells()), "latex")
    assert r"50 (S) & 50 + 100 & ours & 0.8400 $\pm$ 0.0316 & --- [a] \\" in text
    assert r"mine\_1" in text
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    assert r"\begin{tabular}{lllll}" in text


def test_csv_holds_every_number_of_every_cell() -> None:
    rows = list(csv.DictReader(io.StringIO(render(lay_out(grid("models"), cells()), "csv"))))
    assert [row["model"] for row in rows] == ["Supervised ImageNet", "mine_1"]
    assert float(rows[0]["mean"]) == make_result().mean
    assert float(rows[0]["paper_mean"]) == 0.8789
    assert rows[0]["labels_used"] == "150"
    assert rows[1]["reason"] == "weights are not here"
    assert rows[1]["mean"] == ""


@pytest.mark.parametrize(
    ("name", "printed"),
    [("table2", "Table 2."), ("B3", "Table B3."), ("fig2", "Figure 2."), ("D1", "Figure D1."), ("F1", "Figure F1."),
     ("G1", "Table G1."), ("my-grid", "my-grid.")],
)  # fmt: skip
def test_tables_are_named_as_in_the_paper(name: str, printed: str) -> None:
    assert render(Table(name, "title", ("a",), ()), "markdown").startswith(f"**{printed}** title")


def test_csv_runs_no_formula_in_a_spreadsheet_and_keeps_numbers() -> None:
    records = ({"name": '=HYPERLINK("x")', "mean": -0.5, "run": None}, {"name": "a\rb", "mean": 0.1 + 0.2, "run": "r"})
    rows = list(csv.reader(io.StringIO(render(Table("t", "t", ("a",), (), (), records), "csv"), newline="")))
    assert rows == [["name", "mean", "run"], ['\'=HYPERLINK("x")', "-0.5", ""], ["a\rb", "0.30000000000000004", "r"]]
    laid_out = render(Table("t", "t", ("a", "b"), (("@SUM(A1)", "1"),), ()), "csv")
    assert laid_out == "a,b\n'@SUM(A1),1\n"
