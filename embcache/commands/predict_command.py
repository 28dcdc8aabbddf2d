"""``embcache predict``, ``submit``, ``kaggle-score`` and ``export-head``: a result put to use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embcache.commands.options import (
    DataRootOption,
    HomeOption,
    JsonOption,
    Skip,
    check_suffix,
    takes_configs,
    write_json,
)
from embcache.commands.output import ProgressBar, echo, echo_data, print_note, print_table
from embcache.config import DatasetRef, PredictConfig

RunOption = Annotated[
    str, typer.Option("--run", metavar="RUN", help="Run ID, or a unique prefix. See `embcache results`.")
]


@takes_configs
def predict(
    run: RunOption,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[IMAGE|FOLDER|TABLE…]", help="Images, folders that are searched, or tables of paths."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="NAME", help="Predict all images of a dataset instead.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="CSV to write. [default: to stdout]")
    ] = None,
    home: HomeOption = None,
    json: JsonOption = None,
    *,
    config: PredictConfig,
    ref: Annotated[DatasetRef, Skip("target", "name", "allow_missing", "drop_class", "merge_class")],
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
    from embcache.results.predict import predict

    if config.by_group is not None:
        check_suffix(config.by_group, "--by-group", ".csv")
    if output is not None:
        output = check_suffix(output.expanduser(), "--output", ".csv")
        check_target(output)
    with ProgressBar("img") as bar:
        found = predict(run, paths or (), dataset=dataset, ref=ref, config=config, home=home, progress=bar.update)
    for note in (*found.notes, *([f"probabilities are adjusted: {found.adjusted}"] if found.adjusted else [])):
        print_note(note)
    for image, reason in found.failed.items():
        shown = image.replace("\n", "\\n")  # a name cannot forge a line of its own
        echo(f"not read: {shown}: {reason}", err=True)
    read, total = len(found.images) - len(found.failed), len(found.images)
    echo(f"{read:,} of {total:,} images predicted by {found.run}, {len(found.folds)} folds", err=True)
    if output is not None:
        write_output(output, found.to_csv())
    for file in filter(None, (output, config.by_group)):
        echo(f"written: {file}", err=True)
    if json:
        write_json(found.to_json(), json)
    elif output is None:
        echo_data(found.to_csv(), "--output FILE")


def submit(
    run: RunOption,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FOLDER", help="Folder of the files. [default: submission-RUN]"),
    ] = None,
    data_root: DataRootOption = None,
    home: HomeOption = None,
    json: JsonOption = None,
) -> None:
    """Write the files that Kaggle takes for aptos and patchcam: one per fold, IDs as in the sample submission.

    The run must have been made with --test official. Test images that could not be read get the most frequent class,
    or the share of class 1, of the labeled images, and are listed.

    Example: embcache submit --run linear-F-0123
    """
    from embcache.results.kaggle import make_submission

    if output is not None:
        _check_folder(output)
    made = make_submission(run, output, ref=DatasetRef(data_root=data_root), home=home)
    if json:
        write_json(made.to_json(), json)
    for image, reason in made.filled.items():
        echo(f"filled in: {image}: {reason}", err=True)
    if json == "-":
        for note in made.notes:
            print_note(note)
        return
    files = zip(made.folds, made.files, strict=True)
    print_table(
        ["fold", "file", "rows", "filled in"],
        [[str(fold), str(file), f"{made.rows:,}", f"{len(made.filled):,}"] for fold, file in files],
        notes=[
            *made.notes,
            f"submit: kaggle competitions submit -c {made.competition} -f FILE -m '{made.run}'",
            f"then: embcache kaggle-score --run {made.run} --score PRIVATE/PUBLIC for each file, in the order of the "
            "folds",
        ],
    )


def kaggle_score(
    run: RunOption,
    score: Annotated[
        list[str] | None,
        typer.Option("--score", metavar="PRIVATE/PUBLIC", help="Scores of a fold's file; once per fold, in order."),
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
    result = save_kaggle_scores(run, pairs, ref=DatasetRef(data_root=data_root), home=home)
    if json != "-":
        print_results([result], ids=True)
    if json:
        write_json([result.to_json()], json)


def export_head(
    run: RunOption,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="Folder of head.safetensors and head.json."),
    ],
    fold: Annotated[
        int | None,
        typer.Option("--fold", metavar="K", help="Fold of the head. [default: the best on validation]"),
    ] = None,
    home: HomeOption = None,
    json: JsonOption = None,
) -> None:
    """Write the head of one fold as safetensors and JSON, for programs without embcache (docs/results.md).

    Example: embcache export-head --run linear-S-0123 --output my-head
    """
    from embcache.results.export_head import export_head

    _check_folder(output)
    done = export_head(run, output, fold=fold, home=home)
    about = done.about
    if json:
        write_json(done.to_json(), json)
    if json == "-":
        return
    print_table(["tensor", "shape"], [[name, "×".join(map(str, t["shape"]))] for name, t in about["tensors"].items()])
    echo(f"· {about['head']['name']} of fold {about['fold']}: {about['formula']}")
    echo(f"· written: {done.folder}/head.safetensors and head.json")


def _check_folder(output: Path) -> None:
    if output.suffix.lower() in (".csv", ".json", ".pt", ".pth", ".safetensors", ".tar", ".zip"):
        check_suffix(output, "--output")
