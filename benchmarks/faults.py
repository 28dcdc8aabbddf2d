"""Commits on an object store under faults: machines race for shards through a proxy that breaks requests.

Every machine computes other bytes for each shard and commits them. Reported: what was broken, for how many shards
exactly one machine got the answer that its attempt counts, and for how many a further machine reads the bytes of that
one.
Needs the extras ``cloud`` and ``dev``: ``python -m benchmarks.faults --shards 60 --machines 4 --rounds 3``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from benchmarks.common import print_table
from embcache.places import open_place
from tests.places.conftest import RATES
from tests.places.faults import FaultProxy
from tests.places.racing import race
from tests.places.server import BUCKET, environment, serving


def run(upstream: int, seed: int, options: argparse.Namespace) -> list[str]:
    """One row of the table."""
    rates, began = {kind: rate * options.factor for kind, rate in RATES.items()}, time.perf_counter()
    with FaultProxy(upstream, rates, seed).running() as proxy, tempfile.TemporaryDirectory() as folder:
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.port}"
        open_place.cache_clear()
        found = race(f"s3://{BUCKET}/round-{seed}", Path(folder), options.shards, options.machines)
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(proxy.faults.items()))
    requests, broken, n = proxy.requests.total(), proxy.faults.total(), options.shards
    counts = [seed, requests, broken, n, found.attempts, f"{found.sole}/{n}", f"{found.whole}/{n}"]
    return [str(each) for each in (*counts, found.errors.total(), faults, f"{time.perf_counter() - began:.0f}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=60)
    parser.add_argument("--machines", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--factor", type=float, default=1.0, help="Multiplies the probabilities of all faults.")
    options = parser.parse_args()
    with serving(page=1000) as port:
        os.environ.update(environment(port))
        rows = [run(port, seed, options) for seed in range(options.rounds)]
    header = ["seed", "requests", "faults", "races", "attempts", "one winner", "its bytes", "errors", "by kind", "s"]
    print_table(header, rows)


if __name__ == "__main__":
    main()
