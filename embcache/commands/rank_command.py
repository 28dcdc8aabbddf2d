"""``embcache rank`` and ``similarity``: answers from cached features without training."""

from __future__ import annotations

import math
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
    command,
    split_list,
    takes_columns,
    write_json,
)
from embcache.commands.output import echo
from embcache.commands.table import print_note, print_table

if TYPE_CHECKING:
    from embcache.config import DatasetRef
    from embcache.figures.rank import Ranking
    from embcache.figures.similarity import Similarity


@takes_columns
def rank(
    dataset: DatasetOption = None,
    backbone: BackboneOption = None,
    subset: Annotated[
        str, typer.Option("--subset", metavar="S|M|F|N", help="Training images to score on, as for probing.")
    ] = "F",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of folds and subsets.")] = 0,
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
    """Score every cached backbone in seconds, without training: which one to bother with.

    LogME, nearest centroid and k-NN, by whose mean rank rows are ordered, and the H-score, on training images only,
    beside the linear probes that are saved and the rank correlation with them. Without --dataset every dataset whose
    features are cached.

    Example: embcache rank --dataset pneumonia
    """
    from embcache.figures.pool import open_datasets
    from embcache.figures.rank import rank_dataset

    classes, names = class_options(drop_class, merge_class), split_list(backbone) or None
    opened = open_datasets(split_list(dataset), data_root, home, allow_missing, name, classes, columns)
    rankings = [rank_dataset(ds, names, home=home, recipe=recipe, seed=seed, subset=subset) for ds in opened]
    if json != "-":
        for k, ranking in enumerate(rankings):
            if k:
                echo()
            _print_ranking(ranking, home)
    if json:
        write_json(rankings, json)


@takes_columns
def similarity(
    dataset: DatasetOption = None,
    backbone: BackboneOption = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the images drawn, where there are many.")] = 0,
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
    """Compare the embeddings of cached backbones on the same training images: linear CKA and mutual k-NN.

    Low values mean embeddings that complement each other. Without --dataset every dataset with two backbones cached.

    Example: embcache similarity --dataset pneumonia
    """
    from embcache.figures.pool import open_datasets
    from embcache.figures.similarity import similarity

    classes, names = class_options(drop_class, merge_class), split_list(backbone) or None
    opened = open_datasets(
        split_list(dataset), data_root, home, allow_missing, name, classes, columns, several=True, say=print_note
    )
    found = [similarity(ds, names, home=home, recipe=recipe, seed=seed) for ds in opened]
    if json != "-":
        for k, each in enumerate(found):
            if k:
                echo()
            _print_similarity(each)
    if json:
        write_json([_similarity_json(each) for each in found], json)


def _print_ranking(ranking: Ranking, home: Path | None) -> None:
    from embcache.figures.rank import SCORES
    from embcache.probe.metrics import metric_title

    metric = metric_title(ranking.metric)
    subsets = list(dict.fromkeys(subset for row in ranking.rows for subset in row.probes))
    headers = ["backbone", "LogME", "H-score", f"nearest centroid {metric}", f"k-NN {metric}", "mean rank"]
    rows = [
        [
            row.backbone,
            *("–" if math.isnan(getattr(row, key)) else f"{getattr(row, key):.4f}" for key in SCORES),
            f"{row.place:.2f}",
            *(f"{row.probes[subset]:.4f}" if subset in row.probes else "" for subset in subsets),
        ]
        for row in ranking.rows
    ]
    echo(
        f"{ranking.dataset}: subset {ranking.subset}, {ranking.n_train:,} training images a fold, "
        f"{ranking.labels_used:,} labels used in all"
    )
    print_table([*headers, *(f"linear {s} ({ranking.probe_labels[s]:,} labels)" for s in subsets)], rows)
    ordering = "LogME" if math.isnan(ranking.rows[0].knn) else "LogME, nearest centroid and k-NN"
    notes = [
        *ranking.notes,
        "labels: training + validation of a fold",
        f"mean rank: by {ordering}; the H-score takes no part, because it is high for permuted labels too",
        "scores use training and validation images only; linear: test score of the saved probe, for comparison",
    ]
    if ranking.correlations:
        echo("\nrank correlation with the linear probe: Kendall's τ / Spearman's ρ (backbones)")
        cells = {(c.score, c.subset): f"{c.kendall:.2f} / {c.spearman:.2f} ({c.n})" for c in ranking.correlations}
        names = {**SCORES, "place": "mean rank"}
        chosen = [subset for subset in subsets if (next(iter(names)), subset) in cells]
        print_table(
            ["score", *(f"linear {subset}" for subset in chosen)],
            [[label, *(cells[key, subset] for subset in chosen)] for key, label in names.items()],
        )
    else:
        notes.append(
            "no correlation: it takes linear probes of three backbones at one subset: "
            + command("probe", "--head", "linear", "--subset", "S,M,F", "--dataset", ranking.dataset, home=home)
        )
    for note in notes:
        echo(f"· {note}")


def _print_similarity(found: Similarity) -> None:
    echo(f"{found.dataset}: {found.n:,} training images")
    chance = found.k / (found.n - 1)
    for title, matrix in (
        ("linear CKA, debiased", found.cka),
        (f"mutual k-NN, k = {found.k}: share of an image's nearest images that are the same", found.neighbours),
    ):
        echo(f"\n{title}")
        print_table(
            ["", *found.backbones],
            [
                [name, *(f"{value:.3f}" for value in row)]
                for name, row in zip(found.backbones, matrix.tolist(), strict=True)
            ],
        )
    for note in (
        *found.notes,
        "1: the same but for rotation, scale and shift; CKA of unrelated embeddings is 0, mutual k-NN "
        f"{chance:.4f} by chance",
    ):
        echo(f"· {note}")


def _similarity_json(found: Similarity) -> dict[str, Any]:
    matrices = {key: getattr(found, key).tolist() for key in ("cka", "cka_biased", "neighbours")}
    return {**vars(found), **matrices}
