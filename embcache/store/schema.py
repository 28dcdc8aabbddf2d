"""What a store is made of: recipe and fingerprint, header, plans, the rows of its shards, and its file formats."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shlex
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from embcache.errors import RecipeError, StoreError
from embcache.partitions import is_partition, partition_rows
from embcache.sealed import canonical_json

FORM = 2
"""Of all files of a store; any other form is refused."""

FOREIGN = "foreign features"
"""Stands for the architecture in the recipe of features that were made elsewhere and imported."""

# Raised whenever the arithmetic between decoded pixels and stored features changes: it is part of every recipe.
# 2: batch norms folded into convolutions; bfloat16 throughout.
NUMERICS = 2

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
FORMATS = ("zarr", "hdf5")
MOST_ROW_BYTES = 1 << 28
MOST_SHARD_ROWS = 1 << 20
NUMERIC_KINDS = "biufc"  # numpy's kinds of dtype that a row may have
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NUMBERED = re.compile(r"(.*?)(\d{1,15})", re.DOTALL | re.ASCII)


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the value of a feature, given the image.

    Not in it: labels, splits, batch size, threads, file format. Two recipes with the same fingerprint are the same.

    Parameters
    ----------
    backbone, architecture, weights_sha256 : str
        Name of the features; the network, named so that its definition can be found again; digest of its weights.
    transform : mapping of str to JSON
        Every parameter of the transform. Tuples become lists.
    decoder, pooling : str
        Version of the decoding of bytes into pixels; how tokens or maps become one vector.
    precision : {"fp32", "tf32", "bf16", "fp16"}
        Arithmetic of the forward pass; outside fp32, also what executes it, if that is not torch: ``bf16+openvino``.
    dtype : str
        numpy name of the stored features' dtype.
    numerics : int
        Raised when the arithmetic of a forward pass changes.
    model : str
        What a name of the user's own stands for, such as ``timm:resnet18``. It is not part of the fingerprint.

    Raises
    ------
    RecipeError
        A value has the wrong type, the precision is unknown, or the transform cannot be written as JSON.
    """

    backbone: str
    architecture: str
    weights_sha256: str
    transform: Mapping[str, Any]
    decoder: str
    pooling: str
    precision: str
    dtype: str
    numerics: int
    model: str = ""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            kind = {"numerics": int, "transform": Mapping}.get(name, str)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise RecipeError(
                    f"the field {name} of a recipe has another type", code="recipe-field",
                    expected={int: "an integer", str: "a string"}.get(kind, "an object"), found=repr(value)[:200],
                )  # fmt: skip
        if self.precision.partition("+")[0] not in PRECISIONS:
            raise RecipeError(
                "the precision of a recipe is unknown", code="recipe-precision", expected=" | ".join(PRECISIONS),
                found=repr(self.precision)[:200],
            )  # fmt: skip
        # One shape for equal recipes, whether built from tuples in code or read back from a file.
        object.__setattr__(self, "transform", json.loads(canonical_json(dict(self.transform))))

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """Sha256, 64 hex digits, of the recipe's canonical JSON.

        Networks whose names say where they lie (a folder, a repository, a mirror) count by their digests alone.
        """
        data = self.to_json()
        data.pop("model", None)
        if self.nameless:
            del data["backbone"]
        return hashlib.sha256(canonical_json(data).encode("utf-8")).hexdigest()

    @property
    def of_files(self) -> bool:
        """Whether files describe the network, which may lie anywhere."""
        return self.architecture.startswith(("transformers ", "open_clip ", "onnx "))

    @property
    def foreign(self) -> bool:
        """Whether the features were made elsewhere: nothing here can compute them."""
        return self.architecture == FOREIGN

    @property
    def nameless(self) -> bool:
        """Whether the backbone's name is not part of the fingerprint: it says where such files lie."""
        return self.of_files and not self.model

    @property
    def typed(self) -> str:
        """What to type where the network is loaded: the name, or ``mine=timm:resnet18``."""
        return f"{self.backbone}={self.model}" if self.model else self.backbone

    @property
    def weights_words(self) -> str:
        """The weights in words: of some libraries the digest is that of tensors, not of a file."""
        library = self.architecture.partition(" ")[0]
        what = {"transformers": "the folder of tensors with", "open_clip": "the file or folder of tensors with"}
        return f"{what.get(library, 'the file of')} sha256 {self.weights_sha256}"

    def weights_option(self, file: str = "") -> str:
        """The option that names the weights, which were in a file or folder; ``FILE`` or ``FOLDER`` if it is gone."""
        what = "FOLDER" if self.architecture.startswith("transformers ") else "FILE"
        return f"--weights {shlex.quote(f'{self.backbone}={file if file and Path(file).exists() else what}')}"

    def to_json(self) -> dict[str, Any]:
        """Every field by its name; ``model`` only where the name is of the user's own."""
        return {name: value for name, value in asdict(self).items() if value or name != "model"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """The inverse of :meth:`to_json`; `RecipeError` if a field is missing, unknown or of another type."""
        names = {field.name for field in fields(cls)} - {"model"}
        if not isinstance(data, Mapping) or set(data) - {"model"} != names:
            others = ", ".join(sorted(names ^ set(map(str, data if isinstance(data, Mapping) else ()))))
            raise RecipeError(
                "a recipe does not have the fields of this version of embcache", code="recipe-fields",
                expected=", ".join(sorted(names)), found=f"missing or unknown: {others[:500]}",
                fix="read it with the version of embcache that wrote it, or extract again",
            )  # fmt: skip
        return cls(**data)

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Fields in which two recipes differ, as ``{field: (mine, theirs)}``; an absent one is ``None``.

        Parameters of the transform are compared one by one, as ``transform.NAME``.
        """
        mine, theirs = self.flat(), other.flat()
        for data in (mine, theirs):
            data.pop("model", None)
        if self.nameless and other.nameless:
            del mine["backbone"], theirs["backbone"]
        return {
            name: (mine.get(name), theirs.get(name))
            for name in {**mine, **theirs}
            if (name in mine) != (name in theirs) or canonical_json(mine[name]) != canonical_json(theirs[name])
        }

    def flat(self) -> dict[str, Any]:
        """All fields by name, the parameters of the transform as ``transform.NAME``."""
        data = self.to_json()
        transform = data.pop("transform")
        return data | {f"transform.{name}": value for name, value in transform.items()}


@dataclass(frozen=True)
class StoreHeader:
    """What ``recipe.json`` says: the recipe, and what was settled when the store was created."""

    recipe: Recipe
    format: str
    row_shape: tuple[int, ...]
    rows_per_shard: int
    batch_size: int
    threads: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    runtime: str = "eager"  # what executes the network

    def __post_init__(self) -> None:
        sizes = (self.rows_per_shard, self.batch_size, self.threads, *self.row_shape)
        names = isinstance(self.format, str) and isinstance(self.runtime, str) and isinstance(self.provenance, Mapping)
        if not names or not all(type(size) is int and size > 0 for size in sizes):
            raise StoreError(
                "the header of a store is not as it should be", code="store-header",
                expected="whole numbers of at least 1, names of format and runtime, and an object as provenance",
                found=f"{sizes}, {self.format}, {self.runtime}"[:200],
            )  # fmt: skip
        try:
            dtype = np.dtype(self.recipe.dtype)
        except TypeError:
            dtype = np.dtype(object)
        if dtype.kind not in NUMERIC_KINDS:
            raise StoreError(
                "features need a dtype of numbers", code="store-dtype", expected="such as float32",
                found=self.recipe.dtype,
            )  # fmt: skip
        if self.row_bytes > MOST_ROW_BYTES or self.rows_per_shard > MOST_SHARD_ROWS:
            # Memory is reserved by these numbers before a shard is read.
            raise StoreError(
                "the rows or shards of a store are too large to be true", code="store-header",
                expected=f"at most {MOST_ROW_BYTES:,} bytes per row and {MOST_SHARD_ROWS:,} rows per shard",
                found=f"{self.row_bytes:,} bytes per row, {self.rows_per_shard:,} rows per shard",
            )  # fmt: skip

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the features."""
        return np.dtype(self.recipe.dtype)

    @property
    def row_bytes(self) -> int:
        """Size of the features of one row."""
        return self.dtype.itemsize * math.prod(self.row_shape)

    def check_rows(self, rows: ShardRows, planned: Sequence[str]) -> None:
        """Raise a StoreError unless ``rows`` are those of the plan, of this store's shape and dtype."""
        if list(rows.ids) != list(planned):
            raise StoreError(
                "the rows of a shard are not those of its plan", code="rows-not-planned",
                expected=f"{len(planned)} ids in the plan's order",
                found=f"{len(rows.ids)} ids, {len(set(planned) & set(rows.ids))} of them planned",
            )  # fmt: skip
        if rows.features.shape[1:] != self.row_shape or rows.features.dtype != self.dtype:
            raise StoreError(
                "the features do not fit their store", code="features-mismatch",
                expected=f"{self.dtype} {(len(planned), *self.row_shape)}", found=_shape(rows.features),
            )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data, with the form and the recipe's full fingerprint."""
        first = {"form": FORM, "fingerprint": self.recipe.fingerprint}
        settled = {name: value for name, value in vars(self).items() if name != "provenance"}
        first |= settled | {"recipe": self.recipe.to_json(), "row_shape": list(self.row_shape)}
        return first | {"provenance": dict(self.provenance)}  # the order is that of the file


@dataclass(frozen=True, slots=True)  # a plan of a million images has as many
class PlanEntry:
    """One row that a shard owes, and the state in which its source file was seen."""

    id: str  # the image's id in its dataset
    size: int  # bytes of the source file when planned; -1 where unknown
    mtime_ns: int  # its modification time in nanoseconds; -1 where unknown
    digest: str | None = None  # sha256 of the image's bytes, 64 hex digits, once known
    place: str = ""  # inside a container file; "" where the file is the image

    def __post_init__(self) -> None:
        check_id(self.id)
        if type(self.size) is not int or type(self.mtime_ns) is not int or not isinstance(self.place, str):
            raise StoreError(
                "an entry of a plan has values of other types", code="plan-entry",
                found=f"{self.size!r}, {self.mtime_ns!r}, {self.place!r}"[:200],
            )  # fmt: skip
        if self.digest is not None:
            _check_digest(self.digest)


def plan_rows(entries: Sequence[PlanEntry]) -> list[list[Any]]:
    """Entries as they are written: ``[id, place, size, mtime_ns, digest]``, or a range of rows of one container.

    A range is ``[[prefix, width], [first, count], size, mtime_ns, null]``: row n is at the place n and its id is the
    prefix and n in at least ``width`` digits.
    """
    written: list[list[Any]] = []
    for entry in entries:
        state = [entry.size, entry.mtime_ns, entry.digest]
        named = _NUMBERED.fullmatch(entry.id) if entry.place and entry.digest is None else None
        if named is None or f"{entry.place:0>{len(named[2])}}" != named[2] or entry.place != str(int(named[2])):
            written.append([entry.id, entry.place, *state])
            continue
        number, ids, last = int(named[2]), [named[1], len(named[2])], written[-1] if written else None
        if last and isinstance(last[0], list) and last[0] == ids and last[2:] == state and sum(last[1]) == number:
            last[1][1] += 1
        else:
            written.append([ids, [number, 1], *state])
    return written


def plan_entries(rows: Sequence[Any]) -> list[PlanEntry]:
    """The inverse of `plan_rows`; TypeError, ValueError or StoreError where the rows are not of this form."""
    entries: list[PlanEntry] = []
    for ids, place, size, mtime_ns, digest in rows:
        if isinstance(ids, str):
            entries.append(PlanEntry(ids, size, mtime_ns, digest, place))
            continue
        (prefix, width), (first, count) = ids, place
        numbers = [width, first, count]
        if not isinstance(prefix, str) or not all(type(n) is int and 0 <= n < 10**15 for n in numbers):
            raise TypeError(f"a range of rows {[ids, place]!r}"[:200])
        if not (1 <= width <= 15 and 1 <= count <= MOST_SHARD_ROWS - len(entries)):
            raise ValueError(f"a range of {count} rows, in ids of {width} digits")
        for n in range(first, first + count):
            entries.append(PlanEntry(f"{prefix}{n:0{width}d}", size, mtime_ns, digest, str(n)))
    return entries


@dataclass(frozen=True)
class PlannedRange:
    """Rows of a partition that a shard owes, see `embcache.partitions`."""

    partition: str
    start: int
    stop: int
    states: np.ndarray  # size and modification time of each row's file when planned, int64 (n, 2), as in `PlanEntry`

    def to_json(self) -> dict[str, Any]:
        """As it is written, beside the number of the plan."""
        states = base64.b64encode(zlib.compress(self.states.astype("<i8").T.tobytes(), 1)).decode("ascii")
        return {"partition": self.partition, "range": [self.start, self.stop], "states": states}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> PlannedRange:
        """The inverse of :meth:`to_json`; KeyError, TypeError or ValueError where it is not of this form."""
        start, stop = content["range"]
        if not is_partition(content["partition"]) or not type(start) is type(stop) is int:
            raise TypeError(f"a range {content['range']!r} of {content['partition']!r}"[:200])
        if not 0 <= start < stop <= start + MOST_SHARD_ROWS:
            raise ValueError(f"rows {start} to {stop}")
        inflate, size = zlib.decompressobj(), 16 * (stop - start)
        try:
            states = inflate.decompress(base64.b64decode(content["states"], validate=True), size)
        except zlib.error as error:
            raise ValueError(f"states: {error}") from error
        if len(states) != size or not inflate.eof:
            raise ValueError(f"states are not those of {stop - start} rows")
        return cls(content["partition"], start, stop, np.frombuffer(states, "<i8").reshape(2, -1).T)

    def entries(self, dataset_dir: Path) -> Iterator[PlanEntry]:
        """The rows one by one; `CorruptStoreError` where the partition cannot be read."""
        ids, places = partition_rows(dataset_dir, self.partition, self.start, self.stop)
        for id_, place, (size, mtime_ns) in zip(ids, places, self.states.tolist(), strict=True):
            yield PlanEntry(id_, size, mtime_ns, None, place)


@dataclass(frozen=True)
class RowIndex:
    """What a shard says of its rows apart from the features."""

    ids: tuple[str, ...]  # unique within the shard
    valid: np.ndarray  # (n,); false where the image could not be read
    digests: Digests  # sha256 of each image's bytes, ``""`` where unknown
    reasons: tuple[str, ...]  # why a row is not valid; ``""`` where it is


@dataclass(frozen=True)
class ShardRows:
    """The computed rows of one shard; features of rows that are not valid become zeros."""

    ids: tuple[str, ...]  # unique, UTF-8, without NUL
    features: np.ndarray  # (n, *row_shape); any numeric or boolean dtype of numpy
    valid: np.ndarray  # (n,); false where the image could not be read
    digests: tuple[str, ...]  # sha256 of each image's bytes, 64 hex digits, ``""`` where unknown
    reasons: tuple[str, ...]  # why a row is not valid

    def __post_init__(self) -> None:
        n, problem = len(self.ids), ""
        if self.valid.shape != (n,) or self.valid.dtype != np.bool_:
            problem = f"valid is {_shape(self.valid)}, not bool ({n},)"
        elif self.features.shape[:1] != (n,) or self.features.dtype.kind not in NUMERIC_KINDS:
            problem = f"features are {_shape(self.features)}, not numbers ({n}, …)"
        elif len(self.digests) != n or len(self.reasons) != n:
            problem = f"{len(self.digests)} digests, {len(self.reasons)} reasons"
        elif wrong := [i for i in range(n) if bool(self.valid[i]) == bool(self.reasons[i])]:
            problem = f"{self.ids[wrong[0]]!r}: valid is {self.valid[wrong[0]]}, reason {self.reasons[wrong[0]]!r}"
        if problem:
            raise StoreError(
                "the rows of a shard contradict each other", code="shard-rows",
                expected="one value per id in every column, and a reason exactly where a row is not valid",
                found=problem,
            )  # fmt: skip
        check_ids(self.ids)
        for digest in filter(None, self.digests):
            _check_digest(digest)
        storable = (text.encode("utf-8", "backslashreplace").decode("utf-8") for text in self.reasons)
        object.__setattr__(self, "reasons", tuple(text.replace("\0", "\\x00") for text in storable))

    def blanked(self) -> ShardRows:
        """The rows with zeros for features that are not valid: those depend on the neighbors in a batch."""
        if not self.features[~self.valid].any():
            return self  # nothing to blank: a shard of pixels is not copied for it
        features = self.features.copy()
        features[~self.valid] = 0
        return replace(self, features=features)


def check_id(id_: str) -> None:
    """Raise a StoreError unless ``id_`` is a non-empty string of UTF-8 without NUL."""
    fits = isinstance(id_, str) and id_ != "" and "\0" not in id_
    if fits and not id_.isascii():  # few: a plan of a million images asks for each
        fits = id_.encode("utf-8", "replace").decode("utf-8") == id_
    if not fits:
        raise StoreError(
            "an id cannot be stored", code="id-not-storable", expected="UTF-8, not empty, without NUL",
            found=repr(id_)[:400],
        )  # fmt: skip


def check_ids(ids: Sequence[str]) -> None:
    """Raise a StoreError unless every id can be stored and there is at least one, and none twice."""
    if not ids:
        raise StoreError("a shard has no rows", code="shard-empty", expected="at least one id")
    seen: set[str] = set()
    for id_ in ids:
        check_id(id_)
        if id_ in seen:
            raise StoreError(
                "an id occurs twice in one shard", code="id-repeated", found=repr(id_),
                fix="make the dataset's ids unique",
            )  # fmt: skip
        seen.add(id_)


def _check_digest(digest: str) -> None:
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise StoreError("a digest is not a sha256", code="digest", expected="64 hex digits", found=repr(digest)[:100])


def digests_to_bytes(digests: Sequence[str]) -> np.ndarray:
    """Hex digests as ``uint8 (n, 32)``; a row of zeros where unknown."""
    raw = b"".join(bytes.fromhex(digest) if digest else bytes(32) for digest in digests)
    return np.frombuffer(raw, np.uint8).reshape(len(digests), 32)


class Digests(Sequence[str]):
    """The inverse of `digests_to_bytes`: hex digits are made when a digest is looked at, for there may be millions."""

    def __init__(self, raw: np.ndarray) -> None:
        if raw.dtype != np.uint8 or raw.shape[1:] != (32,):
            raise ValueError(f"digests are {_shape(raw)}, not uint8 (n, 32)")
        self.raw = raw

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, row: Any) -> Any:
        return Digests(self.raw[row]) if isinstance(row, slice) else self.raw[row].tobytes().hex().replace("0" * 64, "")


def _shape(array: np.ndarray) -> str:
    return f"{array.dtype} {array.shape}"


class StoreFormat(Protocol):
    """Rows ⇄ bytes: what `embcache.store.zarr_format` and `embcache.store.hdf5_format` have in common.

    Neither touches the disk. Files of a shard are ``{path inside the shard's folder: verified bytes}``, read when they
    are looked up.
    """

    name: str  # the value of --format
    view: str  # file or folder over all shards, for plain readers
    index_files: Sequence[str]  # that `decode_index` looks up, and more: what is brought from an object store at once

    def encode_shard(self, rows: ShardRows, rows_per_shard: int) -> dict[str, bytes]:
        """Files of a shard; equal rows give equal bytes."""

    def decode_index(self, files: Mapping[str, bytes]) -> RowIndex:
        """Rows without their features; any exception means damage."""

    def decode_features(self, files: Mapping[str, bytes]) -> np.ndarray:
        """Features ``(n, *row_shape)``, over the bytes given and not to be written to."""

    def encode_view(
        self, header: StoreHeader, ids: Sequence[str], valid: np.ndarray, shard_rows: Mapping[int, int],
        attributes: Mapping[str, Any],
    ) -> tuple[dict[str, bytes], dict[str, str]]:  # fmt: skip
        """Files, and links with their targets, of the view over all shards; paths are relative to the store.

        Row ``N * rows_per_shard + i`` is row ``i`` of shard ``N``; where there is none its id is ``""``.
        """


def find_format(name: str) -> StoreFormat:
    """A format by its name, imported when it is first used: reading Zarr needs no HDF5."""
    return cast(StoreFormat, import_module(f"embcache.store.{name}_format"))
