"""A recipe's fingerprint: the same for the same recipe, another for any other."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embcache.errors import RecipeError
from embcache.sealed import canonical_json
from embcache.store.feature_store import describe_differences
from embcache.store.schema import Recipe
from tests.refusal import refused
from tests.store.build import RECIPE, recipe

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)


def test_the_fingerprint_is_the_sha256_of_canonical_json() -> None:
    text = json.dumps(RECIPE.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert RECIPE.fingerprint == hashlib.sha256(text.encode()).hexdigest()
    assert canonical_json({"b": [0.1, 1e22], "a": "é"}) == '{"a":"é","b":[0.1,1e+22]}'


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Recipe) if field.name != "model"])
def test_every_field_is_part_of_the_fingerprint(field: str) -> None:
    changes = {"transform": {**RECIPE.transform, "size": [256, 256]}, "precision": "bf16", "numerics": 2}
    other = recipe(**{field: changes.get(field, "something else")})
    assert other.fingerprint != RECIPE.fingerprint
    assert {name.split(".")[0] for name in other.differences(RECIPE)} == {field}


@given(transform=st.dictionaries(TEXT, JSON, max_size=4))
def test_a_recipe_survives_json_with_its_fingerprint(transform: dict[str, object]) -> None:
    one = recipe(transform=transform)
    two = Recipe.from_json(json.loads(json.dumps(one.to_json())))
    assert (two, two.fingerprint, hash(two)) == (one, one.fingerprint, hash(one))
    assert one.differences(two) == {}


def test_tuples_and_lists_are_the_same_recipe_and_order_does_not_count() -> None:
    reordered = dict(reversed(list(RECIPE.transform.items())))
    assert recipe(transform=reordered) == RECIPE
    assert recipe(transform={"size": (1, 2)}).fingerprint == recipe(transform={"size": [1, 2]}).fingerprint


def test_differences_name_the_parameter_of_the_transform() -> None:
    other = recipe(transform={**RECIPE.transform, "crop": None, "kind": "imagenet"}, precision="bf16")
    assert RECIPE.differences(other) == {
        "precision": ("fp32", "bf16"),
        "transform.crop": ([224, 224], None),
        "transform.kind": ("paper", "imagenet"),
    }
    lines = describe_differences([RECIPE, other])
    assert lines[0].startswith(RECIPE.fingerprint[:12])
    assert "precision = bf16" in lines[1]
    assert "architecture" not in "".join(lines)


def test_one_and_one_point_nought_differ() -> None:
    assert recipe(transform={"a": 1}).differences(recipe(transform={"a": 1.0})) == {"transform.a": (1, 1.0)}
    assert recipe(transform={"a": None}).differences(recipe(transform={})) == {"transform.a": (None, None)}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, object(), "\ud800", b"x", {"a": {(1, 2): 3}}])
def test_what_json_cannot_say_is_refused(value: object) -> None:
    with refused(RecipeError, "recipe-json"):
        recipe(transform={"x": value})


def test_unknown_missing_and_mistyped_fields_are_refused() -> None:
    data = RECIPE.to_json()
    with refused(RecipeError, "recipe-fields"):
        Recipe.from_json({**data, "color": "red"})
    with refused(RecipeError, "recipe-fields"):
        Recipe.from_json({name: value for name, value in data.items() if name != "pooling"})
    with refused(RecipeError, "recipe-field"):
        Recipe.from_json({**data, "numerics": True})
    with refused(RecipeError, "recipe-precision"):
        Recipe.from_json({**data, "precision": "fp8"})
    with refused(RecipeError, "recipe-fields"):
        Recipe.from_json(["backbone"])  # type: ignore[arg-type]
