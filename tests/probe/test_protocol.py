"""The protocol, sentence by sentence: test set, pool, folds, subsets, validation, and what cannot be carried."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embcache.data.dataset import ImageDataset, load_dataset
from embcache.data.groups import water_fill
from embcache.errors import ProtocolError, UsageError
from embcache.probe.protocol import Splits, merged_groups, name_everything, plan_splits, subset_sizes
from tests.probe.build import make_dataset
from tests.refusal import refused

FROZEN_TRAIN = [("i40", "i139", "i170", "i151", "i219", "i11"), ("i49", "i98", "i176", "i84", "i177", "i154")]


def patients(n_groups: int, n_classes: int, seed: int = 0, mixed: float = 0.1) -> ImageDataset:
    """Groups of one to six images, mostly of one class each."""
    rng = np.random.default_rng(seed)
    labels: list[int] = []
    groups: list[str] = []
    for g in range(n_groups):
        own = int(rng.integers(n_classes))
        for _ in range(rng.integers(1, 7)):
            labels.append(int(rng.integers(n_classes)) if rng.random() < mixed else own)
            groups.append(f"patient{g}")
    return make_dataset(labels, groups, n_classes=n_classes)


def attempt(ds: ImageDataset, **options: Any) -> Splits | str:
    """The splits, or what was wrong."""
    try:
        return plan_splits(ds, **options)
    except ProtocolError as error:
        return error.code


def pool_of(plan: Splits) -> set[int]:
    return {int(i) for f in range(plan.n_folds) for i in plan.val[f, plan.subsets[0]]}


# --- test set


def test_labeled_official_test_set_is_the_test_set() -> None:
    ds = make_dataset([0, 1] * 60, split=["train"] * 80 + ["test"] * 40)
    for test in ("local", "official"):
        plan = plan_splits(ds, subsets=["F"], test=test)
        assert plan.test_set == "official"
        assert plan.test.tolist() == list(range(80, 120))
        assert pool_of(plan) == set(range(80))


def test_local_test_set_is_a_stratified_grouped_fifth() -> None:
    ds = patients(300, 3)
    plan = plan_splits(ds, subsets=["F"])
    assert plan.test_set == "local"
    assert set(plan.groups[plan.test]).isdisjoint(plan.groups[sorted(pool_of(plan))])
    for c in range(3):
        share = (plan.labels[plan.test] == c).sum() / (plan.labels == c).sum()
        assert share == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("options", [{"seed": 7}, {"folds": 3}, {"val": "matched", "subsets": ["M"]}])
def test_local_test_set_has_a_seed_of_its_own(options: dict[str, object]) -> None:
    ds = patients(200, 2)
    base = plan_splits(ds, subsets=["S"])
    other = plan_splits(ds, **{"subsets": ["S"], **options})  # type: ignore[arg-type]
    assert other.test.tolist() == base.test.tolist()


def test_official_without_labels_holds_nothing_out() -> None:
    ds = make_dataset([0, 1] * 60 + [-1] * 30, split=["train"] * 120 + ["test"] * 30, n_classes=2)
    plan = plan_splits(ds, subsets=["F"], test="official")
    assert plan.test.tolist() == list(range(120, 150))
    assert not plan.test_labeled
    assert pool_of(plan) == set(range(120))


def test_official_needs_a_test_set() -> None:
    with refused(ProtocolError, "no-test-set"):
        plan_splits(make_dataset([0, 1] * 50), subsets=["F"], test="official")


def test_own_val_split_replaces_fold_validation() -> None:
    ds = make_dataset([0, 1] * 80, split=["train"] * 100 + ["val"] * 20 + ["test"] * 40)
    plan = plan_splits(ds, subsets=["S", "F"])
    for fold in range(5):
        assert plan.val[fold, "S"].tolist() == list(range(100, 120))
        assert len(plan.train[fold, "F"]) == 80  # four fifths of the pool, another four fifths each
    assert any("own val split" in note for note in plan.notes)


def test_groups_shared_with_the_own_val_split_leave_training() -> None:
    groups = [f"g{i}" for i in range(100)] + [f"g{i}" for i in range(4)] + [f"v{i}" for i in range(16)]
    ds = make_dataset([0, 1] * 60, groups, ["train"] * 100 + ["val"] * 20)
    plan = plan_splits(ds, subsets=["F"])
    trained = {g for f in range(5) for g in plan.groups[plan.train[f, "F"]]}
    assert trained.isdisjoint(plan.groups[100:120])
    assert any("share a group with the val split" in note for note in plan.notes)


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.booleans(), st.booleans(), st.sampled_from(["local", "official"]))
def test_given_splits_and_shared_groups_never_end_on_both_sides(
    seed: int, labeled_test: bool, exclude: bool, test: str
) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(60, 200))
    split = rng.choice(["train", "val", "test"], size=n, p=[0.7, 0.1, 0.2])
    labels = np.where((split == "test") & (not labeled_test), -1, rng.integers(0, 2, size=n))
    ds = make_dataset(labels.tolist(), [f"g{g}" for g in rng.integers(0, n, size=n)], split.tolist(), n_classes=2)
    plan = attempt(ds, subsets=[8, "F"], test=test, exclude_test_overlap=exclude)
    if isinstance(plan, str):
        assert plan not in ("group-spans-split", "test-image-in-fold")
        return
    for f in range(5):
        train, val = set(plan.groups[plan.train[f, "F"]]), set(plan.groups[plan.val[f, "F"]])
        assert train.isdisjoint(val)
        if plan.test_set == "local" or exclude:
            assert (train | val).isdisjoint(plan.groups[plan.test])


# --- pool


def test_pool_is_cut_after_the_test_set_was_held_out() -> None:
    ds = make_dataset([0, 1] * 200, pool_limit=100)
    plan = plan_splits(ds, subsets=["F"])
    whole = plan_splits(replace(ds, pool_limit=None), subsets=["F"])
    assert plan.test.tolist() == whole.test.tolist()
    assert len(plan.test) == 80
    assert len(pool_of(plan)) == 100
    assert pool_of(plan) < pool_of(whole)
    assert pool_of(plan_splits(ds, subsets=["F"], seed=1)) != pool_of(plan)


# --- folds and subsets


@settings(max_examples=25)
@given(
    n_groups=st.integers(40, 120),
    n_classes=st.integers(2, 4),
    data_seed=st.integers(0, 10_000),
    seed=st.integers(0, 50),
    folds=st.integers(2, 5),
    mixed=st.sampled_from([0.0, 0.1, 0.5]),
    val=st.sampled_from(["full", "matched"]),
)
def test_no_group_on_both_sides_and_subsets_are_balanced_nested_and_of_their_size(
    n_groups: int, n_classes: int, data_seed: int, seed: int, folds: int, mixed: float, val: str
) -> None:
    ds = patients(n_groups, n_classes, data_seed, mixed)
    sizes = [n_classes * 2, n_classes * 2 + 1, 25]
    plan = attempt(ds, subsets=[*sizes, "F"], folds=folds, seed=seed, val=val)
    if isinstance(plan, str):  # a small draw can hold a class in too few groups
        assert plan in ("class-too-small", "subset-too-large", "matched-too-small")
        return
    if val == "full":
        held = [set(plan.val[f, "F"].tolist()) for f in range(folds)]
        assert sum(map(len, held)) == len(set().union(*held))  # every image validates once
    for f in range(folds):
        for subset in plan.subsets:
            train, held_out = plan.train[f, subset], plan.val[f, subset]
            assert len(set(train.tolist())) == len(train)
            sides = [set(plan.groups[rows]) for rows in (train, held_out, plan.test)]
            assert sides[0].isdisjoint(sides[1])
            assert sides[2].isdisjoint(sides[0] | sides[1])
        there = np.bincount(plan.labels[plan.train[f, "F"]], minlength=n_classes)
        for n in sizes:
            counts = np.bincount(plan.labels[plan.train[f, str(n)]], minlength=n_classes)
            assert counts.tolist() == water_fill(there, n).tolist()
        nested = [set(plan.train[f, str(n)].tolist()) for n in sizes] + [set(plan.train[f, "F"].tolist())]
        assert all(small <= large for small, large in pairwise(nested))


def test_validation_of_fold_f_is_fold_f_and_f_is_all_the_rest() -> None:
    ds = patients(200, 2)
    plan = plan_splits(ds, subsets=["S", "F"])
    everything = pool_of(plan)
    for f in range(5):
        val = set(plan.val[f, "F"].tolist())
        assert set(plan.train[f, "F"].tolist()) == everything - val
        assert plan.val[f, "S"].tolist() == plan.val[f, "F"].tolist()


def test_a_seed_means_the_same_images_whatever_else_is_asked() -> None:
    ds = patients(200, 2)
    alone = plan_splits(ds, subsets=["S"], seed=4)
    among = plan_splits(ds, subsets=[10, "S", 30, "F"], seed=4)
    assert alone.train_ids(2, "S") == among.train_ids(2, "S")
    assert alone.digest("S") == among.digest("S")
    assert alone.train_ids(2, "S") != plan_splits(ds, subsets=["S"], seed=5).train_ids(2, "S")


def test_splits_do_not_depend_on_the_order_of_the_table() -> None:
    ds = patients(150, 3)
    shuffled = replace(ds, table=ds.table.sample(frac=1, random_state=3))
    a, b = plan_splits(ds, subsets=["S", "F"]), plan_splits(shuffled, subsets=["S", "F"])
    assert set(a.test_ids) == set(b.test_ids)
    for f in range(5):
        assert a.train_ids(f, "S") == b.train_ids(f, "S")
        assert set(a.val_ids(f, "S")) == set(b.val_ids(f, "S"))


def test_published_splits_stay() -> None:
    # Frozen: another answer here means that every published split has changed.
    plan = plan_splits(patients(60, 2), subsets=[6])
    assert [plan.train_ids(f, "6") for f in range(2)] == FROZEN_TRAIN


def test_digest_follows_labels_and_test_groups() -> None:
    ds = make_dataset([0, 1] * 60, split=["train"] * 80 + ["test"] * 40)
    digest = plan_splits(ds, subsets=["F"]).digest("F")
    relabeled = replace(ds, table=ds.table.assign(label=[1, *ds.table["label"][1:]]))
    regrouped = replace(ds, table=ds.table.assign(group=[*ds.table["group"][:-1], "another"]))
    assert plan_splits(relabeled, subsets=["F"]).digest("F") != digest
    assert plan_splits(regrouped, subsets=["F"]).digest("F") != digest


@pytest.mark.parametrize("subset", ["L", "-3", "0", "1.5", "", "٣"])
def test_unknown_subsets_are_refused(subset: str) -> None:
    with refused(UsageError, "unknown-subset"):
        plan_splits(make_dataset([0, 1] * 50), subsets=[subset])


# --- validation


def test_matched_validation_has_as_many_images_balanced() -> None:
    ds = make_dataset([0] * 300 + [1] * 100)
    plan = plan_splits(ds, subsets=["S", "M"], val="matched")
    for f in range(5):
        for subset, n in (("S", 20), ("M", 60)):
            counts = np.bincount(plan.labels[plan.val[f, subset]])
            assert counts.sum() == n
            there = np.bincount(plan.labels[plan_splits(ds, subsets=["S"]).val[f, "S"]])
            assert counts.tolist() == water_fill(there, n).tolist()
        assert set(plan.val_ids(f, "S")) < set(plan.val_ids(f, "M"))


def test_matched_validation_refuses_fewer_than_two_of_a_class() -> None:
    ds = make_dataset([0] * 100 + [1] * 100 + [2] * 100)
    assert plan_splits(ds, subsets=[6], val="matched").val[0, "6"].shape == (6,)
    with refused(ProtocolError, "matched-too-small") as caught:
        plan_splits(ds, subsets=[5], val="matched")
    assert "--val full" in str(caught.value)


# --- groups


def test_identical_bytes_are_one_group() -> None:
    ds = make_dataset([0, 1] * 50)
    digests = {f"i{k}": f"{k // 2 if k < 40 else k:064x}" for k in range(100)}
    groups = merged_groups(ds, digests)
    assert all(groups[k] == groups[k + 1] for k in range(0, 40, 2))
    assert len(set(groups)) == 80
    plan = plan_splits(ds, subsets=["F"], digests=digests)
    for f in range(5):
        assert set(plan.groups[plan.train[f, "F"]]).isdisjoint(plan.groups[plan.val[f, "F"]])


def overlapping() -> ImageDataset:
    groups = [f"g{i}" for i in range(100)] + [f"g{i}" for i in range(10)] + [f"t{i}" for i in range(30)]
    return make_dataset([0, 1] * 70, groups, ["train"] * 100 + ["test"] * 40)


def test_group_shared_with_the_official_test_set_warns_with_the_count() -> None:
    plan = plan_splits(overlapping(), subsets=["F"])
    (note,) = [n for n in plan.notes if "official test set" in n]
    assert "10 training images share 10 groups" in note
    assert "--exclude-test-overlap" in note
    assert len(pool_of(plan)) == 100


def test_exclude_test_overlap_drops_such_images_from_training() -> None:
    plan = plan_splits(overlapping(), subsets=["F"], exclude_test_overlap=True)
    assert pool_of(plan) == set(range(10, 100))
    assert plan.test.tolist() == list(range(100, 140))
    assert any("10 training images of 10 groups" in n for n in plan.notes)


# --- unreadable images


def test_unreadable_images_are_left_out_before_anything_is_drawn() -> None:
    ds = patients(200, 2)
    gone = {"i3", "i10", "i200"}
    plan = plan_splits(ds, subsets=["S", "F"], unreadable=gone)
    assert gone.isdisjoint(plan.test_ids)
    assert gone.isdisjoint(plan.ids[sorted(pool_of(plan))])
    assert all(len(plan.train[f, "S"]) == 20 for f in range(5))
    assert "3 unreadable images left out" in plan.notes


# --- what the data cannot carry


def test_fewer_than_two_classes() -> None:
    with refused(ProtocolError, "one-class") as caught:
        plan_splits(make_dataset([0] * 50, n_classes=2), subsets=["F"])
    assert "a: 40, b: 0" in str(caught.value)


def test_class_with_fewer_groups_than_folds() -> None:
    groups = [f"g{i}" for i in range(60)] + [f"h{i % 4}" for i in range(40)]
    split = ["train"] * 100
    ds = make_dataset([0] * 60 + [1] * 40 + [0, 1], [*groups, "t0", "t1"], [*split, "test", "test"])
    with refused(ProtocolError, "class-too-small") as caught:
        plan_splits(ds, subsets=["F"])
    assert "40 images in 4 groups" in str(caught.value)
    assert plan_splits(ds, subsets=["F"], folds=4).n_folds == 4


def test_a_named_subset_larger_than_the_pool_takes_all_and_says_so() -> None:
    plan = plan_splits(make_dataset([0, 1] * 50, subset_sizes={"S": 50, "M": 500}), subsets=["S", "M", "F"])
    assert all(set(plan.train[f, "M"].tolist()) == set(plan.train[f, "F"].tolist()) for f in range(5))
    assert len(plan.train[0, "S"]) == 50
    assert [note for note in plan.notes if "subset M is 500" in note]
    assert not [note for note in plan.notes if "subset S" in note]


def test_test_set_of_one_class() -> None:
    ds = make_dataset([0, 1] * 50 + [0] * 10, split=["train"] * 100 + ["test"] * 10)
    with refused(ProtocolError, "one-class"):
        plan_splits(ds, subsets=["F"])


def test_class_missing_from_a_validation_fold_is_told() -> None:
    # Every group holds both rare classes or none, so one fold can be left without them.
    ds = make_dataset([0, 1] * 40 + [0, 1, 2] * 4, split=["train"] * 80 + ["train", "train", "val"] * 4)
    base = ds.table.assign(split=["train"] * 80 + ["train"] * 12)
    whole = replace(ds, table=base)
    with refused(ProtocolError, "class-too-small"):
        plan_splits(whole, subsets=["F"])
    no_c = ds.table.assign(split=["val" if i < 20 else "train" for i in range(92)], label=ds.labels)
    extended = replace(ds, table=no_c)
    plan = plan_splits(extended, subsets=["F"], folds=2)
    assert any("has no image of c" in note for note in plan.notes)


def test_advice_for_a_rare_class_leads_to_splits() -> None:
    ds = make_dataset([0, 1] * 40 + [2] * 3)
    with pytest.raises(ProtocolError) as caught:
        plan_splits(ds, subsets=["F"])
    fix = str(caught.value.fix)
    assert "--drop-class c, or --merge-class c+OTHER=NEW, or more images: 6 groups of every class, one for" in fix
    assert plan_splits(ds.with_classes(["c"]), subsets=["F"]).class_names == ("a", "b")
    assert plan_splits(ds.with_classes(merge={"bc": ["b", "c"]}), subsets=["F"]).class_names == ("a", "bc")
    folds = int(fix.split("--folds ")[1][0])
    assert plan_splits(ds, subsets=["F"], folds=folds).n_folds == folds


def test_two_images_of_every_class_are_told_what_the_local_test_set_takes() -> None:
    ds = make_dataset([0, 1, 2, 3, 4] * 2)
    with pytest.raises(ProtocolError) as caught:
        plan_splits(ds, subsets=["F"], folds=2)
    assert "the local test set holds 1 more" in str(caught.value.found)
    # Dropping or fewer folds would not help: three images are needed of every class that is left.
    assert (
        caught.value.fix == "--merge-class a+OTHER=NEW, or more images: 3 groups of every class, one for the test set"
    )
    assert plan_splits(make_dataset([0, 1, 2, 3, 4] * 3), subsets=["F"], folds=2).n_folds == 2


def own_val(train: list[int], val: list[int]) -> ImageDataset:
    split = ["train"] * len(train) + ["val"] * len(val) + ["test"] * 6
    return make_dataset([*train, *val, *[0, 1, 2] * 2], split=split, n_classes=3)


def test_with_a_val_split_of_ones_own_folds_need_two_groups_of_a_class_only() -> None:
    plan = plan_splits(own_val([0, 1] * 20 + [2] * 2, [0, 1, 2] * 3), subsets=["F"])
    assert all(set(plan.labels[plan.train[f, "F"]]) == {0, 1, 2} for f in range(5))
    with refused(ProtocolError, "class-too-small") as caught:
        plan_splits(own_val([0, 1] * 20 + [2], [0, 1, 2] * 3), subsets=["F"])
    assert "--folds" not in str(caught.value.fix)
    assert "--drop-class c" in str(caught.value.fix)


def test_a_val_split_of_one_class_gets_advice_about_itself() -> None:
    with refused(ProtocolError, "one-class") as caught:
        plan_splits(own_val([0, 1, 2] * 20, [1] * 5), subsets=["F"])
    assert "val split" in str(caught.value.fix)
    notes = plan_splits(own_val([0, 1, 2] * 20, [0, 1] * 5), subsets=["F"]).notes
    assert sum("has no image of c" in note for note in notes) == 1
    with refused(ProtocolError, "matched-too-small") as caught:
        plan_splits(own_val([0, 1, 2] * 20, [0, 1, 2, 0, 1]), subsets=["F"], val="matched")
    assert caught.value.fix == "--val full"  # no larger subset has more of class c in the val split


# --- one computation has one name


def test_a_number_that_s_is_is_called_s() -> None:
    ds = make_dataset([0, 1] * 100, subset_sizes={"S": 20, "M": 60})
    assert list(subset_sizes(ds, [20, "S", "60", 61, "F"])) == ["S", "M", "61", "F"]
    # What is asked for as a number must be there, whatever it is called.
    with refused(ProtocolError, "subset-too-large"):
        plan_splits(make_dataset([0, 1] * 30, subset_sizes={"S": 50, "M": 500}), subsets=[50])
    assert plan_splits(make_dataset([0, 1] * 30, subset_sizes={"S": 50, "M": 500}), subsets=["S"]).subsets == ("S",)


def test_what_is_everything_in_every_fold_of_all_plans_is_f() -> None:
    # 101 images: a pool of 81 or so; the folds train on 64 or 65.
    ds = make_dataset([0, 1] * 50 + [0], subset_sizes={"S": 20, "M": 500})
    plan = plan_splits(ds, subsets=["S", "M", "F"])
    sizes = {len(plan.train[f, "F"]) for f in range(5)}
    (named,) = name_everything([plan])
    assert named.subsets == ("S", "F")
    assert [named.name_of(s) for s in ("S", "M", "F")] == ["S", "F", "F"]
    assert all(np.array_equal(named.train[f, "F"], plan.train[f, "M"]) for f in range(5))
    assert len(sizes) == 2
    partly = plan_splits(replace(ds, subset_sizes={"S": min(sizes), "M": max(sizes)}), subsets=["S", "M"])
    assert partly.everything == {"M"}
    others = replace(partly, everything=frozenset())
    assert name_everything([partly, others])[0].subsets == ("S", "M")


# --- the real images


@pytest.mark.shared
def test_pneumonia_as_published(shared_data: Path) -> None:
    ds = load_dataset("pneumonia", shared_data / "pneumonia")
    plan = plan_splits(ds, subsets=["S", "M", "F"])
    assert plan.test_set == "official"
    assert np.bincount(plan.labels[plan.test]).tolist() == [234, 390]
    assert len(pool_of(plan)) == 5216
    for f in range(5):
        assert np.bincount(plan.labels[plan.train[f, "S"]]).tolist() == [25, 25]
        assert np.bincount(plan.labels[plan.train[f, "M"]]).tolist() == [250, 250]
        assert len(plan.train[f, "F"]) + len(plan.val[f, "F"]) == 5216
        assert len(plan.val[f, "F"]) == pytest.approx(1043, abs=5)
    assert any("share" in note and "official test set" in note for note in plan.notes)


@pytest.mark.shared
def test_aptos_layout_holds_out_a_fifth(shared_data: Path) -> None:
    ds = load_dataset("aptos", shared_data / "aptos")
    plan = plan_splits(ds, subsets=["S"])
    assert plan.test_set == "local"
    assert len(plan.test) == pytest.approx(422 / 5, abs=3)
    assert len(plan_splits(ds, subsets=["S"], test="official").test) == 60
