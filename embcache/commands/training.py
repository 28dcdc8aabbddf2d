"""``embcache probe``, ``finetune`` and ``splits``: heads and backbones that are trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embcache.commands.options import (
    BackboneOption,
    DatasetOption,
    HomeOption,
    JsonOption,
    MetricOption,
    Skip,
    SubsetOption,
    check_suffix,
    load_named,
    next_command,
    split_list,
    takes_configs,
    write_json,
)
from embcache.commands.output import ProgressBar, echo, json_text, print_table
from embcache.commands.scores import in_metrics, print_results
from embcache.commands.shell import Command, Group
from embcache.config import DatasetRef, FinetuneConfig, ProbeConfig, ProtocolConfig
from embcache.errors import UsageError
from embcache.fields import check_subsets, parse_weights
from embcache.log import log

if TYPE_CHECKING:
    from embcache.probe.protocol import Splits


@takes_configs
def probe(
    subset: SubsetOption = None,
    dataset: DatasetOption = None,
    backbone: BackboneOption = None,
    home: HomeOption = None,
    metric: MetricOption = None,
    json: JsonOption = None,
    *,
    config: Annotated[ProbeConfig, Skip("metric")],
    ref: DatasetRef,
) -> None:
    """Train heads on cached features and test them: five folds, early stopping, means and intervals.

    Without --dataset every dataset with cached features is probed. Heads that take one backbone give one result for
    each (default: all that are cached); dvme fuses the set (default: simclr,swav,dino). Images are not needed.

    Example: embcache probe --head linear --subset S,M,F --dataset pneumonia
    """
    from embcache.probe.heads import heads

    metrics, subsets = split_list(metric), split_list(subset) or ["S"]
    datasets, backbones = split_list(dataset), split_list(backbone)
    check_subsets(subsets)
    names = split_list(config.head)
    for name in names:
        if name not in heads and ":" not in name:
            raise heads.unknown(name)
    configs = [replace(config, head=name, metric=metrics[0] if metrics else None) for name in names]

    from embcache.probe.probe import probe_cached  # imports torch, which a slip in a flag need not wait for

    found = []
    with ProgressBar("epoch") as bar:
        for each in configs:
            found += probe_cached(datasets, backbones, subsets, each, ref, home=home, progress=bar.update)
    results = in_metrics(found, metrics, home)
    if json != "-":
        print_results(results)
    if json:
        write_json([result.to_json() for result in results], json)


@takes_configs
def finetune(
    backbone: BackboneOption = None,
    dataset: DatasetOption = None,
    subset: SubsetOption = None,
    metric: MetricOption = None,
    home: HomeOption = None,
    json: JsonOption = None,
    *,
    config: Annotated[FinetuneConfig, Skip("metric")],
    ref: Annotated[DatasetRef, Skip("target")],
) -> None:
    """Train backbones and a head together on augmented images, by the protocol of probing, and test them.

    Heads that take one backbone give one result per backbone; dvme trains its backbones together (default:
    simclr,swav,dino). A checkpoint is kept after every epoch: --resume continues an interrupted run.

    Example: embcache finetune --backbone random --dataset pneumonia --subset S --val matched
    """
    from embcache.finetune.finetune import finetune as finetune_dataset
    from embcache.probe.heads import make_head
    from embcache.probe.inputs import PAPER_SET

    names, backbones, metrics = split_list(dataset), split_list(backbone), split_list(metric)
    heads = split_list(config.head)
    fuses = {name: make_head(name).fuses for name in heads}
    if not names:
        raise UsageError(
            "no dataset was named", code="no-dataset",
            fix="embcache finetune --dataset NAME …   (embcache datasets lists them)",
        )  # fmt: skip
    if not backbones and not all(fuses.values()):
        raise UsageError(
            "no backbone was named", code="no-backbone",
            fix="embcache finetune --backbone NAME …   (embcache backbones lists them)",
        )  # fmt: skip
    if len(names) > 1 and (ref.data_root or ref.name or config.splits):
        raise UsageError(
            "--data-root, --name and --splits are for one dataset", code="one-dataset", found=", ".join(names),
            fix="--dataset NAME",
        )  # fmt: skip
    config = replace(config, metric=metrics[0] if metrics else None)
    weights = parse_weights(config.weights, backbones or PAPER_SET)
    loaded = [load_named(name, ref, home) for name in names]
    results = []
    with ProgressBar("img") as bar:
        try:
            for found, source in loaded:
                for name in heads:
                    for used in [backbones or PAPER_SET] if fuses[name] else [[each] for each in backbones]:
                        own = tuple(f"{each}={file}" for each, file in weights.items() if each in used)
                        options = replace(config, head=name, weights=own)
                        for size in split_list(subset) or ["S"]:
                            results.append(
                                finetune_dataset(
                                    found, used, size, options, home=home, source=source, progress=bar.update
                                )
                            )
        except (KeyboardInterrupt, SystemExit):
            echo("\nstopped: the last whole epoch is kept; the same command with --resume continues", err=True)
            raise
    results = in_metrics(results, metrics, home)
    if json:
        write_json([result.to_json() for result in results], json)
    if json != "-":
        print_results(results)
        next_command("results", results[0].id, home=home)


splits = typer.Typer(
    help="Export or import the images of every fold and subset.",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


OneDatasetOption = Annotated[str, typer.Option("--dataset", metavar="NAME", help="Name; see `embcache datasets`.")]


@splits.command("export", cls=Command)
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
    from embcache.probe.protocol import write_splits

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


@splits.command("import", cls=Command)
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
