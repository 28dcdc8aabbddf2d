"""What Ray costs: an extraction by this process, and by one and two workers of Ray on this machine, in turns.

Compares every byte of the shards, and the processor seconds of those who compute, from the moment at which all networks
are loaded to the last commit. What starting Ray takes is printed beside it: it does not grow with the images.

    OMP_NUM_THREADS=1 python benchmarks/engines.py [--dataset NAME --data-root FOLDER] [--backbone random] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import print_table

MODES = {
    "local": {},
    "Ray, 1 worker": {"engine": "ray", "num_workers": 1},
    "Ray, 2 workers": {"engine": "ray", "num_workers": 2},
}


def spent(process: int) -> float:
    """Processor seconds of a process so far."""
    import os

    fields = Path(f"/proc/{process}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def one(asked: argparse.Namespace) -> None:
    """An extraction in this process; prints seconds as JSON."""
    from embcache.config import DatasetRef, ExtractConfig
    from embcache.data.dataset import load_dataset
    from embcache.extract.engines.local import LocalEngine
    from embcache.extract.extract import extract

    options: dict[str, Any] = MODES[asked.one]
    cost = {"cpu": 0.0, "wall": 0.0}
    if options:
        from embcache.extract.engines.dispatch import Ready
        from embcache.extract.engines.ray_cluster import RayPool

        began: dict[int, tuple[float, float]] = {}
        wait, close = RayPool.wait, RayPool.close

        def watch(pool: RayPool, seconds: float) -> Any:
            answers = wait(pool, seconds)
            for _, answer in answers:
                if isinstance(answer, Ready):
                    process = int(answer.where.rpartition("process ")[2].rstrip(")"))
                    began[process] = spent(process), time.monotonic()
            return answers

        def end(pool: RayPool) -> None:
            cost["cpu"] = sum(spent(process) - before for process, (before, _) in began.items())
            cost["wall"] = time.monotonic() - min(moment for _, moment in began.values())
            close(pool)

        RayPool.wait, RayPool.close = watch, end  # type: ignore[method-assign]
    else:
        run = LocalEngine._run

        def timed(*arguments: Any) -> None:
            before, moment = time.process_time(), time.monotonic()
            run(*arguments)
            cost["cpu"], cost["wall"] = time.process_time() - before, time.monotonic() - moment

        LocalEngine._run = timed  # type: ignore[method-assign, assignment]
    dataset = load_dataset(asked.dataset, home=asked.home, ref=DatasetRef(data_root=asked.data_root))
    started = time.monotonic()
    (done,) = extract(dataset, [asked.backbone], ExtractConfig.make(options=options), home=asked.home)
    cost["start"] = time.monotonic() - started - cost["wall"]
    print(json.dumps({**cost, "images": done.computed, "store": str(done.store.path)}))


def shards(store: str) -> dict[str, bytes]:
    folder = Path(store) / "shards"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="sample")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--backbone", default="random")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        one(asked)
        return
    costs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for _ in range(asked.rounds):
        made = {}
        for mode in MODES:
            with tempfile.TemporaryDirectory() as home:
                words = [sys.executable, __file__, *sys.argv[1:], "--one", mode, "--home", home]
                done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
                costs[mode].append(json.loads(done.stdout.splitlines()[-1]))
                made[mode] = shards(costs[mode][-1]["store"])
        assert all(files == made["local"] for files in made.values()), "the bytes differ"
    rows = []
    for mode, each in costs.items():
        ratio = statistics.median(c["cpu"] / local["cpu"] for c, local in zip(each, costs["local"], strict=True))
        wall, cpu, start = (statistics.median(c[name] for c in each) for name in ("wall", "cpu", "start"))
        rows.append([mode, f"{each[0]['images']}", f"{wall:.1f}", f"{cpu:.1f}", f"{ratio:.2f}", f"{start:.1f}"])
    print_table(["engine", "images", "seconds", "processor seconds", "of local", "start, s"], rows)
    print(f"median of {asked.rounds} rounds; the bytes of all shards are equal")


if __name__ == "__main__":
    main()
