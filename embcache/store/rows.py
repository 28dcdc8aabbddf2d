"""The plain data that goes into a store and comes out of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from embcache.errors import StoreError

Bytes = bytes | memoryview  # verified bytes of a file; of a memoryview only until its memory is used again
NUMERIC_KINDS = "biufc"  # numpy's kinds of dtype that a row may have
HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)  # a plan of a million images has as many
class PlanEntry:
    """One row that a shard owes, and the state in which its source file was seen."""

    id: str  # the image's id in its dataset
    size: int  # bytes of the source file when planned; -1 where unknown
    mtime_ns: int  # its modification time in nanoseconds; -1 where unknown
    digest: str | None = None  # sha256 of the image's bytes, 64 hex digits, once known

    def __post_init__(self) -> None:
        check_id(self.id)
        if type(self.size) is not int or type(self.mtime_ns) is not int:
            raise StoreError(
                "a file's size and time are whole numbers", found=f"{self.size!r}, {self.mtime_ns!r}"[:200]
            )
        if self.digest is not None and not HEX_DIGEST.fullmatch(self.digest):
            raise StoreError("a digest is not a sha256", expected="64 hex digits", found=repr(self.digest))


@dataclass(frozen=True)
class RowIndex:
    """What a shard says of its rows besides the features."""

    ids: tuple[str, ...]  # unique within the shard
    valid: np.ndarray  # (n,); false where the image could not be read
    digests: tuple[str, ...]  # sha256 of each image's bytes, 64 hex digits, ``""`` where unknown
    reasons: tuple[str, ...]  # why a row is not valid; ``""`` where it is


@dataclass(frozen=True)
class PlainFeatures:
    """The file of a shard that begins with its features, row by row as they lie in memory."""

    file: str  # its name in the shard
    shape: tuple[int, ...]  # (n, *row_shape); the file may hold more, which is padding
    dtype: np.dtype[Any]  # in this machine's byte order


@dataclass(frozen=True)
class ShardRows:
    """The computed rows of one shard; features of rows that are not valid become zeros."""

    ids: tuple[str, ...]  # unique, UTF-8, without NUL
    features: np.ndarray  # (n, *row_shape); any numeric or boolean dtype of numpy
    valid: np.ndarray  # (n,); false where the image could not be read
    digests: tuple[str, ...]  # sha256 of each image's bytes, 64 hex digits, ``""`` where unknown
    reasons: tuple[str, ...]  # why a row is not valid

    def __post_init__(self) -> None:
        n = len(self.ids)
        if self.valid.shape != (n,) or self.valid.dtype != np.bool_:
            raise StoreError("valid needs one boolean per id", expected=f"bool ({n},)", found=_shape(self.valid))
        if self.features.ndim < 1 or self.features.shape[0] != n or self.features.dtype.kind not in NUMERIC_KINDS:
            raise StoreError(
                "features do not have one row per id", expected=f"numbers ({n}, …)", found=_shape(self.features)
            )
        if len(self.digests) != n or len(self.reasons) != n:
            raise StoreError(
                "a shard's columns differ in length",
                expected=f"{n} digests and reasons",
                found=f"{len(self.digests)} digests, {len(self.reasons)} reasons",
            )
        check_ids(self.ids)
        for digest in self.digests:
            if digest and not HEX_DIGEST.fullmatch(digest):
                raise StoreError("a digest is not a sha256", expected="64 hex digits", found=repr(digest))
        for id_, valid, reason in zip(self.ids, self.valid, self.reasons, strict=True):
            if bool(valid) == bool(reason):
                found = f"{id_!r}: valid is {bool(valid)}, reason {reason!r}"
                raise StoreError("a row has a reason exactly when it is not valid", found=found)
        object.__setattr__(self, "reasons", tuple(map(_storable, self.reasons)))

    @property
    def index(self) -> RowIndex:
        """The rows without their features."""
        return RowIndex(self.ids, self.valid, self.digests, self.reasons)

    def blanked(self) -> ShardRows:
        """Return the rows with zeros for features that are not valid.

        What a network made of an unreadable image depends on its neighbours in the batch: it is never kept.
        """
        if not self.features[~self.valid].any():
            return self  # nothing to blank: a shard of pixels is not copied for it
        features = self.features.copy()
        features[~self.valid] = 0
        return replace(self, features=features)


def check_id(id_: str) -> None:
    """Raise a StoreError unless ``id_`` is a non-empty string of UTF-8 without NUL."""
    if isinstance(id_, str) and id_.isascii() and id_ and "\0" not in id_:
        return  # nearly all: a plan of a million images asks for each
    try:
        fits = isinstance(id_, str) and id_ != "" and "\0" not in id_
        str(id_).encode("utf-8")
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise StoreError("an id cannot be stored", expected="UTF-8, not empty, without NUL", found=repr(id_)[:400])


def check_ids(ids: Sequence[str]) -> None:
    """Raise a StoreError unless every id can be stored and there is at least one, and none twice."""
    if not ids:
        raise StoreError("a shard has no rows", expected="at least one id")
    seen: set[str] = set()
    for id_ in ids:
        check_id(id_)
        if id_ in seen:
            raise StoreError("an id is given twice in one shard", found=repr(id_), fix="make the dataset's ids unique")
        seen.add(id_)


def digests_to_bytes(digests: Sequence[str]) -> np.ndarray:
    """Hex digests as ``uint8 (n, 32)``; a row of zeros where unknown."""
    raw = b"".join(bytes.fromhex(digest) if digest else bytes(32) for digest in digests)
    return np.frombuffer(raw, np.uint8).reshape(len(digests), 32)


def digests_from_bytes(raw: np.ndarray) -> tuple[str, ...]:
    """Invert :func:`digests_to_bytes`."""
    digits, unknown = raw.tobytes().hex(), "0" * 64
    found = (digits[start : start + 64] for start in range(0, len(digits), 64))
    return tuple("" if digest == unknown else digest for digest in found)


def _storable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")


def _shape(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"
