from pathlib import Path

import pandas as pd
import pytest

from embcache.data.labels import class_order, label_numbers, read_table
from embcache.errors import DatasetError


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def test_text_stays_text_whatever_it_looks_like(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "a.csv", "id,label\r\n007,NA\r\n1e5, null \r\n\r\n"), ["id"])
    assert table.to_dict("list") == {"id": ["007", "1e5"], "label": ["NA", "null"]}


def test_a_byte_order_mark_quotes_and_line_breaks_in_fields_are_read(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "a.csv", 'id,"my, note"\nä,"two\nlines"\n', "utf-8-sig"), ["id"])
    assert table.to_dict("list") == {"id": ["ä"], "my, note": ["two\nlines"]}


def test_tabs_separate_tsv(tmp_path: Path) -> None:
    assert read_table(write(tmp_path / "a.tsv", "id\tx\na,b\t1\n"), ["id"])["id"].tolist() == ["a,b"]


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
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("name,label\na,1\n", "lacks the column 'id'"),
        ("id,label\na,1\nb\n", "row 3 of a label file has 1 fields"),
        ("id,label\na,1,2\n", "has 3 fields"),
        ("id,id\na,b\n", "repeats a column"),
        ('id,label\n"a,1\n', "cannot be read"),
    ],
)
def test_broken_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_table(write(tmp_path / "a.csv", text), ["id"])


def test_other_encodings_and_files_that_are_no_parquet_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot be read"):
        read_table(write(tmp_path / "a.csv", "id\ncafé\n", "latin-1"), ["id"])
    with pytest.raises(DatasetError, match="not a Parquet file"):
        read_table(write(tmp_path / "a.parquet", "id\n"), ["id"])


def test_whole_numbers_are_ordered_by_value_and_names_alphabetically() -> None:
    assert class_order(["10", "2", "", "-1", "2"]) == ("-1", "2", "10")
    assert class_order(["10", "2", "b"]) == ("10", "2", "b")
    assert class_order([]) == ()


def test_unknown_labels_are_listed_with_their_ids() -> None:
    assert label_numbers(["b", "", "a"], ("a", "b"), ids=["x", "y", "z"], where=Path("t")) == [1, -1, 0]
    with pytest.raises(DatasetError, match="unknown label in 2 rows") as caught:
        label_numbers(["b", "c", "d"], ("a", "b"), ids=["x", "y", "z"], where=Path("t"))
    assert "y: 'c', z: 'd'" in str(caught.value)
