"""Decoding without stray warnings."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Warning filters belong to the process. They are set when the first thread begins to decode and put back when the last
# one ends; in between threads decode side by side, and filters are only ever added.
_lock = threading.Lock()
_inside = 0
_installed: set[str] = set()
_saved = warnings.catch_warnings()


@contextmanager
def quiet(module: str) -> Iterator[None]:
    """Ignore warnings raised in modules whose name matches ``module``. Nothing is decided by it.

    Any number of threads may be inside at once, each with filters of its own choice: all of them hold until the last
    thread has left.
    """
    if getattr(sys.flags, "context_aware_warnings", False):  # each thread has filters of its own
        with warnings.catch_warnings():
            _install(module)
            yield
        return
    _enter(module)
    try:
        yield
    finally:
        _leave()


def _enter(module: str) -> None:
    global _inside, _saved
    with _lock:
        if not _inside:
            _saved = warnings.catch_warnings()
            _saved.__enter__()
        _inside += 1
        if module not in _installed:
            _install(module)
            _installed.add(module)


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if not _inside:
            _installed.clear()
            _saved.__exit__(None, None, None)


def _install(module: str) -> None:
    warnings.filterwarnings("ignore", module=module)
