"""Probing real stores end to end: what a result says, when it is taken again, and what may never influence it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

import embcache.probe.probe as run_module
from embcache.commands.scores import print_results
from embcache.config import ProbeConfig
from embcache.data.dataset import ImageDataset
from embcache.errors import ProtocolError, RecipeError, StoreError, StoreNotFoundError, UsageError
from embcache.probe import probe_plan
from embcache.probe.metrics import softmax
from embcache.probe.probe import probe_features
from embcache.probe.probe_plan import plan_probe
from embcache.probe.protocol import plan_splits, write_splits
from embcache.probe.summary import in_metric
from embcache.runs.folders import Result, list_results, load_heads, load_predictions, load_result, runs_dir
from tests.probe.build import find_saved, make_dataset, make_features, make_recipe, probe_grid, put_store, run_cached
from tests.refusal import refused


@pytest.fixture(scope="module")
def ds() -> ImageDataset:
    rng = np.random.default_rng(0)
    groups = [f"g{k // 2}" for k in range(260)]
    return make_dataset(rng.integers(0, 2, size=260).tolist(), groups, ["train"] * 200 + ["test"] * 60)


@pytest.fixture(scope="module")
def template(ds: ImageDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with two stores and the default run of one."""
    folder = tmp_path_factory.mktemp("probed")
    put_store(folder, ds, "a", make_features(ds, 16))
    put_store(folder, ds, "b", make_features(ds, 10, seed=1))
    probe_features(ds, "a", home=folder)
    return folder


@pytest.fixture
def cached(home: Path, ds: ImageDataset, template: Path) -> ImageDataset:
    shutil.copytree(template, home)
    return ds


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageDataset, Path]:
    """Features that tell nothing."""
    ds = make_dataset([0, 1] * 60, split=["train"] * 80 + ["test"] * 40)
    put_store(folder := tmp_path_factory.mktemp("flat"), ds, "flat", np.zeros((120, 4), np.float32))
    return ds, folder


def id_of(ds: ImageDataset, home: Path, **options: Any) -> str:
    """The id of a run, which is not trained."""
    (found,) = find_saved(ds, [["a"]], home=home, **options)
    return found if isinstance(found, str) else found.id


def run_of(result: Result, home: Path) -> Path:
    return runs_dir(result.dataset, home) / result.id


def never_train(*_: Any, **__: Any) -> Any:
    raise AssertionError("trained again")


def test_a_result_says_what_it_is(cached: ImageDataset, home: Path) -> None:
    result = probe_features(cached, ["a"], subset="S", folds=5, seed=0, home=home)
    assert (result.dataset, result.backbones, result.head, result.subset) == ("toy", ("a",), "linear", "S")
    assert (result.n_train, result.n_val, result.labels_used, result.n_test) == (20, 40, 60, 60)
    assert (result.metric, result.test_set, result.source, result.kind) == ("auc", "official", "snapshot", "probe")
    assert result.mean == pytest.approx(np.mean([f.score for f in result.folds]))
    assert result.std == pytest.approx(np.std([f.score for f in result.folds], ddof=1))
    assert result.val_mean == pytest.approx(np.mean([f.val_score for f in result.folds]))
    assert 0.6 < result.mean < 1
    for number, fold in enumerate(result.folds):
        assert (fold.fold, fold.n_train, fold.lr) == (number, 20, 1e-3)
        assert 1 <= fold.best_epoch <= fold.epochs <= 50
        assert fold.epochs >= 30
    assert {"python", "torch", "numpy", "embcache"} <= set(result.versions)
    assert result.seconds > 0


def test_test_scores_are_those_of_the_kept_predictions(cached: ImageDataset, home: Path) -> None:
    result = probe_features(cached, "a", home=home)
    frame = load_predictions(run_of(result, home))
    assert list(frame.columns) == ["id", "label", "group", "fold", "p_0", "p_1", "logit_0", "logit_1"]
    assert len(frame) == 5 * 60
    by_id = dict(zip(cached.ids, cached.labels, strict=True))
    assert all(by_id[i] == y for i, y in zip(frame["id"], frame["label"], strict=True))
    for fold in result.folds:
        part = frame[frame["fold"] == fold.fold]
        assert fold.score == pytest.approx(roc_auc_score(part["label"], part["p_1"]), abs=1e-9)
    test = cached.table[cached.table["split"] == "test"]
    assert part["id"].tolist() == test["id"].tolist()
    logits = frame[["logit_0", "logit_1"]].to_numpy()
    np.testing.assert_allclose(softmax(logits), frame[["p_0", "p_1"]].to_numpy(), rtol=1e-12)
    assert result.estimate is not None
    assert result.interval == result.estimate.new_model
    (low, high), (lower, higher) = result.estimate.these_models, result.estimate.new_model
    assert lower <= low < result.mean < high <= higher


def test_what_predict_uses_and_patients_are_scored(cached: ImageDataset, home: Path) -> None:
    result = probe_features(cached, "a", home=home)
    frame = load_predictions(run_of(result, home))
    ensemble = frame.groupby("id").agg({"label": "first", "p_1": "mean", "group": "first"})
    scores = result.estimates
    assert scores["ensemble"].mean == pytest.approx(roc_auc_score(ensemble["label"], ensemble["p_1"]))
    mixed = ensemble.groupby("group")["label"].nunique() > 1
    assert result.by_group["mixed"] == mixed.sum() > 0
    assert result.by_group["groups"] == (~mixed).sum()
    table = cached.table.assign(label=[k // 2 % 2 for k in range(len(cached.table))])  # a class per group
    found = probe_features(replace(cached, table=table), "a", home=home)
    frame = load_predictions(run_of(found, home))
    patients = frame.groupby(["fold", "group"]).agg({"label": "first", "p_1": "mean"})
    each = [roc_auc_score(part["label"], part["p_1"]) for _, part in patients.groupby("fold")]
    assert found.by_group["groups"] == 30
    assert found.estimates["by patient"].mean == pytest.approx(np.mean(each))
    one = patients.groupby("group").agg({"label": "first", "p_1": "mean"})
    assert found.estimates["by patient, ensemble"].mean == pytest.approx(roc_auc_score(one["label"], one["p_1"]))


def test_another_metric_scores_a_saved_run(cached: ImageDataset, home: Path) -> None:
    result = probe_features(cached, "a", home=home)
    found = in_metric(result, "auprc", home)
    frame = load_predictions(run_of(result, home))
    held = load_predictions(run_of(result, home), "validation")
    each = [average_precision_score(part["label"], part["p_1"]) for _, part in frame.groupby("fold")]
    odds = held["logit_1"] - held["logit_0"]
    validated = [average_precision_score(part["label"], odds[part.index]) for _, part in held.groupby("fold")]
    assert [fold.score for fold in found.folds] == pytest.approx(each)
    assert found.val_mean == pytest.approx(np.mean(validated))
    assert (found.id, found.metric, found.positive) == (result.id, "auprc", "b")
    own = [roc_auc_score(part["label"], odds[part.index]) for _, part in held.groupby("fold")]
    assert [fold.val_score for fold in result.folds] == pytest.approx(own)  # the epoch that was kept


def test_another_positive_class_is_scored_and_recorded_without_training(
    cached: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = probe_features(cached, "a", home=home)
    assert result.positive == "b"
    monkeypatch.setattr(run_module, "train_heads", never_train)
    other = probe_features(cached, "a", home=home, positive="a")
    frame = load_predictions(run_of(result, home))
    part = frame[frame["fold"] == 0]
    expected = average_precision_score(part["label"] == 0, part["p_0"])
    assert (other.id, other.positive, other.mean) == (result.id, "a", result.mean)
    assert other.folds[0].metrics["auprc"] == pytest.approx(expected)
    assert load_result(run_of(result, home)).positive == "a"
    assert probe_features(cached, "a", home=home).positive == "a"  # nothing asked for: it stays
    with pytest.raises(UsageError, match="no such class"):
        probe_features(cached, "a", home=home, positive="c")


def test_a_score_that_is_not_defined_is_no_number(flat: tuple[ImageDataset, Path]) -> None:
    """A PPV where nothing is called positive: None in JSON, the worst score there is where it chooses epochs."""
    ds, home = flat
    ppv, npv = (probe_features(ds, "flat", subset="F", home=home, metric=m) for m in ("ppv", "npv"))
    for result in (ppv, npv):
        assert load_result(run_of(result, home)).to_json() == result.to_json()
        assert all(fold.val_score in (0.0, 0.5) for fold in result.folds)
    undefined = [fold.score is None for result in (ppv, npv) for fold in result.folds]
    assert any(undefined)
    assert {result.mean is None for result in (ppv, npv) if any(f.score is None for f in result.folds)} == {True}


def test_the_metric_that_chooses_epochs_is_part_of_the_request(cached: ImageDataset, home: Path) -> None:
    own = probe_features(cached, "a", home=home)
    loss = probe_features(cached, "a", home=home, metric="log_loss")
    assert loss.id != own.id
    assert loss.metric == "log_loss"
    held = load_predictions(run_of(loss, home), "validation")
    for fold in loss.folds:
        part = held[held["fold"] == fold.fold]
        p = softmax(part[["logit_0", "logit_1"]].to_numpy())
        assert fold.val_score == pytest.approx(log_loss(part["label"], p))
    assert id_of(cached, home, metric="auprc") != id_of(cached, home, metric="auprc", positive="a")


def test_a_fold_that_predicts_one_class_is_named(
    flat: tuple[ImageDataset, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ds, home = flat
    result = probe_features(ds, "flat", subset="F", home=home)
    told = [note for note in result.notes if "for all 40 test images; 20 of them are '" in note]
    assert sum(1 if note.startswith("fold") else int(note[0]) for note in told) == 5
    print_results([result, replace(result, backbones=("other",))])
    shown = capsys.readouterr().out
    assert all(f"{name}, linear, F: {note}" in shown for name in ("flat", "other") for note in told)
    assert result.majority == ("a", 0.5)


def test_kept_heads_give_the_predictions_from_raw_features(cached: ImageDataset, home: Path) -> None:
    result = probe_features(cached, "a", home=home)
    frame, heads = load_predictions(run_of(result, home)), load_heads(run_of(result, home))
    x = make_features(cached, 16)[cached.table["split"] == "test"]
    for fold, head in enumerate(heads):
        p = softmax(x @ head["classifier.weight"].numpy().T + head["classifier.bias"].numpy())
        kept = frame.loc[frame["fold"] == fold, ["p_0", "p_1"]].to_numpy()
        np.testing.assert_allclose(kept, p, rtol=1e-4, atol=1e-6)


def test_the_run_reads_back(cached: ImageDataset, home: Path) -> None:
    result = probe_features(cached, "a", home=home)
    assert load_result(run_of(result, home)) == result
    assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result
    assert list_results(home) == list_results(home, "toy") == [result]
    assert sorted(p.name for p in run_of(result, home).iterdir()) == [
        "heads.safetensors",
        "predictions.parquet",
        "result.json",
        "validation.parquet",
    ]


# --- taken again, or not


def test_the_same_request_is_answered_from_the_run(
    cached: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = probe_features(cached, "a", home=home)
    monkeypatch.setattr(run_module, "train_heads", never_train)
    monkeypatch.setattr(probe_plan, "load_features", never_train)
    assert probe_features(cached, "a", home=home) == first
    with pytest.raises(AssertionError, match="trained again"):
        probe_features(cached, "a", home=home, again=True)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"subsets": [30]}, {"folds": 4}, {"val": "matched"}, {"lr": 1e-2}, {"head": "dvme-noattn"}]
)
def test_another_request_is_another_run(cached: ImageDataset, home: Path, change: dict[str, Any]) -> None:
    assert id_of(cached, home, **change) != id_of(cached, home)


def test_an_edited_label_is_another_run_on_the_same_features(cached: ImageDataset, home: Path) -> None:
    edited = cached.table["label"].to_numpy().copy()
    edited[:2] = 1 - edited[:2]
    assert id_of(replace(cached, table=cached.table.assign(label=edited)), home) != id_of(cached, home)


def test_a_replaced_image_is_another_run(ds: ImageDataset, tmp_path: Path) -> None:
    ids = []
    for number in range(2):
        put_store(tmp_path / str(number), ds, "a", make_features(ds), digests={"i5": f"{number:064x}"})
        ids.append(id_of(ds, tmp_path / str(number)))
    assert ids[0] != ids[1]


@pytest.mark.parametrize("harm", ["edited score", "lost predictions", "damaged heads"])
def test_a_run_that_is_not_as_written_is_never_served(cached: ImageDataset, home: Path, harm: str) -> None:
    first = probe_features(cached, "a", home=home)
    run = run_of(first, home)
    if harm == "edited score":
        text = (run / "result.json").read_text()
        (run / "result.json").write_text(text.replace(f'"mean": {first.mean}', '"mean": 0.9999'))
        assert "0.9999" in (run / "result.json").read_text()
    elif harm == "lost predictions":
        (run / "predictions.parquet").unlink()
    else:
        (run / "heads.safetensors").write_bytes(b"garbage")
    assert probe_features(cached, "a", home=home).mean == first.mean
    assert load_predictions(run)["fold"].nunique() == 5
    assert len(load_heads(run)) == 5


def test_the_order_of_a_splits_file_changes_nothing(cached: ImageDataset, home: Path, tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    write_splits(plan_splits(cached, subsets=["S"]), path)
    one = probe_features(cached, "a", home=home, splits=path, again=True)
    content = json.loads(path.read_text())
    for fold in content["folds"]:
        fold["train"] = {subset: ids[::-1] for subset, ids in fold["train"].items()}
    path.write_text(json.dumps(content))
    other = probe_features(cached, "a", home=home, splits=path, again=True)
    assert (other.id, other.mean) == (one.id, one.mean)


def test_a_reused_result_carries_the_notes_of_this_request(cached: ImageDataset, home: Path, tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    write_splits(plan_splits(cached, subsets=["S"]), path)
    first = probe_features(cached, "a", home=home, splits=path)
    again = probe_features(cached, "a", home=home)
    assert [note for note in first.notes if "splits.json" in note]
    assert not [note for note in again.notes if "splits.json" in note]


def test_a_result_of_another_request_is_not_taken(cached: ImageDataset, home: Path) -> None:
    first, other = probe_features(cached, "a", home=home), probe_features(cached, "b", home=home)
    (run_of(first, home) / "result.json").write_bytes((run_of(other, home) / "result.json").read_bytes())
    with pytest.raises(StoreError, match="is damaged") as caught:
        load_result(run_of(first, home))
    assert probe_features(cached, "a", home=home).backbones == ("a",)
    assert "a request that hashes to" in str(caught.value.found)


def test_a_run_is_there_whole_or_not_at_all(cached: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from embcache import io

    written = io.write_file

    def fail(path: Path, data: bytes) -> None:
        if path.name == "result.json":
            raise OSError(28, "No space left on device")
        written(path, data)

    monkeypatch.setattr(io, "write_file", fail)
    with pytest.raises(OSError, match="No space"):
        probe_features(cached, "b", home=home)
    assert len(list((home / "toy" / "runs").iterdir())) == 1


def test_nothing_is_written_when_not_asked(cached: ImageDataset, home: Path) -> None:
    probe_features(cached, "b", home=home, save=False)
    assert len(list((home / "toy" / "runs").iterdir())) == 1


# --- what may not matter


def test_test_labels_influence_nothing_but_the_score(cached: ImageDataset, home: Path) -> None:
    first = probe_features(cached, "a", home=home)
    flipped = np.where(cached.table["split"] == "test", 1 - cached.labels, cached.labels)
    second = probe_features(replace(cached, table=cached.table.assign(label=flipped)), "a", home=home)
    a, b = (load_predictions(run_of(r, home)) for r in (first, second))
    pd.testing.assert_frame_equal(a.drop(columns="label"), b.drop(columns="label"))
    assert [f.best_epoch for f in first.folds] == [f.best_epoch for f in second.folds]
    assert second.mean == pytest.approx(1 - first.mean)


def test_a_result_does_not_depend_on_its_grid(
    cached: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    original = probe_plan.load_features

    def spy(store: Any, *rest: Any, **options: Any) -> torch.Tensor:
        loads.append(store.recipe.backbone)
        return original(store, *rest, **options)

    monkeypatch.setattr(probe_plan, "load_features", spy)
    grid = probe_grid(cached, [["a"], ["b"]], subsets=["S", 30, "F"], folds=3, home=home)
    assert [(r.backbones[0], r.subset) for r in grid] == [(b, s) for b in "ab" for s in ("S", "30", "F")]
    assert loads == ["a", "b"], "features are read once for all subsets"
    alone = probe_features(cached, "b", subset=30, folds=3, home=home, again=True)
    assert alone.id == grid[4].id
    assert [f.score for f in alone.folds] == [f.score for f in grid[4].folds]


def test_all_backbones_and_heads_see_the_same_images(cached: ImageDataset, home: Path) -> None:
    plans = [
        plan_probe(cached, [names], ["S"], ProbeConfig(head=head), home=home)
        for head, names in (("linear", ["a"]), ("linear", ["b"]), ("dvme-noattn", ["a", "b"]))
    ]
    assert len({plan.cells[0].request["splits"] for plan in plans}) == 1


# --- images without features, labels without test


def test_quarantined_images_never_enter(home: Path, ds: ImageDataset) -> None:
    bad = {"i0": "truncated", "i210": "empty file", "i211": "empty file"}
    features = make_features(ds)
    features[[0, 210, 211]] = np.nan
    put_store(home, ds, "a", features, bad=bad)
    result = probe_features(ds, "a", subset="F", home=home)
    assert result.n_test == 58
    assert set(bad).isdisjoint(load_predictions(run_of(result, home))["id"])
    assert result.labels_used == 199
    assert "3 unreadable images left out" in result.notes


def test_images_not_yet_extracted_are_an_error(home: Path, ds: ImageDataset) -> None:
    put_store(home, ds, "a", make_features(ds), ids=[f"i{k}" for k in range(150)])
    with pytest.raises(StoreError, match="110 of 260 images have no features of a yet") as caught:
        probe_features(ds, "a", subset="F", home=home)
    assert "embcache extract --backbone a" in str(caught.value)


def test_unlabeled_official_test_set_is_predicted_not_scored(home: Path) -> None:
    ds = make_dataset([0, 1] * 60 + [-1] * 30, split=["train"] * 120 + ["test"] * 30, n_classes=2)
    put_store(home, ds, "a", make_features(ds))
    result = probe_features(ds, "a", subset="F", test="official", home=home)
    assert result.mean is None
    assert result.std is None
    assert result.interval is None
    assert all(fold.score is None and fold.val_score is not None for fold in result.folds)
    frame = load_predictions(run_of(result, home))
    assert set(frame["id"]) == {f"i{k}" for k in range(120, 150)}
    assert set(frame["label"]) == {-1}
    assert any("not known" in note for note in result.notes)
    assert "test labels not known" in repr(result)
    assert result.labels_used == 120


def test_partly_labeled_test_set_is_scored_where_it_is_labeled(home: Path) -> None:
    labels = [0, 1] * 60 + [0, 1] * 10 + [-1] * 10
    ds = make_dataset(labels, split=["train"] * 120 + ["test"] * 30, n_classes=2)
    put_store(home, ds, "a", make_features(ds))
    result = probe_features(ds, "a", home=home)
    frame = load_predictions(run_of(result, home))
    part = frame[(frame["fold"] == 0) & (frame["label"] >= 0)]
    assert len(frame) == 150
    assert result.folds[0].score == pytest.approx(roc_auc_score(part["label"], part["p_1"]), abs=1e-9)


@pytest.mark.parametrize(
    ("head", "words"),
    [("linear", "draws them equally often"), ("logreg", "weigh alike"), ("knn", "more neighbors")],
)
def test_unbalanced_subsets_say_what_the_head_does_about_it(home: Path, head: str, words: str) -> None:
    ds = make_dataset([0] * 200 + [1] * 40)
    put_store(home, ds, "a", make_features(ds))
    small, full = probe_grid(ds, [["a"]], subsets=[20, "F"], head=head, home=home)
    assert not any("not balanced" in note for note in small.notes)
    (note,) = (note for note in full.notes if "not balanced" in note)
    assert words in note


def test_one_computation_is_one_run(home: Path) -> None:
    ds = make_dataset([0, 1] * 100, split=["train"] * 100 + ["test"] * 100, subset_sizes={"S": 20, "M": 500})
    put_store(home, ds, "a", make_features(ds))
    results = probe_grid(ds, [["a"]], subsets=["S", 20, "M", "F"], head="knn", home=home)
    assert [r.subset for r in results] == ["S", "S", "F", "F"]
    assert len({r.id for r in results}) == len(list_results(home)) == 2
    assert find_saved(ds, [["a"]], subsets=["M", 20], head="knn", home=home) == [results[3], results[0]]
    assert any("subset M is 500 training images" in note for note in results[2].notes)
    assert [r.subset for r in run_cached(subsets=["20", "S", "M", "F"], head="knn", home=home)] == ["S", "F"]


# --- requests that cannot be


def test_single_backbone_heads_take_one(cached: ImageDataset, home: Path) -> None:
    with pytest.raises(UsageError, match="one backbone at a time"):
        probe_features(cached, ["a", "b"], home=home)
    with pytest.raises(UsageError, match="named twice"):
        probe_features(cached, ["a", "a"], head="dvme", home=home)
    with pytest.raises(UsageError, match="no backbone"):
        probe_features(cached, [], home=home)


def test_stores_of_pixels_are_not_probed(home: Path, ds: ImageDataset) -> None:
    put_store(home, ds, "pixels", np.zeros((260, 2, 2, 3), np.uint8))
    with pytest.raises(StoreNotFoundError, match="no features of pixels"):
        probe_features(ds, "pixels", home=home)
    put_store(home, ds, "maps", np.zeros((260, 2, 2, 3), np.float32))
    with pytest.raises(UsageError, match="does not hold vectors"):
        probe_features(ds, "maps", home=home)


def test_several_recipes_need_a_choice(cached: ImageDataset, home: Path) -> None:
    other = make_recipe("a", pooling="other")
    put_store(home, cached, "a", make_features(cached, 12, seed=5), recipe=other)
    with pytest.raises(RecipeError):
        probe_features(cached, "a", home=home)
    config = ProbeConfig(head="dvme-noattn", recipe=other.fingerprint[:10])
    (cell,) = plan_probe(cached, [["a", "b"]], ["S"], config, home=home).cells
    assert cell.request["recipes"][0] == ["a", other.fingerprint]
    with pytest.raises(UsageError, match="fits none"):
        probe_features(cached, "a", home=home, recipe="zzz")
    third = make_recipe("b", pooling="other")
    put_store(home, cached, "b", make_features(cached, 12, seed=6), recipe=third)
    with refused(RecipeError, "several-recipes") as caught:
        probe_features(cached, ["a", "b"], head="dvme-noattn", home=home)
    offered = str(caught.value.fix).split(", or ")
    assert len(offered) == 2
    assert all(re.fullmatch("--recipe [0-9a-f]{12},[0-9a-f]{12}", each) for each in offered)
    for option in (offered[1].split()[1], f"{other.fingerprint[:10]},{third.fingerprint[:9]}"):
        config = ProbeConfig(head="dvme-noattn", recipe=option)
        assert plan_probe(cached, [["a", "b"]], ["S"], config, home=home).cells
    assert dict(plan_probe(cached, [["a", "b"]], ["S"], config, home=home).cells[0].request["recipes"]) == {
        "a": other.fingerprint, "b": third.fingerprint
    }  # fmt: skip
    with refused(RecipeError, "several-recipes") as caught:  # what is chosen already stays chosen
        probe_features(cached, ["a", "b"], head="dvme-noattn", home=home, recipe=other.fingerprint[:10])
    assert str(caught.value.fix).startswith(f"--recipe {other.fingerprint[:10]},")


def test_a_head_that_diverges_is_named(home: Path, ds: ImageDataset) -> None:
    put_store(home, ds, "a", np.full((260, 4), np.inf, np.float32))
    with pytest.raises(ProtocolError, match=r"every fold \(linear, subset S\) diverged in its first epoch"):
        probe_features(ds, "a", home=home)


def test_a_device_that_is_not_there(cached: ImageDataset, home: Path) -> None:
    with pytest.raises(UsageError, match="device cannot be used"):
        probe_features(cached, "a", home=home, device="warp:7")


def test_progress_ends_at_its_total(cached: ImageDataset, home: Path) -> None:
    told: list[tuple[int, int]] = []
    options: dict[str, Any] = {"subsets": ["S", "F"], "home": home, "folds": 2}
    probe_grid(cached, [["a"], ["b"]], **options, progress=lambda done, total, _: told.append((done, total)))
    assert told[-1] == (2 * 2 * 2 * 50, 2 * 2 * 2 * 50)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
