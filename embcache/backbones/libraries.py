"""What the modules that load models with an optional library share: its import, and its refusals as one message."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from embcache.errors import EmbcacheError, UsageError, WeightsError


def need(module: str, prefix: str, extra: str) -> Any:
    """Import a library that models with a prefix need; an extra of embcache installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"backbones {prefix}:… need {module}",
            code="library-missing",
            found=str(error),
            fix=f"pip install 'embcache[{extra}]'",
        ) from error


@contextmanager
def refusing(library: str, name: str, code: str, expected: str) -> Iterator[None]:
    """In a ``with`` block, what a library refuses of a model as one message."""
    try:
        yield
    except EmbcacheError:
        raise
    except Exception as error:  # libraries raise whatever a file of others brings about
        raise WeightsError(
            f"{library} cannot load {name}", code=code, expected=expected,
            found=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"[:300],
        ) from error  # fmt: skip
