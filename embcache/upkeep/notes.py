"""What lies about in a store without being part of it: leases, and what killed processes have left."""

from __future__ import annotations

from pathlib import Path

from embcache.io import STALE_SECONDS, is_stale, list_folder
from embcache.store.lease import is_abandoned


def lease_files(store: Path) -> list[Path]:
    """Files of all leases of a store."""
    paths = [Path(entry.path) for entry in list_folder(store / "leases") if entry.name.endswith(".json")]
    return [path for path in paths if path.stem.isdecimal() and path.stem.isascii()]


def leftovers(store: Path, *, older: float = STALE_SECONDS) -> list[Path]:
    """What killed processes have left of a store, under staging and leases."""
    staged = [Path(entry.path) for entry in list_folder(store / "staging")]
    claims = lease_files(store)
    staged += [path for path in (Path(e.path) for e in list_folder(store / "leases")) if path not in claims]
    dead = [path for path in claims if is_abandoned(path)]
    return sorted([*dead, *(path for path in staged if is_stale(path, older))])


def store_notes(store: Path) -> list[str]:
    """The same in words, for a person."""
    notes, claims = [], lease_files(store)
    dead = [path for path in claims if is_abandoned(path)]
    if working := [path for path in claims if path not in dead]:
        shards = ", ".join(path.stem.lstrip("0") or "0" for path in working)
        notes.append(f"another process is computing shard {shards}")
    if dead:
        notes.append(f"{len(dead)} leases of processes that are gone: `embcache gc` removes them")
    rubbish = [path for path in leftovers(store) if path not in dead]
    if rubbish:
        notes.append(f"{len(rubbish)} leftovers of killed processes: `embcache gc` removes them")
    return notes
