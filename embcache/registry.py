"""Names of backbones, datasets, heads and metrics: built in, registered by a decorator, or of an installed package.

::

    from embcache.registry import heads

    @heads.register("bottleneck")
    class Bottleneck(TrainedHead): ...

A package announces the same by an entry point in the group ``embcache.heads`` (``embcache.backbones``,
``embcache.datasets``, ``embcache.metrics``, ``embcache.targets``). On the command line ``module:name`` names any object
that Python can import. Nothing is imported before it is asked for, so that listing names costs no torch.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, cast

from embcache.errors import UsageError
from embcache.log import log

T = TypeVar("T")
F = TypeVar("F")


class Registry(Generic[T]):
    """Objects of one sort by their names."""

    def __init__(self, sort: str, builtin: Mapping[str, str | T], objects: Mapping[str, T] | None = None) -> None:
        self.sort = sort
        self._places = {name: place for name, place in builtin.items() if isinstance(place, str)}  # not imported yet
        self._objects: dict[str, T] = {name: found for name, found in builtin.items() if not isinstance(found, str)}
        self._objects |= objects or {}
        self._builtin = frozenset([*builtin, *(objects or {})])
        self._installed = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: make an object known under a name."""
        self._check(name)

        def known(made: T) -> T:
            self._objects[name] = made
            return made

        return known

    def _check(self, name: str) -> None:
        if not name or ":" in name or not name.isprintable():
            raise UsageError(f"{name!r} cannot be the name of a {self.sort}", code="registry-name", found=repr(name))
        if name in self:
            raise UsageError(
                f"the {self.sort} {name!r} is registered already", code="registry-taken", found=name,
                fix="register it under another name",
            )  # fmt: skip

    def names(self) -> list[str]:
        """All names, in alphabetical order."""
        self._read_installed()
        return sorted({*self._places, *self._objects})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def get(self, name: str) -> T:
        """The object of a name, or of ``module:name``."""
        self._read_installed()
        if name in self._objects:
            return self._objects[name]
        if name in self._places:
            self._objects[name] = found = cast(T, import_object(self._places[name], self.sort))
            return found
        if ":" in name:
            return cast(T, import_object(name, self.sort))
        raise self.unknown(name)

    def each(self, find: Callable[[str], F]) -> Iterator[tuple[str, F]]:
        """What ``find`` makes of each name; a warning for one whose package is broken."""
        for name in self.names():
            try:
                made = find(name)
            except Exception as error:  # whatever the package does
                log.warning(f"{self.sort} {name} cannot be used: {' '.join(str(error).split())}")
            else:
                yield name, made

    def unknown(self, name: str, also: str = "") -> UsageError:
        """The error for a name that is not registered; ``also`` lists other forms of names."""
        near, names = difflib.get_close_matches(name, self.names(), n=3), self.names()
        if len(names) > 40:
            names = [f"a name that `embcache {self.sort}s` lists"]
        return UsageError(
            f"unknown {self.sort} {name!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""),
            code=f"unknown-{self.sort}", expected=", ".join(filter(None, [*names, also, "or module:name"])),
            fix=f"embcache {self.sort}s",
        )  # fmt: skip

    def _read_installed(self) -> None:
        if self._installed:
            return
        self._installed = True
        for entry in entry_points(group=f"embcache.{self.sort}s"):
            if entry.name not in self._places and entry.name not in self._objects:
                self._places[entry.name] = entry.value
            elif entry.name in self._builtin or self._places.get(entry.name, entry.value) != entry.value:
                log.warning(f"{self.sort} {entry.name}: the name is taken, so {entry.value} is not used")


def import_object(place: str, sort: str = "object") -> Any:
    """The object that ``module:name`` names; dots in ``name`` reach into classes."""
    module, _, names = place.partition(":")
    try:
        found = importlib.import_module(module)
        for name in names.split("."):
            found = getattr(found, name)
    except Exception as error:  # whatever the module does when it is imported
        raise UsageError(
            f"the {sort} {place} cannot be imported", code="import-failed", expected="module:name",
            found=f"{type(error).__name__}: {error}",
            fix="put the module's folder on PYTHONPATH, or install its package",
        ) from error  # fmt: skip
    return found
