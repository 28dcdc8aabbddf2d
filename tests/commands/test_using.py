"""The commands that use a result, as a user types them: answers on stdout, the rest on stderr, files as named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from embcache.commands import compare_command as compare
from embcache.commands import predict_command as predict
from embcache.data.dataset import load_dataset
from embcache.errors import UsageError
from embcache.extract.extract import extract_features
from embcache.probe.probe import probe_features
from tests.data.pictures import write_image
from tests.extract.conftest import draw
from tests.extract.tiny import load_tiny
from tests.probe.build import make_dataset, make_features, put_store
from tests.refusal import refused

app = typer.Typer()
for name, command in (
    ("predict", predict.predict),
    ("submit", predict.submit),
    ("kaggle-score", predict.kaggle_score),
    ("export-head", predict.export_head),
    ("compare", compare.compare),
    ("subgroups", compare.subgroups),
):
    app.command(name)(command)


def embcache(*arguments: object) -> Result:
    """Run a command; an error is raised as it is."""
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.fixture(scope="module")
def made_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    home = tmp_path_factory.mktemp("made") / "home"
    ds = make_dataset(np.tile([0, 1], 60), split=["train"] * 60 + ["test"] * 60)
    ds.table["sex"] = np.where(np.arange(120) % 5 < 2, "F", "M").astype(object)
    ids = []
    for name, shift in (("bad", 0.3), ("good", 3.0)):
        put_store(home, ds, name, make_features(ds, shift=shift))
        ids.append(probe_features(ds, name, folds=2, subset=20, home=home).id)
    return home, ids


@pytest.fixture
def runs(made_runs: tuple[Path, list[str]], home: Path) -> list[str]:
    shutil.copytree(made_runs[0], home)
    return made_runs[1]


def test_compare_prints_a_table_or_data(runs: list[str]) -> None:
    shown = embcache("compare", *runs)
    assert "reference" in shown.stdout
    assert "labels used" in shown.stdout
    assert "labels used" in embcache("subgroups", *runs, "--by", "sex").stdout
    compared = json.loads(embcache("compare", *runs, "--json", "-").stdout)
    assert {row["labels_used"] for row in compared} == {20 + 30}
    assert runs[0] in shown.stdout
    assert "Holm" in shown.stdout
    rows = json.loads(embcache("compare", ",".join(runs), "--json", "-").stdout)
    assert [row["run"] for row in rows] == runs
    assert rows[0]["difference"] is None
    assert rows[1]["difference"]["difference"] > 0


def test_subgroups_prints_a_table_or_data(runs: list[str], tmp_path: Path) -> None:
    shown = embcache("subgroups", runs[0], "--by", "sex", "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["column"], row["value"], row["n_images"]) for row in rows] == [
        ("", "all", 60), ("sex", "F", 24), ("sex", "M", 36),
    ]  # fmt: skip
    assert f"{rows[1]['mean']:.4f}" in shown.stdout


def test_a_head_is_exported_as_two_files(runs: list[str], tmp_path: Path) -> None:
    shown = embcache("export-head", "--run", runs[1], "--output", tmp_path / "out", "--fold", 1)
    assert "classifier.weight" in shown.stdout
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["head.json", "head.safetensors"]
    about = json.loads(embcache("export-head", "--run", runs[1], "-o", tmp_path / "out", "--json", "-").stdout)
    assert about["run"] == runs[1]


def test_a_leaderboard_there_and_back(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "data" / "patchcam"
    for k in range(40):
        write_image(root / "train" / f"t{k}.tif", k)
    for k in range(3):
        write_image(root / "test" / f"x{k}.tif", 100 + k)
    (root / "train_labels.csv").write_text("id,label\n" + "".join(f"t{k},{k % 2}\n" for k in range(40)))
    (root / "sample_submission.csv").write_text("id,label\nx1,0\nx0,0\nx2,0\n")
    ds = load_dataset("patchcam", root)
    put_store(home, ds, "toy", make_features(ds), bad={"x2": "broken"})
    run = probe_features(ds, "toy", folds=2, subset=10, home=home, test="official").id
    monkeypatch.chdir(tmp_path)
    done = embcache("submit", "--run", run)
    assert "filled in: x2: broken" in done.stderr
    assert f"kaggle-score --run {run}" in done.stdout
    lines = (tmp_path / f"submission-{run}" / f"{run}-fold1.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["id", "x1", "x0", "x2"]
    assert lines[-1] == "x2,0.5"
    (sample := next(tmp_path.rglob("sample_submission.csv"))).rename(sample.with_name("elsewhere.csv"))
    done = embcache("submit", "--run", run, "--json", "-")
    data = json.loads(done.stdout)
    assert data["filled"] == {"x2": "broken"}
    assert "sample_submission.csv is missing" in data["notes"][0]
    assert f"note: {data['notes'][0]}" in done.stderr
    (scored,) = json.loads(
        embcache("kaggle-score", "--run", run, "--score", "0.9/0.8", "--score", "0.9/0.8", "--json", "-").stdout
    )
    assert scored["mean"] == pytest.approx(0.51 * 0.9 + 0.49 * 0.8)  # equal scores of two folds count twice
    assert scored["id"] in embcache("kaggle-score", "--run", run, "--score", "0.9/0.8,0.7/0.6").stdout


@pytest.fixture
def predicting(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A run on twenty small images by a tiny network, and their folder."""
    monkeypatch.setattr("embcache.extract.extract.load_backbone", load_tiny)
    root = tmp_path / "mine"
    for k in range(20):
        draw(root / ("a" if k % 2 else "b") / f"{k:02}.png", k, size=32)
    ds = load_dataset("folder", root, name="mine")
    extract_features("random", ds, home=home)
    return probe_features(ds, "random", folds=2, subset=8, home=home).id, root


def test_predictions_go_to_stdout_or_a_file_and_failures_to_stderr(
    predicting: tuple[str, Path], tmp_path: Path
) -> None:
    run, root = predicting
    (root / "a" / "text.png").write_text("x")
    shown = embcache("predict", "--run", run, root / "a")
    assert len(shown.stdout.splitlines()) == 12
    assert f"not read: {root}/a/text.png: not an image that Pillow reads" in shown.stderr
    assert f"10 of 11 images predicted by {run}, 2 folds" in shown.stderr
    written = embcache("predict", "--run", run, root / "a", "--output", tmp_path / "p.csv", "--folds", "0,1")
    assert written.stdout == ""
    assert (tmp_path / "p.csv").read_text() == shown.stdout
    rows = json.loads(embcache("predict", "--run", run, root / "a", "--json", "-").stdout)
    assert len(rows) == 11
    assert sum(1 for row in rows if row["error"]) == 1
    assert rows[0]["p_a"] + rows[0]["p_b"] == pytest.approx(1)


def test_a_bad_request_is_refused_before_anything_is_computed(
    predicting: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, root = predicting
    monkeypatch.setattr("embcache.results.predict.recipe_network", None)
    with pytest.raises(UsageError, match="cannot be written"):
        embcache("predict", "--run", run, root, "--output", tmp_path / "absent" / "p.csv")
    with refused(UsageError, "not-a-number"):
        embcache("predict", "--run", run, root, "--folds", "a")
    with refused(UsageError, "weights-backbone"):
        embcache("predict", "--run", run, root, "--weights", "dino=x.pth")
