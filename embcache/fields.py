"""Fields of configs: help, bounds and parsing of each option, and the base class of all configs.

`option` declares a field; command-line options, Python keywords, JSON and run IDs derive from it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self, Union, get_args, get_origin, get_type_hints

from embcache.errors import UsageError
from embcache.sealed import plain, typed


@dataclass(frozen=True)
class Option:
    """What is known of a field in addition to its name, type and default."""

    help: str  # one sentence for ``--help``
    metavar: str = ""  # what the value looks like
    flag: str = ""  # where it is not the field's name; ``--a/--no-a`` where on by default; ``--a,--b``; ``-`` for none
    # Whether a result depends on it: then a value that is not the default is part of a run's ID. A name is the key of
    # the request under which the plan of a run writes it in another form: weights and transform as ``recipes``.
    result: bool | str = False
    choices: tuple[str, ...] = ()  # all values there are
    least: float | None = None  # bounds of a number
    most: float | None = None
    parse: Callable[[Any], Any] | None = None  # the value from the text typed (from a list of texts for tuples)


def option(default: Any, help: str, **more: Any) -> Any:
    """A field of a config with its default; ``more`` are the fields of `Option`, the metavar by choices or bounds."""
    usual = "|".join(more.get("choices", ())) or "N" * (type(more.get("least")) is int)
    metadata = {"option": Option(help, **{"metavar": usual, **more})}
    if isinstance(default, dict):
        return field(default_factory=lambda: types.MappingProxyType(dict(default)), metadata=metadata)
    return field(default=default, metadata=metadata)


def option_of(f: dataclasses.Field[Any]) -> Option:
    """The `Option` of a config's field."""
    found: Option = f.metadata["option"]
    return found


def flag_of(f: dataclasses.Field[Any]) -> str:
    """The command-line flag of a config's field, ``--no-`` form left out; its name where it has no flag."""
    flag = option_of(f).flag
    return f.name if flag == "-" else (flag or f"--{f.name.replace('_', '-')}").partition("/")[0].partition(",")[0]


@dataclass(frozen=True)
class Config:
    """Base of all configs: values are checked (else a `UsageError`) and normalized when one is made.

    A single value stands for a tuple of one, a list for a tuple, and any path-like object for a path.
    """

    heading: ClassVar[str] = "Options"
    """Under which ``--help`` lists the options."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in fields(self):
            value = _normal(getattr(self, f.name), hints[f.name])
            object.__setattr__(self, f.name, value)
            _check(f, value, hints[f.name])

    @classmethod
    def make(cls, base: Self | None = None, options: Mapping[str, Any] | None = None) -> Self:
        """``base``, or the defaults, with some options set; a `UsageError` for one that is unknown or of no use."""
        check_keys(options or {}, [f.name for f in fields(cls)], cls.__name__)
        return dataclasses.replace(base or cls(), **(options or {}))

    def result_options(self) -> dict[str, Any]:
        """Options that a result depends on and that differ from their defaults, as JSON data for a run's ID."""
        own, usual = self.to_json(), type(self)().to_json()
        names = [f.name for f in fields(self) if option_of(f).result is True]
        return {name: own[name] for name in names if own[name] != usual[name]}

    def words(self) -> list[str]:
        """The options that differ from their defaults, as they are typed on the command line."""
        usual, words = type(self)(), list[str]()
        for f in fields(self):
            value = getattr(self, f.name)
            if value == getattr(usual, f.name) or value is None or option_of(f).flag == "-":
                continue
            if isinstance(value, bool):
                words.append(flag_of(f) if value else option_of(f).flag.split("/")[1])
            elif isinstance(value, Mapping):
                words += [word for name, each in value.items() for word in (flag_of(f), f"{name}={each}")]
            else:
                many = value if isinstance(value, tuple) else (value,)
                words += [word for each in many for word in (flag_of(f), str(each))]
        return words

    def to_json(self) -> dict[str, Any]:
        """All options as JSON data."""
        return plain(vars(self))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; a ValueError for an unknown key or a value that is not of its type."""
        return typed(cls, data)  # type: ignore[no-any-return]


def check_keys(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise a `UsageError` for keys that are not known, with the nearest that is."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise UsageError(
                f"unknown option {name!r}" + (f"; did you mean {near[0]}?" if near else ""),
                code="unknown-option", expected=", ".join(known), where=where,
            )  # fmt: skip


def _arguments(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the type alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _normal(value: Any, hint: Any) -> Any:
    if value is None:
        return None
    kinds = [get_origin(kind) or kind for kind in _arguments(hint)]
    if tuple in kinds:
        if isinstance(value, Mapping):  # weights by name
            value = [f"{key}={each}" for key, each in value.items()]
        many = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
        inner = next(get_args(kind)[0] for kind in _arguments(hint) if get_origin(kind) is tuple)
        return tuple(_normal(each, inner) for each in many)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if int not in kinds else value
    if isinstance(value, os.PathLike):
        return Path(value) if Path in kinds else str(Path(value))
    if Path in kinds and isinstance(value, str):
        return Path(value)
    if Mapping in kinds:
        return types.MappingProxyType(dict(value))
    return value


def _fits(value: Any, hint: Any) -> bool:
    return any(_fits_one(value, kind, get_origin(kind) or kind) for kind in _arguments(hint))


def _fits_one(value: Any, kind: Any, origin: Any) -> bool:
    if origin is Any:
        return True
    if origin is tuple:
        inner = get_args(kind)
        if not isinstance(value, tuple):
            return False
        if inner[-1] is Ellipsis:
            return all(_fits(each, inner[0]) for each in value)
        return len(inner) == len(value) and all(map(_fits, value, inner))
    if origin is int and isinstance(value, bool):
        return False
    return isinstance(value, origin)


def _check(f: dataclasses.Field[Any], value: Any, hint: Any) -> None:
    known, flag = option_of(f), flag_of(f)
    if not _fits(value, hint):
        raise UsageError(
            f"{flag} has a value of another type", code="option-type",
            expected=known.metavar or str(hint), found=repr(value)[:80], where=flag,
        )  # fmt: skip
    for each in value if isinstance(value, tuple) else (value,):
        if each is None:
            continue
        if known.choices and each not in known.choices:
            near = difflib.get_close_matches(str(each), known.choices, n=1)
            raise UsageError(
                f"unknown value for {flag}", code="option-choice", expected=" | ".join(known.choices),
                found=repr(each)[:80], where=flag, fix=f"{flag} {(near or known.choices)[0]}",
            )  # fmt: skip
        if isinstance(each, int | float) and not isinstance(each, bool):
            low = -math.inf if known.least is None else known.least
            high = math.inf if known.most is None else known.most
            if not (math.isfinite(each) and low <= each <= high):
                ends = [f"{word} {end:,}" for word, end in (("at least", low), ("at most", high)) if math.isfinite(end)]
                end = low if each < low else high if each > high else None
                advised = end if isinstance(end, int) else f.default  # which may be no number
                raise UsageError(
                    f"{flag} is out of bounds", code="option-bounds", expected=", ".join(ends) or "a finite number",
                    found=str(each)[:40], where=flag,
                    fix=f"{flag} {advised}" if isinstance(advised, int | float) else f"leave {flag} out",
                )  # fmt: skip


def split_list(values: str | Sequence[str] | None) -> list[str]:
    """Flatten repeated and comma-separated values; order is kept, repeats are dropped."""
    names: list[str] = []
    for value in [values] if isinstance(values, str) else values or ():
        for name in value.split(","):
            if not name.strip():
                raise UsageError(
                    "an empty name in a list", code="empty-name", found=repr(value), fix="separate names by one comma"
                )
            if name.strip() not in names:
                names.append(name.strip())
    return names


def parse_numbers(values: Sequence[str]) -> tuple[float, ...]:
    """Numbers from repeated or comma-separated texts."""
    found = []
    for text in split_list(values):
        try:
            found.append(float(text))
        except ValueError as error:
            raise UsageError("a number was expected", code="not-a-number", found=repr(text), fix="1e-3") from error
    return tuple(found)


def parse_whole(values: Sequence[str]) -> tuple[int, ...]:
    """Whole numbers from repeated or comma-separated texts."""
    texts = split_list(values)
    for text in texts:
        if not (text.isascii() and text.removeprefix("-").isdecimal() and len(text) < 13):
            raise UsageError("a whole number was expected", code="not-a-number", found=repr(text), fix="0,1")
    return tuple(map(int, texts))


def parse_part(text: str) -> tuple[int, int]:
    """``I/N`` as two numbers."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and len(text) <= 24 and 1 <= int(index) <= int(count)):
        raise UsageError(
            "--part is not of the form I/N", code="option-part", expected="I/N with 1 <= I <= N", found=repr(text),
            where="--part", fix="--part 1/4",
        )  # fmt: skip
    return int(index), int(count)


def parse_pairs(values: Sequence[str]) -> dict[str, Any]:
    """Values by name from ``NAME=VALUE`` texts; a value is JSON (a number, a list …), else text."""
    found: dict[str, Any] = {}
    for pair in values:
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not (name and equals and text) or name in found:
            raise UsageError(
                "an option of the head is malformed", code="head-option", expected="NAME=VALUE, each name once",
                found=repr(pair), where="--head-option", fix="--head-option proj_dim=256",
            )  # fmt: skip
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        found[name] = tuple(value) if isinstance(value, list) else value
    return found


def bare_name(backbone: str) -> str:
    """The name under which a backbone's features and results are kept: ``mine`` of ``mine=timm:NAME``, else all."""
    own, equals, _ = backbone.partition("=")
    return own if equals and ":" not in own else backbone


def parse_weights(values: Sequence[str], names: Sequence[str] | None = None) -> dict[str, Path]:
    """Checkpoints by `bare_name`, from ``[NAME=]FILE`` values; a `UsageError` where one does not name its backbone.

    Where the backbones are not known yet (``names`` is None) every value must begin with a name.
    """
    weights: dict[str, Path] = {}
    names = names if names is None else [bare_name(name) for name in names]
    for value in values:
        # The name of a backbone has no "=", a path may: only a known name before the first "=" is one.
        name, separator, file = value.partition("=")
        known = bool(name and file) if names is None else bool(separator) and name in names
        if not known and names is not None and len(names) == 1 and (not separator or Path(value).exists()):
            name, file, known = names[0], value, True
        if not known:
            raise UsageError(
                "--weights does not name its backbone", code="weights-unnamed", found=value, where="--weights",
                expected="NAME=FILE" + (f" with NAME one of {', '.join(names)}" if names else ""),
                fix=f"--weights {names[0] if names else 'NAME'}={file or name}",
            )  # fmt: skip
        weights[name] = Path(file)
    return weights


def parse_count_or_share(text: str) -> int | str:
    """A number of images, or a percentage such as ``1%`` as it is."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 13 else text


def unknown_subset(found: object, known: Iterable[str] = ("S", "M", "F")) -> UsageError:
    """The error for a subset that is neither a name nor a number of images."""
    return UsageError(
        f"no such subset: {str(found)!r}", code="unknown-subset",
        expected=f"{', '.join(known)} or a number of training images", fix="--subset S,M,F or --subset 20,50,100",
    )  # fmt: skip


def check_subsets(subsets: Sequence[str | int]) -> None:
    """Refuse texts that no dataset can have as a subset; whether it has one of the others is not known here."""
    for subset in subsets:
        name = str(subset).strip()
        if not name.isidentifier() and not (name.isascii() and name.isdigit() and len(name) <= 12 and int(name)):
            raise unknown_subset(subset)
