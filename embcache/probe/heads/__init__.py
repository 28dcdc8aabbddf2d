"""Heads: what is trained or solved on cached features. One file of this folder is one head, or a few that share code.

A head is a frozen dataclass whose fields are its hyperparameters; sizes come from the data. The contract is `Head`:
``fit`` on ``{backbone: (n, D)}`` gives an object with ``predict_proba``, and pure ``apply`` gives logits from stacked
parameters. A head that is trained by gradient also has pure ``init`` and ``dropouts``
(`embcache.probe.stack.TrainableHead`): folds train as one stacked model. A
`embcache.probe.standard.StandardizedHead` has means and scales of the training rows among its parameters. A head that
is solved is a `embcache.probe.solve.SolvedHead`. A module makes its heads known by a tuple ``HEADS`` of their classes.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from typing import Any, ClassVar, Protocol, cast

import torch
from numpy.typing import ArrayLike

from embcache.errors import UsageError
from embcache.probe.solve import is_solved
from embcache.probe.stack import TrainableHead, stream_generator
from embcache.probe.train import FittedHead
from embcache.probe.usage import unknown_head


class Head(Protocol):
    """The contract that every head signs; ``tests/contracts/test_heads.py`` holds them to it."""

    name: ClassVar[str]
    summary: ClassVar[str]
    fuses: ClassVar[bool]
    """Whether it takes several backbones at once."""

    def apply(
        self,
        params: dict[str, torch.Tensor],
        x: Mapping[str, torch.Tensor],
        masks: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Logits of shape (K, B, C) from parameters (K, …) and features (K, B, D) each."""
        ...

    def fit(self, x: Mapping[str, ArrayLike], y: ArrayLike, **kwargs: Any) -> FittedHead:
        """Train or solve on features (n, D) and labels (n,); keywords as `embcache.probe.train.fit`."""
        ...


@functools.cache
def heads() -> dict[str, type[Head]]:
    """Every head of this folder by its name, in alphabetical order."""
    modules = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    found = {head.name: head for module in modules for head in vars(module).get("HEADS", ())}
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
        raise unknown_head(name, known)
    allowed = {field.name for field in fields(known[name])}  # type: ignore[arg-type]
    if not allowed.issuperset(hyperparameters):
        raise UsageError(
            f"head {name!r} has no such hyperparameter",
            expected=", ".join(sorted(allowed)) or "none",
            found=", ".join(sorted(set(hyperparameters) - allowed)),
        )
    return known[name](**hyperparameters)


def imbalance(name: str) -> str:
    """What the head called ``name`` does where classes are not balanced, in words."""
    if not is_solved(heads()[name]):
        return "training draws them equally often"
    return (
        "they weigh alike in training"
        if weighs(name)
        else "nothing is done about it, so frequent classes count for more (knn: more neighbors)"
    )


def weighs(name: str) -> bool:
    """Whether the head called ``name`` takes classes alike where they are not balanced; trained heads draw them so."""
    kind = heads()[name]
    return kind.weighs if is_solved(kind) else True


def hyperparameters(head: Head) -> dict[str, Any]:
    """The constructor's arguments that make this head again: all that say what it is, implicit ones where not usual."""
    pairs = ((f, getattr(head, f.name)) for f in fields(head))  # type: ignore[arg-type]
    return {f.name: value for f, value in pairs if not ("implicit" in f.metadata and value == f.default)}


def trainable(head: Head) -> TrainableHead:
    """The head, where it is trained by gradient."""
    name = head.name
    if not is_solved(head):
        return cast(TrainableHead, head)
    raise UsageError(
        f"head {name!r} is solved, not trained",
        expected="one of " + ", ".join(other for other, kind in heads().items() if not is_solved(kind)),
        fix="embcache heads",
    )


def count_parameters(head: Head, dims: Mapping[str, int], n_classes: int) -> int:
    """Trainable parameters for features of these dimensions; 0 for a head that is solved."""
    if is_solved(head):
        return 0
    params = trainable(head).init(stream_generator("", "count"), dims, n_classes)
    return sum(p.numel() for p in params.values())
