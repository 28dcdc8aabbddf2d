"""``embcache gc``: freeing what nothing needs."""

from __future__ import annotations

from typing import Annotated

import typer

from embcache.commands.options import BackboneOption, DatasetOption, HomeOption, JsonOption, split_list, write_json
from embcache.commands.output import echo
from embcache.commands.store import RecipeOption, printable, size_words
from embcache.commands.table import print_table
from embcache.errors import StoreError
from embcache.paths import home_dir


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
    are kept. Killed at any instant nothing is lost. A store in which another process is computing is refused, a
    damaged one too.

    Example: embcache gc --dry-run --dataset nih
    """
    from embcache.upkeep.gc import collect, collect_dataset
    from embcache.upkeep.verify import find_stores

    backbones, datasets = split_list(backbone), split_list(dataset)
    stores = [path for name in (datasets or (None,)) for path in find_stores(home, name, backbones, recipe)]
    answers, refused = [], []
    quiet = json == "-"
    for path in stores:
        label = f"{path.parent.name}/{path.name}"
        try:
            done = collect(
                path,
                dry_run=dry_run,
                say=lambda line, label=label: echo(f"{label}: {printable(line)}", err=True),  # type: ignore[misc]
            )
        except StoreError as error:
            echo(f"embcache: {label}: {error}", err=True)
            refused.append({"path": str(path), "error": str(error)})
            continue
        answers.append(done)
    beside = {folder: collect_dataset(folder, dry_run=dry_run) for folder in sorted({path.parent for path in stores})}
    freed = sum(answer.freed for answer in answers) + sum(found["freed"] for found in beside.values())
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
        more = sum(found["leftovers"] for found in beside.values())
        notes = [f"{more} half-written files beside the stores"] if more else []
        verb = "would be freed" if dry_run else "freed"
        if stores:
            print_table(headers, rows, notes=[*notes, f"{size_words(freed)} {verb} in {home_dir(home)}"])
        else:
            echo(f"nothing is cached in {home_dir(home)}")
    if refused:
        raise typer.Exit(1)
