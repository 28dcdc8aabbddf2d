"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embcache.errors import UsageError, advise_only
from embcache.io import write_output

if TYPE_CHECKING:
    from embcache.data.classes import ClassOptions

HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home", metavar="FOLDER", help="Folder of stores and runs. [default: $EMBCACHE_HOME or ~/.cache/embcache]"
    ),
]
DataRootOption = Annotated[
    Path | None,
    typer.Option(
        "--data-root", metavar="FOLDER", help="The dataset's own folder. [default: $EMBCACHE_DATA/NAME or ./data/NAME]"
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
JsonOption = Annotated[
    str | None, typer.Option("--json", metavar="FILE|-", help="Write the answer as JSON to FILE, or to stdout with -.")
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


def split_list(values: Sequence[str] | None) -> list[str]:
    """Flatten repeated and comma-separated values; order kept, repeats dropped.

    Raises
    ------
    UsageError
        A value between two commas is empty.
    """
    names: list[str] = []
    for value in values or ():
        for name in value.split(","):
            if not name.strip():
                raise UsageError("an empty name in a list", found=repr(value), fix="separate names by single commas")
            if name.strip() not in names:
                names.append(name.strip())
    return names


def advise_by(context: typer.Context) -> None:
    """Let errors advise only the flags of the command that is about to run; for the callback of a group."""
    command = getattr(context.command, "commands", {}).get(context.invoked_subcommand)
    if command is not None:
        advise_only(flag for option in command.params for flag in (*option.opts, *option.secondary_opts))
        context.call_on_close(lambda: advise_only(None))


def class_options(drop: Sequence[str] | None, merge: Sequence[str] | None) -> ClassOptions:
    """What ``--drop-class`` and ``--merge-class`` were given."""
    from embcache.data.classes import ClassOptions

    return ClassOptions(tuple(drop or ()), tuple(merge or ()))


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
    text = json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        write_output(Path(target), text.encode("utf-8"))
    except OSError as error:
        raise UsageError(
            f"cannot write the JSON file: {error.strerror}", where=target, fix="name a file that can be written, or -"
        ) from error
