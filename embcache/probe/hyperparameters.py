"""Heads' hyperparameters: which of them a request names, and checks that tell a value of the wrong kind in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import field, fields
from typing import Any

from embcache.errors import UsageError

MOST = 100_000
"""Neighbors, hidden units or iterations."""


def implicit(default: Any) -> Any:
    """A field of a head that says how something is computed, not what: at its default no request names it."""
    return field(default=default, metadata={"implicit": True})


def named_hyperparameters(head: Any) -> dict[str, Any]:
    """The fields of a head but for implicit ones at their default: what a request holds and a run id hashes."""
    pairs = ((f, getattr(head, f.name)) for f in fields(head))
    return {f.name: value for f, value in pairs if not ("implicit" in f.metadata and value == f.default)}


def check_count(head: Any, field: str) -> None:
    """Raise a UsageError unless ``head.field`` is a whole number, one at least, of which a machine can do as many."""
    value = getattr(head, field)
    fits = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST
    _check(head, field, fits, f"a whole number from 1 to {MOST:,}")


def check_positive(head: Any, field: str) -> None:
    """Raise a UsageError unless ``head.field`` is a finite number above 0."""
    _check(head, field, _is_number(getattr(head, field)) and getattr(head, field) > 0, "a number above 0")


def check_rate(head: Any, field: str) -> None:
    """Raise a UsageError unless ``head.field`` is a share: 0 or more, less than 1."""
    _check(head, field, _is_number(getattr(head, field)) and 0 <= getattr(head, field) < 1, "0 or more, less than 1")


def check_list(head: Any, field: str) -> None:
    """Raise a UsageError unless ``head.field`` is a tuple of finite numbers above 0, one at least."""
    values = getattr(head, field)
    fits = isinstance(values, tuple) and bool(values) and all(_is_number(v) and v > 0 for v in values)
    _check(head, field, fits, "numbers above 0, one at least")


def check_choice(head: Any, field: str, choices: Sequence[str]) -> None:
    """Raise a UsageError unless ``head.field`` is one of ``choices``."""
    value = getattr(head, field)
    _check(head, field, isinstance(value, str) and value in choices, ", ".join(choices))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(head: Any, field: str, fits: bool, expected: str) -> None:
    if not fits:
        raise UsageError(
            f"hyperparameter {field!r} of head {head.name!r} has no usable value",
            expected=expected,
            found=repr(getattr(head, field)),
            fix="embcache heads",
        )
