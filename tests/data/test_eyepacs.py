"""EyePACS's label files; counts are those of Kaggle's competition of 2015."""

from pathlib import Path

import pytest

from embcache.data.dataset import load_dataset
from embcache.data.published import find_layout
from embcache.errors import DatasetError
from tests.data.pictures import write_image
from tests.refusal import refused

TRAIN, TEST = (25810, 2443, 5292, 873, 708), (39533, 3762, 7861, 1214, 1206)


def write_layout(root: Path) -> Path:
    rows = {"10_left": 0, "10_right": 1, "13_left": 2, "13_right": 3, "15_left": 4}
    for i, name in enumerate(rows):
        write_image(root / "train" / f"{name}.jpeg", i)
    for i, name in enumerate(["1_left", "1_right"]):
        write_image(root / "test" / f"{name}.jpeg", 10 + i)
    (root / "trainLabels.csv").write_text("image,level\n" + "".join(f"{i},{y}\n" for i, y in rows.items()))
    (root / "sampleSubmission.csv").write_text("image,level\n1_left,0\n1_right,0\n")
    return root


def test_grades_are_ordered_and_both_eyes_of_a_patient_are_one_group(tmp_path: Path) -> None:
    ds = load_dataset("eyepacs", write_layout(tmp_path))
    assert (ds.kind, ds.metric, ds.augment, ds.task.loss) == ("ordinal", "kappa", "fundus", "softmax")
    assert ds.labels.tolist() == [0, 1, 2, 3, 4, -1, -1]
    assert ds.groups.tolist() == ["10", "10", "13", "13", "15", "1", "1"]
    assert load_dataset("eyepacs", tmp_path, task="ordinal").task.loss == "cumulative"


def test_the_solution_labels_the_test_images(tmp_path: Path) -> None:
    write_layout(tmp_path)
    (tmp_path / "retinopathy_solution.csv").write_text("image,level,Usage\n1_left,2,Public\n1_right,0,Private\n")
    ds = load_dataset("eyepacs", tmp_path)
    assert ds.labels.tolist() == [0, 1, 2, 3, 4, 2, 0]
    assert ds.table["split"].tolist() == ["train"] * 5 + ["test"] * 2
    (tmp_path / "retinopathy_solution.csv").write_text("image,level,Usage\n1_left,7,Public\n")
    with refused(DatasetError, "unknown-label"):
        load_dataset("eyepacs", tmp_path)


def test_label_files_of_the_published_size_give_the_published_counts(tmp_path: Path) -> None:
    for file, counts, first in (("trainLabels.csv", TRAIN, 0), ("retinopathy_solution.csv", TEST, 50_000)):
        grades = [y for y, n in enumerate(counts) for _ in range(n)]
        rows = [f"{first + k // 2}_{('left', 'right')[k % 2]},{y},Public" for k, y in enumerate(grades)]
        (tmp_path / file).write_text("\n".join(["image,level,Usage", *rows, ""]))
    ds = find_layout("eyepacs").read(tmp_path, "eyepacs")
    assert [len(ds.select(split)) for split in ("train", "test")] == [35_126, 53_576]
    assert (ds.task.counts(ds.select("train").labels), ds.task.counts(ds.select("test").labels)) == (TRAIN, TEST)
    assert ds.table["group"].nunique() == (35_126 + 53_576) // 2


@pytest.mark.parametrize("name", ["trainLabels.csv", "train/10_left.jpeg"])
def test_what_is_not_there_is_an_error(tmp_path: Path, name: str) -> None:
    (write_layout(tmp_path) / name).unlink()
    with refused(DatasetError, "dataset-layout" if name.endswith("csv") else "images-missing"):
        load_dataset("eyepacs", tmp_path)
