"""``make fuzz``: hours of hostile files if one has them; prints totals, keeps what fails, exits 1 if anything did."""

from __future__ import annotations

import argparse
import os
import pickle
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.limits import MEMORY, SECONDS, run_each
from tests.fuzz.targets import TARGETS, Case, draw, run


def main() -> int:
    """Fuzz each target for its share of the time."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.long", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="in all, shared by the targets")
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"), help="folder of what fails")
    parser.add_argument("--replay", type=Path, help="run one saved failure again, in this process")
    asked = parser.parse_args()
    if asked.replay:
        folder = asked.failures / "replay"
        folder.mkdir(parents=True, exist_ok=True)
        print(run(pickle.loads(asked.replay.read_bytes()), folder))  # our own file
        return 0
    os.nice(10)
    seed = random.SystemRandom().randrange(2**32) if asked.seed is None else asked.seed
    targets = asked.target or list(TARGETS)
    print(f"seed {seed}; limits an input: {SECONDS:g} s, {MEMORY >> 20} MiB; {asked.minutes:g} min in all", flush=True)
    failed = [
        fuzz(name, random.Random(f"{seed} {name}"), 60 * asked.minutes / len(targets), asked.failures)
        for name in targets
    ]
    return 1 if sum(failed) else 0


def fuzz(name: str, dice: random.Random, seconds: float, folder: Path) -> int:
    """Run one target for some time; the number of inputs that failed."""
    end, start = time.monotonic() + seconds, time.monotonic()
    TARGETS[name].seeds()  # made once, before children are forked
    outcomes: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    slowest, peak = 0.0, 0

    def cases() -> Iterator[Case]:
        while time.monotonic() < end:
            yield draw(name, dice)

    for case, ended in run_each(lambda item, place: run(item, place), cases()):
        slowest, peak = max(slowest, ended.seconds), max(peak, ended.memory)
        if not ended.failure:
            outcomes[ended.result] += 1
            continue
        kind = re.sub(r"0x[0-9a-f]+|\d+", "#", ended.failure)[:110]
        failures[kind] += 1
        if failures[kind] <= 3:
            folder.mkdir(parents=True, exist_ok=True)
            stem = f"{name.replace(' ', '-')}-{sum(failures.values()):04d}"
            (folder / f"{stem}.pickle").write_bytes(pickle.dumps(case))
            seed = TARGETS[name].seeds()[case.seed].name
            (folder / f"{stem}.txt").write_text(f"{seed}\n{ended.failure}\n{case}\n")
            print(f"FAILED {name} ({seed}): {ended.failure}", flush=True)
    total = sum(outcomes.values()) + sum(failures.values())
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in outcomes.most_common())
    print(
        f"{name}: {total:,} inputs in {time.monotonic() - start:.0f} s; {kinds}; failures {sum(failures.values())}; "
        f"slowest {slowest:.2f} s; peak {peak >> 20} MiB above the start", flush=True,
    )  # fmt: skip
    for kind, count in failures.most_common():
        print(f"    {count:5d} × {kind}", flush=True)
    return sum(failures.values())


if __name__ == "__main__":
    sys.exit(main())
