"""``embcache predict``, ``submit``, ``kaggle-score`` and ``export-head``: a result put to use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embcache.commands.options import (
    CalibrateOption,
    DataRootOption,
    HomeOption,
    JsonOption,
    MaxPixelsOption,
    PrevalenceOption,
    check_suffix,
    split_list,
    takes_columns,
    write_json,
)
from embcache.commands.output import echo, echo_data
from embcache.commands.progress import ProgressBar
from embcache.commands.table import print_note, print_table
from embcache.config import parse_weights
from embcache.errors import UsageError

if TYPE_CHECKING:
    from embcache.config import DatasetRef

RunOption = Annotated[
    str, typer.Option("--run", metavar="RUN", help="Id of a run, or its beginning: `embcache results` lists them.")
]


@takes_columns
def predict(
    run: RunOption,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[IMAGE|FOLDER|TABLE…]", help="Images, folders to look through, or tables of paths."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="NAME", help="Predict all images of a dataset instead.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="CSV to write. [default: to stdout]")
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights", metavar="[NAME=]FILE", help="The checkpoint that the run was made with; repeatable with NAME=."
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda:0, …")] = "auto",
    folds: Annotated[
        list[str] | None,
        typer.Option("--folds", metavar="K[,K…]", help="Average the models of these folds. [default: all]"),
    ] = None,
    prevalence: PrevalenceOption = None,
    calibrate: CalibrateOption = False,
    by_group: Annotated[
        Path | None,
        typer.Option(
            "--by-group",
            metavar="FILE",
            help="Also write a CSV with one row per group (patient): the mean of its images' probabilities.",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", min=1, help="Threads that decode images.")
    ] = None,
    max_pixels: MaxPixelsOption = None,
    data_root: DataRootOption = None,
    home: HomeOption = None,
    json: JsonOption = None,
    *,
    columns: DatasetRef,
) -> None:
    """Predict images by a saved run: a CSV with the probability of each class, the mean over the run's folds.

    A CSV or Parquet file among the images is a table with a column path, and perhaps group (--path-column and
    --group-column name others). Probabilities are for the class shares that training saw; --prevalence corrects
    them, --calibrate fits a temperature for each fold.

    Images are decoded, transformed and embedded by the run's own recipe; where that cannot be rebuilt exactly nothing
    is predicted. Images that cannot be read are listed with the reason, on stderr and in the column error.

    Example: embcache predict --run linear-S-0123 scans/ --output predictions.csv
    """
    from embcache.io import check_target, write_output
    from embcache.probe.prevalence import Adjust, parse_prevalence
    from embcache.results.predict import predict_images
    from embcache.runs.folders import find_run_anywhere

    adjust = Adjust(parse_prevalence(prevalence), calibrate)
    for file, flag in ((output, "--output"), (by_group, "--by-group")):
        if file is not None:
            check_target(check_suffix(file.expanduser(), flag, ".csv"))
    with ProgressBar("img") as bar:
        found = predict_images(
            run,
            paths or (),
            dataset=dataset,
            data_root=data_root,
            home=home,
            weights=parse_weights(weights or (), list(find_run_anywhere(run, home)[0].backbones)),
            device=device,
            folds=_numbers(folds, "--folds"),
            adjust=adjust,
            by_group=by_group is not None,
            workers=workers,
            max_pixels=max_pixels,
            progress=bar.update,
            columns=columns,
        )
    for note in (*found.notes, *([f"probabilities are adjusted: {found.adjusted}"] if found.adjusted else [])):
        print_note(note)
    for image, reason in found.failed.items():
        shown = image.replace("\n", "\\n")  # a name cannot forge a line of its own
        echo(f"not read: {shown}: {reason}", err=True)
    read, total = len(found.images) - len(found.failed), len(found.images)
    echo(f"{read:,} of {total:,} images predicted by {found.run}, {len(found.folds)} folds", err=True)
    if output is not None:
        write_output(output.expanduser(), found.to_csv())
        echo(f"written: {output}", err=True)
    if by_group is not None:
        write_output(by_group.expanduser(), found.groups_to_csv())
        echo(f"written: {by_group}", err=True)
    if json:
        write_json(list(found.rows()), json)
    elif output is None:
        echo_data(found.to_csv(), "--output FILE")


def submit(
    run: RunOption,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Where the files go. [default: submission-RUN]"),
    ] = None,
    data_root: DataRootOption = None,
    home: HomeOption = None,
    json: JsonOption = None,
) -> None:
    """Write the files that Kaggle takes for aptos and patchcam: one a fold, ids as in the sample submission.

    The run must have been made with --test official. Test images that could not be read get the commonest class, or
    the share of class 1, of the labelled images, and are listed.

    Example: embcache submit --run linear-F-0123
    """
    from embcache.results.kaggle import make_submission

    if output is not None:
        _check_folder(output)
    made = make_submission(run, output, home=home, data_root=data_root)
    if json:
        write_json(
            {
                "run": made.run,
                "competition": made.competition,
                "files": [str(file) for file in made.files],
                "folds": list(made.folds),
                "rows": made.rows,
                "filled": dict(made.filled),
                "notes": list(made.notes),
            },
            json,
        )
    for image, reason in made.filled.items():
        echo(f"filled in: {image}: {reason}", err=True)
    if json == "-":
        for note in made.notes:
            print_note(note)
        return
    print_table(
        ["fold", "file", "rows", "filled in"],
        [
            [str(fold), str(file), f"{made.rows:,}", f"{len(made.filled):,}"]
            for fold, file in zip(made.folds, made.files, strict=True)
        ],
        notes=[
            *made.notes,
            f"hand in: kaggle competitions submit -c {made.competition} -f FILE -m '{made.run}'",
            "then: embcache kaggle-score --run "
            + made.run
            + " --score PRIVATE/PUBLIC for each file, in the order of the folds",
        ],
    )


def kaggle_score(
    run: RunOption,
    score: Annotated[
        list[str] | None,
        typer.Option(
            "--score", metavar="PRIVATE/PUBLIC", help="Scores of one fold's file; once a fold, in their order."
        ),
    ] = None,
    data_root: DataRootOption = None,
    home: HomeOption = None,
    json: JsonOption = None,
) -> None:
    """Keep the leaderboard's scores of a run as a result: α · private + (1 − α) · public of each fold.

    Example: embcache kaggle-score --run linear-F-0123 --score 0.80/0.70 --score 0.81/0.71 …
    """
    from embcache.commands.probe_command import print_results
    from embcache.results.kaggle import read_score, save_kaggle_scores

    # equal scores of two folds are two scores: not split_list, which drops repeats
    pairs = [read_score(text) for texts in score or () for text in texts.split(",")]
    result = save_kaggle_scores(run, pairs, home=home, data_root=data_root)
    if json != "-":
        print_results([result], ids=True)
    if json:
        write_json([result.to_json()], json)


def export_head(
    run: RunOption,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="Where head.safetensors and head.json go."),
    ],
    fold: Annotated[
        int | None,
        typer.Option("--fold", metavar="K", help="Whose head. [default: the best on validation]"),
    ] = None,
    home: HomeOption = None,
    json: JsonOption = None,
) -> None:
    """Write the head of one fold as safetensors and JSON, for programs without embcache (docs/results.md).

    Example: embcache export-head --run linear-S-0123 --output my-head
    """
    from embcache.results.export_head import export_head as export

    _check_folder(output)
    done = export(run, output, fold=fold, home=home)
    if json:
        write_json(done.about, json)
    if json == "-":
        return
    print_table(
        ["tensor", "shape"], [[name, "×".join(map(str, t["shape"]))] for name, t in done.about["tensors"].items()]
    )
    echo(f"· {done.about['head']['name']} of fold {done.about['fold']}: {done.about['formula']}")
    echo(f"· written: {done.folder}/head.safetensors and head.json")


def _check_folder(output: Path) -> None:
    if output.suffix.lower() in (".csv", ".json", ".pt", ".pth", ".safetensors", ".tar", ".zip"):
        check_suffix(output, "--output")


def _numbers(values: list[str] | None, flag: str) -> list[int] | None:
    if not values:
        return None
    try:
        return [int(value) for value in split_list(values)]
    except ValueError as error:
        raise UsageError("not a list of numbers", expected="0,1,2", found=", ".join(values), where=flag) from error
