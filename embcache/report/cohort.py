"""Who is in a study: which images were used for what, why others were not, and how the parts differ.

Also what CLAIM (2024 update) and TRIPOD+AI (2024) require, and what of it the saved results can answer.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import jinja2
import numpy as np
from numpy.typing import NDArray

from embcache.data.classes import as_in_run
from embcache.data.dataset import ImageDataset
from embcache.errors import EmbcacheError
from embcache.probe.inputs import open_stores, plan_for
from embcache.probe.metrics import metric_title
from embcache.probe.protocol import Splits
from embcache.probe.schedule import schedule_of
from embcache.probe.statistics import FEWEST_GROUPS
from embcache.report.collect import Choice, Part, Task, hidden_columns, secret_words, shown_columns
from embcache.results.layout import Table, bounds, score
from embcache.store.feature_store import list_stores

BoolArray = NDArray[np.bool_]

IMBALANCE = 3.0  # a class with so many times fewer images than the largest is named
_MOST_CLASSES = 30  # in the case mix
_MOST_BAD = 50  # quarantined images that are listed


@dataclass(frozen=True)
class FlowStep:
    """One box of the flow."""

    words: str
    images: int
    groups: int | None  # patients or other groups; None where they are not known
    role: str  # "there", "out" or "used"
    detail: str = ""


@dataclass(frozen=True)
class Cohort:
    """The flow of images, and the case mix of its parts."""

    steps: tuple[FlowStep, ...] = ()
    mix: Table | None = None
    grouped: bool = False  # whether patients (or other groups) are known
    shared: int = 0  # training images of patients who are in the test set too
    notes: tuple[str, ...] = ()


def cohort(part: Part, choices: Sequence[Choice], *, ids: bool) -> Cohort | None:
    """The flow and case mix of the task of these choices; None where there is no table of images, or no choice.

    The splits are drawn again by the request of the chosen run of most labels. Where they differ from those of the run
    (they were imported, or the images have changed) there is only a note.
    """
    if part.dataset is None or not choices:
        return None
    result = choices[-1].chosen.result
    request = result.request
    recipes = ",".join(str(fingerprint) for _, fingerprint in request.get("recipes", [])) or None
    protocol = {key: request[key] for key in ("folds", "seed", "val", "test", "exclude_test_overlap") if key in request}
    problem = "the splits of these results were imported, or the images or how findings are read have changed"
    try:
        dataset = as_in_run(part.dataset, request)
        stores = open_stores(dataset, [result.backbones], part.home, recipes)
        plan = plan_for(dataset, list(stores.values()), subsets=("F", result.subset), **protocol)
        drawn = request.get("repeats", 1) != 1 or plan.digest(result.subset) == request.get("splits")
    except (EmbcacheError, ValueError) as error:
        drawn, problem = False, error.problem if isinstance(error, EmbcacheError) else str(error)
    if not drawn:
        return Cohort(notes=(f"the flow of images is not shown: {problem}",))
    bad = {name for store in stores.values() for name in store.quarantined}
    sizes = ", ".join(f"{c.n_train:,} + {c.labels_used - c.n_train:,}" for c in choices)
    return _flow(part, dataset, plan, bad, sizes, secret_words(part, ids=ids))


def _flow(part: Part, dataset: ImageDataset, plan: Splits, bad: set[str], sizes: str, secret: set[str]) -> Cohort:
    assert part.dataset is not None
    whole, n = part.dataset, len(plan.ids)
    grouped = len(set(whole.groups.tolist())) < len(whole)

    def mask(rows: Sequence[NDArray[np.int64]]) -> BoolArray:
        return np.isin(np.arange(n), np.concatenate(rows))

    def step(words: str, which: BoolArray, role: str, detail: str = "") -> FlowStep:
        groups = len(set(plan.groups[which].tolist())) if grouped else None
        return FlowStep(words, int(which.sum()), groups, role, detail)

    test, pool = mask([plan.test]), mask([rows for (_, subset), rows in plan.train.items() if subset == "F"])
    val = mask([*plan.val.values()]) & ~pool  # a split of the dataset's own: else what validates also trains
    rest = ~(test | pool | val)
    of_test, of_val = (np.isin(plan.groups, np.unique(plan.groups[which])) for which in (test, val))
    missing, left_out = len(whole.missing), len(whole) - n
    groups = len(set(whole.groups.tolist())) if grouped and not missing else None
    steps = [FlowStep("listed in the source", len(whole) + missing, groups, "there")]
    steps += [FlowStep("without a file", missing, None, "out")] * bool(missing)
    steps += [FlowStep("of classes that are left out", left_out, None, "out")] * bool(left_out)
    for words, why in {
        "could not be read": np.array([name in bad for name in plan.ids], dtype=bool),
        "without a label": ~plan.task.known(plan.labels),
        "of patients who are in the test set": of_test,
        "of patients who are in the validation split": of_val,
        "not drawn: the pool is limited": rest,
    }.items():
        if (rest & why).any():
            steps.append(step(words, rest & why, "out"))
            rest = rest & ~why
    shared = int((pool & of_test).sum())
    detail = f"in a fold, training + validation: {sizes}"
    detail += f"; {shared:,} images are of patients who are in the test set too" if shared else ""
    training = "training" if val.any() else "training and validation"
    steps += [step("used", test | pool | val, "there"), step(f"{training}, {plan.n_folds} folds", pool, "used", detail)]
    parts = {training: pool}
    if val.any():
        parts["validation"] = val
        steps.append(step("validation, a split of the dataset's own", val, "used", "the same in every fold"))
    parts["test"] = test
    unlabeled = int((~plan.task.known(plan.labels[plan.test])).sum())
    official = "the official one" if plan.test_set == "official" else "held out by embcache"
    detail = f"{unlabeled:,} without a label, not scored" if unlabeled else ""
    steps.append(step(f"test set, {official}", test, "used", detail))
    return Cohort(tuple(steps), _mix(dataset, plan, parts, grouped, secret), grouped, shared)


def _mix(dataset: ImageDataset, plan: Splits, parts: Mapping[str, BoolArray], grouped: bool, secret: set[str]) -> Table:
    totals = [int(which.sum()) for which in parts.values()]

    def row(name: str, value: str, which: BoolArray) -> tuple[str, ...]:
        counts = [int((part & which).sum()) for part in parts.values()]
        return (name, value, *(f"{c:,} ({c / t:.1%})" if t else "0" for c, t in zip(counts, totals, strict=True)))

    rows: list[tuple[str, ...]] = [("images", "", *(f"{t:,}" for t in totals))]
    if grouped:
        per = [np.unique(plan.groups[which].astype(str), return_counts=True)[1] for which in parts.values()]
        rows.append(("patients", "", *(f"{len(c):,}" for c in per)))
        sizes = (f"{np.median(c):g} ({c.max():,})" if len(c) else "0" for c in per)
        rows.append(("images per patient, median (maximum)", "", *sizes))
    notes = ["percentages are of the images of the part", *hidden_columns(dataset)]
    names, task, y = dataset.class_names[:_MOST_CLASSES], plan.task, plan.labels
    unknown = ~task.known(y)
    if task.kind == "number":
        known = [y[which & ~unknown] for which in parts.values()]
        cells = (f"{v.mean():.4g} ± {v.std(ddof=1):.4g}" if len(v) > 1 else "–" for v in known)
        rows.append((names[0], "mean ± sd", *cells))
        quarters = (np.quantile(v, (0.25, 0.5, 0.75)) if len(v) else () for v in known)
        rows.append(("", "quartiles", *(", ".join(f"{q:.4g}" for q in found) for found in quarters)))
    else:
        of = [y[:, c] == 1 if y.ndim == 2 else y == c for c in range(len(names))]
        rows += [row(task.noun if c == 0 else "", name, of[c]) for c, name in enumerate(names)]
    if y.ndim == 2:
        in_part = np.any([*parts.values()], axis=0)
        some = [c for c in range(len(names)) if (y[in_part, c] < 0).any()]
        rows += [row("not known" if c == some[0] else "", names[c], y[:, c] < 0) for c in some]
    if len(names) < len(dataset.class_names):
        notes.append(f"{len(dataset.class_names) - len(names):,} more {task.nouns} are not listed")
    if unknown[np.any([*parts.values()], axis=0)].any():
        rows.append(row("", "no label", unknown))
    for column in shown_columns(dataset, secret):
        values = [(value, column.of == value) for value in column.values]
        values += [("(no value)", column.of == "")] if (column.of == "").any() else []
        rows += [row(column.name if k == 0 else "", value, of) for k, (value, of) in enumerate(values)]
    return Table("mix", "Case mix of the parts", ("", "", *parts), tuple(rows), tuple(notes))


def quarantines(part: Part, *, ids: bool) -> tuple[list[tuple[str, Table | None, Table | None]], list[str]]:
    """What the stores of a dataset could not read, and what is wrong with stores that cannot be read themselves.

    Of stores that could not read the same images: one line, a table of reasons, a table of images; without ``ids`` no
    tables.
    """
    found: dict[tuple[int, tuple[tuple[str, str], ...]], list[str]] = {}
    problems = []
    try:
        stores = list_stores(part.home, part.name)
    except EmbcacheError as error:
        return [], [error.problem]
    for store in stores:
        shown = store if part.dataset is None else store.restrict(part.dataset.table["id"])
        try:
            bad, rows = shown.quarantined, len(shown)
        except EmbcacheError as error:
            problems.append(f"{store.recipe.backbone}: {error.problem}")
            continue
        if bad:
            names = found.setdefault((rows, tuple(sorted(bad.items()))), [])
            names += [store.recipe.backbone] * (store.recipe.backbone not in names)
    listed: list[tuple[str, Table | None, Table | None]] = []
    for (rows, images), backbones in found.items():
        line = f"{len(images):,} of {rows + len(images):,} images could not be read ({', '.join(backbones)})"
        counts = [(reason, f"{n:,}") for reason, n in Counter(reason for _, reason in images).most_common()]
        reasons = Table("reasons", "Reasons", ("reason", "images"), tuple(counts))
        first = Table("unread", "Images that could not be read", ("image", "reason"), images[:_MOST_BAD])
        listed.append((line, reasons, first) if ids else (line, None, None))
    return listed, problems


def unequal_classes(part: Part) -> list[str]:
    """A line per split whose classes are of very unequal size, or whose findings are of too few patients."""
    if part.dataset is None or part.dataset.kind == "number":
        return []
    lines, ds, split_of = [], part.dataset, part.dataset.table["split"].to_numpy(dtype=object)
    if ds.kind == "findings":
        y, own = ds.labels, split_of == "test"
        groups = {
            name: len(set(ds.groups[own & (of == 1)].tolist())) for name, of in zip(ds.class_names, y.T, strict=True)
        }
        few = [f"{name} ({n})" for name, n in groups.items() if n < FEWEST_GROUPS]
        return [f"fewer than {FEWEST_GROUPS} test patients have {', '.join(few)}"] if own.any() and few else []
    for split in ("train", "val", "test"):
        counts = {name: int((ds.labels[split_of == split] == c).sum()) for c, name in enumerate(ds.class_names)}
        most = max(counts.values(), default=0)
        few = [f"{name} ({n:,})" for name, n in counts.items() if IMBALANCE * n <= most]
        if most and few:
            largest = max(counts, key=lambda name: counts[name])
            lines.append(f"the {split} images are of unequal classes: {', '.join(few)} against {largest} ({most:,})")
    return lines


# The checklists.

UNKNOWN = "not known to embcache"


def checklist(
    part: Part, task: Task, choices: Sequence[Choice], found: Cohort | None, subgroups: Table | None, *, attended: bool
) -> Table | None:
    """One row per item of ``templates/checklist.csv``: its numbers, what is required, what is known; None of no choice.

    What no result can answer, such as dates, scanners, ethics or funding, is said to be unknown rather than left out.
    """
    if not choices:
        return None
    last, result, estimate = choices[-1], choices[-1].chosen.result, choices[-1].chosen.row.estimate
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)  # makes plain text: the page escapes it
    environment.filters |= {"score": score, "bounds": bounds}
    environment.globals |= {"part": part, "task": task, "choices": choices, "last": last, "result": result}
    environment.globals |= {"request": result.request, "estimate": estimate, "found": found, "attended": attended}
    environment.globals |= {
        "unknown": UNKNOWN,
        "metric": metric_title(task.metric, estimate.positive),
        "schedule": schedule_of(result),
        "layout": part.dataset.layout if part.dataset is not None else part.name,
        "synthetic": any(one.synthetic for one in task.results),
        "steps": found.steps if found is not None else (),
        "mix": found.mix.rows if found is not None and found.mix is not None else (),
        "columns": [*dict.fromkeys(row[0] for row in subgroups.rows if row[0] != "all")] if subgroups else [],
    }
    text = files("embcache.report").joinpath("templates", "checklist.csv").read_text("utf-8")
    headers, *items = csv.reader(text.splitlines())
    rows = tuple((*numbers, environment.from_string(answer).render()) for *numbers, answer in items)
    notes = (
        "C: items of CLAIM, 2024 update (Tejani et al., Radiology: Artificial Intelligence 2024); T: items of "
        "TRIPOD+AI (Collins et al., BMJ 2024)",
        f"answers are for {last.chosen.name} at {last.n_train:,} training labels where one model is meant",
    )
    return Table("checklist", "What CLAIM and TRIPOD+AI require", tuple(headers), rows, notes)
