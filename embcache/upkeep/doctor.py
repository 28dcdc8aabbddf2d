"""What a person, or whoever reads a bug report, needs to know of an installation (``embcache doctor``)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from embcache.data.source import DATASETS, default_root
from embcache.errors import EmbcacheError
from embcache.extract.backbones import BACKBONES, weights_status
from embcache.paths import PathLike, data_dir, home_dir, weights_dir
from embcache.store.feature_store import FeatureStore
from embcache.store.lease import is_abandoned
from embcache.upkeep.listing import CachedStore, list_cached, list_interrupted
from embcache.upkeep.machine import decoding, devices, machine, versions
from embcache.upkeep.notes import lease_files, leftovers
from embcache.upkeep.verify import find_stores

_SPARE = 1.1  # room that is owed, with what a run writes besides features


@dataclass(frozen=True)
class Diagnosis:
    """All of it, as plain data.

    Attributes
    ----------
    versions, machine : mapping
    devices : list of mapping
        With the speed that each reaches.
    decoding : mapping
    places : list of mapping
        Home, data and weights folders: whether they are there, can be written, and have room.
    owed : mapping
        Images that the stores still owe, the bytes they will take, and those free.
    weights, datasets, stores, leases, interrupted : list of mapping
    problems : list of str
        What a person should do something about, with the command that does it.
    """

    versions: dict[str, str]
    machine: dict[str, Any]
    devices: list[dict[str, Any]]
    decoding: dict[str, Any]
    places: list[dict[str, Any]]
    owed: dict[str, Any]
    weights: list[dict[str, str]]
    datasets: list[dict[str, Any]]
    stores: list[dict[str, Any]]
    leases: list[dict[str, Any]]
    interrupted: list[dict[str, Any]]
    problems: list[str]


def diagnose(home: PathLike | None = None, say: Callable[[str], object] = lambda line: None) -> Diagnosis:
    """Look at everything; nothing needs to be cached, and nothing is written.

    Parameters
    ----------
    home : path-like, optional
        Folder of stores.
    say : callable
        Told what takes a moment.
    """
    problems: list[str] = []
    say("measuring the devices")
    measured = devices()
    problems += [f"{d['device']} cannot be used: {d['problem']}" for d in measured if d["problem"]]
    decoded = decoding()
    places = [_place("home", home_dir(home)), _place("data", data_dir()), _place("weights", weights_dir(home))]
    if not places[0]["writable"]:
        problems.append(f"{places[0]['path']} cannot be written: give --home FOLDER, or set EMBCACHE_HOME")
    say("looking at every store")
    cached = list_cached(home)
    owed = _owed(cached, places[0], problems)
    stores, leases = _stores(home, cached, problems)
    return Diagnosis(
        versions=versions(),
        machine=machine(),
        devices=measured,
        decoding=decoded,
        places=places,
        owed=owed,
        weights=[{"backbone": name, "status": weights_status(name, home)} for name in BACKBONES],
        datasets=[_dataset(name, home) for name in DATASETS if name != "folder"],
        stores=stores,
        leases=leases,
        interrupted=[
            {"dataset": run.dataset, "run": run.id, "bytes": run.bytes, "path": str(run.path), "command": run.command}
            for run in list_interrupted(home)
        ],
        problems=problems,
    )


def _place(name: str, path: Path) -> dict[str, Any]:
    nearest = next((each for each in (path, *path.absolute().parents) if each.exists()), Path("/"))
    usage = shutil.disk_usage(nearest)
    return {
        "name": name,
        "path": str(path),
        "there": path.exists(),
        "writable": nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK),
        "free_bytes": usage.free,
        "disk_bytes": usage.total,
    }


def _owed(cached: list[CachedStore], home: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Images still to compute under the recipes that are cached, and the room that their features take."""
    images = size = 0
    for row in cached:
        if row.owed and not row.problem:
            store = FeatureStore(row.path)
            images += row.owed
            size += row.owed * prod(store.row_shape) * store.dtype.itemsize
    enough = size * _SPARE <= home["free_bytes"]
    if not enough:
        problems.append(
            f"what is planned takes {size / 1e9:.1f} GB and {home['free_bytes'] / 1e9:.1f} GB are free in "
            f"{home['path']}: free space, or give --home FOLDER"
        )
    return {"images": images, "bytes": size, "free_bytes": home["free_bytes"], "enough": enough}


def _stores(
    home: PathLike | None, cached: list[CachedStore], problems: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A quick check of each store (headers, plans, indexes, sizes), and the leases in all of them."""
    known = {row.path: row for row in cached}
    stores, leases = [], []

    def unread(path: PathLike, error: OSError) -> None:
        problems.append(f"{path} cannot be read: {error.strerror}: ask its owner for permission (chmod -R g+rX)")

    for path in find_stores(home, skipped=unread):
        row = known.get(path)
        problem = row.problem if row else "recipe.json is missing"
        try:
            if row and not problem:
                FeatureStore(path).sources()  # reads the plans too
        except EmbcacheError as error:
            problem = f"{error.problem} ({error.where})"
        rubbish, claims = 0, list[Path]()
        try:
            claims = lease_files(path)
            rubbish = len([each for each in leftovers(path) if each not in claims])
        except OSError as error:
            problem = problem or f"{error.strerror} ({error.filename})"
        if problem:
            problems.append(f"{path.parent.name}/{path.name}: {problem}: embcache verify names it and what to type")
        stores.append(
            {
                "dataset": path.parent.name,
                "store": path.name,
                "rows": row.rows if row else 0,
                "owed": row.owed if row else 0,
                "quarantined": row.quarantined if row else 0,
                "bytes": row.bytes if row else 0,
                "leftovers": rubbish,
                "problem": problem,
            }
        )
        for lease in claims:
            leases.append(
                {"store": f"{path.parent.name}/{path.name}", "shard": int(lease.stem), "stale": is_abandoned(lease)}
            )
    return stores, leases


def _dataset(name: str, home: PathLike | None) -> dict[str, Any]:
    root = default_root(name, home)
    return {"dataset": name, "path": str(root), "there": root.exists()}
