"""Columns by their names, and groups: right values are written out by hand, or come from pandas."""

from pathlib import Path

import pandas as pd
import pytest

from embcache.config import DatasetRef
from embcache.data.dataset import ImageDataset, find_dataset, load_dataset, survey_dataset
from embcache.data.groups import UNGROUPED, may_name_people
from embcache.errors import DatasetError, UsageError
from embcache.paths import slug
from tests.data.pictures import write_image
from tests.refusal import refused

N = 24


def table(root: Path, given: dict[str, list[str]], **options: object) -> ImageDataset:
    """A table of N images with labels no, yes, no … and these columns, loaded."""
    root.mkdir(exist_ok=True)
    for i in range(N):
        if not (root / f"{i}.png").is_file():
            write_image(root / f"{i}.png", i, (4, 4))
    frame = {"path": [f"{i}.png" for i in range(N)], "label": ["no", "yes"] * (N // 2)} | given
    pd.DataFrame(frame).to_csv(root / "labels.csv", index=False)
    return load_dataset("folder", root / "labels.csv", **options)


def patients(each: int, letter: str = "p") -> list[str]:
    return [f"{letter}{i // each}" for i in range(N)]


def test_a_column_with_a_usual_name_gives_the_groups_and_is_named(tmp_path: Path) -> None:
    for name in (
        "Patient ID", "patientId", "subject", "case_id", "donor", "WSI", "StudyInstanceUID", "accession number",
        "anonymized_patient_id", "eye id", "group_id",
    ):  # fmt: skip
        ds = table(tmp_path, {name: patients(2)})
        assert ds.groups.tolist() == patients(2)
        assert f"groups are those of the column {name!r} (12 groups); --group-column names another" in ds.notes
        assert UNGROUPED not in ds.notes
        assert ds.table[name].tolist() == patients(2)  # it stays a column of its own


@pytest.mark.parametrize("name", ["site", "patient_age", "study_date", "image_name"])
def test_other_columns_are_no_groups(tmp_path: Path, name: str) -> None:
    ds = table(tmp_path, {"filename" if name == "image_name" else name: patients(2)})
    assert ds.groups.tolist() == ds.ids.tolist()
    assert UNGROUPED in ds.notes


def test_group_itself_always_wins(tmp_path: Path) -> None:
    few = ["a", "b"] * (N // 2)
    assert table(tmp_path / "1", {"patient": patients(2), "group": few}).groups.tolist() == few
    assert table(tmp_path / "2", {"patient": patients(2), "Group": few}).groups.tolist() == few


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (["p"] * N, "it has 1 value"),
        (["case", "control"] * (N // 2), "it follows from the label"),
        (patients(3), "it has 8 values, fewer than 10"),
        (["", "nan", "NA"] * (N // 3), "it has 0 values"),
    ],
)
def test_what_cannot_be_patients_is_not_taken_and_said_so(tmp_path: Path, values: list[str], why: str) -> None:
    ds = table(tmp_path, {"patient id": values})
    assert ds.groups.tolist() == ds.ids.tolist()
    assert f"column 'patient id' is not taken for groups: {why}; --group-column 'patient id' takes it" in ds.notes
    named = load_dataset("folder", tmp_path / "labels.csv", group_column="Patient_ID")
    known = {v for v in values if v.lower() not in ("", "nan", "na")}
    assert set(named.groups) - set(named.ids) == known
    assert UNGROUPED not in named.notes


def test_the_coarsest_of_nested_columns_is_taken(tmp_path: Path) -> None:
    ds = table(tmp_path, {"slide_id": patients(1, "s"), "study": patients(2, "x"), "Patient": patients(2, "q")})
    assert ds.groups.tolist() == patients(2, "q")  # study and patient nest in each other: the usual order decides
    assert any("column 'Patient' (12 groups), in which 'study', 'slide_id' nest" in note for note in ds.notes)


def test_columns_that_do_not_nest_are_an_error_that_lists_them(tmp_path: Path) -> None:
    crossed = [f"s{i % 12}" for i in range(N)]
    with refused(DatasetError, "columns-ambiguous") as caught:
        table(tmp_path, {"patient": patients(2), "slide id": crossed})
    assert "patient (12 values), slide id (12 values)" in str(caught.value)
    assert caught.value.fix == "--group-column patient"
    ds = load_dataset("folder", tmp_path / "labels.csv", group_column="slide id")
    assert ds.groups.tolist() == crossed


def test_no_group_in_words_is_a_group_of_its_own_and_counted(tmp_path: Path) -> None:
    words = ["", "nan", "None", "NULL", "NA", "n/a", "<NA>", " "]
    ds = table(tmp_path, {"group": words + patients(1)[len(words) :]})
    assert ds.groups.tolist() == ds.ids.tolist()[: len(words)] + patients(1)[len(words) :]
    assert "8 of 24 images have no group: each is a group of its own" in ds.notes


def test_an_image_without_patient_stays_with_its_study(tmp_path: Path) -> None:
    lacking = ["" if i % 8 == 0 else p for i, p in enumerate(patients(2))]
    ds = table(tmp_path, {"patient": lacking, "study": patients(2, "s")})
    assert ds.table.groupby("study")["group"].nunique().max() == 1
    assert ds.table.groupby("group")["study"].nunique().max() == 1


def test_groups_are_compared_as_classes_are_and_no_note_names_one(tmp_path: Path) -> None:
    spelled = ["Zo\u00eb", "Zoe\u0308", "Zo\u00eb\u200b", "Zo\u00eb\u00a0"]
    ds = table(tmp_path, {"group": spelled + patients(1)[4:]})
    assert ds.groups.tolist()[:4] == ["Zo\u00eb"] * 4
    assert any("names of groups differ from others only in Unicode form" in note for note in ds.notes)
    assert not any("Zo" in note for note in ds.notes)


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("image_path", "class"), ("Image Index", "Finding Labels"), ("IMG", "target"), ("filepath", "ground_truth"),
    ],
)  # fmt: skip
def test_usual_names_of_path_and_label_are_known_and_named(tmp_path: Path, path: str, label: str) -> None:
    plain = table(tmp_path, {"group": patients(2)})
    frame = pd.read_csv(tmp_path / "labels.csv").rename(columns={"path": path, "label": label})
    frame.to_csv(tmp_path / "renamed.csv", index=False)
    ds = load_dataset("folder", tmp_path / "renamed.csv")
    assert ds.table.equals(plain.table)
    assert any(f"path is {path!r}, label is {label!r}" in note for note in ds.notes)


def test_capitals_in_the_header_lose_no_column(tmp_path: Path) -> None:
    for i in range(N):
        write_image(tmp_path / f"{i}.png", i, (4, 4))
    frame = pd.DataFrame({"Path": [f"{i}.png" for i in range(N)], "Label": ["a", "b"] * 12, "Group": patients(2)})
    frame.assign(Split=["Train", "Train", "TEST", "TEST"] * 6, ID=[f"i{i}" for i in range(N)]).to_csv(
        tmp_path / "t.csv", index=False
    )
    ds = load_dataset("folder", tmp_path / "t.csv")
    assert ds.groups.tolist() == patients(2)
    assert ds.ids.tolist() == [f"i{i}" for i in range(N)]
    assert ds.table["split"].tolist() == ["train", "train", "test", "test"] * 6


def test_a_column_called_like_an_id_or_a_split_must_be_one(tmp_path: Path) -> None:
    ds = table(tmp_path, {"ID": patients(2), "set": ["1", "2"] * 12, "fold": patients(1)})
    assert ds.ids.tolist() == ds.table["path"].tolist()
    assert set(ds.table["split"]) == {"train"}
    assert {"ID", "set", "fold"} <= set(ds.table.columns)
    ds = table(tmp_path, {"image_id": patients(1), "set": ["training", "training", "dev", "dev"] * 6})
    assert ds.ids.tolist() == patients(1)
    assert ds.table["split"].tolist() == ["train", "train", "val", "val"] * 6


def test_two_columns_that_could_be_meant_are_listed(tmp_path: Path) -> None:
    table(tmp_path, {})
    frame = pd.read_csv(tmp_path / "labels.csv")
    frame.rename(columns={"label": "diagnosis"}).assign(target=["x", "y"] * 12).to_csv(tmp_path / "t.csv", index=False)
    with refused(DatasetError, "columns-ambiguous") as caught:
        load_dataset("folder", tmp_path / "t.csv")
    assert "diagnosis, target" in str(caught.value)
    assert "--label-column diagnosis" in str(caught.value)
    assert load_dataset("folder", tmp_path / "t.csv", label_column="target").class_names == ("x", "y")


def test_a_named_column_that_is_not_there_and_a_key_that_is_no_role_are_refused(tmp_path: Path) -> None:
    table(tmp_path, {"patient": patients(2)})
    with refused(UsageError, "unknown-column"):
        load_dataset("folder", tmp_path / "labels.csv", group_column="patiant")
    with refused(UsageError, "unknown-option"):
        load_dataset("folder", tmp_path / "labels.csv", patient_column="x")
    write_image(tmp_path / "f" / "a" / "1.png", 1)
    write_image(tmp_path / "f" / "b" / "2.png", 2)
    with refused(UsageError, "columns-of-folders"):
        load_dataset("folder", tmp_path / "f", group_column="patient")


def test_a_published_layout_has_its_own_columns(tmp_path: Path) -> None:
    from tests.data import test_pneumonia

    root = test_pneumonia.write_layout(tmp_path)
    with refused(UsageError, "columns-published"):
        load_dataset("pneumonia", root, group_column="x")


def test_columns_that_were_named_are_remembered_with_the_snapshot(tmp_path: Path, home: Path) -> None:
    ds = table(
        tmp_path,
        {"patient": patients(2), "arm": patients(8, "a"), "label": ["No", "no", "yes"] * 8},
        group_column="arm",
        merge_class=["No+no=none"],
    )
    assert (ds.groups.tolist(), ds.class_names) == (patients(8, "a"), ("none", "yes"))
    folder = home / slug(ds.name)
    folder.mkdir(parents=True)
    (folder / "dataset.parquet").write_bytes(ds.to_parquet_bytes())
    live, source = find_dataset(ds.name)
    assert (source, live.groups.tolist(), live.class_names) == ("live", ds.groups.tolist(), ds.class_names)
    other, _ = find_dataset(ds.name, DatasetRef(group_column="patient"))
    assert other.groups.tolist() == patients(2)
    assert other.class_names == ds.class_names


@pytest.mark.parametrize(
    ("column", "people"),
    [
        *((name, True) for name in ("Patient ID", "PatientName", "PatientBirthDate", "name", "MRN", "AccessionNumber",
                                    "subject", "Study Instance UID", "Referring Physician", "date of birth", "dob")),
        *((name, False) for name in ("Patient Age", "Patient Gender", "sex", "View Position", "scanner", "site", "year",
                                     "class name", "manufacturer")),
    ],
)  # fmt: skip
def test_columns_that_may_name_people(column: str, people: bool) -> None:
    assert may_name_people(column) is people


def test_a_split_that_is_not_known_is_refused_or_told(tmp_path: Path) -> None:
    values = ["Train", "TEST", "holdout"] * (N // 3)
    with refused(DatasetError, "unknown-split"):
        table(tmp_path, {"Split": values})
    ds = table(tmp_path, {"set": values})
    assert set(ds.table["split"]) == {"train"}
    assert "not taken for the split, as not all values are train, val or test: set" in ds.notes


def test_only_images_that_are_alone_are_said_to_be(tmp_path: Path) -> None:
    pid = patients(2)
    pid[0] = pid[2] = pid[3] = ""  # the study of the first goes on with p0, that of the others is theirs alone
    study = [f"s{i // 2}" for i in range(N)]
    study[3] = ""
    ds = table(tmp_path, {"patient": pid, "study": study})
    size = ds.table["group"].value_counts()
    assert size[ds.groups[[0, 2, 3]]].tolist() == [2, 1, 1]
    assert f"2 of {N} images have no group: each is a group of its own" in ds.notes
    assert f"1 of {N} images lack it: they are in the group that 'study' gives" in ds.notes


def test_columns_named_for_a_cached_name_count_where_its_root_is_loaded(tmp_path: Path, home: Path) -> None:
    ds = table(tmp_path / "a", {"pid0": patients(2), "site": patients(12)}, name="foo", group_column="pid0")
    (home / "foo").mkdir(parents=True)
    (home / "foo" / "dataset.parquet").write_bytes(ds.to_parquet_bytes())
    for root in (None, tmp_path / "a" / "labels.csv"):
        assert find_dataset("foo", DatasetRef(data_root=root), home)[0].table["group"].nunique() == N // 2
    assert load_dataset("foo", home=home, group_column="site").table["group"].nunique() == 2
    table(tmp_path / "b", {"patient": patients(1)})
    for loaded in (
        find_dataset("foo", DatasetRef(data_root=tmp_path / "b" / "labels.csv"), home)[0],
        find_dataset("folder", DatasetRef(data_root=tmp_path / "b" / "labels.csv", name="foo"), home)[0],
        survey_dataset("foo", DatasetRef(data_root=tmp_path / "b" / "labels.csv"), home),
    ):
        assert loaded.name == "foo"
        assert loaded.table["group"].nunique() == N
        assert any(note.startswith("--group-column pid0, as foo was read from") for note in loaded.notes)


def test_images_beside_a_table_that_it_does_not_name_are_counted(tmp_path: Path) -> None:
    for i in range(6):
        write_image(tmp_path / "images" / f"{i}.png", i)
    (tmp_path / "images" / "7.svs").write_bytes(b"x")
    rows = [f"images/{i}.png,{'ab'[i % 2]}" for i in range(4)]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]))
    notes = load_dataset("folder", tmp_path).notes
    told = "2 images beside the table are not named in it and are left out (images/4.png, images/5.png)"
    assert told in notes
    assert any(note.endswith("left out: 1 .svs") for note in notes)


def test_groups_that_may_not_be_what_they_seem_are_noted(tmp_path: Path) -> None:
    pid = patients(1)
    pid[1], pid[2], pid[3] = pid[0].upper(), "unknown", "unknown"
    notes = table(tmp_path, {"patient": pid}).notes
    assert "2 groups differ from another only in letter case: each is a group of its own" in notes
    assert "2 images are one group called 'unknown': if that stands for not known, leave such cells empty" in notes
