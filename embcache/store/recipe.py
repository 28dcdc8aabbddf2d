"""All that determines a feature's value, and the hash that names it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from embcache.errors import RecipeError
from embcache.sealed import canonical_json

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the value of a feature, given the image.

    Not in it: labels, splits, batch size, threads, file format. Two recipes with the same fingerprint are the same.

    Parameters
    ----------
    backbone : str
        Name as the user types it, such as ``dino`` or ``timm:vit_small_patch14_dinov2.lvd142m``.
    architecture : str
        The network, named so that its definition can be found again.
    weights_sha256 : str
        Hex digest that identifies the weights.
    transform : mapping of str to JSON
        Every parameter of the transform. Tuples become lists.
    decoder : str
        Version of the decoding of bytes into pixels.
    pooling : str
        How tokens or maps become one vector.
    precision : {"fp32", "tf32", "bf16", "fp16"}
        Arithmetic of the forward pass.
    dtype : str
        numpy name of the stored features' dtype.
    numerics : int
        Raised when the arithmetic of a forward pass changes.

    Raises
    ------
    RecipeError
        A value has the wrong type, the precision is unknown, or the transform cannot be written as JSON.
    """

    backbone: str
    architecture: str
    weights_sha256: str
    transform: Mapping[str, Any]
    decoder: str
    pooling: str
    precision: str
    dtype: str
    numerics: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            kind = {"numerics": int, "transform": Mapping}.get(name, str)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise RecipeError(
                    f"the field {name} of a recipe has another type", code="recipe-field",
                    expected={int: "an integer", str: "a string"}.get(kind, "an object"), found=repr(value)[:200],
                )  # fmt: skip
        if self.precision not in PRECISIONS:
            raise RecipeError(
                "the precision of a recipe is unknown", code="recipe-precision", expected=" | ".join(PRECISIONS),
                found=repr(self.precision)[:200],
            )  # fmt: skip
        # One shape for equal recipes, whether built from tuples in code or read back from a file.
        object.__setattr__(self, "transform", json.loads(canonical_json(dict(self.transform))))

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """Sha256, 64 hex digits, of the recipe's canonical JSON."""
        return hashlib.sha256(canonical_json(self.to_json()).encode("utf-8")).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as plain JSON data, every field by its name."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """Build a recipe from plain JSON data.

        Raises
        ------
        RecipeError
            A field is missing, unknown or of the wrong type: a recipe of another version is never half understood.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(data, Mapping) or set(data) != set(names):
            raise RecipeError(
                "a recipe does not have the fields of this version of embcache", code="recipe-fields",
                expected=", ".join(names),
                found="missing or unknown: " + ", ".join(sorted(set(names) ^ set(map(str, data))))[:500]
                if isinstance(data, Mapping)
                else type(data).__name__,
                fix="read it with the version of embcache that wrote it, or extract again",
            )  # fmt: skip
        return cls(**data)

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Fields in which two recipes differ, as ``{field: (mine, theirs)}``; empty when they are the same.

        Parameters of the transform are compared one by one, as ``transform.NAME``; an absent one is ``None``.
        """
        mine, theirs = self.flat(), other.flat()
        return {
            name: (mine.get(name), theirs.get(name))
            for name in {**mine, **theirs}
            if (name in mine) != (name in theirs) or canonical_json(mine[name]) != canonical_json(theirs[name])
        }

    def flat(self) -> dict[str, Any]:
        """Return all fields by name, the parameters of the transform as ``transform.NAME``."""
        data = self.to_json()
        transform = data.pop("transform")
        return data | {f"transform.{name}": value for name, value in transform.items()}
