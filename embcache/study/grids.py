"""One's own grid from a small TOML file: datasets × backbones × heads × subsets × seeds.

::

    title = "Lites on chest X-rays"
    datasets = ["pneumonia"]
    backbones = ["effnet_lite0", "effnet_lite1"]   # a list in the list is one set for heads that fuse
    heads = ["linear", "knn", "dvme"]              # default: linear
    subsets = ["S", 100, "F"]                      # default: S, M, F
    seeds = [0, 1]                                 # default: 0
    kind = "probe"                                 # or "finetune", or both as a list
    drop_class = ["other"]                         # classes to leave out
    merge_class = ["mild+severe=ill"]              # classes to make one of
    val = "full"; test = "local"; folds = 5; repeats = 1; lr = [1e-4, 1e-3]   # one a line in a real file
    max_epochs = 50                                # of finetunings
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embcache.data.classes import ClassOptions
from embcache.errors import UsageError
from embcache.io import read_regular
from embcache.probe.heads import heads as known_heads
from embcache.probe.heads import make_head
from embcache.results.grid import Grid, Model
from embcache.study.definitions import LINEAR, known_model, make_models
from embcache.typed import check_depth

_MOST_COLUMNS = 5  # models beside each other, as in the paper


@dataclass(frozen=True)
class OwnGrid:
    """What a TOML file asks for."""

    grid: Grid
    options: Mapping[str, Any] = field(default_factory=dict)


_CHOICES = {"kind": ("probe", "finetune"), "val": ("full", "matched"), "test": ("local", "official")}
_MOST_BYTES = 1 << 20
_REQUIRED = ("datasets", "backbones")
_OPTIONS = ("val", "test", "folds", "repeats", "lr", "max_epochs")
_CLASSES = ("drop_class", "merge_class")
_KEYS = (*_REQUIRED, "heads", "subsets", "seeds", "kind", "title", *_CLASSES, *_OPTIONS)


def read_grid(path: Path) -> OwnGrid:
    """Read and check a grid's TOML file."""
    try:
        content = tomllib.loads(read_regular(path, most=_MOST_BYTES, follow=True).decode("utf-8"))
        check_depth(content)
    except OSError as error:
        raise UsageError(f"the grid's file cannot be read: {error.strerror}", where=path) from error
    except (ValueError, RecursionError) as error:  # of TOML, of UTF-8, of a number with thousands of digits
        raise UsageError("the grid's file is not TOML", found=str(error)[:300], where=path) from error
    return _Reader(path, content).read()


@dataclass(frozen=True)
class _Reader:
    path: Path
    content: Mapping[str, Any]

    def read(self) -> OwnGrid:
        self._check_keys()
        seeds = self._list("seeds", int, [0])
        models: dict[Model, None] = {}
        for kind in self._kinds():
            for head in self._list("heads", str, ["linear"]):
                for names in self._sets(head):
                    for seed in seeds:
                        made = make_models(kind, head, names, seed if "seeds" in self.content else None)
                        models |= dict.fromkeys(known_model(model, LINEAR) for model in made)
        subsets = tuple(str(s).upper() for s in self._list("subsets", (str, int), ["S", "M", "F"]))
        datasets = tuple(self._list("datasets", str, []))
        grid = Grid(
            self.path.stem,
            self._value("title", str, f"Grid of {self.path.name}"),
            datasets,
            tuple(models),
            subsets,
            "models" if len(datasets) == 1 and len(models) <= _MOST_COLUMNS else "subsets",
        )
        return OwnGrid(grid, self._options())

    def _check_keys(self) -> None:
        unknown = [key for key in self.content if key not in _KEYS]
        if unknown:
            near = difflib.get_close_matches(unknown[0], _KEYS, n=2)
            raise self._error(
                f"the grid has no key {unknown[0]!r}" + (f"; did you mean {' or '.join(near)}?" if near else ""),
                ", ".join(_KEYS),
                ", ".join(unknown),
            )
        absent = [key for key in _REQUIRED if not self.content.get(key)]
        if absent:
            raise self._error(f"the grid names no {absent[0]}", f'{absent[0]} = ["NAME", …]', "nothing")

    def _kinds(self) -> list[str]:
        given = self.content.get("kind", "probe")
        kinds = list(given) if isinstance(given, list) else [given]
        for kind in kinds:
            self._choice("kind", kind)
        if not kinds:
            raise self._error("'kind' is an empty list", " or ".join(_CHOICES["kind"]), "[]")
        return kinds

    def _sets(self, head: str) -> list[list[str]]:
        """The lists of backbones that a head is made over: sets for one that fuses, else every name once."""
        given = self.content["backbones"]
        inner = [entry for entry in given if isinstance(entry, list)] if isinstance(given, list) else []
        names = [entry for entry in given if not isinstance(entry, list)] if isinstance(given, list) else [given]
        if any(not isinstance(name, str) or not name for entry in (names, *inner) for name in entry):
            raise self._error("'backbones' is not a list of names", '["effnet_lite0", …]', repr(given))
        if head in known_heads and make_head(head).fuses:
            return inner or [names]
        singles = [*names, *(name for entry in inner for name in entry)]
        return [list(dict.fromkeys(singles))]

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for key in _OPTIONS:
            if key not in self.content:
                continue
            value = self.content[key]
            if key in _CHOICES:
                self._choice(key, value)
            elif key == "lr":
                rates = value if isinstance(value, list) else [value]
                if not rates or not all(type(rate) in (int, float) and 0 < rate < 1e6 for rate in rates):
                    raise self._error("'lr' is not a learning rate, nor a list of them", "1e-3", repr(value))
                value = [float(rate) for rate in rates] if isinstance(value, list) else float(value)
            elif type(value) is not int or not 1 <= value < 1 << 31:
                raise self._error(f"{key!r} is not a number", f"{key} = 5", repr(value))
            options[key] = value
        if any(key in self.content for key in _CLASSES):
            texts = (tuple(self._list(key, str, [])) if key in self.content else () for key in _CLASSES)
            options["classes"] = ClassOptions(*texts)
        return options

    def _list(self, key: str, kind: type | tuple[type, ...], default: list[Any]) -> list[Any]:
        value = self.content.get(key, default)
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(v, kind) and _sensible(v) for v in values):
            raise self._error(f"{key!r} is not a list of the right kind", _expected(key), repr(value))
        return list(dict.fromkeys(values))

    def _value(self, key: str, kind: type, default: Any) -> Any:
        value = self.content.get(key, default)
        if not isinstance(value, kind):
            raise self._error(f"{key!r} is not of the right kind", _expected(key), repr(value))
        return value

    def _choice(self, key: str, value: object) -> None:
        if not isinstance(value, str) or value not in _CHOICES[key]:
            raise self._error(f"no such {key!r}", " or ".join(_CHOICES[key]), repr(value))

    def _error(self, problem: str, expected: str, found: str) -> UsageError:
        return UsageError(problem, expected=expected, found=found, where=self.path)


def _sensible(value: object) -> bool:
    return abs(value) < 1 << 63 if type(value) is int else isinstance(value, str) and value != "" and "\0" not in value


def _expected(key: str) -> str:
    examples = {"seeds": "[0, 1]", "subsets": '["S", 100, "F"]', "heads": '["linear", "knn"]', "title": '"A title"',
                "merge_class": '["mild+severe=ill"]'}  # fmt: skip
    example = examples.get(key, '["NAME", …]')
    return f"{key} = {example}"
