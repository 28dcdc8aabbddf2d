"""``embcache gc``: freeing what nothing needs."""

from __future__ import annotations

from typing import Annotated, Any

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
from embcache.commands.output import echo, print_table
from embcache.commands.store_command import size_words
from embcache.errors import StoreError
from embcache.paths import home_dir
from embcache.typed import plain


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
    from embcache.maintain.verify import walk_stores

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
