"""The errors that a user can fix, as one tree.

::

    EmbcacheError                 one message: what was expected, what was found, where, what to type
    ├── UsageError                the request itself is malformed (exit status 2)
    ├── DatasetError              a dataset's files or tables are not as they should be
    │   └── DatasetNotFoundError  there is no such dataset, or its root is missing or laid out otherwise
    ├── ImageError                one image cannot be decoded; extraction quarantines it with the reason
    ├── WeightsError              a checkpoint is missing, refused, or does not fit its network
    ├── StoreError                a feature store cannot serve the request
    │   ├── StoreNotFoundError    nothing is cached for it
    │   ├── RecipeError           several cached recipes match, or the wanted one differs from what is there
    │   └── CorruptStoreError     bytes on disk are not those that were committed
    └── ProtocolError             the data cannot carry the asked folds, subsets or heads
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
_known: frozenset[str] | None = None


def advise_only(flags: Iterable[str] | None) -> None:
    """Leave out of errors, from now on, advice that names a flag besides these; None: leave nothing out.

    The command line says so which flags the command has that was typed: what raises an error cannot know.
    """
    global _known
    _known = None if flags is None else frozenset(flags)


def _may_advise(advice: str) -> bool:
    own, _, _ = advice.partition("embcache ")  # what follows is typed to another command
    return _known is None or _known.issuperset(_FLAG.findall(own))


def printable(text: str) -> str:
    """``text`` for a terminal: what is not printable but a line's end is shown escaped.

    Ids, paths and class names come from files: none of them may move a cursor, colour a line or retitle a window.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)


def printed_width(text: str) -> int:
    """Columns that ``text`` takes where every character takes none, one or two."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


class EmbcacheError(Exception):
    """An error that a user can fix.

    Parameters
    ----------
    problem : str
        One sentence: what is wrong.
    code : str
        Stable name of the error for scripts and tests, such as ``"unknown-option"``.
    expected, found : str, optional
        What should have been there, and what is.
    where : object, optional
        The file, folder, column or flag at fault.
    fix : str or sequence of str, optional
        The command to type, or the step to take; of several those that `advise_only` allows.
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
        self.fix = ", or ".join(filter(_may_advise, advice)) or None
        parts = (("expected", expected), ("found", found), ("where", where), ("try", self.fix))
        lines = [printable(problem)]
        for label, value in parts:
            if value is not None:
                lines.append(f"  {label}: " + printable(str(value)).replace("\n", "\n    "))
        super().__init__("\n".join(lines))


class UsageError(EmbcacheError):
    """The request itself is malformed: an unknown name, a bad value, flags that exclude each other."""


def check_number(flag: str, value: float | None, most: float, least: float = 1) -> None:
    """`UsageError` for a number that nobody can wait for, or that means nothing; None passes.

    Whatever can be asked for has a bound: what is beyond it is a slip of the keyboard, or made to keep a machine busy.
    """
    if value is not None and not least <= value <= most:
        raise UsageError(
            f"{flag} is out of bounds", expected=f"{least:,} to {most:,}", found=str(value)[:40],
            fix=f"{flag} {least if value < least else most}",
        )  # fmt: skip


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
    """The data cannot carry the asked folds, subsets or heads."""
