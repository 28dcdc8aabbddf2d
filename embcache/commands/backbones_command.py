"""``embcache backbones``: what there is, its license, and whether the weights are on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from embcache.backbones.catalog import BACKBONES, Backbone, find_backbone, weights_status
from embcache.backbones.catalog import backbones as registry
from embcache.commands.options import HomeOption, JsonOption, split_list, write_json
from embcache.commands.output import print_table
from embcache.paths import weights_dir


def backbones(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these, with all details.")
    ] = None,
    home: HomeOption = None,
    json: JsonOption = None,
) -> None:
    """List the backbones: features, network, parameters, weights, license, and whether the weights are here.

    There are also: random:SEED, a ResNet-50 from another seed; timm:NAME and timm:hf-hub:ORG/NAME, any model that timm
    builds, such as timm:vit_small_patch14_dinov2.lvd142m; package.module:function, a function that returns a Backbone.
    """
    chosen = [
        find_backbone(name) for name in split_list(names) or [*BACKBONES, *sorted(set(registry) - set(BACKBONES))]
    ]
    rows = [_row(spec, home) for spec in chosen]
    if json is not None:
        write_json(rows, json)
    if json == "-":
        return
    if names:
        for row in rows:
            shown = {key.replace("_", " "): value for key, value in row.items() if value not in ("", [], None)}
            print_table(
                ("field", "value"),
                [(key, ", ".join(map(str, v)) if isinstance(v, list) else v) for key, v in shown.items()],
            )
        return
    print_table(
        ("backbone", "dim", "network", "parameters", "weights", "license", "here"),
        [
            (spec.name, spec.dim, spec.network, f"{spec.parameters:,}", spec.source, spec.license, _here(spec, home))
            for spec in chosen
        ],
        notes=(
            "also random:SEED, timm:NAME, timm:hf-hub:ORG/NAME and package.module:function",
            "for details of one type: embcache backbones NAME",
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
        "license": spec.license,
        "contaminated": list(spec.contaminated),
        "status": weights_status(spec.name, home),
        "url": spec.weights.url,
        "filename": spec.weights.filename,
        "package": spec.weights.package,
    }


def _here(spec: Backbone, home: Path | None) -> str:
    """The status in a word or two; the path is among the details."""
    status = weights_status(spec.name, home)
    return "yes" if status.startswith("here: ") else status.removeprefix("not here: ")
