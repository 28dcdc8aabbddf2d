"""What a probe can be asked beyond the default: rates, repeats, views, targets, options of heads; folds that fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.naive_bayes import GaussianNB

import embcache.probe.probe as run_module
from embcache.data.classes import retarget
from embcache.data.dataset import ImageDataset
from embcache.errors import EmbcacheError, ProtocolError, StoreError, UsageError
from embcache.probe.heads import make_head
from embcache.probe.heads.trained import MLPHead
from embcache.probe.probe import probe_features
from embcache.probe.protocol import plan_splits, write_splits
from embcache.runs.folders import Result, load_heads, load_predictions, load_result, runs_dir
from embcache.sealed import seal, unseal
from tests.contracts.test_heads import Bottleneck
from tests.probe.build import find_saved, make_dataset, make_features, probe_grid, put_store
from tests.refusal import refused

FOLDS = 3
RATES = [1e-3, 1e-2, 1e-1]


@pytest.fixture
def ds() -> ImageDataset:
    rng = np.random.default_rng(0)
    made = make_dataset(rng.integers(0, 2, 150).tolist(), split=["train"] * 110 + ["test"] * 40)
    table = {"sex": np.where(rng.random(150) < 0.5, "F", "M"), "age": rng.integers(20, 90, 150)}
    return replace(made, table=made.table.assign(**table))


@pytest.fixture
def cached(home: Path, ds: ImageDataset) -> ImageDataset:
    put_store(home, ds, "a", make_features(ds, 6, shift=1.0))
    return ds


def probe(ds: ImageDataset, target: str | None = None, **options: Any) -> Result:
    ds = ds if target is None else retarget(ds, target)
    return probe_features(ds, options.pop("backbones", "a"), **{"folds": FOLDS, **options})


def predictions(result: Result, fold: int | None = None) -> pd.DataFrame:
    frame = load_predictions(runs_dir(result.dataset) / result.id)
    return frame if fold is None else frame[frame["fold"] == fold].drop(columns="fold").reset_index(drop=True)


def test_default_requests_keep_the_ids_of_earlier_versions(home: Path) -> None:
    ds = make_dataset([0, 1] * 60)
    put_store(home, ds, "a", make_features(ds, 6))
    put_store(home, ds, "b", make_features(ds, 4, seed=1))
    found = probe_grid(ds, [["a"]], subsets=["S", "F"], folds=3, home=home)
    found += probe_grid(ds, [["a", "b"]], head="dvme-noattn", folds=3, home=home, seed=2, lr=1e-2)
    # the ids of protocol 3: a change of code, or a new option, must not change them
    assert [r.id for r in found] == ["linear-S-7a7b7ca2eea5", "linear-F-03464ca1bf54", "dvme-noattn-S-eb5ab80c9488"]
    assert not {"repeats", "lr", "views", "target", "seed"} & set(found[0].request)
    for result in found:
        assert set(result.recipes) == set(result.backbones)


# --- learning rates


def test_a_sweep_keeps_of_separate_runs_the_best_on_validation_fold_by_fold(cached: ImageDataset, home: Path) -> None:
    alone = [probe(cached, lr=rate) for rate in RATES]
    swept = probe(cached, lr=RATES)
    for fold in swept.folds:
        best = max(range(len(RATES)), key=lambda k: alone[k].folds[fold.fold].val_score)
        assert fold == alone[best].folds[fold.fold]
        assert fold.lr == RATES[best]
        pd.testing.assert_frame_equal(predictions(swept, fold.fold), predictions(alone[best], fold.fold))
    assert len({fold.lr for fold in swept.folds}) > 1
    assert swept.request["lr"] == RATES
    assert any("chosen on validation, fold by fold, among 0.001, 0.01, 0.1" in note for note in swept.notes)


def test_one_rate_in_a_list_is_that_rate(cached: ImageDataset, home: Path) -> None:
    assert probe(cached, lr=[1e-2, 1e-2]).id == probe(cached, lr=1e-2).id
    assert probe(cached, lr=1e-3).id == probe(cached).id


def test_a_rate_that_diverges_is_never_the_one_kept(cached: ImageDataset, home: Path) -> None:
    swept = probe(cached, lr=[1e38, 1e-3])
    assert [fold.lr for fold in swept.folds] == [1e-3] * FOLDS
    assert [fold.score for fold in swept.folds] == [fold.score for fold in probe(cached).folds]
    told = "learning rate 1e+38 diverged in every fold: the others were kept"
    assert told in swept.notes
    assert told in probe(cached, lr=[1e38, 1e-3]).notes, "a reused result tells it too"
    assert not any("diverged" in note for note in probe(cached, lr=[1e-2, 1e-3]).notes)


# --- repeats


def test_repeats_are_separate_seeds_in_one_result(cached: ImageDataset, home: Path) -> None:
    alone = [probe(cached, seed=seed) for seed in (4, 5)]
    both = probe(cached, seed=4, repeats=2)
    assert [(f.fold, f.repeat) for f in both.folds] == [(k, k // FOLDS) for k in range(2 * FOLDS)]
    for fold in both.folds:
        twin = alone[fold.repeat].folds[fold.fold % FOLDS]
        assert replace(fold, fold=twin.fold, repeat=0) == twin
        pd.testing.assert_frame_equal(predictions(both, fold.fold), predictions(alone[fold.repeat], twin.fold))
    assert both.mean == pytest.approx(np.mean([f.score for result in alone for f in result.folds]))
    assert both.request["repeats"] == 2
    assert len(load_heads(runs_dir("toy") / both.id)) == 2 * FOLDS
    assert both.id not in {result.id for result in alone}


def test_repeats_on_the_folds_of_a_file_say_so_and_are_refused_where_they_would_be_copies(
    cached: ImageDataset, home: Path, tmp_path: Path
) -> None:
    path = tmp_path / "splits.json"
    write_splits(plan_splits(cached, subsets=["S"], folds=FOLDS), path)
    both = probe(cached, splits=path, repeats=2)
    assert any("2 repeats with other random streams on the folds of the splits file" in note for note in both.notes)
    assert [f.score for f in both.folds[:FOLDS]] != [f.score for f in both.folds[FOLDS:]]
    with pytest.raises(UsageError, match="copies of each other"):
        probe(cached, head="logreg", splits=path, repeats=2)


# --- views


def test_views_are_for_training_alone(home: Path, ds: ImageDataset) -> None:
    features = make_features(ds, 6)
    rng = np.random.default_rng(5)
    views = np.stack([features, *(features + rng.normal(size=features.shape) for _ in range(2))], 1).astype(np.float32)
    held = ds.table["split"].to_numpy() == "test"
    views[held, 1:] = np.nan  # never looked at
    put_store(home, ds, "a", views)
    viewed = probe(ds, views=3)
    plain = probe(ds)  # what is only cached in views is probed plain unless views are asked for
    assert [f.score for f in viewed.folds] != [f.score for f in plain.folds]
    assert "views" not in plain.request
    put_store(home, ds, "same", features)
    assert plain.folds == probe(ds, backbones="same").folds


# --- heads and targets


def test_a_solved_head_is_probed_like_any_other(cached: ImageDataset, home: Path) -> None:
    result = probe(cached, head="logreg")
    assert load_result(runs_dir("toy") / result.id) == result
    assert all((f.lr, f.best_epoch, f.epochs) == (None, 0, 0) for f in result.folds)
    assert all(f.chosen["C"] > 0 and f.val_score > 0.5 for f in result.folds)
    plan = plan_splits(cached, subsets=["S"], folds=FOLDS)
    x, row = make_features(cached, 6, shift=1.0), {name: k for k, name in enumerate(cached.ids)}
    train, val = (np.sort([row[i] for i in ids]) for ids in (plan.train_ids(1, "S"), plan.val_ids(1, "S")))
    fitted = make_head("logreg").fit(
        {"a": x[train]}, cached.labels[train], x_val={"a": x[val]}, y_val=cached.labels[val]
    )
    expected = fitted.predict_proba({"a": x[cached.table["split"] == "test"]})
    np.testing.assert_allclose(predictions(result, 1)[["p_0", "p_1"]], expected, rtol=1e-6)


def test_hyperparameters_of_heads_are_part_of_the_request(cached: ImageDataset, home: Path) -> None:
    usual, few = probe(cached, head="knn"), probe(cached, head="knn", head_options={"k": 3})
    assert few.request["head"] == {**usual.request["head"], "k": 3}
    assert few.id != usual.id
    assert probe(cached, head="knn", head_options={"k": 20}).id == usual.id
    with pytest.raises(UsageError, match="no such hyperparameter"):
        probe(cached, head="knn", head_options={"neighbors": 3})


def test_heads_are_objects_too(cached: ImageDataset, home: Path) -> None:
    named, passed = probe(cached, head="mlp", head_options={"hidden": 8}), probe(cached, head=MLPHead(hidden=8))
    assert passed == named
    other = probe(cached, head=Bottleneck())
    assert other.request["head"] == {"name": "tests.contracts.test_heads:Bottleneck"}
    assert other.id.startswith("Bottleneck-S-")
    assert probe(cached, head="tests.contracts.test_heads:Bottleneck") == other  # as the command line names it
    assert load_result(runs_dir("toy") / other.id) == other


def test_scikit_learn_classifiers_are_heads_whose_models_are_not_kept(cached: ImageDataset, home: Path) -> None:
    result = probe(cached, head=GaussianNB())
    assert (result.head, result.folds[0].lr) == ("sklearn.naive_bayes:GaussianNB", None)
    assert any("no models" in note for note in result.notes)
    assert probe(cached, head=GaussianNB()) == result
    assert probe(cached, head=GaussianNB(var_smoothing=1e-3)).id != result.id
    plan = plan_splits(cached, subsets=["S"], folds=FOLDS)
    x, row = make_features(cached, 6, shift=1.0), {name: k for k, name in enumerate(cached.ids)}
    train = np.sort([row[i] for i in plan.train_ids(1, "S")])
    theirs = GaussianNB().fit(x[train], cached.labels[train]).predict_proba(x[cached.table["split"] == "test"])
    np.testing.assert_allclose(predictions(result, 1)[["p_0", "p_1"]], theirs, atol=1e-6)
    with pytest.raises(StoreError):
        load_heads(runs_dir("toy") / result.id)
    with refused(UsageError, "head-not-registered"):
        make_head(**result.request["head"])


def test_what_cannot_be_identified_is_not_reused(cached: ImageDataset, home: Path) -> None:
    class Local(Bottleneck):
        """Of a function."""

    first, second = probe(cached, head=Local()), probe(cached, head=Local())
    assert first.id != second.id
    assert any("cannot be reused" in note for note in first.notes)


def test_attention_is_part_of_the_request_where_it_is_asked_for(home: Path) -> None:
    ds = make_dataset([0, 1] * 60)
    put_store(home, ds, "a", make_features(ds, 6))
    put_store(home, ds, "b", make_features(ds, 4, seed=1))

    def planned(**options: Any) -> str | Result:
        (found,) = find_saved(ds, [["a", "b"]], subsets=["S"], head="dvme", folds=3, home=home, head_options=options)
        return found

    assert planned() == planned(attention="auto") == "dvme-S-c032a260de0d"  # ids are kept
    assert planned(proj_dim=8) == planned(proj_dim=8, attention="auto") == "dvme-S-138a5ab50cc9"
    assert len({planned(), planned(attention="exact"), planned(attention="fast")}) == 3
    (by_nodes,) = probe_grid(
        ds, [["a", "b"]], head="dvme", head_options={"attention": "fast", "proj_dim": 8}, folds=3, home=home
    )
    assert by_nodes.request["head"] == {"name": "dvme", "proj_dim": 8, "attention": "fast"}
    with pytest.raises(UsageError, match="unknown --attention"):
        planned(attention="quick")


def test_a_column_is_probed_instead_of_the_label(cached: ImageDataset, home: Path) -> None:
    told = (cached.table["sex"] == "M").to_numpy()
    features = np.random.default_rng(1).normal(size=(len(cached), 6)).astype(np.float32)
    features[:, 0] += 6 * told  # a shortcut
    put_store(home, cached, "shortcut", features)
    result = probe(cached, backbones="shortcut", target="Sex", head="logreg")
    assert (result.target, result.class_names, result.metric) == ("sex", ("F", "M"), "auc")
    assert result.mean > 0.95
    assert result.request["target"] == "sex"
    assert any("column 'sex'" in note for note in result.notes)
    frame = predictions(result, 0)
    by_id = dict(zip(cached.table["id"], told, strict=True))
    assert [by_id[i] for i in frame["id"]] == frame["label"].astype(bool).tolist()
    ages = probe(cached, backbones="shortcut", target="age")
    assert ages.metric == "macro_auc"
    with pytest.raises(UsageError, match="no column"):
        probe(cached, target="height")


# --- planning


def test_find_saved_gives_results_and_the_ids_of_those_to_come(
    cached: ImageDataset, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request: dict[str, Any] = {"subsets": ["S", 30], "folds": FOLDS, "home": home, "lr": RATES}
    first, second = find_saved(cached, [["a"]], **request)
    assert isinstance(first, str)
    assert not runs_dir("toy").exists()
    done = probe_features(cached, "a", subset="S", folds=FOLDS, home=home, lr=RATES)
    assert done.id == first
    monkeypatch.setattr(run_module, "train_heads", lambda *_, **__: pytest.fail("trained"))
    assert find_saved(cached, [["a"]], **request) == [done, second]


@pytest.mark.parametrize("change", [{"estimate": ...}, {"request": {"protocol": 1}}])
def test_a_run_of_an_earlier_version_is_refused_and_made_again(
    cached: ImageDataset, home: Path, change: dict[str, Any]
) -> None:
    result = probe(cached)
    run = runs_dir("toy") / result.id
    content = unseal((run / "result.json").read_bytes(), run, "")
    for key, value in change.items():
        if value is ...:
            del content[key]
        else:
            content[key] |= value
    (run / "result.json").write_bytes(seal(content))
    with pytest.raises(StoreError, match="another version"):
        load_result(run)
    again = probe(cached)
    assert (again.id, again.mean) == (result.id, result.mean)
    assert load_result(run) == again


# --- folds that fail


def test_a_fold_that_diverges_is_named_and_the_others_stay(home: Path, ds: ImageDataset) -> None:
    features = make_features(ds, 6)
    put_store(home, ds, "a", features)
    plan = plan_splits(ds, subsets=["S"], folds=FOLDS)
    parts = {f: set(plan.train[f, "S"]) | set(plan.val[f, "S"]) for f in range(FOLDS)}
    row = next(iter(parts[1] - parts[0] - parts[2]))
    broken = features.copy()
    broken[row] = np.inf
    put_store(home, ds, "b", broken)
    whole, damaged = probe(ds), probe(ds, backbones="b")
    assert [f.failed for f in damaged.folds] == [False, True, False]
    assert [damaged.folds[k] for k in (0, 2)] == [whole.folds[k] for k in (0, 2)]
    failed = damaged.folds[1]
    assert (failed.score, failed.val_score, failed.metrics, failed.best_epoch) == (None, None, {}, 0)
    assert damaged.mean == pytest.approx(np.mean([whole.folds[k].score for k in (0, 2)]))
    assert damaged.std == pytest.approx(np.std([whole.folds[k].score for k in (0, 2)], ddof=1))
    assert np.isfinite(damaged.interval).all()
    assert "fold 1 diverged in its first epoch: left out of mean, deviation and interval" in damaged.notes
    assert set(predictions(damaged)["fold"]) == {0, 2}
    run = runs_dir("toy") / damaged.id
    assert [bool(head) for head in load_heads(run)] == [True, False, True]
    assert load_result(run) == damaged
    assert "left out" in "".join(probe(ds, backbones="b").notes)  # taken again, told again


@pytest.mark.parametrize("head", ["linear", "knn"])
def test_when_every_fold_fails_nothing_is_written(home: Path, ds: ImageDataset, head: str) -> None:
    put_store(home, ds, "a", np.full((150, 4), np.nan, np.float32))
    with pytest.raises(ProtocolError, match=rf"every fold \({head}, subset S\)"):
        probe(ds, head=head)
    assert not list(runs_dir("toy").glob("*"))


def test_test_images_whose_features_are_not_finite_are_named(home: Path, ds: ImageDataset) -> None:
    features = make_features(ds, 6)
    features[120] = np.nan
    put_store(home, ds, "a", features)
    with pytest.raises(StoreError, match="1 of 40 test images have features that are not finite") as caught:
        probe(ds)
    assert "'i120'" in str(caught.value)
    assert not list(runs_dir("toy").glob("*"))


@pytest.mark.parametrize(
    ("options", "error", "code"),
    [
        ({"subset": 900}, ProtocolError, "subset-too-large"),
        ({"subset": 1}, ProtocolError, "subset-too-small"),
        ({"views": 10**9}, UsageError, "option-bounds"),
        ({"lr": [1e-3, -1.0]}, UsageError, "option-bounds"),
        ({"folds": 60}, ProtocolError, "class-too-small"),
    ],
)
def test_requests_that_cannot_be_are_one_error(
    cached: ImageDataset, home: Path, options: dict[str, Any], error: type[EmbcacheError], code: str
) -> None:
    with refused(error, code) as caught:
        probe(cached, **options)
    assert caught.value.fix
    assert not runs_dir("toy").exists()
