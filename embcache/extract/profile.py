"""Where the time of an extraction goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STEPS = ("decode", "transform", "transfer", "forward", "write", "idle")


class Profile:
    """Seconds of each step of a run; several threads may add at once.

    ``decode``: reading and decoding, and ``transform``: resizing, cropping and views, are summed over the threads that
    do them. ``transfer``: stacking batches and sending them; ``forward``: networks, on a GPU the time that the run
    waited for them; ``write``: commits. ``idle``: the run waited for images, and on a CPU not all decoding threads had
    work then.

    Parameters
    ----------
    workers : int
        Threads that decode.

    Attributes
    ----------
    overlapped : bool
        Whether images are decoded while networks compute: so on a GPU.
    """

    def __init__(self, workers: int = 1) -> None:
        self.workers = workers
        self.overlapped = False
        self._began = time.perf_counter()
        self._seconds = dict.fromkeys(STEPS, 0.0)
        self._lock = threading.Lock()

    def add(self, step: str, seconds: float) -> None:
        """Count seconds of a step."""
        with self._lock:
            self._seconds[step] += seconds

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Count the time of a ``with``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(step, time.perf_counter() - began)

    def seconds(self) -> dict[str, float]:
        """Seconds of each step, of a thread each; without overlap they add up to the time of the shards."""
        with self._lock:
            found = dict(self._seconds)
        for step in ("decode", "transform"):
            found[step] /= self.workers
        if not self.overlapped:
            found["idle"] = max(0.0, found["idle"] - found["decode"] - found["transform"])
        return found

    def shares(self) -> dict[str, float]:
        """Seconds of each step relative to those since the profile was made."""
        wall = time.perf_counter() - self._began
        return {step: spent / wall for step, spent in self.seconds().items()}
