"""``embcache predict``, ``submit``, ``kaggle-score``, ``export-head``, ``errors`` and ``plot``: the models of a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from embcache.commands.figures import Figures, default_figure, echo_figures, figure_targets
from embcache.commands.options import Answer, Only, Skip, check_suffix, command
from embcache.commands.output import (
    ProgressBar,
    echo,
    echo_data,
    echo_notes,
    print_note,
    print_objects,
    print_table,
)
from embcache.config import DatasetRef, PredictConfig
from embcache.errors import EmbcacheError, check_choice, check_number
from embcache.io import check_target, write_output

RunOption = Annotated[str, "RUN", "Run ID, or a unique prefix. See `embcache results`."]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Run ID; it can be abbreviated to a unique prefix.")]
_SHEET = 24  # images of a contact sheet by default


@command()
def predict(
    *,
    run: RunOption,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="IMAGE|FOLDER|TABLE", help="Images, folders that are searched, or tables of paths."),
    ] = None,
    dataset: Annotated[str | None, "NAME", "Predict all images of a dataset instead."] = None,
    output: Annotated[Path | None, "-o FILE", "CSV to write. [default: to stdout]"] = None,
    home: Path | None,
    json: str | None,
    config: PredictConfig,
    ref: Annotated[
        DatasetRef,
        Skip("target", "task", "uncertain", "unmentioned", "name", "allow_missing", "drop_class", "merge_class"),
    ],
) -> Answer:
    """Predict images by a saved run: a CSV with the probability of each class, the mean over the run's folds.

    A CSV or Parquet file among the images is a table with a column path, and perhaps group (--path-column and
    --group-column name others). Probabilities are for the class shares that training saw; --prevalence corrects
    them, --calibrate fits a temperature for each fold.

    Images are decoded, transformed and embedded by the run's own recipe; where that cannot be rebuilt exactly nothing
    is predicted. Images that cannot be read are listed with the reason, on stderr and in the column error.

    Example: embcache predict --run linear-S-0123 scans/ --output predictions.csv
    """
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
    if output is None and not json:
        echo_data(found.to_csv(), "--output FILE")
    return Answer(found.to_json, lambda: None, ("results", found.run))


@command()
def submit(
    *,
    run: RunOption,
    output: Annotated[Path | None, "-o FOLDER", "Folder of the files. [default: submission-RUN]"] = None,
    ref: Annotated[DatasetRef, Only("data_root")],
    home: Path | None,
    json: str | None,
) -> Answer:
    """Write the files that Kaggle takes for aptos and patchcam: one per fold, IDs as in the sample submission.

    The run must have been made with --test official. Test images that could not be read get the most frequent class,
    or the share of class 1, of the labeled images, and are listed.

    Example: embcache submit --run linear-F-0123
    """
    from embcache.results.kaggle import make_submission

    if output is not None:
        _check_folder(output)
    made = make_submission(run, output, ref=ref, home=home)
    for image, reason in made.filled.items():
        echo(f"filled in: {image}: {reason}", err=True)
    for note in made.notes if json == "-" else ():
        print_note(note)
    columns = {
        "fold": "{0[0]}", "file": "{0[1]}", "rows": f"{made.rows:,}", "filled in": f"{len(made.filled):,}",
    }  # fmt: skip
    notes = [
        *made.notes,
        f"submit: kaggle competitions submit -c {made.competition} -f FILE -m '{made.run}'",
        f"then: embcache kaggle-score --run {made.run} --score PRIVATE/PUBLIC for each file, in the order of the folds",
    ]
    files = list(zip(made.folds, made.files, strict=True))
    return Answer(made.to_json, lambda: print_objects(files, columns, notes=notes))


@command()
def kaggle_score(
    *,
    run: RunOption,
    score: Annotated[list[str] | None, "PRIVATE/PUBLIC", "Scores of a fold's file; once per fold, in order."] = None,
    ref: Annotated[DatasetRef, Only("data_root")],
    home: Path | None,
) -> Answer:
    """Keep the leaderboard's scores of a run as a result: α · private + (1 − α) · public of each fold.

    Example: embcache kaggle-score --run linear-F-0123 --score 0.80/0.70 --score 0.81/0.71 …
    """
    from embcache.commands.scores import print_results
    from embcache.results.kaggle import read_score, save_kaggle_scores

    # equal scores of two folds are two scores: not split as lists of names are, which drops repeats
    pairs = [read_score(text) for texts in score or () for text in texts.split(",")]
    result = save_kaggle_scores(run, pairs, ref=ref, home=home)
    return Answer([result.to_json()], lambda: print_results([result], ids=True))


@command()
def export_head(
    *,
    run: RunOption,
    output: Annotated[Path, "-o FOLDER", "Folder of head.safetensors and head.json."],
    fold: Annotated[int | None, "K", "Fold of the head. [default: the best on validation]"] = None,
    home: Path | None,
) -> Answer:
    """Write the head of one fold as safetensors and JSON, for programs without embcache (docs/results.md).

    Example: embcache export-head --run linear-S-0123 --output my-head
    """
    from embcache.results.export_head import export_head

    _check_folder(output)
    done = export_head(run, output, fold=fold, home=home)
    about = done.about
    columns = {"tensor": "{0[0]}", "shape": lambda pair: "×".join(map(str, pair[1]["shape"]))}
    notes = [
        f"{about['head']['name']} of fold {about['fold']}: {about['formula']}",
        f"written: {done.folder}/head.safetensors and head.json",
    ]
    return Answer(dict(about), lambda: print_objects(about["tensors"].items(), columns, notes=notes))


def _check_folder(output: Path) -> None:
    if output.suffix.lower() in (".csv", ".json", ".pt", ".pth", ".safetensors", ".tar", ".zip"):
        check_suffix(output, "--output")


@command(table=True)
def errors(
    *,
    run: RunArgument,
    most: Annotated[
        int | None, "N", "List only the N most confident mistakes, or largest errors. [default: all; sheet: 24]"
    ] = None,
    output: Annotated[
        list[str],
        "FILE[,FILE…]",
        "The list as .csv, the contact sheet as .png, .svg or .pdf. "
        "[default: <home>/<dataset>/figures/errors-RUN.csv and .png]",
    ],
    groups: Annotated[bool, "", "Add each image's group to the list; it may name a patient."] = False,
    ref: Annotated[DatasetRef, Only("data_root")],
    home: Path | None,
) -> Answer:
    """List the test images that a run gets wrong, the most confident mistakes first, and show them.

    Predictions are those of the ensemble, the mean of the probabilities of the run's models. Of findings, each wrong
    finding of an image is a line; of a number all images are listed, the largest absolute error first. The contact
    sheet needs the images; where they are missing, only the list is written.

    Example: embcache errors linear-S-0123 --most 50
    """
    from embcache.data.dataset import find_dataset
    from embcache.figures.neighbors import draw_mistakes
    from embcache.results.compare import load_tested
    from embcache.results.mistakes import Mistake, find_mistakes, mistakes_csv
    from embcache.runs.folders import find_run_anywhere

    if most is not None:
        check_number("--most", most, 1, 1_000_000)
    targets = figure_targets(output, ".csv")
    for target in targets:
        check_target(target)
    result, folder = find_run_anywhere(run, home)
    tested = load_tested(result, folder)
    default = default_figure(result.dataset, home, f"errors-{result.id}")
    targets = targets or [default.with_name(f"{default.name}{suffix}") for suffix in (".csv", ".png")]
    mistakes, number = find_mistakes(tested), result.task.kind == "number"
    words = ("errors", "the largest") if number else ("mistakes", "the most confident")
    listed = mistakes[:most]
    files, notes = [], []
    for target in targets:
        if target.suffix.lower() == ".csv":
            files.append(write_output(target, mistakes_csv(listed, groups=groups), parents=True))
            continue
        shown = listed[: most or _SHEET]
        title = f"{result.id}: {len(shown):,} of {len(mistakes):,} {words[0]}, {words[1]} first"
        found, reason = 0, "the images are missing" if shown else "there is no mistake to show"
        try:
            dataset, _ = find_dataset(
                result.dataset, DatasetRef(data_root=ref.data_root, allow_missing=True), home=home
            )
            found = draw_mistakes(dataset, shown, title, target) if shown else 0
        except EmbcacheError as error:
            if ref.data_root is not None:  # this folder was named
                raise
            reason = error.problem
        files += [target] * bool(found)
        notes += [] if found else [f"no contact sheet: {reason}"]

    def show() -> None:
        k = listed[0].models if listed else 1
        mean = f" (mean of {k} models' {'numbers' if number else 'probabilities'})" * (k > 1)
        images = {m.id for m in mistakes}
        wrong = f"gets {len(mistakes):,} of {len(tested.ids):,} test images wrong"
        if result.task.kind == "findings":
            wrong = f"gets {len(mistakes):,} findings wrong in {len(images):,} of {len(tested.ids):,} test images"
        echo(f"{result.dataset}: {result.id} " + (f"on {len(images):,} test images" if number else wrong) + mean)
        pairs = Counter((m.label, m.predicted) for m in mistakes if isinstance(m, Mistake))
        if pairs:
            rarer = [f"{len(pairs) - 10:,} rarer pairs are not shown"] if len(pairs) > 10 else []
            columns = {f"{result.task.noun}": "{0[0][0]}", "predicted as": "{0[0][1]}", "images": "{0[1]:,}"}
            print_objects(pairs.most_common(10), columns, notes=rarer)
        if mistakes:
            echo(f"\n{words[1]} {words[0]}")
            print_objects(listed[:10], _MISS if number else _MISTAKE)
        echo_notes(notes)
        for path in files:
            echo(f"{'list' if path.suffix.lower() == '.csv' else 'figure'}: {path}")

    rows = [{name: value for name, value in asdict(m).items() if groups or name != "group"} for m in listed]
    answer = {"run": result.id, "dataset": result.dataset, "images": len(tested.ids), "mistakes": len(mistakes)}
    return Answer(answer | {"errors": rows, "files": [str(path) for path in files], "notes": notes}, show)


_MISS = {
    "id": "{0.id}",
    "value": "{0.value:.6g}",
    "predicted": "{0.predicted:.6g}",
    "error": "{0.error:+.4g}",
    "sd of the models": lambda miss: "–" if miss.models_sd is None else f"{miss.models_sd:.4g}",
}
_MISTAKE = {
    "id": "{0.id}",
    "class": "{0.label}",
    "predicted": "{0.predicted}",
    "p (class)": "{0.p_label:.4f}",
    "p (predicted)": "{0.p_predicted:.4f}",
    "models that agree": "{0.models_agree} of {0.models}",
}


@command()
def plot(
    *,
    run: RunArgument,
    kind: Annotated[
        str | None,
        "roc|pr|confusion|calibration|scatter|residual",
        "Kind of figure; the last two are of a number, the others of classes and findings. [default: roc, or scatter]",
    ] = None,
    positive: Annotated[
        str | None,
        "NAME",
        "Set this class against the rest, or draw this finding alone. "
        "[default: the run's positive class of two; of more classes, and of findings, each]",
    ] = None,
    output: Figures,
    home: Path | None,
) -> Answer:
    """Draw one run's test predictions: ROC or precision–recall curves, confusion, calibration; of a number scatter.

    Curves are the mean over the run's models with a band of ± sd, and those of the ensemble, the mean of the models'
    probabilities, which is what `embcache predict` uses. Each finding has a curve on the images of which it is known,
    and confusion is its counts above and below P = 0.5. Of a number, scatter has predicted over true values, residual
    the errors over the predictions, with their mean and the 95 % limits of agreement (mean ± 1.96 sd).

    Example: embcache plot linear-S-0123 --kind pr --output curve.pdf
    """
    from embcache.figures.run_plots import KINDS, default_kind, draw_run
    from embcache.results.compare import load_tested
    from embcache.runs.folders import find_run_anywhere

    if kind is not None:
        check_choice("--kind", kind, KINDS)
    targets = figure_targets(output)
    for target in targets:
        check_target(target)
    result, folder = find_run_anywhere(run, home)
    kind = kind or default_kind(result)
    default = default_figure(result.dataset, home, f"{kind}-{result.id}.png")
    drawn = draw_run(load_tested(result, folder), kind, targets or [default], positive=positive)

    def show() -> None:
        echo(drawn.title.replace("\n", "; "))
        print_table(drawn.headers, drawn.rows, notes=drawn.notes)
        echo_figures(drawn.files)

    answer = {"run": result.id, "dataset": result.dataset, "kind": kind, "positive": drawn.positive}
    more = {"values": list(drawn.records), "notes": list(drawn.notes), "figures": [str(p) for p in drawn.files]}
    return Answer(answer | more, show)
