"""What is refused of a checkpoint's pickle before torch reads it: small files that would keep it busy or fill memory.

``torch.load(weights_only=True)`` runs no code, but it does believe numbers: ``bytearray(10**10)``, a tuple of tuples of
tuples whose hash takes for ever, a hundred million empty dictionaries.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import IO, Any

MOST_OPERATIONS = 500_000
"""Files of whole training states have some ten thousand."""

_MOST_PARTS = 10_000  # of a tuple, those of the tuples in it included as often as they stand there
_DEEPEST = 64
_MARK = object()

# Callables that torch would let a pickle call, as checkpoints of networks need them. Types of storages and of numbers
# (`torch.FloatStorage`, `torch.float32`) are allowed besides, and what embcache itself replaces by inert stand-ins.
CALLS = frozenset(
    {
        "collections.OrderedDict", "collections.Counter", "torch.Size", "torch.device", "_codecs.encode",
        "torch.nn.parameter.Parameter", "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state",
        "torch.serialization._get_layout", "__builtin__.set", "builtins.set",
    }
)  # fmt: skip


class HostilePickleError(Exception):
    """What is wrong with a pickle, in a few words."""


@dataclass(frozen=True)
class _Slot:
    """What is known of a value on the unpickler's stack: its size as a tuple, and the text or name that it is."""

    parts: int = 1
    depth: int = 0
    text: str | None = None
    items: tuple[Any, ...] = ()


def check_pickle(file: IO[bytes], allowed: frozenset[str]) -> None:
    """Go through one pickle without making anything of it; the file is left behind its end."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for count, (code, argument, _) in enumerate(pickletools.genops(file)):
        if count > MOST_OPERATIONS:
            raise HostilePickleError(f"a pickle of more than {MOST_OPERATIONS:,} operations")
        _step(code, argument, stack, memo, allowed)


def _step(code: Any, argument: Any, stack: list[Any], memo: dict[int, Any], allowed: frozenset[str]) -> None:
    name = code.name
    if name in ("BINPUT", "LONG_BINPUT", "PUT"):
        memo[argument] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET", "GET"):
        stack.append(memo[argument])
    elif name == "MARK":
        stack.append(_MARK)
    elif name == "GLOBAL":
        full = argument.replace(" ", ".", 1)
        _check_name(full, allowed)
        stack.append(_Slot(text=full))
    elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
        items = _to_mark(stack) if name == "TUPLE" else _take(stack, int(name[-1]))
        stack.append(_tuple(items))
    elif name in ("REDUCE", "NEWOBJ"):
        arguments, called = stack.pop(), stack.pop()
        if called.text == "_codecs.encode" and (len(arguments.items) != 2 or arguments.items[1].text != "latin1"):
            raise HostilePickleError("an encoding that no checkpoint uses")  # some take for ever
        stack.append(_Slot(arguments.parts, arguments.depth))
    else:
        # A list or dictionary stays below what is put into it; what else there is has no size that matters.
        before = len(code.stack_before)
        if code.stack_before and any(kind.name == "mark" for kind in code.stack_before):
            _to_mark(stack)
            before = [kind.name for kind in code.stack_before].index("mark")
        taken = _take(stack, before)
        for k, kind in enumerate(code.stack_after):
            text = argument if isinstance(argument, str) and kind.name == "str" else None
            stack.append(taken[k] if code.stack_before and k < len(taken) else _Slot(text=text))


def _check_name(full: str, allowed: frozenset[str]) -> None:
    kind = full.removeprefix("torch.")
    plain = full.startswith("torch.") and (kind.endswith("Storage") or (kind.isalnum() and kind.islower()))
    if full not in CALLS and full not in allowed and not plain:
        raise HostilePickleError(f"GLOBAL {full}")


def _tuple(items: list[Any]) -> _Slot:
    parts = 1 + sum(item.parts for item in items)
    depth = 1 + max((item.depth for item in items), default=0)
    if parts > _MOST_PARTS or depth > _DEEPEST:
        raise HostilePickleError("tuples within tuples without end")
    return _Slot(parts, depth, None, tuple(items) if len(items) <= 2 else ())


def _take(stack: list[Any], number: int) -> list[Any]:
    if number > len(stack):
        raise ValueError("an empty stack")
    taken = stack[len(stack) - number :]
    del stack[len(stack) - number :]
    if _MARK in taken:
        raise ValueError("a mark where a value should be")
    return taken


def _to_mark(stack: list[Any]) -> list[Any]:
    items: list[Any] = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]
