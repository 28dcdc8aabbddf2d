"""Subgroups and targets from a dataset's own columns."""

from __future__ import annotations

import numpy as np
import pandas as pd

from embcache.data.classes import column_values, columns, retarget
from embcache.data.dataset import ImageDataset
from embcache.errors import DatasetError, UsageError
from tests.refusal import refused


def dataset(split: list[str] | None = None, **own: list[object]) -> ImageDataset:
    n = len(next(iter(own.values())))
    ids = [f"i{k}" for k in range(n)]
    table = pd.DataFrame(
        {
            "id": ids,
            "path": ids,
            "place": "",
            "label": np.arange(n, dtype=np.int64) % 2,
            "group": ids,
            "split": split or ["train"] * n,
            **own,
        }
    )
    return ImageDataset("toy", None, ("cat", "dog"), "auc", "generic", table, leaderboard_alpha=0.5)


def test_text_is_taken_value_by_value_and_empty_is_none() -> None:
    column = column_values(dataset(sex=["M", "F", "", "M", "nan"]), "sex")
    assert column.values == ("F", "M")
    assert column.of.tolist() == ["M", "F", "", "M", ""]


def test_ages_come_in_bands_and_impossible_ones_are_none() -> None:
    ages: list[object] = [0, 17.9, 18, 39, 40, 59, 60, 79, 80, 120, 414, -1, float("nan")]
    column = column_values(dataset(age=ages), "age")
    expected = ["<18", "<18", "18-39", "18-39", "40-59", "40-59", "60-79", "60-79", "80+", "80+", "", "", ""]
    assert column.of.tolist() == expected
    assert column.values == ("<18", "18-39", "40-59", "60-79", "80+")
    assert column.notes == ("2 images have no age: theirs is below 0 or above 120",)


def test_other_numbers_are_cut_at_quarters_of_the_training_images() -> None:
    values: list[object] = [*range(1, 101), 1000, 1001]
    ds = dataset(split=["train"] * 100 + ["test"] * 2, width=values)
    column = column_values(ds, "width")
    assert column.values == ("up to 25", "over 25 to 50", "over 50 to 75", "over 75")
    counts = pd.Series(column.of).value_counts()
    assert counts.to_dict() == {"up to 25": 25, "over 25 to 50": 25, "over 50 to 75": 25, "over 75": 27}


def test_official_test_images_move_no_quarter_but_rows_of_split_train_do() -> None:
    values: list[object] = list(range(1, 101))
    official = dataset(split=["train"] * 60 + ["test"] * 40, width=values)
    assert column_values(official, "width").values[0] == "up to 15"
    # Without an official test split every row is of split train, those of a local test set too.
    assert column_values(dataset(width=values), "width").values[0] == "up to 25"
    assert any("with the split train" in note for note in column_values(official, "width").notes)


def test_few_distinct_numbers_are_taken_as_they_are_in_their_order() -> None:
    column = column_values(dataset(grade=[10.0, 2.0, 2.0, float("nan")]), "grade")
    assert column.values == ("2", "10")
    assert column.of.tolist() == ["10", "2", "2", ""]


def test_an_unknown_column_is_told_with_those_there_are() -> None:
    with refused(UsageError, "unknown-column") as caught:
        column_values(dataset(sex=["M", "F"], age=[1, 2]), "sexx")
    assert caught.value.expected == "sex, age"
    assert columns(dataset(sex=["M", "F"])) == ("sex",)
    with refused(UsageError, "unknown-column"):
        column_values(dataset(sex=["M", "F"]), "label")


def test_names_and_empty_columns_are_refused() -> None:
    names: list[object] = [f"p{k}" for k in range(21)]
    with refused(DatasetError, "column-values"):
        column_values(dataset(report=names), "report")
    with refused(DatasetError, "column-values"):
        column_values(dataset(patient_id=[str(k) for k in range(21)]), "patient_id")
    with refused(DatasetError, "column-empty"):
        column_values(dataset(sex=["", "nan"]), "sex")


def test_a_column_becomes_the_label_and_all_else_stays() -> None:
    ds = dataset(split=["train", "train", "train", "test"], view=["AP", "PA", "", "AP"])
    other = retarget(ds, "view")
    assert other.class_names == ("AP", "PA")
    assert other.labels.tolist() == [0, 1, -1, 0]
    assert (other.metric, other.leaderboard_alpha, other.name) == ("auc", None, "toy")
    assert other.table.drop(columns="label").equals(ds.table.drop(columns="label"))
    assert other.notes[0] == "the labels are the column 'view', not those of the dataset"
    assert "1 of 4 images have no value" in other.notes[-1]
    assert ds.labels.tolist() == [0, 1, 0, 1]


def test_more_values_are_scored_by_macro_auc_and_a_value_of_test_images_only_is_none() -> None:
    other = retarget(dataset(split=["train"] * 3 + ["test"], site=["x", "y", "z", "w"]), "site")
    assert (other.metric, other.class_names) == ("macro_auc", ("x", "y", "z"))
    assert other.labels.tolist() == [0, 1, 2, -1]


def test_one_value_alone_cannot_be_told_apart() -> None:
    with refused(DatasetError, "too-few-classes"):
        retarget(dataset(sex=["M", "M", ""]), "sex")
