"""Tables of your own: what is predicted is said, guessed with a reason, or asked about; the same in every command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embcache.config import DatasetRef
from embcache.data.classes import as_in_run, ref_of_run, refuse_unclear, retarget, task_flags
from embcache.data.dataset import ImageDataset, find_dataset, load_dataset
from embcache.errors import DatasetError, ProtocolError, UsageError
from embcache.probe.predictions import group_ensemble
from embcache.probe.probe import probe_cached, probe_features
from embcache.probe.protocol import plan_splits, read_splits, write_splits
from embcache.probe.summary import load_run_predictions
from embcache.results.compare import compare
from embcache.results.decisions import describe
from embcache.runs.folders import find_run_anywhere, runs_dir
from tests.probe.build import make_features, put_store
from tests.refusal import refused

N = 120


def write_table(folder: Path, columns: dict[str, Sequence[Any]], n: int = N) -> Path:
    """A table beside images: half of patients of two images, a third of them for testing."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [",".join(["path", "group", "split", *columns])]
    for k in range(n):
        pixels = np.random.default_rng(k).integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
        split = "test" if k % 6 > 3 else "train"
        cells = [f"{k}.png", f"p{k // 2}", split, *(str(values[k]) for values in columns.values())]
        lines.append(",".join(cells))
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder / "labels.csv"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    edema, mass = rng.integers(0, 2, N), rng.integers(0, 2, N)
    listed = [("edema" * e + ";" * (e and m) + "mass" * m) or "No Finding" for e, m in zip(edema, mass, strict=True)]
    return write_table(
        tmp_path / "images",
        {
            "label": ["ab"[k] for k in edema],
            "edema": edema,
            "mass": ["" if k % 9 == 0 else m for k, m in enumerate(mass)],
            "listed": listed,
            "age": rng.integers(20, 90, N),
            "grade": rng.integers(0, 3, N),
        },
    )


@pytest.fixture
def cached(table: Path, home: Path) -> ImageDataset:
    ds = load_dataset("folder", table, ref=DatasetRef(name="mine"), home=home)
    x = make_features(ds, 6, shift=1.0)
    put_store(home, ds, "a", x)
    return ds


def test_a_guess_has_its_reason_in_a_note(table: Path) -> None:
    kinds = {"edema,mass": "findings", "listed": "findings", "age": "number", "grade": "classes"}
    for target, kind in kinds.items():
        ds = load_dataset("folder", table, target=target)
        assert ds.kind == kind, target
        assert kind == "classes" or any(f"({kind}): " in note for note in ds.notes)
    assert load_dataset("folder", table, target="age", task="classes").class_names[0] == "18-39"
    assert load_dataset("folder", table).kind == "classes"


def test_a_list_and_columns_of_findings_are_the_same(table: Path) -> None:
    listed, columns = (load_dataset("folder", table, target=target) for target in ("listed", "edema,mass"))
    assert listed.class_names == columns.class_names == ("edema", "mass")
    known = columns.labels >= 0
    np.testing.assert_array_equal(listed.labels[known], columns.labels[known])
    assert (listed.labels >= 0).all()
    assert (columns.labels[::9, 1] == -1).all()


@pytest.mark.parametrize(
    ("values", "task"),
    [
        ([["edema|mass", "edema", "mass", "none"][k % 4] for k in range(N)], "findings"),
        ([f"{k / 7:.3f}" for k in range(N)], "number"),
        ([f"name {k}" for k in range(N)], "classes"),
    ],
)
def test_labels_that_are_no_classes_are_asked_about(tmp_path: Path, home: Path, values: list[str], task: str) -> None:
    file = write_table(tmp_path / "odd", {"label": values})
    ref = DatasetRef(name="odd", data_root=file)
    ds = find_dataset("folder", ref, home)[0]
    put_store(home, ds, "a", make_features(ds, 4))
    with refused(UsageError, "task-unclear") as caught:
        probe_cached(["folder"], ["a"], [10], ref=ref, home=home)
    assert f"--task {task}" in str(caught.value.fix)
    if task == "classes":
        return
    (result,) = probe_cached(["folder"], ["a"], [10], ref=replace(ref, task=task), home=home)
    assert result.task.kind == task
    refuse_unclear(replace(ds, layout="nih"))  # published labels are known


def test_a_table_without_labels_loads_with_a_target_and_keeps_it(tmp_path: Path, home: Path) -> None:
    file = write_table(tmp_path / "ages", {"age": range(20, 20 + N)})
    with refused(DatasetError, "column-missing") as caught:
        load_dataset("folder", file)
    assert "--target" in str(caught.value.fix)
    ds = load_dataset("folder", file, target="age", name="ages")
    assert (ds.kind, ds.class_names, ds.metric) == ("number", ("age",), "r2")
    put_store(home, ds.whole or ds, "a", make_features(ds.whole or ds, 4))
    again, state = find_dataset("ages", home=home)
    assert (state, again.kind, again.target) == ("live", "number", "age")
    file.unlink()
    again, state = find_dataset("ages", home=home)
    assert (state, again.kind) == ("snapshot", "number")


def test_the_column_of_the_labels_is_a_target_too(tmp_path: Path) -> None:
    file = write_table(tmp_path / "grades", {"diagnosis": [k % 4 for k in range(N)]})
    ds = load_dataset("folder", file, target="diagnosis", task="ordinal")
    assert (ds.kind, ds.metric, ds.loss, ds.class_names) == ("ordinal", "kappa", "cumulative", ("0", "1", "2", "3"))
    own = load_dataset("folder", file, task="number")
    np.testing.assert_array_equal(own.labels, [k % 4 for k in range(N)])


def test_what_cannot_be_a_target_is_refused_before_training(cached: ImageDataset, home: Path) -> None:
    def tried(target: str, task: str | None, **options: Any) -> None:
        probe_features("mine", "a", target=target, task=task, home=home, **options)

    with refused(UsageError, "unknown-column"):
        tried("nothing", None)
    with refused(UsageError, "target-columns"):
        tried("edema,edema", None)
    with refused(UsageError, "target-columns"):
        tried("edema,age", "number")
    with refused(DatasetError, "finding-values"):
        tried("edema,age", None)
    with refused(DatasetError, "not-a-number"):
        tried("listed", "number")
    with refused(DatasetError, "order-unknown"):
        tried("listed", "ordinal")
    with refused(UsageError, "head-does-not-fit") as caught:
        tried("age", None, head="logreg")
    assert "ridge" in str(caught.value.fix)
    with refused(ProtocolError, "metric-does-not-fit") as caught:
        tried("age", None, metric="auc")
    assert "r2" in str(caught.value.expected)
    with refused(UsageError, "option-choice"):
        tried("age", None, loss="bce")


def test_a_finding_that_is_too_rare_is_named_and_can_be_left_out(tmp_path: Path, home: Path) -> None:
    rare = [1 if k in (0, 12) else 0 for k in range(N)]
    file = write_table(tmp_path / "rare", {"common": [k // 2 % 2 for k in range(N)], "rare": rare})
    ds = load_dataset("folder", file, target="common,rare", name="rare")
    put_store(home, ds.whole or ds, "a", make_features(ds.whole or ds, 4))
    with refused(ProtocolError, "class-too-small") as caught:
        probe_features(ds, "a", home=home)
    assert "--drop-class rare" in str(caught.value.fix)
    result = probe_features(ds.with_classes(["rare"]), "a", subset=20, home=home)
    assert result.class_names == ("common",)
    back = as_in_run(find_dataset("rare", home=home)[0], result.request)
    assert back.class_names == ("common",)
    merged = ds.with_classes(merge={"any": ["common", "rare"]})
    np.testing.assert_array_equal(merged.labels[:, 0], ds.labels.max(1))
    unsure = replace(ds, table=ds.table.assign(rare=-1)).with_classes(merge={"any": ["common", "rare"]})
    np.testing.assert_array_equal(unsure.labels[:, 0], np.where(ds.labels[:, 0] == 1, 1, -1))


def test_doubtful_findings_are_read_again_as_the_run_had_them(tmp_path: Path, home: Path) -> None:
    doubt = [(-1, 1, 0)[k % 3] for k in range(N)]
    columns = {"label": ["ab"[k % 2] for k in range(N)], "sure": [k // 2 % 2 for k in range(N)], "doubt": doubt}
    file = write_table(tmp_path / "doubt", columns)
    ref = DatasetRef(data_root=file, name="doubt", target="sure,doubt", uncertain="one")
    ds = find_dataset("folder", ref, home)[0]
    put_store(home, ds.whole or ds, "a", make_features(ds.whole or ds, 4))
    result = probe_features(ds, "a", subset=20, home=home)
    assert result.request["task"]["uncertain"] == "one"
    plain = DatasetRef(data_root=file, name="doubt")
    again = as_in_run(find_dataset("folder", ref_of_run(plain, result.request), home)[0], result.request)
    np.testing.assert_array_equal(again.labels, ds.labels)
    assert (again.labels[:, 1] == [d != 0 for d in doubt]).all()


def test_changes_of_findings_on_top_of_others_are_read_again(tmp_path: Path) -> None:
    file = write_table(
        tmp_path / "three", {name: [k // n % 2 for k in range(N)] for name, n in zip("abc", (1, 2, 3), strict=True)}
    )
    ds = load_dataset("folder", file, target="a,b,c")
    changed = ds.with_classes(merge={"ab": ["a", "b"]}).with_classes(drop=["ab"])
    assert changed.class_names == ("c",)
    again = as_in_run(load_dataset("folder", file, target="a,b,c"), {"classes": changed.renamed})
    np.testing.assert_array_equal(again.labels, changed.labels)
    assert again.class_names == ("c",)


def test_grades_of_a_column_are_read_again_as_grades(tmp_path: Path, home: Path) -> None:
    file = write_table(
        tmp_path / "seven", {"label": ["ab"[k % 2] for k in range(N)], "grade": [k % 7 for k in range(N)]}
    )
    ds = load_dataset("folder", file, name="seven")
    put_store(home, ds, "a", make_features(ds, 4))
    result = probe_features(ds, "a", subset=20, target="grade", task="ordinal", loss="softmax", home=home)
    assert result.request["task"] == {"kind": "ordinal", "loss": "softmax"}
    assert as_in_run(ds, result.request).class_names == result.class_names == tuple("0123456")
    assert task_flags(result.request) == ["--target", "grade", "--task", "ordinal", "--loss", "softmax"]
    own = [probe_features(ds, "a", subset=20, head="knn", task=task, home=home).id for task in (None, "ordinal")]
    assert own[0].partition("-")[0] == own[1].partition("-")[0] == "knn"


def test_labels_that_only_the_test_set_has_may_be_numbers(tmp_path: Path) -> None:
    values = [20 + k // 2 for k in range(N)]
    file = write_table(tmp_path / "whole", {"label": values})
    with refused(DatasetError, "unknown-label") as caught:
        load_dataset("folder", file)
    assert "--task number" in str(caught.value.fix)
    assert load_dataset("folder", file, task="number").labels.tolist() == values


@pytest.mark.parametrize(
    ("values", "code"),
    [
        (["1,5", "2,5", "3,7"] * 40, "task-unclear"),
        ([*range(N - 1), "inf"], "not-a-number"),
        ([*range(N - 1), "ten"], "not-a-number"),
        ([f"scan {k}" for k in range(N)], "task-unclear"),
    ],
)
def test_columns_that_hold_something_else_are_not_guessed_to_be_classes(
    tmp_path: Path, values: list[Any], code: str
) -> None:
    cells = [f'"{value}"' for value in values]
    file = write_table(tmp_path / "odd", {"label": ["ab"[k % 2] for k in range(N)], "x": cells})
    with refused(DatasetError if code == "not-a-number" else UsageError, code):
        load_dataset("folder", file, target="x")


def test_a_grade_called_none_is_a_grade(tmp_path: Path) -> None:
    file = write_table(tmp_path / "none", {"label": ["ab"[k % 2] for k in range(N)], "dr": ["none", "mild"] * (N // 2)})
    ds = load_dataset("folder", file, target="dr")
    assert ds.class_names == ("mild", "none")
    with refused(UsageError, "unused-option"):
        load_dataset("folder", file, target="dr", uncertain="zero")


@pytest.mark.parametrize("target", ["edema,mass", "age"])
def test_a_splits_file_draws_what_was_drawn(cached: ImageDataset, tmp_path: Path, home: Path, target: str) -> None:
    ds = retarget(cached, target, None)
    plan = plan_splits(ds, subsets=[20, 40])
    write_splits(plan, tmp_path / "splits.json")
    assert read_splits(tmp_path / "splits.json", ds).digest("20") == plan.digest("20")
    with refused(ProtocolError, "splits-of-other-classes"):
        read_splits(tmp_path / "splits.json", cached)


def test_patients_have_the_maximum_of_findings_and_the_mean_of_numbers(cached: ImageDataset, home: Path) -> None:
    for target in ("edema,mass", "age"):
        result = probe_features(retarget(cached, target, None), "a", subset=20, home=home)
        found = load_run_predictions(result, runs_dir("mine", home) / result.id)
        groups, one = found.by_group(), group_ensemble(found)
        assert result.by_group["groups"] == len(groups.ids) == len(set(found.groups))
        for row, name in enumerate(groups.ids):
            own = found.groups == name
            joined = np.max if target != "age" else np.mean
            np.testing.assert_allclose(groups.logits[:, row], joined(found.logits[:, own], axis=1), rtol=1e-12)
            y = found.labels[own]
            whole = np.where((y == 1).any(0), 1, np.where((y == 0).all(0), 0, -1)) if target != "age" else y.mean()
            np.testing.assert_allclose(groups.labels[row], whole)
            p = found.p[:, own].mean(0)  # of the models
            np.testing.assert_allclose(one.p[0, row], joined(p, axis=0), rtol=1e-6)


def test_runs_are_compared_by_group_and_described(cached: ImageDataset, home: Path) -> None:
    results = [
        probe_features(retarget(cached, "edema,mass", None), "a", subset=n, home=home, loss=loss)
        for n, loss in ((20, None), (40, "weighted-bce"))
    ]
    assert [r.request["task"]["loss"] for r in results] == ["bce", "weighted-bce"]
    rows = compare([r.id for r in results], level="group", home=home)
    assert rows[0].mean == pytest.approx(results[0].estimates["by patient"].mean)
    shown = describe(*find_run_anywhere(results[0].id, home), positive="mass")
    assert set(shown.findings) == {"edema", "mass"}
    assert shown.operating_points
    assert {"macro_auc", "micro_auc", "auprc"} <= set(shown.scores)
    json.dumps(shown.to_json())
    mixed = probe_features(cached, "a", subset=20, home=home)  # patients whose images are of both classes
    assert mixed.by_group["mixed"]
    with refused(ProtocolError, "mixed-groups"):
        compare([mixed.id, probe_features(cached, "a", subset=40, home=home).id], level="group", home=home)
