"""Runs that tell other classes apart than their dataset has: what they are made from, and what is done with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from embcache.data.dataset import ImageDataset, read_snapshot
from embcache.errors import ProtocolError, UsageError
from embcache.figures.run_plots import curve_panels
from embcache.probe.probe import probe_features
from embcache.report.collect import make_tasks
from embcache.results.compare import compare, subgroups
from embcache.runs.folders import Result, list_results, load_predictions, runs_dir
from tests.probe.build import make_dataset, make_features, put_store, run_cached
from tests.probe.test_cached import cli


@pytest.fixture
def ds(home: Path) -> ImageDataset:
    """Four classes of which the last has three images; its own test split."""
    ds = make_dataset([0, 1, 2] * 60 + [3] * 3, split=(["train"] * 3 + ["test"]) * 45 + ["train"] * 3)
    ds.table["sex"] = np.where(np.arange(len(ds)) // 4 % 2, "F", "M").astype(object)
    put_store(home, ds, "a", make_features(ds))
    return ds


def merged(ds: ImageDataset, home: Path) -> Result:
    return probe_features(ds.with_classes(["d"], {"sick": ["b", "c"]}), "a", head="knn", subset="F", home=home)


def test_scores_are_those_of_the_merged_labels(ds: ImageDataset, home: Path) -> None:
    result = merged(ds, home)
    assert (result.class_names, result.metric) == (("a", "sick"), "auc")
    table = load_predictions(runs_dir("toy", home) / result.id)
    truth = dict(zip(ds.ids, ds.labels > 0, strict=True))  # b and c are sick
    for fold, rows in table.groupby("fold"):
        expected = roc_auc_score([truth[i] for i in rows["id"]], rows["p_1"])
        assert result.folds[int(str(fold))].score == pytest.approx(expected, abs=1e-9)
    assert any(note.startswith("classes b, c are one class, sick: 120 images") for note in result.notes)
    assert any(note.startswith("class d is left out: 3 images") for note in result.notes)


def test_another_question_is_another_run_from_the_same_store(ds: ImageDataset, home: Path) -> None:
    three = ds.with_classes(["d"])
    runs = [probe_features(each, "a", head="knn", home=home) for each in (three, three.with_classes(["c"]))]
    # Dropping c and merging it into b have the same names of classes.
    runs.append(probe_features(three.with_classes(merge={"b": ["b", "c"]}), "a", head="knn", home=home))
    assert len({result.id for result in runs}) == 3
    assert probe_features(ds.with_classes(["d"]), "a", head="knn", home=home).id == runs[0].id
    snapshot = read_snapshot("toy", home)
    assert snapshot is not None
    assert snapshot.class_names == ds.class_names


def test_a_run_is_used_as_any_other(ds: ImageDataset, home: Path) -> None:
    two, three = merged(ds, home), probe_features(ds.with_classes(["d"]), "a", head="knn", subset="F", home=home)
    rows, _ = subgroups([two.id], ["sex"], home=home, resamples=20)
    assert [row.value for row in rows] == ["all", "F", "M"]
    with pytest.raises(ProtocolError, match="different metrics"):
        compare([two.id, three.id], home=home)
    tasks = make_tasks(list_results(home, "toy"))
    assert {(task.title, task.class_names) for task in tasks} == {
        ("toy, b + c = sick, without d", ("a", "sick")), ("toy, without d", ("a", "b", "c")),
    }  # fmt: skip
    assert {panel.title for panel in curve_panels(list_results(home, "toy"))} == {task.title for task in tasks}
    listed = cli("results", "--home", str(home)).stdout
    assert "b + c = sick, without d" in listed


def test_the_command_takes_classes_and_a_target(ds: ImageDataset, home: Path) -> None:
    asked = ["probe", "--dataset", "toy", "--head", "knn", "--home", str(home), "--json", "-"]
    (result,) = json.loads(cli(*asked, "--drop-class", "d", "--merge-class", "b+c=sick", "--subset", "F").stdout)
    assert result["id"] == merged(ds, home).id
    ds.table["view"] = np.array(["AP", "PA", "other"])[np.arange(len(ds)) % 3].astype(object)
    put_store(home, replace(ds, name="views"), "a", make_features(ds))
    asked[2] = "views"
    (result,) = json.loads(cli(*asked, "--target", "view", "--drop-class", "other").stdout)
    assert (result["target"], result["class_names"]) == ("view", ["AP", "PA"])


def test_every_dataset_is_looked_at_before_any_is_probed(ds: ImageDataset, home: Path) -> None:
    other = replace(ds.with_classes(["d"]), name="zoo", whole=None, renamed={})
    put_store(home, other, "a", make_features(ds)[:180])
    with pytest.raises(UsageError, match="zoo has no class 'd'"):
        run_cached(home=home, drop_class="d")
    assert not list_results(home)


def test_splits_of_other_classes_can_be_shared(ds: ImageDataset, home: Path, tmp_path: Path) -> None:
    file, classes = tmp_path / "shared.json", ["--dataset", "toy", "--home", str(home), "--drop-class", "d"]
    cli("splits", "export", *classes, "--subset", "S", "--output", str(file))
    assert "kept as" in cli("splits", "import", str(file), *classes).stdout
    asked = ["probe", *classes, "--head", "knn", "--json", "-"]
    (drawn,), (read,) = (json.loads(cli(*asked, *more).stdout) for more in ([], ["--splits", str(file)]))
    assert drawn["id"] == read["id"]
