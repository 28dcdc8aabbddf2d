"""``embcache probe``, ``heads`` and ``results``: heads on cached features, and what they reached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embcache.commands.options import (
    BackboneOption,
    CalibrateOption,
    DatasetOption,
    HomeOption,
    JsonOption,
    MetricOption,
    PositiveOption,
    PrevalenceOption,
    Skip,
    SubsetOption,
    echo_near,
    split_list,
    takes_configs,
    write_json,
)
from embcache.commands.output import ProgressBar, bounds, echo, print_table, spread
from embcache.config import DatasetRef, ProbeConfig
from embcache.errors import UsageError
from embcache.fields import check_subsets

if TYPE_CHECKING:
    from embcache.runs.folders import Result


@takes_configs
def probe(
    subset: SubsetOption = None,
    dataset: DatasetOption = None,
    backbone: BackboneOption = None,
    home: HomeOption = None,
    metric: MetricOption = None,
    json: JsonOption = None,
    *,
    config: Annotated[ProbeConfig, Skip("metric")],
    ref: DatasetRef,
) -> None:
    """Train heads on cached features and test them: five folds, early stopping, means and intervals.

    Without --dataset every dataset with cached features is probed. Heads that take one backbone give one result for
    each (default: all that are cached); dvme fuses the set (default: simclr,swav,dino). Images are not needed.

    Example: embcache probe --head linear --subset S,M,F --dataset pneumonia
    """
    from embcache.probe.heads import heads

    metrics, subsets = split_list(metric), split_list(subset) or ["S"]
    datasets, backbones = split_list(dataset), split_list(backbone)
    check_subsets(subsets)
    names = split_list(config.head)
    for name in names:
        if name not in heads and ":" not in name:
            raise heads.unknown(name)
    configs = [replace(config, head=name, metric=metrics[0] if metrics else None) for name in names]

    from embcache.probe.probe import probe_cached  # imports torch, which a slip in a flag need not wait for

    found = []
    with ProgressBar("epoch") as bar:
        for each in configs:
            found += probe_cached(datasets, backbones, subsets, each, ref, home=home, progress=bar.update)
    results = in_metrics(found, metrics, home)
    if json != "-":
        print_results(results)
    if json:
        write_json([result.to_json() for result in results], json)


def results(
    run: Annotated[
        str | None, typer.Argument(metavar="RUN", help="ID of a run, or its beginning: show this one in full.")
    ] = None,
    dataset: DatasetOption = None,
    metric: MetricOption = None,
    positive: PositiveOption = None,
    prevalence: PrevalenceOption = None,
    calibrate: CalibrateOption = False,
    home: HomeOption = None,
    json: JsonOption = None,
) -> None:
    """List the results that were saved, with their run IDs; or show one run in full.

    --metric scores them by other metrics, from their saved predictions; nothing is trained. Beneath stand which
    backbone to take, chosen on validation, and whether more labels still help. A run in full has scores with both
    intervals, of the ensemble and by patient, operating points chosen on validation images, calibration and the
    confusion matrix; --positive, --prevalence and --calibrate are for a run in full.

    Example: embcache results linear-S-0123 --prevalence 0.1
    """
    if run is not None:
        from embcache.commands.result_command import show_run
        from embcache.probe.prevalence import Adjust, parse_prevalence

        adjust = Adjust(parse_prevalence(prevalence), calibrate)
        show_run(run, metrics=split_list(metric), positive=positive, adjust=adjust, home=home, json=json)
        return
    if positive is not None or prevalence is not None or calibrate:
        raise UsageError(
            "--positive, --prevalence and --calibrate are for one run",
            code="one-run",
            fix="embcache results RUN, with its ID",
        )
    from embcache.paths import home_dir
    from embcache.results.advice import advise, sentences
    from embcache.runs.folders import list_results, list_unreadable

    names = split_list(dataset)
    found = [result for name in names for result in list_results(home, name)] if names else list_results(home)
    unreadable = [run for name in names for run in list_unreadable(home, name)] if names else list_unreadable(home)
    if unreadable:
        count = "1 run" if len(unreadable) == 1 else f"{len(unreadable)} runs"
        folders = ", ".join(str(run) for run in unreadable[:5]) + (", …" if len(unreadable) > 5 else "")
        echo(f"{count} could not be read (made by another version, or damaged): {folders}", err=True)
    found = in_metrics(found, split_list(metric), home)
    if json:
        write_json([result.to_json() for result in found], json)
    if json == "-":
        return
    if not found:
        echo(f"no results in {home_dir(home)}" + (f" for {', '.join(names)}" if names else ""))
        echo_near(names, home)
        echo("next: embcache probe --head linear --subset S,M,F")
        return
    print_results(found, ids=True)
    told = sentences(advise(found, home=home))
    if told:
        echo("\n" + "\n".join(told))


def heads() -> None:
    """List the heads: what is trained or solved on cached features, with their hyperparameters.

    Example: embcache heads
    """
    from embcache.probe.heads import find_head, heads

    rows = []
    for name in heads:
        head = find_head(name)
        # Table G1's sizes: five classes on a ResNet-50's features, or on those of SimCLR, SwAV and DINO.
        dims = {"simclr": 2048, "swav": 2048, "dino": 1536} if head.fuses else {"resnet50": 2048}
        count = head.count_parameters(dims, 5)
        options = ", ".join(f"{key}={_shown(value)}" for key, value in asdict(head).items())  # type: ignore[call-overload]
        rows.append([name, "several" if head.fuses else "one", f"{count:,}" if count else "", options, head.summary])
    print_table(
        ["head", "backbones", "parameters", "options", "what it is"],
        rows,
        notes=[
            "parameters: five classes, on 2048 features or on those of simclr, swav and dino; solved heads have none",
            "options: as --head-option takes them",
        ],
    )


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
    }
    from embcache.probe.metrics import metric_title

    shown = {name: cells for name, cells in rare.items() if any(cells)}
    headers = ["dataset", "backbone", "head", "subset", "labels used", "test", "metric", "mean ± sd", "95 % interval"]
    headers += ["validation", "best epoch", *shown, *(["run"] if ids else [])]
    rows = []
    for number, result in enumerate(results):
        last = [*(cells[number] for cells in shown.values()), *([result.id] if ids else [])]
        rows.append([*_row(result), *last])
        others = [
            (name, metric_title(e.metric, e.positive), spread(e.mean, e.std), bounds(e.interval) or e.why)
            for name, e in result.estimates.items()
            if name
        ]
        if result.metric == "accuracy" and result.majority is not None:
            others.append((f"always {result.majority[0]}", "accuracy", f"{result.majority[1]:.4f}", ""))
        for name, *numbers in others:
            tested = f"{result.by_group['groups']:,} groups" if name.startswith("by patient") else ""
            rows.append(["", "", f"  {name}", "", "", tested, *numbers, "", "", *[""] * len(last)])
    print_table(headers, rows, notes=_notes(results))


def in_metrics(results: Sequence[Result], metrics: Sequence[str], home: Path | None) -> list[Result]:
    """Every result by every metric that was asked for, or by its own."""
    from embcache.probe.summary import in_metric

    return [in_metric(result, metric, home) for result in results for metric in metrics or [result.metric]]


def _row(result: Result) -> list[str]:
    from embcache.probe.metrics import metric_title

    epochs = [fold.best_epoch for fold in result.folds if fold.best_epoch]
    found = result.estimate
    return [
        result.dataset,
        " + ".join(result.backbones),
        _head(result),
        result.subset,
        f"{result.labels_used:,} ({result.n_train:,} + {result.n_val:,})",
        f"{result.test_set} {result.n_test:,}",
        metric_title(result.metric, "" if found is None else found.positive),
        spread(result.mean, result.std) or ("not known" if found is None else "not defined"),
        bounds(result.interval) or ("" if found is None else found.why),
        "" if result.val_mean is None else f"{result.val_mean:.4f}",
        _range(epochs) if epochs else "",
    ]


def _head(result: Result) -> str:
    """A head's name with the hyperparameters that are not its defaults, and the kind of a run that is no probe."""
    options = [
        f"{name}={_shown(value)}" for name, value in result.request["head"].items() if name not in ("name", "once")
    ]
    options += [] if result.kind == "probe" else [result.kind]
    return result.head + (f" ({', '.join(options)})" if options else "")


def _shown(value: object) -> str:
    """A hyperparameter as ``--head-option`` takes it."""
    return f"[{', '.join(map(_shown, value))}]" if isinstance(value, list | tuple) else str(value)


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


def _notes(results: Sequence[Result]) -> list[str]:
    """Notes of all results, each once; named by dataset where there are several."""
    from embcache.results.compare import INTERVALS

    several = len({result.dataset for result in results}) > 1
    notes: dict[str, None] = {}
    for result in results:
        own = f"{' + '.join(result.backbones)}, {result.head}, {result.subset}: " if len(results) > 1 else ""
        told = [f"{own}{note}" if note.startswith("fold ") else note for note in result.notes]
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
    rows = "ensemble: the mean of the models' probabilities, which is what `embcache predict` uses"
    if any("by patient" in result.estimates for result in results):
        rows += "; by patient: the mean of probabilities over a patient's images"
    return [*notes, *missing, means, rows, INTERVALS]
