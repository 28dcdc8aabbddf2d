"""Running code in a child process that may not take too long or too much memory."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import pickle
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MEMORY = 2 << 30
SECONDS = 30.0
_POLL = 0.05
_AFTER = 400  # inputs that one child takes: what leaks shows, and cannot add up for ever


@dataclass(frozen=True)
class Ended:
    """How one input ended: what the call returned, else what went wrong; and what it took."""

    result: Any = None
    failure: str = ""
    seconds: float = 0.0
    memory: int = 0  # bytes at the peak, beyond what the process held before


def run_each(
    call: Callable[[Any, Path], Any], inputs: Iterable[Any], *, memory: int = MEMORY, seconds: float = SECONDS
) -> Iterator[tuple[Any, Ended]]:
    """Call ``call(input, empty folder)`` for each input in forked children; yields as they end.

    A child that passes a limit, or dies, is replaced by a new one: the rest goes on.
    """
    waiting = iter(inputs)
    child: _Child | None = None
    try:
        for item in waiting:
            if child is None:
                child = _Child(call)
            ended = child.do(item, memory, seconds)
            yield item, ended
            if ended.failure or child.done >= _AFTER:
                child.close()
                child = None
    finally:
        if child is not None:
            child.close()


class _Child:
    """A forked process that answers inputs, one after the other, through pipes."""

    def __init__(self, call: Callable[[Any, Path], Any]) -> None:
        self.done = 0
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(prefix="embcache-fuzz-", dir=folder))
        down, up = os.pipe(), os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            os.close(down[1])
            os.close(up[0])
            _serve(call, os.fdopen(down[0], "rb"), os.fdopen(up[1], "wb"), self.folder)
        os.close(down[0])
        os.close(up[1])
        self._to, self._from = os.fdopen(down[1], "wb"), os.fdopen(up[0], "rb")

    def do(self, item: Any, memory: int, seconds: float) -> Ended:
        self.done += 1
        start, base, peak = time.monotonic(), self._resident(), 0
        pickle.dump(item, self._to)
        self._to.flush()
        while not select.select([self._from], [], [], _POLL)[0]:
            peak = max(peak, self._resident() - base)
            spent = time.monotonic() - start
            if peak > memory or spent > seconds:
                why = f"memory: {peak >> 20} MiB" if peak > memory else f"hang: more than {seconds:g} s"
                return Ended(None, why, spent, peak)
        spent = time.monotonic() - start
        try:
            ended: Ended = pickle.load(self._from)
        except (EOFError, pickle.UnpicklingError):
            _, status = os.waitpid(self.pid, 0)
            self.pid = 0
            code = os.waitstatus_to_exitcode(status)
            return Ended(None, f"crash: {signal.Signals(-code).name if code < 0 else code}", spent, peak)
        if ended.memory > memory and not ended.failure:
            return Ended(ended.result, f"memory: {ended.memory >> 20} MiB", spent, ended.memory)
        return Ended(ended.result, ended.failure, spent, max(peak, ended.memory))

    def close(self) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self._to.close() if not self._to.closed else None
        self._from.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _resident(self) -> int:
        try:
            pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        except (OSError, IndexError):
            return 0
        return int(pages) * os.sysconf("SC_PAGESIZE")


def _serve(call: Callable[[Any, Path], Any], source: IO[bytes], sink: IO[bytes], folder: Path) -> None:
    os.chdir(folder)
    with contextlib.suppress(OSError, AttributeError):  # freed memory that the parent kept would hide what a call takes
        ctypes.CDLL(None).malloc_trim(0)
    faulthandler.disable()  # the parent tells of crashes
    faults = os.open(os.devnull, os.O_WRONLY)
    os.dup2(faults, 2)  # codecs talk
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # no power loss here
    while True:
        try:
            item = pickle.load(source)
        except EOFError:
            os._exit(0)
        own = folder / "input"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        before = _reset_peak()
        result, failure = None, ""
        try:
            result = call(item, own)
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            failure = f"{type(error).__name__}: {str(error)[:300]} ({Path(last.filename).name}:{last.lineno})"
        pickle.dump(Ended(result, failure, 0.0, max(0, _peak() - before)), sink)
        sink.flush()


def _reset_peak() -> int:
    """Bytes held now; from here on the kernel's peak counts anew, where it can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(key)), 0)
