"""Heads: what is trained on cached features. One file of this folder is one head, or a few that share their code.

A head is a frozen dataclass whose fields are its hyperparameters; sizes come from the data. The contract is `Head`:
``fit`` on ``{backbone: (n, D)}`` gives an object with ``predict_proba``. Heads that are trained by gradient also give
pure ``init``, ``apply`` and ``dropouts`` (`embcache.probe.stack.TrainableHead`): folds train as one stacked model.
A module makes its heads known by a tuple ``HEADS`` of their classes.
"""

from __future__ import annotations

import difflib
import functools
import pkgutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib import import_module
from typing import Any, ClassVar, Protocol

from numpy.typing import ArrayLike

from embcache.errors import UsageError
from embcache.probe.stack import TrainableHead
from embcache.probe.train import FittedHead


class Head(TrainableHead, Protocol):
    """The contract that every head signs; ``tests/contracts/test_heads.py`` holds them to it."""

    name: ClassVar[str]
    summary: ClassVar[str]
    fuses: ClassVar[bool]
    """Whether it takes several backbones at once."""

    def fit(self, x: Mapping[str, ArrayLike], y: ArrayLike, **kwargs: Any) -> FittedHead:
        """Train on features of shape (n, D) and labels of shape (n,); keywords as `embcache.probe.train.fit`."""
        ...


@functools.cache
def heads() -> dict[str, type[Head]]:
    """Every head of this folder by its name, in alphabetical order."""
    modules = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found = {head.name: head for module in modules for head in module.HEADS}
    return dict(sorted(found.items()))


def make_head(name: str, **hyperparameters: Any) -> Head:
    """The head called ``name``.

    Raises
    ------
    UsageError
        There is no such head, or it has no such hyperparameter.
    """
    known = heads()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        raise UsageError(
            f"there is no head {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""),
            expected="one of " + ", ".join(known),
            fix="embcache heads",
        )
    allowed = {field.name for field in fields(known[name])}  # type: ignore[arg-type]
    if not allowed.issuperset(hyperparameters):
        raise UsageError(
            f"head {name!r} has no such hyperparameter",
            expected=", ".join(sorted(allowed)) or "none",
            found=", ".join(sorted(set(hyperparameters) - allowed)),
        )
    return known[name](**hyperparameters)


def hyperparameters(head: Head) -> dict[str, Any]:
    """The constructor's arguments that make this head again."""
    return asdict(head)  # type: ignore[call-overload,no-any-return]


def count_parameters(head: Head, dims: Mapping[str, int], n_classes: int) -> int:
    """Trainable parameters for features of these dimensions."""
    from embcache.probe.stack import stream_generator

    return sum(p.numel() for p in head.init(stream_generator("", "count"), dims, n_classes).values())
