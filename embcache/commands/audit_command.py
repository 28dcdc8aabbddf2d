"""``embcache audit``: what cached features show about a dataset's images and labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embcache.commands.options import (
    BackboneOption,
    DatasetOption,
    HomeOption,
    JsonOption,
    Skip,
    check_suffix,
    split_list,
    takes_configs,
    write_json,
)
from embcache.commands.output import echo, print_table, spread
from embcache.config import AuditConfig, DatasetRef
from embcache.errors import UsageError, check_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from embcache.figures.audit import Audit


@takes_configs
def audit(
    dataset: DatasetOption = None,
    backbone: BackboneOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE.csv", help="Write the IDs of training images to leave out, and why."),
    ] = None,
    show: Annotated[int, typer.Option("--show", metavar="N", help="Number of lines to print of each list.")] = 10,
    home: HomeOption = None,
    json: JsonOption = None,
    *,
    config: AuditConfig,
    ref: Annotated[DatasetRef, Skip("target")],
) -> None:
    """Look for near-duplicates, likely label errors and outliers, and measure the effect of leaving them out.

    Audit needs cached features only, not the images. A label is a likely error where models that did not see the image
    confidently disagree with it. Review the images before you trust either the label or the model.

    Example: embcache audit --dataset pneumonia --backbone effnet_lite0 --output exclude.csv
    """
    names, backbones = split_list(dataset), split_list(backbone)
    if len(names) != 1 or len(backbones) > 1:
        raise UsageError(
            "an audit is of one dataset, by the features of one backbone", code="one-dataset",
            found=f"datasets: {', '.join(names) or 'none'}; backbones: {', '.join(backbones) or 'none'}",
            fix="embcache audit --dataset NAME --backbone NAME",
        )  # fmt: skip
    check_number("--show", show, 0, 1_000_000)
    from embcache.figures.audit import audit_dataset
    from embcache.figures.shown import backbones_or_cached, open_dataset
    from embcache.io import check_target, write_output
    from embcache.results.render import csv_text

    if output is not None:
        check_target(check_suffix(output, "--output", ".csv"))
    ds = open_dataset(names[0], ref, home)
    cached = backbones_or_cached(ds, backbones, home)
    # A network without training sees little of what matters: it is not chosen only because it was cached first.
    chosen = backbones or [name for name in cached if name.partition(":")[0] != "random"] or cached
    found = audit_dataset(ds, chosen[0], config, home=home)
    if output is not None:
        write_output(output, csv_text(["id", "reason"], found.exclude))
    if json != "-":
        _print(found, ds.class_names, show)
        if output is not None:
            echo(f"wrote {output}: {len(found.exclude):,} training images to leave out")
    if json:
        write_json(found.to_json(), json)


def _print(found: Audit, class_names: Sequence[str], show: int) -> None:
    echo(
        f"{found.dataset}: {found.images:,} labeled images for training and {found.test_images:,} for testing, "
        f"features of {found.backbone}"
    )
    kinds = ("across splits", "across groups", "within a group")
    counts = ", ".join(f"{sum(p.kind == kind for p in found.pairs):,} {kind}" for kind in kinds)
    differing = sum(not p.same_label for p in found.pairs)
    echo(f"\nnear-duplicates: {len(found.pairs):,} pairs ({counts}), {differing:,} of them with different labels")
    rows = [[p.one, p.other, f"{p.similarity:.4f}", p.kind, "" if p.same_label else "other label"] for p in found.pairs]
    _table(["image", "image", "similarity", "", ""], rows, show)
    _print_label_errors(found, class_names, show)
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
        echo(f"effect: cannot be measured: {found.no_effect}")
    else:
        echo(f"effect on the {e.metric} of all test images (logistic regression on F, mean ± sd over folds)")
        rows = [["all training images", spread(*e.before)], ["without those to leave out", spread(*e.after)]]
        print_table(["trained on", e.metric], rows)
    echo("· test images are never left out: removing those that a model gets wrong only makes it look better")


def _table(headers: list[str], rows: list[list[str]], show: int) -> None:
    if rows and show:
        print_table(headers, rows[:show])
    if len(rows) > show:
        echo(f"… and {len(rows) - show:,} more (--show {len(rows)}, or --json -)")
