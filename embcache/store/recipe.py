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
        for name in ("backbone", "architecture", "weights_sha256", "decoder", "pooling", "precision", "dtype"):
            _require(isinstance(getattr(self, name), str), name, "a string", getattr(self, name))
        _require(type(self.numerics) is int, "numerics", "an integer", self.numerics)
        _require(isinstance(self.transform, Mapping), "transform", "an object", self.transform)
        _require(self.precision in PRECISIONS, "precision", " | ".join(PRECISIONS), self.precision)
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
        if not isinstance(data, Mapping):
            raise RecipeError("a recipe is not a JSON object", found=type(data).__name__)
        names = [field.name for field in fields(cls)]
        missing, unknown = [n for n in names if n not in data], [n for n in data if n not in names]
        if missing or unknown:
            raise RecipeError(
                "a recipe does not have the fields of this version of embcache",
                expected=", ".join(names),
                found=f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(map(str, unknown)) or 'none'}",
                fix="read it with the version of embcache that wrote it, or extract again",
            )
        return cls(**data)

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Fields in which two recipes differ, as ``{field: (mine, theirs)}``; empty when they are the same.

        Parameters of the transform are compared one by one, as ``transform.NAME``; an absent one is ``None``.
        """
        mine, theirs = _flat(self.to_json()), _flat(other.to_json())
        names = [*mine, *(name for name in theirs if name not in mine)]
        return {
            name: (mine.get(name), theirs.get(name))
            for name in names
            if (name in mine) != (name in theirs) or canonical_json(mine[name]) != canonical_json(theirs[name])
        }


def _flat(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{name: value for name, value in data.items() if name != "transform"},
        **{f"transform.{name}": value for name, value in data["transform"].items()},
    }


def _require(holds: bool, field: str, expected: str, found: object) -> None:
    if not holds:
        raise RecipeError(f"a recipe's field {field} is not as it should be", expected=expected, found=repr(found))
