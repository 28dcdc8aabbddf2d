"""What is predicted, one file per kind: classes, ordered classes, findings, a number. The contract is `Target`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from embcache.errors import UsageError
from embcache.registry import Registry
from embcache.targets.target import Target as Target

targets: Registry[type[Target]] = Registry(
    "target",
    {
        "classes": "embcache.targets.labels:Classes", "ordinal": "embcache.targets.ordinal:Ordinal",
        "findings": "embcache.targets.findings:Findings", "number": "embcache.targets.number:Number",
    },
)  # fmt: skip


def make_target(kind: str, names: Sequence[str], columns: Sequence[str] = (), loss: str = "") -> Target:
    """The target of a registered kind; `UsageError` where there is no such kind or loss. A file may name the kind."""
    if kind not in targets:
        raise UsageError(
            f"unknown kind of target {kind!r:.40}", code="unknown-target", expected=", ".join(targets),
            fix="install the package that has it",
        )  # fmt: skip
    return targets.get(kind)(tuple(names), tuple(columns), loss)


def as_target(of: int | Target) -> Target:
    """A target; a number stands for so many classes."""
    return of if isinstance(of, Target) else make_target("classes", [str(c) for c in range(of)])


def target_of(y: NDArray[Any], outputs: int) -> Target:
    """The target that values look like: findings (n, L), a number in floats, else so many classes."""
    if y.ndim == 2:
        return make_target("findings", [str(c) for c in range(outputs)])
    return make_target("number", ["number"]) if y.dtype.kind == "f" else as_target(outputs)


def declared(found: Target, column: str = "") -> dict[str, str]:
    """Kind and loss as the request of a run has them; empty for softmax, which trains grades as classes.

    Grades of a ``column`` are stated, for as classes its values may be others.
    """
    if found.loss == "softmax" and not (found.kind == "ordinal" and column):
        return {}
    return {"kind": found.kind, "loss": found.loss}
