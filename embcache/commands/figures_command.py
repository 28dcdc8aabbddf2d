"""``embcache tsne``, ``attention`` and ``neighbors``: pictures of what is cached."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    class_options,
    split_list,
    takes_columns,
    write_json,
)
from embcache.commands.output import echo
from embcache.commands.table import print_note, print_table
from embcache.errors import UsageError
from embcache.io import check_target, write_output

if TYPE_CHECKING:
    from embcache.config import DatasetRef
    from embcache.data.classes import ClassOptions
    from embcache.data.dataset import ImageDataset
    from embcache.figures.draw_maps import Maps
    from embcache.figures.run_attention import RunAttention

RunsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--run",
        metavar="ID[,ID…]",
        help="Run of a fused head, such as dvme; any unique beginning. See `embcache results`.",
    ),
]
OutputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--output",
        metavar="FILE[,FILE…]",
        help="PNG, SVG or PDF by its suffix; repeatable. [default: <home>/<dataset>/figures/…png]",
    ),
]
SUFFIXES = (".png", ".svg", ".pdf")


@takes_columns
def tsne(
    dataset: DatasetOption = None,
    backbone: BackboneOption = None,
    run: RunsOption = None,
    method: Annotated[
        str, typer.Option("--method", metavar="tsne|umap|pca", help="umap needs the extra `umap`.")
    ] = "tsne",
    rows: Annotated[str, typer.Option("--rows", metavar="test|train|all", help="Which labelled images.")] = "test",
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Draw N of the images at most. [default: all]")
    ] = None,
    perplexity: Annotated[float, typer.Option("--perplexity", metavar="P", help="Of t-SNE.")] = 30.0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of maps.")] = 0,
    output: OutputOption = None,
    coordinates: Annotated[
        Path | None,
        typer.Option("--coordinates", metavar="FILE", help="Write the points: CSV, or Parquet by its suffix."),
    ] = None,
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
    """Map cached embeddings side by side: each backbone, and what a run of dvme fuses.

    From the cache alone. Under each map: silhouette of the classes and balanced accuracy of the ten nearest
    neighbors, both in the embedding itself and among images of other groups (patients), and how far the map's
    neighbors are the embedding's (trustworthiness).

    Example: embcache tsne --dataset pneumonia --backbone random,effnet_lite0 --run dvme-S --output maps.pdf
    """
    targets = figure_targets(output)
    if coordinates is not None and coordinates.suffix.lower() not in (".csv", ".parquet"):
        raise UsageError("points are written as CSV or Parquet", found=str(coordinates), fix="--coordinates points.csv")
    if limit is not None and limit < 4:
        raise UsageError("too few images for a map", expected="at least 4", found=str(limit), fix="--limit 2000")
    ds = _one_dataset(dataset, data_root, home, allow_missing, name, class_options(drop_class, merge_class), columns)
    from embcache.figures.draw_maps import draw_maps

    maps = draw_maps(
        ds, split_list(backbone), split_list(run), method=method, rows=rows, most=limit, seed=seed,
        perplexity=perplexity, home=home, recipe=recipe, targets=targets,
    )  # fmt: skip
    if coordinates is not None:
        _write_points(maps, ds, coordinates)
    if json != "-":
        _print_maps(maps)
        if coordinates is not None:
            echo(f"points: {coordinates}")
    if json:
        panels = [
            {
                "embedding": p.label, "remark": p.remark, "dimensions": p.dim, **asdict(p.scores), "source": p.source,
                "coordinates": p.coordinates.tolist(),
            }
            for p in maps.panels
        ]  # fmt: skip
        answer = {"dataset": maps.dataset, "method": maps.method, "rows": maps.shown.remark, "ids": maps.shown.ids,
                  "labels": maps.shown.labels.tolist(), "class_names": list(ds.class_names), "panels": panels,
                  "figures": [str(path) for path in maps.paths]}  # fmt: skip
        write_json(answer, json)


def attention(
    run: Annotated[
        str | None, typer.Option("--run", metavar="ID", help="Run of dvme or dvme-token; any unique beginning.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option("--image", metavar="FILE", help="Instead of a run: one image file.")
    ] = None,
    backbone: BackboneOption = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", metavar="FILE", help="With --image: the backbone's checkpoint.")
    ] = None,
    transform: Annotated[
        str | None, typer.Option("--transform", metavar="paper|imagenet|model", help="With --image: as for extract.")
    ] = None,
    output: OutputOption = None,
    recipe: RecipeOption = None,
    data_root: DataRootOption = None,
    home: HomeOption = None,
    allow_missing: AllowMissingOption = False,
    json: JsonOption = None,
) -> None:
    """Show what is attended to: by a DVME run, or by a vision transformer in one image.

    With --run: the mean map over the test images with the backbones' borders (Figure F1), attention between backbones
    with its spread over folds and by class, its entropy, and the components that receive most; from the cache alone.
    With --image: the class token of the last block, per head, over the image; dino or a timm: vision transformer.

    Example: embcache attention --run dvme-F-1a2b   ·   embcache attention --image xray.png --backbone dino
    """
    if (run is None) == (image is None):
        raise UsageError(
            "attention of a run, or in an image", expected="--run ID or --image FILE", fix="embcache results"
        )
    if image is None and (weights is not None or transform is not None or backbone):
        raise UsageError("--backbone, --weights and --transform go with --image", fix="leave them out")
    targets = figure_targets(output)
    if image is not None:
        _image_attention(image, split_list(backbone), weights, transform, home, targets, json)
        return
    from embcache.data.classes import as_in_run
    from embcache.data.dataset import find_dataset
    from embcache.figures.run_attention import draw_attention, run_attention
    from embcache.paths import home_dir, slug
    from embcache.runs.folders import find_run_anywhere

    result, folder = find_run_anywhere(str(run), home)
    ds, _ = find_dataset(result.dataset, root=data_root, home=home, allow_missing=allow_missing)
    found = run_attention(as_in_run(ds, result.request), result, folder, home=home, recipe=recipe)
    default = home_dir(home) / slug(ds.name) / "figures" / f"attention-{result.id}.png"
    paths = [draw_attention(found, ds.synthetic, target) for target in targets or [default]]
    if json != "-":
        _print_attention(found)
        for path in paths:
            echo(f"figure: {path}")
    if json:
        write_json(_attention_json(found) | {"figures": [str(path) for path in paths]}, json)


def _image_attention(
    image: Path,
    backbones: list[str],
    weights: Path | None,
    transform: str | None,
    home: Path | None,
    targets: list[Path],
    json: str | None,
) -> None:
    if len(backbones) > 1:
        raise UsageError("attention in an image is of one backbone", found=", ".join(backbones), fix="--backbone dino")
    from embcache.figures.plots import plot_heads
    from embcache.figures.vit_attention import image_attention

    name = (backbones or ["dino"])[0]
    found = image_attention(image, name, weights=weights, transform=transform, home=home)
    paths = targets or [Path(f"{image.stem}-attention.png")]
    for path in paths:
        plot_heads(found.pixels, found.heads, f"{name}: class token of the last block", path)
        if json != "-":
            echo(f"figure: {path}")
    if json:
        answer = {"backbone": name, "image": str(image), "patch": found.patch, "heads": found.heads.tolist(),
                  "figures": [str(path) for path in paths]}  # fmt: skip
        write_json(answer, json)


def _print_attention(found: RunAttention) -> None:
    r = found.result
    names = list(r.backbones)
    echo(f"{r.dataset}: {r.id}, {found.folds} folds, {found.shown.remark}, {len(found.shown.ids):,} images")

    def cells(mass: Any, std: Any = None) -> list[list[str]]:
        return [
            [a, *(f"{mass[i][j]:.3f}" + (f" ± {std[i][j]:.3f}" if std is not None and found.folds > 1 else "")
                  for j in range(len(names)))]
            for i, a in enumerate(names)
        ]  # fmt: skip

    echo("\nshare of attention, from a row's tokens to a column's: mean ± sd over folds")
    print_table(["from", *(f"to {b}" for b in names)], cells(found.mass, found.mass_std))
    for label, mass in found.by_class.items():
        echo(f"\n{label} alone")
        print_table(["from", *(f"to {b}" for b in names)], cells(mass))
    spread = f" ± {found.entropy_std:.4f}" if found.folds > 1 else ""
    echo(f"\nentropy: {found.entropy:.4f}{spread} of log N; 1 is attention that makes no difference")
    echo("components that receive most, with their share of all attention (even: "
               f"{1 / len(found.weights):.5f}):")  # fmt: skip
    print_table(["backbone", "component", "share"], [[b, c, f"{share:.5f}"] for b, c, share in found.received])


def _attention_json(found: RunAttention) -> dict[str, Any]:
    def finite(values: Any) -> Any:
        return [[float(v) if v == v else None for v in row] for row in values]

    return {
        "run": found.result.id, "dataset": found.result.dataset, "backbones": list(found.result.backbones),
        "n_test": len(found.shown.ids), "folds": found.folds, "mass": finite(found.mass),
        "mass_std": finite(found.mass_std), "by_class": {k: finite(v) for k, v in found.by_class.items()},
        "entropy": found.entropy, "entropy_std": None if found.folds < 2 else found.entropy_std,
        "received": [{"backbone": b, "component": c, "share": s} for b, c, s in found.received],
    }  # fmt: skip


@takes_columns
def neighbors(
    image: Annotated[str, typer.Option("--image", metavar="ID", help="Id of a cached image, or its unique end.")],
    k: Annotated[int, typer.Option("-k", metavar="K", help="Neighbours to show.")] = 8,
    dataset: DatasetOption = None,
    backbone: BackboneOption = None,
    output: OutputOption = None,
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
    """Show the images nearest to one in cached features, as a table and a contact sheet.

    Nearest by the cosine of standardised features, under each backbone (default: all that are cached). The sheet needs
    the images at hand; where they are not, the table says which they are.

    Example: embcache neighbors --image test/NORMAL/IM-0001-0001.jpeg -k 8 --dataset pneumonia
    """
    targets = figure_targets(output)
    ds = _one_dataset(dataset, data_root, home, allow_missing, name, class_options(drop_class, merge_class), columns)
    from embcache.figures.neighbors import find_neighbours
    from embcache.figures.sheets import draw_neighbours
    from embcache.paths import home_dir, slug

    found = find_neighbours(ds, image, split_list(backbone), k=k, home=home, recipe=recipe)
    default = home_dir(home) / slug(ds.name) / "figures" / f"neighbors-{slug(found[0].image.id)}.png"
    paths = [draw_neighbours(ds, found, target) for target in targets or [default]]
    if json != "-":
        for each in found:
            own = _class_name(ds, each.image.label)
            echo(f"{each.backbone}: nearest to {each.image.id} ({own}, {each.image.split})")
            rows = [
                [place, n.id, _class_name(ds, n.label), n.split, f"{n.similarity:.4f}",
                 "same group" if n.group == each.image.group else ""]
                for place, n in enumerate(each.nearest, start=1)
            ]  # fmt: skip
            print_table(["", "id", "class", "split", "similarity", ""], rows)
            echo()
        for path in paths:
            echo(f"figure: {path}" + ("" if ds.root else "   (the images are not here: no pictures in it)"))
    if json:
        write_json([asdict(each) for each in found], json)


def _class_name(ds: ImageDataset, label: int) -> str:
    return ds.class_names[label] if label >= 0 else "no label"


def figure_targets(output: list[str] | None) -> list[Path]:
    """The files that figures are written to, checked before anything is computed."""
    targets = [Path(target) for target in split_list(output)]
    for target in targets:
        if target.suffix.lower() not in SUFFIXES:
            raise UsageError(
                "a figure's suffix says its format", expected=", ".join(SUFFIXES), found=str(target),
                fix=f"--output {target.with_suffix('.png')}",
            )  # fmt: skip
    return targets


def _one_dataset(
    dataset: list[str] | None,
    data_root: Path | None,
    home: Path | None,
    allow_missing: bool,
    name: str | None,
    classes: ClassOptions,
    columns: DatasetRef,
) -> ImageDataset:
    names = split_list(dataset)
    if len(names) != 1:
        raise UsageError(
            "a figure is of one dataset", found=", ".join(names) or "none", fix="--dataset NAME   (embcache ls)"
        )
    from embcache.data.classes import change_notes
    from embcache.data.dataset import find_dataset

    ds, _ = find_dataset(
        names[0], root=data_root, home=home, allow_missing=allow_missing, dataset_name=name, columns=columns
    )
    ds = classes.of(ds)
    for note in change_notes(ds):
        print_note(note)
    return ds


def _write_points(maps: Maps, ds: ImageDataset, target: Path) -> None:
    from embcache.results.csvfile import csv_text

    check_target(target)
    table = maps.table()
    table.insert(3, "class_name", [ds.class_names[label] for label in table["label"]])
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
