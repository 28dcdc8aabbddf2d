"""The commands that use the models of a run: answers on stdout, the rest on stderr, files as named."""

from __future__ import annotations

from pathlib import Path

import pytest

from embcache.data.dataset import load_dataset
from embcache.errors import UsageError
from embcache.extract.extract import extract_features
from embcache.probe.probe import probe_features
from tests.commands.shell import answer, embcache
from tests.data.pictures import write_image
from tests.extract.conftest import draw
from tests.maintain.conftest import flip
from tests.probe.build import make_features, put_store
from tests.refusal import refused

OWN = "tests.plugin.embcache_plugin:tiny"


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
    data = answer("submit", "--run", run)
    assert data["filled"] == {"x2": "broken"}
    assert "sample_submission.csv is missing" in data["notes"][0]
    (scored,) = answer("kaggle-score", "--run", run, "--score", "0.9/0.8", "--score", "0.9/0.8")
    assert scored["mean"] == pytest.approx(0.51 * 0.9 + 0.49 * 0.8)  # equal scores of two folds count twice
    assert scored["id"] in embcache("kaggle-score", "--run", run, "--score", "0.9/0.8,0.7/0.6").stdout


@pytest.fixture
def predicting(home: Path, tmp_path: Path) -> tuple[str, Path]:
    """A run on twenty small images by a backbone of their own code, and their folder."""
    root = tmp_path / "mine"
    for k in range(20):
        draw(root / ("a" if k % 2 else "b") / f"{k:02}.png", k, size=32)
    ds = load_dataset("folder", root, name="mine")
    extract_features(OWN, ds, home=home)
    return probe_features(ds, OWN, folds=2, subset=8, home=home).id, root


def test_predictions_go_to_stdout_or_a_file_and_failures_to_stderr(
    predicting: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, root = predicting
    (root / "a" / "text.png").write_text("x")
    words = ("predict", "--run", run, root / "a", "--trust", OWN)
    with refused(UsageError, "untrusted-name"):
        embcache(*words[:4])
    shown = embcache(*words)
    assert len(shown.stdout.splitlines()) == 12
    assert f"not read: {root}/a/text.png: not an image that Pillow reads" in shown.stderr
    assert f"10 of 11 images predicted by {run}, 2 folds" in shown.stderr
    assert shown.stderr.splitlines()[-1] == f"next: embcache results {run}"
    written = embcache(*words, "--output", tmp_path / "p.csv", "--folds", "0,1")
    assert written.stdout == ""
    assert (tmp_path / "p.csv").read_text() == shown.stdout
    rows = answer(*words)
    assert len(rows) == 11
    assert sum(1 for row in rows if row["error"]) == 1
    assert rows[0]["p_a"] + rows[0]["p_b"] == pytest.approx(1)
    monkeypatch.setattr("embcache.results.predict.recipe_network", None)  # refused before anything is computed
    with refused(UsageError, "file-not-written"):
        embcache(*words, "--output", tmp_path / "absent" / "p.csv")
    with refused(UsageError, "not-a-number"):
        embcache(*words, "--folds", "a")
    with refused(UsageError, "weights-backbone"):
        embcache(*words, "--weights", "dino=x.pth")


def test_a_store_of_own_code_is_verified_and_repaired_where_the_code_is_named(
    predicting: tuple[str, Path], home: Path
) -> None:
    with refused(UsageError, "backbone-not-imported"):
        embcache("verify", "--sample", 3)
    (store,) = answer("verify", "--sample", 3, "--backbone", OWN)["stores"]
    assert (store["sample"]["ok"], store["sample"]["difference"]) == (True, 0)
    (damaged,) = home.glob("mine/*/shards/000000/commit.json")
    flip(damaged, 20)
    refusal = embcache("verify", "--repair")
    assert refusal.exit_code == 1
    assert f"--backbone {OWN}" in refusal.stderr
    told = embcache("verify", "--repair", "--backbone", OWN, "--json", "-")
    assert told.exit_code == 0, told.stderr
    assert embcache("verify").exit_code == 0
