"""Stopping between two shards: the first signal lets the current shard be committed, the second does not wait."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class Stop:
    """Whether a run is to end after the current shard; other threads may request it at any time."""

    def __init__(self) -> None:
        self.left = 0  # images of the current shard
        self.signal: int | None = None
        self.others = self.killed = self.complete = False
        self._requested = threading.Event()
        self._callbacks: list[Callable[[], object]] = []

    @property
    def requested(self) -> bool:
        """Whether no further shard is to begin."""
        return self._requested.is_set()

    def request(self) -> None:
        """Let no further shard begin."""
        self._requested.set()
        for callback in self._callbacks:
            callback()

    def on_request(self, callback: Callable[[], object]) -> None:
        """Call something at the request, or now if there was one."""
        self._callbacks.append(callback)
        if self.requested:
            callback()

    def wait(self, seconds: float) -> None:
        """Sleep, unless the run is to end."""
        self._requested.wait(seconds)

    @contextmanager
    def working_on(self, images: int) -> Iterator[None]:
        """A shard of so many images is computed and committed meanwhile."""
        self.left = max(1, images)
        try:
            yield
        finally:
            self.left = 0

    def computed(self, images: float) -> None:
        """So many more images of the current shard are computed; one counts until the shard is committed."""
        if self.left:
            self.left = max(1, int(self.left - images))


@contextmanager
def stop_on_signals(stop: Stop) -> Iterator[Stop]:
    """SIGINT and SIGTERM request a stop; a second one, or one between shards, ends the run at once.

    If everything is computed, the first one is only noted. Outside the main thread, where Python allows no handlers,
    nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        first, stop.signal = stop.signal is None, number
        if not first or not (stop.left or stop.others or stop.complete):
            stop.request()  # Python drops what is raised while an object is finalized: then no further shard begins
            raise SystemExit(exit_status(number))
        if stop.complete and not stop.left:
            return  # what remains takes a moment
        left = f"{stop.left:,} of its images left" if stop.left else "of another device"
        # Straight to the descriptor: a handler may interrupt Python's own writing to the stream.
        with suppress(OSError):  # the reader is gone
            text = f"\nstopping after the current shard ({left}); again stops at once\n"
            os.write(2, text.encode("ascii", "backslashreplace"))
        stop.request()

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_status(number: int) -> int:
    """What shells expect of a process that a signal ended: 128 plus its number."""
    return 128 + int(number)
