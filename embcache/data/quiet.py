"""Decoding without stray warnings."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()  # warning filters belong to the process: one thread at a time may change them


@contextmanager
def quiet(module: str) -> Iterator[None]:
    """Ignore warnings raised in modules whose name matches ``module``; filters set inside end with the block."""
    with _lock, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=module)
        yield
