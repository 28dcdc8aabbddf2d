"""The errors that a user can fix, and text that is safe to print."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral, Real

_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
_known: frozenset[str] | None = None  # flags of the command that was typed
_again: list[tuple[str, re.Pattern[str]]] = []  # options to repeat, and the commands that take them and lack them


def advise_only(
    flags: Iterable[str] | None, again: Mapping[str, str] | None = None, commands: Iterable[str] = ()
) -> None:
    """Leave advice out of errors, from now on, that names other flags than these; None: leave nothing out.

    Advised ``commands`` get the options ``again``, by their flags, that say where the home is: code that raises an
    error cannot know what was typed.
    """
    global _known
    _known, names = None if flags is None else frozenset(flags), "|".join(map(re.escape, commands))
    _again[:] = [
        (words, re.compile(rf"\bembcache ({names})\b(?![^`;\n]* {flag}\b)")) for flag, words in (again or {}).items()
    ]


def with_home(advice: str) -> str:
    """Advice whose commands go to the home that was typed."""
    for words, commands in _again:
        pieces = commands.split(advice)  # text, command, text, …
        advice = "".join(f"embcache {each} {words}" if k % 2 else each for k, each in enumerate(pieces))
    return advice


def _may_advise(advice: str) -> bool:
    own, _, _ = advice.partition("embcache ")  # the rest is typed to another command
    return _known is None or _known.issuperset(_FLAG.findall(own))


def printable(text: str) -> str:
    """``text`` for a terminal: what is not printable is escaped, except line ends.

    IDs, paths and class names come from files: none of them may move a cursor, color a line or retitle a window.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(text: str) -> str:
    """Text with its control characters escaped, line ends included."""
    return printable(text).replace("\n", "\\n")


def printed_width(text: str) -> int:
    """Columns that ``text`` takes where every character takes none, one or two."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def first_few(items: Sequence[object], n: int = 5) -> str:
    """The first ``n`` items on one line, and how many more there are."""
    more = f", … and {len(items) - n:,} more" if len(items) > n else ""
    return ", ".join(str(i) for i in items[:n]) + more


class EmbcacheError(Exception):
    """An error that a user can fix.

    ``problem`` is one sentence; ``code`` a stable name for scripts and tests, such as ``"unknown-option"``;
    ``expected`` and ``found`` what should have been there and what is; ``where`` the file, folder, column or flag at
    fault; ``fix`` the command to type or the step to take: of several, those that `advise_only` allows.
    """

    def __init__(
        self,
        problem: str,
        *,
        code: str = "",
        expected: str | None = None,
        found: str | None = None,
        where: object = None,
        fix: str | Sequence[str] | None = None,
    ) -> None:
        self.problem, self.code, self.expected, self.found, self.where = problem, code, expected, found, where
        advice = [fix] if isinstance(fix, str) else fix or ()
        self.fix = with_home(", or ".join(filter(_may_advise, advice))) or None
        parts = (("expected", expected), ("found", found), ("where", where), ("try", self.fix))
        lines = [printable(problem)]
        for label, value in parts:
            if value is not None:
                lines.append(f"  {label}: " + printable(str(value)).replace("\n", "\n    "))
        super().__init__("\n".join(lines))


class UsageError(EmbcacheError):
    """The request itself is malformed: an unknown name, a bad value, flags that exclude each other (exit status 2)."""


def check_number(flag: str, value: object, least: float, most: float) -> None:
    """`UsageError` unless a value is a number within bounds, and whole where ``least`` is; every number has a bound."""
    whole = isinstance(least, int)
    number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if not (number and least <= value <= most):  # type: ignore[operator]
        nearest = most if number and value > most else least  # type: ignore[operator]
        raise UsageError(
            f"{flag} is out of bounds", code="option-bounds", found=repr(value)[:40], fix=_typed(flag, nearest),
            expected=f"a {'whole ' * whole}number from {least:,} to {most:,}",
        )  # fmt: skip


def check_choice(flag: str, value: object, choices: Iterable[str]) -> None:
    """`UsageError` unless a value is one of some names."""
    names = list(choices)
    if value not in names:
        near = get_close_matches(str(value), names, 1) or names
        raise UsageError(
            f"unknown {flag}", code="option-choice", expected=" | ".join(names), found=repr(value),
            fix=_typed(flag, near[0]),
        )  # fmt: skip


def _typed(flag: str, value: object) -> str:
    return f"{flag}={value}" if flag.startswith("--head-option") else f"{flag} {value}"


class DatasetError(EmbcacheError):
    """A dataset's files or tables are not as they should be."""


class DatasetNotFoundError(DatasetError):
    """There is no such dataset, or its root is missing or laid out otherwise."""


class ImageError(EmbcacheError):
    """One image cannot be decoded. ``problem`` is the reason kept in the quarantine: one line, no path.

    ``digest`` is the sha256 (hex) of the file's bytes where these could be read.
    """

    digest: str = ""


class WeightsError(EmbcacheError):
    """A checkpoint is missing, refused, or does not fit its network."""


class StoreError(EmbcacheError):
    """A feature store cannot serve the request."""


class StoreNotFoundError(StoreError):
    """Nothing is cached for the request."""


class RecipeError(StoreError):
    """Several cached recipes match, or the wanted one differs from what is there."""


class CorruptStoreError(StoreError):
    """Bytes on disk are not those that were committed."""


class ProtocolError(EmbcacheError):
    """The data do not support the folds, subsets or heads of the request."""
