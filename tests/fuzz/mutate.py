"""Changes to a file's bytes as plain data, so that hypothesis can shrink them and a failure can be told in one line."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

KINDS = ("flip", "byte", "number", "cut", "remove", "repeat", "splice", "zeros", "field", "field", "field")
# Sizes and counts at the edges of what 8, 16, 32 and 64 bits hold, of Pillow's limit, and small ones.
NUMBERS = (
    0, 1, 2, 3, 4, 7, 8, 13, 16, 255, 256, 257, 4095, 9459, 9460, 13376, 16384, 32767, 32768, 40000, 65535, 65536,
    2**20, 89_478_485, 2**27, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 16, 2**40, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip


@dataclass(frozen=True)
class Field:
    """Where a file keeps a number: offset, bytes and their order."""

    at: int
    size: int
    order: str = "little"


@dataclass(frozen=True)
class Seed:
    """A whole file, its known fields, and what makes its checksums true again after a change."""

    name: str
    data: bytes
    fields: tuple[Field, ...] = ()
    repair: Callable[[bytes], bytes] = field(default=lambda data: data, compare=False)


@dataclass(frozen=True)
class Change:
    """One change; places are shares of the file, so that they hold for every length."""

    kind: str
    at: float
    value: int
    span: float


def mutate(seed: Seed, changes: Sequence[Change], others: Sequence[Seed]) -> bytes:
    """The seed's bytes after the changes, its checksums repaired where the last change's value is odd."""
    data = bytearray(seed.data)
    for change in changes:
        _apply(data, change, seed.fields, others)
    return seed.repair(bytes(data)) if changes and changes[-1].value % 2 else bytes(data)


def _apply(data: bytearray, change: Change, fields: Sequence[Field], others: Sequence[Seed]) -> None:
    at = min(int(change.at * len(data)), max(len(data) - 1, 0))
    end = min(at + 1 + int(change.span**4 * len(data)), len(data))
    number = NUMBERS[change.value % len(NUMBERS)]
    if change.kind == "field" and fields:
        spot = fields[int(change.at * len(fields)) % len(fields)]
        _put(data, spot.at, spot.size, spot.order, number if change.span < 0.7 else change.value)
    elif change.kind == "flip" and data:
        data[at] ^= 1 << change.value % 8
    elif change.kind == "byte" and data:
        data[at] = change.value % 256
    elif change.kind in ("number", "field"):
        _put(data, at, (1, 2, 4, 8)[change.value % 4], ("little", "big")[change.value // 4 % 2], number)
    elif change.kind == "cut":
        del data[at:]
    elif change.kind == "remove":
        del data[at:end]
    elif change.kind == "repeat":
        data[end:end] = bytes(data[at:end]) * (1 + change.value % 8)
    elif change.kind == "zeros":
        data[at:at] = bytes(1 + int(change.span * 64))
    elif change.kind == "splice":
        other = others[change.value % len(others)].data
        start = int(change.span * len(other))
        data[at:end] = other[start : start + (end - at)]


def _put(data: bytearray, at: int, size: int, order: str, number: int) -> None:
    if at + size <= len(data):
        data[at : at + size] = (number % 256**size).to_bytes(size, "little" if order == "little" else "big")


def random_changes(dice: random.Random) -> tuple[Change, ...]:
    """One to eight changes, mostly few."""
    number = min(8, 1 + int(dice.expovariate(0.7)))
    return tuple(Change(dice.choice(KINDS), dice.random(), dice.randrange(2**32), dice.random()) for _ in range(number))


def changes() -> st.SearchStrategy[list[Change]]:
    """The same for hypothesis."""
    share = st.floats(0, 1, exclude_max=True)
    one = st.builds(Change, st.sampled_from(KINDS), share, st.integers(0, 2**32 - 1), share)
    return st.lists(one, min_size=1, max_size=8)
