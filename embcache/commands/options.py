"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import functools
import inspect
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer

from embcache.commands.output import echo, json_text
from embcache.config import Config, DatasetRef, option_of
from embcache.config import split_list as split_list
from embcache.errors import UsageError, advise_only
from embcache.io import write_output

if TYPE_CHECKING:
    from embcache.data.classes import ClassOptions
    from embcache.data.dataset import ImageDataset

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home", metavar="FOLDER", help="Folder of stores and runs. [default: $EMBCACHE_HOME or ~/.cache/embcache]"
    ),
]
DataRootOption = Annotated[
    Path | None,
    typer.Option(
        "--data-root",
        metavar="FOLDER",
        help="The dataset's own folder, or its table. [default: $EMBCACHE_DATA/NAME or ./data/NAME]",
    ),
]
DatasetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--dataset",
        metavar="NAME[,NAME…]",
        help="Dataset name; repeatable, or comma-separated. See `embcache datasets`.",
    ),
]
BackboneOption = Annotated[
    list[str] | None,
    typer.Option(
        "--backbone",
        metavar="NAME[,NAME…]",
        help="Backbone name; repeatable, or comma-separated. See `embcache backbones`.",
    ),
]
AllowMissingOption = Annotated[
    bool, typer.Option("--allow-missing", help="Go on without images that are named but not there.")
]
NameOption = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="Name of a `folder` dataset. [default: its folder's and a hash]"),
]


def check_suffix(path: Path, flag: str, *suffixes: str) -> Path:
    """Refuse a file whose suffix says that something else is in it than is written; none, and devices, are well."""
    suffix = path.suffix.lower()
    if suffix and suffix not in suffixes and not (path.exists() and not path.is_file()):
        raise UsageError(
            f"the suffix {path.suffix} says something else than would be written",
            expected=" or ".join(suffixes) or "the name of a folder", found=str(path), where=flag,
            fix=f"{flag} {path.with_suffix(suffixes[0] if suffixes else '')}",
        )  # fmt: skip
    return path


def _check_json(target: str | None) -> str | None:
    if target is not None and target != "-":
        check_suffix(Path(target), "--json", ".json")
    return target


RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", metavar="PREFIX", help="First digits of the fingerprint, where several are cached."),
]
JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE|-",
        callback=_check_json,
        help="Write the answer as JSON to FILE, or to stdout with -.",
    ),
]
MaxPixelsOption = Annotated[
    int | None,
    typer.Option(
        "--max-pixels",
        metavar="N",
        help="Largest image that is decoded. [default: $EMBCACHE_MAX_PIXELS or 89478485]",
    ),
]
DropClassOption = Annotated[
    list[str] | None,
    typer.Option(
        "--drop-class",
        metavar="NAME[,NAME…]",
        help="Leave out the images of a class; repeatable, or comma-separated.",
    ),
]
MergeClassOption = Annotated[
    list[str] | None,
    typer.Option("--merge-class", metavar="A+B=NEW", help="Make one class of several, with a new name; repeatable."),
]
_COLUMN_HELP = {  # of `embcache.data.tables.ROLES`
    "path": "Column of a table that names the files.",
    "label": "Column of a table that holds the labels.",
    "group": "Column of a table that holds patients, slides …: no split divides one. [default: group, or a usual name]",
    "split": "Column of a table that holds train, val or test.",
    "id": "Column of a table that names the images.",
}
SubsetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--subset",
        metavar="S,M,F,N",
        help="S, M, F or a number of training images; repeatable, or comma-separated. [default: S]",
    ),
]
FoldsOption = Annotated[int, typer.Option("--folds", metavar="K", help="Folds of the cross-validation.")]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="Of folds, subsets, weights, order and dropout.")]
ValOption = Annotated[
    str,
    typer.Option(
        "--val", metavar="full|matched", help="Validate on the whole fold, or on as many images as train, balanced."
    ),
]
TestOption = Annotated[
    str,
    typer.Option(
        "--test",
        metavar="local|official",
        help="Where the official test labels are not public: hold out 20 % of the labelled images, or nothing.",
    ),
]
MetricOption = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        metavar="NAME[,NAME…]",
        help="auc, accuracy, balanced_accuracy, f1, mcc, kappa, auprc, brier, log_loss, sensitivity, specificity, ppv, "
        "npv, sensitivity_at_95_specificity, … [default: the dataset's own]",
    ),
]
PositiveOption = Annotated[
    str | None,
    typer.Option(
        "--positive",
        metavar="CLASS",
        help="The positive class of two, which AUPRC, sensitivity and the like are of. [default: the one that is not "
        "named normal, benign, negative, no …, 0 and the like; else the second]",
    ),
]
PrevalenceOption = Annotated[
    str | None,
    typer.Option(
        "--prevalence",
        metavar="P|CLASS=P,…",
        help="How frequent the positive class of two, or each class, is where the model is to be used: probabilities "
        "are corrected from what training saw to it.",
    ),
]
CalibrateOption = Annotated[
    bool,
    typer.Option(
        "--calibrate",
        help="Fit a temperature for each model on its own validation images. Without --prevalence, classes are as "
        "frequent as among these.",
    ),
]
OverlapOption = Annotated[
    bool,
    typer.Option(
        "--exclude-test-overlap", help="Leave out training images that share a group with the official test set."
    ),
]


def echo_near(names: Sequence[str], home: Path | None) -> None:
    """Print which datasets that are cached may be meant by names of which nothing is."""
    from embcache.data.snapshot import cached_names, near_names

    cached = cached_names(home) if names else []
    for name in names:
        if name not in cached and (near := near_names(name, cached)):
            echo(f"near to {name}: {', '.join(near)}")


def command(*words: str, home: Path | None = None) -> str:
    """``embcache`` with these words, to be typed in the same shell; the home that was given goes along."""
    return shlex.join(["embcache", *words, *(["--home", str(home)] if home is not None else [])])


def advise_by(context: typer.Context) -> None:
    """Let errors advise only the flags of the command that is about to run; for the callback of a group."""
    command = getattr(context.command, "commands", {}).get(context.invoked_subcommand)
    if command is not None:
        advise_only(flag for option in command.params for flag in (*option.opts, *option.secondary_opts))
        context.call_on_close(lambda: advise_only(None))


class Skip:
    """In ``Annotated[SomeConfig, Skip("field")]``: fields that a command does not offer as options."""

    def __init__(self, *names: str) -> None:
        self.names = names


def takes_configs(command: Callable[..., None]) -> Callable[..., None]:
    """Turn each keyword-only parameter that is annotated with a config into one option per field of that config."""
    hints = get_type_hints(command, include_extras=True)
    own, made = [], []
    configs: dict[str, dict[str, Any]] = {}
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if not (isinstance(kind, type) and issubclass(kind, Config)):
            own.append(parameter.replace(annotation=hint))
            continue
        skipped = {name for extra in extras if isinstance(extra, Skip) for name in extra.names}
        options = _options(kind, skipped)
        configs[parameter.name] = {option.name: kind for option in options}
        made += options

    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> None:
        for parameter, names in configs.items():
            kind = next(iter(names.values()))
            values = {name: given.pop(name) for name in names}
            parsers = {f.name: option_of(f).parse for f in fields(kind)}
            typed = {name: value for name, value in values.items() if value not in (None, [])}
            given[parameter] = kind(
                **{name: parse(value) if (parse := parsers[name]) else value for name, value in typed.items()}
            )
        command(*args, **given)

    order = sorted([*own, *made], key=lambda p: p.kind)
    run.__signature__ = inspect.Signature(order)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in order}
    return run


def _options(kind: type[Config], skipped: set[str]) -> list[inspect.Parameter]:
    """Typer's options of a config; what several texts make, or what is parsed, is taken as text."""
    hints, options = get_type_hints(kind), []
    for f in fields(kind):
        known, hint, default = option_of(f), hints[f.name], f.default
        if f.name in skipped or known.flag == "-":
            continue
        annotation: Any = hint
        if get_origin(hint) in (tuple, Mapping):
            annotation, default = list[str] | None, None
        elif known.parse is not None:
            annotation = str | None
        bases = [base for base in kind.__mro__ if f.name in vars(base).get("__annotations__", {})]
        heading: str = vars(bases[0])["heading"]
        flag = known.flag or f"--{f.name.replace('_', '-')}"
        shown = typer.Option(flag, metavar=known.metavar or None, help=known.help, rich_help_panel=heading)
        options.append(
            inspect.Parameter(
                f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, shown]
            )
        )
    return options


def takes_columns(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--path-column``, ``--group-column`` and the like, as its one parameter ``columns``."""

    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> None:
        named: dict[str, Any] = {f"{role}_column": given.pop(f"{role}_column") or "" for role in _COLUMN_HELP}
        named["merge_class"] = given.get("merge_class") or ()
        command(*args, columns=DatasetRef.make(options=named), **given)

    run.__annotations__ = {name: hint for name, hint in command.__annotations__.items() if name != "columns"}
    run.__annotations__ |= {
        f"{role}_column": Annotated[str | None, typer.Option(f"--{role}-column", metavar="NAME", help=text)]
        for role, text in _COLUMN_HELP.items()
    }
    hints = get_type_hints(run, include_extras=True)  # typer looks at the signature and evaluates no text there
    own = [p.replace(annotation=hints[n]) for n, p in inspect.signature(command).parameters.items() if n != "columns"]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hints[name])
        for name in (f"{role}_column" for role in _COLUMN_HELP)
    ]
    run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    return run


def class_options(drop: Sequence[str] | None, merge: Sequence[str] | None) -> ClassOptions:
    """What ``--drop-class`` and ``--merge-class`` were given."""
    from embcache.data.classes import ClassOptions

    return ClassOptions(tuple(drop or ()), tuple(merge or ()))


def refuse_other_merges(merge: Sequence[str] | None, dataset: ImageDataset) -> None:
    """`UsageError` for merges that loading did not make: of classes that differ in more than letter case."""
    others = [text for text in merge or () if text not in dataset.ref.merge_class]
    if others:
        raise UsageError(
            "here --merge-class is for classes that differ only in letter case",
            found=", ".join(others),
            expected=" or ".join(dataset.class_names),
            fix="merge other classes when they are told apart: embcache probe --merge-class A+B=NEW",
        )


def plain(value: Any) -> Any:
    """JSON data from dataclasses, mappings and sequences; None for numbers that are not finite."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(data: Any, target: str) -> None:
    """Write ``data``, made `plain`, as indented JSON to the file ``target``, or to stdout when it is ``-``."""
    if target == "-":
        echo(json_text(plain(data), shown=True), nl=False)
        return
    write_output(Path(target), json_text(plain(data)))
