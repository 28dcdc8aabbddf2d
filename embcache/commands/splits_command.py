"""``embcache splits``: the exact images of every fold and subset, to share or to take from someone else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embcache.commands.options import (
    AllowMissingOption,
    BackboneOption,
    DataRootOption,
    DropClassOption,
    FoldsOption,
    HomeOption,
    MergeClassOption,
    NameOption,
    OverlapOption,
    SeedOption,
    TestOption,
    ValOption,
    advise_by,
    check_suffix,
    class_options,
    command,
    split_list,
    takes_columns,
)
from embcache.commands.output import echo, json_text
from embcache.commands.table import print_note, print_table
from embcache.errors import UsageError

if TYPE_CHECKING:
    from embcache.data.chosen import Columns
    from embcache.probe.splits import Splits

app = typer.Typer(help="The exact images of every fold and subset.", no_args_is_help=True, callback=advise_by)

OneDatasetOption = Annotated[str, typer.Option("--dataset", metavar="NAME", help="See `embcache datasets`.")]


@app.command("export")
@takes_columns
def export(
    dataset: OneDatasetOption,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE|-", help="Where to write; - for stdout.")
    ] = "-",
    subset: Annotated[
        list[str] | None,
        typer.Option("--subset", metavar="S,M,F,N", help="As for `embcache probe`. [default: S,M,F]"),
    ] = None,
    backbone: BackboneOption = None,
    data_root: DataRootOption = None,
    home: HomeOption = None,
    folds: FoldsOption = 5,
    seed: SeedOption = 0,
    val: ValOption = "full",
    test: TestOption = "local",
    exclude_test_overlap: OverlapOption = False,
    drop_class: DropClassOption = None,
    merge_class: MergeClassOption = None,
    allow_missing: AllowMissingOption = False,
    name: NameOption = None,
    *,
    columns: Columns,
) -> None:
    """Write the splits that `embcache probe` draws, as JSON: ids of the test set and of every fold and subset.

    Example: embcache splits export --dataset pneumonia --subset S,M,F --output pneumonia-splits.json
    """
    from embcache.data.dataset import find_dataset
    from embcache.probe.inputs import plan_cached
    from embcache.probe.splits import write_splits

    if output != "-":
        check_suffix(Path(output), "--output", ".json")
    names = split_list(backbone)
    if len(names) > 1:
        raise UsageError("--backbone names the one store that tells which images are identical", found=", ".join(names))
    ds, source = find_dataset(
        dataset, root=data_root, home=home, allow_missing=allow_missing, dataset_name=name, columns=columns
    )
    ds = class_options(drop_class, merge_class).of(ds)
    splits, store = plan_cached(
        ds,
        home=home,
        backbone=names[0] if names else None,
        subsets=split_list(subset) or ["S", "M", "F"],
        folds=folds,
        seed=seed,
        val=val,
        test=test,
        exclude_test_overlap=exclude_test_overlap,
    )
    knows = f"identical and unreadable images as {store.path.name} knows them" if store else "no features cached yet"
    print_note(f"labels and groups from the {source} dataset; {knows}")
    if output == "-":
        echo(json_text(splits.to_json(), indent=1, shown=True), nl=False)
        return
    write_splits(splits, Path(output))
    _print(splits)
    echo(f"written to {output}")
    echo("next: " + command("probe", "--dataset", ds.name, "--splits", output, home=home))


@app.command("import")
@takes_columns
def import_(
    file: Annotated[Path, typer.Argument(help="A file written by `embcache splits export`.")],
    dataset: OneDatasetOption,
    data_root: DataRootOption = None,
    home: HomeOption = None,
    drop_class: DropClassOption = None,
    merge_class: MergeClassOption = None,
    allow_missing: AllowMissingOption = False,
    name: NameOption = None,
    *,
    columns: Columns,
) -> None:
    """Check someone else's splits against a dataset and keep them for `embcache probe --splits NAME`.

    Refused: ids that the dataset has not, a group on both sides of a fold, images both trained and tested on.

    Example: embcache splits import pneumonia-splits.json --dataset pneumonia
    """
    from embcache.data.dataset import find_dataset
    from embcache.probe.inputs import import_splits

    ds, _ = find_dataset(
        dataset, root=data_root, home=home, allow_missing=allow_missing, dataset_name=name, columns=columns
    )
    ds = class_options(drop_class, merge_class).of(ds)
    imported = import_splits(file, ds, home)
    _print(imported.splits)
    echo(f"kept as {imported.path}")
    words = ["--dataset", ds.name, "--splits", imported.name, "--subset", str(imported.splits.subsets[0])]
    echo("next: " + command("probe", *words, home=home))


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
