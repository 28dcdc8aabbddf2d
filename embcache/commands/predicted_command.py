"""``embcache errors`` and ``plot``: one run's predictions of its test images, as lists and figures."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Annotated

import typer

from embcache.commands.figures_command import OutputOption, figure_targets
from embcache.commands.options import DataRootOption, HomeOption, JsonOption, write_json
from embcache.commands.output import echo, print_table
from embcache.config import DatasetRef
from embcache.errors import EmbcacheError, check_choice

_SHOWN = 24  # images of a contact sheet by default

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Run ID; it can be abbreviated to a unique prefix.")]


def errors(
    run: RunArgument,
    most: Annotated[
        int | None,
        typer.Option(
            "--most", metavar="N", min=1, help="List only the N most confident mistakes. [default: all; sheet: 24]"
        ),
    ] = None,
    output: Annotated[
        list[str] | None,
        typer.Option(
            "--output",
            metavar="FILE[,FILE…]",
            help="The list as .csv, the contact sheet as .png, .svg or .pdf. "
            "[default: <home>/<dataset>/figures/errors-RUN.csv and .png]",
        ),
    ] = None,
    groups: Annotated[
        bool, typer.Option("--groups", help="Add each image's group to the list; it may name a patient.")
    ] = False,
    data_root: DataRootOption = None,
    home: HomeOption = None,
    json: JsonOption = None,
) -> None:
    """List the test images that a run gets wrong, the most confident mistakes first, and show them.

    Predictions are those of the ensemble, the mean of the probabilities of the run's models. The contact sheet needs
    the images; where they are missing, only the list is written.

    Example: embcache errors linear-S-0123 --most 50
    """
    from embcache.data.dataset import find_dataset
    from embcache.figures.neighbors import draw_mistakes
    from embcache.io import check_target, write_output
    from embcache.paths import home_dir, slug
    from embcache.results.compare import load_tested
    from embcache.results.describe import find_mistakes, mistakes_csv
    from embcache.runs.folders import find_run_anywhere

    targets = figure_targets(output, ".csv")
    for target in targets:
        check_target(target)
    result, folder = find_run_anywhere(run, home)
    tested = load_tested(result, folder)
    if not targets:
        default = home_dir(home) / slug(result.dataset) / "figures" / f"errors-{result.id}"
        targets = [default.with_name(f"{default.name}{suffix}") for suffix in (".csv", ".png")]
    mistakes = find_mistakes(tested)
    listed = mistakes[:most]
    files, notes = [], []
    for target in targets:
        if target.suffix.lower() == ".csv":
            files.append(write_output(target, mistakes_csv(listed, groups=groups), parents=True))
            continue
        shown = listed[: most or _SHOWN]
        title = f"{result.id}: {len(shown):,} of {len(mistakes):,} mistakes, the most confident first"
        found, reason = 0, "the images are missing" if shown else "there is no mistake to show"
        try:
            dataset, _ = find_dataset(result.dataset, DatasetRef(data_root=data_root, allow_missing=True), home=home)
            found = draw_mistakes(dataset, shown, title, target) if shown else 0
        except EmbcacheError as error:
            if data_root is not None:  # this folder was named
                raise
            reason = error.problem
        if found:
            files.append(target)
        else:
            notes.append(f"no contact sheet: {reason}")
    if json:
        rows = [{name: value for name, value in asdict(m).items() if groups or name != "group"} for m in listed]
        answer = {"run": result.id, "dataset": result.dataset, "images": len(tested.ids), "mistakes": len(mistakes)}
        write_json(answer | {"errors": rows, "files": [str(path) for path in files], "notes": notes}, json)
    if json == "-":
        return
    models = "" if not listed or listed[0].models == 1 else f" (mean of {listed[0].models} models' probabilities)"
    echo(f"{result.dataset}: {result.id} gets {len(mistakes):,} of {len(tested.ids):,} test images wrong{models}")
    if mistakes:
        pairs = Counter((m.label, m.predicted) for m in mistakes)
        print_table(
            ["class", "predicted as", "images"],
            [[label, predicted, f"{count:,}"] for (label, predicted), count in pairs.most_common(10)],
            notes=[f"{len(pairs) - 10:,} rarer pairs are not shown"] if len(pairs) > 10 else [],
        )
        echo("\nmost confident mistakes")
        print_table(
            ["id", "class", "predicted", "p (class)", "p (predicted)", "models that agree"],
            [
                [
                    m.id,
                    m.label,
                    m.predicted,
                    f"{m.p_label:.4f}",
                    f"{m.p_predicted:.4f}",
                    f"{m.models_agree} of {m.models}",
                ]
                for m in listed[:10]
            ],
        )
    for note in notes:
        echo(f"· {note}")
    for path in files:
        echo(f"{'list' if path.suffix.lower() == '.csv' else 'figure'}: {path}")


def plot(
    run: RunArgument,
    kind: Annotated[
        str,
        typer.Option("--kind", metavar="roc|pr|confusion|calibration", help="Which figure."),
    ] = "roc",
    positive: Annotated[
        str | None,
        typer.Option(
            "--positive",
            metavar="CLASS",
            help="Set this class against the rest. [default: the run's positive class of two; of more classes each]",
        ),
    ] = None,
    output: OutputOption = None,
    home: HomeOption = None,
    json: JsonOption = None,
) -> None:
    """Draw one run's test predictions: ROC or precision–recall curves, the confusion matrix, or calibration.

    Curves are the mean over the run's models with a band of ± sd, and those of the ensemble, the mean of the models'
    probabilities, which is what `embcache predict` uses.

    Example: embcache plot linear-S-0123 --kind pr --output curve.pdf
    """
    from embcache.figures.run_plots import KINDS, draw_run
    from embcache.io import check_target
    from embcache.paths import home_dir, slug
    from embcache.results.compare import load_tested
    from embcache.runs.folders import find_run_anywhere

    check_choice("--kind", kind, KINDS)
    targets = figure_targets(output)
    for target in targets:
        check_target(target)
    result, folder = find_run_anywhere(run, home)
    tested = load_tested(result, folder)
    default = home_dir(home) / slug(result.dataset) / "figures" / f"{kind}-{result.id}.png"
    drawn = draw_run(tested, kind, targets or [default], positive=positive)
    if json != "-":
        echo(drawn.title.replace("\n", "; "))
        print_table(drawn.headers, drawn.rows, notes=drawn.notes)
        for path in drawn.files:
            echo(f"figure: {path}")
    if json:
        answer = {"run": result.id, "dataset": result.dataset, "kind": kind, "positive": drawn.positive}
        more = {"values": list(drawn.records), "notes": list(drawn.notes), "figures": [str(p) for p in drawn.files]}
        write_json(answer | more, json)
