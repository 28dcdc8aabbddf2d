"""Splits and names that scripts rely on are those that are committed here.

``python -m tests.golden.test_golden`` writes them anew, for a change that is meant; the diff then shows it.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner

from embcache.cli import app
from embcache.probe.probe import probe_features
from embcache.probe.protocol import plan_splits
from tests.probe.build import make_dataset, make_features, put_store
from tools.stats import modules

FILE = Path(__file__).with_name("golden.json")
CODES = Path(__file__).with_name("codes.txt")
DATASETS = {  # images, classes, images of one group, rows of an official test set
    "own test set": (600, 2, 1, 200),
    "drawn test set": (500, 3, 1, 0),
    "patients": (600, 2, 3, 0),
}


def split_digests() -> dict[str, str]:
    """Digest of the splits of each subset for some datasets, seeds and options."""
    found = {}
    for name, (n, classes, size, test) in DATASETS.items():
        labels = np.random.default_rng(n).integers(0, classes, n)
        groups = [f"p{k // size}" for k in range(n)]
        dataset = make_dataset(labels.tolist(), groups, split=["train"] * (n - test) + ["test"] * test)
        for options in ({}, {"seed": 1}, {"val": "matched"}, {"folds": 3}):
            plan = plan_splits(dataset, subsets=["S", "M", "F"], **options)
            for subset in ("S", "M", "F"):
                found[f"{name}, {subset}, {options or 'defaults'}"] = plan.digest(subset)
    return found


def key_paths(value: Any, path: str = "") -> Iterator[str]:
    """Every path of keys in a JSON value, ``[]`` for the items of a list and ``*`` for keys that are data."""
    if isinstance(value, dict):
        for key, item in value.items():
            place = f"{path}.{key if str(key).isidentifier() else '*'}"
            yield place
            yield from key_paths(item, place)
    elif isinstance(value, list):
        for item in value:
            yield from key_paths(item, path + "[]")


def json_keys(home: Path) -> dict[str, list[str]]:
    """Key paths of the ``--json`` of each command, in a home with two probed backbones."""
    labels = np.repeat(np.tile([0, 1, 0, 0], 40), 2)
    dataset = make_dataset(labels.tolist(), [f"p{k // 2}" for k in range(320)], split=["train"] * 200 + ["test"] * 120)
    for seed, name in enumerate(("one", "two")):
        put_store(home, dataset, name, make_features(dataset, shift=2.5, seed=seed))
    runs = [probe_features(dataset, name, folds=3, subset=40, home=home).id for name in ("one", "two")]
    commands = {
        "probe": ["probe", "--dataset", "toy", "--backbone", "one", "--subset", "40", "--folds", "3"],
        "results": ["results"],
        "results RUN": ["results", runs[0]],
        "compare": ["compare", *runs],
        "rank": ["rank", "--dataset", "toy", "--subset", "40"],
        "similarity": ["similarity", "--dataset", "toy"],
        "errors": ["errors", runs[0]],
        "ls": ["ls"],
        "info": ["info"],
        "verify": ["verify"],
        "gc": ["gc", "--dry-run"],
        "datasets": ["datasets"],
        "backbones": ["backbones"],
    }
    found = {}
    for name, argv in commands.items():
        done = CliRunner().invoke(app, [*argv, "--json", "-"])
        assert done.exit_code == 0, f"{name}: {done.output}"
        found[name] = sorted(set(key_paths(json.loads(done.stdout))))
    return found


def error_codes() -> list[str]:
    """Every code of an error in the package, ``*`` for what a variable fills in."""
    nodes = [node for tree in modules().values() for node in ast.walk(tree)]
    values = [node.value for node in nodes if isinstance(node, ast.keyword) and node.arg == "code"]
    place = {}  # functions that make errors take the code as an argument
    for node in nodes:
        names = [each.arg for each in node.args.args] if isinstance(node, ast.FunctionDef) else []
        if isinstance(node, ast.FunctionDef) and "code" in names:
            place[node.name] = names.index("code")
            values += node.args.defaults
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in place:
            values += node.args[place[node.func.id] :][:1]
    return sorted({code for value in values for code in _texts(value)} - {""})


def _texts(node: ast.expr) -> list[str]:
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body), *_texts(node.orelse)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values)]
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def test_the_codes_of_errors_are_those_of_earlier_versions() -> None:
    assert error_codes() == CODES.read_text().split()


def test_splits_are_those_of_earlier_versions() -> None:
    assert split_digests() == json.loads(FILE.read_text())["splits"]


def test_the_keys_of_json_are_those_of_earlier_versions(home: Path) -> None:
    assert json_keys(home) == json.loads(FILE.read_text())["json"]


if __name__ == "__main__":
    import os
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.environ["EMBCACHE_HOME"] = folder
        golden = {"splits": split_digests(), "json": json_keys(Path(folder))}
    CODES.write_text("\n".join(error_codes()) + "\n")
    FILE.write_text(json.dumps(golden, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
