"""``embcache gc``: freeing what nothing needs."""

from __future__ import annotations

from typing import Annotated

import typer

from embcache.commands.options import (
    BackboneOption,
    DatasetOption,
    HomeOption,
    JsonOption,
    RecipeOption,
    split_list,
    write_json,
)
from embcache.commands.output import echo
from embcache.commands.store_command import size_words
from embcache.commands.table import one_line, print_table
from embcache.errors import StoreError
from embcache.io import skip
from embcache.paths import PathLike, home_dir


def gc(
    backbone: BackboneOption = None,
    dataset: DatasetOption = None,
    recipe: RecipeOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be freed, and change nothing.")] = False,
    home: HomeOption = None,
    json: JsonOption = None,
) -> None:
    """Free what nothing needs: rows that newer ones of the same image have replaced, and what killed processes left.

    Rows in use are copied, not computed, into new shards before the old ones go; rows of images that left the dataset
    are kept. Killed at any instant nothing is lost, and other commands may run at the same time: rows that one of them
    is to compute stay where they are. A damaged store is refused.

    Example: embcache gc --dry-run --dataset nih
    """
    from embcache.maintain.gc import collect, collect_home
    from embcache.maintain.verify import find_stores

    backbones, datasets = split_list(backbone), split_list(dataset)
    answers, refused = [], []

    def unread(path: PathLike, error: OSError) -> None:
        skip(path, error)
        refused.append({"path": str(path), "error": error.strerror or str(error)})

    stores = [path for name in (datasets or (None,)) for path in find_stores(home, name, backbones, recipe, unread)]
    quiet = json == "-"
    for path in stores:
        label = f"{path.parent.name}/{path.name}"
        try:
            done = collect(
                path,
                dry_run=dry_run,
                say=lambda line, label=label: echo(f"{label}: {one_line(line)}", err=True),  # type: ignore[misc]
            )
        except (StoreError, OSError) as error:
            echo(f"embcache: {label}: {error}", err=True)
            refused.append({"path": str(path), "error": str(error)})
            continue
        answers.append(done)
    beside = collect_home(home, datasets, dry_run=dry_run)
    freed = sum(answer.freed for answer in answers) + beside["freed"]
    if json:
        write_json(
            {"dry_run": dry_run, "freed": freed, "stores": [a.to_json() for a in answers], "refused": refused}, json
        )
    if not quiet:
        rows = [
            [a.path.parent.name, a.path.name, a.superseded, a.moved, a.shards, a.leftovers, size_words(a.freed)]
            for a in answers
        ]
        headers = ["dataset", "store", "superseded", "copied", "shards removed", "leftovers", "freed"]
        more = beside["leftovers"]
        notes = [f"{more} leftovers beside the stores"] if more else []
        verb = "would be freed" if dry_run else "freed"
        if stores:
            print_table(headers, rows, notes=[*notes, f"{size_words(freed)} {verb} in {home_dir(home)}"])
        elif not refused:
            echo(f"nothing is cached in {home_dir(home)}")
    if refused:
        raise typer.Exit(1)
