"""CSV files: exact, whole, and harmless in a spreadsheet."""

from __future__ import annotations

import csv
import io
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embcache.commands.options import write_json
from embcache.errors import UsageError
from embcache.figures.plots import Curve, CurvePanel, plot_curves
from embcache.io import check_target, write_output
from embcache.results.layout import csv_text, guard_cell, is_formula


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1"])
def test_formulas_are_guarded(text: str) -> None:
    assert guard_cell(text) == "'" + text
    (row,) = list(csv.reader(io.StringIO(csv_text(["a"], [[text]]), newline="")))[1:]
    assert row == ["'" + text]
    assert csv_text([text], [], guard=False).startswith((text, '"'))


HIDDEN = ["", " ", "\u00a0", "\ufeff", "\u200b\u202e", "'", "''\ufeff ", "\x00"]


def test_signs_of_any_width_are_guarded_whatever_unseen_stands_before_them() -> None:
    for sign, before in itertools.product("=+-@＝＋－＠﹦﹢﹣﹫", HIDDEN):
        text = f"{before}{sign}1+1"
        assert is_formula(text)
        assert guard_cell(text) == f"'{text}"


@given(st.text(alphabet="=＝'\ufeff +-@\t\n ab1", max_size=8))
def test_taking_one_apostrophe_off_what_is_guarded_gives_it_back(text: str) -> None:
    cell = guard_cell(text)
    read = cell[1:] if cell.startswith("'") and is_formula(cell[1:]) else cell
    assert read == text


def test_other_text_and_numbers_stay_as_they_are() -> None:
    text = csv_text(["id", "p", "n", "none"], [['a,b "c"\nd', 0.1 + 0.2, -3, None]])
    assert list(csv.reader(io.StringIO(text, newline=""))) == [
        ["id", "p", "n", "none"],
        ['a,b "c"\nd', "0.30000000000000004", "-3", ""],
    ]


def test_a_file_is_replaced_whole_and_names_that_are_no_text_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_text("old")
    write_output(path, "b\udce9é\n")
    assert path.read_bytes() == "b\\udce9é\n".encode()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.csv"]


def test_a_device_or_a_link_is_written_to_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "link.csv").symlink_to(tmp_path / "file.csv")
    write_output(tmp_path / "link.csv", "x")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "file.csv").read_text() == "x"
    check_target(Path("/dev/null"))
    write_output(Path("/dev/null"), "x")
    assert not Path("/dev/null").is_file()


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for name in ("table.csv", "answer.json", "curves.png"):
        (tmp_path / name).write_text("old")
    with pytest.raises(UsageError):
        write_output(tmp_path / "table.csv", "new")
    with pytest.raises(UsageError):
        write_json({"a": 1}, str(tmp_path / "answer.json"))
    curve = Curve("a", (1.0, 2.0), (0.5, 0.6), (0.4, 0.5), (0.6, 0.7))
    with pytest.raises(UsageError):
        plot_curves([CurvePanel("t", "AUC", (curve,))], "t", tmp_path / "curves.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answer.json", "curves.png", "table.csv"]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"old"}


def test_where_nothing_can_be_written_that_is_told_before_and_after(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent" / "out.csv"):
        with pytest.raises(UsageError):
            check_target(path)
        with pytest.raises(UsageError):
            write_output(path, "x")
    assert list(tmp_path.iterdir()) == []
