"""``embcache extract``: images through frozen backbones, once."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embcache.commands.options import (
    AllowMissingOption,
    BackboneOption,
    DataRootOption,
    DatasetOption,
    HomeOption,
    JsonOption,
    MaxPixelsOption,
    MergeClassOption,
    NameOption,
    command,
    refuse_other_merges,
    split_list,
    takes_columns,
    write_json,
)
from embcache.commands.output import echo
from embcache.commands.store_command import size_words
from embcache.commands.table import format_table, print_note, print_table
from embcache.config import parse_weights
from embcache.errors import UsageError, printable

if TYPE_CHECKING:
    from embcache.data.chosen import Columns
    from embcache.extract.extract import Extraction
    from embcache.maintain.dry_run import DryRun

_IDS = 5  # named of each kind by --dry-run


@takes_columns
def extract(
    backbone: BackboneOption = None,
    dataset: DatasetOption = None,
    data_root: DataRootOption = None,
    home: HomeOption = None,
    weights: Annotated[
        list[str] | None,
        typer.Option("--weights", metavar="[NAME=]FILE", help="Checkpoint; NAME= may be left out for one backbone."),
    ] = None,
    transform: Annotated[
        str | None,
        typer.Option(
            "--transform",
            metavar="paper|imagenet|model",
            help="paper: 256×256, centre 224, images of up to 224 as they are. imagenet: shorter side 256, centre 224. "
            "model: a timm: backbone's own. [default: paper; model for timm: backbones]",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device", metavar="NAME[,NAME…]", help="auto, cpu, cuda:0, …; several share the work, a process each."
        ),
    ] = "auto",
    precision: Annotated[
        str, typer.Option("--precision", metavar="KIND", help="fp32, tf32, bf16 or fp16; part of the recipe.")
    ] = "fp32",
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            metavar="N",
            help="Images per batch. [default: the store's; 16 on a CPU and 64 on a GPU for a new one]",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", metavar="N", help="Threads that decode images. [default: one per core, at most 8]"),
    ] = None,
    rows_per_shard: Annotated[
        int | None,
        typer.Option(
            "--rows-per-shard",
            metavar="N",
            help="Images computed and committed together; Ctrl-C waits for them. Settled when a store is made. "
            "[default: 64 on a CPU, 4096 on a GPU; more above 131,072 and 8,388,608 images]",
        ),
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", metavar="zarr|hdf5", help="Format of a new store. [default: zarr]")
    ] = None,
    part: Annotated[
        str | None, typer.Option("--part", metavar="I/N", help="Compute only the I-th of N parts (array jobs).")
    ] = None,
    views: Annotated[
        int,
        typer.Option(
            "--views",
            metavar="V",
            help="Views of each image: the plain one and V - 1 augmented as its modality allows (a store of its own).",
        ),
    ] = 1,
    feature_dtype: Annotated[
        str,
        typer.Option(
            "--feature-dtype", metavar="float32|float16", help="As which features are kept; part of the recipe."
        ),
    ] = "float32",
    on_error: Annotated[
        str,
        typer.Option(
            "--on-error",
            metavar="quarantine|fail",
            help="Leave an image that cannot be used out, with the reason, or stop at the first.",
        ),
    ] = "quarantine",
    max_bad: Annotated[
        str,
        typer.Option(
            "--max-bad", metavar="N|P%", help="Stop above so many quarantined images (of a share, one may be)."
        ),
    ] = "1%",
    retry_quarantined: Annotated[
        bool, typer.Option("--retry-quarantined", help="Look at quarantined images again, changed or not.")
    ] = False,
    max_pixels: MaxPixelsOption = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what would be computed (of all parts) and why, field by field; nothing is written."
        ),
    ] = False,
    allow_missing: AllowMissingOption = False,
    name: NameOption = None,
    merge_class: MergeClassOption = None,
    json: JsonOption = None,
    *,
    columns: Columns,
) -> None:
    """Run frozen backbones once over all images into feature stores.

    Only what is not cached is computed: a second run returns at once, an interrupted one goes on where it stopped,
    an added or changed image extracts only itself.

    Example: embcache extract --backbone random,effnet_lite0 --dataset pneumonia
    """
    names, datasets = split_list(backbone), split_list(dataset)
    if not names:
        raise UsageError(
            "no backbone was named", fix="embcache extract --backbone NAME …   (embcache backbones lists them)"
        )
    if not datasets:
        raise UsageError(
            "no dataset was named", fix="embcache extract --dataset NAME …   (embcache datasets lists them)"
        )
    if len(datasets) > 1 and (data_root or name):
        raise UsageError(
            "--data-root and --name belong to one dataset", found=", ".join(datasets), fix="one command a dataset"
        )
    from embcache.data.dataset import find_dataset
    from embcache.extract.extract import run_extraction
    from embcache.extract.signals import Stop, exit_status, stop_on_signals
    from embcache.maintain.dry_run import dry_run as explain

    answers, stop = list[dict[str, Any]](), Stop()
    for each in datasets:
        found, _ = find_dataset(
            each, root=data_root, home=home, allow_missing=allow_missing, dataset_name=name, columns=columns
        )
        refuse_other_merges(merge_class, found)
        for note in found.notes:
            print_note(note)
        if dry_run:
            for answer in explain(
                names,
                found,
                home=home,
                weights=parse_weights(weights or (), names),
                transform=transform,
                device=device,
                precision=precision,
                views=views,
                feature_dtype=feature_dtype,
                retry_quarantined=retry_quarantined,
                max_pixels=max_pixels,
            ):
                answers.append({"dataset": found.name, **answer.to_json()})
                if json != "-":
                    echo("\n".join(_dry_run_words(found.name, answer)))
            continue
        try:
            with stop_on_signals(stop):
                done = run_extraction(
                    names,
                    found,
                    home=home,
                    weights=parse_weights(weights or (), names),
                    transform=transform,
                    device=device,
                    precision=precision,
                    batch_size=batch_size,
                    workers=workers,
                    rows_per_shard=rows_per_shard,
                    format=format,
                    part=_parse_part(part),
                    views=views,
                    feature_dtype=feature_dtype,
                    on_error=on_error,
                    max_bad=max_bad,
                    retry_quarantined=retry_quarantined,
                    max_pixels=max_pixels,
                    stop=stop,
                    say=print_note,
                )
        except (KeyboardInterrupt, SystemExit):
            _say_how_to_go_on("stopped at once: what is committed stays")
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
    left, others = max(extraction.undone for extraction in done), datasets[datasets.index(each) + 1 :]
    if stop.signal is not None and (left or others):
        rest = f"{left:,} images of {found.name}" if left else ""
        rest += (" and " if left and others else "") + (f"the images of {', '.join(others)}" if others else "")
        _say_how_to_go_on(f"stopped after the current shard, which is committed; {rest} are left")
        raise SystemExit(exit_status(stop.signal))


def _say_how_to_go_on(what: str) -> None:
    command = shlex.join(["embcache", *sys.argv[1:]])
    echo(f"\n{what}; the same command goes on from there:\n  {command}", err=True)


def _parse_part(value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    index, _, count = value.partition("/")
    if not (index.isdecimal() and count.isdecimal() and len(value) <= 24):
        raise UsageError("--part is not of the form I/N", expected="--part 1/4 … --part 4/4", found=value)
    return int(index), int(count)


def _print(dataset: str, images: int, done: list[Extraction], home: Path | None) -> None:
    rows = [
        [e.backbone, images, e.cached, e.computed, len(e.quarantined), f"{e.seconds:.1f}", e.store.path.name]
        for e in done
    ]
    headers = ["backbone", "images", "cached", "computed", "quarantined", "seconds", "store"]
    notes = [note for extraction in done for note in extraction.notes]
    bad = {image: reason for extraction in done for image, reason in extraction.quarantined.items()}
    notes += [f"quarantined: {image}: {reason}" for image, reason in list(bad.items())[:5]]
    if len(bad) > 5:
        notes.append(f"… and {len(bad) - 5} more quarantined images (embcache info)")
    left = max(extraction.left for extraction in done)
    if left:
        notes.insert(0, f"not complete: {left:,} images are owed still")
    elif not any(extraction.computed for extraction in done):
        notes.insert(0, "complete: every image was cached already, nothing was computed")
    changed = max((e.changed for e in done), default=0)
    if changed:
        notes.append(f"{changed} images changed since they were extracted and were extracted again")
    retried = max(extraction.retried for extraction in done)
    if retried:
        notes.append(f"{retried} quarantined images were looked at again")
    print_table(headers, rows, notes=notes)
    if left:
        return
    views = done[0].store.views
    words = ["--head", "linear", "--subset", "S,M,F", "--dataset", dataset]
    echo("next: " + command("probe", *words, *(["--views", str(views)] if views > 1 else []), home=home))


def _as_json(dataset: str, extraction: Extraction) -> dict[str, object]:
    return {
        "dataset": dataset,
        "backbone": extraction.backbone,
        "store": str(extraction.store.path),
        "fingerprint": extraction.store.recipe.fingerprint,
        "views": extraction.store.views,
        "computed": extraction.computed,
        "cached": extraction.cached,
        "added": extraction.added,
        "changed": extraction.changed,
        "retried": extraction.retried,
        "left": extraction.left,
        "rows_per_shard": extraction.store.rows_per_shard,
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
        for kind, ids in (("added", answer.added), ("changed", answer.changed), ("removed", answer.removed)):
            if ids:
                more = ", …" if len(ids) > _IDS else ""
                lines.append(f"{kind}: {len(ids):,} ({printable(', '.join(ids[:_IDS]))}{more})")
    what = f"{answer.owed:,} of {answer.images:,} images, {size_words(answer.bytes)} of features"
    return [*lines, f"an extraction would compute {what if answer.owed else 'nothing'}"]


def _short(value: Any) -> str:
    text = "(not there)" if value is None else str(value)
    return text if len(text) <= 44 else f"{text[:20]}…{text[-12:]}"
