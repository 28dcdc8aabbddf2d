"""``embcache backbones``: what there is, under which licence, and whether the weights are here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embcache.backbones.catalog import BACKBONES, Backbone, find_backbone, weights_status
from embcache.commands.options import HomeOption, JsonOption, split_list, write_json
from embcache.commands.table import print_table
from embcache.paths import weights_dir


def backbones(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these, each with all that is known of it.")
    ] = None,
    home: HomeOption = None,
    json: JsonOption = None,
) -> None:
    """List the backbones: features, network, parameters, weights, licence, and whether the weights are here.

    Besides those listed, random:SEED is a ResNet-50 from another seed, and timm:NAME or timm:hf-hub:ORG/NAME is any
    model that timm builds, for example timm:vit_small_patch14_dinov2.lvd142m.
    """
    chosen = [find_backbone(name) for name in split_list(names)] or list(BACKBONES.values())
    rows = [_row(spec, home) for spec in chosen]
    if json is not None:
        write_json(rows, json)
    if json == "-":
        return
    if names:
        for row in rows:
            details = [
                (key.replace("_", " "), _words(value)) for key, value in row.items() if value not in ("", [], None)
            ]
            print_table(("what", "value"), details)
        return
    print_table(
        ("backbone", "dim", "network", "parameters", "weights", "licence", "here"),
        [
            (spec.name, spec.dim, spec.network, f"{spec.parameters:,}", spec.source, spec.licence, _here(spec, home))
            for spec in chosen
        ],
        notes=(
            "also random:SEED, timm:NAME and timm:hf-hub:ORG/NAME; for more on one: embcache backbones NAME",
            f"weights are taken from --weights NAME=FILE, else from {weights_dir(home)}, else downloaded to it",
        ),
    )


def _row(spec: Backbone, home: Path | None) -> dict[str, object]:
    return {
        "backbone": spec.name,
        "dim": spec.dim,
        "network": spec.network,
        "parameters": spec.parameters,
        "pooling": spec.pooling,
        "patch": spec.patch,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "source": spec.source,
        "licence": spec.licence,
        "contaminated": list(spec.contaminated),
        "status": weights_status(spec.name, home),
        "url": spec.weights.url,
        "filename": spec.weights.filename,
        "package": spec.weights.package,
    }


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _here(spec: Backbone, home: Path | None) -> str:
    """The status in a word or two: the path is among the details."""
    status = weights_status(spec.name, home)
    return "yes" if status.startswith("here: ") else status.removeprefix("not here: ")
