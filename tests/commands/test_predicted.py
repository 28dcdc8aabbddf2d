"""`errors`, `plot`, and the sentences of `results` and `curves`, as a user types them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from embcache.errors import EmbcacheError, UsageError
from embcache.probe.probe import probe_features
from embcache.runs.folders import find_run_anywhere, load_predictions
from tests.commands.shell import embcache
from tests.probe.build import make_dataset, make_features, put_store


@pytest.fixture(scope="module")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    home = tmp_path_factory.mktemp("made") / "home"
    ds = make_dataset(np.tile([0, 1], 80), split=["train"] * 80 + ["test"] * 80)
    for backbone, shift in (("good", 2.0), ("weak", 0.0)):
        put_store(home, ds, backbone, make_features(ds, shift=shift))
        results = [probe_features(ds, backbone, folds=3, subset=n, home=home) for n in (12, 40)]
    return home, results[0].id


@pytest.fixture
def run(made_run: tuple[Path, str], home: Path) -> str:
    """Id of a run on two classes, of two backbones at two sizes each."""
    shutil.copytree(made_run[0], home)
    return made_run[1]


def test_errors_writes_the_list_and_says_that_the_images_are_not_there(run: str, home: Path, tmp_path: Path) -> None:
    done = embcache("errors", run)
    folder = home / "toy" / "figures"
    assert [path.name for path in folder.iterdir()] == [f"errors-{run}.csv"]
    assert "no contact sheet: " in done.stdout
    assert f"list: {folder / f'errors-{run}.csv'}" in done.stdout
    rows = list(csv.DictReader((folder / f"errors-{run}.csv").read_text("utf-8").splitlines()))
    table = load_predictions(find_run_anywhere(run, home)[1])
    p = table.groupby("id")[["p_0", "p_1"]].mean()
    wrong = p.to_numpy().argmax(1) != table.groupby("id")["label"].first()
    assert {row["id"] for row in rows} == set(p.index[wrong])
    assert f"{run} gets {wrong.sum()} of 80 test images wrong (mean of 3 models' probabilities)" in done.stdout
    few = embcache("errors", run, "--most", 2, "--groups", "--output", tmp_path / "few.csv", "--json", "-")
    assert len((tmp_path / "few.csv").read_text("utf-8").splitlines()) == 3
    answer = json.loads(few.stdout)
    assert (answer["mistakes"], len(answer["errors"])) == (wrong.sum(), 2)
    assert answer["errors"][0]["group"] == answer["errors"][0]["id"]


def test_errors_names_what_it_cannot_write(run: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="suffix of a file sets its format"):
        embcache("errors", run, "--output", "list.txt")
    with pytest.raises(UsageError, match="cannot be written"):
        embcache("errors", run, "--output", tmp_path / "absent" / "list.csv")


@pytest.mark.parametrize("kind", ["roc", "pr", "confusion", "calibration"])
def test_plot_draws_a_run_in_every_format(kind: str, run: str, home: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"a.{suffix}" for suffix in ("png", "svg", "pdf")]
    done = embcache("plot", run, "--kind", kind, "--output", ",".join(map(str, files)), "--json", tmp_path / "a.json")
    assert [path.read_bytes()[:4] for path in files] == [b"\x89PNG", b"<?xm", b"%PDF"]
    answer = json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert (answer["kind"], answer["positive"]) == (kind, "" if kind == "confusion" else "b")
    assert answer["figures"] == [str(path) for path in files]
    if kind != "confusion":
        assert "positive: b, 40 of 80 test images" in done.stdout


def test_the_curve_has_the_scores_of_the_run_and_any_class_can_be_positive(run: str, home: Path) -> None:
    result, _ = find_run_anywhere(run, home)
    assert result.estimate is not None
    answer = json.loads(embcache("plot", run, "--json", "-").stdout)
    (value,) = answer["values"]
    assert value["mean"]["mean"] == pytest.approx(result.mean)
    assert value["mean"]["new_model"] == pytest.approx(list(result.estimate.new_model or ()))
    assert value["ensemble"]["mean"] == pytest.approx(result.ensemble["estimate"]["mean"])
    other = json.loads(embcache("plot", run, "--positive", "a", "--json", "-").stdout)
    assert other["positive"] == "a"
    assert other["values"][0]["mean"]["mean"] == pytest.approx(result.mean)
    assert (home / "toy" / "figures" / f"roc-{run}.png").is_file()


def test_the_confusion_matrix_counts_the_ensemble(run: str, home: Path) -> None:
    table = load_predictions(find_run_anywhere(run, home)[1])
    p = table.groupby("id")[["p_0", "p_1"]].mean().to_numpy()
    wanted = confusion_matrix(table.groupby("id")["label"].first(), p.argmax(1))
    values = json.loads(embcache("plot", run, "--kind", "confusion", "--json", "-").stdout)["values"]
    assert [[row["predicted"]["a"], row["predicted"]["b"]] for row in values] == wanted.tolist()


def test_plot_refuses_what_it_does_not_know(run: str, tmp_path: Path) -> None:
    for flags, message in (
        (["--kind", "lift"], "unknown --kind"),
        (["--positive", "c"], "no such class"),
        (["--kind", "confusion", "--positive", "b"], "no positive class"),
        (["--output", tmp_path / "a.gif"], "suffix"),
        (["--output", tmp_path / "absent" / "a.png"], "cannot be written"),
    ):
        with pytest.raises(EmbcacheError, match=message):
            embcache("plot", run, *flags)


def test_results_and_curves_say_which_backbone_and_whether_more_labels_help(
    run: str, home: Path, tmp_path: Path
) -> None:
    lines = embcache("results").stdout.splitlines()
    assert lines[-2].startswith(
        "Take good: it scored best on validation with 40 training labels and reaches a test AUC"
    )
    assert "good reaches a test AUC of" in lines[-1]
    figure = tmp_path / "c.png"
    done = embcache("curves", "--metric", "brier,auc", "--figure", figure, "--json", tmp_path / "c.json")
    assert figure.is_file()
    assert "toy (Brier score)" in done.stdout
    answer = json.loads((tmp_path / "c.json").read_text("utf-8"))
    assert [advice["metric"] for advice in answer["advice"]] == ["brier", "auc"]
    assert {r["metric"] for r in answer["records"]} == {"brier", "auc"}
    assert any("95 % interval for new patients and a newly trained model" in note for note in answer["notes"])
    only = embcache("results", "--json", "-").stdout
    assert len(json.loads(only)) == 4
