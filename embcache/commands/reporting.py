"""``embcache run``, ``curves`` and ``report``: tables, figures and a page of many results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from embcache.commands.options import (
    BackboneOption,
    DataRootOption,
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
from embcache.commands.output import ProgressBar, echo, echo_data
from embcache.config import DatasetRef, StudyConfig
from embcache.errors import UsageError
from embcache.fields import Config, option

if TYPE_CHECKING:
    from embcache.results.layout import Table


@dataclass(frozen=True)
class TableOutput(Config):
    """Where a table and its figure go, and how the table is written."""

    heading: ClassVar[str] = "Output options"

    format: str = option(
        "markdown", "Format of the table; CSV holds every number, one line per cell.",
        metavar="markdown|latex|csv", choices=("markdown", "latex", "csv"),
    )  # fmt: skip
    output: Path | None = option(None, "Write the table to FILE instead of stdout.", metavar="FILE")
    figure: Path | None = option(None, "Write the figure to FILE: .png, .svg or .pdf.", metavar="FILE")

    def checked(self) -> TableOutput:
        """With the home folder spelled out; an error before the work where a file could not be written after it."""
        from embcache.io import check_target
        from embcache.results.render import SUFFIXES

        if self.figure is not None and self.figure.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise UsageError(
                "unknown format of the figure", code="figure-format", expected=".png, .svg or .pdf",
                found=str(self.figure), fix=f"--figure {self.figure.with_suffix('.png')}",
            )  # fmt: skip
        if self.output is None:
            return self
        output = check_suffix(self.output.expanduser(), "--output", *SUFFIXES[self.format])
        check_target(output)
        return replace(self, output=output)


@takes_configs
def run(
    context: typer.Context,
    what: Annotated[
        str, typer.Argument(metavar="NAME|FILE.toml", help="table1–table4, B1–B8, C1–C4, G1, fig2, D1, D2, F1.")
    ],
    home: HomeOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and do nothing.")] = False,
    json: JsonOption = None,
    *,
    ref: Annotated[DatasetRef, Skip("target")],
    config: Annotated[StudyConfig, Skip("splits", "metric", "positive")],
    out: TableOutput,
) -> None:
    """Make a table or a figure of the paper, or your own grid: plan, do what is missing, print.

    Missing extractions, probes and finetunings are planned, then done; saved runs of the same request are reused, so an
    interrupted command continues where it stopped. The paper's value and the difference (ours − paper) / √(s₁² + s₂²)
    are printed beside ours; on a local test set the difference is withheld.

    Example: embcache run B3 --backbone random,effnet_lite0 --subset 50,100,F
    """
    from embcache.study.study import run_study

    out = out.checked()
    # Options that were typed take precedence over a file even where they equal their defaults.
    origins = {name: context.get_parameter_source(name) for name in context.params}
    typed = {name for name, origin in origins.items() if origin is not None and origin.name == "COMMANDLINE"}
    with ProgressBar("step") as bar:
        try:
            done = run_study(
                what, config, ref, home=home, figure=out.figure, dry_run=dry_run, given=typed, progress=bar.update
            )
        except (KeyboardInterrupt, SystemExit):
            echo("\nstopped: what is finished is kept, and the same command continues from there", err=True)
            raise
    _write(done.table, done.figures, out, json)
    if done.empty:
        raise typer.Exit(1)


@takes_configs
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
    json: JsonOption = None,
    *,
    out: TableOutput,
) -> None:
    """Draw learning curves of the saved results: mean and interval over the number of training labels.

    Notes below the table say which backbone to take, chosen on validation, and whether more labels help.

    Example: embcache curves --dataset pneumonia --head linear --figure curves.png
    """
    from embcache.figures.run_plots import draw_curves
    from embcache.results.advice import advise, sentences
    from embcache.results.curves import find_results

    out = out.checked()
    results = find_results(
        home=home, datasets=split_list(dataset), backbones=split_list(backbone), heads=split_list(head),
        kinds=split_list(kind), metrics=split_list(metric),
    )  # fmt: skip
    table, path = draw_curves(results, home=home, target=out.figure)
    advice = advise(results, home=home)
    table = replace(table, notes=(*table.notes, *sentences(advice)))
    _write(table, (path,), out, json, advice=[each.to_json() for each in advice])


def _write(table: Table, figures: Sequence[Path], out: TableOutput, json: str | None, **more: object) -> None:
    """Write the table to stdout or its file, and name the figures on stderr."""
    from embcache.io import write_output
    from embcache.results.render import render

    text = render(table, out.format)
    if out.output is not None:
        write_output(out.output, text)
        echo(f"table   {out.output}", err=True)
    elif json != "-":
        echo_data(text, "--output FILE")
    for path in figures:
        echo(f"figure  {path}", err=True)
    if json:
        answer = {
            "name": table.name, "title": table.title, "records": [dict(record) for record in table.records],
            "notes": list(table.notes), "figures": [str(path) for path in figures], **more,
        }  # fmt: skip
        write_json(answer, json)


def report(
    dataset: DatasetOption = None,
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="File of the page.")] = Path("report.html"),
    no_images: Annotated[
        bool, typer.Option("--no-images", help="Leave thumbnails, IDs and file names of images out of the file.")
    ] = False,
    rows: Annotated[
        str, typer.Option("--rows", metavar="test|all", help="Labeled images on the embedding map, 6,000 at most.")
    ] = "test",
    metric: MetricOption = None,
    data_root: DataRootOption = None,
    home: HomeOption = None,
    json: JsonOption = None,
) -> None:
    """Write one self-contained HTML page of all saved results; it opens from disk and fetches nothing.

    The page has the best model at each number of labels, learning curves, all models, the ensemble that predict uses,
    scores by patient, ROC, operating points, calibration, subgroups, the flow of patients and images, an embedding map,
    attention, the items of CLAIM and TRIPOD+AI, and the commands that make it again. Nothing is trained or extracted.

    Without --dataset, the page covers every dataset that has results. The first --metric scores all results again and
    chooses between models; the others are shown beside it.

    Thumbnails and IDs in the file may be patient data; --no-images leaves them out. Names of patients are never in it.

    Example: embcache report --dataset pneumonia --output study.html
    """
    check_suffix(output, "--output", ".html", ".htm")
    from embcache.report.page import write_report

    done = write_report(
        output, split_list(dataset), metrics=split_list(metric), home=home, ref=DatasetRef(data_root=data_root),
        images=not no_images, rows=rows,
    )  # fmt: skip
    if json != "-":
        for line in (*done.headlines, *done.notes):
            echo(f"· {line}")
        echo(f"report: {done.path} ({done.bytes / 1e6:.1f} MB, {done.results} results)")
    if not no_images:
        holds = f"{done.thumbnails:,} thumbnails and IDs" if done.thumbnails else "IDs"
        echo(f"the file contains {holds} of images, which may be patient data; --no-images leaves them out", err=True)
    if json:
        answer = {
            "report": str(done.path), "bytes": done.bytes, "datasets": list(done.datasets), "results": done.results,
            "thumbnails": done.thumbnails, "headlines": list(done.headlines), "notes": list(done.notes),
        }  # fmt: skip
        write_json(answer, json)
