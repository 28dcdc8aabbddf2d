"""``embcache run`` and ``curves``: the paper's tables and figures, your own grids, learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embcache.commands.options import (
    BackboneOption,
    DatasetOption,
    HomeOption,
    JsonOption,
    MetricOption,
    Skip,
    check_suffix,
    split_list,
    takes_configs,
    write_json,
)
from embcache.commands.output import echo, echo_data
from embcache.commands.progress import ProgressBar
from embcache.config import DatasetRef, StudyConfig
from embcache.errors import UsageError

if TYPE_CHECKING:
    from embcache.results.layout import Table

FormatOption = Annotated[
    str,
    typer.Option(
        "--format", metavar="markdown|latex|csv", help="Format of the table; CSV holds every number, one line per cell."
    ),
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", metavar="FILE", help="Write the table to FILE instead of stdout.")
]
FigureOption = Annotated[
    Path | None,
    typer.Option("--figure", metavar="FILE", help="Write the figure to FILE: .png, .svg or .pdf."),
]


@takes_configs
def run(
    context: typer.Context,
    what: Annotated[
        str, typer.Argument(metavar="NAME|FILE.toml", help="table1–table4, B1–B8, C1–C4, G1, fig2, D1, D2, F1.")
    ],
    dataset: DatasetOption = None,
    backbone: BackboneOption = None,
    subset: Annotated[
        list[str] | None,
        typer.Option(
            "--subset", metavar="S,M,F,N", help="Subsets instead of those of the table; repeatable or comma-separated."
        ),
    ] = None,
    home: HomeOption = None,
    format: FormatOption = "markdown",
    output: OutputOption = None,
    figure: FigureOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and do nothing.")] = False,
    json: JsonOption = None,
    *,
    ref: Annotated[DatasetRef, Skip("target")],
    config: Annotated[StudyConfig, Skip("splits", "metric", "positive")],
) -> None:
    """Make a table or a figure of the paper, or your own grid: plan, do what is missing, print.

    Missing extractions, probes and finetunings are planned, then done; saved runs of the same request are reused, so an
    interrupted command continues where it stopped. The paper's value and the difference (ours − paper) / √(s₁² + s₂²)
    are printed beside ours; on a local test set the difference is withheld.

    Example: embcache run B3 --backbone random,effnet_lite0 --subset 50,100,F
    """
    from embcache.results.render import check_format, render
    from embcache.study.study import run_study

    check_format(format)
    output = _checked_output(output, format)
    typed = {
        name for name in context.params
        if (place := context.get_parameter_source(name)) is not None and place.name == "COMMANDLINE"
    }  # fmt: skip
    rows = {"datasets": dataset, "backbones": backbone, "subsets": subset}
    config = StudyConfig.make(config, {name: split_list(values) for name, values in rows.items()})
    with ProgressBar("step") as bar:
        try:
            done = run_study(
                what, config, ref, home=home, figure=_checked_figure(figure), dry_run=dry_run, given=typed,
                progress=bar.update,
            )  # fmt: skip
        except (KeyboardInterrupt, SystemExit):
            echo("\nstopped: what is finished is kept, and the same command continues from there", err=True)
            raise
    _hand_over(render(done.table, format), done.table, done.figures, output, json)
    if done.empty:
        raise typer.Exit(1)


def curves(
    dataset: DatasetOption = None,
    backbone: BackboneOption = None,
    head: Annotated[
        list[str] | None, typer.Option("--head", metavar="NAME", help="Only results of these heads.")
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option("--kind", metavar="probe|finetune|kaggle", help="Only results of this kind.")
    ] = None,
    metric: MetricOption = None,
    home: HomeOption = None,
    format: FormatOption = "markdown",
    output: OutputOption = None,
    figure: FigureOption = None,
    json: JsonOption = None,
) -> None:
    """Draw learning curves of the saved results: mean and interval over the number of training labels.

    Notes below the table say which backbone to take, chosen on validation, and whether more labels help.

    Example: embcache curves --dataset pneumonia --head linear --figure curves.png
    """
    from embcache.results.advice import advise, sentences
    from embcache.results.curves import draw_curves, find_results
    from embcache.results.render import check_format, render

    check_format(format)
    output = _checked_output(output, format)
    target = _checked_figure(figure)
    results = find_results(
        home=home,
        datasets=split_list(dataset),
        backbones=split_list(backbone),
        heads=split_list(head),
        kinds=split_list(kind),
        metrics=split_list(metric),
    )
    table, path = draw_curves(results, home=home, target=target)
    advice = advise(results, home=home)
    table = replace(table, notes=(*table.notes, *sentences(advice)))
    _hand_over(render(table, format), table, (path,), output, json, advice=[each.to_json() for each in advice])


def _hand_over(
    text: str, table: Table, figures: Sequence[Path], output: Path | None, json: str | None, **more: object
) -> None:
    """The answer to stdout or its file, figures named on stderr."""
    if output is not None:
        from embcache.io import write_output

        write_output(output, text)
        echo(f"table   {output}", err=True)
    elif json != "-":
        echo_data(text, "--output FILE")
    for path in figures:
        echo(f"figure  {path}", err=True)
    if json:
        answer = {"name": table.name, "title": table.title, "records": [dict(r) for r in table.records],
                  "notes": list(table.notes), "figures": [str(path) for path in figures], **more}  # fmt: skip
        write_json(answer, json)


def _checked_output(output: Path | None, format: str) -> Path | None:
    """The file of the table, its home folder spelled out; an error where it could not be written after all the work."""
    from embcache.io import check_target
    from embcache.results.render import SUFFIXES

    if output is not None:
        output = check_suffix(output.expanduser(), "--output", *SUFFIXES[format])
        check_target(output)
    return output


def _checked_figure(figure: Path | None) -> Path | None:
    if figure is not None and figure.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(
            "unknown format of the figure", code="figure-format", expected=".png, .svg or .pdf", found=str(figure),
            fix=f"--figure {figure.with_suffix('.png')}",
        )  # fmt: skip
    return figure
