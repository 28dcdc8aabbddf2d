"""Looking after what is cached: what there is (ls), what one store is made of (info), taking it along (export)."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import zarr

from embcache.data.dataset import ImageDataset, read_snapshot
from embcache.errors import DatasetError, StoreError, UsageError
from embcache.paths import PathLike, home_dir
from embcache.store.feature_store import FeatureStore, store_folders

# Rows written at once: some 8 MB of 2048 float32.
_BLOCK = 1024
_SUFFIXES = {".npz": "npz", ".parquet": "parquet", ".csv": "csv", ".zarr": "zarr", ".h5": "hdf5", ".hdf5": "hdf5"}


@dataclass(frozen=True)
class CachedStore:
    """One row of ``embcache ls``.

    Attributes
    ----------
    dataset, backbone, fingerprint : str
        Whose features these are, and the first 12 digits of the recipe's fingerprint.
    rows, quarantined : int
        Images with features, and those that could not be read, of those in the dataset's snapshot.
    owed : int
        Images of the snapshot, or of published plans, that have no row yet; 0 when the store is complete.
    format, precision, transform : str
        The transform is in words.
    bytes : int
        On disk, whole store.
    path : Path
        The store's folder.
    problem : str
        What is wrong with it; ``""`` if nothing is. The numbers mean nothing then.
    """

    dataset: str
    backbone: str
    fingerprint: str
    rows: int
    quarantined: int
    owed: int
    format: str
    precision: str
    transform: str
    bytes: int
    path: Path
    problem: str = ""

    @property
    def complete(self) -> bool:
        """Whether every image of the dataset has a row."""
        return not self.owed and not self.problem


@dataclass(frozen=True)
class StoreInfo:
    """What ``embcache info`` says of one store, besides what the store says itself."""

    store: FeatureStore
    summary: CachedStore
    shards: int
    uncommitted: tuple[int, ...]
    superseded: int
    view: Path | None

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON data."""
        store, summary = self.store, self.summary
        return {
            "dataset": summary.dataset,
            "backbone": summary.backbone,
            "fingerprint": store.recipe.fingerprint,
            "path": str(store.path),
            "rows": summary.rows,
            "row_shape": list(store.row_shape),
            "quarantined": store.quarantined,
            "owed": summary.owed,
            "complete": summary.complete,
            "superseded": self.superseded,
            "shards": self.shards,
            "uncommitted": list(self.uncommitted),
            "format": store.format,
            "bytes": summary.bytes,
            "view": None if self.view is None else str(self.view),
            "recipe": store.recipe.to_json(),
            "created_with": {
                "rows_per_shard": store.rows_per_shard,
                "batch_size": store.batch_size,
                "threads": store.threads,
                **store.provenance,
            },
        }


def list_cached(home: PathLike | None = None, dataset: str | None = None) -> list[CachedStore]:
    """Describe every store under ``home``; one that is damaged is listed with its problem."""
    rows, snapshots = [], dict[Path, tuple[str, list[str] | None]]()
    for path in store_folders(home, dataset):
        if path.parent not in snapshots:
            snapshots[path.parent] = _snapshot(path.parent, home)
        name, ids = snapshots[path.parent]
        try:
            rows.append(_summarise(FeatureStore(path), name, ids))
        except StoreError as error:
            problem = f"{error.problem} ({error.where})" if error.where else error.problem
            backbone, _, fingerprint = path.name.rpartition("-")
            rows.append(
                CachedStore(name, backbone, fingerprint, 0, 0, 0, "", "", "", _folder_bytes(path), path, problem)
            )
    return rows


def count_runs(home: PathLike | None = None) -> dict[str, int]:
    """Runs kept of each dataset, by the name of its folder."""
    counts = {}
    for folder in sorted(home_dir(home).glob("*/runs")):
        number = sum(path.is_dir() and not path.name.startswith(".") for path in folder.iterdir())
        if number:
            counts[folder.parent.name] = number
    return counts


def store_info(store: FeatureStore, home: PathLike | None = None) -> StoreInfo:
    """Describe one store in full.

    Raises
    ------
    CorruptStoreError
        Bytes on disk are not those that were committed.
    """
    name, ids = _snapshot(store.path.parent, home or store.path.parent.parent)
    whole = FeatureStore(store.path)
    plans, committed = whole.plans(), whole.committed()
    live = len(whole.ids) + len(whole.quarantined)
    view = next((path for path in (store.path / "view.zarr", store.path / "view.h5") if path.exists()), None)
    return StoreInfo(
        store=store if ids is None else whole.restrict(ids),
        summary=_summarise(whole, name, ids),
        shards=len(committed),
        uncommitted=tuple(number for number in plans if number not in committed),
        superseded=sum(len(plans[number]) for number in committed) - live,
        view=view,
    )


def transform_words(transform: Mapping[str, Any]) -> str:
    """A transform's geometry in a few words: ``paper: resize 256×256, crop 224×224, bilinear``."""

    def size(value: Any) -> str:
        return "×".join(map(str, value)) if isinstance(value, list) else str(value)

    words = [f"{verb} {size(transform[verb])}" for verb in ("resize", "crop") if transform.get(verb)]
    if not words and transform.get("size"):
        words = [f"as it is, {size(transform['size'])}"]
    if transform.get("resize") and transform.get("interpolation"):
        words.append(str(transform["interpolation"]))
    kind = transform.get("kind")
    return (f"{kind}: " if kind and words else str(kind or "")) + ", ".join(words)


def export_features(
    store: FeatureStore,
    ds: ImageDataset,
    target: PathLike,
    *,
    format: str | None = None,
    overwrite: bool = False,
) -> int:
    """Write the features of a dataset, with its labels, as one file (or one Zarr folder) for other tools.

    Rows are in the dataset's order; quarantined images are left out. npz, Zarr and HDF5 hold the arrays ``features``
    (n, \\*row_shape), ``ids``, ``labels``, ``groups``, ``split`` and ``class_names``; Parquet and CSV the columns
    ``id, label, class_name, group, split, f0, f1, …`` (features flattened row-major).

    Parameters
    ----------
    store : FeatureStore
        From :func:`embcache.open_store`.
    ds : ImageDataset
        Gives labels, groups and splits.
    target : path-like
        The file; it appears whole or not at all.
    format : {"npz", "parquet", "csv", "zarr", "hdf5"}, optional
        Default: what the target's suffix says.
    overwrite : bool
        Replace a target that is there.

    Returns
    -------
    int
        Rows written.

    Raises
    ------
    UsageError
        The format is unknown or the target is there already.
    StoreError
        The store is not complete for this dataset, or the target cannot be written.
    """
    path = Path(target)
    kind = format or _SUFFIXES.get(path.suffix.lower())
    if kind not in _WRITERS:
        raise UsageError(
            "the format of the export is not known",
            expected=" | ".join(_WRITERS),
            found=repr(format) if format else f"a target called {path.name}",
            fix="--format npz, or a target that ends in .npz, .parquet, .csv, .zarr or .h5",
        )
    shown = store.restrict(ds.table["id"])
    features, labels, groups = shown.arrays(ds)
    splits = dict(zip(ds.table["id"], ds.table["split"], strict=True))
    rows = _Export(
        ids=shown.ids.tolist(),
        labels=labels,
        groups=groups.tolist(),
        split=[str(splits[id_]) for id_ in shown.ids.tolist()],
        features=features,
        class_names=list(ds.class_names),
        source={"dataset": ds.name, "backbone": store.recipe.backbone, "fingerprint": store.recipe.fingerprint},
    )
    with _replacing(path, overwrite) as staged:
        _WRITERS[kind](staged, rows)
    return len(rows.ids)


@dataclass(frozen=True)
class _Export:
    ids: list[str]
    labels: np.ndarray  # int64 (n,)
    groups: list[str]
    split: list[str]
    features: np.ndarray  # (n, *row_shape)
    class_names: list[str]
    source: dict[str, str]

    def strings(self) -> dict[str, list[str]]:
        return {"ids": self.ids, "groups": self.groups, "split": self.split, "class_names": self.class_names}

    def table(self) -> pa.Table:
        flat = self.features.reshape(len(self.ids), -1)
        names = [self.class_names[label] if label >= 0 else "" for label in self.labels.tolist()]
        columns = {
            "id": pa.array(self.ids, pa.string()),
            "label": pa.array(self.labels),
            "class_name": pa.array(names, pa.string()),
            "group": pa.array(self.groups, pa.string()),
            "split": pa.array(self.split, pa.string()),
            **{f"f{i}": pa.array(np.ascontiguousarray(flat[:, i])) for i in range(flat.shape[1])},
        }
        metadata = {**self.source, "class_names": json.dumps(self.class_names, ensure_ascii=False)}
        return pa.table(columns).replace_schema_metadata(metadata)


def _write_npz(path: Path, rows: _Export) -> None:
    arrays: dict[str, Any] = {"features": rows.features, "labels": rows.labels}
    arrays |= {name: np.array(values, dtype=np.str_) for name, values in {**rows.strings(), **rows.source}.items()}
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _write_parquet(path: Path, rows: _Export) -> None:
    pq.write_table(rows.table(), path)


def _write_csv(path: Path, rows: _Export) -> None:
    pyarrow.csv.write_csv(rows.table(), path)


def _write_zarr(path: Path, rows: _Export) -> None:
    group = zarr.open_group(path, mode="w-", zarr_format=3, attributes=dict(rows.source))
    for name, values in (("features", rows.features), ("labels", rows.labels)):
        chunks = (min(_BLOCK, max(1, len(values))), *values.shape[1:])
        group.create_array(name, shape=values.shape, chunks=chunks, dtype=values.dtype)[...] = values
    for name, strings in rows.strings().items():
        array = group.create_array(name, shape=(len(strings),), chunks=(max(1, len(strings)),), dtype="string")
        array[...] = np.array(strings, dtype=object)


def _write_hdf5(path: Path, rows: _Export) -> None:
    with h5py.File(path, "w") as file:
        file.attrs.update(rows.source)
        file.create_dataset("features", data=rows.features)
        file.create_dataset("labels", data=rows.labels)
        for name, strings in rows.strings().items():
            file.create_dataset(name, data=np.array(strings, dtype=object), dtype=h5py.string_dtype("utf-8"))


_WRITERS: dict[str, Callable[[Path, _Export], None]] = {
    "npz": _write_npz,
    "parquet": _write_parquet,
    "csv": _write_csv,
    "zarr": _write_zarr,
    "hdf5": _write_hdf5,
}


@contextmanager
def _replacing(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a path to write beside ``target``; what is there takes its name at the end, or is removed on an error."""
    if target.exists() and not overwrite:
        raise UsageError("the target is there already", where=target, fix="another name, or --force to replace it")
    if target.is_dir() and not (target / "zarr.json").is_file():
        # --force is for what an export made: no slip of a name may delete a folder of images.
        raise UsageError("the target is a folder and not a Zarr group", where=target, fix="another name")
    staged = target.with_name(f".{target.name}-{secrets.token_hex(8)}")
    try:
        yield staged
        for path in [staged, *staged.rglob("*")]:
            _flush(path)
        if target.is_dir():
            shutil.rmtree(target)
        staged.replace(target)
        _flush(target.parent)
    except OSError as error:
        raise StoreError(
            "the export cannot be written",
            found=error.strerror or str(error),
            where=target,
            fix="name a target in a folder that is there and can be written, with space left",
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True) if staged.is_dir() else staged.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle to flush for a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _snapshot(folder: Path, home: PathLike | None) -> tuple[str, list[str] | None]:
    """Name and ids of the dataset whose stores lie in ``folder``; the folder's name and None without a snapshot."""
    try:
        ds = read_snapshot(folder.name, home)
    except DatasetError:
        ds = None  # says nothing of the stores; `extract` writes it anew
    return (folder.name, None) if ds is None else (ds.name, [str(id_) for id_ in ds.table["id"]])


def _summarise(store: FeatureStore, name: str, ids: Sequence[str] | None) -> CachedStore:
    owed_ids = {entry.id for entries in store.plans().values() for entry in entries} if ids is None else set(ids)
    shown = store if ids is None else store.restrict(ids)
    return CachedStore(
        dataset=name,
        backbone=store.recipe.backbone,
        fingerprint=store.recipe.fingerprint[:12],
        rows=len(shown),
        quarantined=len(shown.quarantined),
        owed=len(owed_ids.difference(shown.ids.tolist(), shown.quarantined)),
        format=store.format,
        precision=store.recipe.precision,
        transform=transform_words(store.recipe.transform),
        bytes=_folder_bytes(store.path),
        path=store.path,
    )


def _folder_bytes(folder: Path) -> int:
    # lstat: the view's links count as links, not as the chunks behind them.
    return sum((Path(root) / name).lstat().st_size for root, _, names in os.walk(folder) for name in names)
