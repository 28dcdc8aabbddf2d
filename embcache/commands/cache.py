"""``embcache ls``, ``info``, ``export`` and ``gc``: the stores of a home."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embcache.commands.options import (
    BackboneOption,
    DatasetOption,
    HomeOption,
    JsonOption,
    RecipeOption,
    Skip,
    echo_near,
    split_list,
    takes_configs,
    write_json,
)
from embcache.commands.output import echo, one_line, print_note, print_table
from embcache.config import DatasetRef, ExportConfig
from embcache.errors import StoreError, StoreNotFoundError, UsageError
from embcache.paths import home_dir
from embcache.typed import plain

if TYPE_CHECKING:
    from embcache.maintain.listing import InterruptedRun, StoreInfo


def ls(dataset: DatasetOption = None, home: HomeOption = None, json: JsonOption = None) -> None:
    """List the cached stores, one per line, and count the runs.

    `to go` counts images of the dataset that have no features yet: `embcache extract` computes just those.

    Example: embcache ls --dataset pneumonia
    """
    from embcache.maintain.listing import count_runs, list_cached, list_interrupted

    names = split_list(dataset)
    stores = [row for name in (names or (None,)) for row in list_cached(home, name)]
    runs = count_runs(home)
    begun = [run for name in (names or (None,)) for run in list_interrupted(home, name)]
    if json:
        write_json({"stores": plain(stores), "runs": runs, "interrupted": plain(begun)}, json)
    if json == "-":
        return
    where = home_dir(home)
    if not stores:
        echo(f"nothing is cached in {where}" + (f" for {', '.join(names)}" if names else ""))
        echo_near(names, home)
        for note in map(_go_on, begun):
            echo(note)
        echo("next: embcache demo, or embcache extract --backbone NAME --dataset NAME")
        return
    rows = []
    for s in stores:
        state = "damaged" if s.problem else f"{s.owed:,} to go" if s.owed else "complete"
        facts = [f"{s.rows:,}", s.quarantined, s.precision, s.transform, s.format, size_words(s.bytes)]
        rows.append([s.dataset, s.backbone, s.fingerprint, *([""] * len(facts) if s.problem else facts), state])
    headers = [
        "dataset", "backbone", "recipe", "rows", "quarantined", "precision", "transform", "format", "size", "state",
    ]  # fmt: skip
    notes = [f"in {where}: {size_words(sum(s.bytes for s in stores))} in {len(stores)} stores"]
    if runs:
        notes.append("runs: " + ", ".join(f"{name} {number}" for name, number in runs.items()) + " (embcache results)")
    notes += [f"{s.dataset}/{s.path.name} is damaged: {s.problem}; try: embcache info" for s in stores if s.problem]
    print_table(headers, rows, notes=[*notes, *map(_go_on, begun)])


def info(
    backbone: BackboneOption = None,
    dataset: DatasetOption = None,
    recipe: RecipeOption = None,
    home: HomeOption = None,
    json: JsonOption = None,
) -> None:
    """Describe stores in full: recipe, shards, quarantine, where the files lie.

    Without options, every store.

    Example: embcache info --backbone dino --dataset nih
    """
    from embcache.maintain.listing import store_info
    from embcache.store.feature_store import list_stores

    backbones, datasets = split_list(backbone), split_list(dataset)
    found = [
        store
        for name in (datasets or (None,))
        for store in list_stores(home, name, pixels=True)
        if (not backbones or store.recipe.backbone in backbones) and store.recipe.fingerprint.startswith(recipe or "")
    ]
    if not found:
        raise nothing_cached(backbones, datasets, recipe, home)
    answers = [store_info(store, home) for store in found]
    if json:
        write_json([answer.to_json() for answer in answers], json)
    if json != "-":
        echo("\n\n".join(map(_in_words, answers)))


def nothing_cached(
    backbones: list[str], datasets: list[str], recipe: str | None, home: Path | None
) -> StoreNotFoundError:
    """The error where the options of a command match no store."""
    flags = {"--backbone": ",".join(backbones), "--dataset": ",".join(datasets), "--recipe": recipe}
    given = " ".join(f"{flag} {value}" for flag, value in flags.items() if value)
    return StoreNotFoundError(
        "nothing is cached" + (f" for {given}" if given else ""), code="store-not-found", where=home_dir(home),
        fix="embcache ls",
    )  # fmt: skip


@takes_configs
def export(
    target: Annotated[Path, typer.Argument(help="File to write: .npz, .parquet, .csv, .zarr or .h5.")],
    backbone: BackboneOption = None,
    dataset: DatasetOption = None,
    home: HomeOption = None,
    *,
    config: ExportConfig,
    ref: Annotated[DatasetRef, Skip("drop_class", "merge_class", "target")],
) -> None:
    """Write features, labels, groups and splits of one store as one file for other tools.

    Rows are in the dataset's order; images that could not be read are left out. npz, Zarr and HDF5 hold the arrays
    features, ids, labels, groups, split and class_names; Parquet and CSV the columns id, label, class_name, group,
    split, f0, f1, … (of several views v0_f0, …, v1_f0, …).

    Example: embcache export features.npz --backbone dino --dataset nih
    """
    from embcache.data.dataset import find_dataset
    from embcache.maintain.export import export_features
    from embcache.store.feature_store import open_store

    backbones, datasets = split_list(backbone), split_list(dataset)
    if len(backbones) != 1 or len(datasets) != 1:
        raise UsageError(
            "an export is of one backbone over one dataset", code="export-one-store",
            found=f"backbones: {', '.join(backbones) or 'none'}; datasets: {', '.join(datasets) or 'none'}",
            fix="embcache export TARGET --backbone NAME --dataset NAME   (embcache ls lists what is cached)",
        )  # fmt: skip
    found, origin = find_dataset(datasets[0], ref, home=home)
    store = open_store(backbones[0], found, home=home, recipe=config.recipe, views=config.views)
    written = export_features(store, found, target, format=config.format, overwrite=config.force)
    echo(f"{target}: {written:,} rows of {store.row_shape} {store.dtype}")
    print_note(f"labels and splits are from the {origin} dataset")
    if store.quarantined:
        print_note(f"{len(store.quarantined):,} images that could not be read are left out")


def _go_on(run: InterruptedRun) -> str:
    how = run.command or "repeat its command with --resume"
    return (
        f"unfinished: {run.dataset} {run.id}, {size_words(run.bytes)} of checkpoints; unless it is running, continue: "
        f"{how}; or rm -r '{run.path}'"
    )


def _in_words(answer: StoreInfo) -> str:
    store, summary, recipe = answer.store, answer.summary, answer.store.recipe
    bad, pixels = list(store.quarantined.items()), store.holds_pixels
    left = f"{answer.superseded:,} superseded" if answer.superseded else "none superseded"
    state = f"{summary.owed:,} images to go" if summary.owed else "complete"
    lines = [
        ("dataset", summary.dataset),
        ("backbone", recipe.backbone),
        *([] if pixels else [("network", recipe.architecture), ("weights", f"sha256 {recipe.weights_sha256}")]),
        ("transform", summary.transform),
        *((f"  {name}", value) for name, value in _flat(recipe.transform)),
        ("decoder", recipe.decoder),
        *([] if pixels else [("pooling", recipe.pooling), ("precision", recipe.precision)]),
        ("numerics", recipe.numerics),
        ("fingerprint", recipe.fingerprint),
        ("pixels" if pixels else "features", f"{summary.rows:,} × {store.row_shape} {store.dtype}, {state}"),
        ("rows", f"{left}, {summary.quarantined:,} quarantined"),
        *((f"  {id_}", reason) for id_, reason in bad[:20]),
        *([("  …", f"and {len(bad) - 20:,} more (--json - lists all)")] if len(bad) > 20 else []),
        (
            "shards",
            f"{answer.shards} of up to {store.rows_per_shard} rows, {len(answer.uncommitted)} planned and not there",
        ),
        ("created with", f"batch size {store.batch_size}, {store.threads} threads, runtime {store.runtime}"),
        *((f"  {name}", value) for name, value in store.provenance.items()),
        *_otherwise(answer),
        ("format", f"{store.format}, {size_words(summary.bytes)}"),
        ("path", store.path),
        ("plain readers", answer.view or "no view yet: embcache extract writes it"),
    ]
    width = max(len(one_line(name)) for name, _ in lines if len(name) <= 40)
    return "\n".join(f"{one_line(name):<{width}}  {one_line(str(value))}" for name, value in lines)


def _otherwise(answer: StoreInfo) -> list[tuple[str, str]]:
    """How the other shards were computed that differ from the store's settings: those alike on one line."""
    store, alike = answer.store, dict[str, list[int]]()
    for number, made in answer.otherwise.items():
        words = f"batch {made.batch_size or store.batch_size}, {made.threads or store.threads} threads"
        alike.setdefault(words, []).append(number)
    return [
        ("computed with", f"{words}: {len(numbers)} of {answer.shards} shards, the first {numbers[0]:06d}")
        for words, numbers in alike.items()
    ]


def _flat(transform: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Parameters of a transform; those of its augmentation as ``augment.NAME``."""
    lines: list[tuple[str, Any]] = []
    for name, value in transform.items():
        lines += [(f"{name}.{inner}", v) for inner, v in value.items()] if isinstance(value, dict) else [(name, value)]
    return lines


def size_words(number: int) -> str:
    """A number of bytes as people say it: ``12.3 MB``."""
    size, units = float(number), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" or size >= 100 else f"{size:.1f} {units[0]}"


def gc(
    backbone: BackboneOption = None,
    dataset: DatasetOption = None,
    recipe: RecipeOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be freed, and change nothing.")] = False,
    home: HomeOption = None,
    json: JsonOption = None,
) -> None:
    """Free what nothing needs: rows that newer ones of the same image have replaced, and what killed processes left.

    Rows in use are copied, not computed, into new shards before the old ones are removed; rows of images that left the
    dataset are kept. Nothing is lost if the command is killed, and other commands may run at the same time: rows that
    one of them is to compute stay where they are. A damaged store is refused.

    Example: embcache gc --dry-run --dataset nih
    """
    from embcache.maintain.gc import collect, collect_home
    from embcache.maintain.listing import walk_stores

    backbones, datasets = split_list(backbone), split_list(dataset)
    done = list[Any]()
    stores, refused = walk_stores(home, datasets, backbones, recipe)
    for path in stores:
        try:
            done.append(collect(path, dry_run=dry_run))
        except (StoreError, OSError) as error:
            echo(f"embcache: {path.parent.name}/{path.name}: {error}", err=True)
            refused.append({"path": str(path), "error": str(error)})
    beside = collect_home(home, datasets, dry_run=dry_run)
    freed = sum(each.freed for each in done) + beside["freed"]
    if json:
        write_json({"dry_run": dry_run, "freed": freed, "stores": plain(done), "refused": refused}, json)
    if json != "-" and stores:
        rows = [
            [c.dataset, c.path.name, c.superseded, c.moved, c.shards, c.leftovers, size_words(c.freed)] for c in done
        ]
        headers = ["dataset", "store", "superseded", "copied", "shards removed", "leftovers", "freed"]
        notes = [f"{beside['leftovers']} leftovers beside the stores"] if beside["leftovers"] else []
        verb = "would be freed" if dry_run else "freed"
        print_table(headers, rows, notes=[*notes, f"{size_words(freed)} {verb} in {home_dir(home)}"])
    elif json != "-" and not refused:
        echo(f"nothing is cached in {home_dir(home)}")
    if refused:
        raise typer.Exit(1)
