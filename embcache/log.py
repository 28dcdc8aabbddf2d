"""What happens, through ``logging.getLogger("embcache")``; the command line shows it on stderr."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("embcache")
log.addHandler(logging.NullHandler())


class _Handler(logging.Handler):
    def __init__(self, show: Callable[[str], object]) -> None:
        super().__init__()
        self._show, self._shown = show, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        """Show one message, once."""
        if (text := record.getMessage()) not in self._shown:
            self._shown.add(text)
            self._show(text)


@contextmanager
def shown(show: Callable[[str], object], level: int = logging.INFO) -> Iterator[None]:
    """Call ``show`` once with every message of at least this level while the block runs."""
    handler, before = _Handler(show), log.level
    log.addHandler(handler)
    log.setLevel(level)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
