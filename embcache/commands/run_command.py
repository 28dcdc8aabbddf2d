"""``embcache run`` and ``curves``: the paper's tables and figures, one's own grids, learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embcache.commands.options import (
    AllowMissingOption,
    BackboneOption,
    DataRootOption,
    DatasetOption,
    DropClassOption,
    HomeOption,
    JsonOption,
    MergeClassOption,
    MetricOption,
    NameOption,
    OverlapOption,
    check_suffix,
    class_options,
    split_list,
    takes_columns,
    write_json,
)
from embcache.commands.output import ProgressBar, echo, echo_data
from embcache.config import parse_weights
from embcache.errors import UsageError

if TYPE_CHECKING:
    from embcache.config import DatasetRef
    from embcache.results.layout import Table

FormatOption = Annotated[
    str, typer.Option("--format", metavar="markdown|latex|csv", help="CSV holds every number, one line a cell.")
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", metavar="FILE", help="Write the table there instead of to stdout.")
]
FigureOption = Annotated[
    Path | None,
    typer.Option("--figure", metavar="FILE", help="Write the figure there: .png, .svg or .pdf."),
]


@takes_columns
def run(
    what: Annotated[
        str, typer.Argument(metavar="NAME|FILE.toml", help="table1–table4, B1–B8, C1–C4, G1, fig2, D1, D2, F1.")
    ],
    dataset: DatasetOption = None,
    backbone: BackboneOption = None,
    subset: Annotated[
        list[str] | None,
        typer.Option("--subset", metavar="S,M,F,N", help="Instead of the table's own subsets; comma-separated."),
    ] = None,
    head: Annotated[
        list[str] | None, typer.Option("--head", metavar="NAME", help="Instead of the table's own heads.")
    ] = None,
    folds: Annotated[int | None, typer.Option("--folds", metavar="K", help="[default: 5]")] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of folds, subsets, weights, order, dropout.")] = 0,
    val: Annotated[str | None, typer.Option("--val", metavar="full|matched", help="[default: full]")] = None,
    test: Annotated[str | None, typer.Option("--test", metavar="local|official", help="[default: local]")] = None,
    repeats: Annotated[int | None, typer.Option("--repeats", metavar="R", help="R × K folds; probes only.")] = None,
    lr: Annotated[
        list[str] | None,
        typer.Option(
            "--lr", metavar="RATE[,RATE…]", help="Learning rate; of several probes keep the best on validation."
        ),
    ] = None,
    max_epochs: Annotated[
        int | None, typer.Option("--max-epochs", metavar="N", help="Of finetunings. [default: 50]")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", metavar="PREFIX", help="Where several recipes of a backbone are cached.")
    ] = None,
    exclude_test_overlap: OverlapOption = False,
    drop_class: DropClassOption = None,
    merge_class: MergeClassOption = None,
    data_root: DataRootOption = None,
    home: HomeOption = None,
    weights: Annotated[
        list[str] | None, typer.Option("--weights", metavar="NAME=FILE", help="Checkpoint of a backbone.")
    ] = None,
    transform: Annotated[
        str | None, typer.Option("--transform", metavar="paper|imagenet|model", help="Of what is extracted.")
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda:0, …")] = "auto",
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", min=1, help="Threads that decode images.")
    ] = None,
    allow_missing: AllowMissingOption = False,
    name: NameOption = None,
    format: FormatOption = "markdown",
    output: OutputOption = None,
    figure: FigureOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; do nothing.")] = False,
    json: JsonOption = None,
    *,
    columns: DatasetRef,
) -> None:
    """Make a table or a figure of the paper, or a grid of one's own: plan, do what is missing, print.

    Missing extractions, probes and finetunings are planned, then done; what a run of the same request
    holds is reused, so that an interrupted command goes on where it stopped. The paper's value and the difference
    (ours − paper) / √(s₁² + s₂²) stand beside ours; on a local test set the difference is withheld.

    Example: embcache run B3 --backbone random,effnet_lite0 --subset 50,100,F
    """
    from embcache.probe.usage import parse_rates
    from embcache.results.render import check_format, render
    from embcache.study.order import Order, deliver

    check_format(format)
    output = _checked_output(output, format)
    given = {
        "folds": folds, "val": val, "test": test, "repeats": repeats, "seed": seed, "recipe": recipe,
        "exclude_test_overlap": exclude_test_overlap, "max_epochs": max_epochs, "data_root": data_root, "home": home,
        "weights": parse_weights(weights or ()) or {}, "transform": transform, "device": device, "workers": workers,
        "allow_missing": allow_missing, "dataset_name": name, "columns": columns, "lr": parse_rates(split_list(lr)),
        "classes": class_options(drop_class, merge_class) if drop_class or merge_class else None,
    }  # fmt: skip
    order = Order(
        what,
        split_list(dataset),
        split_list(backbone),
        split_list(subset),
        split_list(head),
        {key: value for key, value in given.items() if value is not None},
        _checked_figure(figure),
        dry_run,
    )
    with ProgressBar("step") as bar:
        try:
            done = deliver(order, say=lambda line: echo(line, err=True), progress=bar.update)
        except (KeyboardInterrupt, SystemExit):
            echo("\nstopped: what is finished stays, and the same command goes on from there", err=True)
            raise
    _hand_over(render(done.table, format), done.table, done.figures, output, json)
    if done.empty:
        raise typer.Exit(1)


def curves(
    dataset: DatasetOption = None,
    backbone: BackboneOption = None,
    head: Annotated[list[str] | None, typer.Option("--head", metavar="NAME", help="Only these heads.")] = None,
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
    """Draw learning curves of the saved results: mean and interval over numbers of training labels.

    Beneath stand which backbone to take, chosen on validation, and whether more labels still help.

    Example: embcache curves --dataset pneumonia --head linear --figure curves.png
    """
    from embcache.figures.draw_curves import draw_curves
    from embcache.results.advice import advise, sentences
    from embcache.results.curves import find_results
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
            "the format of the figure is not known", expected=".png, .svg or .pdf", found=str(figure),
            fix=f"--figure {figure.with_suffix('.png')}",
        )  # fmt: skip
    return figure
