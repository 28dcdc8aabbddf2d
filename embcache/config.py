"""Configs: one frozen dataclass per journey, from which options, Python keywords, worker JSON and run IDs derive.

A new option is one field: `option` gives its help, bounds and whether a result depends on it. Importing this module
imports no torch.
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
from embcache.typed import typed


@dataclass(frozen=True)
class Option:
    """What is known of a field in addition to its name, type and default.

    Attributes
    ----------
    help : str
        One sentence for ``--help``.
    metavar : str
        What the value looks like.
    flag : str
        The command-line flag, where it is not the field's name; ``--a/--no-a`` for booleans that are on by default.
        ``"-"``: not on the command line.
    result : bool
        Whether a result depends on the value: then a value other than the default is part of the run's ID.
    choices : tuple of str
        All values there are.
    least, most : float, optional
        Bounds of a number.
    parse : callable, optional
        The value from the text typed on the command line (from a list of texts for tuples and mappings).
    """

    help: str
    metavar: str = ""
    flag: str = ""
    result: bool = False
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    parse: Callable[[Any], Any] | None = None


def option(default: Any, help: str, **more: Any) -> Any:
    """A field of a config with its default; ``more`` are the fields of `Option`."""
    metadata = {"option": Option(help, **more)}
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
    return f.name if flag == "-" else (flag or f"--{f.name.replace('_', '-')}").split("/")[0]


@dataclass(frozen=True)
class Config:
    """Base of all configs: values are checked and normalized when one is made.

    A single value stands for a tuple of one, a list for a tuple, and any path-like object for a path.

    Raises
    ------
    UsageError
        A value is out of bounds or of another type.
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
        """``base``, or the defaults, with some options set.

        Raises
        ------
        UsageError
            There is no such option, or its value cannot be used.
        """
        check_keys(options or {}, [f.name for f in fields(cls)], cls.__name__)
        return dataclasses.replace(base or cls(), **(options or {}))

    def result_options(self) -> dict[str, Any]:
        """Options that a result depends on and that differ from their defaults, as JSON data for a run's ID."""
        plain = self.to_json()
        usual = type(self)().to_json()
        names = [f.name for f in fields(self) if option_of(f).result]
        return {name: plain[name] for name in names if plain[name] != usual[name]}

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
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises
        ------
        ValueError
            A key is unknown, or a value is not of its type.
        """
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
                raise UsageError(
                    f"{flag} is out of bounds", code="option-bounds", expected=f"{low:,} to {high:,}",
                    found=str(each)[:40], where=flag, fix=f"{flag} {low if each < low else high:g}",
                )  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


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


def parse_weights(values: Sequence[str], names: Sequence[str] | None = None) -> dict[str, Path]:
    """Checkpoints by backbone, from ``[NAME=]FILE`` values.

    Where the backbones are not known yet (``names`` is None) every value must begin with a name.

    Raises
    ------
    UsageError
        A value does not name its backbone, or it is none of ``names``.
    """
    weights: dict[str, Path] = {}
    for value in values:
        # The name of a backbone has no "=", a path may: only a known name before the first "=" is one.
        name, separator, file = value.partition("=")
        if names is None and not (name and file):
            raise UsageError(
                "--weights does not name its backbone", code="weights-unnamed", expected="NAME=FILE", found=value,
                where="--weights", fix=f"--weights NAME={file or name}",
            )  # fmt: skip
        if names is not None and (not separator or name not in names):
            if len(names) > 1 or (separator and not Path(value).exists()):
                raise UsageError(
                    "--weights does not name its backbone", code="weights-unnamed",
                    expected="NAME=FILE with NAME one of " + ", ".join(names), found=value, where="--weights",
                    fix=f"--weights {names[0]}={file or value}",
                )  # fmt: skip
            name, file = names[0], value
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


MOST_FOLDS = MOST_REPEATS = MOST_VIEWS = 1_000
MOST_SEED = 2**62  # one is added for each repeat, and torch takes 63 bits


@dataclass(frozen=True)
class DatasetRef(Config):
    """Where a dataset is, and how its table is read.

    The name of the dataset itself is an argument of its own: several can be read alike.
    """

    heading: ClassVar[str] = "Dataset options"

    data_root: Path | None = option(
        None, "Folder of the dataset, or its table. [default: $EMBCACHE_DATA/NAME or ./data/NAME]", metavar="FOLDER"
    )
    name: str | None = option(
        None, "Name of a `folder` dataset. [default: its folder's name and a hash]", metavar="NAME"
    )
    path_column: str = option("", "Column of a table with the paths of the images.", metavar="NAME")
    label_column: str = option("", "Column of a table with the labels.", metavar="NAME")
    group_column: str = option(
        "",
        "Column of a table with patients, slides …; no split divides a group. [default: group, or a usual name]",
        metavar="NAME",
    )
    split_column: str = option("", "Column of a table with train, val or test.", metavar="NAME")
    id_column: str = option("", "Column of a table with the IDs of the images.", metavar="NAME")
    allow_missing: bool = option(False, "Skip images that are listed but missing.")
    drop_class: tuple[str, ...] = option(
        (), "Leave out the images of a class; repeatable or comma-separated.", metavar="NAME[,NAME…]"
    )
    merge_class: tuple[str, ...] = option((), "Merge classes under a new name; repeatable.", metavar="A+B=NEW")
    target: str | None = option(
        None, "Column of the dataset's table to predict instead of its labels.", metavar="COLUMN"
    )


@dataclass(frozen=True)
class ExtractConfig(Config):
    """How features are extracted."""

    heading: ClassVar[str] = "Extraction options"

    weights: tuple[str, ...] = option(
        (), "Checkpoint of a backbone; NAME= can be omitted for a single backbone.", metavar="[NAME=]FILE"
    )
    transform: str | None = option(
        None,
        "paper: 256×256, center crop 224, images up to 224 as they are. imagenet: shorter side 256, center crop 224. "
        "model: the preprocessing of a timm: backbone. [default: paper; model for timm: backbones]",
        metavar="paper|imagenet|model", choices=("paper", "imagenet", "model"),
    )  # fmt: skip
    device: str = option(
        "auto", "auto, cpu, cuda:0, …; several share the work in one process each.", metavar="NAME[,NAME…]"
    )
    precision: str = option(
        "fp32", "Precision of the network; part of the recipe.", metavar="fp32|tf32|bf16|fp16",
        choices=("fp32", "tf32", "bf16", "fp16"),
    )  # fmt: skip
    batch_size: int | None = option(
        None, "Images per batch. [default: that of the store; for a new store 16 on a CPU, 64 on a GPU]", metavar="N",
        least=1, most=1 << 16,
    )  # fmt: skip
    workers: int | None = option(
        None, "Threads that decode images. [default: one per core, at most 8]", metavar="N", least=1, most=1 << 10
    )
    rows_per_shard: int | None = option(
        None,
        "Images that are computed and committed together in a new store; Ctrl-C waits for them. [default: 64 on a CPU, "
        "4096 on a GPU; more above 131,072 and 8,388,608 images]",
        metavar="N", least=1, most=1 << 20,
    )  # fmt: skip
    format: str | None = option(
        None, "File format of a new store. [default: zarr]", metavar="zarr|hdf5", choices=("zarr", "hdf5")
    )
    part: tuple[int, int] | None = option(
        None, "Compute only the I-th of N parts, for array jobs.", metavar="I/N", parse=parse_part
    )
    views: int = option(
        1, "Views per image: the plain one and V - 1 augmented ones, in a store of its own.", metavar="V",
        least=1, most=MOST_VIEWS,
    )  # fmt: skip
    feature_dtype: str = option(
        "float32", "Data type of the stored features; part of the recipe.", metavar="float32|float16",
        choices=("float32", "float16"),
    )  # fmt: skip
    on_error: str = option(
        "quarantine", "Skip an image that cannot be used and record the reason, or stop at the first one.",
        metavar="quarantine|fail", choices=("quarantine", "fail"),
    )  # fmt: skip
    max_bad: int | str = option(
        "1%", "Maximum number or percentage of unreadable images.", metavar="N|P%", parse=parse_count_or_share
    )
    retry_quarantined: bool = option(False, "Try quarantined images again, even if they have not changed.")
    max_pixels: int | None = option(
        None, "Largest image that is decoded, in pixels. [default: $EMBCACHE_MAX_PIXELS or 89478485]", metavar="N",
        least=1,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            parse_part(f"{self.part[0]}/{self.part[1]}")


@dataclass(frozen=True)
class VerifyConfig(Config):
    """What is verified in addition to the bytes of stores, and how rows are computed again."""

    heading: ClassVar[str] = "Verification options"

    repair: bool = option(False, "Compute damaged shards again from the images; the others stay.")
    source: bool = option(False, "Hash the images again, and list those that changed since extraction.")
    sample: int = option(0, "Compute N random rows again and compare them.", metavar="N", least=0, most=10**9)
    weights: tuple[str, ...] = option(
        (), "Checkpoint of a backbone; NAME= can be omitted for a single backbone.", metavar="[NAME=]FILE"
    )
    device: str = option("auto", "auto, cpu, cuda:0, …", metavar="NAME")
    max_pixels: int | None = option(
        None, "Largest image that is decoded, in pixels. [default: $EMBCACHE_MAX_PIXELS or 89478485]", metavar="N",
        least=1,
    )  # fmt: skip


@dataclass(frozen=True)
class ExportConfig(Config):
    """How a store is exported."""

    heading: ClassVar[str] = "Export options"

    recipe: str | None = option(
        None, "First digits of the store's fingerprint, where several recipes are cached.", metavar="PREFIX"
    )
    format: str | None = option(
        None, "Format of the file. [default: by the suffix of TARGET]", metavar="npz|parquet|csv|zarr|hdf5",
        choices=("npz", "parquet", "csv", "zarr", "hdf5"),
    )  # fmt: skip
    views: int | None = option(
        None, "Export the store with V views per image. [default: the plain one]", metavar="V", least=1, most=MOST_VIEWS
    )
    force: bool = option(False, "Replace TARGET if it exists.")


@dataclass(frozen=True)
class ProtocolConfig(Config):
    """The protocol that probing and finetuning share: folds, subsets, validation, test set, metric."""

    heading: ClassVar[str] = "Protocol options"

    folds: int = option(
        5, "Number of folds of the cross-validation.", metavar="K", result=True, least=2, most=MOST_FOLDS
    )
    seed: int = option(
        0, "Seed of folds, subsets, initial weights, order and dropout.", metavar="N", result=True,
        least=0, most=MOST_SEED,
    )  # fmt: skip
    val: str = option(
        "full", "Validate on the whole fold, or on as many images as are trained on, balanced.",
        metavar="full|matched", result=True, choices=("full", "matched"),
    )  # fmt: skip
    test: str = option(
        "local",
        "Where the labels of the official test set are not public: hold out 20 % of the labeled images, or nothing.",
        metavar="local|official", result=True, choices=("local", "official"),
    )  # fmt: skip
    exclude_test_overlap: bool = option(
        False, "Leave out training images that share a group with the official test set.", result=True
    )
    splits: str | None = option(
        None, "Use the splits of a file, or of a registered name, instead of drawing them.", metavar="FILE|NAME"
    )
    metric: str | None = option(
        None, "Metric that scores models and chooses epochs. [default: that of the dataset]", metavar="NAME"
    )
    positive: str | None = option(
        None,
        "Positive class of two. [default: the one not named normal, benign, negative, no …, 0 and the like; else the "
        "second]",
        metavar="CLASS",
    )


@dataclass(frozen=True)
class ProbeConfig(ProtocolConfig):
    """How heads are trained on cached features."""

    heading: ClassVar[str] = "Probe options"

    head: str = option("linear", "Heads to train, comma-separated; see `embcache heads`.", metavar="NAME[,NAME…]")
    head_options: Mapping[str, Any] = option(
        {}, "Hyperparameter of the head; repeatable.", metavar="NAME=VALUE", flag="--head-option", parse=parse_pairs
    )
    attention: str | None = option(
        None,
        "Attention of dvme by all scores (exact), by a few nodes with the same result to 1e-5 (fast), or by the faster "
        "of the two. [default: auto]",
        metavar="auto|exact|fast", choices=("auto", "exact", "fast"),
    )  # fmt: skip
    lr: tuple[float, ...] = option(
        (), "Learning rate; of several, each fold keeps the best on validation. [default: 1e-3]",
        metavar="RATE[,RATE…]", result=True, parse=parse_numbers,
    )  # fmt: skip
    repeats: int = option(
        1, "Repeat everything R times with seeds N, N + 1, …", metavar="R", result=True, least=1, most=MOST_REPEATS
    )
    views: int = option(
        1, "Train on V cached views per image, drawn anew in each epoch.", metavar="V", result=True,
        least=1, most=MOST_VIEWS,
    )  # fmt: skip
    recipe: str | None = option(
        None, "First digits of the store's fingerprint, where several recipes are cached.", metavar="PREFIX"
    )
    buffer: int | None = option(
        None, "Stream features from their shards through a shuffle buffer of N rows. [default: all in memory]",
        metavar="N", result=True, least=64, most=10**9,
    )  # fmt: skip
    device: str = option("cpu", "Device on which heads are trained: cpu, cuda, cuda:0, …", metavar="NAME")
    again: bool = option(False, "Train even if a saved result answers the same question.")
    save: bool = option(True, "Write the run folder, and reuse those that are there.", flag="-")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention is not None and self.head != "dvme":
            raise UsageError(
                "--attention is for the head dvme", code="option-of-another-head", found=f"--head {self.head}",
                fix="--head dvme, or leave --attention out",
            )  # fmt: skip
        if self.attention is not None and "attention" in self.head_options:
            raise UsageError(
                "attention is given twice", code="repeated-option", expected="each name once",
                found="--attention and --head-option attention=…", fix="leave --head-option attention=… out",
            )  # fmt: skip
        for rate in self.lr:
            if rate <= 0:
                raise UsageError(
                    "the learning rate must be a positive number", code="option-bounds", found=f"{rate:g}",
                    where="--lr", fix="--lr 1e-3",
                )  # fmt: skip

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Those of the head that are set."""
        own = {} if self.attention is None else {"attention": self.attention}
        return {**self.head_options, **own}


@dataclass(frozen=True)
class FinetuneConfig(ProtocolConfig):
    """How backbones and a head are trained together on images."""

    heading: ClassVar[str] = "Finetuning options"

    head: str = option(
        "linear", "Head to train: linear, mlp, or one that fuses backbones: dvme, …", metavar="NAME[,NAME…]"
    )
    weights: tuple[str, ...] = option(
        (), "Checkpoint of a backbone; NAME= can be omitted for a single backbone.", metavar="[NAME=]FILE"
    )
    transform: str | None = option(
        None,
        "Preprocessing as in extract; the crop is random in training. [default: paper; model for timm: backbones]",
        metavar="paper|imagenet|model", choices=("paper", "imagenet", "model"),
    )  # fmt: skip
    device: str = option("auto", "auto, cpu, cuda:0, …", metavar="NAME")
    precision: str = option(
        "fp32", "fp32 or bf16; with CUDA also tf32 and fp16.", metavar="KIND", choices=("fp32", "tf32", "bf16", "fp16")
    )
    lr: float | None = option(None, "Learning rate. [default: 1e-3; with dino 1e-4]", metavar="RATE", least=1e-12)
    batch_size: int | None = option(
        None, "Images per step. [default: 64; with dino 16]", metavar="N", least=1, most=1 << 16
    )
    accumulate: int = option(
        1, "Number of parts in which a batch is computed, to save memory.", metavar="N", result=True,
        least=1, most=1 << 16,
    )  # fmt: skip
    max_epochs: int = option(50, "Maximum number of epochs.", metavar="N", result=True, least=1, most=100_000)
    workers: int | None = option(
        None, "Threads that prepare images. [default: one per core, at most 8]", metavar="N", least=0, most=1 << 10
    )
    max_pixels: int | None = option(
        None, "Largest image that is decoded, in pixels. [default: $EMBCACHE_MAX_PIXELS or 89478485]", metavar="N",
        least=1,
    )  # fmt: skip
    pixel_cache: bool = option(
        True, "Keep decoded, resized images for later epochs and runs.", flag="--pixel-cache/--no-pixel-cache"
    )
    models: bool = option(True, "Keep the model of each fold, for `embcache predict`.", flag="--models/--no-models")
    resume: bool | None = option(False, "Continue an interrupted run of the same request.")  # None: if there is one
    again: bool = option(False, "Train from the beginning even if a saved result answers the same question.")


def _recipe() -> Any:
    return option(None, "First digits of the store's fingerprint, where several recipes are cached.", metavar="PREFIX")


@dataclass(frozen=True)
class PredictConfig(Config):
    """How a saved run predicts images."""

    heading: ClassVar[str] = "Prediction options"

    weights: tuple[str, ...] = option(
        (), "Checkpoint that the run was made with; NAME= can be omitted for a single backbone.", metavar="[NAME=]FILE"
    )
    device: str = option("auto", "auto, cpu, cuda:0, …", metavar="NAME")
    folds: tuple[int, ...] = option(
        (), "Average the models of these folds. [default: all]", metavar="K[,K…]", parse=parse_whole
    )
    prevalence: str | None = option(
        None,
        "Prevalence of the positive class of two, or of each class, where the model is to be used: probabilities are "
        "corrected to it.",
        metavar="P|CLASS=P,…",
    )
    calibrate: bool = option(
        False,
        "Fit a temperature for each model on its own validation images. Without --prevalence, classes are as frequent "
        "as among these.",
    )
    by_group: Path | None = option(
        None, "Also write a CSV with one row per group (patient): the mean probabilities of its images.", metavar="FILE"
    )
    trust: tuple[str, ...] = option(
        (), "Import a backbone or head of the run that is not part of embcache; repeatable.", metavar="MODULE:NAME"
    )
    workers: int | None = option(
        None, "Threads that decode images. [default: one per core, at most 8]", metavar="N", least=1, most=1 << 10
    )
    max_pixels: int | None = option(
        None, "Largest image that is decoded, in pixels. [default: $EMBCACHE_MAX_PIXELS or 89478485]", metavar="N",
        least=1,
    )  # fmt: skip


@dataclass(frozen=True)
class MapConfig(Config):
    """How embeddings are mapped to the plane."""

    heading: ClassVar[str] = "Map options"

    run: tuple[str, ...] = option(
        (), "Run of a head that fuses, such as dvme: ID or a unique prefix. See `embcache results`.",
        metavar="ID[,ID…]", parse=split_list,
    )  # fmt: skip
    method: str = option(
        "tsne", "Method; umap needs the extra `umap`.", metavar="tsne|umap|pca", choices=("tsne", "umap", "pca")
    )
    rows: str = option("test", "Which labeled images.", metavar="test|train|all", choices=("test", "train", "all"))
    limit: int | None = option(None, "Draw at most N of the images. [default: all]", metavar="N", least=4)
    perplexity: float = option(30.0, "Perplexity of t-SNE.", metavar="P", least=1, most=1000)
    seed: int = option(0, "Seed of the maps.", metavar="N", least=0, most=2**32 - 1)
    recipe: str | None = _recipe()


@dataclass(frozen=True)
class AttentionConfig(Config):
    """Which attention is shown."""

    heading: ClassVar[str] = "Attention options"

    weights: Path | None = option(None, "With --image: checkpoint of the backbone.", metavar="FILE")
    transform: str | None = option(
        None,
        "With --image: the same as in extract.",
        metavar="paper|imagenet|model",
        choices=("paper", "imagenet", "model"),
    )  # fmt: skip
    recipe: str | None = _recipe()


@dataclass(frozen=True)
class NeighborsConfig(Config):
    """Which neighbors of an image are shown."""

    heading: ClassVar[str] = "Neighbor options"

    k: int = option(8, "Number of neighbors.", metavar="K", flag="-k", least=1, most=1_000)
    recipe: str | None = _recipe()


@dataclass(frozen=True)
class AuditConfig(Config):
    """What an audit of a dataset looks for."""

    heading: ClassVar[str] = "Audit options"

    similarity: float = option(
        0.95, "Cosine from which two images count as near-duplicates.", metavar="S", least=1e-9, most=1
    )
    most: int = option(
        100, "Maximum number of likely label errors to list, per side (training, test).", metavar="N", least=0,
        most=1_000_000,
    )  # fmt: skip
    folds: int = option(5, "Number of folds.", metavar="K", flag="-", least=3, most=MOST_FOLDS)
    seed: int = option(0, "Seed of the folds.", metavar="N", least=0, most=MOST_SEED)
    recipe: str | None = _recipe()


@dataclass(frozen=True)
class StudyConfig(ProtocolConfig):
    """What a study holds and how its results are made: options of ``embcache run``, and keys of a study's TOML file.

    Lists that are empty are those of the table itself. A list among the backbones is one set, for heads that fuse.
    """

    heading: ClassVar[str] = "Study options"

    title: str = option("", "Title of the table.", flag="-")
    datasets: tuple[str, ...] = option(
        (), "Datasets instead of those of the table; repeatable or comma-separated. See `embcache datasets`.",
        metavar="NAME[,NAME…]", flag="--dataset", parse=split_list,
    )  # fmt: skip
    backbones: tuple[tuple[str, ...], ...] = option(
        (), "Backbones instead of those of the table; repeatable or comma-separated. See `embcache backbones`.",
        metavar="NAME[,NAME…]", flag="--backbone", parse=split_list,
    )  # fmt: skip
    subsets: tuple[str | int, ...] = option(
        (), "Subsets instead of those of the table; repeatable or comma-separated.", metavar="S,M,F,N",
        flag="--subset", parse=split_list,
    )  # fmt: skip
    heads: tuple[str, ...] = option(
        (), "Heads instead of those of the table; repeatable or comma-separated.", metavar="NAME[,NAME…]",
        flag="--head", parse=split_list,
    )  # fmt: skip
    seeds: tuple[int, ...] = option((), "Seeds of the table; one model for each.", flag="-", least=0, most=MOST_SEED)
    kind: tuple[str, ...] = option((), "probe, finetune, or both.", flag="-", choices=("probe", "finetune"))
    repeats: int = option(
        1, "Repeat everything R times with seeds N, N + 1, …; probes only.", metavar="R", least=1, most=MOST_REPEATS
    )
    lr: tuple[float, ...] = option(
        (), "Learning rate; of several, each fold of a probe keeps the best on validation. [default: 1e-3]",
        metavar="RATE[,RATE…]", parse=parse_numbers,
    )  # fmt: skip
    max_epochs: int = option(50, "Maximum number of epochs of finetuning.", metavar="N", least=1, most=100_000)
    recipe: str | None = option(
        None, "First digits of the store's fingerprint, where several recipes are cached.", metavar="PREFIX"
    )
    weights: tuple[str, ...] = option((), "Checkpoint of a backbone; repeatable.", metavar="NAME=FILE")
    transform: str | None = option(
        None, "The same as in extract. [default: paper; model for timm: backbones]", metavar="paper|imagenet|model",
        choices=("paper", "imagenet", "model"),
    )  # fmt: skip
    device: str = option("auto", "auto, cpu, cuda:0, …; with auto, heads are trained on the CPU.", metavar="NAME")
    workers: int | None = option(
        None, "Threads that decode images. [default: one per core, at most 8]", metavar="N", least=1, most=1 << 10
    )
