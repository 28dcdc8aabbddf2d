"""How commands are made: options from configs and from one table, JSON or text as the answer, what to type next."""

from __future__ import annotations

import functools
import inspect
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo

from embcache.commands.output import echo, may_guide, table_style, write_json
from embcache.config import RECIPE, DatasetRef
from embcache.errors import UsageError, with_home
from embcache.fields import Config, flag_of, option_of, split_list
from embcache.mirror import shown_home
from embcache.places import cache_bytes

if TYPE_CHECKING:
    from embcache.data.dataset import ImageDataset


def _check_json(target: str | None) -> str | None:
    if target is not None and target != "-":
        check_suffix(Path(target), "--json", ".json")
    return target


METRICS = (
    "auc, accuracy, balanced_accuracy, f1, mcc, kappa, auprc, brier, log_loss, sensitivity, specificity, ppv, npv, "
    "sensitivity_at_95_specificity, …"
)
OneDataset = Annotated[list[str], "NAME", "Name of the dataset. See `embcache datasets`."]
OneBackbone = Annotated[list[str], "NAME", "Name of the backbone. See `embcache backbones`."]

_SHARED: dict[str, tuple[str, str, Callable[..., Any] | None]] = {
    "home": (
        "FOLDER|URL", "Folder of stores and runs, or s3://BUCKET/PREFIX. [default: $EMBCACHE_HOME or "
        "~/.cache/embcache]", None,
    ),
    "dataset": (
        "NAME[,NAME…]", "Name of a dataset; repeatable or comma-separated. See `embcache datasets`.", None
    ),
    "backbone": (
        "NAME[,NAME…]", "Name of a backbone; repeatable or comma-separated. See `embcache backbones`.", None
    ),
    "subset": (
        "S,M,F,N", "S, M, F or a number of training images; repeatable or comma-separated. [default: S]", None
    ),
    "metric": ("NAME[,NAME…]", f"{METRICS}. [default: that of each run]", None),
    "recipe": ("PREFIX", RECIPE, None),
    "json": ("FILE|-", "Write the answer as JSON to FILE, or to stdout with -.", _check_json),
}  # fmt: skip
"""Metavar, help and check of options that are not fields of a config: a command's parameter of that name is one."""


@dataclass(frozen=True)
class Answer:
    """What a command found.

    ``data`` (or what makes it) is written with ``--json``; ``show`` prints it for people; ``next`` is what to type
    next, without ``embcache``; ``failed`` sets the exit status to 1.
    """

    data: Any
    show: Callable[[], object]
    next: Sequence[str] = ()
    failed: bool = False

    def give(self, json: str | None, home: Path | None) -> None:
        """Write and print the answer."""
        if json:
            write_json(self.data() if callable(self.data) else self.data, json)
        if json != "-":
            self.show()
            if self.next:
                print_next(*self.next, home=home)
        if self.failed:
            raise typer.Exit(1)


def command_line(*words: str, home: Path | None = None) -> str:
    """``embcache`` with these words, to be typed in the same shell, with the home that was given."""
    line = with_home(shlex.join(["embcache", *words]))
    return line if home is None or " --home " in line else f"{line} --home {shlex.quote(shown_home(home))}"


def print_next(*words: str, home: Path | None = None) -> None:
    """Print what to type next to stderr, as the last line of a command; not with ``--quiet``."""
    if may_guide():
        echo("next: " + command_line(*words, home=home), err=True)


class Skip:
    """In ``Annotated[SomeConfig, Skip("field")]``: fields that are no options of a command."""

    def __init__(self, *names: str) -> None:
        self.names = names


class Only(Skip):
    """The fields that are; all others are not."""


def command(*, table: bool = False) -> Callable[[Callable[..., Answer | None]], Callable[..., None]]:
    """Make a function a command, as typer reads it.

    Each parameter that is annotated with a config becomes one option per field; one that is named in `_SHARED` becomes
    that option; ``Annotated[int, "-n N", "Help."]`` is an option with a short flag, metavar and help. Values of type
    ``list[str]`` are split at commas. A command that returns an `Answer` takes ``--json``; with ``table`` it takes
    ``--wide`` and ``--csv``.
    """

    def decorate(function: Callable[..., Answer | None]) -> Callable[..., None]:
        own, made, lists = [], list[inspect.Parameter](), list[str]()
        configs: dict[str, tuple[type[Config], list[str]]] = {}
        hints = get_type_hints(function, include_extras=True)
        for parameter in inspect.signature(function).parameters.values():
            hint = hints[parameter.name]
            kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
            if isinstance(kind, type) and issubclass(kind, Config):
                options = _options(kind, next((extra for extra in extras if isinstance(extra, Skip)), Skip()))
                configs[parameter.name] = kind, [option.name for option in options]
                made += options
                continue
            default = parameter.default
            if parameter.name == "home":  # as text: of an address, Path would drop what it should be refused for
                made, kind = [*made, *_CACHE], str | None
            if parameter.name in _SHARED and not extras:
                extras, default = [_shared(parameter.name)], None
            elif extras and isinstance(extras[0], str):
                extras = [_typed(parameter.name, *extras)]
            if kind == list[str]:
                lists.append(parameter.name)
                if not isinstance(extras[0], ArgumentInfo):
                    kind, default = list[str] | None, None
            own.append(_parameter(parameter.name, Annotated[kind, extras[0]] if extras else kind, default))
        answers = hints.get("return") is Answer
        takes_json = "json" in hints
        if answers and not takes_json:
            own.append(_parameter("json", Annotated[str | None, _shared("json")]))
        own += _TABLE if table else []

        @functools.wraps(function)
        def run(**given: Any) -> None:
            for name in ("cache_dir", "cache_size"):
                if value := given.pop(name, None):
                    os.environ[f"EMBCACHE_{name.upper()}"] = str(value)
                    cache_bytes()
            if home := given.get("home"):
                given["home"] = home if "://" in home else Path(home)
            style = {name: given.pop(name, False) for name in ("wide", "csv") if table}
            json = given.get("json") if takes_json else given.pop("json", None)
            for name in lists:
                given[name] = split_list(given[name])
            for parameter, (config, names) in configs.items():
                values = {name: given.pop(name) for name in names}
                parsers = {f.name: option_of(f).parse for f in fields(config)}
                given[parameter] = config(**{
                    name: parse(value) if (parse := parsers[name]) else value
                    for name, value in values.items()
                    if value not in (None, [])
                })  # fmt: skip
            with table_style(**style):
                answer = function(**given)
                if answer is not None:
                    answer.give(json, given.get("home"))

        run.__signature__ = inspect.Signature([*own, *made])  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *made]}
        return run

    return decorate


def _parameter(name: str, annotation: Any, default: Any = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _typed(name: str, spelling: str, text: str) -> Any:
    *short, metavar = spelling.split(" ")
    return typer.Option(*short, "--" + name.replace("_", "-"), metavar=metavar or None, help=text)


def _shared(name: str) -> Any:
    metavar, text, callback = _SHARED[name]
    return typer.Option(f"--{name}", metavar=metavar, help=text, callback=callback)


_TABLE = [
    _parameter(
        name, Annotated[bool, typer.Option(f"--{name}", help=text, rich_help_panel="Output options")], default=False
    )
    for name, text in (
        ("wide", "Print all columns of the table, even if the terminal is too narrow."),
        ("csv", "Print the table as CSV to stdout, and everything else to stderr."),
    )
]


_CACHE = [
    _parameter(
        name, Annotated[str | None, typer.Option("--" + name.replace("_", "-"), metavar=metavar, help=text,
                                                 rich_help_panel="Options for homes in object stores")],
    )
    for name, metavar, text in (
        ("cache_dir", "FOLDER", "Folder of copies on this machine. [default: $EMBCACHE_CACHE_DIR or "
         "~/.cache/embcache-places]"),
        ("cache_size", "SIZE", "Space for copies of features, such as 200GB. [default: $EMBCACHE_CACHE_SIZE or 100GB]"),
    )
]  # fmt: skip


def _options(config: type[Config], choice: Skip) -> list[inspect.Parameter]:
    """Typer's options of a config; what is parsed, or made from several texts, is taken as text."""
    hints, options = get_type_hints(config), []
    # Its own first, then those that it shares with other configs.
    for f in sorted(fields(config), key=lambda f: f.name not in vars(config).get("__annotations__", {})):
        known, default = option_of(f), f.default
        annotation: Any = hints[f.name]
        if known.flag == "-" or (f.name in choice.names) != isinstance(choice, Only):
            continue
        if get_origin(annotation) in (tuple, Mapping):
            annotation, default = list[str] | None, None
        elif known.parse is not None:
            annotation = str | None
        heading = next(
            vars(base)["heading"] for base in config.__mro__ if f.name in vars(base).get("__annotations__", {})
        )
        flag = known.flag or flag_of(f)
        shown = typer.Option(*flag.split(","), metavar=known.metavar or None, help=known.help, rich_help_panel=heading)
        options.append(_parameter(f.name, Annotated[annotation, shown], default))
    return options


def check_suffix(path: Path, flag: str, *suffixes: str) -> Path:
    """Refuse a file whose suffix stands for another format; no suffix, and devices, are allowed."""
    suffix = path.suffix.lower()
    if suffix and suffix not in suffixes and not (path.exists() and not path.is_file()):
        raise UsageError(
            f"the suffix {path.suffix} does not match the format", code="output-suffix",
            expected=" or ".join(suffixes) or "the name of a folder", found=str(path), where=flag,
            fix=f"{flag} {path.with_suffix(suffixes[0] if suffixes else '')}",
        )  # fmt: skip
    return path


def check_one(dataset: Sequence[str], backbone: Sequence[str] | None, fix: str, *, cached: bool = False) -> None:
    """`UsageError` unless one dataset is named, and one backbone at most (None: any), or exactly with ``cached``."""
    if len(dataset) != 1 or len(backbone or ()) > 1 or (cached and not backbone):
        given = {"datasets": dataset} if backbone is None else {"datasets": dataset, "backbones": backbone}
        raise UsageError(
            f"this command is for {'' if backbone is None else 'one backbone and '}one dataset",
            code="export-one-store" if cached else "one-dataset",
            found="; ".join(f"{what}: {', '.join(names) or 'none'}" for what, names in given.items()),
            fix=f"{fix}   (embcache ls lists what is cached)",
        )  # fmt: skip


def check_named(command: str, **names: Sequence[str]) -> None:
    """`UsageError` where nothing was named of what a command needs."""
    for what, given in names.items():
        if not given:
            raise UsageError(
                f"no {what} was named", code=f"no-{what}",
                fix=f"embcache {command} --{what} NAME …   (embcache {what}s lists them)",
            )  # fmt: skip


def echo_nothing(what: str, names: Sequence[str], home: Path | None) -> None:
    """Print that there is nothing of these datasets, and which cached ones may be meant."""
    from embcache.data.published import cached_names, near_names
    from embcache.paths import home_text

    echo(f"{what} in {home_text(home)}" + (f" for {', '.join(names)}" if names else ""))
    cached = cached_names(home) if names else []
    for name in names:
        if name not in cached and (near := near_names(name, cached)):
            echo(f"near to {name}: {', '.join(near)}")


ORIGINS = {"live": "its files as they are now", "snapshot": "the snapshot that extraction kept"}
"""Where a dataset came from, in words."""


def refuse_other_merges(ref: DatasetRef, dataset: ImageDataset) -> None:
    """`UsageError` for merges that loading did not make: of classes that differ in more than letter case."""
    if others := [text for text in ref.merge_class if text not in dataset.ref.merge_class]:
        raise UsageError(
            "here --merge-class is for classes that differ only in letter case", code="merge-class",
            found=", ".join(others), expected=" or ".join(dataset.class_names),
            fix="merge other classes when heads are trained: embcache probe --merge-class A+B=NEW",
        )  # fmt: skip


def option_text(value: object) -> str:
    """A hyperparameter as ``--head-option`` takes it."""
    return f"[{', '.join(map(option_text, value))}]" if isinstance(value, list | tuple) else str(value)
