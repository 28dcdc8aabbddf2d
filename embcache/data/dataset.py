"""`ImageDataset`: a labelled image collection as one table; `load_dataset` and `find_dataset`, which make it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from embcache.config import DatasetRef
from embcache.data.checks import check_table
from embcache.data.chosen import Columns
from embcache.data.classes import new_names, renamed
from embcache.data.files import locate_files
from embcache.data.groups import (
    LOOKED_AT_LOADING,
    UNGROUPED,
    duplicate_notes,
    identical_files,
    may_be_dicom,
    merge_groups,
    overlap_notes,
    patient_keys,
)
from embcache.data.nearby import near_misses
from embcache.data.published import (
    DATASETS,
    DatasetSource,
    choose_name,
    default_root,
    find_source,
    refusals_told,
    resolve_root,
)
from embcache.data.roles import unfit_groups
from embcache.data.snapshot import decode_snapshot, encode_snapshot
from embcache.errors import DatasetError, DatasetNotFoundError, first_few, printable
from embcache.io import read_regular
from embcache.notebook import html_table
from embcache.paths import PathLike, home_dir, slug
from embcache.typed import typed_fields

__all__ = ["DATASETS", "ImageDataset", "find_dataset", "load_dataset"]

DEFERRED = (
    "byte-identical images are not looked for at loading: there are too many; those decoded are grouped by digest"
)
DEFAULT_SIZES: Mapping[str, int] = {"S": 50, "M": 500}


@dataclass(frozen=True, eq=False, repr=False)
class ImageDataset:
    """Labelled images as one table, a row an image.

    Attributes
    ----------
    name : str
        Names the folder of the dataset's stores and runs.
    root : Path or None
        Folder that the paths are relative to (None for a table without files).
    class_names : tuple of str
        Class ``c`` of ``table.label`` is ``class_names[c]``.
    metric : {"auc", "macro_auc", "kappa"}
    augment : {"patch", "fundus", "chest", "generic"}
        The augmentation that finetuning uses.
    table : DataFrame
        ``id`` (str, unique), ``path`` (str, relative to root, posix), ``member`` (int64, the row inside an array
        file, else -1), ``label`` (int64, -1 unlabelled), ``group`` (str), ``split`` ("train", "val" or "test"),
        and the source's own columns. Its order is the same on every machine.
    kind : str
        Name of the loader; differs from ``name`` for folders.
    subset_sizes : mapping of str to int
        Training images of the named subsets S and M; F, all of them, is never in it.
    pool_limit : int or None
        The pool is cut to so many images drawn at random.
    leaderboard_alpha : float or None
        Weight of the private score in the competition's average.
    grouped : bool
        False where groups are unknown and results must say so.
    synthetic : bool
        The images are drawn, not taken.
    notes : tuple of str
        What a user must see beside any result.
    missing : tuple of str
        Paths that the labels name and that are not there.
    origin : Path or None
        What it was loaded from: the folder that was named, or the label table.
    columns : Columns
        How its table was read: the columns that the user named, and classes that differ only in letter case.
    target : str
        The column that the labels are (`embcache.data.columns.retarget`); empty for the dataset's own labels.
    renamed : mapping of str to str
        Name of each class that was dropped (empty) or merged by `with_classes`, before and after.
    whole : ImageDataset or None
        The dataset as it was loaded, where target or classes are others: what a snapshot keeps.

    Raises
    ------
    DatasetError
        The table breaks the contract above.
    """

    name: str
    root: Path | None
    class_names: tuple[str, ...]
    metric: str
    augment: str
    table: pd.DataFrame
    kind: str = "folder"
    subset_sizes: Mapping[str, int] = field(default_factory=lambda: dict(DEFAULT_SIZES))
    pool_limit: int | None = None
    leaderboard_alpha: float | None = None
    grouped: bool = True
    synthetic: bool = False
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    origin: Path | None = None
    columns: Columns = field(default_factory=Columns)
    target: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    whole: ImageDataset | None = None

    def __post_init__(self) -> None:
        check_table(self.table, self.class_names, where=self.root or self.name)
        object.__setattr__(self, "table", self.table.reset_index(drop=True))

    @property
    def ids(self) -> npt.NDArray[np.object_]:
        """Ids as an object array of str, shape (n,)."""
        return np.array(self.table["id"].tolist(), dtype=object)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Labels, shape (n,), int64; -1 where unlabelled."""
        return self.table["label"].to_numpy(dtype=np.int64)

    @property
    def groups(self) -> npt.NDArray[np.object_]:
        """Groups as an object array of str, shape (n,)."""
        return np.array(self.table["group"].tolist(), dtype=object)

    def select(self, split: str) -> ImageDataset:
        """The dataset with the rows of one split only."""
        return replace(self, table=self.table[self.table["split"] == split])

    def with_classes(self, drop: Iterable[str] = (), merge: Mapping[str, Iterable[str]] | None = None) -> ImageDataset:
        """The dataset without some classes and their images, and with others merged.

        Name, groups and splits stay, so cached features serve as they are. A merged class stands where the first of
        its members stood. Notes count the images; of two classes that are left the metric is the AUC, where it was the
        macro AUC, and there is no leaderboard.

        Parameters
        ----------
        drop : iterable of str
            Classes to leave out.
        merge : mapping of str to iterable of str
            The new name, and the two or more classes that it takes the place of: ``{"ill": ["mild", "severe"]}``.

        Raises
        ------
        UsageError
            There is no such class, one is named twice, a new name is that of another class, or fewer than two classes
            would be left.
        """
        return renamed(self, new_names(self, drop, merge or {}))

    def file_path(self, row: int) -> Path:
        """Path of the file that holds image ``row``."""
        if self.root is None:
            raise DatasetError("this dataset has no folder", where=self.name, fix="load it with a root")
        return self.root / str(self.table["path"].iloc[row])

    def __len__(self) -> int:
        return len(self.table)

    def _facts(self) -> list[tuple[str, str]]:
        """What a person wants to know of it, as (name, value); one pass over the labels, no file is looked at."""
        facts = []
        for split in ("train", "val", "test"):
            labels = self.table.loc[self.table["split"] == split, "label"].to_numpy(dtype=np.int64)
            if len(labels):
                known = np.bincount(labels[labels >= 0], minlength=len(self.class_names))
                counts = [f"{n:,} {name}" for n, name in zip(known.tolist(), self.class_names, strict=True)]
                lacking = int((labels < 0).sum())
                unlabelled = f"{lacking:,} unlabelled" if lacking else ""
                parts = [part for part in (first_few(counts, 12), unlabelled) if part] if known.any() else [unlabelled]
                facts.append((split, f"{len(labels):,} ({', '.join(parts)})"))
        groups = f"{self.table['group'].nunique():,}" + ("" if self.grouped else ", as far as they are known")
        facts += [("groups", groups), ("metric", self.metric)]
        facts += [("synthetic", "drawn, not taken")] if self.synthetic else []
        facts += [("missing", f"{len(self.missing):,} images that the labels name")] if self.missing else []
        facts += [("notes", f"{len(self.notes):,}, in .notes")] if self.notes else []
        return [*facts, ("root", str(self.root))]

    def _headline(self) -> str:
        classes = len(self.class_names)
        return f"{self.name!r}: {len(self):,} images, {classes:,} class{'' if classes == 1 else 'es'}"

    def __repr__(self) -> str:
        lines = [f"  {name}: {value}" for name, value in self._facts()]
        return printable("\n".join([f"ImageDataset({self._headline()}", *lines]) + ")")

    def _repr_html_(self) -> str:
        return html_table(f"ImageDataset {self._headline()}", [*self._facts(), *(("note", n) for n in self.notes)])

    def to_parquet_bytes(self) -> bytes:
        """The dataset as a Parquet file, everything but the table as JSON in the schema's metadata.

        ``target``, ``renamed`` and ``whole``, which tell one dataset from another, are not in it.
        """
        left_out = ("table", "target", "renamed", "whole")
        meta = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        meta |= {"subset_sizes": dict(self.subset_sizes), "columns": asdict(self.columns)}
        meta |= {key: None if meta[key] is None else str(meta[key]) for key in ("root", "origin")}
        try:
            table = pa.Table.from_pandas(self.table, preserve_index=False)
        except pa.ArrowException as error:
            raise DatasetError("a column holds values of several types", found=str(error), where=self.name) from error
        return encode_snapshot(table, meta)

    @classmethod
    def from_parquet_bytes(cls, data: bytes) -> ImageDataset:
        """The inverse of `to_parquet_bytes`.

        Raises
        ------
        DatasetError
            The bytes are not such a file.
        """
        try:
            table, meta = decode_snapshot(data)
            return cls(table=table.to_pandas(), **typed_fields(cls, meta))
        except (pa.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
            raise DatasetError("not a dataset snapshot", found=str(error).split("\n")[0]) from error


def load_dataset(
    name: str,
    root: PathLike | None = None,
    *,
    allow_missing: bool = False,
    dataset_name: str | None = None,
    home: PathLike | None = None,
    columns: Columns | Mapping[str, Any] | None = None,
) -> ImageDataset:
    """Load a dataset from its published layout, or any folder or table of labelled images.

    Parameters
    ----------
    name : str
        A key of `DATASETS`; ``"folder"`` for one's own images; or the name of a cached dataset, which is loaded from
        where it was extracted from or, where that is gone, from the snapshot that extraction kept.
    root : path, optional
        The dataset's own folder, at any level of its archive (or, for ``"folder"``, a CSV, Parquet or Excel file).
        Default: ``$EMBCACHE_DATA/<name>``; for the sample ``<home>/sample-images``, drawn there when absent.
    allow_missing : bool
        Go on without the images that are named and not there; they are listed in ``missing``.
    dataset_name : str, optional
        Names the dataset (and so its stores) instead of the default.
    home : path, optional
        Folder of stores and runs; the sample lies in it.
    columns : Columns or mapping, optional
        Of the table of a ``"folder"``, the columns of path, label, group, split or id:
        ``{"group": "Patient ID"}``; ``{"merge_class": ["Normal+normal=normal"]}`` for classes that differ only in
        letter case. Default: by their names, which the notes tell.

    Raises
    ------
    DatasetNotFoundError
        There is no such dataset, or its root is missing or laid out otherwise.
    DatasetError
        Images are missing, ids repeat, a label is unknown, a path leaves the root, a file may not be read, there is
        one class only, or several columns could be meant.
    UsageError
        A column is not there, or the layout is published and has its own.
    """
    if name not in DATASETS:
        return find_dataset(
            name,
            root=root,
            home=home,
            allow_missing=allow_missing,
            dataset_name=dataset_name,
            columns=Columns.of(columns),
        )[0]
    source = find_source(name)
    with refusals_told():
        folder = resolve_root(source, root, home)
        ds = source.load(folder, choose_name(source, folder, dataset_name), Columns.of(columns))
        return settle(ds, source, allow_missing=allow_missing)


def find_dataset(
    name: str,
    ref: DatasetRef | None = None,
    *,
    root: PathLike | None = None,
    home: PathLike | None = None,
    allow_missing: bool = False,
    dataset_name: str | None = None,
    columns: Columns = Columns(),
) -> tuple[ImageDataset, str]:
    """The dataset from its files where they are there, else from the snapshot that extraction kept.

    Parameters
    ----------
    name : str
        As for `load_dataset`, or the name of a cached dataset (``mammo-1a2b3c4d``, or one set by ``--name``).
    root, home, allow_missing, dataset_name, columns
        As for `load_dataset`. Without ``root`` the folder that the snapshot was made from comes before the
        default one: the features are of its images. Columns that are not named are those of the snapshot, where the
        root is what it was made from.

    Returns
    -------
    (ImageDataset, {"live", "snapshot"})
    """
    if ref is not None:
        root, allow_missing, dataset_name = ref.data_root, ref.allow_missing, ref.name
        columns = Columns.of_ref(ref)
    try:
        cached = read_snapshot(_cached_name(name, root, dataset_name), home)
    except DatasetError:
        if name not in DATASETS:  # known by nothing but its snapshot
            raise
        cached = None  # the files themselves will do, and extraction writes the snapshot anew
    if cached is None:
        find_source(name, home)
    if cached is None or (name in DATASETS and name != cached.kind):
        load = functools.partial(load_dataset, allow_missing=allow_missing, home=home, columns=columns)
        return load(name, root, dataset_name=dataset_name), "live"
    # Who extracted without the missing images has agreed to go on without them.
    allow_missing = allow_missing or bool(cached.missing)
    columns, told = columns_of(cached, root, columns)
    load = functools.partial(load_dataset, cached.kind, allow_missing=allow_missing, home=home, columns=columns)
    if root is not None:
        if Path(root).expanduser().exists() or Path(root).expanduser().resolve() != cached.origin:
            ds = load(root, dataset_name=dataset_name or cached.name)
            return replace(ds, notes=(*ds.notes, *told)), "live"
        return _as_kept(cached, columns), "snapshot"
    for folder in (cached.origin, None if cached.kind == "folder" else default_root(cached.kind, home)):
        if folder is not None and folder.exists():
            try:
                return load(folder, dataset_name=cached.name), "live"
            except DatasetNotFoundError:  # the folder has been emptied, or is another thing of that name
                continue
    return _as_kept(cached, columns), "snapshot"


def columns_of(cached: ImageDataset, root: PathLike | None, columns: Columns) -> tuple[Columns, list[str]]:
    """``columns`` over those of a snapshot, where it is of this root; and a note where another root leaves them out."""
    if root is None or cached.origin == Path(root).expanduser().resolve():
        return columns.over(cached.columns), []
    words = " ".join(cached.columns.words())
    return columns, [f"{words}, as {cached.name} was read from {cached.origin}, does not count here"] if words else []


def _as_kept(cached: ImageDataset, columns: Columns) -> ImageDataset:
    """The snapshot, if it was read with the columns that are named."""
    if columns.named() != cached.columns.named():
        raise DatasetNotFoundError(
            "the images' folder is not there, and the snapshot was read with other columns",
            expected=", ".join(f"{role}: {name}" for role, name in columns.named().items()),
            found=", ".join(f"{role}: {name}" for role, name in cached.columns.named().items())
            or "columns by their names",
            where=cached.origin,
            fix=("--data-root FOLDER", "leave --group-column and the like out"),
        )
    return cached


def read_snapshot(name: str, home: PathLike | None = None) -> ImageDataset | None:
    """The table that extraction kept beside the stores of dataset ``name``, if any."""
    path = home_dir(home) / slug(name) / "dataset.parquet"
    try:
        return ImageDataset.from_parquet_bytes(read_regular(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DatasetError(
            "the snapshot of a dataset cannot be read", found=error.strerror or str(error), where=path
        ) from error
    except DatasetError as error:
        raise DatasetError(
            "the snapshot of a dataset is damaged",
            found=error.found,
            where=path,
            fix="extract again, naming the images: embcache extract --data-root FOLDER …",
        ) from error


def _cached_name(name: str, root: PathLike | None, dataset_name: str | None) -> str:
    if dataset_name is not None or name not in DATASETS or root is None:
        return dataset_name or name
    return choose_name(DATASETS[name], Path(root).expanduser().resolve(), None)


def settle(ds: ImageDataset, source: DatasetSource, *, allow_missing: bool) -> ImageDataset:
    """Compare a table with the files: drop or refuse missing images, group identical ones, note what matters."""
    if ds.root is None:
        return ds
    # A look at every file is spared where identical ones are not looked for.
    looked = source.merge_identical and len(ds) <= LOOKED_AT_LOADING
    sizes = locate_files(ds.root, ds.table["path"].tolist(), sizes=looked)
    missing = tuple(path for path, size in sizes.items() if size is None)
    if missing and (not allow_missing or len(missing) == len(sizes)):
        get = f"get the images: kagglehub.{source.download}" if source.download else "put the images there"
        near, advice = near_misses(ds.root, missing)
        get = advice or get
        raise DatasetError(
            f"{len(missing):,} of {len(sizes):,} images that the labels name are not there",
            expected="a file for every row",
            found=f"no {first_few(missing)}" + (f"\n{near}" if near else ""),
            where=ds.root,
            fix=get if len(missing) == len(sizes) else (get, "--allow-missing (in Python allow_missing=True)"),
        )
    if missing:
        note = f"{len(missing):,} of {len(sizes):,} images are missing and left out (first: {first_few(missing, 3)})"
        ds = replace(ds, table=ds.table[~ds.table["path"].isin(missing)], missing=missing, notes=(*ds.notes, note))
    return join_groups(ds, source, sizes)


def join_groups(ds: ImageDataset, source: DatasetSource, sizes: Mapping[str, int | None]) -> ImageDataset:
    """Join what belongs together by the files themselves: images of one DICOM patient, and identical ones."""
    ds = group_patients(ds, sizes) if UNGROUPED in ds.notes else ds
    if source.merge_identical:
        return group_identical(ds, sizes)
    return replace(ds, notes=(*ds.notes, *overlap_notes(ds.table)))


def group_patients(ds: ImageDataset, sizes: Mapping[str, int | None]) -> ImageDataset:
    """Groups by the PatientID of DICOM files, where no column tells.

    Each group is called after the first of its images: a PatientID is kept nowhere.
    """
    paths = ds.table["path"].tolist()
    if ds.root is None or not may_be_dicom(paths):
        return ds
    if len(ds) > LOOKED_AT_LOADING:
        return replace(
            ds, notes=(*ds.notes, f"the PatientID of DICOM files is not looked at: there are {len(ds):,} images")
        )
    try:
        patients = patient_keys(ds.root, [path if sizes[path] is not None else "" for path in paths])
    except DatasetError as error:  # pydicom is not installed: the features may be there without it
        return replace(ds, notes=(*ds.notes, f"PatientID is not read: {error.problem}; {error.fix}"))
    if patients is None:
        return ds
    why = unfit_groups(patients, ds.labels.tolist())
    if why:
        return replace(ds, notes=(*ds.notes, f"the PatientID of the DICOM files is not taken for groups: {why}"))
    table = ds.table.assign(group=merge_groups(ds.table["id"].tolist(), patients))
    lacking = patients.count("")
    known = len(set(patients) - {""})
    note = f"groups are those of the PatientID in the DICOM files ({known:,} patients), named after an image of each"
    notes = [note if each == UNGROUPED else each for each in ds.notes]
    notes += [f"{lacking:,} of {len(ds):,} images have no PatientID: each is a group of its own"] if lacking else []
    return replace(ds, table=table, notes=tuple(notes))


def group_identical(ds: ImageDataset, sizes: Mapping[str, int | None]) -> ImageDataset:
    """Join the groups of byte-identical files, and note them and the groups shared with the test set.

    Parameters
    ----------
    ds : ImageDataset
        With a root.
    sizes : mapping of str to int or None
        Size of each path as `locate_files` gives it; rows whose file is not there join nothing.

    Notes
    -----
    Beyond `LOOKED_AT_LOADING` images no file is read, and a note says so: probing and finetuning join the groups of
    identical images by the digests that were taken while decoding, in datasets of any size.
    """
    if len(ds) > LOOKED_AT_LOADING:
        return replace(ds, notes=(*ds.notes, DEFERRED, *overlap_notes(ds.table)))
    digests = identical_files(ds.root, {path: size for path, size in sizes.items() if size}) if ds.root else {}
    keys = [digests.get(path, "") for path in ds.table["path"].tolist()]
    table = ds.table.assign(group=merge_groups(ds.table["group"].tolist(), keys))
    notes = duplicate_notes(table, keys, ds.class_names) + overlap_notes(table)
    return replace(ds, table=table, notes=(*ds.notes, *notes))
