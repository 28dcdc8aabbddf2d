"""``embcache report``: a whole study as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embcache.commands.options import (
    DataRootOption,
    DatasetOption,
    HomeOption,
    JsonOption,
    MetricOption,
    split_list,
    write_json,
)
from embcache.commands.output import echo
from embcache.errors import UsageError


def report(
    dataset: DatasetOption = None,
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="The page.")] = Path("report.html"),
    no_images: Annotated[
        bool, typer.Option("--no-images", help="Leave thumbnails, ids and file names of images out of the file.")
    ] = False,
    rows: Annotated[
        str, typer.Option("--rows", metavar="test|all", help="Labelled images on the embedding map, 6,000 at most.")
    ] = "test",
    metric: MetricOption = None,
    data_root: DataRootOption = None,
    home: HomeOption = None,
    json: JsonOption = None,
) -> None:
    """Write one self-contained HTML page of all saved results: it opens from disk and fetches nothing.

    A sentence and a table of what is best at each number of labels, with both intervals; then learning curves, all
    models, the ensemble that predict uses, scores by patient, ROC, operating points, calibration, subgroups, the flow
    of patients and images, an embedding map, attention, what CLAIM and TRIPOD+AI ask, and the commands that make it
    all again. Without --dataset, the page covers every dataset that has results. Nothing is trained or extracted.

    With --metric, the first one scores all results anew and chooses between models; the others are shown beside it.

    Thumbnails and ids in the file may be patient data; --no-images leaves them out. Names of patients are never in it.

    Example: embcache report --dataset pneumonia --output study.html
    """
    if output.suffix.lower() not in (".html", ".htm"):
        raise UsageError("the report is an HTML file", found=str(output), fix=f"--output {output.with_suffix('.html')}")
    from embcache.report.page import write_report

    def say(line: str) -> None:
        echo(line, err=True)

    done = write_report(
        output, split_list(dataset), metrics=split_list(metric), home=home, data_root=data_root, images=not no_images,
        rows=rows, say=say,
    )  # fmt: skip
    if json != "-":
        for line in done.headlines:
            echo(f"· {line}")
        for note in done.notes:
            echo(f"· {note}")
        echo(f"report: {done.path} ({done.bytes / 1e6:.1f} MB, {done.results} results)")
    if not no_images:
        holds = f"{done.thumbnails:,} thumbnails and ids" if done.thumbnails else "ids"
        echo(f"the file holds {holds} of images: they may be patient data. --no-images leaves them out.", err=True)
    if json:
        answer = {
            "report": str(done.path), "bytes": done.bytes, "datasets": list(done.datasets), "results": done.results,
            "thumbnails": done.thumbnails, "headlines": list(done.headlines), "notes": list(done.notes),
        }  # fmt: skip
        write_json(answer, json)
