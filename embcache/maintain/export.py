"""Taking cached features along to other tools (``embcache export``)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from embcache.errors import StoreError, UsageError
from embcache.io import replacing
from embcache.paths import PathLike
from embcache.store.feature_store import FeatureStore

# What writes a format is imported by its writer.
if TYPE_CHECKING:
    import pyarrow as pa

    from embcache.data.dataset import ImageDataset

_BLOCK = 1024  # rows written at once: some 8 MB of 2048 float32
_SUFFIXES = {".npz": "npz", ".parquet": "parquet", ".csv": "csv", ".zarr": "zarr", ".h5": "hdf5", ".hdf5": "hdf5"}

Arrays = dict[str, np.ndarray]  # features (n, *row_shape), labels int64 (n,)
Texts = dict[str, list[str]]  # ids, groups, split; class_names


def export_features(
    store: FeatureStore, dataset: ImageDataset, target: PathLike, *, format: str | None = None, overwrite: bool = False
) -> int:
    """Write the features of a dataset, with its labels, as one file (or one Zarr folder) for other tools.

    Rows are in the dataset's order; quarantined images are left out. npz, Zarr and HDF5 hold the arrays ``features``
    (n, \\*row_shape), ``ids``, ``labels``, ``groups``, ``split`` and ``class_names``; Parquet and CSV the columns
    ``id, label, class_name, group, split, f0, f1, …``; of several views ``v0_f0, …, v1_f0, …``. The format is that of
    the target's suffix. Returns the number of rows written; the target appears whole or not at all.

    Raises
    ------
    UsageError
        The format is unknown or the target exists.
    StoreError
        The store is not complete for this dataset, or the target cannot be written.
    """
    path = Path(target)
    suffix = path.suffix.lower()
    chosen = format or _SUFFIXES.get(suffix)
    if chosen not in _WRITERS:
        raise UsageError(
            "the format of the export is not known", code="export-format", expected=" | ".join(_WRITERS),
            found=repr(format) if format else f"a target called {path.name}",
            fix="--format npz, or a target that ends in .npz, .parquet, .csv, .zarr or .h5",
        )  # fmt: skip
    if suffix and _SUFFIXES.get(suffix) != chosen:
        raise UsageError(
            "the suffix of the target stands for another format", code="export-suffix",
            expected=" or ".join(each for each, other in _SUFFIXES.items() if other == chosen),
            found=str(path), where=f"--format {chosen}", fix="leave out --format, or give the target another suffix",
        )  # fmt: skip
    if store.holds_pixels:
        raise UsageError(
            "a store of pixels is not exported: it is made from the image files, and again where it is gone",
            code="export-pixels", found=store.path.name,
            fix="embcache.extract.pixels.open_pixels reads it; embcache export … --backbone NAME exports features",
        )  # fmt: skip
    if path.exists() and not overwrite:
        raise UsageError(
            "the target exists", code="target-exists", where=path, fix="another name, or --force to replace it"
        )
    if path.is_dir() and not (path / "zarr.json").is_file():
        # --force is for what an export made: no slip of a name may delete a folder of images.
        raise UsageError(
            "the target is a folder and not a Zarr group", code="target-folder", where=path, fix="another name"
        )
    shown = store.restrict(dataset.table["id"])
    features, labels, groups = shown.arrays(dataset)
    ids, splits = shown.ids.tolist(), dataset.table.set_index("id")["split"].astype(str)
    texts = {"ids": ids, "groups": groups.tolist(), "split": splits[ids].tolist()}
    texts["class_names"] = list(dataset.class_names)
    source = {"dataset": dataset.name, "backbone": store.recipe.backbone, "fingerprint": store.recipe.fingerprint}
    try:
        with replacing(path, flush=True) as staged:
            _WRITERS[chosen](staged, {"features": features, "labels": labels}, texts, source)
    except OSError as error:
        raise StoreError(
            "the export cannot be written", code="export-not-written", found=error.strerror or str(error), where=path,
            fix="name a target in an existing folder that is writable, with space left",
        ) from error  # fmt: skip
    return len(ids)


def _table(arrays: Arrays, texts: Texts, source: dict[str, str]) -> pa.Table:
    import pyarrow as pa

    features, labels, classes = arrays["features"], arrays["labels"], texts["class_names"]
    flat = features.reshape(len(labels), -1)
    views, dim = features.shape[1:] if features.ndim == 3 else (1, flat.shape[1])
    names = [f"v{v}_f{i}" if views > 1 else f"f{i}" for v in range(views) for i in range(dim)]
    columns = {
        "id": pa.array(texts["ids"], pa.string()),
        **_labels(labels, classes),
        "group": pa.array(texts["groups"], pa.string()),
        "split": pa.array(texts["split"], pa.string()),
        **{name: pa.array(np.ascontiguousarray(flat[:, i])) for i, name in enumerate(names)},
    }
    metadata = {**source, "class_names": json.dumps(classes, ensure_ascii=False)}
    return pa.table(columns).replace_schema_metadata(metadata)


def _labels(labels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """``label`` and ``class_name``; of findings one column ``label_NAME`` for each; of a number ``label``."""
    import pyarrow as pa

    if labels.ndim == 2:
        return {f"label_{name}": pa.array(column) for name, column in zip(names, labels.T, strict=True)}
    if labels.dtype.kind == "f":
        return {"label": pa.array(labels)}
    named = [names[label] if label >= 0 else "" for label in labels.tolist()]
    return {"label": pa.array(labels), "class_name": pa.array(named, pa.string())}


def _write_npz(path: Path, arrays: Arrays, texts: Texts, source: dict[str, str]) -> None:
    strings = {name: np.array(values, np.str_) for name, values in {**texts, **source}.items()}
    held: dict[str, Any] = {**arrays, **strings}
    with path.open("wb") as file:
        np.savez(file, **held)


def _write_parquet(path: Path, *rows: Any) -> None:
    import pyarrow.parquet as pq

    pq.write_table(_table(*rows), path)


def _write_csv(path: Path, *rows: Any) -> None:
    import pyarrow.csv

    pyarrow.csv.write_csv(_table(*rows), path)


def _write_zarr(path: Path, arrays: Arrays, texts: Texts, source: dict[str, str]) -> None:
    import zarr

    group = zarr.open_group(path, mode="w-", zarr_format=3, attributes=dict(source))
    for name, values in arrays.items():
        chunks = (min(_BLOCK, max(1, len(values))), *values.shape[1:])
        group.create_array(name, shape=values.shape, chunks=chunks, dtype=values.dtype)[...] = values
    for name, strings in texts.items():
        array = group.create_array(name, shape=(len(strings),), chunks=(max(1, len(strings)),), dtype="string")
        array[...] = np.array(strings, dtype=object)


def _write_hdf5(path: Path, arrays: Arrays, texts: Texts, source: dict[str, str]) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        file.attrs.update(source)
        for name, values in arrays.items():
            file.create_dataset(name, data=values)
        for name, strings in texts.items():
            file.create_dataset(name, data=np.array(strings, dtype=object), dtype=h5py.string_dtype("utf-8"))


_WRITERS: dict[str, Callable[[Path, Arrays, Texts, dict[str, str]], None]] = {
    "npz": _write_npz, "parquet": _write_parquet, "csv": _write_csv, "zarr": _write_zarr, "hdf5": _write_hdf5,
}  # fmt: skip
