"""The contract of targets, run over every kind of this package with each of its losses, and what breaks it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from embcache.errors import UsageError
from embcache.probe.metrics import OTHERS, metrics
from embcache.targets import Target, as_target, declared, make_target, target_of, targets
from embcache.targets.number import Number
from embcache.testing import check_target
from tests.refusal import refused

GRADES = np.random.default_rng(0).permutation(np.arange(60) % 3)
FINDINGS = np.stack([GRADES == 0, GRADES >= 1, np.arange(60) % 4 == 0], axis=1).astype(np.int64)
FINDINGS[::9, 1] = FINDINGS[5] = -1
NUMBERS = np.where(np.arange(60) % 13 == 0, np.nan, np.random.default_rng(1).normal(50, 9, 60))
CASES: dict[str, tuple[tuple[str, ...], NDArray[Any]]] = {
    "classes": (("a", "b", "c"), np.where(np.arange(60) % 17 == 0, -1, GRADES)), "ordinal": (("0", "1", "2"), GRADES),
    "findings": (("x", "y", "z"), FINDINGS), "number": (("age",), NUMBERS),
}  # fmt: skip
ALL = [(kind, loss) for kind in targets for loss in targets.get(kind).losses]


@pytest.mark.parametrize(("kind", "loss"), ALL)
def test_targets_of_this_package(kind: str, loss: str) -> None:
    names, y = CASES[kind]
    check_target(make_target(kind, names, (), loss), y)


@dataclass(frozen=True)
class Forgetful(Number):
    """Breaks the contract: the loss of a row depends on the others."""

    kind = "forgetful"
    metric = "half_of_r2"

    def row_losses(self, out: Any, y: Any, params: Any) -> Any:
        losses = super().row_losses(out, y, params)
        return losses / losses.detach().mean()


def test_a_kind_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (targets, metrics):
        monkeypatch.setattr(registry, "_objects", dict(registry._objects))
    metrics.register("half_of_r2")(replace(OTHERS["r2"], key="half_of_r2", fits=("forgetful",)))
    with pytest.raises(AssertionError, match="not registered"):
        check_target(Forgetful(("age",)), NUMBERS)
    targets.register("forgetful")(Forgetful)
    with pytest.raises(AssertionError, match="depends on others"):
        check_target(Forgetful(("age",)), NUMBERS)


def test_unknown_kinds_and_losses_are_refused() -> None:
    for name in ("survival", "embcache.targets.number:Number", "json:dumps", ""):
        with refused(UsageError, "unknown-target"):
            make_target(name, ("a",))
    with refused(UsageError, "target-columns"):
        make_target("number", ("a", "b"))
    for kind in targets:
        with refused(UsageError, "option-choice"):
            make_target(kind, CASES[kind][0], (), "focal")


def test_what_values_look_like() -> None:
    assert as_target(3).names == ("0", "1", "2")
    assert target_of(GRADES, 3).kind == "classes"
    assert target_of(FINDINGS, 3).kind == "findings"
    assert target_of(NUMBERS, 1).kind == "number"


def test_softmax_alone_is_not_declared() -> None:
    assert {(kind, loss) for kind, loss in ALL if not declared(make_target(kind, CASES[kind][0], (), loss))} == {
        ("classes", "softmax"),
        ("ordinal", "softmax"),
    }
    assert declared(make_target("number", ("age",))) == {"kind": "number", "loss": "squared"}
    assert isinstance(make_target("number", ("age",)), Target)
