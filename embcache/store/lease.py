"""Leases: how processes on one store share its shards without doing the same work twice.

They are advisory. Two holders of one lease cost time and nothing else, since only one of them can commit the shard.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
from contextlib import suppress
from pathlib import Path

from embcache import io as disk
from embcache.errors import StoreError
from embcache.mirror import Mirror
from embcache.store.reading import shard_name

# Long enough for a stalled network disk; a holder that died on this machine is noticed at once.
TTL_SECONDS = 60.0
_MOST_BYTES = 1 << 16
# Stamps further ahead than this come from a clock that was set back since, not from its grain.
_FUTURE_SECONDS = 3.0


class Lease:
    """A claim on one shard, made by :meth:`acquire` and kept alive by a thread until :meth:`release`."""

    def __init__(self, path: Path, content: bytes, ttl: float) -> None:
        self.path, self._content, self._ttl = path, content, ttl
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease {path.stem}", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, store: Path, number: int, *, ttl: float | None = None) -> Lease | None:
        """Claim shard ``number`` of a store; None while another process holds it."""
        ttl = TTL_SECONDS if ttl is None else ttl
        path, staging = Path(store) / "leases" / f"{shard_name(number)}.json", Path(store) / "staging"
        content = json.dumps({"machine": _machine(), "pid": os.getpid(), "token": secrets.token_hex(8)}).encode()
        if disk.create_exclusive(path, content, staging=staging):
            return cls(path, content, ttl)
        with disk.writing(path):
            free = _take_away(path, ttl)
        return cls(path, content, ttl) if free and disk.create_exclusive(path, content, staging=staging) else None

    @property
    def held(self) -> bool:
        """True while the lease's file is ours."""
        return not self._done.is_set() and _content(self.path) == self._content

    def release(self) -> None:
        """Give the shard back. Releasing twice, or a lease that was taken over, does nothing."""
        # A disk that refuses leaves a lease behind, which ends with our process or in its own time.
        ours = False
        with suppress(OSError, StoreError):
            ours = self.held
        self._done.set()
        self._thread.join()
        if ours:
            with suppress(StoreError):
                disk.discard(self.path)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self) -> None:
        while not self._done.wait(self._ttl / 4):
            # A disk that refuses the heartbeat costs the lease at worst.
            with suppress(OSError, StoreError):
                if _content(self.path) != self._content:
                    return
                if (mirror := _shared(self.path)) is None or not mirror.replace_file(self.path, self._content):
                    disk.touch_file(self.path)


def holder(store: Path, number: int) -> bytes:
    """What the lease of a shard says of its holder, who may be gone: another text for each; empty without one."""
    with suppress(OSError, StoreError):
        return _content(store / "leases" / f"{shard_name(number)}.json") or b""
    return b""


def is_abandoned(path: Path, *, ttl: float = TTL_SECONDS) -> bool:
    """Whether the holder of a lease is gone, as far as can be told without writing: by this machine's clock.

    A beat that lies further ahead than a lease lives is no beat either.
    """
    content = _content(path)
    return content is None or _died_here(content) or disk.is_stale(path, ttl)


def _take_away(path: Path, ttl: float) -> bool:
    """Remove the lease of a holder that is gone; False while it is alive."""
    content = _content(path)
    if content is None:
        return True
    if not (_died_here(content) or _age(path) > ttl):
        return False
    if _shared(path):
        disk.discard(path)  # two that do so at once compute one shard twice
        return True
    staging = path.parent.parent / "staging"
    aside = staging / disk.staged_name(disk.exclusive_prefix(path))
    if not disk.take_aside(path, aside):
        return True
    taken = _content(aside)
    if taken is not None and taken != content:
        # Someone took it over since we looked: give theirs back.
        disk.create_exclusive(path, taken, staging=staging)
    disk.discard(aside)
    return taken == content


def _died_here(content: bytes) -> bool:
    # Also False where the holder cannot be known or may not be signaled.
    with suppress(ValueError, TypeError, KeyError, OverflowError, PermissionError, RecursionError):
        holder = json.loads(content)
        if os.name != "nt" and holder["machine"] == _machine():
            try:
                os.kill(holder["pid"], 0)
            except ProcessLookupError:
                return True
    return False


def _machine() -> str:
    """Name of the space in which process ids mean something: containers on one machine have spaces of their own."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()


def _age(path: Path) -> float:
    """Seconds since the last heartbeat, by the clock of the filesystem: machines need not agree on the time."""
    if mirror := _shared(path):
        return mirror.age(path)
    try:
        beat = path.lstat().st_mtime
        age = disk.filesystem_time(path.parent.parent / "staging", disk.exclusive_prefix(path)) - beat
        if age < -_FUTURE_SECONDS:
            # That clock was set back. From now on the lease ages like any other, unless its holder beats.
            with suppress(StoreError):
                disk.touch_file(path)
    except FileNotFoundError:
        return float("inf")
    return age


def _shared(path: Path) -> Mirror | None:
    """The mirror of a lease that all machines see; those of what is begun and not finished are this machine's own."""
    mirror = disk.mirror_of(path)
    return mirror if mirror and mirror.key(path) else None


def _content(path: Path) -> bytes | None:
    if mirror := _shared(path):
        return mirror.read(path)
    try:
        return disk.read_regular(path, most=_MOST_BYTES)
    except FileNotFoundError:
        return None
    except disk.IrregularError:
        return b""  # no lease of ours: it ends in its time
