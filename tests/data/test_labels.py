import sys
from pathlib import Path

import pandas as pd
import pytest

from embcache.data.classes import class_order, label_notes, label_numbers
from embcache.data.tables import open_table, read_table, spelling_notes, unify
from embcache.errors import DatasetError
from tests.refusal import refused


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def test_text_stays_text_whatever_it_looks_like(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "a.csv", "id,label\r\n007,NA\r\n1e5, null \r\n\r\n"), ["id"])
    assert table.to_dict("list") == {"id": ["007", "1e5"], "label": ["NA", "null"]}


def test_a_byte_order_mark_quotes_and_line_breaks_in_fields_are_read(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "a.csv", 'id,"my, note"\nä,"two\nlines"\n', "utf-8-sig"), ["id"])
    assert table.to_dict("list") == {"id": ["ä"], "my, note": ["two\nlines"]}


def test_parquet_numbers_become_the_text_that_csv_would_hold(tmp_path: Path) -> None:
    columns = {
        "id": [1, 2, 3],
        "label": [1.0, None, 0.0],
        "score": [0.5, 1.5, float("nan")],
        "flag": [True, False, None],
    }
    pd.DataFrame(columns).to_parquet(tmp_path / "a.parquet")
    table = read_table(tmp_path / "a.parquet", ["id"])
    assert table["label"].tolist() == ["1", "", "0"]
    assert table["score"].tolist() == ["0.5", "1.5", ""]
    assert table["flag"].tolist() == ["True", "False", ""]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "table-empty"),
        ("\n\n", "table-empty"),
        ("name,label\na,1\n", "column-missing"),
        ("id,label\na,1\nb\n", "table-ragged"),
        ("id,label\na,1,2\n", "table-ragged"),
        ("id,id\na,b\n", "column-repeated"),
        ('id,label\n"a,1\n', "table-unreadable"),
    ],
)
def test_broken_tables_are_refused(tmp_path: Path, text: str, code: str) -> None:
    with refused(DatasetError, code):
        read_table(write(tmp_path / "a.csv", text), ["id"])


def test_whole_numbers_are_ordered_by_value_and_names_alphabetically() -> None:
    assert class_order(["10", "2", "", "-1", "2"]) == ("-1", "2", "10")
    assert class_order(["10", "2", "b"]) == ("10", "2", "b")
    assert class_order([]) == ()


def test_unknown_labels_are_listed_with_their_ids() -> None:
    assert label_numbers(["b", "", "a"], ("a", "b"), ids=["x", "y", "z"], where=Path("t")) == [1, -1, 0]
    with refused(DatasetError, "unknown-label") as caught:
        label_numbers(["b", "c", "d"], ("a", "b"), ids=["x", "y", "z"], where=Path("t"))
    assert "y: 'c', z: 'd'" in str(caught.value)


@pytest.mark.parametrize(
    ("delimiter", "encoding", "end"),
    [(",", "utf-8", "\n"), (";", "utf-8-sig", "\r\n"), ("\t", "utf-16", "\r"), ("|", "utf-16-le-bom", "\n"),
     (";", "utf-16-be-bom", "\r\n"), (",", "utf-32", "\r")],
)  # fmt: skip
def test_tables_of_any_separator_encoding_and_line_end_are_one(
    tmp_path: Path, delimiter: str, encoding: str, end: str
) -> None:
    frame = pd.DataFrame(
        {"path": ["a b.png", "ü.png", "猫.png"], "note": [f"x{delimiter}y", 'q"q', "1,5; 2"], "n": list("012")}
    )
    text = frame.to_csv(index=False, sep=delimiter, lineterminator=end)
    mark, name = ("\ufeff", encoding[:-4]) if encoding.endswith("-bom") else ("", encoding)
    (tmp_path / "t.csv").write_bytes((mark + text).encode(name))
    found, notes = open_table(tmp_path / "t.csv")
    assert found.to_dict("list") == frame.to_dict("list")
    assert any("separated by" in note for note in notes) == (delimiter != ",")
    assert any("UTF-" in note for note in notes) == (not encoding.startswith("utf-8"))


def test_commas_stay_commas_where_other_marks_do_not_divide_alike(tmp_path: Path) -> None:
    rows = ["id,label", "a;b,1", "c;d;e,2", "f|g,3"]
    assert open_table(write(tmp_path / "t.csv", "\n".join(rows)))[0]["id"].tolist() == ["a;b", "c;d;e", "f|g"]
    assert open_table(write(tmp_path / "u.csv", "id\na\nb\n"))[0]["id"].tolist() == ["a", "b"]


def test_an_encoding_that_does_not_say_its_name_is_refused_with_what_to_type(tmp_path: Path) -> None:
    with refused(DatasetError, "table-encoding") as caught:
        open_table(write(tmp_path / "a.csv", "id\ncafé\n", "cp1252"))
    assert "iconv -f WINDOWS-1252 -t UTF-8 'a.csv'" in str(caught.value.fix)
    with refused(DatasetError, "table-encoding") as caught:
        open_table(write(tmp_path / "a.csv", "id\nx\n", "utf-16-le"))
    assert "iconv -f UTF-16LE" in str(caught.value.fix)


def test_a_workbook_is_read_as_its_table(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl", reason="the extra excel is not installed")
    book = openpyxl.Workbook()
    for row in (["path", "label", "age", ""], ["a.png", 1, 61.5, None], [None, None, None], ["b.png", 0.0, None, None]):
        book.active.append(row)
    book.create_sheet("legend").append(["what"])
    book.save(tmp_path / "t.xlsx")
    found, notes = open_table(tmp_path / "t.xlsx")
    assert found.to_dict("list") == {"path": ["a.png", "b.png"], "label": ["1", "0"], "age": ["61.5", ""]}
    assert notes == ["of 2 sheets of t.xlsx the first is read, 'Sheet'"]
    (tmp_path / "t.xlsx").write_bytes(b"PK\3\4 no workbook")
    with refused(DatasetError, "table-unreadable"):
        open_table(tmp_path / "t.xlsx")


def test_a_workbook_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (tmp_path / "t.xlsx").write_bytes(b"")
    with refused(DatasetError, "package-missing") as caught:
        open_table(tmp_path / "t.xlsx")
    assert "embcache[excel]" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("texts", "name"),
    [
        (["Me\u0301nie\u0300re", "M\u00e9ni\u00e8re"], "M\u00e9ni\u00e8re"),
        (["no finding", "no  finding", "no\u00a0finding", " no finding\u200b", "no\u2003finding"], "no finding"),
        (["nor\u00admal", "normal", "\ufeffnormal", "normal\u2060"], "normal"),
        (["1", "1.0", "1.00"], "1"),
        (["-1", "-1.0"], "-1"),
        (["می\u200cخواهم", "میخواهم"], "میخواهم"),
    ],
)
def test_texts_that_differ_in_nothing_one_sees_are_one(texts: list[str], name: str) -> None:
    found = unify([*texts, texts[-1], name])
    assert set(found.values()) == {name}
    (note,) = spelling_notes([*texts, texts[-1], name], found)
    assert note.isprintable()
    assert all(ascii(text) in note for text in texts[:4])


def test_texts_that_differ_stay_apart_and_joiners_that_spell_stay(tmp_path: Path) -> None:
    texts = ["1", "01", "10", "1.5", "a", "A", "ß", "ss", "x y", "xy", "Ⅳ", "IV", "می\u200cخواهم"]
    assert unify(texts) == {text: text for text in texts}
    assert spelling_notes(texts, unify(texts)) == []
    texts = ["0.0", "2.0"]
    assert spelling_notes(texts, unify(texts)) == ["2 class names are read otherwise: '0.0' as '0', '2.0' as '2'"]


def test_labels_that_may_not_be_meant_are_told() -> None:
    def told(labels: list[str]) -> list[str]:
        return label_notes(labels, class_order(labels))

    assert told(["normal", "melanoma, in situ", "pre/post", "a+b"]) == []
    assert any("'nan' (2 images) reads like a missing value" in note for note in told(["a", "b", "nan", "nan"]))
    (several,) = told(["pneumonia|effusion", "pneumonia", "none"])
    assert "1 labels seem to hold several findings (pneumonia|effusion)" in several
    assert len(told(["edema, mass", "mass, edema", "edema"])) == 1
    assert any("labels are decimals" in note for note in told(["0.37", "0.5", "1,25", "0"]))
    (single,) = told([f"c{i}" for i in range(15)] + ["d", "d"])
    assert "15 of 16 classes have one image" in single
    assert "--label-column" in single


def test_a_matrix_of_values_is_no_label_file(tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text(",".join(f"c{k}" for k in range(10_001)) + "\n")
    with refused(DatasetError, "table-too-wide"):
        open_table(file)
