"""Heads by their names; importing this file is cheap. The contract of heads is `embcache.probe.stack.Head`.

Another head is registered by a decorator or by an entry point in the group ``embcache.heads``, named ``module:name`` on
the command line, or passed to `probe_features` as an object.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from embcache.errors import UsageError
from embcache.registry import Registry

if TYPE_CHECKING:
    from embcache.probe.stack import Head
    from embcache.targets import Target

ATTENTIONS = ("auto", "exact", "fast")  # of ``dvme``; see `embcache.probe.heads.scalar_attention.attend`

_SOLVED, _TRAINED = "embcache.probe.heads.solved", "embcache.probe.heads.trained"
heads: Registry[type[Head]] = Registry(
    "head",
    {
        "concat": f"{_TRAINED}:ConcatHead", "dvme": f"{_TRAINED}:DVME", "dvme-identity": f"{_TRAINED}:DVMEIdentity",
        "dvme-noattn": f"{_TRAINED}:DVMENoAttention", "dvme-token": f"{_TRAINED}:DVMEToken", "knn": f"{_SOLVED}:KNN",
        "linear": f"{_TRAINED}:LinearHead", "logreg": f"{_SOLVED}:LogReg", "mlp": f"{_TRAINED}:MLPHead",
        "ridge": "embcache.probe.heads.ridge:Ridge",
    },
)  # fmt: skip


def make_head(name: str, **hyperparameters: Any) -> Head:
    """The head that is registered under a name. Nothing is imported that only a file names.

    Raises
    ------
    UsageError
        There is no such head, or it has no such hyperparameter.
    """
    if ":" in name:
        raise UsageError(
            f"the head {name} is not registered", code="head-not-registered", expected=", ".join(heads),
            fix="announce it by an entry point in the group embcache.heads, and probe again under that name",
        )  # fmt: skip
    return _make(heads.get(name), name, hyperparameters)


def find_head(head: object, hyperparameters: dict[str, Any] | None = None) -> Head:
    """The head that the user names or passes: a name, ``module:name``, a `Head` or a scikit-learn classifier."""
    from embcache.probe.stack import Head

    name = head if isinstance(head, str) else ""
    found = heads.get(head) if isinstance(head, str) else head
    if isinstance(found, type) and issubclass(found, Head):
        return _make(found, name or found.__qualname__, hyperparameters or {})
    if not isinstance(found, Head):
        from embcache.probe.heads.solved import SklearnHead, is_classifier

        if is_classifier(found):
            return SklearnHead.of(found, hyperparameters or {})
        raise UsageError(
            "this is not a head", code="not-a-head", found=repr(found)[:80],
            expected="a subclass or an instance of embcache.probe.stack.Head, or a scikit-learn classifier",
        )  # fmt: skip
    if hyperparameters:
        return _make(type(found), name, {**found.parameters(), **hyperparameters})
    return found


def _make(kind: type[Head], name: str, hyperparameters: dict[str, Any]) -> Head:
    known: set[str] = {field.name for field in fields(kind)} if is_dataclass(kind) else set()
    if unknown := sorted(set(hyperparameters) - known):
        raise UsageError(
            f"head {name!r} has no such hyperparameter", code="unknown-hyperparameter",
            expected=", ".join(sorted(known)) or "none", found=", ".join(unknown),
        )  # fmt: skip
    return kind(**hyperparameters)


def name_of(head: Head) -> str:
    """The name under which a head is registered, else ``module:name`` of its class."""
    registered = head.name in heads and heads.get(head.name) is type(head)
    return head.name if registered else head.place


def identify(head: Head, given: object = None) -> dict[str, Any] | None:
    """Name and changed hyperparameters of a head as JSON data; None where they cannot say what it computes.

    The name is the registered one that was ``given``, if any.
    """
    name = name_of(head)
    if "<locals>" in name or name.startswith("__main__:"):  # another script may give the same name to another head
        return None
    name = given if isinstance(given, str) and ":" not in given else name
    try:
        return {"name": name, **json.loads(json.dumps(head.parameters(), allow_nan=False))}
    except (TypeError, ValueError):
        return None


def check_backbones(head: Head, names: Sequence[str]) -> None:
    """`UsageError` unless the head takes these backbones together."""
    if not names:
        raise UsageError("no backbone was named", code="no-backbone", fix="--backbone NAME")
    if len(set(names)) < len(names):
        raise UsageError("a backbone is named twice", code="repeated-backbone", found=", ".join(names))
    if not head.fuses and len(names) != 1:
        raise UsageError(
            f"head {head.name!r} takes one backbone at a time", code="head-takes-one-backbone", found=", ".join(names),
            fix=f"--backbone {names[0]}, or a head that fuses: --head dvme",
        )  # fmt: skip


def check_fits(head: Head, target: Target) -> None:
    """`UsageError` unless the head can be trained for this kind of target."""
    if target.kind not in head.fits:
        others = [name for name in ("linear", "ridge", "knn") if target.kind in heads.get(name).fits]
        raise UsageError(
            f"head {head.name or name_of(head)!r} is not for a target of this kind", code="head-does-not-fit",
            found=f"{target.kind}: {', '.join(target.names[:5])}", expected=", ".join(head.fits),
            fix=[f"--head {name}" for name in others],
        )  # fmt: skip


def weighing(head: Head, target: Target) -> str:
    """How a head weighs findings that are present against those that are absent, in words."""
    from embcache.probe.stack import TrainedHead

    if isinstance(head, TrainedHead) and target.loss == "weighted-bce":
        return "the loss weighs present ones by the ratio of absent to present"
    alike = "present and absent ones weigh alike, finding by finding"
    return alike if head.weighs and not isinstance(head, TrainedHead) else "present and absent ones have no weights"


def imbalance(head: Head) -> str:
    """How a head treats classes that are not balanced, in words."""
    from embcache.probe.stack import TrainedHead

    if isinstance(head, TrainedHead):
        return "training draws them equally often"
    if head.weighs:
        return "they weigh alike in training"
    return "nothing is done about it, so frequent classes count for more (knn: more neighbors)"
