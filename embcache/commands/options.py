"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer

from embcache.commands.output import TableStyle, echo, table_style
from embcache.commands.output import plain as plain
from embcache.commands.output import write_json as write_json
from embcache.config import DatasetRef
from embcache.errors import UsageError
from embcache.fields import Config, flag_of, option_of
from embcache.fields import split_list as split_list

if TYPE_CHECKING:
    from embcache.data.dataset import ImageDataset

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home", metavar="FOLDER", help="Folder of stores and runs. [default: $EMBCACHE_HOME or ~/.cache/embcache]"
    ),
]
DatasetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--dataset",
        metavar="NAME[,NAME…]",
        help="Name of a dataset; repeatable or comma-separated. See `embcache datasets`.",
    ),
]
BackboneOption = Annotated[
    list[str] | None,
    typer.Option(
        "--backbone",
        metavar="NAME[,NAME…]",
        help="Name of a backbone; repeatable or comma-separated. See `embcache backbones`.",
    ),
]
SubsetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--subset",
        metavar="S,M,F,N",
        help="S, M, F or a number of training images; repeatable or comma-separated. [default: S]",
    ),
]
MetricOption = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        metavar="NAME[,NAME…]",
        help="auc, accuracy, balanced_accuracy, f1, mcc, kappa, auprc, brier, log_loss, sensitivity, specificity, ppv, "
        "npv, sensitivity_at_95_specificity, …; the first one chooses epochs. [default: that of the dataset]",
    ),
]


def _check_json(target: str | None) -> str | None:
    if target is not None and target != "-":
        check_suffix(Path(target), "--json", ".json")
    return target


JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE|-",
        callback=_check_json,
        help="Write the answer as JSON to FILE, or to stdout with -.",
    ),
]

# Options that are not fields of a config.
DataRootOption = Annotated[
    Path | None,
    typer.Option(
        "--data-root",
        metavar="FOLDER",
        help="Folder of the dataset, or its table. [default: $EMBCACHE_DATA/NAME or ./data/NAME]",
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="PREFIX",
        help="First digits of the store's fingerprint, where several recipes are cached.",
    ),
]
PositiveOption = Annotated[
    str | None,
    typer.Option(
        "--positive",
        metavar="CLASS",
        help="Positive class of two. [default: the one not named normal, benign, negative, no …, 0 and the like; else "
        "the second]",
    ),
]
PrevalenceOption = Annotated[
    str | None,
    typer.Option(
        "--prevalence",
        metavar="P|CLASS=P,…",
        help="Prevalence of the positive class, or of each class, where the model is to be used: probabilities are "
        "corrected for it.",
    ),
]
CalibrateOption = Annotated[
    bool,
    typer.Option(
        "--calibrate",
        help="Fit a temperature for each model on its own validation images; without --prevalence, classes are as "
        "frequent as among these.",
    ),
]


def check_suffix(path: Path, flag: str, *suffixes: str) -> Path:
    """Refuse a file whose suffix stands for another format; no suffix, and devices, are allowed."""
    suffix = path.suffix.lower()
    if suffix and suffix not in suffixes and not (path.exists() and not path.is_file()):
        raise UsageError(
            f"the suffix {path.suffix} says something else than would be written", code="output-suffix",
            expected=" or ".join(suffixes) or "the name of a folder", found=str(path), where=flag,
            fix=f"{flag} {path.with_suffix(suffixes[0] if suffixes else '')}",
        )  # fmt: skip
    return path


def echo_near(names: Sequence[str], home: Path | None) -> None:
    """Print which cached datasets may be meant by names that are not cached."""
    from embcache.data.published import cached_names, near_names

    cached = cached_names(home) if names else []
    for name in names:
        if name not in cached and (near := near_names(name, cached)):
            echo(f"near to {name}: {', '.join(near)}")


def load_named(name: str, ref: DatasetRef, home: Path | None) -> tuple[ImageDataset, str]:
    """A dataset with the classes of ``ref``, and where it came from: live or snapshot."""
    from embcache.data.dataset import find_dataset

    return find_dataset(name, ref, home)


def command(*words: str, home: Path | None = None) -> str:
    """``embcache`` with these words, to be typed in the same shell, with the home that was given."""
    return shlex.join(["embcache", *words, *(["--home", str(home)] if home is not None else [])])


def next_command(*words: str, home: Path | None = None) -> None:
    """Print what to type next, as the last line of a command."""
    echo("next: " + command(*words, home=home))


class Skip:
    """In ``Annotated[SomeConfig, Skip("field")]``: fields that are no options of a command."""

    def __init__(self, *names: str) -> None:
        self.names = names


def takes_configs(command: Callable[..., None]) -> Callable[..., None]:
    """Turn each keyword-only parameter that is annotated with a config into one option per field of that config."""
    own, made = [], list[inspect.Parameter]()
    configs: dict[str, tuple[type[Config], list[str]]] = {}
    for parameter in _parameters(command):
        hint = parameter.annotation
        config, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if not (isinstance(config, type) and issubclass(config, Config)):
            own.append(parameter)
            continue
        skipped = {name for extra in extras if isinstance(extra, Skip) for name in extra.names}
        options = _options(config, skipped)
        configs[parameter.name] = config, [option.name for option in options]
        made += options

    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> None:
        for parameter, (config, names) in configs.items():
            values = {name: given.pop(name) for name in names}
            parsers = {f.name: option_of(f).parse for f in fields(config)}
            given[parameter] = config(**{
                name: parse(value) if (parse := parsers[name]) else value
                for name, value in values.items()
                if value not in (None, [])
            })  # fmt: skip
        command(*args, **given)

    return _with_parameters(run, [*own, *made])


def prints_table(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command whose answer is a table ``--wide`` and ``--csv``."""

    @functools.wraps(command)
    def run(*args: Any, wide: bool, csv: bool, **given: Any) -> None:
        with table_style(TableStyle(wide, csv)):
            command(*args, **given)

    style = {
        "wide": "Print all columns of the table, even if the terminal is too narrow.",
        "csv": "Print the table as CSV to stdout, and everything else to stderr.",
    }
    made = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=False,
            annotation=Annotated[bool, typer.Option(f"--{name}", help=text, rich_help_panel="Output options")],
        )
        for name, text in style.items()
    ]  # fmt: skip
    return _with_parameters(run, [*_parameters(command), *made])


def _parameters(command: Callable[..., None]) -> list[inspect.Parameter]:
    """Parameters of a command, their annotations evaluated."""
    parameters = inspect.signature(command).parameters.values()
    hints = get_type_hints(command, include_extras=True)
    return [parameter.replace(annotation=hints[parameter.name]) for parameter in parameters]


def _with_parameters(run: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> Callable[..., None]:
    """A command with other parameters, as typer reads them."""
    ordered = sorted(parameters, key=lambda parameter: parameter.kind)
    run.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    return run


def _options(config: type[Config], skipped: set[str]) -> list[inspect.Parameter]:
    """Typer's options of a config; what is parsed, or made from several texts, is taken as text."""
    hints, options = get_type_hints(config), []
    for f in fields(config):
        known, default = option_of(f), f.default
        annotation: Any = hints[f.name]
        if f.name in skipped or known.flag == "-":
            continue
        if get_origin(annotation) in (tuple, Mapping):
            annotation, default = list[str] | None, None
        elif known.parse is not None:
            annotation = str | None
        heading = next(
            vars(base)["heading"] for base in config.__mro__ if f.name in vars(base).get("__annotations__", {})
        )
        flag = known.flag or flag_of(f)
        shown = typer.Option(flag, metavar=known.metavar or None, help=known.help, rich_help_panel=heading)
        options.append(
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, shown]
            )
        )
    return options


def refuse_other_merges(merge: Sequence[str] | None, dataset: ImageDataset) -> None:
    """`UsageError` for merges that loading did not make: of classes that differ in more than letter case."""
    others = [text for text in merge or () if text not in dataset.ref.merge_class]
    if others:
        raise UsageError(
            "here --merge-class is for classes that differ only in letter case",
            code="merge-class",
            found=", ".join(others),
            expected=" or ".join(dataset.class_names),
            fix="merge other classes when heads are trained: embcache probe --merge-class A+B=NEW",
        )


def option_text(value: object) -> str:
    """A hyperparameter as ``--head-option`` takes it."""
    return f"[{', '.join(map(option_text, value))}]" if isinstance(value, list | tuple) else str(value)
