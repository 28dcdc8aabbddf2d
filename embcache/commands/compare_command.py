"""``embcache compare`` and ``subgroups``: which of two results is better, and for whom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from embcache.commands.options import DataRootOption, HomeOption, JsonOption, MetricOption, split_list, write_json
from embcache.commands.table import bounds, print_table, spread

if TYPE_CHECKING:
    from embcache.results.compare import Comparison

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
    from embcache.results.compare import compare_runs

    rows = compare_runs(split_list(runs), reference=reference, metrics=split_list(metric), margin=margin, home=home)
    if json:
        write_json([row.to_json() for row in rows], json)
    if json == "-":
        return
    first = rows[0]
    headers = ["run", "backbone", "head", "subset", "labels used", "metric", "mean ± sd", "95 % interval"]
    headers += ["difference", "95 % interval", "p", "p (Holm)", *(["p (margin)"] if margin is not None else [])]
    print_table(
        headers,
        [
            [
                row.run,
                " + ".join(row.backbones),
                row.head,
                row.subset,
                f"{row.labels_used:,}",
                metric_title(row.metric, row.estimate.positive),
                spread(row.mean, row.std),
                bounds(row.interval) or row.estimate.why,
                *_difference(row, margin is not None),
            ]
            for row in rows
        ],
        notes=[*dict.fromkeys(note for row in rows for note in row.notes), *_notes(rows, first, margin)],
    )


def _difference(row: Comparison, margin: bool) -> list[str]:
    found = row.difference
    if found is None:
        return ["reference", "", "", "", *([""] if margin else [])]
    told = [f"{found.difference:+.4f}", bounds(found.interval, "+") or found.why, _p(found.p), _p(row.p_holm)]
    return [*told, *([_p(found.p_margin)] if margin else [])]


def _notes(rows: list[Comparison], first: Comparison, margin: float | None) -> list[str]:
    from embcache.probe.metrics import metric_title
    from embcache.results.compare import INTERVALS, SPEAKS_OF

    notes = [f"{first.dataset}: difference from {first.run}", "labels used: training + validation of a fold", INTERVALS]
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
    every subgroup; p is corrected by Holm over all subgroups. How well features tell a column itself:
    embcache probe --target.

    Example: embcache subgroups linear-S-0123 --by sex,age
    """
    from embcache.probe.metrics import metric_title
    from embcache.results.compare import INTERVALS
    from embcache.results.subgroups import score_subgroups

    rows, notes = score_subgroups(
        split_list(runs), split_list(by), metrics=split_list(metric), home=home, data_root=data_root
    )
    if json:
        write_json([row.to_json() for row in rows], json)
    if json == "-":
        return
    compared = any(row.difference is not None for row in rows)
    headers = ["run", "labels used", "column", "value", "images", "groups", "metric", "mean ± sd", "95 % interval"]
    print_table(
        [*headers, *(["difference", "95 % interval", "p (Holm)"] if compared else [])],
        [
            [
                row.run,
                f"{row.labels_used:,}",
                row.column,
                row.value,
                f"{row.n_images:,}",
                f"{row.n_groups:,}",
                metric_title(row.metric, row.positive),
                f"too few: no {', '.join(row.lacks)}" if row.mean is None else spread(row.mean, row.std),
                bounds(row.interval) or row.why,
                *(
                    []
                    if not compared
                    else ["", "", ""]
                    if row.difference is None
                    else [
                        f"{row.difference.difference:+.4f}",
                        bounds(row.difference.interval, "+") or row.difference.why,
                        _p(row.p_holm),
                    ]
                ),
            ]
            for row in rows
        ],
        notes=[
            *notes,
            "labels used: training + validation of a fold",
            INTERVALS,
            *([f"difference: from {rows[0].run}; Holm: over all runs and subgroups"] if compared else []),
        ],
    )


def _p(p: float | None) -> str:
    return "" if p is None else f"{p:.4f}" if p >= 0.0001 else "< 0.0001"
