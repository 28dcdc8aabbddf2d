"""Runs of findings, numbers and grades: what may be asked, what is saved, and what a hostile file may not do."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score, mean_absolute_error, r2_score, roc_auc_score

from embcache.data.classes import retarget
from embcache.data.dataset import ImageDataset
from embcache.data.published import decode_snapshot, encode_snapshot
from embcache.errors import EmbcacheError, ProtocolError, StoreError, UsageError
from embcache.io import replace_file
from embcache.probe import probe_plan
from embcache.probe.probe import probe_features
from embcache.probe.summary import in_metric, load_run_predictions
from embcache.results.export_head import export_head
from embcache.runs.folders import load_heads, load_predictions, load_result, run_folders, runs_dir
from embcache.runs.result import Result, run_id
from embcache.sealed import file_checksum, seal, unseal
from tests.probe.build import Brief, make_dataset, put_store
from tests.refusal import refused

N = 240
TARGETS = {"findings": "x,y,z", "number": "age", "ordinal": "grade"}


def dataset() -> ImageDataset:
    """Images of eighty patients, whose columns hold a number, grades and findings, some of them unknown."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(80, 3))[np.arange(N) % 80] + 0.3 * rng.normal(size=(N, 3))
    findings = np.where(rng.random((N, 3)) < 0.1, "", (hidden > 0.4).astype(int).astype(str))
    ds = make_dataset(
        np.arange(N) % 2, [f"p{k % 80}" for k in range(N)], [["train", "train", "test"][k % 80 % 3] for k in range(N)]
    )
    table = ds.table.assign(
        x=findings[:, 0], y=findings[:, 1], z=findings[:, 2], age=(50 + 12 * hidden[:, 0]).round(2).astype(str),
        grade=np.digitize(hidden[:, 1], [-0.5, 0.5]).astype(str),
    )  # fmt: skip
    return dataclasses.replace(ds, table=table)


def features(ds: ImageDataset, dim: int = 12) -> np.ndarray:
    rng = np.random.default_rng(1)
    ages = pd.to_numeric(ds.table["age"]).to_numpy()
    seen = np.column_stack(
        [(ages - 50) / 12, ds.table["grade"].astype(int) - 1, ds.table["x"] == "1", ds.table["y"] == "1"]
    )
    return (seen @ rng.normal(size=(4, dim)) + 0.5 * rng.normal(size=(N, dim))).astype(np.float32)


@pytest.fixture
def ds(home: Path, monkeypatch: pytest.MonkeyPatch) -> ImageDataset:
    monkeypatch.setattr(probe_plan, "Schedule", Brief)
    made = dataset()
    for name, views in (("a", 0), ("b", 3)):
        x = features(made)
        put_store(home, made, name, np.stack([x + 0.01 * k for k in range(views)], axis=1) if views else x)
    return made


def target_of(ds: ImageDataset, kind: str) -> ImageDataset:
    return retarget(ds, TARGETS[kind], kind)


def probe(ds: ImageDataset, kind: str, **options: Any) -> Result:
    return probe_features(target_of(ds, kind), options.pop("backbone", "a"), **{"subset": 60, "folds": 2, **options})


def folder(result: Result) -> Path:
    return runs_dir(result.dataset) / result.id


# --- what may be asked


@pytest.mark.parametrize("kind", TARGETS)
def test_scores_are_those_of_the_saved_predictions(ds: ImageDataset, kind: str) -> None:
    result = probe(ds, kind)
    table = load_predictions(folder(result))
    for fold, part in table.groupby("fold"):
        if kind == "number":
            wanted = r2_score(part["label"], part["prediction"])
            others = {"mae": mean_absolute_error(part["label"], part["prediction"]),
                      "spearman": spearmanr(part["label"], part["prediction"])[0]}  # fmt: skip
        elif kind == "ordinal":
            p = part[["p_0", "p_1", "p_2"]].to_numpy()
            wanted = cohen_kappa_score(part["label"], p.argmax(1), weights="quadratic")
            others = {"mae": mean_absolute_error(part["label"], p.argmax(1)),
                      "macro_auc": roc_auc_score(part["label"], p, multi_class="ovr")}  # fmt: skip
        else:
            known = [part[part[f"label_{c}"] >= 0] for c in range(3)]
            each = [roc_auc_score(one[f"label_{c}"], one[f"p_{c}"]) for c, one in enumerate(known)]
            wanted, others = np.mean(each), {}
            np.testing.assert_allclose(result.folds[int(fold)].metrics["per_class_auc"], each)
        assert result.folds[int(fold)].score == pytest.approx(wanted, abs=1e-6)
        for name, value in others.items():
            assert result.folds[int(fold)].metrics[name] == pytest.approx(value, abs=1e-6)
    assert result.task.kind == kind
    assert bool(result.baseline) == (kind != "ordinal")
    assert result.by_group["groups"] > 20
    loaded = load_run_predictions(result, folder(result))
    assert loaded.task == result.task
    assert loaded.ensemble().estimate(result.metric).mean == pytest.approx(result.ensemble["estimate"]["mean"])
    assert load_result(folder(result)) == result
    assert probe(ds, kind) == result  # is answered by the saved one


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize(
    "options", [{"lr": (1e-3, 1e-2)}, {"repeats": 2}, {"views": 3, "backbone": "b"}, {"buffer": 80}, {"val": "matched"},
                {"head": "dvme", "head_options": {"proj_dim": 8}}, {"head": "knn"}, {"head": "ridge"}],
    ids=lambda options: next(iter(options.items())).__repr__(),
)  # fmt: skip
def test_every_option_is_for_every_kind(ds: ImageDataset, kind: str, options: dict[str, Any]) -> None:
    result = probe(ds, kind, **options)
    assert result.mean is not None
    assert all(not fold.failed for fold in result.folds)
    assert len(result.folds) == 2 * options.get("repeats", 1)
    assert result.id != probe(ds, kind).id


@pytest.mark.parametrize("kind", ["findings", "number"])
def test_a_loss_is_another_run(ds: ImageDataset, kind: str) -> None:
    one, other = (probe(ds, kind, loss=loss) for loss in target_of(ds, kind).task.losses)
    assert one.id != other.id
    assert one.id == probe(ds, kind).id
    assert (one.task.loss, other.task.loss) == target_of(ds, kind).task.losses
    with refused(UsageError, "option-choice"):
        probe(ds, kind, loss="focal")


def test_what_does_not_fit_is_refused_before_training(ds: ImageDataset) -> None:
    for kind, options, code in (
        ("number", {"metric": "macro_auc"}, "metric-does-not-fit"),
        ("findings", {"metric": "kappa"}, "metric-does-not-fit"),
        ("ordinal", {"metric": "r2"}, "metric-does-not-fit"), ("number", {"head": "logreg"}, "head-does-not-fit"),
    ):  # fmt: skip
        with pytest.raises((UsageError, ProtocolError)) as caught:
            probe(ds, kind, **options)
        assert caught.value.code == code
    assert not run_folders(dataset=ds.name)


def test_another_metric_of_a_saved_run(ds: ImageDataset) -> None:
    number, findings = probe(ds, "number"), probe(ds, "findings")
    assert in_metric(number, "mae", None).mean == pytest.approx(np.mean([f.metrics["mae"] for f in number.folds]))
    assert in_metric(findings, "micro_auc", None).mean == pytest.approx(
        np.mean([f.metrics["micro_auc"] for f in findings.folds])
    )
    with refused(ProtocolError, "metric-does-not-fit"):
        in_metric(number, "auc", None)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("head", ["linear", "ridge"])
def test_the_script_in_the_docs_gives_the_stored_predictions(
    ds: ImageDataset, tmp_path: Path, kind: str, head: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    result = probe(ds, kind, head=head)
    export_head(result.id, tmp_path / "my-head", fold=1)
    (code,) = re.findall(
        r"```python\n(# head.py.*?)```", (Path(__file__).parents[2] / "docs/results.md").read_text("utf-8"), re.DOTALL
    )
    (tmp_path / "head.py").write_text(code, "utf-8")
    np.savez(tmp_path / "a.npz", features=features(ds))
    monkeypatch.setattr(sys, "argv", ["head.py", str(tmp_path / "my-head"), f"a={tmp_path / 'a.npz'}"])
    runpy.run_path(str(tmp_path / "head.py"))
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == ",".join(result.class_names)
    printed = dict(zip(ds.table["id"], np.array([line.split(",") for line in lines], dtype=float), strict=True))
    table = load_predictions(folder(result))
    table = table[table["fold"] == 1]
    names = [name for name in table if name == "prediction" or name.startswith("p_")]
    found = np.stack([printed[i] for i in table["id"]])
    np.testing.assert_allclose(found, table[names].to_numpy(), rtol=1e-4, atol=1e-5)


# --- hostile files


def rewrite(result: Result, **changes: Any) -> Path:
    """The run's result.json with other keys of its request, under the id that they hash to."""
    path = folder(result)
    content = unseal((path / "result.json").read_bytes(), path, "")
    content["request"] = {**content["request"], **changes.pop("request", {})}
    content |= {"id": run_id(content["request"]), **changes}
    new = path.with_name(content["id"])
    path.rename(new)
    replace_file(new / "result.json", seal(content))
    return new


@pytest.mark.parametrize(
    "task",
    [{"kind": "tests.targets.never:Imported"}, {"kind": "survival"}, {"kind": "number", "loss": "bce"}, {"kind": ""},
     {"kind": ["number"]}, {"kind": "number", "loss": 3}, "number", ["number"], 7,
     {"kind": "classes", "loss": "os:system"}],
    ids=repr,
)  # fmt: skip
def test_a_request_of_another_task_is_a_damaged_run(ds: ImageDataset, task: Any) -> None:
    run = rewrite(probe(ds, "number"), request={"task": task})
    with refused(StoreError, "run-not-readable"):
        load_result(run)
    for read in (load_predictions, load_heads):
        with contextlib.suppress(EmbcacheError):
            read(run)
    assert "tests.targets.never" not in sys.modules


def test_a_result_of_another_kind_than_its_predictions(ds: ImageDataset) -> None:
    """Each is one message, whatever kind is claimed of whatever predictions."""
    for kind in TARGETS:
        for claimed, loss in (
            ("number", "huber"),
            ("findings", "bce"),
            ("ordinal", "cumulative"),
            ("classes", "softmax"),
        ):
            if claimed == kind or (kind, claimed) == ("ordinal", "classes"):  # which nothing tells apart
                continue
            run = rewrite(probe(ds, kind, again=True), request={"task": {"kind": claimed, "loss": loss}})
            with pytest.raises(EmbcacheError) as caught:
                load_run_predictions(load_result(run), run)
            assert caught.value.code in ("run-damaged", "run-file-damaged", "run-not-readable")


def columns_of(table: pd.DataFrame, kind: str) -> dict[str, pd.DataFrame]:
    label = "label_0" if kind == "findings" else "label"
    found = {
        "none": table.drop(columns=label), "text": table.assign(**{label: "1"}), "inf": table.assign(**{label: np.inf}),
        "complex": table.assign(**{label: [[1.0]] * len(table)}), "bool": table.assign(**{label: True}),
    }  # fmt: skip
    if kind != "number":
        found |= {"large": table.assign(**{label: 99}), "float": table.assign(**{label: 1.0})}
    return found


@pytest.mark.parametrize("kind", TARGETS)
def test_predictions_with_wrong_labels_are_one_message(ds: ImageDataset, kind: str) -> None:
    result = probe(ds, kind)
    path = folder(result)
    content = unseal((path / "result.json").read_bytes(), path, "")
    for what, table in columns_of(load_predictions(path), kind).items():
        table.to_parquet(path / "predictions.parquet", index=False)
        content["files"]["predictions.parquet"] = file_checksum(path / "predictions.parquet")
        replace_file(path / "result.json", seal(content))
        with pytest.raises(StoreError) as caught:
            load_run_predictions(result, path)
        assert caught.value.code == "run-file-damaged", what


@pytest.mark.parametrize(
    "change",
    [{"kind": "tests.targets.never:Imported"}, {"kind": "survival"}, {"loss": "focal"}, {"columns": ["nowhere"]},
     {"columns": ["id"]}, {"columns": ["age", "age"]}, {"kind": "findings"}, {"names": []},
     {"names": ["a", "b"]}, {"columns": "age"}, {"kind": 3}],
    ids=repr,
)  # fmt: skip
def test_a_snapshot_with_a_hostile_target_is_one_message(ds: ImageDataset, change: dict[str, Any]) -> None:
    table, meta = decode_snapshot(target_of(ds, "number").to_parquet_bytes())
    meta["targets"][0] |= change
    data = encode_snapshot(table, meta)
    with pytest.raises(EmbcacheError) as caught:
        ImageDataset.from_parquet_bytes(data)
    assert caught.value.code
    assert "tests.targets.never" not in sys.modules
