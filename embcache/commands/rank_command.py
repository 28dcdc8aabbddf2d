"""``embcache rank`` and ``similarity``: answers from cached features without training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from embcache.commands.options import (
    BackboneOption,
    DatasetOption,
    HomeOption,
    JsonOption,
    RecipeOption,
    Skip,
    command,
    split_list,
    takes_configs,
    write_json,
)
from embcache.commands.output import echo, print_table
from embcache.config import DatasetRef

if TYPE_CHECKING:
    from embcache.figures.rank import Ranking
    from embcache.figures.similarity import Similarity


@takes_configs
def rank(
    dataset: DatasetOption = None,
    backbone: BackboneOption = None,
    subset: Annotated[
        str, typer.Option("--subset", metavar="S|M|F|N", help="Subset to score on, as named by `embcache probe`.")
    ] = "F",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of folds and subsets.")] = 0,
    recipe: RecipeOption = None,
    home: HomeOption = None,
    json: JsonOption = None,
    *,
    ref: Annotated[DatasetRef, Skip("target")],
) -> None:
    """Score every cached backbone in seconds, without training, to see which ones are worth probing.

    LogME, nearest centroid and k-NN, by whose mean rank rows are ordered, and the H-score, on training images only,
    beside the linear probes that are saved and the rank correlation with them. Without --dataset every dataset whose
    features are cached.

    Example: embcache rank --dataset pneumonia
    """
    from embcache.figures.rank import rank
    from embcache.figures.shown import open_datasets

    backbones = split_list(backbone)
    opened = open_datasets(split_list(dataset), ref, home)
    rankings = [rank(ds, backbones, home=home, recipe=recipe, seed=seed, subset=subset) for ds in opened]
    for k, ranking in enumerate(rankings if json != "-" else ()):
        echo("", nl=k > 0)
        _print_ranking(ranking, home)
    if json:
        write_json([ranking.to_json() for ranking in rankings], json)


@takes_configs
def similarity(
    dataset: DatasetOption = None,
    backbone: BackboneOption = None,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="Seed of the images drawn, where there are many.")
    ] = 0,
    recipe: RecipeOption = None,
    home: HomeOption = None,
    json: JsonOption = None,
    *,
    ref: Annotated[DatasetRef, Skip("target")],
) -> None:
    """Compare the embeddings of cached backbones on the same training images: linear CKA and mutual k-NN.

    Low values mean embeddings that complement each other. Without --dataset every dataset with two backbones cached.

    Example: embcache similarity --dataset pneumonia
    """
    from embcache.figures.shown import open_datasets
    from embcache.figures.similarity import similarity

    backbones = split_list(backbone)
    opened = open_datasets(split_list(dataset), ref, home, several=True)
    found = [similarity(ds, backbones, home=home, recipe=recipe, seed=seed) for ds in opened]
    for k, each in enumerate(found if json != "-" else ()):
        echo("", nl=k > 0)
        _print_similarity(each)
    if json:
        write_json([each.to_json() for each in found], json)


def _print_ranking(ranking: Ranking, home: Path | None) -> None:
    from embcache.figures.rank import SCORES
    from embcache.probe.metrics import metric_title

    metric = metric_title(ranking.metric)
    subsets = list(dict.fromkeys(subset for row in ranking.rows for subset in row.probes))
    headers = ["backbone", "LogME", "H-score", f"nearest centroid {metric}", f"k-NN {metric}", "mean rank"]
    rows = []
    for row in ranking.rows:
        scores = (row.logme, row.h_score, row.centroid, row.knn)
        probes = [f"{row.probes[subset]:.4f}" if subset in row.probes else "" for subset in subsets]
        rows.append(
            [row.backbone, *("–" if math.isnan(s) else f"{s:.4f}" for s in scores), f"{row.place:.2f}", *probes]
        )
    echo(
        f"{ranking.dataset}: subset {ranking.subset}, {ranking.n_train:,} training images per fold, "
        f"{ranking.labels_used:,} labels used in all"
    )
    print_table([*headers, *(f"linear {s} ({ranking.probe_labels[s]:,} labels)" for s in subsets)], rows)
    ordering = "LogME" if math.isnan(ranking.rows[0].knn) else "LogME, nearest centroid and k-NN"
    notes = [
        *ranking.notes,
        "labels: training + validation per fold",
        f"mean rank: by {ordering}; the H-score takes no part, because it is high for permuted labels too",
        "scores use training and validation images only; linear: test score of the saved probe, for comparison",
    ]
    if ranking.correlations:
        echo("\nrank correlation with the linear probe: Kendall's τ / Spearman's ρ (backbones)")
        cells = {(c.score, c.subset): f"{c.kendall:.2f} / {c.spearman:.2f} ({c.n})" for c in ranking.correlations}
        chosen = [subset for subset in subsets if ("place", subset) in cells]
        print_table(
            ["score", *(f"linear {subset}" for subset in chosen)],
            [
                [label, *(cells[key, subset] for subset in chosen)]
                for key, label in {**SCORES, "place": "mean rank"}.items()
            ],
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
    share = f"mutual k-NN, k = {found.k}: share of an image's nearest images that are the same"
    for title, matrix in (("linear CKA, debiased", found.cka), (share, found.neighbors)):
        echo(f"\n{title}")
        lines = zip(found.backbones, matrix.tolist(), strict=True)
        print_table(["", *found.backbones], [[name, *(f"{value:.3f}" for value in row)] for name, row in lines])
    for note in (
        *found.notes,
        "1: the same but for rotation, scale and shift; CKA of unrelated embeddings is 0, mutual k-NN "
        f"{found.k / (found.n - 1):.4f} by chance",
    ):
        echo(f"· {note}")
