"""Runs by a metric of another package: named as `module:name`, and read where the package is gone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embcache.cli import app
from embcache.data.dataset import ImageDataset
from embcache.errors import DatasetError, StoreError, UsageError
from embcache.probe.metrics import METRICS, find_metric, metrics
from embcache.runs.folders import list_results, load_result, replace_result, runs_dir
from tests.probe.build import make_dataset, make_features, put_store
from tests.refusal import refused

YOUDEN = "embcache_plugin:YOUDEN"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes the plugin importable; call it, and its metric is gone."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "plugin"))
    objects = metrics._objects
    monkeypatch.setattr(metrics, "_objects", dict(objects))
    return lambda: monkeypatch.setattr(metrics, "_objects", dict(objects))


def ran(*argv: str) -> str:
    done = CliRunner().invoke(app, [*argv])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_metric_named_by_its_module_and_read_where_it_is_gone(home: Path, plugin: Callable[[], None]) -> None:
    dataset = make_dataset([0, 1] * 120, split=["train"] * 140 + ["test"] * 100)
    for seed, name in enumerate(("one", "two")):
        put_store(home, dataset, name, make_features(dataset, shift=2.0, seed=seed))
    (home / dataset.name / "dataset.parquet").write_bytes(dataset.to_parquet_bytes())
    asked = ["--dataset", dataset.name, "--subset", "20,40", "--folds", "3", "--metric", YOUDEN]
    made = json.loads(ran("probe", *asked, "--json", "-"))
    assert {result["metric"] for result in made} == {"youden"}
    run = made[0]["id"]
    assert "Youden's J" in ran("results", "--metric", YOUDEN)
    assert "Take " in ran("results")
    assert "Youden's J" in ran("results", run)
    assert "Youden's J" in ran("compare", run, made[1]["id"], "--metric", YOUDEN)

    plugin()
    listed = ran("results")
    assert "not read: " + run in listed
    assert "there is no such metric: youden" in listed
    in_full = json.loads(ran("results", run, "--json", "-"))
    assert "auc" in in_full["scores"]
    assert "youden" not in in_full["scores"]
    assert any("there is no such metric: youden" in note for note in in_full["notes"])
    page = home.parent / "page.html"
    ran("report", "--dataset", dataset.name, "--output", str(page))
    assert "there is no such metric: youden" in page.read_text("utf-8")
    assert "AUC" in ran("results", "--metric", "auc")
    assert "youden" in ran("curves", "--dataset", dataset.name, "--format", "csv")


def test_a_module_that_only_a_file_names_is_not_imported(home: Path, plugin: Callable[[], None]) -> None:
    dataset = make_dataset([0, 1] * 60, split=["train"] * 80 + ["test"] * 40)
    with pytest.raises(DatasetError, match="snapshot"):
        ImageDataset.from_parquet_bytes(replace(dataset, metric=YOUDEN).to_parquet_bytes())
    put_store(home, dataset, "one", make_features(dataset))
    (home / dataset.name / "dataset.parquet").write_bytes(dataset.to_parquet_bytes())
    ran("probe", "--dataset", dataset.name, "--subset", "20", "--folds", "3")
    (result,) = list_results(home)
    run = runs_dir(dataset.name, home) / result.id
    replace_result(run, replace(result, metric=YOUDEN))
    sys.modules.pop("embcache_plugin", None)
    with pytest.raises(StoreError):
        load_result(run)
    ran("results")
    assert "embcache_plugin" not in sys.modules


def test_what_is_no_metric_or_has_the_name_of_another_is_refused(
    plugin: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import embcache_plugin

    assert find_metric(YOUDEN, 2) is embcache_plugin.YOUDEN is find_metric("youden", 2)
    with refused(UsageError, "not-a-metric"):
        find_metric("embcache_plugin:CLASSES", 2)
    monkeypatch.setattr(embcache_plugin, "AUC", replace(METRICS["kappa"], key="auc"), raising=False)
    with refused(UsageError, "registry-taken"):
        find_metric("embcache_plugin:AUC", 2)
