"""Kill, starve and cut off extractions, and print what came of it: ``python -m tests.crash.torture``, ``make torture``.

SIGKILL before and after every call to the filesystem and within every write, every fault at every call, power cuts at
every instant that leaves another disk, some hundreds of random instants, runs side by side, paused writers; over Zarr
and HDF5, one and two backbones (of two, which repeat the calls of one, every fourth call), empty homes and such that
hold an extraction. ``--every N`` takes each N-th.

``--suite`` names others than ``kills``: ``pairs`` of commands on one home, one paused at each of its steps; special
``files`` in every place of a home; hostile ``values`` in every file.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from tests.crash.faults import FAULTS
from tests.crash.hostile import COMMANDS, KINDS, Home, quick
from tests.crash.interleave import COMMANDS as PAIRED
from tests.crash.interleave import World, small
from tests.crash.powerloss import MODES
from tests.crash.runs import CASES, Case, prepare
from tests.crash.trials import Trials

Trial = tuple[str, Callable[[], None]]
SUITES = ("kills", "pairs", "files", "values")
CUTS = 12  # trials that share the instants of one run
LASTING = ("ENOSPC", "EIO")  # faults that are also tried as states: from one call on to the last


def all_trials(trials: Trials, arguments: argparse.Namespace) -> list[Trial]:
    """Every trial with what to call it: first those that chance makes, then those of single calls, shuffled."""
    chance, every, cases = random.Random(arguments.seed), arguments.every, list(trials.calls)
    some: list[Trial] = []
    for number in range(arguments.random):
        case = cases[number % len(cases)]
        seed = chance.random()
        some.append((f"random kills, {case}", lambda c=case, s=seed: trials.kill_at_random(c, random.Random(s))))
    for number in range(arguments.together):
        case = cases[number * 3 % len(cases)]
        seed = chance.random()
        some.append((f"at once, {case}, seed {seed}", lambda c=case, s=seed: trials.many_at_once(c, random.Random(s))))
    for number in range(arguments.pauses):
        case = cases[number % len(cases)]
        at = int((number + chance.random()) / arguments.pauses * trials.calls[case])
        some.append((f"paused at call {at}, {case}", lambda c=case, a=at: trials.pause(c, a)))
    # A second backbone repeats the calls of the first one.
    rest = [t for case in cases for t in _of_case(trials, case, every * (1 + 3 * (len(case.backbones) > 1)), chance)]
    chance.shuffle(rest)
    seen: Counter[str] = Counter()
    for name, trial in rest:
        power = name.startswith("power")  # one such trial has several instants
        kind = ", ".join(name.split(", ")[:2]) if power else name.split(" call")[0]
        seen[kind] += 1
        if arguments.sample is None or seen[kind] <= (1 if power else arguments.sample):
            some.append((name, trial))
    return some


def _of_case(trials: Trials, case: Case, every: int, chance: random.Random) -> Iterator[Trial]:
    """Faults at single calls, and power losses."""

    def at_calls(fault: str, places: Sequence[int], *, onwards: bool = False) -> Iterator[Trial]:
        for at in places[chance.randrange(min(every, len(places))) :: every]:
            name = f"{fault} {'from' if onwards else 'at'} call {at}, {case}"
            yield name, lambda a=at: trials.fault_at_call(case, fault, a, onwards=onwards)

    def cut(mode: str, step: int, offset: int, seed: float) -> Callable[[], None]:
        return lambda: trials.lose_power(case, mode, random.Random(seed), step=step, offset=offset)

    for mode in MODES:
        # Where only what was synced remains, an fsync alone makes another disk.
        step = max(CUTS, CUTS * every // (8 if mode == "synced only" else 1))
        for offset in chance.sample(range(step), CUTS):
            yield f"power losses, {mode}, {case}", cut(mode, step, offset, chance.random())
    for fault, (_, names) in FAULTS.items():
        yield from at_calls(fault, trials.places(case, names))
    for fault in LASTING:
        yield from at_calls(fault, trials.places(case, None)[::4], onwards=True)


def other_trials(suite: str, folder: Path, every: int) -> tuple[Iterator[Trial], list[Counter[str]]]:
    """The trials of a suite other than ``kills``, each with what to call it, and the totals that they add to."""
    if suite == "pairs":
        worlds = [World(folder / name, name) for name in ("zarr", "hdf5")]
        return (trial for world in worlds for trial in _pairs(world, every)), [world.totals for world in worlds]
    home = Home(folder / suite)
    trials = _files(home) if suite == "files" else _values(home)
    return itertools.islice(trials, 0, None, every), [home.totals]


def _pairs(world: World, every: int) -> Iterator[Trial]:
    for first, second in itertools.product(PAIRED, repeat=2):
        steps = [1]
        for at in itertools.count(0, every):
            if at >= steps[0]:
                break

            def trial(at: int = at, steps: list[int] = steps, pair: tuple[str, str] = (first, second)) -> None:
                steps[0] = world.trial(*pair, at)

            yield f"{first} paused at step {at} for {second}, {world.format}", trial


def _files(home: Home) -> Iterator[Trial]:
    for place, kind, command in itertools.product(home.places(), KINDS, COMMANDS):
        yield f"{kind} at {place}, {command}", functools.partial(home.special, place, kind, command)


def _values(home: Home) -> Iterator[Trial]:
    commands = itertools.cycle(COMMANDS)
    for name, write in home.values():
        command = next(commands)

        def trial(write: Callable[[], None] = write, command: str = command) -> None:
            home.start()
            write()
            for each in dict.fromkeys(("results", "results RUN", command)):
                home.command(each)
            home.totals["values"] += 1

        yield f"{name}, {command}", trial


def run_suite(arguments: argparse.Namespace) -> int:
    """A suite other than ``kills``, in this process; prints its totals."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="embcache-torture-", dir=memory if memory.is_dir() else None))
    torch.set_num_threads(1)
    failures, began = [], time.monotonic()
    try:
        with quick(), small():
            trials, totals = other_trials(arguments.suite, folder, arguments.every)
            for number, (name, trial) in enumerate(trials):
                if arguments.minutes and time.monotonic() - began > 60 * arguments.minutes:
                    break
                try:
                    trial()
                except Exception as error:
                    failures.append(f"{name}: {type(error).__name__}: {error}")
                    print(f"FAILED {failures[-1]}", flush=True)
                if number % 500 == 499:
                    print(f"… trial {number + 1}: {name}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, count in sorted(sum(totals, Counter()).items()):
        print(f"{count:>12,} {name}")
    print(f"{len(failures):>12,} failures of {arguments.suite}, in {time.monotonic() - began:.0f} s")
    return bool(failures)


def run_slice(arguments: argparse.Namespace) -> int:
    """Every n-th trial, from the i-th; the totals as JSON on the last line."""
    first, step = (int(number) for number in arguments.slice.split("/"))
    prepare()
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="embcache-torture-", dir=memory if memory.is_dir() else None))
    began = time.monotonic()
    failures = []
    try:
        trials = Trials(folder, [CASES[int(number)] for number in arguments.cases.split(",")])
        mine = all_trials(trials, arguments)[first::step]
        trials.totals["trials planned"] = len(mine)
        for number, (name, trial) in enumerate(mine):
            if number % 200 == 0:
                print(f"… job {first}, trial {number}: {dict(sorted(trials.totals.items()))}", flush=True)
            if arguments.minutes and time.monotonic() - began > 60 * arguments.minutes:
                break
            try:
                trial()
            except Exception as error:
                failures.append(f"{name}: {type(error).__name__}: {error}")
                print(f"FAILED {failures[-1]}", flush=True)
            trials.totals["trials made"] += 1
        calls = {str(case): count for case, count in trials.calls.items()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"totals": trials.totals, "calls": calls, "failures": failures}))
    return bool(failures)


def main() -> int:
    """Share the trials among processes, add up their totals, and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="break only every N-th call")
    parser.add_argument("--random", type=int, default=240, help="trials with kills at random instants")
    parser.add_argument("--together", type=int, default=60, help="trials with several processes at once")
    parser.add_argument("--pauses", type=int, default=60, help="trials with a paused writer")
    parser.add_argument("--jobs", type=int, default=2, help="processes that make trials")
    parser.add_argument(
        "--sample", type=int, help="of each kind of fault at single calls, only so many; of each of power cuts, one"
    )
    parser.add_argument("--minutes", type=float, help="begin no trial after so long")
    parser.add_argument("--cases", default=",".join(map(str, range(len(CASES)))), help="numbers of kinds of runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the totals")
    parser.add_argument("--suite", choices=SUITES, default="kills")
    parser.add_argument("--slice", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.slice:
        return run_slice(arguments)
    if arguments.suite != "kills":
        return run_suite(arguments)
    started = time.monotonic()
    command = [sys.executable, "-m", "tests.crash.torture", *sys.argv[1:]]
    jobs = [
        subprocess.Popen([*command, "--slice", f"{job}/{arguments.jobs}"], stdout=subprocess.PIPE, text=True)
        for job in range(arguments.jobs)
    ]
    totals: Counter[str] = Counter()
    failures: list[str] = []
    last: list[str] = [""] * len(jobs)
    for index, job in enumerate(jobs):
        assert job.stdout
        for line in job.stdout:
            last[index] = line
            if not line.startswith("{"):
                print(line, end="", flush=True)
        job.wait()
    calls: dict[str, int] = {}
    for line in last:
        if not line.startswith("{"):
            failures.append("a job ended before its trials did")
            continue
        result = json.loads(line)
        totals.update(result["totals"])
        failures += result["failures"]
        calls = result["calls"]
    for name, count in sorted(calls.items()):
        print(f"{count:>12,} calls to the filesystem in one run: {name}")
    for name, count in sorted(totals.items()):
        print(f"{count:>12,} {name}")
    print(f"{len(failures):>12,} failures, in {time.monotonic() - started:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps({"totals": totals, "calls": calls, "failures": failures}, indent=1))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
