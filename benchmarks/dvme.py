"""DVME from the shell, five folds: how long by nodes and exactly, and the test metrics of the two side by side.

Without ``--home`` features are synthetic, as many images and dimensions as the paper's pneumonia experiment has (2048,
2048 and 1536). With it, those cached there are probed, for example of real images:

    python benchmarks/dvme.py [--repeats 5] [--exact 1] [--subset S,M]
    python benchmarks/dvme.py --home ~/.cache/embcache --dataset aptos --backbone a,b,c
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Cost, print_table, shell, told
from probing import GRID
from synthetic import pneumonia_like, put_store

FUSED = ("simclr-like", "swav-like", "dino-like")


def probe(home: Path, dataset: str, backbones: str, subset: str, attention: str, answer: Path) -> Cost:
    """``embcache probe`` of one size; nothing is kept but the answer."""
    asked = ["--home", str(home), "--dataset", dataset, "--backbone", backbones, "--subset", subset, "--again"]
    return shell("-m", "embcache", "probe", "--head", "dvme", *asked, "--attention", attention, "--json", str(answer))


def metrics_of(answers: Sequence[dict[str, Any]]) -> str:
    """Mean and spread over folds of each size."""
    return "; ".join(f"{a['subset']} {a['mean']:.4f} ± {a['std']:.4f}" for a in answers)


def largest_difference(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> str:
    """Largest difference of a fold's metric, size by size."""
    found = []
    for a, b in zip(one, other, strict=True):
        worst = max(abs(f["score"] - g["score"]) for f, g in zip(a["folds"], b["folds"], strict=True))
        found.append(f"{a['subset']} {worst:.4f}")
    return "; ".join(found)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--exact", type=int, default=1, help="repeats with exact attention, which takes long; 0: none")
    parser.add_argument("--subset", default="S,M")
    parser.add_argument("--home", type=Path, help="features that are cached; runs are written there")
    parser.add_argument("--dataset", default="pneumonia-like")
    parser.add_argument("--backbone", default=",".join(FUSED))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if asked.home is None:
            for backbone in FUSED:
                put_store(folder / "home", pneumonia_like(), backbone, GRID[backbone])
        home = asked.home or folder / "home"
        costs: dict[str, list[Cost]] = {"auto": [], "exact": []}
        answers: dict[str, list[dict[str, Any]]] = {}
        for number in range(max(asked.repeats, asked.exact)):
            for attention, repeats in (("auto", asked.repeats), ("exact", asked.exact)):
                if number < repeats:
                    answer = folder / f"{attention}.json"
                    costs[attention].append(probe(home, asked.dataset, asked.backbone, asked.subset, attention, answer))
                    answers[attention] = json.loads(answer.read_text())
        rows = [
            [f"DVME, 5 folds, {asked.subset} of {asked.dataset}", way, told(costs[way]), metrics_of(found)]
            for way, found in answers.items()
        ]
        if len(answers) == 2:
            differences = largest_difference(answers["auto"], answers["exact"])
            rows.append(["", "largest difference of a fold", "", differences])
    print_table(["work", "attention", "time", "test metric, mean ± sd over folds"], rows)


if __name__ == "__main__":
    main()
