"""``embcache finetune``: backbones and head trained together, on the images themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from embcache.commands.extract_command import parse_weights
from embcache.commands.options import (
    AllowMissingOption,
    BackboneOption,
    DataRootOption,
    DatasetOption,
    DropClassOption,
    FoldsOption,
    HomeOption,
    JsonOption,
    MergeClassOption,
    MetricOption,
    NameOption,
    OverlapOption,
    PositiveOption,
    SeedOption,
    SubsetOption,
    TestOption,
    ValOption,
    class_options,
    split_list,
    takes_columns,
    write_json,
)
from embcache.commands.output import echo
from embcache.commands.probe_command import in_metrics, print_results
from embcache.commands.progress import ProgressBar
from embcache.commands.table import print_note

if TYPE_CHECKING:
    from embcache.config import DatasetRef


@takes_columns
def finetune(
    backbone: BackboneOption = None,
    dataset: DatasetOption = None,
    head: Annotated[
        str, typer.Option("--head", metavar="NAME", help="linear, mlp, or one that fuses backbones: dvme, …")
    ] = "linear",
    subset: SubsetOption = None,
    data_root: DataRootOption = None,
    home: HomeOption = None,
    folds: FoldsOption = 5,
    seed: SeedOption = 0,
    val: ValOption = "full",
    test: TestOption = "local",
    exclude_test_overlap: OverlapOption = False,
    splits: Annotated[
        str | None,
        typer.Option("--splits", metavar="FILE|NAME", help="Use these splits instead of drawing: `embcache splits`."),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option("--weights", metavar="[NAME=]FILE", help="Checkpoint; NAME= may be left out for one backbone."),
    ] = None,
    transform: Annotated[
        str | None,
        typer.Option(
            "--transform",
            metavar="paper|imagenet|model",
            help="As for extract; the crop is random in training. [default: paper; model for timm: backbones]",
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda:0, …")] = "auto",
    precision: Annotated[
        str, typer.Option("--precision", metavar="KIND", help="fp32, bf16; with CUDA also tf32 and fp16.")
    ] = "fp32",
    lr: Annotated[
        float | None, typer.Option("--lr", metavar="RATE", help="Learning rate. [default: 1e-3; with dino 1e-4]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", help="Images of a step. [default: 64; with dino 16]")
    ] = None,
    accumulate: Annotated[
        int, typer.Option("--accumulate", metavar="N", help="Parts in which a batch goes through, to save memory.")
    ] = 1,
    max_epochs: Annotated[int, typer.Option("--max-epochs", metavar="N", help="At most so many epochs.")] = 50,
    metric: MetricOption = None,
    positive: PositiveOption = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", metavar="N", min=0, help="Threads that prepare images. [default: one a core, 8 at most]"
        ),
    ] = None,
    pixel_cache: Annotated[
        bool,
        typer.Option("--pixel-cache/--no-pixel-cache", help="Keep decoded, resized images for later epochs and runs."),
    ] = True,
    models: Annotated[
        bool, typer.Option("--models/--no-models", help="Keep each fold's model, for `embcache predict`.")
    ] = True,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run of the same request stopped.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Train even where a saved result answers the same, from the beginning.")
    ] = False,
    drop_class: DropClassOption = None,
    merge_class: MergeClassOption = None,
    allow_missing: AllowMissingOption = False,
    name: NameOption = None,
    json: JsonOption = None,
    *,
    columns: DatasetRef,
) -> None:
    """Train backbones and head together on augmented images, by the protocol of probing, and test them.

    Heads that take one backbone give one result for each; dvme trains its backbones together (default:
    simclr,swav,dino). A checkpoint is kept after every epoch: an interrupted run goes on with --resume.

    Example: embcache finetune --backbone random --dataset pneumonia --subset S --val matched
    """
    from embcache.finetune.named import finetune_named

    names, metrics = split_list(backbone), split_list(metric)
    with ProgressBar("img") as bar:
        try:
            results = finetune_named(
                split_list(dataset),
                names,
                head=head,
                subsets=split_list(subset) or ["S"],
                data_root=data_root,
                home=home,
                folds=folds,
                seed=seed,
                val=val,
                test=test,
                exclude_test_overlap=exclude_test_overlap,
                splits=splits,
                classes=class_options(drop_class, merge_class),
                weights=parse_weights(weights, names),
                transform=transform,
                device=device,
                precision=precision,
                lr=lr,
                batch_size=batch_size,
                accumulate=accumulate,
                max_epochs=max_epochs,
                metric=metrics[0] if metrics else None,
                positive=positive,
                workers=workers,
                pixel_cache=pixel_cache,
                keep_models=models,
                resume=resume,
                reuse=not again,
                allow_missing=allow_missing,
                dataset_name=name,
                columns=columns,
                say=print_note,
                progress=bar.update,
            )
        except (KeyboardInterrupt, SystemExit):
            echo("\nstopped: the last whole epoch is kept; the same command with --resume goes on", err=True)
            raise
    results = in_metrics(results, metrics, home)
    if json != "-":
        print_results(results)
    if json:
        write_json([result.to_json() for result in results], json)
