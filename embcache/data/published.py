"""Datasets by name: registered layouts, where a dataset lies and what it is called, and the snapshots of cached ones.

Listing names needs no more than this module, which imports no pandas.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embcache.config import DatasetRef
from embcache.data.files import TABLE_SUFFIXES, find_level
from embcache.errors import DatasetError, DatasetNotFoundError, UsageError, first_few
from embcache.io import read_regular
from embcache.partitions import is_partition
from embcache.paths import PathLike, data_dir, home_dir, home_folders, slug
from embcache.places import refuse_url
from embcache.registry import Registry
from embcache.sealed import open_parquet, parse, read_sealed, typed

if TYPE_CHECKING:
    import pyarrow as pa

    from embcache.data.dataset import ImageDataset

DATASETS: Registry[Any] = Registry(
    "dataset",
    {
        name: f"embcache.data.datasets.{place}"
        for name, place in {
            "aptos": "aptos:LAYOUT", "chexpert": "chexpert:LAYOUT", "eyepacs": "aptos:EYEPACS_LAYOUT",
            "folder": "folder:LAYOUT", "mimic-cxr": "chexpert:MIMIC_LAYOUT", "nih": "nih:LAYOUT",
            "nih-findings": "nih:EXPERT_LAYOUT", "nih14": "nih:MINED_LAYOUT", "patchcam": "patchcam:LAYOUT",
            "pneumonia": "pneumonia:LAYOUT", "sample": "sample:LAYOUT",
        }.items()
    },
)  # fmt: skip
"""Layouts by name: a `DatasetLayout`, or a function ``read(root, name) -> ImageDataset``."""

FORM = 2
"""Of the file of a snapshot: columns of the table, keys of its JSON."""

ROLES = ("path", "label", "group", "split", "id")
"""Of a table's columns; `DatasetRef` names the column of each."""

_META, _CHECK = b"embcache", b"embcache-check"


def named_columns(ref: DatasetRef) -> dict[str, str]:
    """The column of each role for which the user names one."""
    return {role: name for role in ROLES if (name := vars(ref)[f"{role}_column"])}


@dataclass(frozen=True)
class DatasetLayout:
    """A layout of files that can be loaded by name: one row of `DATASETS`.

    Attributes
    ----------
    name : str
        Under which it is registered.
    read : callable (root, name) -> ImageDataset
        Lists every row that the labels name, whether or not its image is there; raises `DatasetNotFoundError` (see
        `layout_error`) where the layout is not recognized.
    description : str
    expected : str
        The layout, one path per line, shown when it is not there.
    download : str, optional
        The kagglehub call that gets it.
    merge_identical : bool
        Whether byte-identical files are grouped together at loading.
    draw : callable (root) -> None, optional
        Makes the data where there is none.
    own_columns : bool
        Whether the table is the user's own: ``read`` then takes the `DatasetRef` as a third argument.
    uncertain : bool
        Whether findings may be uncertain or not mentioned: ``read`` then takes the `DatasetRef`, too, whose
        ``uncertain`` and ``unmentioned`` say what these are, and keeps both in the ``ref`` of the dataset.
    """

    name: str
    read: Callable[..., ImageDataset]
    description: str = ""
    expected: str = ""
    download: str | None = None
    merge_identical: bool = True
    draw: Callable[[Path], None] | None = None
    own_columns: bool = False
    uncertain: bool = False

    def load(self, root: Path, name: str, ref: DatasetRef) -> ImageDataset:
        """Every row that the labels name, and where they are from; `UsageError` for columns of a published layout."""
        columns = named_columns(ref)
        if columns and not self.own_columns:
            raise UsageError(
                f"{self.name} is published with columns of its own", code="columns-published",
                found=" ".join(f"--{role}-column" for role in columns),
                fix="leave these options out, or load its table as a dataset of your own: --dataset folder",
            )  # fmt: skip
        takes_ref = self.own_columns or self.uncertain
        dataset = self.read(root, name, ref) if takes_ref else self.read(root, name)
        return replace(dataset, layout=self.name, origin=root)

    def level(self, root: Path, matches: Callable[[Path], bool], problem: str | None = None) -> Path:
        """`find_level`; the `layout_error` where there is none."""
        found = find_level(root, matches)
        if found is None:
            raise self.layout_error(root, problem)
        return found

    def layout_error(self, root: Path, problem: str | None = None) -> DatasetNotFoundError:
        """The error for a root that is missing or laid out otherwise."""
        entries = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
        found = first_few(entries) or "an empty folder" if root.is_dir() else "a file" if root.exists() else "nothing"
        fix = f"put it in {default_root(self.name)}, or name its folder with --data-root"
        if self.draw is not None:
            fix = "name a folder that is not there yet with --data-root: the images are drawn at first use"
            if not root.exists():
                fix = f"embcache demo, or embcache extract --backbone random --dataset {self.name}"
        elif self.own_columns:
            fix = "name the folder, or a table, with --data-root"
        if self.download:
            fix = f'python -c "import kagglehub; print(kagglehub.{self.download})"\n{fix}'
        return DatasetNotFoundError(
            problem or f"the images of {self.name!r} are not there, or laid out otherwise", code="dataset-layout",
            expected=self.expected or f"the layout that {self.name} reads", found=found, where=root, fix=fix,
        )  # fmt: skip


def find_layout(name: str, home: PathLike | None = None) -> DatasetLayout:
    """The layout called ``name``, or imported from ``module:name``; the error lists all, and near cached datasets."""
    if name not in DATASETS and ":" not in name:
        cached = cached_names(home)
        near = near_names(name, [*DATASETS, *cached])
        raise DatasetNotFoundError(
            f"there is no dataset {name!r}", code="unknown-dataset",
            expected=f"one of {', '.join(DATASETS)}" + (f", or one of {len(cached):,} that are cached" * bool(cached)),
            found=f"near to it: {', '.join(near)}" if near else None, fix="embcache datasets",
        )  # fmt: skip
    found = DATASETS.get(name)
    if isinstance(found, DatasetLayout):
        return replace(found, name=name)
    if not callable(found):
        raise UsageError(
            f"{name} is not a dataset", code="not-a-dataset", expected="a function read(root, name) -> ImageDataset",
            found=type(found).__name__,
        )  # fmt: skip
    return DatasetLayout(name, found, (found.__doc__ or "").split("\n")[0].rstrip("."))


@contextmanager
def unreadable_as_error() -> Iterator[None]:
    """Turn the system's refusal to read a file or folder into a message."""
    try:
        yield
    except PermissionError as error:
        raise DatasetError(
            "a dataset may not be read", code="dataset-unreadable", found=str(error.strerror), where=error.filename,
            fix=f"chmod -R u+rX '{error.filename}'",
        ) from error  # fmt: skip


def default_root(name: str, home: PathLike | None = None) -> Path:
    """Folder of a dataset for which none is named."""
    same = {"nih-findings": "nih"}  # images and label files
    return home_dir(home) / "sample-images" if name == "sample" else data_dir() / same.get(name, name)


def resolve_root(layout: DatasetLayout, root: PathLike | None, home: PathLike | None, *, draw: bool = True) -> Path:
    """The absolute folder to load from; where there is none and ``draw`` allows it, drawn first."""
    if root is None and layout.own_columns:
        raise UsageError(
            "a folder dataset needs its folder", code="root-missing",
            fix="add --data-root FOLDER (or a CSV or Parquet file)",
        )  # fmt: skip
    if root is not None:
        refuse_url(root, "a folder or a table on a disk; its column of paths may have addresses of images")
    folder = (Path(root).expanduser() if root is not None else default_root(layout.name, home)).resolve()
    if draw and layout.draw is not None and not folder.exists():
        layout.draw(folder)
    if not folder.exists():
        raise layout.layout_error(folder)
    return folder


def choose_name(layout: str, root: Path, wanted: str | None) -> str:
    """The dataset's name: ``wanted``; else the layout's; for a folder its own name and a hash of its path."""
    if wanted is None:
        if layout != "folder":
            return layout
        own = root.stem if root.suffix.lower() in TABLE_SUFFIXES else root.name
        return f"{own or 'root'}-{hashlib.sha256(bytes(root)).hexdigest()[:8]}"
    if wanted != layout and wanted in DATASETS:
        raise UsageError(
            "the name belongs to another dataset", code="name-taken", found=wanted, where="--name",
            fix="choose another name",
        )  # fmt: skip
    if not wanted.strip() or not wanted.isprintable() or "," in wanted or len(wanted) > 200:
        raise UsageError(
            "not a dataset's name", code="dataset-name", expected="1 to 200 printable characters, no comma",
            found=ascii(wanted), where="--name",
        )  # fmt: skip
    return wanted


# Snapshots: the tables that extraction keeps beside the stores


def snapshot_path(name: str, home: PathLike | None = None) -> Path:
    """The snapshot that extraction keeps beside the stores of dataset ``name``."""
    return home_dir(home) / slug(name) / "dataset.parquet"


@dataclass(frozen=True)
class KeptTable:
    """Of what table the partitions of a dataset were made, and how; in ``partitions.json`` beside them."""

    ref: DatasetRef
    places: str
    rows: int
    partitions: tuple[str, ...]  # digests


def kept_table_path(name: str, home: PathLike | None = None) -> Path:
    """The file that keeps it of dataset ``name``."""
    return home_dir(home) / slug(name) / "partitions.json"


def kept_table(name: str, home: PathLike | None = None) -> KeptTable | None:
    """What is kept of the partitions of dataset ``name``; None for a dataset without."""
    path = kept_table_path(name, home)
    try:
        known = read_sealed(path, "embcache extract --data-root TABLE")
        partitions = typed(tuple[str, ...], known["partitions"], "partitions")
        if not all(map(is_partition, partitions)):
            raise ValueError("partitions: other names than theirs")
        ref, places = DatasetRef.from_json(known["ref"]), typed(str, known["places"], "places")
        return KeptTable(ref, places, typed(int, known["rows"], "rows"), partitions)
    except FileNotFoundError:
        return None
    except (KeyError, ValueError, OSError, UsageError) as error:
        raise damaged("what is kept of a dataset in partitions cannot be read", path, str(error)) from error


def damaged(problem: str, path: Path | None, found: str, code: str = "snapshot-damaged") -> DatasetError:
    """The error for a snapshot that cannot be used."""
    fix = "extract again and name the images: embcache extract --data-root FOLDER …"
    return DatasetError(problem, code=code, found=found, where=path, fix=fix)


def encode_snapshot(table: pa.Table, meta: dict[str, Any]) -> bytes:
    """A table and what belongs to it as a Parquet file in which a flipped byte does not go unnoticed.

    Parquet's own checksums cover the values; the footer holds one over everything else that is read.
    """
    import pyarrow.parquet as pq

    text = json.dumps({**meta, "form": FORM}, sort_keys=True)
    described = table.replace_schema_metadata({_META: text, _CHECK: _check(text, table.schema, table.num_rows)})
    sink = io.BytesIO()
    pq.write_table(described, sink, write_page_checksum=True)
    return sink.getvalue()


def decode_snapshot(data: bytes, columns: list[str] | None = None) -> tuple[pa.Table, dict[str, Any]]:
    """The inverse of `encode_snapshot`, with only some of the columns where they are named."""
    file, table = open_parquet(data, columns)
    described = file.schema_arrow.metadata or {}
    text = described[_META].decode("utf-8")
    meta = typed(dict[str, Any], parse(text.encode()), "snapshot")
    if (form := meta.pop("form", 1)) != FORM:
        raise damaged("the snapshot of a dataset is of another version", None, f"form {form!r:.20}", "snapshot-form")
    if described[_CHECK].decode("ascii") != _check(text, file.schema_arrow, file.metadata.num_rows):
        raise ValueError("its checksum is another")
    return table.replace_schema_metadata(None), meta


def _check(text: str, schema: pa.Schema, rows: int) -> str:
    """Sha256 of everything in a snapshot except its values: number of rows, columns, and its own JSON."""
    columns = [[field.name, str(field.type)] for field in schema]
    return hashlib.sha256(json.dumps([rows, columns, text]).encode()).hexdigest()


def snapshot_ids(name: str, home: PathLike | None = None) -> tuple[str, list[str]] | None:
    """The dataset's own name and the ids of its images, as extraction kept them; None where there is no snapshot."""
    import pyarrow as pa

    path = snapshot_path(name, home)
    try:
        table, meta = decode_snapshot(read_regular(path), ["id"])
        return typed(str, meta["name"], "name"), typed(list[str], table["id"].to_pylist(), "id")
    except FileNotFoundError:
        return None
    except (pa.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
        raise damaged("the snapshot of a dataset is damaged", path, str(error).split("\n")[0]) from error


def cached_names(home: PathLike | None = None) -> list[str]:
    """Names of the datasets that have a snapshot under ``home``, sorted; damaged ones are passed over."""
    names = []
    for folder in home_folders(home_dir(home)):
        try:
            found = snapshot_ids(folder.name, home)
        except DatasetError:
            continue
        names += [found[0]] if found is not None else []
    return sorted(names)


def near_names(name: str, names: Iterable[str]) -> list[str]:
    """Those of the names for which ``name`` may be a slip, or the beginning; the nearest first."""
    known = list(names)
    near = difflib.get_close_matches(name, known, n=5)
    return near + [other for other in known if other.startswith(f"{name}-") and other not in near]
