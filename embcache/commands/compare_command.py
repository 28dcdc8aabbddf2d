"""``embcache compare`` and ``subgroups``: which of two results is better, and for whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from embcache.commands.options import DataRootOption, HomeOption, JsonOption, MetricOption, split_list, write_json
from embcache.commands.output import bounds, print_table, spread
from embcache.config import DatasetRef

if TYPE_CHECKING:
    from embcache.results.compare import Comparison, Difference

RunsArgument = Annotated[
    list[str], typer.Argument(metavar="RUN…", help="Run IDs; each can be abbreviated to a unique prefix.")
]


def compare(
    runs: RunsArgument,
    reference: Annotated[
        str | None, typer.Option("--reference", metavar="RUN", help="Compare with this run. [default: the first]")
    ] = None,
    metric: MetricOption = None,
    margin: Annotated[
        float | None,
        typer.Option("--margin", metavar="D", help="Also test that the difference is smaller than this (equivalence)."),
    ] = None,
    home: HomeOption = None,
    json: JsonOption = None,
) -> None:
    """Compare results on the same test images with one reference: difference, 95 % interval, p.

    A difference is one of procedures (backbone, head and subset, trained anew) where the folds show how much training
    varies, else of these trained models. p is two-sided, and corrected by Holm for all runs and metrics compared.

    Example: embcache compare linear-S-0123 dvme-S-4567
    """
    from embcache.probe.metrics import metric_title
    from embcache.results.compare import compare

    rows = compare(split_list(runs), reference=reference, metrics=split_list(metric), margin=margin, home=home)
    if json:
        write_json([row.to_json() for row in rows], json)
    if json == "-":
        return
    headers = ["run", "backbone", "head", "subset", "labels used", "metric", "mean ± sd", "95 % interval"]
    headers += ["difference", "95 % interval", "p", "p (Holm)", *(["p (margin)"] if margin is not None else [])]
    lines = []
    for row in rows:
        name, d = metric_title(row.metric, row.estimate.positive), row.difference
        score = [spread(row.mean, row.std), bounds(row.interval) or row.estimate.why]
        tests = ["", ""] if d is None else [_p(d.p), _p(row.p_holm)]
        tests += [] if margin is None else ["" if d is None else _p(d.p_margin)]
        words = [row.run, " + ".join(row.backbones), row.head, row.subset, f"{row.labels_used:,}", name]
        lines.append([*words, *score, *(_difference(d) or ["reference", ""]), *tests])
    print_table(
        headers, lines, notes=[*dict.fromkeys(note for row in rows for note in row.notes), *_notes(rows, margin)]
    )


def _difference(found: Difference | None) -> list[str]:
    return [] if found is None else [f"{found.difference:+.4f}", bounds(found.interval, "+") or found.why]


def _notes(rows: Sequence[Comparison], margin: float | None) -> list[str]:
    from embcache.probe.metrics import metric_title
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


def subgroups(
    runs: RunsArgument,
    by: Annotated[
        list[str] | None,
        typer.Option("--by", metavar="COLUMN[,COLUMN…]", help="Columns of the dataset's table: sex, age, …"),
    ] = None,
    metric: MetricOption = None,
    data_root: DataRootOption = None,
    home: HomeOption = None,
    json: JsonOption = None,
) -> None:
    """Score results within subgroups of the test images: by sex, age band, view position, any column.

    Ages come in bands, other numbers in quarters. With two runs or more, each is also compared with the first within
    every subgroup; p is corrected by Holm over all subgroups. To see how well features predict a column itself, use
    embcache probe --target.

    Example: embcache subgroups linear-S-0123 --by sex,age
    """
    from embcache.probe.metrics import metric_title
    from embcache.results.compare import INTERVALS, subgroups

    ref = DatasetRef(data_root=data_root)
    rows, notes = subgroups(split_list(runs), split_list(by), metrics=split_list(metric), ref=ref, home=home)
    if json:
        write_json([row.to_json() for row in rows], json)
    if json == "-":
        return
    compared = any(row.difference is not None for row in rows)
    headers = ["run", "labels used", "column", "value", "images", "groups", "metric", "mean ± sd", "95 % interval"]
    headers += ["difference", "95 % interval", "p (Holm)"] if compared else []
    lines = []
    for row in rows:
        score = f"too few: no {', '.join(row.lacks)}" if row.mean is None else spread(row.mean, row.std)
        counts = [f"{row.n_images:,}", f"{row.n_groups:,}"]
        line = [row.run, f"{row.labels_used:,}", row.column, row.value, *counts, metric_title(row.metric, row.positive)]
        line += [score, bounds(row.interval) or row.why]
        lines.append(line + [*(_difference(row.difference) or ["", ""]), _p(row.p_holm)] * compared)
    notes += ["labels used: training + validation per fold", INTERVALS]
    notes += [f"difference: from {rows[0].run}; Holm: over all runs and subgroups"] if compared else []
    print_table(headers, lines, notes=notes)


def _p(p: float | None) -> str:
    return "" if p is None else f"{p:.4f}" if p >= 0.0001 else "< 0.0001"
