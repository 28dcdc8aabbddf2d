"""Who is in a study: which images were used for what, why others were not, and how the parts differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embcache.data.columns import retarget
from embcache.data.dataset import ImageDataset
from embcache.errors import EmbcacheError
from embcache.probe.inputs import open_stores, plan_for
from embcache.probe.splits import Splits
from embcache.report.layout import Table
from embcache.report.page.choice import Choice
from embcache.report.page.collect import Part
from embcache.report.page.warn import secret_words, told_columns

BoolArray = NDArray[np.bool_]

MOST_VALUES = 30
"""Classes that the case mix lists."""


@dataclass(frozen=True)
class Step:
    """One box of the flow.

    Attributes
    ----------
    words : str
    images : int
    groups : int or None
        Patients or other groups; None where they are not known.
    kind : {"there", "out", "used"}
        What there is, what leaves, what it is used for.
    detail : str
    """

    words: str
    images: int
    groups: int | None
    kind: str
    detail: str = ""


@dataclass(frozen=True)
class Cohort:
    """The flow of images, and the case mix of its parts.

    Attributes
    ----------
    steps : tuple of Step
    mix : Table or None
    grouped : bool
        Whether patients (or other groups) are known.
    shared : int
        Training images of patients who are in the test set too.
    notes : tuple of str
    """

    steps: tuple[Step, ...]
    mix: Table | None
    grouped: bool = False
    shared: int = 0
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
    ds = retarget(part.ds, request["target"]) if request.get("target") else part.ds
    recipes = ",".join(str(fingerprint) for _, fingerprint in request.get("recipes", [])) or None
    try:
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
    bad = {name: reason for store in stores.values() for name, reason in store.quarantined.items()}
    return _cohort(ds, plan, bad, choices, secret_words(part, ids=ids))


def _cohort(ds: ImageDataset, plan: Splits, bad: dict[str, str], choices: Sequence[Choice], secret: set[str]) -> Cohort:
    n, given = len(plan.ids), ds.table["split"].to_numpy(dtype=object)
    test, pool, val = (np.zeros(n, dtype=bool) for _ in range(3))
    test[plan.test] = True
    for (_, subset), rows in plan.train.items():
        if subset == "F":
            pool[rows] = True
    for rows in plan.val.values():
        val[rows] = True
    val &= ~pool  # a val split of the dataset's own: else a fold's validation images train in another
    unreadable = np.array([name in bad for name in plan.ids], dtype=bool)
    rest = ~(test | pool | val)
    shares = [np.isin(plan.groups, np.unique(plan.groups[side])) if side.any() else side for side in (test, val)]
    reasons: list[tuple[str, BoolArray]] = [
        ("could not be read", unreadable),
        ("without a label", (plan.labels < 0) & ~((given == "test") & test)),
        ("of patients who are in the test set", shares[0]),
        ("of patients who are in the validation split", shares[1]),
        ("not drawn: the pool is limited", rest),
    ]
    grouped = len(set(ds.groups.tolist())) < len(ds)

    def count(mask: BoolArray) -> int | None:
        return len(set(plan.groups[mask].tolist())) if grouped else None

    everything = np.ones(n, dtype=bool)
    steps = [Step("listed in the source", n + len(ds.missing), None if ds.missing else count(everything), "there")]
    if ds.missing:
        steps.append(Step("whose file is missing", len(ds.missing), None, "out"))
    for words, mask in reasons:
        out = mask & rest
        rest = rest & ~out
        if out.any():
            steps.append(Step(words, int(out.sum()), count(out), "out"))
    used = test | pool | val
    steps.append(Step("used", int(used.sum()), count(used), "there"))
    official = "the official one" if plan.test_set == "official" else "held out by embcache"
    per_fold = ", ".join(f"{c.n_train:,} + {c.labels_used - c.n_train:,}" for c in choices)
    detail = f"in a fold, training + validation: {per_fold}"
    pooled = f"training and validation, {plan.n_folds} folds" if not val.any() else f"training, {plan.n_folds} folds"
    shared = int((pool & shares[0]).sum())
    if shared:
        detail += f"; {shared:,} images are of patients who are in the test set too"
    steps.append(Step(pooled, int(pool.sum()), count(pool), "used", detail))
    parts = [("training and validation" if not val.any() else "training", pool)]
    if val.any():
        steps.append(Step("validation, the dataset's own split", int(val.sum()), count(val), "used", "in every fold"))
        parts.append(("validation", val))
    unlabeled = int((plan.labels[plan.test] < 0).sum())
    detail = f"{unlabeled:,} without a label, not scored" if unlabeled else ""
    steps.append(Step(f"test set, {official}", int(test.sum()), count(test), "used", detail))
    parts.append(("test", test))
    return Cohort(tuple(steps), _mix(ds, plan, parts, grouped, secret), grouped, shared)


def _mix(
    ds: ImageDataset, plan: Splits, parts: Sequence[tuple[str, BoolArray]], grouped: bool, secret: set[str]
) -> Table:
    totals = [int(mask.sum()) for _, mask in parts]

    def row(name: str, value: str, which: BoolArray) -> tuple[str, ...]:
        counts = [int((mask & which).sum()) for _, mask in parts]
        return (name, value, *(f"{c:,} ({c / t:.1%})" if t else "0" for c, t in zip(counts, totals, strict=True)))

    rows: list[tuple[str, ...]] = [("images", "", *(f"{t:,}" for t in totals))]
    if grouped:
        per = [np.unique(plan.groups[mask].astype(str), return_counts=True)[1] for _, mask in parts]
        rows.append(("patients", "", *(f"{len(c):,}" for c in per)))
        rows.append(
            (
                "images of a patient, median (most)",
                "",
                *(f"{np.median(c):g} ({c.max():,})" if len(c) else "0" for c in per),
            )
        )
    notes = ["share of the images of the part"]
    names = list(ds.class_names)[:MOST_VALUES]
    rows += [row("class" if c == 0 else "", name, plan.labels == c) for c, name in enumerate(names)]
    if len(names) < len(ds.class_names):
        notes.append(f"{len(ds.class_names) - len(names):,} more classes are not listed")
    if (plan.labels[np.any([mask for _, mask in parts], axis=0)] < 0).any():
        rows.append(row("", "no label", plan.labels < 0))
    for column in told_columns(ds, secret):
        values = [(value, column.of == value) for value in column.values]
        values += [("(no value)", column.of == "")] if (column.of == "").any() else []
        rows += [row(column.name if k == 0 else "", value, mask) for k, (value, mask) in enumerate(values)]
    headers = ("", "", *(name for name, _ in parts))
    return Table("mix", "Case mix of the parts", headers, tuple(rows), tuple(notes))
