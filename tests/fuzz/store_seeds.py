"""Stores of both formats, damaged and then sealed again, as by someone who means harm."""

from __future__ import annotations

import atexit
import copy
import functools
import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embcache.errors import EmbcacheError
from embcache.sealed import canonical_json, crc32c, seal
from embcache.store.commit import write_view
from embcache.store.feature_store import FeatureStore
from embcache.store.reading import (
    committed_numbers,
    plan_numbers,
    read_features,
    read_header,
    read_index,
    read_live,
    read_plan,
)
from embcache.store.schema import StoreHeader
from tests.fuzz.image_seeds import hdf5_fields
from tests.fuzz.mutate import NUMBERS, Change, Field, Seed, mutate
from tests.store.build import add, make_store

# Thousands of small stores: not on a disk where there is memory to be had.
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

# What a value of a JSON file becomes.
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**12, 10**30, 1.5, "", "x", "..", "../../etc/passwd", "/etc/passwd", "\0",
    "\n", "a" * 5000, "float64", "object", "U100000000", "V4", "<f4", "zarr", "hdf5", [], {}, [[]], [1, [2]], ["x"],
    [-1], [10**9, 10**9], {"a": 1}, "numcodecs.pickle", "zstd", {"name": "gzip", "configuration": {"level": 5}},
    {"name": "numcodecs.pickle"}, *NUMBERS,
)  # fmt: skip


@functools.cache
def template(format: str) -> Path:
    """A store with two committed shards, made once."""
    folder = Path(tempfile.mkdtemp(prefix="embcache-fuzz-", dir=IN_MEMORY))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    store = make_store(folder, format)
    add(store, 0, ["a", "b", "c", "d"], bad=["b"])
    add(store, 1, ["e", "a"])
    return store


@functools.cache
def store_seeds(format: str) -> list[Seed]:
    """The files of a store, by their paths in it."""
    store = template(format)
    files = sorted(path for path in store.rglob("*") if path.is_file())
    made = []
    for path in files:
        name, data = path.relative_to(store).as_posix(), path.read_bytes()
        fields = tuple(hdf5_fields(data)) if name.endswith(".h5") else tuple(Field(at, 1) for at in range(len(data)))
        weight = 1 if name.startswith("shards/000001") else 2
        made += [Seed(name, data, fields[:3000])] * weight
    return made


def damage(seed: Seed, changes: Sequence[Change], folder: Path, others: list[Seed], format: str) -> Path:
    """A copy of the store in which one file is changed and everything that vouches for it agrees with the change."""
    store = folder / template(format).name
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(template(format), store, symlinks=True)
    tree = seed.name.endswith(".json")
    data = _mutate_json(seed.data, changes) if tree else mutate(seed, changes, others)
    (store / seed.name).write_bytes(data)
    if changes and changes[0].value % 8 == 0:
        return store  # unsealed: an accident
    if seed.name.startswith("shards/") and not seed.name.endswith("commit.json"):
        shard, _, name = seed.name.removeprefix("shards/").partition("/")
        path = store / "shards" / shard / "commit.json"
        content = json.loads(path.read_bytes())
        content.pop("crc32c")
        content["files"][name] = {"size": len(data), "crc32c": crc32c(data)}
        path.write_bytes(seal(content))
    if seed.name == "recipe.json":
        return _rename(store)
    return store


def _mutate_json(data: bytes, changes: Sequence[Change]) -> bytes:
    """Values of the tree replaced; sealed again where it was sealed, plain where not."""
    content = json.loads(data)
    sealed = content.pop("crc32c", None)
    for change in changes:
        _replace(content, random.Random(change.value), copy.deepcopy(HOSTILE[int(change.span * len(HOSTILE))]))
    if sealed is None:
        return json.dumps(content).encode()
    try:
        return seal(content, indent=1 if b"\n " in data else None)
    except (EmbcacheError, ValueError):
        return data


def _replace(tree: Any, dice: random.Random, value: Any) -> None:
    spots: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            spots.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(tree)
    if not spots:
        return
    node, key = dice.choice(spots)
    action = dice.randrange(6)
    if action == 0 and isinstance(node, dict):
        del node[key]
    elif action == 1 and isinstance(node, dict) and isinstance(value, str):
        node[value] = node.pop(key)
    else:
        node[key] = value


def _rename(store: Path) -> Path:
    """The recipe's fingerprint made true, in the file and in the folder's name."""
    path = store / "recipe.json"
    content = json.loads(path.read_bytes())
    content.pop("crc32c", None)
    if isinstance(content.get("recipe"), dict):
        fingerprint = hashlib.sha256(canonical_json(content["recipe"]).encode()).hexdigest()
        if "fingerprint" in content:
            content["fingerprint"] = fingerprint
        path.write_bytes(seal(content))
        target = store.with_name(store.name[:-12] + fingerprint[:12])
        shutil.rmtree(target, ignore_errors=True) if target != store else None
        return store.rename(target)
    return store


def read_all(store: Path) -> str:
    """Everything that embcache does with the files of a store; each step on its own, so that one error hides none."""
    header = read_header(store)
    kinds = []
    for step in _steps(store, header):
        try:
            step()
        except EmbcacheError as error:
            kinds.append(type(error).__name__)
    return kinds[0] if kinds else "read"


def _steps(store: Path, header: StoreHeader) -> list[Callable[[], object]]:
    def whole() -> None:
        opened = FeatureStore(store)
        np.asarray(opened.features[:])
        assert len(opened.ids) >= 0

    steps: list[Callable[[], object]] = [lambda: read_live(store, header), whole, lambda: write_view(store)]
    for number in plan_numbers(store)[:2]:
        steps.append(functools.partial(read_plan, store, number))
    for number in committed_numbers(store)[:2]:
        steps.append(functools.partial(read_index, store, header, number))
        steps.append(functools.partial(read_features, store, header, number))
    return steps
