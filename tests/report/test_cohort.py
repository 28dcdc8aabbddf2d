"""Flow of images, case mix, what may not be named, and the checklist, against counts made by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from embcache.data.dataset import ImageDataset
from embcache.probe.probe import probe_features
from embcache.report.cohort import UNKNOWN, Cohort, checklist, cohort
from embcache.report.collect import (
    HIDDEN,
    Part,
    choose,
    hidden_columns,
    make_tasks,
    notes_of,
    secret_words,
    shown_columns,
    without_names,
)
from tests.probe.build import make_dataset, make_features, put_store


def _dataset() -> ImageDataset:
    """80, 20 and 20 images, two of each patient; 4 are unlabeled, and 4 of patients of the other parts."""
    labels = np.arange(120) // 2 % 2
    labels[:4] = -1
    groups = [f"mr-{k // 2}" for k in range(120)]
    groups[6] = groups[7] = groups[80]
    groups[8] = groups[9] = groups[100]
    ds = make_dataset(labels, groups, ["train"] * 80 + ["val"] * 20 + ["test"] * 20, n_classes=2)
    table = ds.table.assign(
        sex=["F" if k % 4 < 2 else "M" for k in range(120)],
        ward=[f"w{min(k // 40, 2)}" if k % 10 else "" for k in range(120)],
        chart=[f"c{k // 2 % 20}" if k < 20 else "" for k in range(120)],  # one patient each
        who=[groups[k] if k < 12 else "" for k in range(120)],
    )
    return replace(ds, table=table)


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Part:
    home, ds = tmp_path_factory.mktemp("home"), _dataset()
    put_store(home, ds, "strong", make_features(ds, shift=2.0), bad={"i10": "cut short", "i11": "cut short"})
    options = {"folds": 2, "home": home, "exclude_test_overlap": True, "head": "linear"}
    results = [probe_features(ds, ["strong"], subset=size, **options) for size in (12, 24)]
    return Part(ds.name, ds, "live", "", tuple(results), tuple(make_tasks(results)), 0, home)


@pytest.fixture(scope="module")
def found(part: Part) -> Cohort:
    found = cohort(part, choose(part.tasks[0], part, resamples=50), ids=True)
    assert found is not None
    return found


def test_every_image_is_in_one_box_of_the_flow(found: Cohort) -> None:
    assert [(s.words.split(",")[0], s.images, s.groups, s.role) for s in found.steps] == [
        ("listed in the source", 120, 58, "there"),
        ("could not be read", 2, 1, "out"),
        ("without a label", 4, 2, "out"),
        ("of patients who are in the test set", 2, 1, "out"),
        ("of patients who are in the validation split", 2, 1, "out"),
        ("used", 110, 55, "there"),
        ("training", 70, 35, "used"),
        ("validation", 20, 10, "used"),
        ("test set", 20, 10, "used"),
    ]
    assert "12 + 20, 24 + 20" in found.steps[6].detail
    assert found.grouped
    assert found.shared == 0


def test_case_mix_counts_each_part(part: Part, found: Cohort) -> None:
    assert found.mix is not None
    assert found.mix.headers == ("", "", "training", "validation", "test")
    rows = {row[:2]: row[2:] for row in found.mix.rows}
    assert rows["images", ""] == ("70", "20", "20")
    assert rows["patients", ""] == ("35", "10", "10")
    assert part.dataset is not None
    test = part.dataset.table["split"] == "test"
    female = int((part.dataset.table["sex"][test] == "F").sum())
    assert rows["sex", "F"][2] == f"{female} ({female / 20:.1%})"
    assert ("", "(no value)") in rows
    assert not {"chart", "who"} & {name for name, _ in rows}  # columns that name patients


def test_columns_that_name_patients_make_no_subgroups(part: Part) -> None:
    assert part.dataset is not None
    assert [c.name for c in shown_columns(part.dataset, secret_words(part, ids=True))] == ["sex", "ward"]
    named = part.dataset.table.assign(
        PatientName=["Meier", "Huber"] * (len(part.dataset) // 2), birth_date="1954-02-03"
    )
    ds = replace(part.dataset, table=named)
    assert [c.name for c in shown_columns(ds, set())] == ["sex", "ward"]
    assert "PatientName, birth_date" in hidden_columns(ds)[0]


def test_patients_are_named_on_no_page_and_images_only_where_ids_may_be(part: Part) -> None:
    notes = ["3 images are copies", "seen in mr-20", "identical: i7, i8"]
    assert without_names(notes, part, ids=True) == ["3 images are copies", "identical: i7, i8", HIDDEN]
    assert without_names(notes, part, ids=False) == ["3 images are copies", HIDDEN]


def test_a_fact_of_several_folds_and_runs_is_one_line(part: Part) -> None:
    result = part.results[0]
    notes = (
        "validation of fold 0 has no image of a",
        "validation of fold 1 has no image of a",
        "a note",
        "subset F: classes are not balanced",
        "3 unreadable images left out",
        "8 training images share 3 groups with the official test set; --exclude-test-overlap leaves them out",
    )
    results = (replace(result, notes=notes), replace(result, notes=notes, head="knn"))
    told = notes_of(replace(part, results=results), (), ids=True)
    assert told == [
        "validation of folds 0, 1 has no image of a",
        "a note",
        "subset F: classes are not balanced (linear, knn)",
    ]


def test_the_checklist_says_what_is_known_and_what_is_not(part: Part, found: Cohort) -> None:
    choices = choose(part.tasks[0], part, resamples=50)
    table = checklist(part, part.tasks[0], choices, found, None, attended=False)
    assert table is not None
    answers = {row[2]: row[3] for row in table.rows}
    assert "2 could not be read; 4 without a label" in answers["who was included and excluded"]
    assert "test set, the official one: 20 images of 10 patients" in answers["flow of patients and images"]
    assert answers["dates, setting, acquisition, treatments"] == UNKNOWN
    assert "patients (or other groups)" in answers["level at which parts are disjoint"]
    numbers = {n for row in table.rows for n in row[0].replace("–", ", ").split(", ") if n}
    assert {"C1", "C20", "C35", "C36", "C44"} <= numbers
    assert checklist(part, part.tasks[0], [], found, None, attended=False) is None
