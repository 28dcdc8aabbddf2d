"""What benchmarks share: the cost of a program run from the shell, medians of ratios, and tables with the machine."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What a program took: seconds of wall time and of processors, peak resident megabytes."""

    wall: float
    cpu: float
    peak: float


def shell(*arguments: str, python: str = sys.executable) -> Cost:
    """Run a Python program that must succeed."""
    began = time.perf_counter()
    process = subprocess.Popen([python, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    stdout, stderr = process.stdout, process.stderr
    assert stdout is not None
    assert stderr is not None
    with stdout, stderr:
        said = stdout.read() + stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(said.decode())
    return Cost(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000)


def told(costs: list[Cost]) -> str:
    """Medians of wall and processor time."""
    return f"{statistics.median(c.wall for c in costs):.1f} s ({statistics.median(c.cpu for c in costs):.1f} s CPU)"


def faster(ours: list[Cost], theirs: list[Cost]) -> str:
    """Median ratios, run by run; that of processor time does not see what else a busy machine does."""
    wall = statistics.median(t.wall / o.wall for o, t in zip(ours, theirs, strict=True))
    cpu = statistics.median(t.cpu / o.cpu for o, t in zip(ours, theirs, strict=True))
    return f"{wall:.1f} × as fast ({cpu:.1f} × by CPU time)"


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print Markdown, with the machine and the versions beneath."""
    for row in [header, ["---"] * len(header), *rows]:
        print(f"| {' | '.join(row)} |")
    print(f"\n{machine()}")


def machine(packages: Sequence[str] = ("torch", "numpy", "scikit-learn", "zarr")) -> str:
    """Cores, processor and versions, for the caption."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{cores} cores of {model} (load {os.getloadavg()[0]:.1f}), CPython {platform.python_version()}, {versions}"
