"""``embcache audit``: what cached features say of a dataset's images and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embcache.commands.options import (
    AllowMissingOption,
    BackboneOption,
    DataRootOption,
    DatasetOption,
    DropClassOption,
    HomeOption,
    JsonOption,
    MergeClassOption,
    NameOption,
    RecipeOption,
    check_suffix,
    class_options,
    split_list,
    takes_columns,
    write_json,
)
from embcache.commands.output import echo
from embcache.commands.table import print_table
from embcache.errors import StoreNotFoundError, UsageError, check_number

if TYPE_CHECKING:
    from embcache.config import DatasetRef
    from embcache.data.dataset import ImageDataset
    from embcache.figures.audit import Audit


@takes_columns
def audit(
    dataset: DatasetOption = None,
    backbone: BackboneOption = None,
    similarity: Annotated[
        float,
        typer.Option("--similarity", metavar="S", help="Cosine from which two images count as near-duplicates."),
    ] = 0.95,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE.csv", help="Write the IDs of training images to leave out, and why."),
    ] = None,
    most: Annotated[
        int,
        typer.Option(
            "--most", metavar="N", help="Maximum number of likely label errors to list, per side (training, test)."
        ),
    ] = 100,
    show: Annotated[int, typer.Option("--show", metavar="N", help="Number of lines to print of each list.")] = 10,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the folds.")] = 0,
    drop_class: DropClassOption = None,
    merge_class: MergeClassOption = None,
    recipe: RecipeOption = None,
    data_root: DataRootOption = None,
    home: HomeOption = None,
    allow_missing: AllowMissingOption = False,
    name: NameOption = None,
    json: JsonOption = None,
    *,
    columns: DatasetRef,
) -> None:
    """Look for near-duplicates, likely label errors and outliers, and measure the effect of leaving them out.

    Audit needs cached features only, not the images. A label is a likely error where models that did not see the image
    confidently disagree with it. Review the images before you trust either the label or the model.

    Example: embcache audit --dataset pneumonia --backbone effnet_lite0 --output exclude.csv
    """
    names, backbones = split_list(dataset), split_list(backbone)
    if len(names) != 1 or len(backbones) > 1:
        raise UsageError(
            "an audit is of one dataset, by the features of one backbone",
            found=f"datasets: {', '.join(names) or 'none'}; backbones: {', '.join(backbones) or 'none'}",
            fix="embcache audit --dataset NAME --backbone NAME",
        )
    check_number("--show", show, 0, 1_000_000)
    from embcache.data.dataset import find_dataset
    from embcache.figures.audit import audit_dataset
    from embcache.io import check_target, write_output
    from embcache.probe.inputs import cached_backbones
    from embcache.results.csvfile import csv_text
    from embcache.store.feature_store import extract_command

    if output is not None:
        check_target(check_suffix(output, "--output", ".csv"))
    ds, _ = find_dataset(
        names[0], root=data_root, home=home, allow_missing=allow_missing, dataset_name=name, columns=columns
    )
    ds = class_options(drop_class, merge_class).of(ds)
    cached = backbones or cached_backbones(ds.name, home)
    if not cached:
        raise StoreNotFoundError(f"no features are cached for {ds.name}", fix=extract_command("NAME", ds, home))
    if not backbones and len(cached) > 1:
        # Whatever was cached first is no reason: an initialised network sees little of what matters.
        cached = [name for name in cached if name.partition(":")[0] != "random"] or cached
    found = audit_dataset(ds, cached[0], similarity=similarity, most=most, home=home, recipe=recipe, seed=seed)
    if output is not None:
        write_output(output, csv_text(["id", "reason"], found.exclude))
    if json != "-":
        _print(found, ds, show)
        if output is not None:
            echo(f"wrote {output}: {len(found.exclude):,} training images to leave out")
    if json:
        write_json(asdict(found), json)


def _print(found: Audit, ds: ImageDataset, show: int) -> None:
    echo(
        f"{found.dataset}: {found.images:,} labeled images for training and {found.test_images:,} for testing, "
        f"features of {found.backbone}"
    )
    kinds = {
        kind: sum(p.kind == kind for p in found.pairs) for kind in ("across splits", "across groups", "within a group")
    }
    differing = sum(not p.same_label for p in found.pairs)
    echo(
        f"\nnear-duplicates: {len(found.pairs):,} pairs ("
        + ", ".join(f"{number:,} {kind}" for kind, number in kinds.items())
        + f"), {differing:,} of them with different labels"
    )
    rows = [[p.one, p.other, f"{p.similarity:.4f}", p.kind, "" if p.same_label else "other label"] for p in found.pairs]
    _table(["image", "image", "similarity", "", ""], rows, show)
    _print_label_errors(found, ds.class_names, show)
    echo(f"\noutliers: {len(found.outliers):,}")
    _table(["image", "split", "deviations"], [[o.id, o.split, f"{o.deviations:.1f}"] for o in found.outliers], show)
    _print_effect(found)
    for note in found.notes:
        echo(f"· {note}")


def _print_label_errors(found: Audit, classes: Sequence[str], show: int) -> None:
    judge, errors = found.judge, found.label_errors
    if judge is None:
        echo("\nlikely label errors: not looked for, since fewer than two classes can be judged")
        return
    echo(
        f"\nlikely label errors: {judge.found:,} of {judge.labels:,} training labels, "
        f"{judge.test_found:,} of {judge.test_labels:,} test labels"
    )
    if judge.too_weak:
        echo(
            "· this model is too weak to judge labels: its balanced accuracy on images that it did not see is "
            f"{judge.balanced_accuracy:.2f},\n  and it doubts {judge.share:.0%} of the labels of a class on average. "
            "Nothing is left out because of its doubts"
        )
    lines = [
        [e.id, e.split, classes[e.label], f"{e.p_label:.3f}", classes[e.proposed], f"{e.p_proposed:.3f}"]
        for e in errors
    ]
    _table(["image", "split", "label", "p", "proposed", "p"], lines, show)
    if len(errors) < judge.found + judge.test_found:
        echo("· only the most confident are listed: --most N lists more")


def _print_effect(found: Audit) -> None:
    if not found.exclude:
        echo("\nnothing to leave out")
        return
    echo(f"\nto leave out: {len(found.exclude):,} of {found.images:,} training images")
    e = found.effect
    if e is None:
        echo(f"effect: cannot be told: {found.no_effect}")
    else:
        echo(f"effect on the {e.metric} of all test images (logistic regression on F, mean ± sd over folds)")
        print_table(
            ["trained on", e.metric, ""],
            [["all training images", *_cell(e.before)], ["without those to leave out", *_cell(e.after)]],
        )
    echo("· test images are never left out: removing those that a model gets wrong only makes it look better")


def _cell(value: tuple[float, float]) -> list[str]:
    return [f"{value[0]:.4f}", f"± {value[1]:.4f}"]


def _table(headers: list[str], rows: list[list[str]], show: int) -> None:
    if rows and show:
        print_table(headers, rows[:show])
    if len(rows) > show:
        echo(f"… and {len(rows) - show:,} more (--show {len(rows)}, or --json -)")
