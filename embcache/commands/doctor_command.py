"""``embcache doctor``: what a bug report needs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from embcache.commands.options import HomeOption, JsonOption, write_json
from embcache.commands.output import echo, one_line
from embcache.commands.store_command import size_words

if TYPE_CHECKING:
    from embcache.maintain.doctor import Diagnosis


def doctor(home: HomeOption = None, json: JsonOption = None) -> None:
    """Describe this installation for a bug report, and list what is wrong with it.

    Versions, processor features, devices and the speed they reach, room on the disk against what the stores still
    owe, weights and datasets found, stale leases, interrupted runs, and stores that fail a quick check (headers, plans
    and sizes; `embcache verify` reads every byte). Nothing needs to be cached. Exit status 1 if there is a problem.

    Example: embcache doctor --json report.json
    """
    from embcache.maintain.doctor import diagnose

    found = diagnose(home)
    if json:
        write_json(asdict(found), json)
    if json != "-":
        echo("\n".join(_in_words(found)))
    if found.problems:
        raise typer.Exit(1)


def _in_words(found: Diagnosis) -> list[str]:
    box = found.machine
    memory = "" if box["memory_bytes"] is None else f", {size_words(box['memory_bytes'])} of memory"
    free = "" if box["memory_free_bytes"] is None else f" ({size_words(box['memory_free_bytes'])} free)"
    lines = [
        "versions",
        *_wrapped([f"{name} {number}" for name, number in found.versions.items()]),
        "machine",
        f"  {box['system']}, {box['processor']}, {box['cores']} of {box['cores_of_machine']} cores{memory}{free}",
        f"  processor features: {', '.join(box['features']) or 'not known'}; torch uses {box['kernels']} kernels on "
        f"{box['torch_threads']} threads",
        "devices",
    ]
    for device in found.devices:
        if device["problem"]:
            lines.append(f"  {device['device']} {device['name']}: cannot be used: {device['problem']}")
            continue
        room = "" if device["memory_bytes"] is None else f", {size_words(device['memory_bytes'])}"
        lines.append(
            f"  {device['device']} ({device['name']}{room}): matrices {device['fp32_tflops']:.2f} TFLOPS fp32, "
            f"{device['bf16_tflops']:.2f} bf16; memory {device['memory_gb_s']:.0f} GB/s"
        )
    speed = found.decoding
    lines += [
        f"  decoding ({box['decoder']}): {speed['one_thread']:.0f} images/s of {speed['image']} by one thread, "
        f"{speed['all_threads']:.0f} by {speed['threads']}",
        "folders",
    ]
    for place in found.places:
        there = "there" if place["there"] else "not there yet"
        writable = "" if place["writable"] else ", CANNOT BE WRITTEN"
        lines.append(f"  {place['name']}: {place['path']} ({there}{writable}, {size_words(place['free_bytes'])} free)")
    owed = found.owed
    lines.append(
        f"  {owed['images']:,} images of cached stores are still to extract: {size_words(owed['bytes'])}"
        + ("" if owed["enough"] else ", MORE THAN IS FREE")
    )
    here = [row for row in found.weights if not row["status"].startswith("not ")]
    absent = [row for row in found.weights if row["status"].startswith("not ")]
    lines += ["weights", f"  here: {', '.join(row['backbone'] for row in here) or 'none'}"]
    lines += [f"  {row['backbone']}: {row['status']}" for row in absent]
    lines += ["datasets"]
    lines += [f"  {row['dataset']}: {row['path']}" + ("" if row["there"] else " (not there)") for row in found.datasets]
    lines += [f"stores ({len(found.stores)}, quick check)"]
    for row in found.stores:
        state = f"FAILS: {row['problem']}" if row["problem"] else "well"
        to_go = f", {row['owed']:,} to go" if row["owed"] else ""
        bad = f", {row['quarantined']:,} quarantined" if row["quarantined"] else ""
        left = f", {row['leftovers']} leftovers" if row["leftovers"] else ""
        lines.append(
            f"  {row['dataset']}/{row['store']}: {one_line(state)}; {row['rows']:,} rows{to_go}{bad}{left}, "
            f"{size_words(row['bytes'])}"
        )
    stale = [lease for lease in found.leases if lease["stale"]]
    lines.append(f"leases: {len(found.leases) - len(stale)} at work, {len(stale)} of processes that are gone")
    lines += [f"  {lease['store']}: shard {lease['shard']} (embcache gc removes it)" for lease in stale]
    lines.append(f"interrupted runs: {len(found.interrupted) or 'none'}")
    lines += [f"  {run['dataset']} {run['run']}: {one_line(run['command'])}" for run in found.interrupted]
    lines.append(f"problems: {len(found.problems) or 'none'}")
    return [*lines, *(f"  {one_line(problem)}" for problem in found.problems)]


def _wrapped(words: list[str]) -> list[str]:
    """Words as lines of at most 100 characters."""
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > 98:
            lines.append("")
        lines[-1] += f", {word}" if lines[-1] else word
    return [f"  {line}" for line in lines]
