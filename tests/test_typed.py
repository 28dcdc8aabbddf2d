"""JSON by its types: what is right comes back as it was, what is not is refused by name, and nothing recurses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from embcache.sealed import DEEPEST, parse, typed


class Named(TypedDict):
    name: str
    size: NotRequired[int]


@dataclass(frozen=True)
class Inner:
    score: float | None
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    count: int
    inner: tuple[Inner, ...]
    pair: tuple[float, float] | None = None
    rates: Sequence[float] = ()
    more: Mapping[str, Any] = field(default_factory=dict)
    where: Path | None = None
    flag: bool = False


RIGHT: dict[str, Any] = {
    "name": "n", "count": 3, "inner": [{"score": 0.5, "kind": "b"}, {"score": None}], "pair": [1, 2.5], "rates": [1e-3],
    "more": {"x": [1, {"y": None}]}, "where": "a/b", "flag": True,
}  # fmt: skip


def test_what_is_right_comes_back() -> None:
    found = typed(Outer, RIGHT)
    assert found == Outer(
        "n", 3, (Inner(0.5, "b"), Inner(None)), (1, 2.5), [1e-3], {"x": [1, {"y": None}]}, Path("a/b"), True
    )
    assert typed(Outer, {"name": "", "count": 0, "inner": []}) == Outer("", 0, ())
    assert typed(Named, {"name": "x", "other": 7}) == {"name": "x", "other": 7}


WRONG: list[tuple[str, Any, str]] = [
    ("name", 5, "name"),
    ("name", None, "name"),
    ("name", "\0", "name"),
    ("name", "\ud800", "surrogates"),
    ("count", True, "count"),
    ("count", 1.0, "count"),
    ("count", "1", "count"),
    ("count", 2**63, "count"),
    ("inner", {}, "inner"),
    ("inner", [{"score": float("nan")}], r"inner\[0\]"),
    ("inner", [{"score": 10**400}], r"inner\[0\]"),
    ("inner", [{}], "no 'score'"),
    ("inner", [{"score": 1, "else": 1}], "unknown keys"),
    ("inner", [{"score": 1, "kind": "c"}], "'a' or 'b'"),
    ("inner", [{"score": 1, "kind": []}], "'a' or 'b'"),
    ("pair", [1], "pair"),
    ("pair", "ab", "pair"),
    ("rates", [None], r"rates\[0\]"),
    ("more", [], "more"),
    ("where", 7, "where"),
    ("flag", 1, "flag"),
    ("unknown", 1, "unknown"),
]


def test_what_is_not_is_named() -> None:
    for key, value, named in WRONG:
        with pytest.raises(ValueError, match=named):
            typed(Outer, {**RIGHT, key: value})


@pytest.mark.parametrize("value", [{"size": 1}, {"name": "x", "size": "1"}, [], None])
def test_keys_of_a_typed_dict_are_checked(value: Any) -> None:
    with pytest.raises(ValueError, match=r"name|size|an object"):
        typed(Named, value)


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 41 + "]" * 41, '{"a":' * 50 + "1" + "}" * 50, "NaN", "9" * 5000])
def test_json_that_no_file_of_ours_is(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(text.encode())


def test_as_deep_as_allowed() -> None:
    tree: Any = 1
    for _ in range(DEEPEST - 1):
        tree = [tree]
    assert parse(json.dumps(tree).encode()) == tree
    with pytest.raises(ValueError, match="nested"):
        parse(json.dumps([[tree]]).encode())
    with pytest.raises(ValueError, match="utf-8"):
        parse(b"\xff")
