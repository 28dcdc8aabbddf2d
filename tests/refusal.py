"""Asserts that something is refused with an error of some class and code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from embcache.errors import EmbcacheError


@contextmanager
def refused(kind: type[EmbcacheError], code: str) -> Iterator[pytest.ExceptionInfo[EmbcacheError]]:
    """Assert it of the block; ``caught.value`` then has the error's fields."""
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.code == code, f"{caught.value.code!r}, not {code!r}: {caught.value}"
