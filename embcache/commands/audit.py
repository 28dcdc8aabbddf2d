"""``embcache audit``: what cached features say of a dataset's images and labels."""

from __future__ import annotations

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
    class_options,
    split_list,
    write_json,
)
from embcache.commands.table import print_table
from embcache.errors import StoreNotFoundError, UsageError, printable

if TYPE_CHECKING:
    from embcache.analysis.audit import Audit
    from embcache.data.dataset import ImageDataset


def audit(
    dataset: DatasetOption = None,
    backbone: BackboneOption = None,
    similarity: Annotated[
        float,
        typer.Option("--similarity", metavar="S", help="Cosine from which two images count as near-duplicates."),
    ] = 0.95,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE.csv", help="Write the ids to leave out, with the reasons.")
    ] = None,
    show: Annotated[int, typer.Option("--show", metavar="N", help="Lines of each list to print.")] = 10,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the folds.")] = 0,
    drop_class: DropClassOption = None,
    merge_class: MergeClassOption = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", metavar="PREFIX", help="First digits of the fingerprint, where several are cached."),
    ] = None,
    data_root: DataRootOption = None,
    home: HomeOption = None,
    allow_missing: AllowMissingOption = False,
    name: NameOption = None,
    json: JsonOption = None,
) -> None:
    """Look for near-duplicates, labels to doubt and outliers, and say what leaving them out does to the metric.

    From cached features alone, without the images. Doubted labels are those that models which did not see the image
    confidently disagree with: look at them before you believe either side.

    Example: embcache audit --dataset pneumonia --backbone effnet_lite0 --output exclude.csv
    """
    names, backbones = split_list(dataset), split_list(backbone)
    if len(names) != 1 or len(backbones) > 1:
        raise UsageError(
            "an audit is of one dataset, by the features of one backbone",
            found=f"datasets: {', '.join(names) or 'none'}; backbones: {', '.join(backbones) or 'none'}",
            fix="embcache audit --dataset NAME --backbone NAME",
        )
    if show < 0:
        raise UsageError("a number of lines", expected="0 or more", found=str(show), fix="--show 10")
    from embcache.analysis.audit import audit_dataset
    from embcache.data.dataset import find_dataset
    from embcache.probe.cached import cached_backbones
    from embcache.report.csvfile import check_target, csv_text, write_text
    from embcache.store.feature_store import extract_command

    if output is not None:
        check_target(output)
    ds, _ = find_dataset(names[0], root=data_root, home=home, allow_missing=allow_missing, dataset_name=name)
    ds = class_options(drop_class, merge_class).of(ds)
    cached = backbones or cached_backbones(ds.name, home)
    if not cached:
        raise StoreNotFoundError(f"no features are cached for {ds.name}", fix=extract_command("NAME", ds, home))
    if not backbones and len(cached) > 1:
        # Whatever was cached first is no reason: an initialised network sees little of what matters.
        cached = [name for name in cached if name.partition(":")[0] != "random"] or cached
    found = audit_dataset(ds, cached[0], similarity=similarity, home=home, recipe=recipe, seed=seed)
    if output is not None:
        write_text(output, csv_text(["id", "reason"], found.exclude))
    if json != "-":
        _print(found, ds, show)
        if output is not None:
            typer.echo(f"to leave out: {output}, {len(found.exclude):,} ids")
    if json:
        write_json(asdict(found), json)


def _print(found: Audit, ds: ImageDataset, show: int) -> None:
    classes = ds.class_names
    typer.echo(f"{found.dataset}: {found.images:,} labelled images, features of {found.backbone}")
    kinds = {
        kind: sum(p.kind == kind for p in found.pairs) for kind in ("across splits", "across groups", "within a group")
    }
    differing = sum(not p.same_label for p in found.pairs)
    typer.echo(
        f"\nnear-duplicates: {len(found.pairs):,} pairs ("
        + ", ".join(f"{number:,} {kind}" for kind, number in kinds.items())
        + f"), {differing:,} of them with different labels"
    )
    rows = [[p.one, p.other, f"{p.similarity:.4f}", p.kind, "" if p.same_label else "other label"] for p in found.pairs]
    _table(["image", "image", "similarity", "", ""], rows, show)
    typer.echo(f"\nlabels to doubt: {len(found.doubts):,}")
    doubts = [
        [d.id, d.split, classes[d.label], f"{d.p_label:.3f}", classes[d.proposed], f"{d.p_proposed:.3f}"]
        for d in found.doubts
    ]
    _table(["image", "split", "label", "p", "proposed", "p"], doubts, show)
    typer.echo(f"\noutliers: {len(found.outliers):,}")
    _table(["image", "split", "deviations"], [[o.id, o.split, f"{o.deviations:.1f}"] for o in found.outliers], show)
    if found.effect is None:
        typer.echo("\nnothing to leave out")
        return
    e = found.effect
    typer.echo(
        f"\nleft out: {e.excluded_train:,} training and {e.excluded_test:,} test images; logistic regression on F, "
        f"test {e.metric} (mean ± sd over folds)"
    )
    lines = [
        ["all images", "all", *_cell(e.before)],
        ["without them", "all", *_cell(e.after)],
        ["without them", "without them", *_cell(e.after_clean)],
    ]
    print_table(["trained on", "tested on", e.metric, ""], lines)
    typer.echo("· images were chosen by models of the same features: the last line flatters, and a test set is not")
    typer.echo("  to be cleaned by what is tested on it; look at the images, mend the labels, and say so")
    for note in found.notes:
        typer.echo(f"· {printable(note)}")


def _cell(value: tuple[float, float]) -> list[str]:
    return [f"{value[0]:.4f}", f"± {value[1]:.4f}"]


def _table(headers: list[str], rows: list[list[str]], show: int) -> None:
    if rows and show:
        print_table(headers, rows[:show])
    if len(rows) > show:
        typer.echo(f"… and {len(rows) - show:,} more (--show {len(rows)}, or --json -)")
