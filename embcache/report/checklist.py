"""What CLAIM (2024 update) and TRIPOD+AI (2024) require, and what of it the saved results can answer.

``templates/checklist.csv`` has the items in short words of its own; the checklists themselves say more. What no result
can answer, such as dates, scanners, ethics or funding, is said to be unknown rather than left out.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from importlib.resources import files

from embcache.probe.metrics import metric_title
from embcache.probe.schedule import schedule_of
from embcache.report.cohort import Cohort
from embcache.report.collect import Choice, Part, Task
from embcache.results.layout import Table, bounds, score

UNKNOWN = "not known to embcache"


def checklist(
    part: Part, task: Task, choices: Sequence[Choice], found: Cohort | None, subgroups: Table | None, *, attended: bool
) -> Table | None:
    """One row per item: its numbers in both checklists, what is required, what is known. None without a choice."""
    if not choices:
        return None
    text = files("embcache.report").joinpath("templates", "checklist.csv").read_text("utf-8")
    headers, *items = csv.reader(text.splitlines())
    facts = _facts_of_model(choices[-1]) | _facts_of_study(part, task, choices, found, subgroups, attended)
    rows = tuple((*numbers, answer.format_map(facts)) for *numbers, answer in items)
    last = choices[-1]
    notes = (
        "C: items of CLAIM, 2024 update (Tejani et al., Radiology: Artificial Intelligence 2024); T: items of "
        "TRIPOD+AI (Collins et al., BMJ 2024)",
        f"answers are for {last.chosen.name} at {last.n_train:,} training labels where one model is meant",
    )
    return Table("checklist", "What CLAIM and TRIPOD+AI require", tuple(headers), rows, notes)


def _facts_of_model(last: Choice) -> dict[str, str]:
    result, estimate = last.chosen.result, last.chosen.row.estimate
    request, probe = result.request, result.kind == "probe"
    schedule = ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in schedule_of(result).items())
    drawn = "given by the dataset" if result.test_set == "official" else "a fifth held out, drawn by a hash of the IDs"
    smallest = [r.difference.smallest for r in last.advice.rivals if r.difference.smallest is not None]
    transforms = {str(r.get("transform", {}).get("kind", "paper")) for r in result.recipes.values()}
    return {
        "unknown": UNKNOWN,
        "assigned": f"test set {drawn}; {request.get('folds', len(result.folds))} folds, stratified by class, seed "
        f"{request.get('seed', 0)}",
        "n_test": f"{result.n_test:,}",
        "power": f"; smallest difference that would have been found: {min(smallest):.3f} or more" if smallest else "",
        "transforms": ", ".join(sorted(transforms)) or "of finetuning",
        "model": f"head {result.head} on {'features' if probe else 'images'} of {' + '.join(result.backbones)}"
        + ", frozen" * probe,
        "versions": ", ".join(f"{name} {version}" for name, version in result.versions.items()) or UNKNOWN,
        "weights": "pretrained weights as the recipe names them, by their SHA-256" if result.recipes else UNKNOWN,
        "schedule": schedule or "solved, without a schedule",
        "models": str(len(last.chosen.tested.predictions.logits)),
        "folds": str(len(result.folds)),
        "score": score(estimate.mean, estimate.std),
        "interval": bounds(estimate.interval) or estimate.why,
    }


def _facts_of_study(
    part: Part, task: Task, choices: Sequence[Choice], found: Cohort | None, subgroups: Table | None, attended: bool
) -> dict[str, str]:
    steps = found.steps if found is not None else ()
    out = "; ".join(f"{s.images:,} {s.words}" for s in steps if s.role == "out")
    layout = part.dataset.layout if part.dataset is not None else part.name
    synthetic = any(result.synthetic for result in task.results)
    if found is None or not steps:
        level = UNKNOWN
    elif not found.grouped:
        level = "images: patients are not known, so images of one patient may be on both sides"
    else:
        shared = f"; {found.shared:,} training images are of test patients"
        level = "patients (or other groups): none trains and validates in one fold"
        level += shared if found.shared else ", or is in the test set"
    used = "; ".join(
        f"{s.words}: {s.images:,} images" + ("" if s.groups is None else f" of {s.groups:,} patients")
        for s in steps if s.role == "used"
    )  # fmt: skip
    mixed = [row[0] for row in found.mix.rows if row[0] and row[1]] if found and found.mix else []
    columns = dict.fromkeys(r[0] for r in subgroups.rows if r[0] != "all") if subgroups is not None else {}
    return {
        "name": part.name,
        "layout": "the user's own images" if layout == "folder" else "drawn images" if synthetic
        else "a published layout",
        "left_out": f"every image that the source lists; left out: {out or 'none'}" if steps else UNKNOWN,
        "classes": ", ".join(task.class_names[:8]) + (" …" if len(task.class_names) > 8 else ""),
        "level": level,
        "metric": metric_title(task.metric, choices[-1].chosen.row.estimate.positive),
        "sizes": ", ".join(f"{c.n_train:,}" for c in choices),
        "explained": "attention between backbones" if attended else "none",
        "used": used or UNKNOWN,
        "mix": "case mix of the parts: " + ", ".join(mixed) if mixed else UNKNOWN,
        "subgroups": "subgroups by " + ", ".join(columns) if columns
        else "the table of images has no column that makes groups, such as age or sex",
        "thresholds": "; thresholds from validation images, under Operating points" * (len(task.class_names) == 2),
    }  # fmt: skip
