"""Datasets too large to be one table: a Parquet table that is read in batches and kept as partitions.

What is checked is what is checked of any table, over all partitions: IDs are unique, paths stay inside the root, texts
are UTF-8, splits are known. Neither files nor equal images are looked for at loading: extraction looks at each file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embcache.config import DatasetRef
from embcache.data.dataset import ImageDataset
from embcache.data.files import check_paths, list_folder, settle_paths
from embcache.data.label_texts import class_order, same_but_for_case
from embcache.data.published import (
    DATASETS,
    choose_name,
    find_layout,
    kept_table,
    kept_table_path,
    resolve_root,
    unreadable_as_error,
)  # fmt: skip
from embcache.data.tables import (
    COLUMNS,
    SPLIT_NAMES,
    as_text,
    check_strings,
    check_unique,
    find_columns,
    match_column,
    named_column,
    plain_name,
    unify,
)  # fmt: skip
from embcache.errors import DatasetError, first_few
from embcache.io import keep_file
from embcache.partitions import (
    MOST_ROWS,
    PARTITION_ROWS,
    Partition,
    read_partition,
    text_bytes,
    write_partition,
)  # fmt: skip
from embcache.paths import PathLike, home_dir, slug
from embcache.sealed import seal

SUFFIXES = (".parquet", ".pq")
_SAMPLE = 10_000  # rows by which columns are found
_BATCH = 1 << 16
_MOST_LABELS = 10_000
_MOST_REPEATED = 100_000
_BLANKS = "".join(filter(str.isspace, map(chr, range(0x3001))))  # all that `str.strip` strips


@dataclass(frozen=True, eq=False, repr=False)
class PartitionedDataset:
    """Labeled images of which no more than one partition is in memory at a time; made by `load_partitioned`."""

    name: str
    root: Path  # folder that the paths are relative to
    origin: Path  # the table, or the folder of tables, that it was read from
    class_names: tuple[str, ...]
    folder: Path  # <home>/<dataset>, where the partitions lie
    partitions: Mapping[str, int]  # rows of each, by digest
    labels: Mapping[str, int]  # class of each text in the column of labels
    ref: DatasetRef = DatasetRef()
    notes: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()  # that decide the transform, once they are known

    def __len__(self) -> int:
        return sum(self.partitions.values())

    def __repr__(self) -> str:
        return f"PartitionedDataset({self.name!r}: {len(self):,} images in {len(self.partitions):,} partitions)"

    def parts(self) -> Iterator[ImageDataset]:
        """The dataset of each partition's rows, one after the other; extraction and `FeatureStore.arrays` take them."""
        return map(self._part, self.partitions)

    def _part(self, digest: str) -> ImageDataset:
        table = read_partition(self.folder, digest).combine_chunks()
        frame = table.to_pandas()
        coded = table["label"].combine_chunks().dictionary_encode()
        numbers = [self.labels.get(text, -1) for text in coded.dictionary.to_pylist()]
        frame["label"] = np.array(numbers, np.int64)[coded.indices.to_numpy()]
        return ImageDataset(
            self.name, self.root, self.class_names, metric="auc" if len(self.class_names) == 2 else "macro_auc",
            augment="generic", table=frame, origin=self.origin, ref=self.ref,
            part=Partition(digest, tuple(self.partitions), len(self), self.sizes),
        )  # fmt: skip


def text_array(table: pd.DataFrame, column: str) -> pa.LargeStringArray:
    """A column of text as one array, without an object for each."""
    values = pa.array(table[column], pa.large_string())
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def large_tables(ref: DatasetRef) -> list[Path]:
    """The Parquet files that ``ref`` names as the table of a dataset, or none: they hold up to `MOST_ROWS` rows."""
    given = ref.data_root.expanduser() if ref.data_root is not None else None
    files = parquet_files(given) if given is not None else []
    if given is not None and given.is_dir() and len(files) < 2:  # one beside images is found with them
        return []
    return files if sum(open_table_file(file).metadata.num_rows for file in files) > MOST_ROWS else []


def find_partitioned(
    name: str, ref: DatasetRef = DatasetRef(), home: PathLike | None = None
) -> PartitionedDataset | None:
    """The dataset of a table of more than `MOST_ROWS` rows, or of the name of one that is kept; None for others."""
    if name == "folder" and large_tables(ref):
        return load_partitioned(ref.data_root or "", home=home, ref=ref)
    kept = kept_table(name, home) if name not in DATASETS and ref.data_root is None else None
    if kept is None:
        return None
    return load_partitioned(kept.ref.data_root or "", home=home, ref=kept.ref, places=kept.places, rows=kept.rows)


def load_partitioned(
    root: PathLike, *, home: PathLike | None = None, ref: DatasetRef | None = None, rows: int = PARTITION_ROWS,
    places: str = "", **options: Any,
) -> PartitionedDataset:  # fmt: skip
    """Read a table of images in batches, and keep it as partitions beside the stores.

    Parameters
    ----------
    root : path
        A Parquet file, or a folder of Parquet files with the same columns. Paths are relative to its folder. A
        partition never has rows of two files: adding a file leaves the others as they are.
    home : path, optional
        Folder of stores and runs.
    ref : DatasetRef, optional
        How the table is read, as an object.
    rows : int
        Most rows of a partition.
    places : str
        Column with the row of the array that an image is, where the files are HDF5 files of many images.
    **options
        Fields of `DatasetRef`, as of :func:`embcache.load_dataset`.

    Raises
    ------
    DatasetError
        A table cannot be read, IDs repeat, a split is unknown, or a path leaves the root.
    UsageError
        A column is not there.
    """
    ref = DatasetRef.make(ref, {**options, "data_root": root})
    origin = resolve_root(find_layout("folder"), ref.data_root, home)
    name = choose_name("folder", origin, ref.name)
    with unreadable_as_error():
        reader = _Reader(origin, ref, places)
        class_names, labels = reader.classes()
        folder, partitions, hashes = home_dir(home) / slug(name), dict[str, int](), list[np.ndarray]()
        for table in reader.tables(min(rows, MOST_ROWS)):
            hashes.append(_hashes(table["id"]))
            digest = write_partition(folder, table)
            if digest in partitions:
                check_unique(table["id"].to_pylist() * 2, where=origin)
            partitions[digest] = table.num_rows
        if not partitions:
            raise DatasetError(
                "a label file has no rows", code="table-empty", expected="one row per image", where=origin
            )
        _refuse_repeated(folder, list(partitions), hashes, where=origin)
    known = DatasetRef.make(ref, {"name": name, "data_root": origin}).to_json()
    kept = {"ref": known, "places": places, "rows": rows, "partitions": list(partitions)}
    keep_file(kept_table_path(name, home), seal(kept))
    notes = [f"{sum(partitions.values()):,} rows are read in {len(partitions):,} partitions", *reader.notes]
    return PartitionedDataset(name, reader.root, origin, class_names, folder, partitions, labels, ref, tuple(notes))


def _hashes(ids: pa.ChunkedArray) -> np.ndarray:
    return pd.util.hash_array(ids.to_pandas().to_numpy(object), categorize=False)


def _refuse_repeated(folder: Path, partitions: Sequence[str], hashes: list[np.ndarray], *, where: Path) -> None:
    """Refuse IDs that occur twice in all partitions, by their hashes; the list is emptied."""
    found = np.concatenate(hashes)
    hashes.clear()
    found.sort()
    twice = np.unique(found[1:][found[1:] == found[:-1]])[:_MOST_REPEATED]
    if not len(twice):
        return
    ids = list[str]()  # different ones may have one hash: it is the IDs that count
    for digest in partitions:
        own = read_partition(folder, digest, ["id"])["id"]
        ids += own.take(pa.array(np.flatnonzero(np.isin(_hashes(own), twice)))).to_pylist()
    check_unique(ids, where=where)


class _Reader:
    """The tables of a dataset, column by column as text; which column is what is settled by their first rows."""

    def __init__(self, origin: Path, ref: DatasetRef, places: str) -> None:
        self.root = origin.parent if origin.is_file() else origin
        self._origin, self._files = origin, parquet_files(origin)
        if not self._files:
            raise DatasetError(
                "there is no table to read in partitions", code="table-missing", expected="Parquet files", where=origin,
                fix="write the table as Parquet: pandas.read_csv(…).to_parquet(…)",
            )  # fmt: skip
        self._tables = [open_table_file(file) for file in self._files]
        header = self._tables[0].schema_arrow.names
        for file, table in zip(self._files, self._tables, strict=True):
            if set(table.schema_arrow.names) != set(header) or len(set(header)) < len(header):
                raise DatasetError(
                    "the tables of a dataset differ in their columns, or repeat one", code="columns-differ",
                    expected=", ".join(header), found=", ".join(table.schema_arrow.names), where=file,
                    fix="give all of them the same columns",
                )  # fmt: skip
        first = next(self._tables[0].iter_batches(_SAMPLE), None)
        sample = pa.table({name: _as_texts(first[name]) if first else pa.array([], pa.string()) for name in header})
        required = ("path",) if ref.target else ("path", "label")
        self._found, self.notes = find_columns(sample.to_pandas(), ref, where=self._files[0], required=required)
        own = [name for name in header if plain_name(name) == "group"]
        group = named_column(header, ref, "group") or ("group" if "group" in own else own[0] if len(own) == 1 else "")
        used = {name for name in self._found.values() if name != ref.group_column}
        used |= {group} if plain_name(group) == "group" else set()
        self._found |= {"group": group} if group else {}
        self._found |= {"place": match_column(places, header, "the table")} if places else {}
        used |= {places} if places else set()
        self._kept = {("source_" + name if name in COLUMNS else name): name for name in header if name not in used}
        self._merge = ref.merge_class
        if not group:
            self.notes.append("groups are not known: --group-column NAME names the column of patients or slides")

    def classes(self) -> tuple[tuple[str, ...], dict[str, int]]:
        """Names of the classes, those of the training images; and the class of each text in the column of labels."""
        label = self._found.get("label")
        if label is None:
            return (), {}
        split, counts, trained = self._found.get("split"), Counter[str](), set[str]()
        for table in self._tables:
            for batch in table.iter_batches(_BATCH, columns=[label, *([split] if split else [])]):
                texts = _as_texts(batch[label])
                for each in pc.value_counts(texts).to_pylist():
                    counts[each["values"]] += each["counts"]
                if split:
                    train = pc.is_in(_splits(_as_texts(batch[split]), None), value_set=pa.array(["train"]))
                    texts = texts.filter(train)
                trained |= {*texts.unique().to_pylist()}
                if len(counts) > _MOST_LABELS:
                    raise DatasetError(
                        f"the column {label!r} has more than {_MOST_LABELS:,} values", code="too-many-classes",
                        expected="the names of classes", found=first_few(sorted(counts)), where=self._origin,
                        fix="--label-column NAME, the column of the classes",
                    )  # fmt: skip
        shown = unify(filter(None, counts))
        merged, _, more = same_but_for_case(
            [shown.get(text, "") for text in counts.elements()], self._merge, where=self._origin
        )
        self.notes += more
        final = {text: merged.get(name, name) for text, name in shown.items()}
        names = class_order(final[text] for text in trained if text)
        return names, {text: names.index(name) if name in names else -1 for text, name in final.items()}

    def tables(self, rows: int) -> Iterator[pa.Table]:
        """Checked rows, at most ``rows`` together and never of two files, with the columns of a partition."""
        wanted = list(dict.fromkeys([*self._found.values(), *self._kept.values()]))
        for file, table in zip(self._files, self._tables, strict=True):
            batches, there = list[pa.RecordBatch](), 0
            for batch in table.iter_batches(_BATCH, columns=wanted):
                batches.append(batch)
                there += len(batch)
                while there >= rows:
                    whole = pa.Table.from_batches(batches)
                    yield self._checked(whole.slice(0, rows), file)
                    batches, there = whole.slice(rows).to_batches(), there - rows
            if there:
                yield self._checked(pa.Table.from_batches(batches), file)

    def _checked(self, given: pa.Table, file: Path) -> pa.Table:
        cells = {name: _as_texts(given[column]) for name, column in {**self._kept, **self._found}.items()}
        paths, plain = _checked_texts(cells["path"], "path", file)
        if not plain or pc.any(pc.starts_with(paths, "./")).as_py():
            settled, notes = settle_paths(self.root, paths.to_pylist())
            self.notes += [note for note in notes if note not in self.notes]
            paths, _ = _checked_texts(pa.array(settled, pa.large_string()), "path", file)
            check_paths(settled, "path", where=file)
        ids = paths
        if "id" in self._found:
            ids, plain = _checked_texts(cells["id"], "id", file)
            if not plain:
                check_paths(ids.to_pylist(), "id", where=file)
        n = len(paths)
        empty, train = (pa.repeat(pa.scalar(text, pa.large_string()), n) for text in ("", "train"))
        groups = pc.if_else(pc.equal(cells["group"], ""), ids, cells["group"]) if "group" in cells else ids
        own = {
            "id": ids, "path": paths, "place": cells.get("place", empty), "label": cells.get("label", empty),
            "group": groups, "split": _splits(cells["split"], file) if "split" in cells else train,
        }  # fmt: skip
        for name in self._kept:
            own[name] = cells[name]
        return pa.table({name: column.cast(pa.large_string()) for name, column in own.items()})


def parquet_files(origin: Path) -> list[Path]:
    """The Parquet files that a path names, or that lie directly in a folder, by name."""
    if origin.is_dir():
        return [origin / e.name for e in list_folder(origin) if e.is_file() and e.name.lower().endswith(SUFFIXES)]
    return [origin] if origin.name.lower().endswith(SUFFIXES) and origin.is_file() else []


def open_table_file(file: Path) -> pq.ParquetFile:
    """A Parquet file of a user, its rows not read; `DatasetError` where it is none."""
    try:
        return pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        found = str(error).split("\n")[0]
        raise DatasetError("not a Parquet file", code="table-unreadable", found=found, where=file) from error


def _as_texts(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Cells as text, as `embcache.data.tables.as_text` makes them of values one by one."""
    values = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(values, pa.ChunkedArray):  # no row
        values = pa.array([], values.type)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind = values.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pc.fill_null(pc.utf8_trim(values.cast(pa.large_string()), _BLANKS), "")
    if pa.types.is_integer(kind):
        return pc.fill_null(values.cast(pa.large_string()), "")
    return pa.array([as_text(value) for value in values.to_pylist()], pa.large_string())


def _checked_texts(texts: pa.Array, column: str, file: Path) -> tuple[pa.Array, bool]:
    """Texts, which `check_strings` accepts; and whether all are ASCII without anything that could leave a folder."""
    lengths, parts = text_bytes(pa.chunked_array([texts]))
    whole = b"".join(parts)
    if not lengths.all() or b"\0" in whole:
        check_strings(texts.to_pylist(), column, where=file)
    leaving = any(mark in whole for mark in (b"..", b"\\", b":/")) or pc.any(pc.starts_with(texts, "/")).as_py()
    return texts, whole.isascii() and not leaving


def _splits(texts: pa.Array, file: Path | None) -> pa.Array:
    """Splits by their names; unknown ones are refused where the file is given."""
    coded = texts.dictionary_encode()
    names = [SPLIT_NAMES.get(text.lower() or "train", text) for text in coded.dictionary.to_pylist()]
    if file is not None and (unknown := sorted({*names} - {*SPLIT_NAMES.values()})):
        raise DatasetError(
            "unknown split", code="unknown-split", expected="train, val or test", found=first_few(unknown), where=file
        )
    return pa.array(names, pa.large_string()).take(coded.indices)
