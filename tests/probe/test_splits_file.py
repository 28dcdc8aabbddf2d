"""Splits as a file: what was exported is what is used, and someone else's file is checked before it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embcache.data.dataset import ImageDataset
from embcache.errors import ProtocolError
from embcache.probe.protocol import Splits, plan_splits, read_splits, write_splits
from tests.probe.build import make_dataset
from tests.refusal import refused


@pytest.fixture
def ds() -> ImageDataset:
    groups = [f"g{k // 2}" for k in range(160)]
    return make_dataset([0, 1, 1, 0] * 40, groups, ["train"] * 120 + ["test"] * 40)


def read(path: Path, ds: ImageDataset, **options: Any) -> Splits:
    return read_splits(path, ds, **options)


@pytest.mark.parametrize("val", ["full", "matched"])
def test_what_was_written_is_read(ds: ImageDataset, tmp_path: Path, val: str) -> None:
    plan = plan_splits(ds, subsets=["S", 10, "F"], seed=3, val=val)
    write_splits(plan, tmp_path / "s.json")
    again = read(tmp_path / "s.json", ds)
    assert (again.test_set, again.seed, again.val_mode, again.subsets) == ("official", 3, val, ("S", "10", "F"))
    for subset in plan.subsets:
        assert again.digest(subset) == plan.digest(subset)
        for fold in range(5):
            assert again.train_ids(fold, subset) == plan.train_ids(fold, subset)
            assert again.val_ids(fold, subset) == plan.val_ids(fold, subset)
    assert again.test_ids == plan.test_ids
    assert "splits read from s.json" in again.notes


def test_the_file_holds_exact_ids(ds: ImageDataset, tmp_path: Path) -> None:
    plan = plan_splits(ds, subsets=["S"])
    write_splits(plan, tmp_path / "s.json")
    data = json.loads((tmp_path / "s.json").read_text())
    assert data["format"] == "embcache-splits-1"
    assert data["test"] == [f"i{k}" for k in range(120, 160)]
    assert data["folds"][2]["train"]["S"] == list(plan.train_ids(2, "S"))
    assert data["folds"][2]["val"]["*"] == list(plan.val_ids(2, "S"))
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]


def edited(ds: ImageDataset, path: Path, edit: Any) -> Path:
    write_splits(plan_splits(ds, subsets=["F"]), path)
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    return path


def test_a_group_across_folds_raises(ds: ImageDataset, tmp_path: Path) -> None:
    def edit(data: dict[str, Any]) -> None:
        fold = data["folds"][0]
        moved = fold["val"]["*"].pop()
        fold["train"]["F"].append(moved)

    with refused(ProtocolError, "group-spans-split"):
        read(edited(ds, tmp_path / "s.json", edit), ds)


def test_a_test_image_in_training_raises(ds: ImageDataset, tmp_path: Path) -> None:
    def edit(data: dict[str, Any]) -> None:
        data["folds"][1]["train"]["F"].append(data["test"][0])

    with refused(ProtocolError, "test-image-in-fold"):
        read(edited(ds, tmp_path / "s.json", edit), ds)


def test_a_test_set_of_ones_own_is_local(ds: ImageDataset, tmp_path: Path) -> None:
    pooled = replace(ds, table=ds.table.assign(split="train"))
    write_splits(plan_splits(ds, subsets=["F"]), tmp_path / "s.json")
    assert read(tmp_path / "s.json", pooled).test_set == "local"


@pytest.mark.parametrize(
    ("edit", "code"),
    [
        (lambda d: d["test"].append("no_such"), "unknown-image"),
        (lambda d: d["test"].append(d["test"][0]), "repeated-image"),
        (lambda d: d.update(class_names=["x", "y"]), "splits-of-other-classes"),
        (lambda d: d.update(format="other"), "not-a-splits-file"),
        (lambda d: d.update(extra=1), "not-a-splits-file"),
        (lambda d: d["folds"][0]["train"].pop("F"), "not-a-splits-file"),
        (lambda d: d["folds"][0].update(val={}), "not-a-splits-file"),
        (lambda d: d.update(folds=7), "not-a-splits-file"),
        (lambda d: d["folds"][0]["train"].update(F=d["folds"][0]["train"]["F"][:1]), "one-class"),
    ],
)
def test_files_that_do_not_fit_are_refused(ds: ImageDataset, tmp_path: Path, edit: Any, code: str) -> None:
    with refused(ProtocolError, code):
        read(edited(ds, tmp_path / "s.json", edit), ds)


@pytest.mark.parametrize("content", ["", "[]", "\udcff"])
def test_anything_else_is_refused(ds: ImageDataset, tmp_path: Path, content: str) -> None:
    (tmp_path / "s.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with refused(ProtocolError, "not-a-splits-file"):
        read(tmp_path / "s.json", ds)
    with refused(ProtocolError, "not-a-splits-file"):
        read(tmp_path / "absent.json", ds)


def test_images_without_a_label_do_not_train(ds: ImageDataset, tmp_path: Path) -> None:
    write_splits(plan_splits(ds, subsets=["F"]), tmp_path / "s.json")
    unlabeled = replace(ds, table=ds.table.assign(label=[-1, *ds.labels[1:]]))
    with refused(ProtocolError, "unlabeled-image"):
        read(tmp_path / "s.json", unlabeled)


def test_unreadable_images_are_left_out_with_a_note(ds: ImageDataset, tmp_path: Path) -> None:
    write_splits(plan_splits(ds, subsets=["F"]), tmp_path / "s.json")
    plan = read(tmp_path / "s.json", ds, unreadable={"i0", "i130"})
    assert "i130" not in plan.test_ids
    assert all("i0" not in plan.train_ids(f, "F") + plan.val_ids(f, "F") for f in range(5))
    assert "2 unreadable images of the splits file left out" in plan.notes


def test_test_overlap_can_be_excluded(tmp_path: Path) -> None:
    groups = [f"g{k}" for k in range(100)] + [f"g{k}" for k in range(5)] + [f"t{k}" for k in range(35)]
    ds = make_dataset([0, 1] * 70, groups, ["train"] * 100 + ["test"] * 40)
    write_splits(plan_splits(ds, subsets=["F"]), tmp_path / "s.json")
    plan = read(tmp_path / "s.json", ds, exclude_test_overlap=True)
    kept = np.concatenate([plan.train[f, "F"] for f in range(5)])
    assert set(plan.groups[kept]).isdisjoint(plan.groups[plan.test])
    assert len(set(kept.tolist())) == 95


def test_a_file_with_an_empty_test_set_is_refused(tmp_path: Path) -> None:
    ds = make_dataset([0, 1] * 50)
    path = tmp_path / "splits.json"
    write_splits(plan_splits(ds, subsets=["S"]), path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "test": []}))
    with refused(ProtocolError, "no-test-set"):
        read(path, ds)
