"""What of a probe can be refused before torch is imported: values that no dataset and no head could take.

Importing torch takes seconds; a slip in a flag is told at once.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from embcache.errors import UsageError, check_choice, check_number
from embcache.probe.schedule import Schedule

ATTENTIONS = ("auto", "exact", "fast")
"""How the attention of ``dvme`` can be computed; see `embcache.probe.heads.scalar_attention.attend`."""

_NAME = re.compile(r'^    name: ClassVar\[str\] = "([^"]+)"', re.MULTILINE)


def check_usage(
    *,
    head: str = "linear",
    subsets: Sequence[str | int] = ("S",),
    folds: int = 5,
    repeats: int = 1,
    views: int | None = None,
    val: str = "full",
    test: str = "local",
    lr: float | Sequence[float] | None = None,
    buffer: int | None = None,
    attention: str | None = None,
) -> None:
    """Refuse what can be refused without data; meanings as of `embcache.probe.options.ProbeOptions`."""
    if head not in (names := head_names()):
        raise unknown_head(head, names)
    check_options(val=val, test=test, folds=folds, repeats=repeats, views=views, buffer=buffer)
    for asked in subsets:
        name = str(asked).strip()
        if not name.isidentifier() and not (name.isascii() and name.isdigit() and len(name) <= 12 and int(name)):
            raise unknown_subset(asked, ("S", "M", "F"))
    for rate in lr if isinstance(lr, Sequence) else () if lr is None else (lr,):
        Schedule(lr=rate)
    if attention is not None:
        if head != "dvme":
            raise UsageError(
                "--attention is for the head dvme", found=f"--head {head}", fix="--head dvme, or leave --attention out"
            )
        check_choice("--attention", attention, ATTENTIONS)


def head_names() -> list[str]:
    """Names of all heads in alphabetical order, read off their sources; importing those imports torch."""
    folder = files("embcache.probe") / "heads"
    sources = (file.read_text("utf-8") for file in folder.iterdir() if file.name.endswith(".py"))
    return sorted(name for source in sources for name in _NAME.findall(source))


def unknown_head(name: str, known: Iterable[str]) -> UsageError:
    """The error for a head that there is not."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3)
    return UsageError(
        f"there is no head {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""),
        expected="one of " + ", ".join(names),
        fix="embcache heads",
    )


def unknown_subset(asked: object, known: Iterable[str]) -> UsageError:
    """The error for a subset that is neither a name nor a number of images."""
    return UsageError(
        f"no such subset: {str(asked)!r}",
        expected=f"{', '.join(known)} or a number of training images",
        fix="--subset S,M,F or --subset 20,50,100",
    )


MOST_SEED = 2**62  # one is added for each repeat, and torch takes 63 bits
BOUNDS = {
    "folds": (2, 1_000),
    "repeats": (1, 1_000),
    "views": (1, 1_000),
    "seed": (0, MOST_SEED),
    "buffer": (Schedule.batch_size, 1_000_000_000),
}
CHOICES = {"val": ("full", "matched"), "test": ("local", "official")}


def check_options(**given: Any) -> None:
    """Raise a `UsageError` unless every value that is not None is one that a protocol can have."""
    for name, value in given.items():
        if name in CHOICES:
            check_choice(f"--{name}", value, CHOICES[name])
        elif value is not None:
            check_number(f"--{name}", value, *BOUNDS[name])


def parse_head_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Hyperparameters from ``name=value`` texts; a value is JSON (a number, a list …), else text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not (name and equals and text) or name in found:
            raise UsageError(
                "a hyperparameter is not given as it should be",
                expected="name=value, each name once",
                found=repr(pair),
                where="--head-option",
                fix="--head-option proj_dim=256",
            )
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        found[name] = tuple(value) if isinstance(value, list) else value
    return found


def join_head_options(options: Mapping[str, Any], **flags: Any) -> dict[str, Any]:
    """Hyperparameters with those that have a flag of their own."""
    for name in flags:
        if name in options:
            raise UsageError(
                f"{name} is given twice",
                expected="each name once",
                found=f"--{name} and --head-option {name}=…",
                fix=f"leave --head-option {name}=… out",
            )
    return {**options, **flags}


def parse_rates(texts: Sequence[str]) -> float | list[float] | None:
    """Learning rates from texts: None of none, a number of one."""
    rates = []
    for text in texts:
        try:
            rates.append(float(text))
        except ValueError as error:
            raise UsageError(
                "a learning rate must be a number", found=repr(text), where="--lr", fix="--lr 1e-4,1e-3,1e-2"
            ) from error
    return (rates[0] if len(rates) == 1 else rates) if rates else None
