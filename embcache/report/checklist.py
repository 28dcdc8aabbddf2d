"""What CLAIM (2024 update) and TRIPOD+AI (2024) ask of a study, and what of it the saved results tell.

Items are told in short words of this file's own; the checklists themselves say more. What no result can tell, such as
dates, scanners, ethics or funding, is said to be unknown rather than left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from embcache.probe.metrics import metric_title
from embcache.probe.schedule import schedule_of
from embcache.report.attention_section import Attended
from embcache.report.choice import Choice
from embcache.report.cohort import Cohort
from embcache.report.collect import Part, Task
from embcache.results.layout import Table, bounds, score

UNKNOWN = "not known to embcache"
_TITLE = "What CLAIM and TRIPOD+AI ask"


def checklist(
    part: Part, task: Task, choices: Sequence[Choice], found: Cohort | None, subgroups: Table | None,
    attended: Attended | None,
) -> Table | None:  # fmt: skip
    """A row an item: its numbers in both checklists, what is asked, and what is known. None without a choice."""
    if not choices:
        return None
    rows = [
        *_study(part, task, found),
        *_partitions(choices[-1], found),
        *_model(part, choices[-1]),
        *_results(task, choices, found, subgroups, attended),
        ("C34, C42", "T18c, T18d", "protocol, registration", UNKNOWN),
        ("C43", "T18e, T18f", "data, code and models", f"commands, versions and run IDs under Provenance; the models "
         f"are saved in the runs, and embcache predict uses them; whether the data can be had: {UNKNOWN}"),
        ("C44", "T17, T18a, T18b, T19", "funding, conflicts of interest, ethics, involvement of patients", UNKNOWN),
    ]  # fmt: skip
    notes = (
        "C: items of CLAIM, 2024 update (Tejani et al., Radiology: Artificial Intelligence 2024); T: items of "
        "TRIPOD+AI (Collins et al., BMJ 2024)",
        f"answers are of {choices[-1].chosen.name} at {choices[-1].n_train:,} training labels where one model is meant",
    )
    return Table("checklist", _TITLE, ("CLAIM", "TRIPOD+AI", "asked", "known from the saved results"), tuple(rows),
                 notes)  # fmt: skip


Rows = list[tuple[str, str, str, str]]


def _study(part: Part, task: Task, found: Cohort | None) -> Rows:
    steps = found.steps if found is not None else ()
    out = "; ".join(f"{s.images:,} {s.words}" for s in steps if s.kind == "out")
    left_out = f"every image that the source lists; left out: {out or 'none'}" if steps else UNKNOWN
    kind = part.ds.layout if part.ds is not None else part.name
    what = "images of one's own" if kind == "folder" else "drawn images" if task.synthetic else "a published layout"
    return [
        ("C1–C4", "T1–T4", "title, abstract, background, objectives", UNKNOWN),
        ("C5, C6", "T4", "design and goal", "which frozen backbone and how many labels a classifier needs: heads are "
         f"trained and tested on existing images; whether they were collected for it: {UNKNOWN}"),
        ("C7", "T5a", "source of the data", f"{part.name} ({what}); where and from whom: {UNKNOWN}"),
        ("C13", "T5b, T6a, T6c", "dates, setting, acquisition, treatments", UNKNOWN),
        ("C8, C10", "T6b", "who was included and excluded", left_out),
        ("C12", "T11", "missing data", "images without a label or that cannot be read are left out, as counted in the "
         "flow; nothing is imputed"),
        ("C11", "–", "removal of identities", f"{UNKNOWN}; this page holds no names of patients"),
        ("C14–C18", "T8, T9", "reference standard: who labeled, how, how reliably",
         f"labels as given ({', '.join(task.class_names[:8])}{' …' if len(task.class_names) > 8 else ''}); the rest is "
         f"{UNKNOWN}"),
    ]  # fmt: skip


def _partitions(last: Choice, found: Cohort | None) -> Rows:
    result = last.chosen.result
    request = result.request
    drawn = "given by the dataset" if result.test_set == "official" else "a fifth held out, drawn by a hash of the ids"
    folds = f"test set {drawn}; {request.get('folds', len(result.folds))} folds, stratified by class, seed " + str(
        request.get("seed", 0)
    )
    if found is None or not found.steps:
        level = UNKNOWN
    elif not found.grouped:
        level = "images: patients are not known, so that images of one may be on both sides"
    else:
        level = "patients (or other groups): none trains and validates in one fold"
        level += (
            f"; {found.shared:,} training images are of test patients" if found.shared else ", or is in the test set"
        )
    smallest = [r.difference.smallest for r in last.advice.rivals if r.difference.smallest is not None]
    power = f"; smallest difference that would have been found: {min(smallest):.3f} or more" if smallest else ""
    return [
        ("C19", "T12a", "how images were assigned", folds),
        ("C20", "T12a", "level at which parts are disjoint", level),
        ("C21", "T10", "sample size", f"all there were: {result.n_test:,} test images{power}"),
    ]


def _model(part: Part, last: Choice) -> Rows:
    result = last.chosen.result
    schedule = ", ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in schedule_of(result).items())
    transforms = {str(r.get("transform", {}).get("kind", "paper")) for r in result.recipes.values()}
    weights = "pretrained weights as the recipe names them, by their SHA-256" if result.recipes else UNKNOWN
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    return [
        ("C9", "T7, T12b", "preprocessing", f"transform {', '.join(sorted(transforms)) or 'of finetuning'}, in full "
         "under Provenance"),
        ("C22", "T12c, T22", "model", f"head {result.head} on {'features' if result.kind == 'probe' else 'images'} of "
         f"{' + '.join(result.backbones)}" + (", frozen" if result.kind == "probe" else "")),
        ("C23", "T18f", "software", versions or UNKNOWN),
        ("C24", "–", "initial weights", weights),
        ("C25", "T12c, T13", "training, unequal classes", (schedule or "solved, without a schedule")
         + "; how often classes are drawn: under Notes"),
        ("C26", "T12c", "how the final model was selected", "backbone and head by the mean validation score over "
         "folds, the epoch of each fold by its validation score"),
        ("C27", "T12g", "ensembles, and how predictions are made", "embcache predict averages the probabilities of the "
         f"{len(last.chosen.tested.predictions.logits)} fold models; that ensemble is scored in a row of its own"),
    ]  # fmt: skip


def _results(
    task: Task, choices: Sequence[Choice], found: Cohort | None, subgroups: Table | None, attended: Attended | None
) -> Rows:
    best = choices[-1].chosen
    e, flow = best.row.estimate, found.steps if found is not None else ()
    used = "; ".join(
        f"{s.words}: {s.images:,} images" + ("" if s.groups is None else f" of {s.groups:,} patients")
        for s in flow if s.kind == "used"
    )  # fmt: skip
    metric = metric_title(task.metric, e.positive)
    mixed = [row[0] for row in found.mix.rows if row[0] and row[1]] if found and found.mix else []
    columns = list(dict.fromkeys(r[0] for r in subgroups.rows if r[0] != "all")) if subgroups is not None else []
    sizes = ", ".join(f"{c.n_train:,}" for c in choices)
    return [
        ("C28", "T12e", "metrics", f"{metric}, which chose epochs and models or is shown instead; others, calibration "
         "and operating points beside it"),
        ("C29", "T12e", "uncertainty and tests", "95 % intervals over patients (or other groups), and for a newly "
         "trained model; Holm-corrected p; the smallest difference that would have been found"),
        ("C30", "T12d", "robustness", f"{len(best.result.folds)} fold models; training labels: {sizes}; other centers "
         f"or scanners: {UNKNOWN}"),
        ("C31", "–", "explanations", "attention between backbones" if attended is not None else "none"),
        ("C32, C33", "T16", "internal and external test data", "test images of the same source; external data: none on "
         "this page"),
        ("C35", "T20a, T21", "flow of patients and images", used or UNKNOWN),
        ("C36", "T20b, T20c", "characteristics of each part", "case mix of the parts: " + ", ".join(mixed) if mixed
         else UNKNOWN),
        ("C37, C38", "T23a", "performance with its uncertainty", f"test {metric} {score(e.mean, e.std)}, 95 % interval "
         f"{bounds(e.interval) or e.why}; all models and sizes above"),
        ("–", "T14, T23b", "fairness, performance in groups", "subgroups by " + ", ".join(columns) if columns
         else "the table of images has no column that makes groups, such as age or sex"),
        ("–", "T15", "output and thresholds", "the probability of each class; thresholds from validation images, under "
         "Operating points" if len(task.class_names) == 2 else "the probability of each class"),
        ("C39", "–", "failures", "confusion matrix; its cells show the images in the map"),
        ("–", "T12f, T24", "updating of the model", "none"),
        ("C40, C41", "T25–T27", "interpretation, limitations, use in practice", UNKNOWN),
    ]  # fmt: skip
