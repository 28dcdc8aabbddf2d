from pathlib import Path

import pytest

from embcache.data.classes import as_in_run, target_flags
from embcache.data.dataset import load_dataset
from embcache.errors import DatasetError
from tests.data.pictures import write_image
from tests.refusal import refused


def write_layout(root: Path) -> Path:
    rows = {"000c1434d8d7": 2, "001639a390f0": 4, "0024cdab0c1e": 1, "1_left": 0, "1_right": 3}
    for i, name in enumerate(rows):
        write_image(root / "train_images" / f"{name}.png", i)
    for i, name in enumerate(["2_left", "1_other"]):
        write_image(root / "test_images" / f"{name}.png", 10 + i)
    (root / "train.csv").write_text("id_code,diagnosis\n" + "".join(f"{i},{y}\n" for i, y in rows.items()))
    (root / "test.csv").write_text("id_code\n2_left\n1_other\n")
    return root


def test_grades_patients_and_an_unlabeled_test_set(tmp_path: Path) -> None:
    ds = load_dataset("aptos", write_layout(tmp_path))
    assert ds.labels.tolist() == [2, 4, 1, 0, 3, -1, -1]
    assert ds.class_names[2] == "moderate"
    assert ds.groups.tolist()[2:6] == ["0024cdab0c1e", "1", "1", "2"]
    assert ds.table["split"].tolist() == ["train"] * 5 + ["test"] * 2
    assert (ds.metric, ds.leaderboard_alpha, ds.augment) == ("kappa", 0.85, "fundus")


def test_without_test_images_only_a_local_test_is_possible(tmp_path: Path) -> None:
    write_layout(tmp_path)
    for path in (tmp_path / "test_images").iterdir():
        path.unlink()
    ds = load_dataset("aptos", tmp_path)
    assert len(ds) == 5
    assert any("only --test local" in note for note in ds.notes)


@pytest.mark.parametrize(
    ("row", "code"), [("x,1.5", "unknown-label"), ("1_left,0", "duplicate-ids"), ("..,1", "outside-root")]
)
def test_rows_that_cannot_be_are_refused(tmp_path: Path, row: str, code: str) -> None:
    write_layout(tmp_path)
    with (tmp_path / "train.csv").open("a") as file:
        file.write(row + "\n")
    with refused(DatasetError, code):
        load_dataset("aptos", tmp_path)


@pytest.mark.shared
def test_the_layout_at_hand_loads(shared_data: Path) -> None:
    ds = load_dataset("aptos", shared_data / "aptos")
    train = ds.select("train")
    assert [int((train.labels == c).sum()) for c in range(5)] == [173, 59, 143, 29, 18]
    assert len(ds.select("test")) == 60
    assert len(set(train.groups)) == 303
    assert any(note.startswith("35 groups occur in both") for note in ds.notes)


def test_grades_are_ordered_and_cumulative_logits_are_asked_for(tmp_path: Path) -> None:
    ds = load_dataset("aptos", write_layout(tmp_path))
    assert (ds.kind, ds.task.loss, target_flags(ds)) == ("ordinal", "softmax", [])
    other = load_dataset("aptos", tmp_path, task="ordinal")
    assert (other.task.loss, other.leaderboard_alpha, target_flags(other)) == (
        "cumulative",
        0.85,
        ["--task", "ordinal"],
    )
    assert other.whole is not None
    assert other.whole.task.loss == "softmax"  # what a snapshot keeps
    assert as_in_run(ds, {"task": {"kind": "ordinal", "loss": "cumulative"}}).task.loss == "cumulative"
    assert as_in_run(ds, {}) is ds
    assert load_dataset("aptos", tmp_path, task="number").kind == "number"
