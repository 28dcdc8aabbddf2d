"""``embcache tsne``: pictures of what is cached."""

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
    HomeOption,
    JsonOption,
    NameOption,
    split_list,
    write_json,
)
from embcache.commands.table import print_table
from embcache.errors import UsageError
from embcache.paths import replace_file

if TYPE_CHECKING:
    from embcache.analysis.draw_maps import Maps
    from embcache.data.dataset import ImageDataset

RunsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--run",
        metavar="ID[,ID…]",
        help="Run of a fused head, such as dvme; any unique beginning. See `embcache results`.",
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", metavar="PREFIX", help="First digits of the fingerprint, where several are cached."),
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
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of maps, and of a local test set.")] = 0,
    output: OutputOption = None,
    coordinates: Annotated[
        Path | None,
        typer.Option("--coordinates", metavar="FILE", help="Write the points: CSV, or Parquet by its suffix."),
    ] = None,
    recipe: RecipeOption = None,
    data_root: DataRootOption = None,
    home: HomeOption = None,
    allow_missing: AllowMissingOption = False,
    name: NameOption = None,
    json: JsonOption = None,
) -> None:
    """Map cached embeddings side by side: each backbone, and what a run of dvme fuses.

    From the cache alone. Under each map: silhouette of the classes and balanced accuracy of the ten nearest
    neighbours, both in the embedding itself, and how far the map's neighbours are the embedding's (trustworthiness).

    Example: embcache tsne --dataset pneumonia --backbone random,effnet_lite0 --run dvme-S --output maps.pdf
    """
    targets = _targets(output)
    if coordinates is not None and coordinates.suffix.lower() not in (".csv", ".parquet"):
        raise UsageError("points are written as CSV or Parquet", found=str(coordinates), fix="--coordinates points.csv")
    if limit is not None and limit < 4:
        raise UsageError("too few images for a map", expected="at least 4", found=str(limit), fix="--limit 2000")
    ds = _one_dataset(dataset, data_root, home, allow_missing, name)
    from embcache.analysis.draw_maps import draw_maps

    maps = draw_maps(
        ds, split_list(backbone), split_list(run), method=method, rows=rows, most=limit, seed=seed,
        perplexity=perplexity, home=home, recipe=recipe, targets=targets,
    )  # fmt: skip
    if coordinates is not None:
        _write_points(maps, ds, coordinates)
    if json != "-":
        _print_maps(maps)
        if coordinates is not None:
            typer.echo(f"points: {coordinates}")
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


def _targets(output: list[str] | None) -> list[Path]:
    targets = [Path(target) for target in split_list(output)]
    for target in targets:
        if target.suffix.lower() not in SUFFIXES:
            raise UsageError(
                "a figure's suffix says its format", expected=", ".join(SUFFIXES), found=str(target),
                fix=f"--output {target.with_suffix('.png')}",
            )  # fmt: skip
    return targets


def _one_dataset(
    dataset: list[str] | None, data_root: Path | None, home: Path | None, allow_missing: bool, name: str | None
) -> ImageDataset:
    names = split_list(dataset)
    if len(names) != 1:
        raise UsageError(
            "a figure is of one dataset", found=", ".join(names) or "none", fix="--dataset NAME   (embcache ls)"
        )
    from embcache.data.dataset import find_dataset

    ds, _ = find_dataset(names[0], root=data_root, home=home, allow_missing=allow_missing, dataset_name=name)
    return ds


def _write_points(maps: Maps, ds: ImageDataset, target: Path) -> None:
    from embcache.report.csvfile import check_target, csv_text, write_text

    check_target(target)
    table = maps.table()
    table.insert(3, "class_name", [ds.class_names[label] for label in table["label"]])
    if target.suffix.lower() == ".csv":
        write_text(target, csv_text(list(table.columns), table.astype(object).itertuples(index=False, name=None)))
    else:
        replace_file(target, table.to_parquet(None, index=False))


def _print_maps(maps: Maps) -> None:
    typer.echo(f"{maps.dataset}: {maps.shown.remark}, {len(maps.shown.ids):,} images")
    rows = [
        [
            panel.label, panel.dim, "–" if panel.scores.silhouette is None else f"{panel.scores.silhouette:.3f}",
            f"{panel.scores.knn_accuracy:.3f}", f"{panel.scores.trustworthiness:.3f}", panel.remark,
        ]
        for panel in maps.panels
    ]  # fmt: skip
    print_table(["embedding", "dimensions", "silhouette", "k-NN accuracy", "trustworthiness", ""], rows)
    typer.echo("· silhouette and k-NN accuracy (balanced, 10 neighbours) of the embedding; trustworthiness of its map")
    for path in maps.paths:
        typer.echo(f"figure: {path}")
