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
    check_suffix,
    split_list,
    write_json,
)
from embcache.commands.output import echo
from embcache.config import DatasetRef


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
