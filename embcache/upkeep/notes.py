"""What lies about in a store without being part of it: leases, and what killed processes have left."""

from __future__ import annotations

import time
from pathlib import Path

from embcache.store.lease import is_stale

# Nothing takes so long between its first byte under staging and its rename.
STALE_SECONDS = 600.0


def lease_files(store: Path) -> list[Path]:
    """Files of all leases of a store."""
    folder = store / "leases"
    return sorted(path for path in folder.glob("*.json") if path.stem.isdecimal()) if folder.is_dir() else []


def live_leases(store: Path) -> list[Path]:
    """Leases whose holders are alive, as far as can be told."""
    return [path for path in lease_files(store) if not is_stale(path)]


def leftovers(store: Path, *, older: float = STALE_SECONDS) -> list[Path]:
    """What killed processes have left of a store: under staging and leases, and beside the store's folder.

    Damaged shards that a repair has put aside are not among them: they tell the next repair what is missing.
    """
    beside = [path for path in store.parent.glob(".*") if path.name.startswith(f".{store.name}-")]
    staged = [path for path in _children(store / "staging") if not path.name.startswith("damaged-")]
    claims = [path for path in lease_files(store) if is_stale(path)]
    staged += [path for path in _children(store / "leases") if path.suffix != ".json" or "-" in path.name]
    return sorted(path for path in (*beside, *staged, *claims) if stale(path, older) or path in claims)


def store_notes(store: Path) -> list[str]:
    """The same in words, for a person."""
    notes = []
    if working := live_leases(store):
        shards = ", ".join(path.stem.lstrip("0") or "0" for path in working)
        notes.append(f"another process is computing shard {shards}")
    dead = [path for path in lease_files(store) if is_stale(path)]
    if dead:
        notes.append(f"{len(dead)} leases of processes that are gone: `embcache gc` removes them")
    rubbish = [path for path in leftovers(store) if path not in dead]
    if rubbish:
        notes.append(f"{len(rubbish)} leftovers of killed processes: `embcache gc` removes them")
    return notes


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def stale(path: Path, older: float = STALE_SECONDS) -> bool:
    """Whether a file has not been touched for so long that nobody is at it."""
    try:
        return time.time() - path.lstat().st_mtime > older
    except FileNotFoundError:
        return False
