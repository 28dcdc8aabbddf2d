"""Files of features that other programs made: names of images and one vector for each, whatever the format.

npy and npz, Parquet and CSV, HDF5, Zarr (as `embcache export` writes them, and with other usual names), TRIDENT's
folder of one HDF5 file per slide, and kaiko-eva's folder of tensors with its manifest. Nothing in a file is executed:
pickled arrays are refused, tensors are read as weights are.
"""

from __future__ import annotations

import csv
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from embcache.data.containers import StrictFile, own_array
from embcache.data.files import is_inside, refuse_outside
from embcache.data.tables import as_text, check_strings, check_unique, open_table, plain_name
from embcache.errors import DatasetError, UsageError, WeightsError, first_few

if TYPE_CHECKING:
    import pyarrow as pa

# Usual names, compared by `plain_name`, the first one that is there counts.
_FEATURES = (
    "features", "feature", "embeddings", "embedding", "feats", "feat", "vectors", "vector", "representations", "x",
    "emb",
)  # fmt: skip
_IDS = (
    "ids", "id", "imageid", "imageids", "names", "name", "paths", "path", "imagepath", "filenames", "filename",
    "filepath", "files", "file", "images", "image", "imagename", "imageindex", "keys", "key", "slideid", "slide",
    "origin",
)  # fmt: skip
# Columns of numbers that are no features, unless all features are numbered.
_OTHERS = (
    "label", "labels", "target", "targets", "class", "group", "split", "fold", "patient", "patientid", "y", "age",
)  # fmt: skip
_MOST_UNPACKED = 1100  # times the size of a file: deflate does not reach that
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, MemoryError, RuntimeError, zlib.error, zipfile.BadZipFile)

FORMS = ".npz, .npy, .parquet, .csv, .tsv, .h5, .zarr, a folder of .h5 (TRIDENT), or of .pt (kaiko-eva)"


@dataclass(frozen=True)
class ForeignFeatures:
    """One vector per image, made elsewhere."""

    names: tuple[str, ...]  # what the file calls the images; each once
    features: NDArray[Any]  # float32 or float16 (n, D), finite
    notes: tuple[str, ...] = ()  # what was inferred or changed


def read_features_file(path: Path, *, ids: Path | None = None, mean: bool = False) -> ForeignFeatures:
    """Read a file or folder of features.

    ``ids`` is a text file of one name per line, or a table, for arrays without names. With ``mean`` several vectors of
    one image are averaged.

    Raises
    ------
    DatasetError
        The file cannot be read, or does not hold one finite vector of floating-point numbers for each name.
    UsageError
        Its format is not known, or ``ids`` is of no use.
    """
    notes: list[str] = []
    if not path.exists():
        raise UsageError("there is no such file of features", code="no-features-file", where=path, fix="check the path")
    reader = _reader_of(path)
    arrays = reader in (_read_npz, _read_npy, _read_hdf5)
    if ids is not None and not arrays:
        raise UsageError(
            "this format has the names of its images inside", code="unused-option", found=f"--ids {ids}",
            expected="--ids with .npy, .npz and .h5", fix="leave out --ids",
        )  # fmt: skip
    with _readable(path):
        names, values = reader(path, notes)
    if ids is not None:
        names = _read_ids(ids, notes)
    if names is None:
        raise DatasetError(
            "a file of features does not name its images", code="features-without-ids", where=path,
            expected="an array 'ids'", found=f"{len(values):,} rows without names",
            fix="--ids FILE with one name per line, in the order of rows",
        )  # fmt: skip
    if len(names) != len(values) or not len(names):
        raise DatasetError(
            "there is not one row of features for each name", code="features-count", where=path,
            expected=f"{len(names):,} rows, one per name", found=f"{len(values):,} rows",
        )  # fmt: skip
    check_strings(names, "names of images", where=path)
    check_unique(names, where=path)
    features = _stacked(names, values, mean, path, notes)
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        bad = [name for name, fine in zip(names, finite.tolist(), strict=True) if not fine]
        raise DatasetError(
            "features are not finite", code="features-not-finite", where=path,
            found=f"{len(bad):,} of {len(names):,} rows: {first_few(bad)}", fix="leave these rows out of the file",
        )  # fmt: skip
    return ForeignFeatures(tuple(names), features, tuple(notes))


Names = list[str] | None
Rows = NDArray[Any] | list[NDArray[Any]]
Reader = Callable[[Path, list[str]], tuple[Names, Rows]]


def _reader_of(path: Path) -> Reader:
    if path.is_dir():
        if (path / "zarr.json").is_file():
            return _read_zarr
        if (path / "manifest.csv").is_file() or next(path.rglob("*.pt"), None):
            return _read_tensors
        if next(path.rglob("*.h5"), None):
            return _read_slides
    elif reader := _READERS.get(path.suffix.lower()):
        return reader
    raise UsageError(
        "the format of the features is not known", code="features-format", expected=FORMS, where=path,
        found="a folder of other files" if path.is_dir() else f"a file that ends in {path.suffix!r}",
    )  # fmt: skip


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (*_UNREADABLE, WeightsError, pa.ArrowException) as error:
        found, pickled = str(error).partition("\n")[0], "allow_pickle" in str(error)
        if isinstance(error, WeightsError):
            found, pickled = str(error.found), error.code == "checkpoint-unsafe"
        raise DatasetError(
            "a file of features holds Python objects, which are never loaded" if pickled
            else "a file of features cannot be read",
            code="features-unsafe" if pickled else "features-unreadable", where=path,
            expected="arrays of numbers and of text", found=(found or type(error).__name__)[:300],
            fix="save the arrays with other dtypes: np.savez(FILE, features=X, ids=np.array(ids, dtype=str))"
            if pickled else "write the file again",
        ) from error  # fmt: skip


def _pick(names: Sequence[str], usual: Sequence[str]) -> str | None:
    plain = {plain_name(name): name for name in reversed(names)}
    return next((plain[each] for each in usual if each in plain), None)


def _keys(path: Path, names: Sequence[str]) -> tuple[str, str | None]:
    """The names of the array of features and of that of ids, if there is one."""
    key = _pick(names, _FEATURES)
    if key is None:
        raise _no_features(path, names)
    return key, _pick([name for name in names if name != key], _IDS)


def _no_features(path: Path, names: Sequence[str]) -> DatasetError:
    return DatasetError(
        "no array of a file is called as features are", code="features-not-found", where=path,
        expected="an array 'features' or 'embeddings', with 'ids' beside it", found=first_few(names, 10) or "none",
        fix="name them so; of a folder of slides, name the folder",
    )  # fmt: skip


def _texts(values: Any) -> list[str]:
    """Names from an array of text, bytes or whole numbers, or a list of them."""
    listed = np.asarray(values).tolist()
    listed = [value.decode("utf-8") if isinstance(value, bytes) else value for value in listed]
    return [value if isinstance(value, str) else as_text(value) for value in listed]


# Arrays


def _read_npy(path: Path, notes: list[str]) -> tuple[Names, Rows]:
    return None, np.load(path, allow_pickle=False)


def _read_npz(path: Path, notes: list[str]) -> tuple[Names, Rows]:
    with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
        key, ids = (file.files[0], None) if len(file.files) == 1 else _keys(path, file.files)
        return None if ids is None else _texts(file[ids]), file[key]


def _read_hdf5(path: Path, notes: list[str]) -> tuple[Names, Rows]:
    import h5py

    with h5py.File(StrictFile(path), "r") as file:
        key, ids = _keys(path, list(file))
        if ids is None and "coords" in file:  # one slide of TRIDENT
            raise _no_features(path, list(file))
        return None if ids is None else _texts(_hdf5_array(file, ids, path)), _hdf5_array(file, key, path)


def _hdf5_array(file: Any, key: str, path: Path) -> NDArray[Any]:
    import h5py

    array, size = own_array(file, key), path.stat().st_size
    text = h5py.check_string_dtype(array.dtype) is not None
    if array.dtype.kind == "O" and not text:
        raise ValueError(f"{key!r} is an array of objects")
    if array.size * array.dtype.itemsize > _MOST_UNPACKED * size:
        raise ValueError(f"{key!r} claims {array.shape} values in {size:,} bytes")
    found: NDArray[Any] = array.asstr()[...] if text else array[...]
    return found


def _read_zarr(path: Path, notes: list[str]) -> tuple[Names, Rows]:
    import zarr

    group = zarr.open_group(path, mode="r")
    key, ids = _keys(path, names := sorted(group.array_keys()))
    if ids is None:
        raise _no_features(path, names)
    for name in (key, ids):
        array: Any = group[name]
        if array.nchunks_initialized < array.nchunks:  # an absent chunk would be read as zeros
            raise ValueError(f"{array.nchunks - array.nchunks_initialized} chunks of {name!r} are missing")
    features: Any = group[key]
    texts: Any = group[ids]
    return _texts(texts[...]), np.asarray(features[...])


def _read_slides(path: Path, notes: list[str]) -> tuple[Names, Rows]:
    """TRIDENT's HDF5 files, one per slide: ``features`` of the slide, (D,) or (1, D), or of its patches, (N, D)."""
    import h5py

    names, rows = [], []
    for file in sorted(path.rglob("*.h5")):
        with h5py.File(StrictFile(file), "r") as opened:
            rows.append(_hdf5_array(opened, _keys(file, list(opened))[0], file))
        names.append(file.relative_to(path).with_suffix("").as_posix())
    notes.append(f"{len(names):,} slides, one .h5 file each, by the names of the files")
    return names, rows


def _read_tensors(path: Path, notes: list[str]) -> tuple[Names, Rows]:
    """kaiko-eva's tensors, one file per image, by its manifest; without one, by the names of the files."""
    from embcache.backbones.checkpoints import read_tensors

    manifest = path / "manifest.csv"
    if manifest.is_file():
        table, read = open_table(manifest)
        if not {"origin", "embeddings"} <= set(table.columns):
            raise DatasetError(
                "a manifest of kaiko-eva lacks a column", code="column-missing", expected="origin, embeddings",
                found=", ".join(table.columns), where=manifest,
            )  # fmt: skip
        notes += read
        names, files = table["origin"].tolist(), table["embeddings"].tolist()
    else:
        found = sorted(each.relative_to(path) for each in path.rglob("*.pt"))
        names, files = [each.with_suffix("").as_posix() for each in found], [each.as_posix() for each in found]
    rows = []
    for file in files:
        if not is_inside(path.resolve(), str((path / file).resolve())):
            raise refuse_outside(file, "embeddings", where=manifest)
        # A list has one tensor for each patch; numpy has no bfloat16.
        tensors = read_tensors(path / file)
        wide = [tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor for tensor in tensors]
        arrays = [_vectors(tensor.numpy().copy()) for tensor in wide]
        rows.append(arrays[0] if len(arrays) == 1 else np.concatenate([np.atleast_2d(each) for each in arrays]))
    return names, rows


# Tables


def _read_csv(path: Path, notes: list[str]) -> tuple[Names, Rows]:
    import pyarrow.csv as arrow

    with path.open(encoding="utf-8-sig", newline="") as file:
        line = file.readline(1 << 24)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t|", key=line.count)
    header = next(csv.reader([line], delimiter=delimiter), [])
    key = _pick(header, _IDS)
    table = arrow.read_csv(
        path, parse_options=arrow.ParseOptions(delimiter=delimiter),
        convert_options=arrow.ConvertOptions(column_types={key: "string"} if key else {}, strings_can_be_null=False),
    )  # fmt: skip
    return _from_table(table, key, path, notes, whole=True)


def _read_parquet(path: Path, notes: list[str]) -> tuple[Names, Rows]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path, page_checksum_verification=True)
    if file.metadata.num_rows > 4 * path.stat().st_size:
        raise ValueError(f"{file.metadata.num_rows:,} rows in {path.stat().st_size:,} bytes")
    return _from_table(file.read(), _pick(file.schema_arrow.names, _IDS), path, notes, whole=False)


def _from_table(table: pa.Table, key: str | None, path: Path, notes: list[str], whole: bool) -> tuple[Names, Rows]:
    """Names and features of a table: a column of lists, numbered columns, or all columns of numbers.

    Without numbered columns, whole numbers count only with ``whole``: text says nothing of types.
    """
    import pyarrow as pa

    if key is None or len(set(table.column_names)) < len(table.column_names):
        raise DatasetError(
            "a table of features does not name its images, or repeats a column", code="features-without-ids",
            expected="one column such as 'id' or 'path'", found=first_few(table.column_names, 10), where=path,
        )  # fmt: skip
    types = {field.name: field.type for field in table.schema if field.name != key}
    lists = [name for name, kind in types.items() if pa.types.is_list(kind) or pa.types.is_large_list(kind)
             or pa.types.is_fixed_size_list(kind)]  # fmt: skip
    # Lists written as text, in columns that are called as features are.
    written = [name for name in types if len(table) and str(table[name][0].as_py()).strip()[:1] in ("[", "(")]
    chosen = _pick(lists, _FEATURES) or next(iter(lists), None) or _pick(written, _FEATURES)
    names = _texts(table[key].to_pylist())
    if chosen:
        notes.append(f"features are the lists of the column {chosen!r}")
        return names, [_row(scalar) for scalar in table[chosen]]
    numbers = [name for name, kind in types.items() if pa.types.is_floating(kind) or pa.types.is_integer(kind)]
    columns = _numbered(numbers, path)
    if not columns:
        columns = [name for name in numbers if plain_name(name) not in _OTHERS]
        columns = [name for name in columns if whole or pa.types.is_floating(types[name])]
    if not columns:
        raise _no_features(path, table.column_names)
    for name in columns:
        if table[name].null_count:
            empty = [id_ for id_, value in zip(names, table[name].to_pylist(), strict=True) if value is None]
            raise DatasetError(
                "a value of a feature is missing", code="features-not-finite", where=path,
                found=f"{name} of {first_few(empty)}", fix="leave these rows out of the file",
            )  # fmt: skip
    left = [name for name in types if name not in columns]
    notes.append(
        f"features are {len(columns):,} columns, {columns[0]!r} to {columns[-1]!r}"
        + (f"; not among them: {first_few(left, 8)}" if left else "")
    )
    kinds = {types[name].to_pandas_dtype() for name in columns}
    narrow = np.float32 if whole else np.result_type(*kinds)  # text has no type
    return names, np.stack([table[name].to_numpy().astype(narrow) for name in columns], axis=1)


def _numbered(names: Sequence[str], path: Path) -> list[str]:
    """The longest run of columns that are numbered from 0 or 1 under one prefix, in the order of the numbers."""
    groups: dict[str, dict[int, str]] = {}
    for name in names:
        if match := re.fullmatch(r"(.*?)(\d{1,6})", name, re.DOTALL):
            groups.setdefault(match[1], {})[int(match[2])] = name
    runs = {
        prefix: [group[number] for number in sorted(group)]
        for prefix, group in groups.items()
        if min(group) in (0, 1) and len(group) > 1 and max(group) - min(group) == len(group) - 1
    }
    longest = [prefix for prefix, run in runs.items() if len(run) == max(map(len, runs.values()))]
    if len(longest) > 1:
        raise DatasetError(
            "a table holds several vectors per image", code="features-several", where=path, expected="one vector",
            found=", ".join(f"{prefix}N" for prefix in longest),
            fix="leave out the columns of all but one; or --mean with arrays (n, V, D) in an .npz",
        )  # fmt: skip
    return runs[longest[0]] if longest else []


def _row(scalar: Any) -> NDArray[Any]:
    """A list of numbers, or the text of one."""
    import pyarrow as pa

    if not scalar.is_valid:
        raise ValueError("a list is missing")
    if isinstance(scalar, pa.StringScalar | pa.LargeStringScalar):
        text = scalar.as_py()
        return np.array(json.loads(text) if "," in text else text.strip().strip("[]()").split(), np.float32)
    found: NDArray[Any] = scalar.values.to_numpy(zero_copy_only=False)
    return found


def _read_ids(path: Path, notes: list[str]) -> list[str]:
    """Names from a text file, one per line, or the column of a table."""
    if not path.is_file():
        raise UsageError("there is no such file of names", code="no-features-file", where=path, fix="check --ids")
    if path.suffix.lower() not in (".csv", ".tsv", ".parquet", ".pq"):
        return [line.strip() for line in path.read_text("utf-8-sig").rstrip().splitlines()]
    table, read = open_table(path)
    column = _pick(list(table.columns), _IDS) or (table.columns[0] if table.shape[1] == 1 else None)
    if column is None:
        raise DatasetError(
            "a table of names has no column of names", code="column-missing", expected="such as 'id' or 'path'",
            found=first_few(list(table.columns), 10), where=path,
        )  # fmt: skip
    notes += [*read, f"names are the column {column!r} of {path.name}"]
    return [str(name) for name in table[column].tolist()]


# What they hold


def _stacked(names: Sequence[str], values: Rows, mean: bool, path: Path, notes: list[str]) -> NDArray[Any]:
    """One vector per name, (n, D); rows of several vectors are averaged with ``mean``, else refused."""
    rows = [_vectors(row) for row in values]
    kind = np.result_type(*{row.dtype for row in rows})
    if kind.kind != "f":
        raise DatasetError(
            "features are not floating-point numbers", code="features-dtype", where=path,
            expected="float32, float16 or float64", found=str(kind),
            fix="X.astype('float32'), if they are features and neither labels nor indices",
        )  # fmt: skip
    several = [f"{name}: {row.shape}" for name, row in zip(names, rows, strict=True) if row.ndim == 2]
    if several and not mean:
        raise DatasetError(
            "a file holds several vectors per image", code="features-several", where=path,
            expected="one vector, (D,) or (1, D), for each", found=first_few(several, 3),
            fix="--mean averages them; or average them otherwise and import the result",
        )  # fmt: skip
    widths = [row.shape[-1] if row.ndim in (1, 2) and row.size else 0 for row in rows]
    usual = max(set(widths), key=widths.count)
    if not usual or set(widths) != {usual}:
        odd = [f"{name}: {row.shape}" for name, row, n in zip(names, rows, widths, strict=True) if n != usual or not n]
        raise DatasetError(
            "the rows of a file of features are not of one length", code="features-ragged", where=path,
            expected=f"{usual or 'at least 1'} numbers for each image", found=first_few(odd, 3),
        )  # fmt: skip
    if several:
        counts = [len(row) if row.ndim == 2 else 1 for row in rows]
        notes.append(f"--mean: {min(counts):,} to {max(counts):,} vectors per image are averaged")
        return np.stack([np.atleast_2d(row).mean(axis=0, dtype=np.float64).astype(np.float32) for row in rows])
    if kind.itemsize <= 4:
        return np.stack(rows).astype(kind.newbyteorder("="), copy=False)
    notes.append(f"{kind} is stored as float32")
    with np.errstate(over="ignore"):  # what is too large is refused as not finite
        return np.stack(rows).astype(np.float32)


def _vectors(values: Any) -> NDArray[Any]:
    """One row of a file without leading axes of length one: (D,), or (N, D) of several vectors."""
    row: NDArray[Any] = np.asarray(values)
    while row.ndim > 1 and len(row) == 1:
        row = row[0]
    return row


_READERS: dict[str, Reader] = {
    ".npz": _read_npz, ".npy": _read_npy, ".parquet": _read_parquet, ".pq": _read_parquet, ".csv": _read_csv,
    ".tsv": _read_csv, ".h5": _read_hdf5, ".hdf5": _read_hdf5,
}  # fmt: skip
