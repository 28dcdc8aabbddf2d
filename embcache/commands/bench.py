"""``embcache bench``: what each stage reaches on this machine."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from embcache.commands.options import DataRootOption, HomeOption, JsonOption, write_json
from embcache.commands.output import echo
from embcache.commands.table import print_table


def bench(
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", metavar="NAME", help="Whose images to decode. [default: a cached one, if any]"),
    ] = None,
    data_root: DataRootOption = None,
    home: HomeOption = None,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="Where heads are trained: cpu, cuda, cuda:0, …")
    ] = "cpu",
    json: JsonOption = None,
) -> None:
    """Measure reading, training and decoding on this machine, and what share of its ceiling each reaches.

    Features are made up and written to a temporary folder; images are those of a dataset that is at hand. It takes
    some half a minute.

    Example: embcache bench --dataset pneumonia
    """
    from embcache.upkeep.bench import run_bench

    tell = sys.stderr.isatty()
    answer = run_bench(
        dataset,
        data_root=data_root,
        home=home,
        device=device,
        say=lambda stage: echo(f"{stage} …", err=True) if tell else None,
    )
    if json:
        write_json(answer.to_json(), json)
    if json == "-":
        return
    rows = [
        [m.stage, _number(m.rate), f"{m.unit}/s", "" if m.share is None else f"{m.share:.2f} of {m.ceiling}"]
        for m in answer.measured
    ]
    machine = ", ".join(f"{name} {value}" for name, value in answer.machine.items())
    print_table(["stage", "speed", "", "share"], rows, notes=[*answer.notes, machine])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
