"""``embcache results RUN``: what is printed is what saved predictions say, and what cannot be told is said once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, brier_score_loss, confusion_matrix, roc_auc_score

from embcache.errors import StoreError, UsageError
from embcache.probe.probe import probe_features
from embcache.runs.folders import find_run_anywhere, load_heads, load_predictions, save_run
from embcache.runs.result import run_id
from tests.commands.shell import answer, embcache
from tests.probe.build import make_dataset, make_features, put_store
from tests.refusal import refused


def data(*arguments: object, metric: str = "brier") -> dict[str, Any]:
    """JSON of ``embcache results``, with the scores of one metric, or of all."""
    return answer("results", *arguments, *(["--metric", metric] if metric else []))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    home = tmp_path_factory.mktemp("made") / "home"
    labels = np.repeat(np.tile([0, 1, 0, 0], 40), 2)
    groups = [f"p{k // 2}" for k in range(320)]
    ds = make_dataset(labels, groups, split=["train"] * 200 + ["test"] * 120)
    ds.table["sex"] = np.where(np.arange(320) // 2 % 5 < 2, "F", "M").astype(object)
    ids = []
    for name, shift in (("net", 2.5), ("weak", 0.3)):
        put_store(home, ds, name, make_features(ds, shift=shift))
        ids.append(probe_features(ds, name, folds=3, subset=40, home=home).id)
    return home, ids


@pytest.fixture
def runs(made: tuple[Path, list[str]], home: Path) -> list[str]:
    """Two runs on images of 2 classes, one sick in four; two images of each patient. The first one is better."""
    shutil.copytree(made[0], home)
    return made[1]


@pytest.fixture
def run(runs: list[str]) -> str:
    return runs[0]


def saved(run: str, home: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) and mean P(b) (n,) of the run's saved predictions."""
    table = load_predictions(find_run_anywhere(run, home)[1]).groupby("id")[["label", "p_1"]].mean()
    return table["label"].to_numpy(), table["p_1"].to_numpy()


def test_a_run_is_shown_in_full(run: str, home: Path) -> None:
    shown = embcache("results", run).stdout
    for words in (
        "120 images (90 a, 30 b)", "positive class: b", "new patients, these models", "a newly trained model",
        "by patient, ensemble", "always a", "sensitivity ≥ 0.95", "Calibration of P(b)", "Confusion matrix",
        "threshold from pooled out-of-fold predictions of single models", "test set's prevalence of b, 0.250",
    ):  # fmt: skip
        assert words in shown
    found, (y, p) = data(run, metric=""), saved(run, home)
    scores = found["scores"]
    assert scores["accuracy"]["ensemble"]["mean"] == pytest.approx(accuracy_score(y, p > 0.5))
    assert scores["auc"]["ensemble"]["mean"] == pytest.approx(roc_auc_score(y, p))
    assert scores["brier"]["ensemble"]["mean"] == pytest.approx(brier_score_loss(y, p))
    order = np.argsort([int(i[1:]) for i in sorted(f"i{k}" for k in range(200, 320))])
    by_patient = p[order].reshape(-1, 2).mean(1)
    assert scores["auc"]["by patient, ensemble"]["mean"] == pytest.approx(roc_auc_score(y[order][::2], by_patient))
    assert found["confusion"] == confusion_matrix(y, p > 0.5).tolist()
    one = next(o for o in found["operating_points"] if (o["rule"], o["models"]) == ("Youden", "ensemble"))
    assert one["sensitivity"]["value"] == pytest.approx(np.mean(p[y == 1] > one["thresholds"][0]))
    assert f"{found['calibration'][1]['slope']['value']:.4f}" in shown
    assert sum(b["images"] for b in found["calibration"][1]["bins"]) == 120
    assert found["result"]["id"] == run
    assert found["prevalence"] == 0.25


def test_metrics_that_are_asked_for_are_the_ones_shown(run: str) -> None:
    assert list(data(run, metric="mcc,auprc")["scores"]) == ["mcc", "auprc"]
    with pytest.raises(UsageError, match="no such metric"):
        embcache("results", run, "--metric", "luck")


def test_another_prevalence_corrects_what_training_saw(run: str, home: Path) -> None:
    found, (y, _) = data(run, "--prevalence", "0.1"), saved(run, home)
    assert found["prevalence"] == pytest.approx(0.1)
    table = load_predictions(find_run_anywhere(run, home)[1])
    odds = np.log(table["p_1"] / table["p_0"]) + np.log(1 / 9)  # training drew both classes alike
    p = (1 / (1 + np.exp(-odds))).groupby(table["id"]).mean().to_numpy()
    weights = np.where(y == 1, 0.1 / 30, 0.9 / 90)
    assert found["calibration"][1]["brier"]["value"] == pytest.approx(np.sum(weights * (p - y) ** 2))
    point = found["operating_points"][3]
    assert (point["rule"], point["models"]) == ("Youden", "ensemble")
    (threshold,) = point["thresholds"]
    assert threshold < 0.5
    a, b = np.mean(p[y == 1] > threshold), np.mean(p[y == 0] <= threshold)
    assert point["sensitivity"]["value"] == pytest.approx(a)
    assert point["ppv"]["value"] == pytest.approx(0.1 * a / (0.1 * a + 0.9 * (1 - b)))
    assert found["notes"] == [
        "scores and confusion matrix are of the models' own probabilities; what is below is adjusted",
        "PPV, NPV and calibration are at the prevalence a=0.9, b=0.1",
    ]
    assert found["scores"] == data(run)["scores"]  # scores are of the probabilities that predict gives by default
    calibrated = data(run, "--prevalence", "0.1", "--calibrate")
    assert len({model["temperature"] for model in calibrated["adjustments"]}) == 3
    with pytest.raises(UsageError, match="not a prevalence of these classes"):
        embcache("results", run, "--prevalence", "10")


def test_the_other_class_may_be_positive_and_the_run_stays_as_it_is(run: str, home: Path) -> None:
    before = find_run_anywhere(run, home)[0]
    found = data(run, "--positive", "a")
    assert (found["result"]["positive"], found["prevalence"]) == ("a", 0.75)
    assert found["scores"]["brier"]["ensemble"]["mean"] == pytest.approx(
        data(run)["scores"]["brier"]["ensemble"]["mean"]
    )
    assert find_run_anywhere(run, home)[0].to_json() == before.to_json()


def test_of_several_classes_one_is_named(home: Path) -> None:
    ds = make_dataset(np.tile([0, 1, 2], 60), split=["train"] * 90 + ["test"] * 90)
    put_store(home, ds, "net", make_features(ds, shift=2.0))
    run = probe_features(ds, "net", folds=2, subset=30, home=home).id
    assert "--positive CLASS" in embcache("results", run).stdout
    assert data(run)["operating_points"] == []
    found = data(run, "--positive", "c", "--prevalence", "a=0.7,b=0.2,c=0.1")
    table = load_predictions(find_run_anywhere(run, home)[1])
    p = (table[["p_0", "p_1", "p_2"]].to_numpy() * [0.7, 0.2, 0.1]).T
    p_c = (p[2] / p.sum(0)).reshape(2, -1).mean(0)
    y = table["label"].to_numpy()[:90]
    assert found["operating_points"][1]["specificity"]["value"] == pytest.approx(np.mean(p_c[y != 2] <= 0.5))
    assert "the other classes as they are in the test set" in " ".join(found["notes"])
    with refused(UsageError, "prevalence"):
        embcache("results", run, "--positive", "c", "--prevalence", "0.1")


def resave(run: str, home: Path, **changes: Any) -> str:
    """The run again, without its validation predictions."""
    result, folder = find_run_anywhere(run, home)
    table, heads = load_predictions(folder), load_heads(folder)
    save_run(replace(result, **changes), table, heads, home)
    return run


def test_a_run_without_validation_predictions_says_so_once(run: str, home: Path) -> None:
    resave(run, home)
    found = data(run, "--prevalence", "0.1")
    assert {point["rule"] for point in found["operating_points"]} == {"P > 0.5"}
    assert sum("kept no predictions of validation images" in note for note in found["notes"]) == 1
    with pytest.raises(StoreError, match="need the run's predictions of validation images") as caught:
        embcache("results", run, "--calibrate")
    assert str(caught.value.fix).startswith("embcache probe --again")


def test_a_run_that_did_not_record_what_training_saw_is_refused(run: str, home: Path) -> None:
    result, _ = find_run_anywhere(run, home)
    resave(run, home, folds=tuple(replace(fold, seen=[]) for fold in result.folds))
    with pytest.raises(StoreError, match="did not record how often training saw each class"):
        embcache("results", run, "--prevalence", "0.1")


def test_one_model_is_its_own_ensemble(run: str, home: Path) -> None:
    result, folder = find_run_anywhere(run, home)
    table, validation = load_predictions(folder), load_predictions(folder, "validation")
    failed = [replace(fold, diverged=True, best_epoch=0, score=None, metrics={}) for fold in result.folds[:2]]
    alone = replace(result, folds=(*failed, result.folds[2]), overlap=None)
    save_run(alone, table[table["fold"] == 2], [{}, {}, {}], home, validation=validation[validation["fold"] == 2])
    found = data(run, "--calibrate")
    assert [c["models"] for c in found["calibration"]] == ["mean of the models"]
    assert len(found["operating_points"]) == 6
    assert any("one model" in note for note in found["notes"])
    assert "ensemble" not in found["scores"]["brier"]
    assert embcache("results", run).exit_code == 0


def test_where_test_labels_are_not_known_nothing_is_measured(run: str, home: Path) -> None:
    result, folder = find_run_anywhere(run, home)
    request = {**result.request, "kind": "kaggle", "run": run}
    scored = replace(result, kind="kaggle", request=request, id=run_id(request))
    save_run(scored, load_predictions(folder), [], home)
    assert data(scored.id)["scores"] == {}
    assert "nothing can be measured" in embcache("results", scored.id).stdout


def test_flags_of_one_run_need_a_run(home: Path) -> None:
    for flags in (["--calibrate"], ["--prevalence", "0.1"], ["--positive", "b"]):
        with pytest.raises(UsageError, match="are for one run"):
            embcache("results", *flags)
    assert "no results" in embcache("results").stdout


def test_compare_prints_a_table_or_data(runs: list[str]) -> None:
    shown = embcache("compare", *reversed(runs)).stdout
    for words in ("reference", "labels used", "Holm", *runs):
        assert words in shown
    rows = answer("compare", ",".join(reversed(runs)))
    saved_runs = {found["id"]: found["n_train"] + found["n_val"] for found in answer("results")}
    assert [(row["run"], row["labels_used"]) for row in rows] == [(run, saved_runs[run]) for run in reversed(runs)]
    assert rows[0]["difference"] is None
    assert rows[1]["difference"]["difference"] > 0


def test_subgroups_prints_a_table_or_data(runs: list[str], tmp_path: Path) -> None:
    shown = embcache("subgroups", runs[0], "--by", "sex", "--json", tmp_path / "rows.json").stdout
    rows = json.loads((tmp_path / "rows.json").read_text())
    women = int((np.arange(200, 320) // 2 % 5 < 2).sum())
    assert [(row["column"], row["value"], row["n_images"]) for row in rows] == [
        ("", "all", 120), ("sex", "F", women), ("sex", "M", 120 - women),
    ]  # fmt: skip
    assert f"{rows[1]['mean']:.4f}" in shown
    assert "labels used" in shown


def test_a_head_is_exported_as_two_files(run: str, tmp_path: Path) -> None:
    shown = embcache("export-head", "--run", run, "--output", tmp_path / "out", "--fold", 1).stdout
    assert "classifier.weight" in shown
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["head.json", "head.safetensors"]
    assert answer("export-head", "--run", run, "-o", tmp_path / "out")["run"] == run
