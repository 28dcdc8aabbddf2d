"""``embcache why``: what an extraction would compute, for which reason, and what it would cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from embcache.commands.extract import parse_weights
from embcache.commands.options import (
    AllowMissingOption,
    BackboneOption,
    DataRootOption,
    DatasetOption,
    HomeOption,
    JsonOption,
    NameOption,
    split_list,
    takes_columns,
    write_json,
)
from embcache.commands.output import echo
from embcache.commands.store import size_words
from embcache.commands.table import format_table, one_line
from embcache.errors import UsageError

if TYPE_CHECKING:
    from embcache.data.chosen import Columns
    from embcache.upkeep.why import Why

_IDS = 5


@takes_columns
def why(
    backbone: BackboneOption = None,
    dataset: DatasetOption = None,
    data_root: DataRootOption = None,
    home: HomeOption = None,
    weights: Annotated[
        list[str] | None,
        typer.Option("--weights", metavar="[NAME=]FILE", help="Checkpoint; NAME= may be left out for one backbone."),
    ] = None,
    transform: Annotated[
        str | None, typer.Option("--transform", metavar="paper|imagenet|model", help="As for embcache extract.")
    ] = None,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda:0, …")] = "auto",
    precision: Annotated[
        str, typer.Option("--precision", metavar="KIND", help="fp32, tf32, bf16 or fp16; part of the recipe.")
    ] = "fp32",
    feature_dtype: Annotated[
        str, typer.Option("--feature-dtype", metavar="float32|float16", help="As which features are kept.")
    ] = "float32",
    views: Annotated[int, typer.Option("--views", metavar="V", help="Views of each image.")] = 1,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", help="Images a batch, for the measurement.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", help="Threads that decode images, for the measurement.")
    ] = None,
    allow_missing: AllowMissingOption = False,
    name: NameOption = None,
    json: JsonOption = None,
    *,
    columns: Columns,
) -> None:
    """Say why an extraction would compute anything, and what it would cost; nothing is written.

    Field by field, what differs between the recipe that these flags ask for and every cached one of the backbone;
    which images were added, changed or removed; how many images a run would compute, at which speed (measured on some
    of them, on this device), in what time and how much disk space.

    Example: embcache why --backbone dino --dataset nih --precision bf16
    """
    names, datasets = split_list(backbone), split_list(dataset)
    if not names:
        raise UsageError(
            "no backbone was named", fix="embcache why --backbone NAME …   (embcache ls says what is there)"
        )
    if len(datasets) != 1:
        raise UsageError(
            "one dataset at a time", found=", ".join(datasets) or "none", fix="embcache why --dataset NAME …"
        )
    from embcache.data.dataset import find_dataset
    from embcache.upkeep.why import explain

    found, _ = find_dataset(
        datasets[0], root=data_root, home=home, allow_missing=allow_missing, dataset_name=name, columns=columns
    )
    answers = explain(
        names,
        found,
        home=home,
        weights=parse_weights(weights, names),
        transform=transform,
        device=device,
        precision=precision,
        views=views,
        feature_dtype=feature_dtype,
        batch_size=batch_size,
        workers=workers,
        say=lambda line: echo(f"{line} …", err=True),
    )
    if json:
        write_json([{"dataset": found.name, **answer.to_json()} for answer in answers], json)
    if json == "-":
        return
    for index, answer in enumerate(answers):
        echo(("\n" if index else "") + "\n".join(_in_words(found.name, answer)))


def _in_words(dataset: str, answer: Why) -> list[str]:
    lines = [f"{answer.backbone} over {dataset}, recipe {answer.fingerprint[:12]}"]
    if answer.match is not None:
        lines.append(f"cached under just this recipe: {answer.match.path.name}")
    elif answer.cached:
        lines.append("not cached under this recipe: all images would be computed, into a store of their own")
    else:
        lines.append("nothing of this backbone is cached for this dataset")
    for each in answer.cached:
        if each.problem:
            lines.append(f"{each.path.name} cannot be read: {one_line(each.problem)}")
        elif each.differs:
            lines += ["", f"{each.path.name} ({each.rows:,} images) differs in:"]
            rows = [[field, _short(mine), _short(theirs)] for field, (mine, theirs) in each.differs.items()]
            lines += ["  " + line for line in format_table(["field", "wanted", "cached"], rows).split("\n")]
    lines.append("")
    if answer.match is not None:
        lines.append(f"images: {answer.images:,}, of which {answer.held:,} are cached")
        for kind, ids in (("added", answer.added), ("changed", answer.changed), ("removed", answer.removed)):
            if ids:
                more = ", …" if len(ids) > _IDS else ""
                lines.append(f"  {kind}: {len(ids):,} ({one_line(', '.join(ids[:_IDS]))}{more})")
    else:
        lines.append(f"images: {answer.images:,}, none of them cached under this recipe")
    return [*lines, _cost_words(answer)]


def _cost_words(answer: Why) -> str:
    cost = answer.cost
    if not cost.images:
        return "an extraction would compute nothing"
    speed = "none of the measured images can be read"
    if cost.rate is not None and cost.seconds is not None:
        speed = f"{cost.rate:.3g} images/s on {cost.device}: {duration_words(cost.seconds)}"
    room = f"{size_words(cost.bytes)} of disk space, {size_words(cost.free)} are free"
    return f"an extraction would compute {cost.images:,} images; {speed}; {room}"


def duration_words(seconds: float) -> str:
    """A duration as people say it: ``3.2 s``, ``14 min``, ``5 h 20 min``."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 60 * 72 else f"{minutes / 60 / 24:.1f} days"


def _short(value: Any) -> str:
    text = "(not there)" if value is None else str(value)
    return text if len(text) <= 44 else f"{text[:20]}…{text[-12:]}"
