"""``embcache tsne``, ``attention``, ``neighbors`` and ``audit``: pictures of what is cached."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from embcache.commands.output import echo, print_note, print_table, spread
from embcache.config import AttentionConfig, AuditConfig, DatasetRef, MapConfig, NeighborsConfig
from embcache.errors import UsageError, check_number
from embcache.io import check_target, write_output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from embcache.data.dataset import ImageDataset
    from embcache.figures.attention import RunAttention
    from embcache.figures.audit import Audit
    from embcache.figures.maps import Maps


OutputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--output",
        metavar="FILE[,FILE…]",
        help="PNG, SVG or PDF by its suffix; repeatable. [default: <home>/<dataset>/figures/…png]",
    ),
]


SUFFIXES = (".png", ".svg", ".pdf")


@takes_configs
def tsne(
    dataset: DatasetOption = None,
    backbone: BackboneOption = None,
    output: OutputOption = None,
    coordinates: Annotated[
        Path | None,
        typer.Option("--coordinates", metavar="FILE", help="Write the points: CSV, or Parquet by its suffix."),
    ] = None,
    home: HomeOption = None,
    json: JsonOption = None,
    *,
    config: MapConfig,
    ref: Annotated[DatasetRef, Skip("target")],
) -> None:
    """Map cached embeddings side by side: each backbone, and what a run of dvme fuses.

    From the cache alone. Under each map: silhouette of the classes and balanced accuracy of the ten nearest
    neighbors, both in the embedding itself and among images of other groups (patients), and how far the map's
    neighbors are the embedding's (trustworthiness).

    Example: embcache tsne --dataset pneumonia --backbone random,effnet_lite0 --run dvme-S --output maps.pdf
    """
    targets = figure_targets(output)
    if coordinates is not None and coordinates.suffix.lower() not in (".csv", ".parquet"):
        raise UsageError("points are written as CSV or Parquet", code="other-suffix", found=str(coordinates),
                         fix="--coordinates points.csv")  # fmt: skip
    ds = _one_dataset(dataset, ref, home)
    from embcache.figures.maps import draw_maps

    maps = draw_maps(ds, split_list(backbone), config, home=home, targets=targets)
    if coordinates is not None:
        _write_points(maps, coordinates)
    if json != "-":
        _print_maps(maps)
        if coordinates is not None:
            echo(f"points: {coordinates}")
    if json:
        write_json(maps.to_json(), json)


@takes_configs
def attention(
    run: Annotated[
        str | None, typer.Option("--run", metavar="ID", help="Run of dvme or dvme-token: ID or a unique prefix.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option("--image", metavar="FILE", help="Instead of a run: one image file.")
    ] = None,
    backbone: BackboneOption = None,
    output: OutputOption = None,
    home: HomeOption = None,
    json: JsonOption = None,
    *,
    config: AttentionConfig,
    ref: Annotated[
        DatasetRef,
        Skip(
            "target",
            "name",
            "drop_class",
            "merge_class",
            "path_column",
            "label_column",
            "group_column",
            "split_column",
            "id_column",
        ),
    ],
) -> None:
    """Show what is attended to: by a DVME run, or by a vision transformer in one image.

    With --run: the mean map over the test images with the backbones' borders (Figure F1), attention between backbones
    with its spread over folds and by class, its entropy, and the components that receive most; from the cache alone.
    With --image: the class token of the last block, per head, over the image; dino or a timm: vision transformer.

    Example: embcache attention --run dvme-F-1a2b   ·   embcache attention --image xray.png --backbone dino
    """
    if (run is None) == (image is None):
        raise UsageError("attention of a run, or in an image", code="nothing-named",
                         expected="--run ID or --image FILE", fix="embcache results")  # fmt: skip
    if image is None and (config.weights is not None or config.transform is not None or backbone):
        raise UsageError("--backbone, --weights and --transform go with --image", code="unused-option",
                         fix="leave them out")  # fmt: skip
    targets = figure_targets(output)
    found: Any = None
    if image is not None:
        answer, paths = _image_attention(image, split_list(backbone), config, home, targets)
    else:
        from embcache.data.classes import as_in_run
        from embcache.data.dataset import find_dataset
        from embcache.figures.attention import draw_attention, run_attention
        from embcache.paths import home_dir, slug
        from embcache.runs.folders import find_run_anywhere

        result, folder = find_run_anywhere(str(run), home)
        ds = as_in_run(find_dataset(result.dataset, ref, home=home)[0], result.request)
        found = run_attention(ds, result, folder, home=home, recipe=config.recipe)
        default = home_dir(home) / slug(ds.name) / "figures" / f"attention-{result.id}.png"
        paths, answer = [draw_attention(found, ds.synthetic, t) for t in targets or [default]], found.to_json()
    if json != "-":
        if found is not None:
            _print_attention(found)
        for path in paths:
            echo(f"figure: {path}")
    if json:
        write_json(answer | {"figures": [str(path) for path in paths]}, json)


def _image_attention(
    image: Path, backbones: list[str], config: AttentionConfig, home: Path | None, targets: list[Path]
) -> tuple[dict[str, Any], list[Path]]:
    if len(backbones) > 1:
        raise UsageError("attention in an image is of one backbone", code="several-backbones",
                         found=", ".join(backbones), fix="--backbone dino")  # fmt: skip
    from embcache.figures.attention import image_attention
    from embcache.figures.plots import plot_heads

    name = (backbones or ["dino"])[0]
    found = image_attention(image, name, weights=config.weights, transform=config.transform, home=home)
    paths = targets or [Path(f"{image.stem}-attention.png")]
    for path in paths:
        plot_heads(found.pixels, found.heads, f"{name}: class token of the last block", path)
    return {"backbone": name, "image": str(image), "patch": found.patch, "heads": found.heads.tolist()}, paths


def _print_attention(found: RunAttention) -> None:
    r, names = found.result, list(found.result.backbones)
    echo(f"{r.dataset}: {r.id}, {found.folds} folds, {found.shown.remark}, {len(found.shown.ids):,} images")

    def print_mass(mass: Any, std: Any = None) -> None:
        cells = [[f"{value:.3f}" for value in row] for row in mass.tolist()]
        if std is not None and found.folds > 1:
            lines = zip(cells, std.tolist(), strict=True)
            cells = [[f"{c} ± {s:.3f}" for c, s in zip(*line, strict=True)] for line in lines]
        rows = [[name, *row] for name, row in zip(names, cells, strict=True)]
        print_table(["from", *(f"to {b}" for b in names)], rows)

    echo("\nshare of attention, from a row's tokens to a column's: mean ± sd over folds")
    print_mass(found.mass, found.mass_std)
    for label, mass in found.by_class.items():
        echo(f"\n{label} alone")
        print_mass(mass)
    spread = f" ± {found.entropy_std:.4f}" if found.folds > 1 else ""
    echo(f"\nentropy: {found.entropy:.4f}{spread} of log N; 1 is attention that makes no difference")
    even = 1 / len(found.weights)
    echo(f"components that receive most, with their share of all attention (even: {even:.5f}):")
    print_table(["backbone", "component", "share"], [[b, c, f"{share:.5f}"] for b, c, share in found.received])


@takes_configs
def neighbors(
    image: Annotated[str, typer.Option("--image", metavar="ID", help="ID of a cached image, or a unique end of it.")],
    dataset: DatasetOption = None,
    backbone: BackboneOption = None,
    output: OutputOption = None,
    home: HomeOption = None,
    json: JsonOption = None,
    *,
    config: NeighborsConfig,
    ref: Annotated[DatasetRef, Skip("target")],
) -> None:
    """Show the images nearest to one in cached features, as a table and a contact sheet.

    Nearest by the cosine of standardized features, under each backbone (default: all that are cached). The sheet needs
    the images; where they are missing, the table names them.

    Example: embcache neighbors --image test/NORMAL/IM-0001-0001.jpeg -k 8 --dataset pneumonia
    """
    targets = figure_targets(output)
    ds = _one_dataset(dataset, ref, home)
    from embcache.figures.neighbors import draw_neighbors, find_neighbors
    from embcache.paths import home_dir, slug

    found = find_neighbors(ds, image, split_list(backbone), config, home=home)
    default = home_dir(home) / slug(ds.name) / "figures" / f"neighbors-{slug(found[0].image.id)}.png"
    paths = [draw_neighbors(ds, found, target) for target in targets or [default]]
    if json != "-":
        names = [*ds.class_names, "no label"]  # label −1 is the last
        for each in found:
            query = each.image
            echo(f"{each.backbone}: nearest to {query.id} ({names[query.label]}, {query.split})")
            rows = [
                [k, n.id, names[n.label], n.split, f"{n.similarity:.4f}", "same group" * (n.group == query.group)]
                for k, n in enumerate(each.nearest, start=1)
            ]
            print_table(["", "id", "class", "split", "similarity", ""], rows)
            echo()
        for path in paths:
            echo(f"figure: {path}" + ("" if ds.root else "   (without pictures: the images are missing)"))
    if json:
        write_json([each.to_json() for each in found], json)


def figure_targets(output: Sequence[str] | None, *suffixes: str) -> list[Path]:
    """The files that figures are written to, checked before anything is computed; ``suffixes`` are allowed, too."""
    targets = [Path(target).expanduser() for target in split_list(output)]
    for target in targets:
        if target.suffix.lower() not in (*suffixes, *SUFFIXES):
            raise UsageError(
                "the suffix of a file sets its format", code="other-suffix", expected=", ".join((*suffixes, *SUFFIXES)),
                found=str(target), fix=f"--output {target.with_suffix((*suffixes, *SUFFIXES)[0])}",
            )  # fmt: skip
    return targets


def _one_dataset(dataset: list[str] | None, ref: DatasetRef, home: Path | None) -> ImageDataset:
    names = split_list(dataset)
    if len(names) != 1:
        raise UsageError("a figure is of one dataset", code="one-dataset", found=", ".join(names) or "none",
                         fix="--dataset NAME   (embcache ls)")  # fmt: skip
    from embcache.data.classes import change_notes
    from embcache.figures.shown import open_dataset

    ds = open_dataset(names[0], ref, home)
    for note in change_notes(ds):
        print_note(note)
    return ds


def _write_points(maps: Maps, target: Path) -> None:
    from embcache.results.render import csv_text

    check_target(target)
    table = maps.table()
    if target.suffix.lower() == ".csv":
        write_output(target, csv_text(list(table.columns), table.astype(object).itertuples(index=False, name=None)))
    else:
        write_output(target, table.to_parquet(None, index=False))


def _print_maps(maps: Maps) -> None:
    from embcache.figures.maps import decimals

    echo(f"{maps.dataset}: {maps.shown.remark}, {len(maps.shown.ids):,} images")
    rows = [
        [
            panel.label, panel.dim, decimals(panel.scores.silhouette, 3), decimals(panel.scores.knn_accuracy, 3),
            f"{panel.scores.trustworthiness:.3f}", panel.remark,
        ]
        for panel in maps.panels
    ]  # fmt: skip
    print_table(["embedding", "dimensions", "silhouette", "k-NN accuracy", "trustworthiness", ""], rows)
    echo(
        "· silhouette and k-NN accuracy (balanced, 10 neighbors), among images of other groups, of the embedding; "
        "trustworthiness of its map"
    )
    for path in maps.paths:
        echo(f"figure: {path}")


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
