"""``embcache extract``: images through frozen backbones, once."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embcache.backbones.weights import weights_by_name
from embcache.commands.options import (
    BackboneOption,
    DatasetOption,
    HomeOption,
    JsonOption,
    Skip,
    command,
    refuse_other_merges,
    split_list,
    takes_configs,
    write_json,
)
from embcache.commands.output import echo, format_table, print_table
from embcache.commands.store_command import size_words
from embcache.config import DatasetRef, ExtractConfig
from embcache.errors import UsageError, first_few, printable
from embcache.log import log

if TYPE_CHECKING:
    from embcache.extract.extract import Extraction
    from embcache.maintain.dry_run import DryRun


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
    from embcache.maintain.dry_run import dry_run as explain

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
