"""Files that others can write, checked before they are used: checksums, sealed JSON, JSON by its types, and Parquet.

A sealed JSON file carries a checksum of its own, so that no flipped bit in it goes unnoticed. A checksum says that
bytes are those that were written, not that they mean anything: in a shared home every value may be of any type, size or
depth. `parse` bounds size and depth, `typed` checks a value against an annotation.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import google_crc32c

from embcache.errors import CorruptStoreError, RecipeError
from embcache.io import open_regular, read_regular

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_CHUNK = 1 << 20
_LEAVES = (str, int, float, type(None))
DEEPEST = 40
"""Lists and objects within each other; embcache writes at most ten."""

_LARGEST = 1 << 63
_PLAIN = {None: type(None), type(None): type(None), bool: bool, str: str, int: int, float: float}
_NAMES = {float: "a number", type(None): "null"}


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no whitespace, characters as they are and floats by ``repr``: one text per value."""
    try:
        _refuse_other_keys(value)
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except (TypeError, ValueError) as error:
        raise RecipeError(
            "a value of a recipe cannot be written as JSON", code="recipe-json", found=str(error),
            expected="finite numbers, strings, booleans, null, lists, and objects with string keys",
        ) from error  # fmt: skip
    return text


def _refuse_other_keys(value: Any) -> None:
    # json.dumps would turn the keys 1 and "1" into the same text, hence two recipes into one.
    if isinstance(value, (list, tuple)):
        for item in value:
            if not isinstance(item, _LEAVES):  # a plan has thousands of them
                _refuse_other_keys(item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"key {key!r} is not a string")
            _refuse_other_keys(item)


def crc32c(data: bytes) -> str:
    """Castagnoli checksum of ``data``, 8 hex digits."""
    return f"{google_crc32c.value(data):08x}"


def file_checksum(path: Path) -> dict[str, Any]:
    """Size and crc32c of a file, read in pieces: models do not fit in memory twice."""
    size, checksum = 0, 0
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            size, checksum = size + len(chunk), google_crc32c.extend(checksum, chunk)
    return {"size": size, "crc32c": f"{checksum:08x}"}


def open_parquet(data: bytes, columns: list[str] | None = None, most_rows: int = 0) -> tuple[pq.ParquetFile, pa.Table]:
    """A Parquet file that others can write, and its table; a ValueError where it claims more rows than it can hold.

    ``most_rows`` are allowed however few bytes there are: values may be equal.
    """
    import pyarrow.parquet as pq

    file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
    names = file.schema_arrow.names
    if len(set(names)) < len(names) or file.metadata.num_rows > max(4 * len(data), most_rows):
        raise ValueError(f"{file.metadata.num_rows:,} rows and {len(names):,} columns in {len(data):,} bytes")
    return file, file.read(columns=columns)


def read_sealed(path: Path, fix: str, *, indent: int | None = 1, most: int = 1 << 28) -> dict[str, Any]:
    """Content of a sealed file of at most ``most`` bytes; raises as `unseal`, and OSError where it cannot be read."""
    return unseal(read_regular(path, most=most), path, fix, indent=indent)


def seal(content: dict[str, Any], *, indent: int | None = 1) -> bytes:
    """JSON of ``content`` with a last key ``crc32c`` over all the others; the same bytes for equal content."""
    checked = {**content, "crc32c": crc32c(canonical_json(content).encode("utf-8"))}
    return json.dumps(checked, indent=indent, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"


def unseal(data: bytes, where: Path, fix: str, *, indent: int | None = 1) -> dict[str, Any]:
    """Content of sealed bytes, without its checksum."""
    found, cause = f"{len(data)} bytes with another checksum", None
    try:
        content = parse(data)
        del content["crc32c"]
        # Comparing the whole text also catches a flip in the whitespace, which parsing would forgive.
        if seal(content, indent=indent) == data:
            return dict(content)
    except Exception as error:  # whatever a flipped bit makes of the parser
        found, cause = f"{type(error).__name__}: {error}", error
    raise CorruptStoreError(
        "a file of the feature store is damaged", code="file-damaged", found=found, where=where, fix=fix,
        expected="the bytes that its checksum was taken from",
    ) from cause  # fmt: skip


def parse(data: bytes) -> Any:
    """JSON bytes as plain data; a ValueError for anything else."""
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {DEEPEST} levels") from error
    check_depth(value)
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


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
    """Plain JSON data as a value of an annotated type; a ValueError names the first value of another type."""
    if kind in _PLAIN:
        return _scalar(_PLAIN[kind], value, name)
    origin, inner = _parts(kind)
    if kind is Any:
        return value
    if kind is Path:
        return Path(_scalar(str, value, name))
    if origin in (Union, types.UnionType):
        return _either(inner, kind, value, name)
    if origin in (Required, NotRequired):
        return typed(inner[0], value, name)
    if origin is Literal:
        if not isinstance(value, str | int) or value not in inner:
            raise _wrong(name, " or ".join(map(repr, inner)), value)
        return value
    if origin in (list, tuple, Sequence):
        fixed = origin is tuple and inner[-1] is not Ellipsis
        if not isinstance(value, list | tuple) or (fixed and len(value) != len(inner)):
            raise _wrong(name, f"a list of {len(inner)}" if fixed else "a list", value)
        kinds = inner if fixed else (inner[0],) * len(value)
        found = [typed(each, item, f"{name}[{k}]") for k, (each, item) in enumerate(zip(kinds, value, strict=True))]
        return tuple(found) if origin is tuple else found
    if not isinstance(value, Mapping):
        raise _wrong(name, "an object", value)
    if origin in (dict, Mapping):
        return {_scalar(str, key, name): typed(inner[1], each, f"{name}.{key}"[:200]) for key, each in value.items()}
    return _fields(kind, value, name)


@functools.cache
def _parts(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    return get_origin(kind), get_args(kind)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def typed_fields(kind: Any, data: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """Values for some fields of a dataclass, each read as `typed` reads its annotation; unknown keys are refused."""
    if unknown := sorted(set(data) - {field.name for field in dataclasses.fields(kind)}):
        raise ValueError(f"{name}: unknown keys {unknown}".lstrip(": ")[:300])
    return {key: typed(_hints(kind)[key], value, f"{name}.{key}".lstrip(".")) for key, value in data.items()}


def _fields(kind: Any, value: Mapping[str, Any], name: str) -> Any:
    """A TypedDict, in which other keys may have any value, or a dataclass, in which there may be no others."""
    data = {_scalar(str, key, name): each for key, each in value.items()}
    if is_typeddict(kind):
        hints = _hints(kind)  # `__required_keys__` does not know Required in postponed annotations
        needed = [
            key
            for key, hint in hints.items()
            if get_origin(hint) is Required or (key in kind.__required_keys__ and get_origin(hint) is not NotRequired)
        ]
        found = {key: typed(hints[key], each, f"{name}.{key}") if key in hints else each for key, each in data.items()}
    else:
        needed = [
            field.name
            for field in dataclasses.fields(kind)
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        ]
        found = typed_fields(kind, data, name)
    if missing := sorted(set(needed) - set(data)):
        raise ValueError(f"{name}: no {missing[0]!r}".lstrip(": "))
    return found if is_typeddict(kind) else kind(**found)


def _scalar(kind: type, value: Any, name: str) -> Any:
    number = kind is float and type(value) in (int, float)
    if not number and type(value) is not kind:
        raise _wrong(name, _NAMES.get(kind, kind.__name__), value)
    if type(value) in (int, float) and not abs(value) < _LARGEST:  # also what is not a number
        raise _wrong(name, "a finite number that means something", value)
    if type(value) is str and not value.isascii():
        value.encode("utf-8")  # UnicodeEncodeError, a ValueError: half of a surrogate pair
    if type(value) is str and "\0" in value:
        raise _wrong(name, "text without NUL", value)
    return value


def _either(kinds: Sequence[Any], kind: Any, value: Any, name: str) -> Any:
    deeper = None
    for each in kinds:
        try:
            return typed(each, value, name)
        except ValueError as error:
            if not str(error).startswith(f"{name}:"):
                deeper = deeper or error
    raise deeper or _wrong(name, str(kind).replace("typing.", "").replace("NoneType", "null")[:120], value)


def _wrong(name: str, expected: str, value: Any) -> ValueError:
    text = repr(value) if not isinstance(value, int) or abs(value) < _LARGEST else "a huge number"
    return ValueError(f"{name}: {text[:80]}, not {expected}")


def plain(value: Any) -> Any:
    """Dataclasses, paths and tuples as plain JSON data; the inverse of `typed`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value if isinstance(value, _LEAVES) else str(value)


class Plain:
    """Base of dataclasses of which all is shown."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, every field by its name."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]  # of a dataclass


def file_records(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """Size and checksum of each file, for a commit."""
    return {name: {"size": len(data), "crc32c": crc32c(data)} for name, data in sorted(files.items())}


def hash_files(files: Mapping[str, bytes]) -> str:
    """Sha256 over names and bytes of files: equal work is one attempt."""
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        digest.update(f"{len(name.encode())} {name} {len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest()
