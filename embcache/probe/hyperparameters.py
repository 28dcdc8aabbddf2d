"""Checks of heads' hyperparameters: a value of the wrong kind is told before anything is trained."""

from __future__ import annotations

import math
from typing import Any

from embcache.errors import UsageError


def check_count(head: Any, field: str) -> None:
    """Raise a UsageError unless ``head.field`` is a whole number, one at least."""
    value = getattr(head, field)
    _check(head, field, isinstance(value, int) and not isinstance(value, bool) and value >= 1, "a whole number from 1")


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
