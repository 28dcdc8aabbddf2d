"""JSON that others can write, read by the types that it must have.

A checksum says that bytes are those that somebody wrote, not that they mean anything: in a shared home every value may
be of any type, size or depth. `parse` bounds size and depth, `typed` holds a value against an annotation.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints, is_typeddict

DEEPEST = 40
"""Lists and objects within each other; embcache writes at most ten."""

_LARGEST = 1 << 63


def parse(data: bytes) -> Any:
    """JSON bytes as plain data."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {DEEPEST} levels") from error
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raise a ValueError for plain data that is nested deeper than `DEEPEST`."""
    level = [value]
    for _ in range(DEEPEST):
        nodes = [node for node in level if isinstance(node, dict | list)]
        level = [inner for node in nodes for inner in (node.values() if isinstance(node, dict) else node)]
        if not level:
            return
    raise ValueError(f"nested deeper than {DEEPEST} levels")


def typed(kind: Any, value: Any, name: str = "") -> Any:
    """Plain JSON data as a value of an annotated type."""
    return _reader(kind)(value, name)


@functools.cache
def _reader(kind: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value, name: value
    if kind in (None, type(None), bool, str, int, float):
        return functools.partial(_plain, type(None) if kind is None else kind)
    if kind is Path:
        return lambda value, name: Path(_plain(str, value, name))
    if origin in (Union, types.UnionType):
        return functools.partial(_either, [_reader(each) for each in arguments], kind)
    if origin is Literal:
        return functools.partial(_one_of, arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return functools.partial(_row, [_reader(each) for each in arguments])
    if origin in (list, tuple, Sequence):
        return functools.partial(_list, tuple if origin is tuple else list, _reader(arguments[0]))
    if origin in (dict, Mapping):
        return functools.partial(_object, _reader(arguments[1]))
    if origin in (Required, NotRequired):
        return _reader(arguments[0])
    if is_typeddict(kind):
        hints = get_type_hints(kind, include_extras=True)  # what `__required_keys__` misses in postponed annotations
        needed = {key for key, hint in hints.items() if get_origin(hint) is Required}
        needed |= {key for key in kind.__required_keys__ if get_origin(hints[key]) is not NotRequired}
        return functools.partial(_keys, {key: _reader(hint) for key, hint in hints.items()}, needed)
    if not dataclasses.is_dataclass(kind):
        raise TypeError(f"no JSON is read as {kind}")
    return functools.partial(_dataclass, kind)


def typed_fields(kind: Any, data: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """Values for some fields of a dataclass, each read as `typed` reads its annotation; unknown keys are refused."""
    hints = get_type_hints(kind)
    if unknown := sorted(set(data) - {field.name for field in dataclasses.fields(kind)}):
        raise ValueError(f"{name}: unknown keys {unknown}".lstrip(": ")[:300])
    return {key: _reader(hints[key])(value, f"{name}.{key}".lstrip(".")) for key, value in data.items()}


def _plain(kind: type, value: Any, name: str) -> Any:
    number = kind is float and type(value) in (int, float)
    if not number and type(value) is not kind:
        raise _wrong(name, {float: "a number", type(None): "null"}.get(kind, kind.__name__), value)
    if type(value) in (int, float) and not abs(value) < _LARGEST:  # also what is not a number
        raise _wrong(name, "a finite number that means something", value)
    if type(value) is str and not value.isascii():
        value.encode("utf-8")  # UnicodeEncodeError, a ValueError: half of a surrogate pair
    if type(value) is str and "\0" in value:
        raise _wrong(name, "text without NUL", value)
    return value


def _either(readers: Sequence[Any], kind: Any, value: Any, name: str) -> Any:
    errors = []
    for read in readers:
        try:
            return read(value, name)
        except ValueError as error:
            errors.append(error)
    shown = [error for error in errors if not str(error).startswith(f"{name}:")] or [_wrong(name, _words(kind), value)]
    raise shown[0]


def _one_of(choices: Sequence[Any], value: Any, name: str) -> Any:
    if not isinstance(value, str | int) or value not in choices:
        raise _wrong(name, " or ".join(map(repr, choices)), value)
    return value


def _row(readers: Sequence[Any], value: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple) or len(value) != len(readers):
        raise _wrong(name, f"a list of {len(readers)}", value)
    return tuple(read(each, f"{name}[{k}]") for k, (read, each) in enumerate(zip(readers, value, strict=True)))


def _list(kind: type, read: Any, value: Any, name: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong(name, "a list", value)
    return kind(read(each, f"{name}[{k}]") for k, each in enumerate(value))


def _object(read: Any, value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(name, "an object", value)
    return {_plain(str, key, name): read(each, f"{name}.{key}"[:200]) for key, each in value.items()}


def _keys(readers: Mapping[str, Any], needed: set[str], value: Any, name: str) -> dict[str, Any]:
    found = _object(_reader(Any), value, name)
    if missing := sorted(needed - set(found)):
        raise ValueError(f"{name}: no {missing[0]!r}".lstrip(": "))
    return {key: readers[key](each, f"{name}.{key}") if key in readers else each for key, each in found.items()}


def _dataclass(kind: Any, value: Any, name: str) -> Any:
    found = typed_fields(kind, _object(_reader(Any), value, name), name)
    for field in dataclasses.fields(kind):
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if not optional and field.name not in found:
            raise ValueError(f"{name}: no {field.name!r}".lstrip(": "))
    return kind(**found)


def _words(kind: Any) -> str:
    return str(kind).replace("typing.", "").replace("NoneType", "null")[:120]


def _wrong(name: str, expected: str, value: Any) -> ValueError:
    text = repr(value) if not isinstance(value, int) or abs(value) < _LARGEST else "a huge number"
    return ValueError(f"{name}: {text[:80]}, not {expected}")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
