"""``embcache compare`` and ``subgroups``: which of two results is better, and for whom."""

from __future__ import annotations

from typing import Annotated

import typer

from embcache.commands.options import DataRootOption, HomeOption, JsonOption, split_list, write_json
from embcache.commands.table import print_table

RunsArgument = Annotated[
    list[str], typer.Argument(metavar="RUN…", help="Ids of runs, or their beginnings: `embcache results` lists them.")
]


def compare(
    runs: RunsArgument,
    reference: Annotated[
        str | None, typer.Option("--reference", metavar="RUN", help="Compare with this one. [default: the first]")
    ] = None,
    home: HomeOption = None,
    json: JsonOption = None,
) -> None:
    """Compare results on the same test images with one reference: difference, 95 % interval, p.

    Test groups are resampled, the same 2,000 times for every run; p is two-sided, and corrected by Holm for all runs
    that are compared with the reference.

    Example: embcache compare linear-S-0123 dvme-S-4567
    """
    from embcache.probe.metrics import METRIC_NAMES
    from embcache.report.compare import compare_runs

    rows = compare_runs(split_list(runs), reference=reference, home=home)
    if json:
        write_json([row.to_json() for row in rows], json)
    if json == "-":
        return
    first = rows[0]
    headers = [
        "run",
        "backbone",
        "head",
        "subset",
        "labels used",
        METRIC_NAMES.get(first.metric, first.metric),
        "95 % interval",
    ]
    print_table(
        [*headers, "difference", "95 % interval", "p", "p (Holm)"],
        [
            [
                row.run,
                " + ".join(row.backbones),
                row.head,
                row.subset,
                f"{row.labels_used:,}",
                _spread(row.mean, row.std),
                _range(row.interval),
                "reference" if row.difference is None else f"{row.difference:+.4f}",
                "" if row.difference_interval is None else _range(row.difference_interval, "+"),
                "" if row.p is None else _p(row.p),
                "" if row.p_holm is None else _p(row.p_holm),
            ]
            for row in rows
        ],
        notes=[
            *dict.fromkeys(note for row in rows for note in row.notes),
            f"{first.dataset}: difference from {first.run}, on the same resamples of test groups",
            "labels used: training + validation of a fold",
            "p: two-sided, of no difference between these models on such test images; Holm: for all rows against the "
            "reference",
        ],
    )


def subgroups(
    runs: RunsArgument,
    by: Annotated[
        list[str] | None,
        typer.Option("--by", metavar="COLUMN[,COLUMN…]", help="Columns of the dataset's table: sex, age, …"),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            metavar="NAME",
            help="auc, auprc, accuracy, balanced_accuracy, sensitivity_at_95_specificity or kappa. "
            "[default: the dataset's own]",
        ),
    ] = None,
    data_root: DataRootOption = None,
    home: HomeOption = None,
    json: JsonOption = None,
) -> None:
    """Score results within subgroups of the test images: by sex, age band, view position, any column.

    Ages come in bands, other numbers in quarters. How well features tell a column itself: embcache probe --target.

    Example: embcache subgroups linear-S-0123 --by sex,age
    """
    from embcache.probe.metrics import METRIC_NAMES
    from embcache.report.subgroups import score_subgroups

    rows, notes = score_subgroups(split_list(runs), split_list(by), metric=metric, home=home, data_root=data_root)
    if json:
        write_json([row.to_json() for row in rows], json)
    if json == "-":
        return
    name = rows[0].metric
    print_table(
        [
            "run",
            "labels used",
            "column",
            "value",
            "images",
            "groups",
            METRIC_NAMES.get(name, name.replace("_", " ")),
            "95 % interval",
        ],
        [
            [
                row.run,
                f"{row.labels_used:,}",
                row.column,
                row.value,
                f"{row.n_images:,}",
                f"{row.n_groups:,}",
                f"too few: no {', '.join(row.lacks)}" if row.mean is None else _spread(row.mean, row.std),
                "" if row.interval is None else _range(row.interval),
            ]
            for row in rows
        ],
        notes=[
            *notes,
            "labels used: training + validation of a fold",
            "mean ± sd over folds; interval: bootstrap over the subgroup's test groups",
        ],
    )


def _spread(mean: float, std: float | None) -> str:
    return f"{mean:.4f}" + ("" if std is None else f" ± {std:.4f}")


def _range(bounds: tuple[float, float], sign: str = "") -> str:
    return f"{bounds[0]:{sign}.4f} – {bounds[1]:{sign}.4f}"


def _p(p: float) -> str:
    return f"{p:.4f}" if p >= 0.0001 else "< 0.0001"
