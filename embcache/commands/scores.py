"""``embcache results``, ``compare`` and ``subgroups``: the scores of saved runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embcache.commands.options import Answer, Only, command, echo_nothing, option_text
from embcache.commands.output import bounds, echo, echo_notes, print_objects, print_table, prints_csv, spread
from embcache.config import DatasetRef, PredictConfig, ProtocolConfig
from embcache.errors import UsageError
from embcache.probe.metrics import metric_title
from embcache.runs.folders import Result, find_run_anywhere, list_results, list_unreadable

if TYPE_CHECKING:
    from embcache.results.compare import Comparison, Difference
    from embcache.results.decisions import Described, Value


@command(table=True)
def results(
    *,
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="Show this run in full; its ID can be abbreviated to a unique prefix."),
    ] = None,
    dataset: list[str],
    metric: list[str],
    home: Path | None,
    of: Annotated[ProtocolConfig, Only("positive")],
    adjusted: Annotated[PredictConfig, Only("prevalence", "calibrate")],
) -> Answer:
    """List the results that were saved, with their run IDs; or show one run in full.

    --metric scores them by other metrics, from their saved predictions; nothing is trained. Below the table: which
    backbone to choose, by its validation scores, and whether more labels still help. A run in full has scores with both
    intervals, of the ensemble and by patient, operating points chosen on validation images, calibration and the
    confusion matrix; --positive, --prevalence and --calibrate are for a run in full.

    Example: embcache results linear-S-0123 --prevalence 0.1
    """
    if run is not None:
        from embcache.probe.predictions import Adjust, parse_prevalence
        from embcache.results.decisions import describe

        adjust = Adjust(parse_prevalence(adjusted.prevalence), adjusted.calibrate)
        described = describe(*find_run_anywhere(run, home), metrics=metric, positive=of.positive, adjust=adjust)
        return Answer(described.to_json, lambda: _print_run(described))
    if of.positive is not None or adjusted != PredictConfig():
        raise UsageError(
            "--positive, --prevalence and --calibrate are for one run", code="one-run",
            fix="embcache results RUN, with its ID",
        )  # fmt: skip
    from embcache.results.advice import advise, sentences

    names = dataset or (None,)
    unreadable = [folder for name in names for folder in list_unreadable(home, name)]
    if unreadable:
        count = "1 run" if len(unreadable) == 1 else f"{len(unreadable)} runs"
        folders = ", ".join(str(folder) for folder in unreadable[:5]) + (", …" if len(unreadable) > 5 else "")
        echo(f"{count} could not be read (made by another version, or damaged): {folders}", err=True)
    found = in_metrics([result for name in names for result in list_results(home, name)], metric, home)

    def show() -> None:
        if not found:
            echo_nothing("no results", dataset, home)
            return
        print_results(found, ids=True)
        if advice := sentences(advise(found, home=home)):
            echo("\n" + "\n".join(advice))

    following = ["results", found[0].id] if found else ["probe", "--head", "linear", "--subset", "S,M,F"]
    return Answer(lambda: [result.to_json() for result in found], show, following)


def print_results(results: Sequence[Result], *, ids: bool = False) -> None:
    """Print results as one table with their notes beneath; ``ids`` adds the run ids.

    What few results have (a target column, repeats, swept learning rates, a solved head's choice) has a column only
    where one of them has it.
    """
    from embcache.data.classes import target_words

    rare = {
        "target": [target_words(result.request) for result in results],
        "repeats": [str(_repeats(result)) if _repeats(result) > 1 else "" for result in results],
        "learning rate": [_rates(result) for result in results],
        "chosen": [_chosen(result) for result in results],
        "run": [result.id if ids else "" for result in results],
    }
    shown = {name: cells for name, cells in rare.items() if any(cells)}
    csv = prints_csv()  # where every row must be complete
    headers = ["dataset", "backbone", "head", *["scored"] * csv, "subset", "labels used", "test", "metric", "mean ± sd"]
    headers += ["95 % interval", "validation", "best epoch", *shown]
    rows = []
    for number, result in enumerate(results):
        own, last = _row(result), [cells[number] for cells in shown.values()]
        rows.append([*own[:3], *["mean of the models"] * csv, *own[3:], *last])
        others = [
            (name, metric_title(e.metric, e.positive), spread(e.mean, e.std), bounds(e.interval) or e.why)
            for name, e in result.estimates.items()
            if name
        ]
        if result.metric == "accuracy" and result.majority is not None:
            others.append((f"always {result.majority[0]}", "accuracy", f"{result.majority[1]:.4f}", ""))
        for name, *numbers in others:
            tested = f"{result.by_group['groups']:,} groups" if name.startswith("by patient") else ""
            begin = [*own[:3], name, *own[3:5], tested or own[5]] if csv else ["", "", f"  {name}", "", "", tested]
            rows.append([*begin, *numbers, "", "", *(last if csv else [""] * len(last))])
    print_table(headers, rows, notes=_result_notes(results))


def in_metrics(results: Sequence[Result], metrics: Sequence[str], home: Path | None) -> list[Result]:
    """Every result by every metric that was asked for, or by its own."""
    from embcache.probe.summary import in_metric

    return [in_metric(result, metric, home) for result in results for metric in metrics or [result.metric]]


def _row(result: Result) -> list[str]:
    epochs = [fold.best_epoch for fold in result.folds if fold.best_epoch]
    found = result.estimate
    # A head's name with the hyperparameters that are not its defaults, and the kind of a run that is no probe.
    options = [f"{k}={option_text(v)}" for k, v in result.request["head"].items() if k not in ("name", "once")]
    options += [] if result.kind == "probe" else [result.kind]
    return [
        result.dataset,
        " + ".join(result.backbones),
        result.head + (f" ({', '.join(options)})" if options else ""),
        result.subset,
        f"{result.labels_used:,} ({result.n_train:,} + {result.n_val:,})",
        f"{result.test_set} {result.n_test:,}",
        metric_title(result.metric, "" if found is None else found.positive),
        spread(result.mean, result.std) or ("not known" if found is None else "not defined"),
        bounds(result.interval) or ("" if found is None else found.why),
        "" if result.val_mean is None else f"{result.val_mean:.4f}",
        _range(epochs) if epochs else "",
    ]


def _repeats(result: Result) -> int:
    return 1 + max((fold.repeat for fold in result.folds), default=0)


def _rates(result: Result) -> str:
    """Number of folds that kept each learning rate, if several were tried."""
    from embcache.probe.schedule import rates_of

    counts = Counter(fold.lr for fold in result.folds if not fold.failed)
    rates = rates_of(result.request)
    return ", ".join(f"{lr:g} ×{counts[lr]}" for lr in rates if counts[lr]) if len(rates) > 1 else ""


def _chosen(result: Result) -> str:
    """What solved heads chose, over folds."""
    names = dict.fromkeys(name for fold in result.folds for name in fold.chosen)
    values = {name: [fold.chosen[name] for fold in result.folds if name in fold.chosen] for name in names}
    return ", ".join(f"{name} {_range(found)}" for name, found in values.items())


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}–{high:g}"


_OF_MODELS = re.compile(r"fold |learning rate |\d+ of \d+ models ")  # notes that say nothing of other results


def _result_notes(results: Sequence[Result]) -> list[str]:
    """Notes of all results, each once; named by dataset where there are several."""
    from embcache.results.compare import INTERVALS

    several = len({result.dataset for result in results}) > 1
    notes: dict[str, None] = {}
    for result in results:
        own = f"{' + '.join(result.backbones)}, {result.head}, {result.subset}: " if len(results) > 1 else ""
        told = [f"{own}{note}" if _OF_MODELS.match(note) else note for note in result.notes]
        if result.source == "snapshot":
            told.append("the images' folder is not there: labels and groups are those kept at extraction")
        absent = sorted(
            {result.class_names[c] for fold in result.folds for c in fold.metrics.get("absent_classes", ())}
        )
        if absent:
            told.append(f"no test image of {', '.join(absent)}: scores are over the other classes")
        if result.test_set == "local":
            told.append("a local test set: not comparable with published values")
        notes |= dict.fromkeys(f"{result.dataset}: {note}" if several else note for note in told)
    over = "folds of all repeats" if any(_repeats(result) > 1 for result in results) else "folds"
    means = f"mean ± sd over {over}; labels used: (training + validation) of one fold"
    missing = {f"{r.id}: {r.estimate.why}": None for r in results if r.estimate and r.estimate.why and r.interval}
    rows = "ensemble: the mean of the models' probabilities or numbers, which is what `embcache predict` uses"
    ways = dict.fromkeys(result.task.group_words for result in results if "by patient" in result.estimates)
    rows += f"; by patient: {'; '.join(ways)}" if ways else ""
    mixed = max((int(result.by_group.get("mixed", 0)) for result in results), default=0)
    rows += f"; {mixed:,} patients with images of several classes are left out there" if mixed else ""
    return [*notes, *missing, means, rows, INTERVALS]


def _print_run(found: Described) -> None:
    from embcache.data.classes import target_words
    from embcache.results.compare import INTERVALS

    result = found.result
    models = sum(not fold.failed for fold in result.folds)
    counts = ", ".join(f"{n:,} {name}" for n, name in zip(result.test_counts, result.class_names, strict=False))
    counts = "" if result.task.kind == "number" else counts
    words = target_words(result.request)
    target = f", target {words}" if words else ""
    for line in (
        f"{result.id}: {' + '.join(result.backbones)}, {result.head} ({result.kind}) on {result.dataset}{target}",
        f"subset {result.subset}: {result.n_train:,} training + {result.n_val:,} validation = {result.labels_used:,} "
        f"labels per fold; {models} models",
        f"test set: {result.test_set}, {result.n_test:,} images" + (f" ({counts})" if counts else ""),
        *([f"positive class: {result.positive}"] if result.positive else []),
    ):
        echo(line)
    if found.scores:
        _print_scores(found)
    if found.findings:
        _print_findings(found)
    if result.baseline:
        scored = [f"{metric_title(key)} {value:.4f}" for key, value in result.baseline.items()]
        echo(f"\nBaseline, what training labels say without features: {', '.join(scored)}")
    if found.operating_points:
        _print_operating_points(found)
    if found.calibration:
        _print_calibration(found)
    if found.confusion:
        echo("\nConfusion matrix of the ensemble: true classes in rows, predicted classes in columns")
        rows = [[name, *map(str, row)] for name, row in zip(result.class_names, found.confusion, strict=True)]
        print_table(["", *result.class_names], rows)
    echo("")
    echo_notes([*found.notes, *result.notes, *([INTERVALS] if found.scores else [])])


def _print_scores(found: Described) -> None:
    rows = []
    for key, estimates in found.scores.items():
        for name, e in estimates.items():
            title = "" if name else metric_title(key, e.positive)
            first, second = bounds(e.these_models), bounds(e.new_model)
            alone = "needs several models" if e.why == "one model" else e.why
            missing = [e.why, ""] if not first else [first, second or alone]
            rows.append([title, name or "mean of the models", spread(e.mean, e.std), *missing])
        if key == "accuracy" and found.result.majority is not None:
            rows.append(["", f"always {found.result.majority[0]}", f"{found.result.majority[1]:.4f}", "", ""])
    echo("\nScores with 95 % intervals")
    print_table(["", "", "mean ± sd", "new patients, these models", "new patients, a newly trained model"], rows)


def _print_findings(found: Described) -> None:
    counts = dict(zip(found.result.class_names, found.result.test_counts, strict=True))
    rows = []
    for name, scores in found.findings.items():
        cells = [(spread(e.mean, e.std), bounds(e.interval) or e.why) for e in scores.values()]
        rows.append([name, f"{counts[name]:,}", *(cell for pair in cells for cell in pair)])
    echo("\nEach finding, on the test images of which it is known: mean of the models")
    headers = ["finding", "images with it", "AUC ± sd", "95 % interval", "AUPRC ± sd", "95 % interval"]
    print_table(headers, rows, notes=["--positive FINDING shows operating points and calibration of one"])


def _print_operating_points(found: Described) -> None:
    rows = []
    for point in found.operating_points:
        ends = dict.fromkeys(map(_probability, (min(point.thresholds), max(point.thresholds))))
        values = (point.sensitivity, point.specificity, point.ppv, point.npv)
        rows.append([point.rule, point.models, " – ".join(ends), *map(_value, values)])
    echo(
        f"\nOperating points: thresholds on P({found.result.positive}) chosen on validation images, rates on the test "
        "set"
    )
    chosen = dict.fromkeys(f"{p.models}: {p.chosen_on}" for p in found.operating_points if p.chosen_on)
    print_table(["", "", "threshold", "sensitivity", "specificity", "PPV", "NPV"], rows, notes=list(chosen))


def _print_calibration(found: Described) -> None:
    echo(f"\nCalibration of P({found.result.positive})")
    print_objects(found.calibration, {
        "": "{0.models}",
        "intercept (0)": lambda c: _value(c.intercept),
        "slope (1)": lambda c: _value(c.slope),
        "Brier score": lambda c: _value(c.brier),
        "calibration error": "{0.ece:.4f}",
    }, notes=[
        "intercept and slope: intervals for new patients and these models",
        "calibration error: root mean square over the bins, debiased (Kumar, Liang and Ma 2019)",
    ])  # fmt: skip
    last, positive = found.calibration[-1], found.result.positive
    echo(f"\nReliability of the {last.models.removeprefix('mean of the ')}")
    print_objects(last.bins, {
        f"P({positive})": "{0.low:.4f} – {0.high:.4f}",
        "mean": "{0.predicted:.4f}",
        "observed": "{0.observed:.4f}",
        "images": "{0.images:,}",
        positive: "{0.positives:,}",
    })  # fmt: skip


def _probability(p: float) -> str:
    return f"{p:.4f}" if 1e-4 <= p <= 1 - 1e-4 else f"{p:.1e}" if p < 0.5 else f"1 − {1 - p:.1e}"


def _value(v: Value) -> str:
    if v.value is None:
        return v.why or "–"
    return f"{v.value:.4f}" + (f" ({bounds(v.interval)})" if v.interval else "")


Runs = Annotated[list[str], typer.Argument(metavar="RUN", help="Run IDs; each can be abbreviated to a unique prefix.")]


@command(table=True)
def compare(
    *,
    runs: Runs,
    reference: Annotated[str | None, "RUN", "Compare with this run. [default: the first]"] = None,
    metric: list[str],
    margin: Annotated[float | None, "D", "Also test that the difference is smaller than this (equivalence)."] = None,
    level: Annotated[str, "image|group", "Score images, or groups such as patients."] = "image",
    home: Path | None,
) -> Answer:
    """Compare results on the same test images with one reference: difference, 95 % interval, p.

    A difference is one of procedures (backbone, head and subset, trained anew) where the folds show how much training
    varies, else of these trained models. p is two-sided, and corrected by Holm for all runs and metrics compared.

    Example: embcache compare linear-S-0123 dvme-S-4567
    """
    from embcache.results.compare import compare

    rows = compare(runs, reference=reference, metrics=metric, margin=margin, level=level, home=home)

    def show() -> None:
        headers = ["run", "backbone", "head", "subset", "labels used", "metric", "mean ± sd", "95 % interval"]
        headers += ["difference", "its 95 % interval", "p", "p (Holm)", *(["p (margin)"] if margin is not None else [])]
        lines = []
        for row in rows:
            name, d = metric_title(row.metric, row.estimate.positive), row.difference
            score = [spread(row.mean, row.std), bounds(row.interval) or row.estimate.why]
            tests = ["", ""] if d is None else [_p(d.p), _p(row.p_holm)]
            tests += [] if margin is None else ["" if d is None else _p(d.p_margin)]
            words = [row.run, " + ".join(row.backbones), row.head, row.subset, f"{row.labels_used:,}", name]
            lines.append([*words, *score, *(_difference(d) or ["reference", ""]), *tests])
        own = dict.fromkeys(note for row in rows for note in row.notes)
        print_table(headers, lines, notes=[*own, *_comparison_notes(rows, margin)])

    return Answer([row.to_json() for row in rows], show)


def _difference(found: Difference | None) -> list[str]:
    return [] if found is None else [f"{found.difference:+.4f}", bounds(found.interval, "+") or found.why]


def _comparison_notes(rows: Sequence[Comparison], margin: float | None) -> list[str]:
    from embcache.results.compare import INTERVALS, SPEAKS_OF

    first = rows[0]
    notes = [f"{first.dataset}: difference from {first.run}", "labels used: training + validation per fold", INTERVALS]
    for trained in (True, False):
        about = [row for row in rows if row.difference is not None and row.difference.trained is trained]
        if about:
            which = "" if len(about) == len(rows) - 1 else ", ".join(dict.fromkeys(row.run for row in about)) + ": "
            notes.append(which + SPEAKS_OF[trained])
    for row in rows:
        found = row.difference
        if found is None or found.smallest is None or row.p_holm is None or row.p_holm < 0.05:
            continue
        name = metric_title(row.metric, row.estimate.positive)
        notes.append(
            f"{row.run}: no difference in {name} was shown; one of {found.smallest:.3f} or more would have been found "
            "with 80 % power (without correction)"
        )
    if margin is not None:
        notes.append(f"p (margin): of a difference of {margin:g} or more (two one-sided tests); small means equivalent")
    return notes


@command(table=True)
def subgroups(
    *,
    runs: Runs,
    by: Annotated[list[str], "COLUMN[,COLUMN…]", "Columns of the dataset's table: sex, age, …"],
    metric: list[str],
    ref: Annotated[DatasetRef, Only("data_root")],
    home: Path | None,
) -> Answer:
    """Score results within subgroups of the test images: by sex, age band, view position, any column.

    Ages come in bands, other numbers in quarters. With two runs or more, each is also compared with the first within
    every subgroup; p is corrected by Holm over all subgroups. To see how well features predict a column itself, use
    embcache probe --target.

    Example: embcache subgroups linear-S-0123 --by sex,age
    """
    from embcache.results.compare import INTERVALS, subgroups

    rows, notes = subgroups(runs, by, metrics=metric, ref=ref, home=home)

    def show() -> None:
        compared = any(row.difference is not None for row in rows)
        headers = ["run", "labels used", "column", "value", "images", "groups", "metric", "mean ± sd", "95 % interval"]
        headers += ["difference", "its 95 % interval", "p (Holm)"] if compared else []
        lines = []
        for row in rows:
            score = f"too few: no {', '.join(row.lacks)}" if row.mean is None else spread(row.mean, row.std)
            name, counts = metric_title(row.metric, row.positive), [f"{row.n_images:,}", f"{row.n_groups:,}"]
            line = [row.run, f"{row.labels_used:,}", row.column, row.value, *counts, name, score]
            line.append(bounds(row.interval) or row.why)
            lines.append(line + [*(_difference(row.difference) or ["", ""]), _p(row.p_holm)] * compared)
        own = ["labels used: training + validation per fold", INTERVALS]
        own += [f"difference: from {rows[0].run}; Holm: over all runs and subgroups"] if compared else []
        print_table(headers, lines, notes=[*notes, *own])

    return Answer([row.to_json() for row in rows], show)


def _p(p: float | None) -> str:
    return "" if p is None else f"{p:.4f}" if p >= 0.0001 else "< 0.0001"
