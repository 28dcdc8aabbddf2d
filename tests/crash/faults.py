"""Stands between `embcache.io` and the system: counts its calls, and breaks one of them."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from embcache import io as disk

CHANGING = (
    "open", "write", "fsync", "close", "mkdir", "rename", "replace", "link", "symlink", "unlink", "rmdir", "utime",
)  # fmt: skip
RENAMES = ("rename", "replace", "link", "renameat")


@dataclass(frozen=True)
class Call:
    """One call to the filesystem."""

    index: int
    name: str
    arguments: tuple[Any, ...]


# Told of a call and how to make it; gives its result.
Hook = Callable[[Call, Callable[[], Any]], Any]


class _Between:
    """What `disk` takes for ``os``."""

    def __init__(self, hook: Hook) -> None:
        self._hook, self._count, self._lock = hook, 0, threading.Lock()

    def __getattr__(self, name: str) -> Any:
        original = getattr(os, name)
        return self.wrap(name, original) if name in CHANGING else original

    def wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            with self._lock:
                index, self._count = self._count, self._count + 1
            return self._hook(Call(index, name, arguments), lambda: original(*arguments, **keywords))

        return call


@contextmanager
def between(hook: Hook) -> Iterator[None]:
    """Let ``hook`` make every call of `disk` that changes the filesystem."""
    layer, before = _Between(hook), (disk.os, disk._rename_at)
    disk.os, disk._rename_at = layer, layer.wrap("renameat", disk._rename_at)  # type: ignore[assignment]
    try:
        yield
    finally:
        disk.os, disk._rename_at = before  # type: ignore[assignment]


def die() -> None:
    """End this process as SIGKILL does: nothing more is done, in any of its threads."""
    os.kill(os.getpid(), signal.SIGKILL)


def _refuse(number: int, call: Call) -> None:
    raise OSError(number, os.strerror(number), str(call.arguments[0]))


def kill_before(call: Call, do: Callable[[], Any]) -> Any:
    """Killed before the call."""
    die()


def kill_after(call: Call, do: Callable[[], Any]) -> Any:
    """Killed after the call, one that fails too, as the first of two ways to rename does."""
    try:
        do()
    finally:
        die()


def kill_within(call: Call, do: Callable[[], Any]) -> Any:
    """Killed when half of the bytes are written."""
    descriptor, data = call.arguments
    os.write(descriptor, data[: len(data) // 2])
    die()


def short_write(call: Call, do: Callable[[], Any]) -> Any:
    """Half of the bytes are written, and the call reports it."""
    descriptor, data = call.arguments
    return os.write(descriptor, data[: (len(data) + 1) // 2])


def no_space(call: Call, do: Callable[[], Any]) -> Any:
    """ENOSPC; of a write, half was written before."""
    if call.name == "write":
        os.write(call.arguments[0], call.arguments[1][: len(call.arguments[1]) // 2])
    _refuse(errno.ENOSPC, call)


def io_error(call: Call, do: Callable[[], Any]) -> Any:
    """EIO; a descriptor is closed all the same, as Linux does."""
    if call.name == "close":
        do()
    _refuse(errno.EIO, call)


def io_error_after(call: Call, do: Callable[[], Any]) -> Any:
    """EIO although it was done, as a network disk may tell whose answer was lost."""
    result = do()
    if call.name == "open":
        os.close(result)
    _refuse(errno.EIO, call)


def refused(call: Call, do: Callable[[], Any]) -> Any:
    """EACCES: another owner's, or a file that a virus scanner holds."""
    _refuse(errno.EACCES, call)


def stop_before(call: Call, do: Callable[[], Any]) -> Any:
    """Paused before the call, until it receives SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)
    return do()


# Name → what happens, at which calls (None: at all), and whether the process is dead then.
FAULTS: dict[str, tuple[Hook, tuple[str, ...] | None]] = {
    "kill before": (kill_before, None),
    "kill after": (kill_after, None),
    "kill within": (kill_within, ("write",)),
    "short write": (short_write, ("write",)),
    "ENOSPC": (no_space, ("open", "write", "fsync", "close", "mkdir", "symlink", "utime", *RENAMES)),
    "EIO": (io_error, None),
    "EIO though done": (io_error_after, ("open", "fsync", "close", "mkdir", "symlink", "unlink", "rmdir", *RENAMES)),
    "failed rename": (refused, RENAMES),
}


def fault_at(name: str, index: int, *, onwards: bool = False) -> Hook:
    """The fault at one call, or at all those from it on that it concerns."""
    fault, names = FAULTS.get(name, (stop_before, None))

    def hook(call: Call, do: Callable[[], Any]) -> Any:
        hit = call.index >= index if onwards else call.index == index
        return fault(call, do) if hit and (names is None or call.name in names) else do()

    return hook
