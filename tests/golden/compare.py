"""Compare the numbers of two revisions on this machine: ``make golden BASE=REV`` (default: the last commit).

Both run the same journey on the built-in sample, each with its own code and its own home. Compared are splits (equal),
features (within 1e-5 of the largest one) and, where the features are bit for bit the same, scores (within 1e-6). Where
features differ, the differences of scores are listed and not gated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BACKBONES = ("random", "effnet_lite0", "effnet_lite1")
HEADS = ("linear", "mlp", "logreg", "knn")
FUSED = ("concat", "dvme", "dvme-token")
FEATURES_WITHIN, SCORES_WITHIN = 1e-5, 1e-6


def journey(out: Path) -> Iterator[tuple[str, list[str]]]:
    """Files that the journey writes into ``out``, with the commands, of which the last name runs that are there."""
    common = ["--dataset", "sample"]
    some = ["--backbone", "effnet_lite0,random"]
    steps = {
        "extraction.json": ["extract", *common, "--backbone", ",".join(BACKBONES), "--json"],
        "splits.json": ["splits", "export", *common, "--subset", "S,M,F,100", "--output"],
        "matched.json": ["splits", "export", *common, "--subset", "S", "--val", "matched", "--seed", "3", "--output"],
        "rank.json": ["rank", *common, "--json"],
        "similarity.json": ["similarity", *common, "--json"],
    }
    steps |= {f"{name}.npz": ["export", *common, "--backbone", name] for name in BACKBONES}
    steps |= {f"{h}.json": ["probe", *common, *some, "--head", h, "--subset", "S,M", "--json"] for h in HEADS}
    steps |= {f"{h}.json": ["probe", *common, *some, "--head", h, "--subset", "S", "--json"] for h in FUSED}
    tune = ["--subset", "10", "--folds", "2", "--val", "matched", "--max-epochs", "1", "--json"]
    steps["finetune.json"] = ["finetune", *common, "--backbone", "effnet_lite0", *tune]
    yield from ((name, [*argv, str(out / name)]) for name, argv in steps.items())
    runs = [result["id"] for result in load(out / "linear.json")]
    images = [str(path) for path in sorted((out / "home").rglob("tumour-*.png"))[:4]]
    yield "compare.json", ["compare", *runs[:2], "--json", str(out / "compare.json")]
    yield "result.json", ["results", runs[0], "--json", str(out / "result.json")]
    yield "predict.json", ["predict", "--run", runs[0], *images, "--json", str(out / "predict.json")]


def run(code: Path, out: Path) -> None:
    """Run the journey with the package of the folder ``code``."""
    out.mkdir(parents=True)
    variables = {"PYTHONPATH": str(code), "EMBCACHE_HOME": str(out / "home"), "OMP_NUM_THREADS": "1"}
    for name, argv in journey(out):
        done = subprocess.run(
            [sys.executable, "-m", "embcache", *argv],
            env=os.environ | variables,
            cwd=out,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{code.name}: embcache {' '.join(argv)} ended with {done.returncode}\n{done.stderr}")
        print(f"  {name}", flush=True)


def load(path: Path) -> Any:
    """The JSON of one file."""
    return json.loads(path.read_text())


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Every number and text of a JSON value by its path, but what names this run: IDs, requests, paths and times."""
    if isinstance(value, dict):
        pairs = [
            (str(key), item)
            for key, item in value.items()
            if key not in ("id", "path", "seconds", "created", "request")
        ]
    elif isinstance(value, list):
        pairs = [(str(k), item) for k, item in enumerate(value)]
    else:
        return {path: value}
    return {place: leaf for key, item in pairs for place, leaf in leaves(item, f"{path}/{key}").items()}


def difference(base: Any, head: Any) -> float:
    """Largest difference of the numbers of ``base``: infinite where one is gone, or only one side is a finite number.

    What ``head`` has in addition does not count, nor do texts: they name recipes, versions and what is noted.
    """
    after, largest = leaves(head), 0.0
    for place, a in leaves(base).items():
        b = after.get(place, "gone")
        if _finite(a) and _finite(b):
            largest = max(largest, abs(a - b))
        elif not isinstance(a, str) and repr(a) != repr(b):  # None, NaN or infinite on one side
            largest = math.inf
    return largest


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def compare(base: Path, head: Path) -> bool:
    """Print every comparison; whether all that is gated holds."""
    good = True

    def row(name: str, what: str, holds: bool | None) -> None:
        nonlocal good
        good &= holds is not False
        print(f"{name:18} {what:58} {'not gated' if holds is None else 'ok' if holds else 'DIFFERS'}")

    for name in ("splits.json", "matched.json"):
        same = leaves(load(base / name)) == leaves(load(head / name))
        row(name, "equal" if same else "not equal", same)
    equal = True
    for name in (f"{backbone}.npz" for backbone in BACKBONES):
        with np.load(base / name) as before, np.load(head / name) as after:
            same_rows = np.array_equal(before["ids"], after["ids"])
            a, b = before["features"].astype(np.float64), after["features"].astype(np.float64)
        largest = float(np.abs(a - b).max() / np.abs(a).max()) if same_rows and a.shape == b.shape else float("inf")
        equal &= largest == 0
        row(name, f"{len(a)} rows, largest difference {largest:.1e} of the largest", largest <= FEATURES_WITHIN)
    answers = ("rank", "similarity", *HEADS, *FUSED, "finetune", "compare", "result", "predict")
    for name in (f"{answer}.json" for answer in answers):
        largest = difference(load(base / name), load(head / name))
        row(name, f"largest difference {largest:.1e}", largest <= SCORES_WITHIN if equal else None)
    return good


def main() -> None:
    """Run both revisions and compare them; exit status 1 where something gated differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", nargs="?", default="HEAD", help="revision to compare the working tree with")
    wanted = parser.parse_args().base
    root = Path(__file__).resolve().parents[2]
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        subprocess.run(["git", "worktree", "add", "--detach", "--quiet", str(base), wanted], cwd=root, check=True)
        try:
            for code, out in ((base, "before"), (root, "after")):
                print(f"{out}: {wanted if out == 'before' else 'the working tree'}", flush=True)
                run(code, Path(folder) / out)
            good = compare(Path(folder) / "before", Path(folder) / "after")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(base)], cwd=root, check=True)
    sys.exit(not good)


if __name__ == "__main__":
    main()
