"""Who is in a study: which images were used for what, why others were not, and how the parts differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embcache.data.classes import as_in_run
from embcache.data.dataset import ImageDataset
from embcache.errors import EmbcacheError
from embcache.probe.inputs import open_stores, plan_for
from embcache.probe.splits import Splits
from embcache.report.choice import Choice
from embcache.report.collect import Part
from embcache.report.warn import hidden_columns, secret_words, told_columns
from embcache.results.layout import Table

BoolArray = NDArray[np.bool_]

MOST_VALUES = 30
"""Classes that the case mix lists."""


@dataclass(frozen=True)
class Step:
    """One box of the flow."""

    words: str
    images: int
    groups: int | None  # patients or other groups; None where they are not known
    kind: str  # what there is, what leaves, what it is used for
    detail: str = ""


@dataclass(frozen=True)
class Cohort:
    """The flow of images, and the case mix of its parts."""

    steps: tuple[Step, ...]
    mix: Table | None
    grouped: bool = False  # whether patients (or other groups) are known
    shared: int = 0  # training images of patients who are in the test set too
    notes: tuple[str, ...] = ()


def cohort(part: Part, choices: Sequence[Choice], *, ids: bool) -> Cohort | None:
    """The flow and case mix of the task of these choices; None where there is no table of images, or no choice.

    The splits are drawn again by the request of the chosen run of most labels. Where they are not the same as it had
    (they were imported, or the images are others now) there is nothing but a note.
    """
    if part.ds is None or not choices:
        return None
    result = choices[-1].chosen.result
    request = result.request
    recipes = ",".join(str(fingerprint) for _, fingerprint in request.get("recipes", [])) or None
    try:
        ds = as_in_run(part.ds, request)
        stores = open_stores(ds, [result.backbones], part.home, recipes)
        asked = {
            key: request[key] for key in ("folds", "seed", "val", "test", "exclude_test_overlap") if key in request
        }
        plan = plan_for(ds, list(stores.values()), subsets=("F", result.subset), **asked)
    except (EmbcacheError, ValueError) as error:
        problem = error.problem if isinstance(error, EmbcacheError) else str(error)
        return Cohort((), None, notes=(f"the flow of images cannot be told: {problem}",))
    if request.get("repeats", 1) == 1 and plan.digest(result.subset) != request.get("splits"):
        told = "the splits of these results were imported, or the images are others now: the flow of images is not told"
        return Cohort((), None, notes=(told,))
    bad = {name for store in stores.values() for name in store.quarantined}
    sizes = ", ".join(f"{c.n_train:,} + {c.labels_used - c.n_train:,}" for c in choices)
    return _cohort(part.ds, ds, plan, bad, sizes, secret_words(part, ids=ids))


def _cohort(whole: ImageDataset, ds: ImageDataset, plan: Splits, bad: set[str], sizes: str, secret: set[str]) -> Cohort:
    n = len(plan.ids)

    def mask(rows: Sequence[NDArray[np.int64]]) -> BoolArray:
        found = np.zeros(n, dtype=bool)
        found[np.concatenate(rows)] = True
        return found

    grouped = len(set(whole.groups.tolist())) < len(whole)
    test, pool = mask([plan.test]), mask([rows for (_, subset), rows in plan.train.items() if subset == "F"])
    val = mask([*plan.val.values()]) & ~pool  # a split of the dataset's own: else what validates also trains
    rest = ~(test | pool | val)
    of_test, of_val = (np.isin(plan.groups, np.unique(plan.groups[part])) for part in (test, val))
    reasons = {
        "could not be read": np.array([name in bad for name in plan.ids], dtype=bool),
        "without a label": plan.labels < 0,
        "of patients who are in the test set": of_test,
        "of patients who are in the validation split": of_val,
        "not drawn: the pool is limited": rest,
    }

    def step(words: str, part: BoolArray, kind: str, detail: str = "") -> Step:
        return Step(words, int(part.sum()), len(set(plan.groups[part].tolist())) if grouped else None, kind, detail)

    gone = [("whose file is missing", len(ds.missing)), ("of classes that are left out", len(whole) - n)]
    steps = [Step("listed in the source", len(whole) + len(ds.missing),
                  len(set(whole.groups.tolist())) if grouped and not ds.missing else None, "there")]  # fmt: skip
    steps += [Step(words, number, None, "out") for words, number in gone if number]
    for words, why in reasons.items():
        if (rest & why).any():
            steps.append(step(words, rest & why, "out"))
            rest = rest & ~why
    steps.append(step("used", test | pool | val, "there"))
    shared = int((pool & of_test).sum())
    detail = f"in a fold, training + validation: {sizes}"
    detail += f"; {shared:,} images are of patients who are in the test set too" if shared else ""
    name = "training" if val.any() else "training and validation"
    steps.append(step(f"{name}, {plan.n_folds} folds", pool, "used", detail))
    parts = {name: pool}
    if val.any():
        parts["validation"] = val
        steps.append(step("validation, a split of the dataset's own", val, "used", "the same in every fold"))
    parts["test"] = test
    unlabeled = int((plan.labels[plan.test] < 0).sum())
    official = "the official one" if plan.test_set == "official" else "held out by embcache"
    detail = f"{unlabeled:,} without a label, not scored" if unlabeled else ""
    steps.append(step(f"test set, {official}", test, "used", detail))
    return Cohort(tuple(steps), _mix(ds, plan, parts, grouped, secret), grouped, shared)


def _mix(ds: ImageDataset, plan: Splits, parts: Mapping[str, BoolArray], grouped: bool, secret: set[str]) -> Table:
    totals = [int(part.sum()) for part in parts.values()]

    def row(name: str, value: str, which: BoolArray) -> tuple[str, ...]:
        counts = [int((part & which).sum()) for part in parts.values()]
        return (name, value, *(f"{c:,} ({c / t:.1%})" if t else "0" for c, t in zip(counts, totals, strict=True)))

    rows: list[tuple[str, ...]] = [("images", "", *(f"{t:,}" for t in totals))]
    if grouped:
        per = [np.unique(plan.groups[part].astype(str), return_counts=True)[1] for part in parts.values()]
        rows.append(("patients", "", *(f"{len(c):,}" for c in per)))
        rows.append(
            (
                "images of a patient, median (most)",
                "",
                *(f"{np.median(c):g} ({c.max():,})" if len(c) else "0" for c in per),
            )
        )
    notes = ["share of the images of the part", *hidden_columns(ds)]
    names = list(ds.class_names)[:MOST_VALUES]
    rows += [row("class" if c == 0 else "", name, plan.labels == c) for c, name in enumerate(names)]
    if len(names) < len(ds.class_names):
        notes.append(f"{len(ds.class_names) - len(names):,} more classes are not listed")
    if (plan.labels[np.any([*parts.values()], axis=0)] < 0).any():
        rows.append(row("", "no label", plan.labels < 0))
    for column in told_columns(ds, secret):
        values = [(value, column.of == value) for value in column.values]
        values += [("(no value)", column.of == "")] if (column.of == "").any() else []
        rows += [row(column.name if k == 0 else "", value, of) for k, (value, of) in enumerate(values)]
    headers = ("", "", *parts)
    return Table("mix", "Case mix of the parts", headers, tuple(rows), tuple(notes))
