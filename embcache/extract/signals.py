"""Stopping between two shards: the first signal lets the current shard be committed, the second does not wait."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class Stop:
    """Says whether a run is to end after the current shard; other threads may ask for it at any time."""

    def __init__(self) -> None:
        self.left = 0
        self.signal: int | None = None
        self.others = self.killed = self.complete = False
        self._asked = threading.Event()
        self._told: list[Callable[[], object]] = []

    @property
    def asked(self) -> bool:
        """Whether no further shard is to be begun."""
        return self._asked.is_set()

    def ask(self) -> None:
        """Let no further shard begin."""
        self._asked.set()
        for tell in self._told:
            tell()

    def on_ask(self, tell: Callable[[], object]) -> None:
        """Have somebody told when it is asked, also if it has been."""
        self._told.append(tell)
        if self.asked:
            tell()

    def wait(self, seconds: float) -> None:
        """Sleep, unless the run is to end."""
        self._asked.wait(seconds)

    @contextmanager
    def at_hand(self, images: int) -> Iterator[None]:
        """A shard of so many images is computed and committed meanwhile."""
        self.left = max(1, images)
        try:
            yield
        finally:
            self.left = 0

    def through(self, images: float) -> None:
        """So many images of the current shard are computed; one counts until the shard is committed."""
        if self.left:
            self.left = max(1, int(self.left - images))


@contextmanager
def stop_on_signals(stop: Stop, tell: Callable[[str], object] | None = None) -> Iterator[Stop]:
    """SIGINT and SIGTERM ask ``stop`` to stop; a second one, or one between shards, ends the run at once.

    Where everything is computed the first one is noted only.

    Nothing is done outside the main thread, where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        first, stop.signal = stop.signal is None, number
        if not first or not (stop.left or stop.others or stop.complete):
            stop.ask()  # Python drops what is raised while an object is finalized: then no further shard begins
            raise SystemExit(exit_status(number))
        if stop.complete and not stop.left:
            return  # what remains takes a moment
        left = f"{stop.left:,} of its images left" if stop.left else "of another device"
        (tell or _tell)(f"stopping after the current shard ({left}); again stops at once")
        stop.ask()

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_status(number: int) -> int:
    """What shells expect of a process that a signal ended: 128 and its number."""
    return 128 + int(number)


def _tell(line: str) -> None:
    # Straight to the descriptor: a handler may run in the midst of Python's own writing to the stream.
    with suppress(OSError):  # nobody listens
        os.write(2, f"\n{line}\n".encode("ascii", "backslashreplace"))
