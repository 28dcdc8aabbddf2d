"""``embcache extract``, ``rank`` and ``similarity``: features of frozen backbones."""

from __future__ import annotations

import math
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embcache.backbones.weights import weights_by_name
from embcache.commands.options import (
    ORIGINS,
    Answer,
    OneDataset,
    Skip,
    check_named,
    check_one,
    command,
    command_line,
    refuse_other_merges,
)
from embcache.commands.output import (
    echo,
    echo_each,
    echo_notes,
    format_table,
    print_note,
    print_objects,
    print_table,
    size_words,
)
from embcache.config import DatasetRef, ExtractConfig, ImportConfig
from embcache.errors import UsageError, first_few, one_line, printable
from embcache.log import log

if TYPE_CHECKING:
    from embcache.extract.extract import Extraction
    from embcache.figures.rank import Ranking, Similarity
    from embcache.maintain.listing import DryRun


@command()
def extract(
    *,
    backbone: list[str],
    dataset: list[str],
    home: Path | None,
    dry_run: Annotated[
        bool, "", "Print what would be computed (of all parts) and why, field by field; write nothing."
    ] = False,
    json: str | None,
    ref: Annotated[DatasetRef, Skip("drop_class")],
    config: ExtractConfig,
) -> Answer:
    """Run frozen backbones once over all images into feature stores.

    Only what is not cached is computed: a second run returns at once, an interrupted one continues where it stopped,
    and after images were added or changed only those are extracted.

    Example: embcache extract --backbone random,effnet_lite0 --dataset pneumonia
    """
    check_named("extract", backbone=backbone, dataset=dataset)
    if len(dataset) > 1 and (ref.data_root or ref.name):
        raise UsageError(
            "--data-root and --name belong to one dataset", code="one-dataset", found=", ".join(dataset),
            fix="one command per dataset",
        )  # fmt: skip
    weights_by_name(backbone, config.weights)  # before anything is loaded
    from embcache.data.dataset import ImageDataset, find_dataset
    from embcache.data.partitioned import find_partitioned
    from embcache.extract.engines.local import Stop, exit_status, stop_on_signals
    from embcache.extract.extract import extract as run
    from embcache.maintain.listing import dry_run as explain

    answers, stop = list[dict[str, Any]](), Stop()
    done = list["Extraction"]()
    for name in dataset:
        found = find_partitioned(name, ref, home) or find_dataset(name, ref, home=home)[0]
        if isinstance(found, ImageDataset):
            refuse_other_merges(ref, found)
        for note in found.notes:
            log.info(note)
        if dry_run:
            if not isinstance(found, ImageDataset):
                raise UsageError(
                    "--dry-run compares whole tables, and this one is read in partitions", code="dry-run-partitioned",
                    found=f"{len(found):,} images", fix="leave it out: an extraction can be stopped and continued",
                )  # fmt: skip
            for answer in explain(backbone, found, config, home=home):
                answers.append({"dataset": found.name, **answer.to_json()})
                if json != "-":
                    echo("\n".join(_dry_run_words(found.name, answer)))
            continue
        try:
            with stop_on_signals(stop):
                done = run(found, backbone, config, home=home, stop=stop)
        except (KeyboardInterrupt, SystemExit):
            _echo_how_to_continue("stopped at once: what is committed stays")
            raise
        if json != "-":
            _print(len(found), done)
        answers += [_as_json(found.name, extraction) for extraction in done]
        if stop.signal is not None:
            break
    left = max((extraction.undone for extraction in done), default=0)
    others = dataset[dataset.index(name) + 1 :]
    if stop.signal is not None and (left or others):
        Answer(answers, lambda: None).give(json, home)
        rest = [f"{left:,} images of {found.name}"] if left else []
        rest += [f"the images of {', '.join(others)}"] if others else []
        _echo_how_to_continue(f"stopped; what is committed stays, and {' and '.join(rest)} are left")
        raise SystemExit(exit_status(stop.signal))
    following = list[str]()
    if done and isinstance(found, ImageDataset) and not any(extraction.left for extraction in done):
        following = ["probe", "--head", "linear", "--subset", "S,M,F", "--dataset", found.name]
        following += ["--views", str(done[0].store.views)] if done[0].store.views > 1 else []
    return Answer(answers, lambda: None, following)


def _echo_how_to_continue(what: str) -> None:
    echo(f"\n{what}; the same command continues from there:\n  {shlex.join(['embcache', *sys.argv[1:]])}", err=True)


def _print(images: int, done: list[Extraction]) -> None:
    bad = {image: reason for extraction in done for image, reason in extraction.quarantined.items()}
    left, changed, retried = (
        max(counts) for counts in zip(*((e.left, e.changed, e.retried) for e in done), strict=True)
    )
    notes = [f"not complete: {left:,} images are left for other parts or another run"] if left else []
    # Below 0 where rows of images that left the dataset were computed.
    if (elsewhere := max(images - e.cached - e.computed - e.left for e in done)) > 0:
        notes.append(f"{elsewhere:,} images were computed by other processes")
    if not left and not any(extraction.computed for extraction in done):
        notes.append("complete: every image was cached already, nothing was computed")
    notes += [f"quarantined: {image}: {reason}" for image, reason in list(bad.items())[:5]]
    if len(bad) > 5:
        notes.append(f"… and {len(bad) - 5} more quarantined images (embcache info)")
    if changed:
        notes.append(f"{changed} images changed since they were extracted and were extracted again")
    if retried:
        notes.append(f"{retried} quarantined images were tried again")
    columns = {
        "backbone": "{0.backbone}",
        "images": str(images),
        "cached": "{0.cached}",
        "computed": "{0.computed}",
        "quarantined": lambda e: len(e.quarantined),
        "seconds": "{0.seconds:.1f}",
        "store": "{0.store.path.name}",
    }
    print_objects(done, columns, notes=notes)


def _as_json(dataset: str, extraction: Extraction) -> dict[str, object]:
    store, counts = extraction.store, ("computed", "cached", "added", "changed", "retried", "left")
    return {
        "dataset": dataset,
        "backbone": extraction.backbone,
        "store": str(store.path),
        "fingerprint": store.recipe.fingerprint,
        "views": store.views,
        **{name: vars(extraction)[name] for name in counts},
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


@command()
def import_(
    *,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Features: .npz, .npy, .parquet, .csv, .h5, .zarr, or a folder.")
    ],
    backbone_name: Annotated[str, "NAME", "Name of the features; no name of `embcache backbones`."],
    dataset: OneDataset,
    home: Path | None,
    ref: Annotated[DatasetRef, Skip("drop_class")],
    config: ImportConfig,
) -> Answer:
    """Take features made elsewhere as those of a backbone, to be probed, compared and reported like any other.

    A file has one vector of each image and its name: npz, Parquet, CSV, HDF5 and Zarr as `embcache export` writes them,
    npy with --ids, a folder of TRIDENT's .h5, or of kaiko-eva's .pt with its manifest.csv. Names are compared with the
    dataset's IDs, else its paths, else either without suffix. The same features again change nothing.

    Example: embcache import features.npz --backbone-name uni-trident --dataset slides --data-root slides.csv
    """
    from embcache.data.dataset import find_dataset
    from embcache.extract.foreign import import_file

    check_one(dataset, None, "embcache import FILE --backbone-name NAME --dataset NAME")
    found, origin = find_dataset(dataset[0], ref, home)
    refuse_other_merges(ref, found)
    done = import_file(file, found, backbone_name, config, home=home)
    store = done.store

    def show() -> None:
        echo(
            f"{store.path.name}: {done.features:,} of {len(found):,} images of {found.name} have features "
            f"{store.row_shape} {store.dtype}, matched by {done.matched_by}; {done.added:,} rows added"
        )
        for note in done.notes:
            print_note(one_line(note))
        if done.without:
            print_note(f"{len(done.without):,} images without features: {one_line(first_few(done.without))}")
        if done.ignored:
            print_note(
                f"{len(done.ignored):,} names that {found.name} does not have: {one_line(first_few(done.ignored))}"
            )
        print_note(f"the images of {found.name} are those of {ORIGINS[origin]}; their names alone are compared")

    answer = {
        "dataset": found.name, "backbone": backbone_name, "store": str(store.path),
        "fingerprint": store.recipe.fingerprint, **{key: value for key, value in vars(done).items() if key != "store"},
    }  # fmt: skip
    following = ["probe", "--head", "linear", "--subset", "S,M,F", "--backbone", backbone_name, "--dataset", found.name]
    return Answer(answer, show, following)


@command(table=True)
def rank(
    *,
    dataset: list[str],
    backbone: list[str],
    subset: Annotated[str, "S|M|F|N", "Subset to score on, as named by `embcache probe`."] = "F",
    seed: Annotated[int, "N", "Seed of folds and subsets."] = 0,
    recipe: str | None,
    home: Path | None,
    ref: DatasetRef,
) -> Answer:
    """Score every cached backbone in seconds, without training, to see which ones are worth probing.

    Rows are ordered by the mean rank of LogME, nearest centroid and k-NN; the H-score is shown too. Only training
    images are used. Saved linear probes of the same target and their rank correlation are shown for comparison. By
    default, all datasets with cached features are ranked. H-score and nearest centroid are of classes; a number and
    findings (--target) are ranked by LogME and k-NN.

    Example: embcache rank --dataset pneumonia
    """
    from embcache.figures.rank import rank
    from embcache.figures.shown import open_datasets

    opened = open_datasets(dataset, ref, home)
    rankings = [rank(ds, backbone, home=home, recipe=recipe, seed=seed, subset=subset) for ds in opened]
    first = rankings[0]
    best = ["--backbone", first.rows[0].backbone, "--dataset", first.dataset]
    following = ["probe", "--head", "linear", "--subset", "S,M,F", *best]
    show = partial(_print_ranking, home=home)
    return Answer([ranking.to_json() for ranking in rankings], lambda: echo_each(rankings, show), following)


def _print_ranking(ranking: Ranking, home: Path | None) -> None:
    from embcache.figures.rank import ORDER, SCORES
    from embcache.probe.metrics import metric_title

    metric = metric_title(ranking.metric)
    subsets = list(dict.fromkeys(subset for row in ranking.rows for subset in row.probes))
    headers = ["backbone", "LogME", "H-score", f"nearest centroid {metric}", f"k-NN {metric}", "mean rank"]
    rows = []
    for row in ranking.rows:
        scores = (row.logme, row.h_score, row.centroid, row.knn)
        probes = [f"{row.probes[subset]:.4f}" if subset in row.probes else "" for subset in subsets]
        shown = ("–" if math.isnan(score) else f"{score:.4f}" for score in scores)
        rows.append([row.backbone, *shown, f"{row.place:.2f}", *probes])
    echo(
        f"{ranking.dataset}: subset {ranking.subset}, {ranking.n_train:,} training images per fold, "
        f"{ranking.labels_used:,} labels used in total"
    )
    print_table([*headers, *(f"linear {s} ({ranking.probe_labels[s]:,} labels)" for s in subsets)], rows)
    ordering = ", ".join(SCORES[key] for key in ORDER if not math.isnan(vars(ranking.rows[0])[key]))
    no_part = "; the H-score takes no part, because it is high for permuted labels too"
    notes = [
        *ranking.notes,
        "labels: training + validation per fold",
        f"mean rank: by {ordering}" + no_part * (not math.isnan(ranking.rows[0].h_score)),
        "scores use training and validation images only; linear: test score of the saved probe, for comparison",
    ]
    if ranking.correlations:
        echo("\nrank correlation with the linear probe: Kendall's τ / Spearman's ρ (backbones)")
        cells = {(c.score, c.subset): f"{c.kendall:.2f} / {c.spearman:.2f} ({c.n})" for c in ranking.correlations}
        chosen = [subset for subset in subsets if ("place", subset) in cells]
        labels = {**SCORES, "place": "mean rank"}
        table = [[labels[k], *(cells.get((k, s), "") for s in chosen)] for k in dict.fromkeys(k for k, _ in cells)]
        print_table(["score", *(f"linear {subset}" for subset in chosen)], table)
    else:
        words = command_line("probe", "--head", "linear", "--subset", "S,M,F", "--dataset", ranking.dataset, home=home)
        notes.append(f"no correlation: it takes linear probes of three backbones at one subset: {words}")
    echo_notes(notes)


@command(table=True)
def similarity(
    *,
    dataset: list[str],
    backbone: list[str],
    seed: Annotated[int, "N", "Seed of the images drawn, where there are many."] = 0,
    recipe: str | None,
    home: Path | None,
    ref: DatasetRef,
) -> Answer:
    """Compare the embeddings of cached backbones on the same training images: linear CKA and mutual k-NN.

    Low values mean embeddings that complement each other. By default, all datasets with two cached backbones are
    compared.

    Example: embcache similarity --dataset pneumonia
    """
    from embcache.figures.rank import similarity
    from embcache.figures.shown import open_datasets

    opened = open_datasets(dataset, ref, home, several=True)
    found = [similarity(ds, backbone, home=home, recipe=recipe, seed=seed) for ds in opened]
    return Answer([each.to_json() for each in found], lambda: echo_each(found, _print_similarity))


def _print_similarity(found: Similarity) -> None:
    echo(f"{found.dataset}: {found.n:,} training images")
    share = f"mutual k-NN, k = {found.k}: share of an image's nearest images that are the same"
    for title, matrix in (("linear CKA, debiased", found.cka), (share, found.neighbors)):
        echo(f"\n{title}")
        lines = zip(found.backbones, matrix.tolist(), strict=True)
        print_table(["", *found.backbones], [[name, *(f"{value:.3f}" for value in row)] for name, row in lines])
    chance = f"CKA of unrelated embeddings is 0, mutual k-NN {found.k / (found.n - 1):.4f} by chance"
    echo_notes([*found.notes, f"1: the same but for rotation, scale and shift; {chance}"])
