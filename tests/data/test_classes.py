"""Classes left out or merged: what becomes of labels, rows, names and notes, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from embcache.config import DatasetRef
from embcache.data.classes import (
    as_in_run,
    change_notes,
    class_flags,
    class_words,
    retarget,
    with_ref,
)
from embcache.data.dataset import ImageDataset
from embcache.errors import UsageError
from tests.probe.build import make_dataset
from tests.refusal import refused

NAMES = ("none", "mild", "severe", "other, unclear", "a+b")


def graded() -> ImageDataset:
    """Two images of every class in train, one in test; one image has no label."""
    ds = make_dataset([0, 1, 2, 3, 4] * 3 + [-1], split=["train"] * 10 + ["test"] * 5 + ["train"], n_classes=5)
    return replace(ds, class_names=NAMES)


def named(ds: ImageDataset) -> dict[str, str]:
    return {i: ds.class_names[y] if y >= 0 else "" for i, y in zip(ds.ids.tolist(), ds.labels.tolist(), strict=True)}


@pytest.mark.parametrize(
    ("drop", "merge", "classes", "metric"),
    [
        (["other, unclear"], {}, ("none", "mild", "severe", "a+b"), "macro_auc"),
        ([], {"ill": ["severe", "mild"]}, ("none", "ill", "other, unclear", "a+b"), "macro_auc"),
        ([], {"severe": ["a+b", "severe"]}, ("none", "mild", "severe", "other, unclear"), "macro_auc"),
        (["other, unclear", "a+b"], {"ill": ["mild", "severe"]}, ("none", "ill"), "auc"),
    ],
)
def test_every_image_has_its_new_class_or_is_gone(
    drop: Sequence[str], merge: Mapping[str, Sequence[str]], classes: tuple[str, ...], metric: str
) -> None:
    ds = graded()
    changed = ds.with_classes(drop, merge)
    to = {old: new for new, members in merge.items() for old in members}
    expected = {i: to.get(name, name) for i, name in named(ds).items() if name not in drop}
    assert named(changed) == expected
    assert changed.class_names == classes  # a merged class stands where its first member stood
    assert (changed.metric, changed.name, changed.leaderboard_alpha) == (metric, ds.name, None)
    assert changed.whole is ds
    # What a run keeps of it makes the same dataset again.
    again = as_in_run(ds, {"classes": dict(changed.renamed)})
    pd.testing.assert_frame_equal(again.table, changed.table)
    assert again.class_names == changed.class_names


def test_changes_after_changes_are_those_of_the_loaded_dataset() -> None:
    ds = graded()
    step = ds.with_classes(["a+b"], {"ill": ["mild", "severe"]}).with_classes(merge={"bad": ["ill", "other, unclear"]})
    at_once = ds.with_classes(["a+b"], {"bad": ["mild", "severe", "other, unclear"]})
    assert step.renamed == at_once.renamed
    assert step.whole is ds
    pd.testing.assert_frame_equal(step.table, at_once.table)
    assert ds.with_classes() is ds


def test_notes_count_the_images_by_split() -> None:
    changed = graded().with_classes(["a+b"], {"ill": ["mild", "severe"]})
    assert change_notes(changed) == [
        "classes mild, severe are one class, ill: 6 images (4 train, 2 test)",
        "class a+b is left out: 3 images (2 train, 1 test)",
    ]


def test_names_may_hold_the_marks_that_separate_names() -> None:
    changed = with_ref(graded(), DatasetRef(drop_class="other, unclear,a+b", merge_class="mild + severe=ill"))
    assert changed.class_names == ("none", "ill")
    assert class_words(changed.renamed) == "mild + severe = ill, without a+b, other, unclear"
    assert class_flags(changed.renamed) == [
        "--drop-class", "a+b", "--drop-class", "other, unclear", "--merge-class", "mild+severe=ill",
    ]  # fmt: skip
    changed = with_ref(graded(), DatasetRef(merge_class="a+b+none=x"))
    assert changed.class_names == ("x", "mild", "severe", "other, unclear")


@pytest.mark.parametrize(
    ("drop", "merge", "code"),
    [
        (["sever"], [], "unknown-class"),
        ([], ["mild+nome=x"], "unknown-class"),
        ([], ["mild+severe=none"], "class-name-taken"),
        ([], ["mild=x"], "merge-class"),
        ([], ["mild+severe"], "merge-class"),
        ([], ["mild+severe=x", "none+a+b=x"], "merge-class"),
        (["mild"], ["mild+severe=x"], "class-named-twice"),
        (["none,mild", "severe", "a+b"], [], "too-few-classes"),
    ],
)
def test_what_cannot_be_done_is_one_error(drop: list[str], merge: list[str], code: str) -> None:
    with refused(UsageError, code):
        with_ref(graded(), DatasetRef(drop_class=tuple(drop), merge_class=tuple(merge)))


def test_values_of_a_target_can_be_left_out_and_merged() -> None:
    ds = graded()
    ds.table["view"] = np.array(["AP", "PA", "lateral"])[np.arange(len(ds)) % 3].astype(object)
    changed = retarget(ds, "view").with_classes(["lateral"])
    assert changed.class_names == ("AP", "PA")
    assert len(changed) == (ds.table["view"] != "lateral").sum()
    again = as_in_run(ds, {"target": changed.target, "classes": dict(changed.renamed)})
    pd.testing.assert_frame_equal(again.table, changed.table)
    with refused(UsageError, "target-after-classes"):
        retarget(ds.with_classes(["a+b"]), "view")


def test_a_note_of_the_overlap_with_the_test_set_counts_what_is_left() -> None:
    groups = [f"g{i % 8}" for i in range(16)]
    ds = graded()
    shared = replace(ds, table=ds.table.assign(group=groups))
    from embcache.data.groups import overlap_notes

    noted = replace(shared, notes=tuple(overlap_notes(shared.table)))
    changed = noted.with_classes(["a+b"])
    assert [note for note in changed.notes if "groups occur in both" in note] == overlap_notes(changed.table)
