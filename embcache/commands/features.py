"""``embcache extract``, ``rank`` and ``similarity``: features of frozen backbones."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embcache.backbones.weights import weights_by_name
from embcache.commands.cache import size_words
from embcache.commands.options import (
    BackboneOption,
    DatasetOption,
    HomeOption,
    JsonOption,
    RecipeOption,
    Skip,
    command,
    refuse_other_merges,
    split_list,
    takes_configs,
    write_json,
)
from embcache.commands.output import echo, format_table, print_table
from embcache.config import DatasetRef, ExtractConfig
from embcache.errors import UsageError, first_few, printable
from embcache.log import log

if TYPE_CHECKING:
    from embcache.extract.extract import Extraction
    from embcache.figures.rank import Ranking, Similarity
    from embcache.maintain.listing import DryRun


@takes_configs
def extract(
    backbone: BackboneOption = None,
    dataset: DatasetOption = None,
    home: HomeOption = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print what would be computed (of all parts) and why, field by field; write nothing."
        ),
    ] = False,
    json: JsonOption = None,
    *,
    ref: Annotated[DatasetRef, Skip("target", "drop_class")],
    config: ExtractConfig,
) -> None:
    """Run frozen backbones once over all images into feature stores.

    Only what is not cached is computed: a second run returns at once, an interrupted one continues where it stopped,
    an added or changed image extracts only itself.

    Example: embcache extract --backbone random,effnet_lite0 --dataset pneumonia
    """
    names, datasets = split_list(backbone), split_list(dataset)
    for what, given in (("backbone", names), ("dataset", datasets)):
        if not given:
            raise UsageError(
                f"no {what} was named", code=f"no-{what}",
                fix=f"embcache extract --{what} NAME …   (embcache {what}s lists them)",
            )  # fmt: skip
    if len(datasets) > 1 and (ref.data_root or ref.name):
        raise UsageError(
            "--data-root and --name belong to one dataset", code="one-dataset", found=", ".join(datasets),
            fix="one command per dataset",
        )  # fmt: skip
    weights_by_name(names, config.weights)  # before anything is loaded
    from embcache.data.dataset import find_dataset
    from embcache.extract.extract import extract as run
    from embcache.extract.signals import Stop, exit_status, stop_on_signals
    from embcache.maintain.listing import dry_run as explain

    answers, stop = list[dict[str, Any]](), Stop()
    for name in datasets:
        found, _ = find_dataset(name, ref, home=home)
        refuse_other_merges(ref.merge_class, found)
        for note in found.notes:
            log.info(note)
        if dry_run:
            for answer in explain(names, found, config, home=home):
                answers.append({"dataset": found.name, **answer.to_json()})
                if json != "-":
                    echo("\n".join(_dry_run_words(found.name, answer)))
            continue
        try:
            with stop_on_signals(stop):
                done = run(found, names, config, home=home, stop=stop)
        except (KeyboardInterrupt, SystemExit):
            _echo_how_to_continue("stopped at once: what is committed stays")
            raise
        if json != "-":
            _print(found.name, len(found), done, home)
        answers += [_as_json(found.name, extraction) for extraction in done]
        if stop.signal is not None:
            break
    if json:
        write_json(answers, json)
    if dry_run:
        return
    left, others = max(extraction.undone for extraction in done), datasets[datasets.index(name) + 1 :]
    if stop.signal is not None and (left or others):
        rest = [f"{left:,} images of {found.name}"] if left else []
        rest += [f"the images of {', '.join(others)}"] if others else []
        _echo_how_to_continue(f"stopped after the current shard, which is committed; {' and '.join(rest)} are left")
        raise SystemExit(exit_status(stop.signal))


def _echo_how_to_continue(what: str) -> None:
    echo(f"\n{what}; the same command continues from there:\n  {shlex.join(['embcache', *sys.argv[1:]])}", err=True)


def _print(dataset: str, images: int, done: list[Extraction], home: Path | None) -> None:
    rows = [
        [e.backbone, images, e.cached, e.computed, len(e.quarantined), f"{e.seconds:.1f}", e.store.path.name]
        for e in done
    ]
    headers = ["backbone", "images", "cached", "computed", "quarantined", "seconds", "store"]
    bad = {image: reason for extraction in done for image, reason in extraction.quarantined.items()}
    notes = [f"quarantined: {image}: {reason}" for image, reason in list(bad.items())[:5]]
    if len(bad) > 5:
        notes.append(f"… and {len(bad) - 5} more quarantined images (embcache info)")
    left = max(extraction.left for extraction in done)
    if left:
        notes.insert(0, f"not complete: {left:,} images are still owed")
    elif not any(extraction.computed for extraction in done):
        notes.insert(0, "complete: every image was cached already, nothing was computed")
    changed = max((e.changed for e in done), default=0)
    if changed:
        notes.append(f"{changed} images changed since they were extracted and were extracted again")
    retried = max(extraction.retried for extraction in done)
    if retried:
        notes.append(f"{retried} quarantined images were tried again")
    print_table(headers, rows, notes=notes)
    if left:
        return
    views = done[0].store.views
    words = ["--head", "linear", "--subset", "S,M,F", "--dataset", dataset]
    echo("next: " + command("probe", *words, *(["--views", str(views)] if views > 1 else []), home=home))


def _as_json(dataset: str, extraction: Extraction) -> dict[str, object]:
    store = extraction.store
    return {
        "dataset": dataset,
        "backbone": extraction.backbone,
        "store": str(store.path),
        "fingerprint": store.recipe.fingerprint,
        "views": store.views,
        "computed": extraction.computed,
        "cached": extraction.cached,
        "added": extraction.added,
        "changed": extraction.changed,
        "retried": extraction.retried,
        "left": extraction.left,
        "rows_per_shard": store.rows_per_shard,
        "quarantined": dict(extraction.quarantined),
        "seconds": round(extraction.seconds, 3),
    }


def _dry_run_words(dataset: str, answer: DryRun) -> list[str]:
    lines = [f"{answer.backbone} over {dataset}, recipe {answer.fingerprint[:12]}"]
    if answer.match is not None:
        lines.append(f"cached under this recipe: {answer.match.path.name}")
    elif answer.cached:
        lines.append("not cached under this recipe: all images would be computed, into a store of their own")
    else:
        lines.append("nothing of this backbone is cached for this dataset")
    for each in answer.cached:
        if each.problem:
            lines.append(f"{each.path.name} cannot be read: {printable(each.problem)}")
        elif each.differs:
            lines.append(f"{each.path.name} ({each.rows:,} images) differs in:")
            rows = [[field, _short(mine), _short(theirs)] for field, (mine, theirs) in each.differs.items()]
            lines += ["  " + line for line in format_table(["field", "wanted", "cached"], rows).split("\n")]
    if answer.match is not None:
        for change, ids in (("added", answer.added), ("changed", answer.changed), ("removed", answer.removed)):
            if ids:
                lines.append(f"{change}: {len(ids):,} ({printable(first_few(ids))})")
    what = f"{answer.owed:,} of {answer.images:,} images, {size_words(answer.bytes)} of features"
    return [*lines, f"an extraction would compute {what if answer.owed else 'nothing'}"]


def _short(value: Any) -> str:
    text = "(not there)" if value is None else str(value)
    return text if len(text) <= 44 else f"{text[:20]}…{text[-12:]}"


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
    from embcache.figures.rank import similarity
    from embcache.figures.shown import open_datasets

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
