"""Commits on an object store under faults: workers race for shards through a proxy that breaks requests.

Each worker writes its own files for each shard under keys that their checksum names, then creates the shard's commit,
which names them. Reported: what was broken, and that each shard has one winner, all of whose bytes are read back.
Needs the extras ``cloud`` and ``dev``: ``python -m benchmarks.faults --shards 60 --workers 4 --rounds 3``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import time
from collections import Counter
from typing import Any

from benchmarks.common import print_table
from embcache.places import Place, open_place
from tests.places.conftest import RATES
from tests.places.faults import FaultProxy
from tests.places.server import BUCKET, environment, serving


def commit(place: Place, shard: int, worker: int, size: int) -> bool:
    """Write the files of an attempt and create the commit; whether this worker's attempt is the shard's."""
    files = {f"{name}": random.Random(f"{shard} {worker} {name}").randbytes(size) for name in ("features", "ids")}
    attempt = hashlib.sha256(b"".join(files.values())).hexdigest()[:32]
    for name, data in files.items():
        place.put(f"shards/{shard:06d}/{attempt}/{name}", data)
    content = json.dumps({"attempt": attempt, "worker": worker, "files": sorted(files)}).encode()
    return place.put_new(f"commits/{shard:06d}.json", content)


def work(url: str, worker: int, shards: int, size: int, start: Any, answers: Any) -> None:
    """One process: its shards won, and errors by kind."""
    place, won, errors = open_place(url), [], Counter[str]()
    start.wait()
    for shard in range(shards):
        try:
            if commit(place, shard, worker, size):
                won.append(shard)
        except Exception as error:
            errors[getattr(error, "code", type(error).__name__)] += 1
    answers.put((worker, won, errors))


def check(place: Place, shards: int, size: int, winners: dict[int, list[int]]) -> tuple[int, int]:
    """Shards with one winner whose commit it is; those of them of which all bytes are as that worker made them."""
    sole, whole = 0, 0
    keys = [entry.key for entry in place.list("commits/")]
    assert keys == [f"commits/{shard:06d}.json" for shard in range(shards)]
    for shard, key in enumerate(keys):
        found = json.loads(place.get(key))
        sole += winners[shard] == [found["worker"]]
        prefix = f"shards/{shard:06d}/{found['attempt']}/"
        made = [random.Random(f"{shard} {found['worker']} {name}").randbytes(size) for name in found["files"]]
        whole += [place.get(prefix + name) for name in found["files"]] == made
    return sole, whole


def run(upstream: int, seed: int, options: argparse.Namespace) -> list[str]:
    """One row of the table."""
    rates = {kind: rate * options.factor for kind, rate in RATES.items()}
    context, url = multiprocessing.get_context("spawn"), f"s3://{BUCKET}/round-{seed}"
    began = time.perf_counter()
    with FaultProxy(upstream, rates, seed).running() as proxy:
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy.port}"
        start, answers = context.Barrier(options.workers), context.Queue()
        workers = [
            context.Process(target=work, args=(url, worker, options.shards, options.size, start, answers))
            for worker in range(options.workers)
        ]
        for each in workers:
            each.start()
        winners: dict[int, list[int]] = {shard: [] for shard in range(options.shards)}
        errors = Counter[str]()
        for _ in workers:
            worker, won, failed = answers.get(timeout=1200)
            errors += failed
            for shard in won:
                winners[shard].append(worker)
        for each in workers:
            each.join()
        sole, whole = check(open_place(url), options.shards, options.size, winners)
    faults = ", ".join(f"{count} {kind}" for kind, count in sorted(proxy.faults.items()))
    seconds = f"{time.perf_counter() - began:.0f}"
    n = options.shards
    counts = [seed, proxy.requests.total(), proxy.faults.total(), n, f"{sole}/{n}", f"{whole}/{n}", errors.total()]
    return [str(count) for count in counts] + [faults, seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=60)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=20_000, help="Bytes per file.")
    parser.add_argument("--factor", type=float, default=1.0, help="Multiplies the probabilities of all faults.")
    options = parser.parse_args()
    with serving() as port:
        os.environ.update(environment(port))
        rows = [run(port, seed, options) for seed in range(options.rounds)]
    header = ["seed", "requests", "faults", "races", "one winner", "its bytes", "errors", "faults by kind", "s"]
    print_table(header, rows)


if __name__ == "__main__":
    main()
