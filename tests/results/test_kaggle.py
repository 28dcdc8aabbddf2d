"""Files for Kaggle: the sample submission's ids in its order, every one; and the scores that come back."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embcache.data.dataset import ImageDataset, load_dataset
from embcache.errors import UsageError
from embcache.probe.probe import probe_features
from embcache.results.kaggle import make_submission, official_command, save_kaggle_scores
from embcache.runs.folders import find_run_anywhere, list_results, load_predictions, load_result, run_id, save_run
from tests.data.pictures import write_image
from tests.probe.build import make_dataset, make_features, put_store
from tests.refusal import refused


def aptos(root: Path) -> ImageDataset:
    """Thirty graded images (grade 2 the commonest) and four of the test set, one of which the sample misses."""
    grades = [0, 1, 2, 3, 4] * 5 + [2] * 5
    for k in range(30):
        write_image(root / "train_images" / f"t{k}.png", k)
    for k in range(4):
        write_image(root / "test_images" / f"x{k}.png", 100 + k)
    (root / "train.csv").write_text("id_code,diagnosis\n" + "".join(f"t{k},{y}\n" for k, y in enumerate(grades)))
    (root / "test.csv").write_text("id_code\n" + "".join(f"x{k}\n" for k in range(4)))
    (root / "sample_submission.csv").write_text("id_code,diagnosis\r\nx2,0\r\ngone,0\r\nx0,0\r\nx1,0\r\n")
    return load_dataset("aptos", root)


@pytest.fixture
def run(home: Path, tmp_path: Path) -> str:
    ds = aptos(tmp_path / "data" / "aptos")
    put_store(home, ds, "toy", make_features(ds), bad={"x1": "cannot be decoded"})
    return probe_features(ds, "toy", folds=2, subset=10, home=home, test="official").id


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_files_hold_the_samples_ids_in_its_order_and_each_folds_grades(home: Path, run: str, tmp_path: Path) -> None:
    made = make_submission(run, tmp_path / "out", home=home)
    assert [file.name for file in made.files] == [f"{run}-fold0.csv", f"{run}-fold1.csv"]
    table = load_predictions(find_run_anywhere(run, home)[1])
    for fold, file in enumerate(made.files):
        header, *lines = rows(file)
        assert header == ["id_code", "diagnosis"]
        assert [line[0] for line in lines] == ["x2", "gone", "x0", "x1"]
        own = table[table["fold"] == fold].set_index("id")[[f"p_{c}" for c in range(5)]]
        expected = {i: str(int(own.loc[i].to_numpy().argmax())) for i in ("x0", "x2")}
        assert dict(lines) == {**expected, "gone": "2", "x1": "2"}  # 2 is the commonest grade
        assert file.read_bytes().endswith(b"\n")
        assert b"\r" not in file.read_bytes()
    assert made.filled == {"gone": "the image is missing", "x1": "cannot be decoded"}
    assert any("1 test images are not in sample_submission.csv" in note and "x3" in note for note in made.notes)


def test_only_runs_on_a_leaderboards_test_set_are_handed_in(home: Path, tmp_path: Path) -> None:
    ds = aptos(tmp_path / "data" / "aptos")
    put_store(home, ds, "toy", make_features(ds))
    local = probe_features(ds, "toy", folds=2, subset=10, lr=1e-2, home=home)
    with refused(UsageError, "local-test") as caught:
        make_submission(local.id, tmp_path / "out", home=home)
    asked = "--dataset aptos --head linear --subset 10 --backbone toy --test official --folds 2"
    assert caught.value.fix == f"embcache probe {asked} --lr 0.01"
    schedule = {"lr": 1e-3, "batch_size": 16, "max_epochs": 3}
    tuned = replace(local, kind="finetune", request={**local.request, "lr": [1e-3], "schedule": schedule})
    assert official_command(tuned) == f"embcache finetune {asked} --max-epochs 3 --batch-size 16"
    toy = make_dataset(np.tile([0, 1], 40))
    put_store(home, toy, "toy", make_features(toy))
    other = probe_features(toy, "toy", folds=2, subset=10, home=home).id
    with refused(UsageError, "no-competition"):
        make_submission(other, tmp_path / "out", home=home)
    assert not (tmp_path / "out").exists()


def test_scores_become_a_result_of_their_own(home: Path, run: str) -> None:
    result = save_kaggle_scores(run, [(0.80, 0.70), (0.90, 0.60)], home=home)
    expected = [0.85 * 0.80 + 0.15 * 0.70, 0.85 * 0.90 + 0.15 * 0.60]
    assert [fold.score for fold in result.folds] == pytest.approx(expected)
    assert result.folds[1].metrics == {"score": pytest.approx(expected[1]), "private": 0.9, "public": 0.6}
    assert (result.mean, result.std) == pytest.approx((np.mean(expected), np.std(expected, ddof=1)))
    assert (result.kind, result.interval, result.subset) == ("kaggle", None, "10")
    assert result.request["of"] == find_run_anywhere(run, home)[0].request
    saved, path = find_run_anywhere(result.id, home)
    assert saved == result
    assert load_result(path) == result
    assert len(load_predictions(path)) == len(load_predictions(find_run_anywhere(run, home)[1]))


@pytest.mark.parametrize(
    ("scores", "code"),
    [
        ([(0.8, 0.7)], "score-count"),
        ([(0.8, 0.7), (1.2, 0.7)], "option-bounds"),
        ([(0.8, 0.7), (float("nan"), 0.7)], "option-bounds"),
    ],
)
def test_wrong_scores_are_refused(home: Path, run: str, scores: list[tuple[float, float]], code: str) -> None:
    with refused(UsageError, code):
        save_kaggle_scores(run, scores, home=home)
    assert not [result for result in list_results(home) if result.kind == "kaggle"]


def test_a_leaderboards_result_is_no_run_to_hand_in(home: Path, run: str, tmp_path: Path) -> None:
    scored = save_kaggle_scores(run, [(0.8, 0.7), (0.9, 0.6)], home=home)
    with refused(UsageError, "other-classes") as caught:
        make_submission(scored.id, tmp_path / "out", home=home)
    assert caught.value.fix == f"--run {run}"


def test_a_run_of_other_classes_is_no_run_to_hand_in(home: Path, run: str, tmp_path: Path) -> None:
    result, folder = find_run_anywhere(run, home)
    request = {**result.request, "classes": {"mild": "", "severe": ""}}
    other = replace(result, id=run_id(request), request=request)
    save_run(other, load_predictions(folder), [], home)
    with refused(UsageError, "other-classes") as caught:
        make_submission(other.id, tmp_path / "out", home=home)
    assert "without mild, severe" in str(caught.value)


@pytest.mark.shared
@pytest.mark.parametrize(("name", "column"), [("aptos", "id_code"), ("patchcam", "id")])
def test_real_sample_submissions_are_met_line_by_line(
    shared_data: Path, home: Path, tmp_path: Path, name: str, column: str
) -> None:
    ds = load_dataset(name, shared_data / name)
    put_store(home, ds, "toy", make_features(ds, dim=4))
    (home / name / "dataset.parquet").write_bytes(ds.to_parquet_bytes())
    run = probe_features(ds, "toy", folds=2, subset=20, home=home, test="official").id
    made = make_submission(run, tmp_path / "out", home=home)
    sample = rows(shared_data / name / "sample_submission.csv")
    table = load_predictions(find_run_anywhere(run, home)[1])
    for fold, file in enumerate(made.files):
        header, *lines = rows(file)
        assert header == sample[0]
        assert header[0] == column
        ids = [line[0] for line in lines]
        assert ids == [line[0] for line in sample[1:]]
        own = table[table["fold"] == fold].set_index("id").loc[ids]
        p = own[[c for c in own.columns if c.startswith("p_")]].to_numpy(dtype=float)
        assert [float(line[1]) for line in lines] == (p.argmax(1) if name == "aptos" else p[:, 1]).tolist()
    assert made.filled == {}
    assert made.notes == ()
