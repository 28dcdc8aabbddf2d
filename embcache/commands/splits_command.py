"""``embcache splits``: the exact images of every fold and subset, to share or to take from others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embcache.commands.options import (
    BackboneOption,
    HomeOption,
    Skip,
    check_suffix,
    load_named,
    next_command,
    split_list,
    takes_configs,
)
from embcache.commands.output import echo, json_text, print_table
from embcache.commands.shell import Command, Group
from embcache.config import DatasetRef, ProtocolConfig
from embcache.errors import UsageError
from embcache.log import log

if TYPE_CHECKING:
    from embcache.probe.splits import Splits

app = typer.Typer(
    help="Export or import the images of every fold and subset.",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

OneDatasetOption = Annotated[str, typer.Option("--dataset", metavar="NAME", help="Name; see `embcache datasets`.")]


@app.command("export", cls=Command)
@takes_configs
def export(
    dataset: OneDatasetOption,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE|-", help="File to write, or -.")] = "-",
    subset: Annotated[
        list[str] | None,
        typer.Option("--subset", metavar="S,M,F,N", help="Subsets, as in `embcache probe`. [default: S,M,F]"),
    ] = None,
    backbone: BackboneOption = None,
    home: HomeOption = None,
    *,
    config: Annotated[ProtocolConfig, Skip("splits", "metric", "positive")],
    ref: Annotated[DatasetRef, Skip("target")],
) -> None:
    """Write the splits that `embcache probe` draws, as JSON: IDs of the test set and of every fold and subset.

    Example: embcache splits export --dataset pneumonia --subset S,M,F --output pneumonia-splits.json
    """
    from embcache.probe.inputs import plan_cached
    from embcache.probe.splits import write_splits

    if output != "-":
        check_suffix(Path(output), "--output", ".json")
    names = split_list(backbone)
    if len(names) > 1:
        raise UsageError(
            "--backbone names the one store that tells which images are identical", code="one-backbone",
            found=", ".join(names), fix=f"--backbone {names[0]}",
        )  # fmt: skip
    found, source = load_named(dataset, ref, home)
    splits, store = plan_cached(
        found,
        home=home,
        backbone=names[0] if names else None,
        subsets=split_list(subset) or ["S", "M", "F"],
        folds=config.folds,
        seed=config.seed,
        val=config.val,
        test=config.test,
        exclude_test_overlap=config.exclude_test_overlap,
    )
    knows = f"identical and unreadable images as in {store.path.name}" if store else "no features cached yet"
    log.info(f"labels and groups from the {source} dataset; {knows}")
    if output == "-":
        echo(json_text(splits.to_json(), indent=1, shown=True), nl=False)
        return
    write_splits(splits, Path(output))
    _print(splits)
    echo(f"written to {output}")
    next_command("probe", "--dataset", found.name, "--splits", output, home=home)


@app.command("import", cls=Command)
@takes_configs
def import_(
    file: Annotated[Path, typer.Argument(help="File written by `embcache splits export`.")],
    dataset: OneDatasetOption,
    home: HomeOption = None,
    *,
    ref: Annotated[DatasetRef, Skip("target")],
) -> None:
    """Check the splits of others against a dataset and keep them for `embcache probe --splits NAME`.

    Refused are IDs that the dataset does not have, a group on both sides of a fold, and images that are both trained
    and tested on.

    Example: embcache splits import pneumonia-splits.json --dataset pneumonia
    """
    from embcache.probe.inputs import import_splits

    found, _ = load_named(dataset, ref, home)
    imported = import_splits(file, found, home)
    _print(imported.splits)
    echo(f"kept as {imported.path}")
    words = ["--dataset", found.name, "--splits", imported.name, "--subset", str(imported.splits.subsets[0])]
    next_command("probe", *words, home=home)


def _print(splits: Splits) -> None:
    rows = []
    for subset in splits.subsets:
        for fold in range(splits.n_folds):
            train, val = splits.train[fold, subset], splits.val[fold, subset]
            counts = [int((splits.labels[train] == c).sum()) for c in range(len(splits.class_names))]
            rows.append([subset, fold, len(train), " ".join(map(str, counts)), len(val)])
    print_table(
        ["subset", "fold", "train", "by class", "val"],
        rows,
        notes=[
            f"classes: {', '.join(splits.class_names)}",
            f"test: {len(splits.test):,} images ({splits.test_set})",
            *splits.notes,
        ],
    )
