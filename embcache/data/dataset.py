"""`ImageDataset`, a labeled image collection as one table; and `load_dataset` and `find_dataset`, which make it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from embcache.config import DatasetRef
from embcache.data.classes import new_names, rename_classes, with_ref
from embcache.data.files import check_paths, is_object, locate_files, near_misses
from embcache.data.groups import LOOKED_AT_LOADING, join_groups
from embcache.data.published import (
    DATASETS,
    DatasetLayout,
    choose_name,
    damaged,
    decode_snapshot,
    default_root,
    encode_snapshot,
    find_layout,
    kept_table,
    kept_table_path,
    named_columns,
    resolve_root,
    snapshot_path,
    unreadable_as_error,
)  # fmt: skip
from embcache.data.tables import COLUMNS, SPLITS, check_strings, check_unique
from embcache.errors import (
    DatasetError,
    DatasetNotFoundError,
    EmbcacheError,
    StoreError,
    UsageError,
    first_few,
    printable,
)
from embcache.io import read_regular
from embcache.notebook import html_table
from embcache.partitions import Partition
from embcache.paths import PathLike, home_dir, home_folders, skip
from embcache.sealed import plain, typed, typed_fields
from embcache.targets import Target, make_target

DEFAULT_SIZES: Mapping[str, int] = {"S": 50, "M": 500}


@dataclass(frozen=True)
class _Declared:
    """A target in a snapshot."""

    names: tuple[str, ...]
    column: str = "label"
    kind: str = "classes"
    columns: tuple[str, ...] = ()
    loss: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class ImageDataset:
    """Labeled images as one table with one row per image.

    Attributes
    ----------
    name : str
        Names the folder of the dataset's stores and runs.
    root : Path or None
        Folder that the paths are relative to (None for a table without files).
    class_names : tuple of str
        Class ``c`` of ``table.label`` is ``class_names[c]``. Of other kinds the names of findings, or of the number.
    metric : str
        As `embcache.probe.metrics.find_metric` takes it: ``auc``, ``macro_auc``, ``kappa`` or another registered name.
    augment : {"patch", "fundus", "chest", "generic"}
        The augmentation that finetuning uses.
    table : DataFrame
        ``id`` (str, unique), ``path`` (str, relative to root, posix), ``place`` (str, inside a container such as the
        row of an array, else empty), ``label`` (int64, -1 unlabeled), ``group`` (str), ``split`` ("train", "val" or
        "test"), and further columns of the dataset's own. Its order is the same on every machine. Of findings and
        numbers, ``label`` is 0 where any is known.
    layout : str
        Name of the layout; differs from ``name`` for folders.
    subset_sizes : mapping of str to int
        Training images of the named subsets S and M; F, all of them, is never in it.
    pool_limit : int or None
        Number of training images drawn at random before all else; None: all are used.
    leaderboard_alpha : float or None
        Weight of the private score in the competition's average.
    grouped, synthetic : bool
        Whether groups are known, and whether the images are drawn by a program; results state both.
    notes, missing : tuple of str
        What a user must see beside any result; paths that the labels name and that are not there.
    origin : Path or None
        The folder, or the label table, that it was loaded from.
    ref : DatasetRef
        How its table was read: the columns that the user named, and classes that differ only in letter case.
    target : str
        The column that the labels are (`embcache.data.classes.retarget`); empty for the dataset's own labels.
    renamed : mapping of str to str
        Name of each class that was dropped (empty) or merged by `with_classes`, before and after.
    whole : ImageDataset or None
        The dataset as it was loaded, where target or classes are others: what a snapshot keeps.
    kind : {"classes", "ordinal", "findings", "number"}
        What the target is, see `embcache.targets`.
    columns : tuple of str
        Columns of the table that hold findings (int64: 1 present, 0 absent, -1 unknown) or a number (float64, NaN
        unknown).
    loss : str
        That trained heads minimize; empty for the kind's first.
    part : Partition or None
        Of the rows of one partition: what they know of the whole (`embcache.data.partitioned`).

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
    layout: str = "folder"
    subset_sizes: Mapping[str, int] = field(default_factory=lambda: dict(DEFAULT_SIZES))
    pool_limit: int | None = None
    leaderboard_alpha: float | None = None
    grouped: bool = True
    synthetic: bool = False
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    origin: Path | None = None
    ref: DatasetRef = DatasetRef()
    target: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    whole: ImageDataset | None = None
    kind: str = "classes"
    columns: tuple[str, ...] = ()
    loss: str = ""
    part: Partition | None = None

    def __post_init__(self) -> None:
        if self.part is not None:  # its rows were checked when the partition was made
            return
        _check_table(self.table, self.class_names, where=self.root or self.name)
        _check_columns(self.table, self.task, where=self.root or self.name)
        object.__setattr__(self, "table", self.table.reset_index(drop=True))

    @property
    def task(self) -> Target:
        """What is predicted."""
        return make_target(self.kind, self.class_names, self.columns, self.loss)

    @property
    def targets(self) -> tuple[Target, ...]:
        """What is predicted, as a tuple of one."""
        return (self.task,)

    @property
    def ids(self) -> npt.NDArray[np.object_]:
        """Ids as an object array of str, shape (n,)."""
        return np.array(self.table["id"].tolist(), dtype=object)

    @property
    def labels(self) -> npt.NDArray[Any]:
        """Values of the target: int64 (n,), -1 unknown; findings int64 (n, L), -1; a number float64 (n,), NaN."""
        return self.task.values(self.table)

    @property
    def groups(self) -> npt.NDArray[np.object_]:
        """Groups as an object array of str, shape (n,)."""
        return np.array(self.table["group"].tolist(), dtype=object)

    def select(self, split: str) -> ImageDataset:
        """The dataset with the rows of one split only."""
        return replace(self, table=self.table[self.table["split"] == split])

    def with_notes(self, *notes: str) -> ImageDataset:
        """The dataset with further notes."""
        return replace(self, notes=(*self.notes, *notes)) if notes else self

    def with_classes(self, drop: Iterable[str] = (), merge: Mapping[str, Iterable[str]] | None = None) -> ImageDataset:
        """The dataset without some classes and their images, and with others merged.

        Name, groups and splits stay, so cached features can still be used. A merged class takes the place of the first
        of its members. Notes count the images; if two classes are left, the macro AUC becomes the AUC, and there is no
        leaderboard.

        ``merge`` has the new name, and the two or more classes that it takes the place of:
        ``{"ill": ["mild", "severe"]}``.

        Raises
        ------
        UsageError
            There is no such class, one is named twice, a new name is that of another class, or fewer than two classes
            would be left.
        """
        return rename_classes(self, new_names(self, drop, merge or {}))

    def file_path(self, row: int) -> Path:
        """Path of the file that holds image ``row``."""
        if self.root is None:
            raise DatasetError(
                "this dataset has no folder", code="root-missing", where=self.name, fix="load it with a root"
            )
        return self.root / str(self.table["path"].iloc[row])

    def read_options(self) -> list[str]:
        """The options that say on the command line how its table was read, as words of a shell."""
        return self.ref.words()

    @property
    def total(self) -> int:
        """Number of images; of the whole, if these are the rows of one partition."""
        return len(self) if self.part is None else self.part.total

    def __len__(self) -> int:
        return len(self.table)

    def _facts(self) -> list[tuple[str, str]]:
        facts = []
        for split in SPLITS:
            y = self.labels[(self.table["split"] == split).to_numpy()]
            known = self.task.known(y)
            counts = [f"{n:,} {name}" for n, name in zip(self.task.counts(y), self.class_names, strict=True)]
            parts = [first_few(counts, 12)] if known.any() else []
            parts += [f"{(~known).sum():,} unlabeled"] if not known.all() else []
            facts += [(split, f"{len(y):,} ({', '.join(parts)})")] if len(y) else []
        groups = f"{self.table['group'].nunique():,}" + ("" if self.grouped else ", as far as they are known")
        facts += [("groups", groups), ("metric", self.metric)]
        facts += [("synthetic", "drawn by a program")] if self.synthetic else []
        facts += [("missing", f"{len(self.missing):,} images that the labels name")] if self.missing else []
        facts += [("notes", f"{len(self.notes):,}, in .notes")] if self.notes else []
        return [*facts, ("root", str(self.root))]

    def _headline(self) -> str:
        count, task = len(self.class_names), self.task
        what = f"{count:,} {task.noun if count == 1 else task.nouns}"
        return f"{self.name!r}: {len(self):,} images, {what if self.kind != 'number' else self.class_names[0]}"

    def __repr__(self) -> str:
        lines = [f"  {name}: {value}" for name, value in self._facts()]
        return printable("\n".join([f"ImageDataset({self._headline()}", *lines]) + ")")

    def _repr_html_(self) -> str:
        return html_table(f"ImageDataset {self._headline()}", [*self._facts(), *(("note", n) for n in self.notes)])

    def to_parquet_bytes(self) -> bytes:
        """The dataset as a Parquet file, everything but the table as JSON in the schema's metadata.

        ``target``, ``renamed`` and ``whole``, which change after loading, are not in it.
        """
        left_out = ("table", "class_names", "target", "renamed", "whole", "kind", "columns", "loss", "part")
        meta = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        meta |= {key: None if meta[key] is None else str(meta[key]) for key in ("root", "origin")}
        meta |= {"subset_sizes": dict(self.subset_sizes), "ref": self.ref.to_json()}
        meta |= {"part": plain(self.part)} if self.part is not None else {}
        more = {"columns": self.columns, "loss": self.loss}
        named = {"kind": self.kind, "column": "label", "names": self.class_names}
        meta["targets"] = [named | {key: value for key, value in more.items() if value}]
        try:
            table = pa.Table.from_pandas(self.table, preserve_index=False)
        except pa.ArrowException as error:
            raise DatasetError(
                "a column holds values of several types", code="column-types", found=str(error), where=self.name
            ) from error
        return encode_snapshot(table, meta)

    @classmethod
    def from_parquet_bytes(cls, data: bytes) -> ImageDataset:
        """The inverse of `to_parquet_bytes`; `DatasetError` for any other bytes."""
        try:
            table, meta = decode_snapshot(data)
            (target,) = typed(list[_Declared], meta.pop("targets"), "targets")
            if target.column != "label":
                raise ValueError(f"a target in column {target.column!r:.40}")
            of = {"kind": target.kind, "columns": target.columns, "loss": target.loss}
            if ":" in str(meta["metric"]):  # it would be imported
                raise ValueError(f"a metric called {meta['metric']!r:.40}")
            found = cls(table=table.to_pandas(), class_names=target.names, **typed_fields(cls, meta), **of)
            if found.part is not None:  # by a file, whose rows nothing has checked
                _check_table(found.table, found.class_names, where=found.root or found.name)
            return found
        except (pa.ArrowException, KeyError, TypeError, ValueError, OSError, UsageError) as error:
            raise damaged("not a dataset snapshot", None, str(error).split("\n")[0]) from error


def _check_table(table: pd.DataFrame, class_names: Sequence[str], *, where: object) -> None:
    absent = [c for c in COLUMNS if c not in table.columns]
    if absent:
        raise DatasetError(
            "the table lacks columns", code="column-missing", expected=", ".join(COLUMNS),
            found=f"no {', '.join(absent)}", where=where,
        )  # fmt: skip
    ids, paths, _ = (check_strings(table[column].tolist(), column, where=where) for column in ("id", "path", "group"))
    check_unique(ids, where=where)
    check_paths(ids, "id", where=where)
    check_paths(paths, "path", where=where)
    if any(table["place"] != ""):  # text, too, but empty for files
        check_strings([place or "-" for place in table["place"].tolist()], "place", where=where)
    if table["label"].dtype != "int64":
        found = str(table["label"].dtype)
        raise DatasetError(
            "column 'label' must be int64", code="column-types", expected="int64", found=found, where=where
        )
    if len(set(class_names)) < len(class_names) or not all(class_names):
        raise DatasetError(
            "class names must be distinct and not empty", code="class-names", found=", ".join(class_names), where=where
        )
    wrong = table[~table["label"].between(-1, len(class_names) - 1)]
    if len(wrong):
        raise DatasetError(
            f"unknown label in {len(wrong):,} rows", code="unknown-label",
            expected=f"0 to {len(class_names) - 1} ({', '.join(class_names)}), or -1 for unlabeled",
            found=first_few([f"{i}: {y}" for i, y in zip(wrong["id"], wrong["label"], strict=True)]), where=where,
        )  # fmt: skip
    unknown = sorted(set(table["split"].tolist()) - set(SPLITS))
    if unknown:
        raise DatasetError(
            "unknown split", code="unknown-split", expected=", ".join(SPLITS), found=first_few(unknown), where=where
        )


def with_loss(ds: ImageDataset, loss: str | None) -> ImageDataset:
    """The dataset with the loss that trained heads minimize; None leaves it as it is."""
    return ds if loss is None else replace(ds, loss=loss)


def _check_columns(table: pd.DataFrame, task: Target, *, where: object) -> None:
    """Refuse a table whose columns do not hold what the target says."""
    if not task.columns:
        return
    if absent := [name for name in task.columns if name not in table.columns]:
        raise DatasetError(
            "the table lacks columns of the target", code="column-missing", expected=", ".join(task.columns),
            found=f"no {', '.join(absent)}", where=where,
        )  # fmt: skip
    if len(task.columns) != len(task.names) or len(set(task.names)) < len(task.names):
        raise DatasetError(
            f"a target needs one column for each {task.noun}", code="class-names", expected=", ".join(task.names),
            found=", ".join(task.columns), where=where,
        )  # fmt: skip
    y, number = task.values(table), task.kind == "number"
    if np.isinf(y).any() if number else ((y < -1) | (y > 1)).any():
        raise DatasetError(
            "a column of the target holds other values", code="unknown-label",
            expected="finite numbers, NaN where unknown" if number else "1 present, 0 absent, -1 unknown",
            found=", ".join(task.columns), where=where,
        )  # fmt: skip


def load_dataset(
    name: str,
    /,
    root: PathLike | None = None,
    *,
    home: PathLike | None = None,
    ref: DatasetRef | None = None,
    **options: Any,
) -> ImageDataset:
    """Load a dataset from its published layout, or any folder or table of labeled images.

    Parameters
    ----------
    name : str
        A registered layout (``embcache datasets`` lists them) or ``module:function``; ``"folder"`` for your own
        images; or the name of a cached dataset, which is loaded from where it was extracted from or, where that is
        gone, from the snapshot that extraction kept.
    root : path, optional
        The dataset's own folder, at any level of its archive (or, for ``"folder"``, a CSV, Parquet or Excel file).
        Default: ``$EMBCACHE_DATA/<name>``; for the sample ``<home>/sample-images``, drawn there when absent.
    home : path, optional
        Folder of stores and runs; the sample lies in it.
    ref : DatasetRef, optional
        How the table is read, as an object.
    **options
        Fields of `DatasetRef`: ``allow_missing=True`` skips images that are named and not there, and lists them in
        ``missing``; ``name="lesions"`` names the dataset (and so its stores); ``group_column="Patient ID"`` and the
        like name the columns of a table; ``drop_class``, ``merge_class`` (``["mild+severe=ill"]``) and ``target``
        change what is predicted. By default columns are found by their names, as the notes list them.

    Raises
    ------
    DatasetNotFoundError
        There is no such dataset, or its root is missing or laid out otherwise.
    DatasetError
        Images are missing, ids repeat, a label is unknown, a path leaves the root, a file may not be read, there is
        one class only, or several columns could be meant.
    UsageError
        A column is not there, the layout is published and has its own, or there is no such option.
    """
    ref = DatasetRef.make(ref, {**options, **({} if root is None else {"data_root": root})})
    if name not in DATASETS and ":" not in name:
        return find_dataset(name, ref, home)[0]
    return with_ref(_load(find_layout(name), ref.data_root, home, ref), ref)


def find_dataset(name: str, ref: DatasetRef = DatasetRef(), home: PathLike | None = None) -> tuple[ImageDataset, str]:
    """The dataset from its files where they are there, and "live"; else extraction's snapshot, and "snapshot".

    Names are those of `load_dataset`, and those of cached datasets (``mammo-1a2b3c4d``, or one set by ``--name``).
    Without a root, the folder that the snapshot was made from comes before the default one: the features are of its
    images. Columns that are not named are those of the snapshot, where the root is what it was made from.
    """
    found, state = _find(name, ref, home)
    return with_ref(found, ref), state


def named_dataset(dataset: ImageDataset | str, home: PathLike | None = None) -> ImageDataset:
    """The dataset itself, or the one of a name, live or from its snapshot."""
    return find_dataset(dataset, home=home)[0] if isinstance(dataset, str) else dataset


def _find(name: str, ref: DatasetRef, home: PathLike | None, *, survey: bool = False) -> tuple[ImageDataset, str]:
    """The dataset as it is published, from wherever its files are, and "live"; else its snapshot, and "snapshot"."""
    given, root = ref.data_root, None if ref.data_root is None else ref.data_root.expanduser().resolve()
    own = ref.name is None and root is not None and name in DATASETS
    try:
        cached = read_snapshot(choose_name(name, root, None) if own and root else ref.name or name, home)
    except DatasetError:
        if name not in DATASETS:  # known by nothing but its snapshot
            raise
        cached = None  # the files themselves will do, and extraction writes the snapshot anew
    named = name in DATASETS or ":" in name
    parts = kept_table(name, home) if cached is None and not named else None
    if parts is not None and root is None and parts.ref.data_root is not None:
        if parts.places or not parts.ref.data_root.is_file():
            raise DatasetError(
                f"{name} is kept in partitions, for extraction alone; other commands hold the whole table",
                code="dataset-partitioned", where=kept_table_path(name, home), found=str(parts.ref.data_root),
                fix=f"--dataset folder --name {name} --data-root TABLE, with the table of the images that are wanted",
            )  # fmt: skip
        return _load(find_layout("folder"), parts.ref.data_root, home, parts.ref, survey=survey), "live"
    if cached is None or (named and name != cached.layout):
        return _load(find_layout(name, home), given, home, ref, survey=survey), "live"
    notes = list[str]()
    if root is None or cached.origin == root:
        names = named_columns(cached.ref) | named_columns(ref)
        columns = {f"{role}_column": column for role, column in names.items()}
        merge = tuple(dict.fromkeys(cached.ref.merge_class + ref.merge_class))
        kept = cached.ref if ref.target in (None, cached.ref.target) else ref
        target = {"target": kept.target, "task": ref.task or kept.task}
        ref = DatasetRef.make(ref, {**columns, "merge_class": merge, **target})
    elif words := cached.ref.words():
        notes = [f"{' '.join(words)}, as {cached.name} was read from {cached.origin}, does not count here"]
    # Extraction without the missing images was a decision to go on without them.
    ref = replace(ref, allow_missing=ref.allow_missing or bool(cached.missing), name=ref.name or cached.name)
    if not named and cached.layout not in DATASETS:  # a file alone never says what is imported
        if root is not None:
            raise DatasetNotFoundError(
                f"{cached.name} is read by a function that is not registered", code="layout-not-named",
                where=given, fix=f"--dataset {cached.layout} --name {cached.name}",
            )  # fmt: skip
    else:
        layout = find_layout(cached.layout)
        if root is not None and (root.exists() or root != cached.origin):
            return _load(layout, given, home, ref, survey=survey).with_notes(*notes), "live"
        usual = None if layout.own_columns else default_root(cached.layout, home)
        for folder in (cached.origin, usual) if root is None else ():
            if folder is not None and folder.exists():
                try:
                    return _load(layout, folder, home, replace(ref, name=cached.name), survey=survey), "live"
                # The folder has been emptied, or is another thing of that name; or an object store does not answer.
                except (DatasetNotFoundError, StoreError):
                    continue
    if named_columns(ref) != named_columns(cached.ref):
        raise DatasetNotFoundError(
            "the images' folder is not there, and the snapshot was read with other columns", code="columns-differ",
            expected=", ".join(f"{role}: {name}" for role, name in named_columns(ref).items()),
            found=", ".join(f"{role}: {name}" for role, name in named_columns(cached.ref).items())
            or "columns by their names",
            where=cached.origin, fix=("--data-root FOLDER", "leave --group-column and the like out"),
        )  # fmt: skip
    wanted, taken = (DatasetRef(uncertain=r.uncertain, unmentioned=r.unmentioned).words() for r in (ref, cached.ref))
    if cached.kind == "findings" and wanted != taken:
        if wanted:
            raise DatasetNotFoundError(
                "the images' folder is not there, and the findings of the snapshot were read otherwise",
                code="columns-differ", expected=" ".join(wanted), found=" ".join(taken) or "uncertain ones as unknown",
                where=cached.origin, fix=("--data-root FOLDER", f"leave {' '.join(wanted)} out"),
            )  # fmt: skip
        cached = cached.with_notes(f"the findings are those of the snapshot, read with {' '.join(taken)}")
    return cached, "snapshot"


def read_snapshot(name: str, home: PathLike | None = None) -> ImageDataset | None:
    """The table that extraction kept beside the stores of dataset ``name``, if any."""
    path = snapshot_path(name, home)
    try:
        return ImageDataset.from_parquet_bytes(read_regular(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        found = error.strerror or str(error)
        raise damaged("the snapshot of a dataset cannot be read", path, found, "snapshot-unreadable") from error
    except DatasetError as error:
        if error.code == "snapshot-form":
            raise damaged(error.problem, path, str(error.found), error.code) from error
        raise damaged("the snapshot of a dataset is damaged", path, error.found or error.problem) from error


def _load(
    layout: DatasetLayout, root: PathLike | None, home: PathLike | None, ref: DatasetRef, *, survey: bool = False
) -> ImageDataset:
    """Read a table, drop or refuse rows whose image is missing (a survey keeps all), and group identical images."""
    with unreadable_as_error():
        folder = resolve_root(layout, root, home, draw=not survey)
        ds = layout.load(folder, choose_name(layout.name, folder, ref.name), ref)
        if ds.root is None:
            return ds
        # A look at every file is spared where identical ones are not looked for.
        looked = layout.merge_identical and (survey or len(ds) <= LOOKED_AT_LOADING)
        sizes = locate_files(ds.root, ds.table["path"].tolist(), sizes=looked)
        missing = tuple(path for path, size in sizes.items() if size is None)
        if missing and not survey and (not ref.allow_missing or len(missing) == len(sizes)):
            near, advice = near_misses(ds.root, [path for path in missing if not is_object(path)])
            get = f"get the images: kagglehub.{layout.download}" if layout.download else "put the images there"
            skipped = ["--allow-missing (in Python allow_missing=True)"] if len(missing) < len(sizes) else []
            raise DatasetError(
                f"{len(missing):,} of {len(sizes):,} images that the labels name are not there", code="images-missing",
                expected="a file for every row", found=f"no {first_few(missing)}" + (f"\n{near}" if near else ""),
                where=ds.root, fix=[advice or get, *skipped],
            )  # fmt: skip
        ds = replace(ds, missing=missing)
        if missing and not survey:
            left_out = f"{len(missing):,} of {len(sizes):,} images are missing and left out"
            ds = replace(ds, table=ds.table[~ds.table["path"].isin(missing)])
            ds = ds.with_notes(f"{left_out} (first: {first_few(missing, 3)})")
        return join_groups(ds, sizes, merge_identical=layout.merge_identical)


def survey_dataset(name: str, ref: DatasetRef = DatasetRef(), home: PathLike | None = None) -> ImageDataset:
    """The dataset with every row that its labels name; ``missing`` lists the images that are not there."""
    found, state = _find(name, ref, home, survey=True)
    if state == "live":
        return found
    missing = tuple(dict.fromkeys(found.table["path"].tolist()))
    return replace(found, missing=missing).with_notes("the folder is gone: this is the snapshot that extraction kept")


class Listed(NamedTuple):
    """One row of the list of datasets: what is found, or why nothing is."""

    name: str
    description: str
    found: ImageDataset | None = None
    root: Path | None = None  # where it is, or is looked for; None for a folder dataset that no one has named
    problem: str = ""  # why nothing is found


def list_datasets(home: PathLike | None = None) -> list[Listed]:
    """Every dataset that loads by name, and every other one that is cached; errors are listed, not raised."""
    rows = [_list_one(name, find_layout(name).description, default_root(name, home), home) for name in DATASETS]
    for folder in home_folders(home_dir(home)):
        try:
            cached = read_snapshot(folder.name, home)
        except DatasetError as error:
            skip(folder, error)
            continue
        if cached is not None and cached.name not in DATASETS:
            own = cached.layout == "folder"
            what = f"from a folder: {first_few(cached.class_names, 4)}" if own else f"as {cached.layout}"
            rows.append(_list_one(cached.name, f"cached, {what}", cached.origin, home))
    return rows


def _list_one(name: str, description: str, root: Path | None, home: PathLike | None) -> Listed:
    if name == "folder":
        return Listed(name, description)
    try:
        found = survey_dataset(name, home=home)
    except EmbcacheError as error:
        absent = isinstance(error, DatasetNotFoundError) and (root is None or not root.exists())
        return Listed(name, description, None, root, "" if absent else error.problem)
    return Listed(name, description, found, found.origin)
