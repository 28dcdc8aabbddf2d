"""The only module of the store that writes to disk.

Nothing that readers look at is ever edited. A shard is written under ``staging/``, flushed to disk file by file and
folder by folder, and renamed into place as a whole; a plan is linked into place, which fails when its number is taken.
A process killed at any instant leaves either the old state or the new one, and at most rubbish under ``staging/``,
which is never read and which the next commit of the same shard removes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from embcache.errors import StoreError
from embcache.paths import slug
from embcache.store.formats import FORMATS, find_format
from embcache.store.header import StoreHeader
from embcache.store.reading import (
    read_header,
    read_live,
    read_plan,
    shard_name,
)
from embcache.store.recipe import Recipe
from embcache.store.rows import PlanEntry, ShardRows, check_ids
from embcache.store.sealed import crc32c, seal
from embcache.store.view import view_files

__all__ = [
    "PlanEntry",
    "ShardRows",
    "commit_shard",
    "create_store",
    "publish_plan",
    "write_scan",
    "write_snapshot",
    "write_view",
]

_TAKEN = (errno.EEXIST, errno.ENOTEMPTY)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_FIXES = {
    errno.ENOSPC: "free space there, then run the same command: what is committed stays",
    errno.EDQUOT: "raise the quota or free space, then run the same command: what is committed stays",
    errno.EACCES: "make the folder writable, or give --home FOLDER",
    errno.EROFS: "give --home FOLDER on a disk that can be written",
}


def create_store(
    dataset_dir: Path,
    recipe: Recipe,
    *,
    format: str | None = None,
    row_shape: Sequence[int],
    rows_per_shard: int,
    batch_size: int,
    threads: int,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Create the store of ``recipe``, or find the one that is there.

    Parameters
    ----------
    dataset_dir : Path
        Folder of the dataset's stores, ``<home>/<slug of its name>``.
    recipe : Recipe
        Its fingerprint names the store's folder.
    format : {"zarr", "hdf5"}, optional
        Default: that of the store that is there, Zarr for a new one.
    row_shape : sequence of int
        Shape of one row of features, such as ``(2048,)``.
    rows_per_shard, batch_size, threads : int
        Settled at creation: a store that is there keeps its own.
    provenance : mapping of str to JSON, optional
        Where the features come from, for people; no part of the recipe.

    Returns
    -------
    Path
        The store's folder.

    Raises
    ------
    StoreError
        The store that is there has another format or row shape.
    UsageError
        The format is unknown.
    """
    header = StoreHeader(
        recipe=recipe,
        format=find_format(format or "zarr").name,
        row_shape=tuple(int(size) for size in row_shape),
        rows_per_shard=int(rows_per_shard),
        batch_size=int(batch_size),
        threads=int(threads),
        provenance=dict(provenance or {}),
    )
    store = Path(dataset_dir) / f"{slug(recipe.backbone)}-{recipe.fingerprint[:12]}"
    with _writing(store):
        if not store.is_dir():
            _make_folder(store.parent)
            staged = store.parent / f".{store.name}-{secrets.token_hex(8)}"
            try:
                _write_tree(staged, {"recipe.json": seal(header.to_json())}, ("plan", "shards", "leases", "staging"))
                _rename_new(staged, store)
            except FileNotFoundError:
                # Another process created it first and removed what we had begun.
                if not store.is_dir():
                    raise
            _sync_folder(store.parent)
            _remove_leftovers(store.parent, f".{store.name}-")
    there = read_header(store)
    if there.recipe != recipe or there.row_shape != header.row_shape:
        raise StoreError(
            "the store that is there holds something else",
            expected=f"rows of shape {header.row_shape}, recipe {recipe.fingerprint}",
            found=f"rows of shape {there.row_shape}, recipe {there.recipe.fingerprint}",
            where=store,
        )
    if format is not None and there.format != format:
        raise StoreError(
            "a store has one format, and this one is there in the other",
            expected=format,
            found=there.format,
            where=store,
            fix=f"leave out --format, or give --format {there.format}; `embcache export` writes other formats",
        )
    return store


def publish_plan(store: Path, number: int, entries: Sequence[PlanEntry]) -> bool:
    """Publish the rows that shard ``number`` owes, once and for all.

    Returns
    -------
    bool
        False when the number is taken: look again at what is owed.

    Raises
    ------
    StoreError
        There are no entries or more than the store's ``rows_per_shard``, an id is repeated, or the disk refuses.
    """
    store = Path(store)
    check_ids([entry.id for entry in entries])
    limit = read_header(store).rows_per_shard
    if len(entries) > limit or number < 0:
        raise StoreError("a plan does not fit its shard", expected=f"1 to {limit} rows", found=f"{len(entries)} rows")
    rows = [[entry.id, entry.size, entry.mtime_ns, entry.digest] for entry in entries]
    sealed = seal({"number": number, "rows": rows}, indent=None)
    return create_exclusive(store / "plan" / f"{shard_name(number)}.json", sealed, staging=store / "staging")


def commit_shard(
    store: Path, number: int, rows: ShardRows, *, batch_size: int | None = None, threads: int | None = None
) -> bool:
    """Commit the computed rows of shard ``number``; on return they are on disk, whoever wrote them.

    Parameters
    ----------
    store : Path
        The store's folder.
    number : int
        Of a published plan.
    rows : ShardRows
        As planned.
    batch_size, threads : int, optional
        With which they were computed; recorded where that is not with which the store was created.

    Returns
    -------
    bool
        False when another process committed the shard first; ``rows`` are discarded then.

    Raises
    ------
    StoreError
        The rows are not the planned ones, differ from the store's shape or dtype, or the disk refuses.
    """
    store = Path(store)
    header, name = read_header(store), shard_name(number)
    header.check_rows(rows, [entry.id for entry in read_plan(store, number)])
    target, prefix = store / "shards" / name, f"shard-{name}-"
    with _writing(store):
        won = False
        if not target.is_dir():
            staged = store / "staging" / (prefix + secrets.token_hex(8))
            files = FORMATS[header.format].encode_shard(rows.blanked(), header.rows_per_shard)
            record = {name: {"size": len(data), "crc32c": crc32c(data)} for name, data in sorted(files.items())}
            made = {"batch_size": batch_size, "threads": threads}
            unusual = {name: n for name, n in made.items() if n is not None and n != getattr(header, name)}
            files["commit.json"] = seal({"rows": len(rows.ids), "files": record, **unusual})
            try:
                _write_tree(staged, files)
                won = _rename_new(staged, target)
            except FileNotFoundError:
                # Whoever commits first removes what others have staged for the same shard.
                if not target.is_dir():
                    raise
        _sync_folder(target.parent)
        _remove_leftovers(store / "staging", prefix)
    return won


def write_view(store: Path) -> None:
    """Write ``view.zarr`` or ``view.h5``: one array over all shards, for readers without embcache.

    ``valid`` is False for padding, superseded and quarantined rows. Features are not copied: chunks are relative links
    into the shards, or a virtual dataset with relative names, so that a store can be moved. Where links cannot be
    made, chunks are copied.
    """
    store = Path(store)
    header = read_header(store)
    files, links = view_files(header, read_live(store, header))
    view = store / FORMATS[header.format].view
    staged = store / "staging" / f"view-{secrets.token_hex(8)}"
    with _writing(store):
        try:
            _write_tree(staged, files)
            for link, target in links.items():
                # Relative to where the link will lie, not to where it is staged.
                _link_or_copy(staged / link, os.path.relpath(target, Path(link).parent), store / target)
            _swap_in(staged / view.name, view)
        except FileNotFoundError:
            # Another process wrote its view first and removed ours from staging.
            if not view.exists():
                raise
        _sync_folder(store)
        _remove_leftovers(store / "staging", "view-")


def write_snapshot(dataset_dir: Path, parquet: bytes) -> None:
    """Write the snapshot of a dataset's table, ``dataset.parquet``, beside its stores."""
    replace_file(Path(dataset_dir) / "dataset.parquet", parquet)


def write_scan(dataset_dir: Path, parquet: bytes) -> None:
    """Write the last scan of a dataset's files, ``scan.parquet``, beside its stores."""
    replace_file(Path(dataset_dir) / "scan.parquet", parquet)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old bytes or the new ones, and nothing between; makes its folder."""
    prefix = f".{path.name}-"
    with _writing(path):
        _make_folder(path.parent)
        if not (path.is_file() and path.read_bytes() == data):
            staged = path.with_name(prefix + secrets.token_hex(8))
            try:
                _write_file(staged, data)
                staged.replace(path)
            except FileNotFoundError:
                # Another process wrote the same file and removed what we had begun: ours counts as overwritten.
                if not path.exists():
                    raise
            _sync_folder(path.parent)
        _remove_leftovers(path.parent, prefix)


def create_exclusive(path: Path, data: bytes, *, staging: Path) -> bool:
    """Write a file that must not be there yet, whole or not at all; False when it is there."""
    prefix = f"{path.parent.name}-{path.name}-"
    staged = staging / (prefix + secrets.token_hex(8))
    with _writing(path):
        won = False
        if not path.exists():
            _write_file(staged, data)
            won = _link_new(staged, path)
        _sync_folder(path.parent)
        _remove_leftovers(staging, prefix)
    return won


def remove_file(path: Path) -> None:
    """Remove a file; none there is as well."""
    path.unlink(missing_ok=True)


def move_file(path: Path, target: Path) -> bool:
    """Rename a file; False when it is not there (any more)."""
    try:
        path.rename(target)
    except FileNotFoundError:
        return False
    return True


def touch_file(path: Path) -> None:
    """Set a file's modification time to now, by the clock of the filesystem."""
    os.utime(path)


@contextmanager
def _writing(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(
            "the feature store cannot be written",
            found=error.strerror or str(error),
            where=error.filename or where,
            fix=_FIXES.get(error.errno or 0, "check the disk, then run the same command: what is committed stays"),
        ) from error


def _write_file(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)  # on a full disk what was half written must not take space
            raise


def _write_tree(root: Path, files: Mapping[str, bytes], folders: Sequence[str] = ()) -> None:
    """Write files and empty folders under a new folder ``root`` and flush all of it to disk."""
    made = {root}
    root.mkdir()
    try:
        for name in [*(str(Path(file).parent) for file in files), *folders]:
            (root / name).mkdir(parents=True, exist_ok=True)
            made.update(root / part for part in (Path(name), *Path(name).parents))
        for name, data in files.items():
            _write_file(root / name, data)
        for folder in sorted(made, key=lambda folder: -len(folder.parts)):
            _sync_folder(folder)
    except OSError:
        shutil.rmtree(root, ignore_errors=True)
        raise


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, each flushed to disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # Windows has no handle to flush for a folder
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_new(staged: Path, target: Path) -> bool:
    """Rename a folder to a name that must be free; False, and the folder removed, when it is taken."""
    try:
        staged.rename(target)
    except OSError as error:
        if error.errno not in _TAKEN or not target.is_dir():
            raise
        shutil.rmtree(staged, ignore_errors=True)
        return False
    return True


def _swap_in(staged: Path, target: Path) -> None:
    """Put a file or folder in the place of another one."""
    if staged.is_file():
        staged.replace(target)
        return
    for _ in range(100):
        try:
            staged.rename(target)
            return
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        if _exchange(staged, target):
            return
        # No atomic exchange here: for an instant there is no view. Another process may do the same: look again.
        move_file(target, staged.with_name(f"{staged.name}-{secrets.token_hex(4)}"))
    raise StoreError("another process keeps writing the view", where=target)


def _link_new(staged: Path, path: Path) -> bool:
    """Give a staged file a name that must be free; False when it is taken."""
    try:
        os.link(staged, path)
    except FileExistsError:
        return False
    except FileNotFoundError:
        # Only who takes the name removes what others have staged for it.
        if staged.exists() or not (staged.parent.is_dir() and path.parent.is_dir()):
            raise
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A filesystem without hard links. Between look and rename another process may publish the same number; that
        # costs work only, since a shard's own ids say what it holds.
        if path.exists():
            return False
        staged.rename(path)
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders atomically, where the kernel and the filesystem can (Linux, renameat2)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    at_cwd, exchange = -100, 2
    return bool(rename and rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0)


def _link_or_copy(link: Path, relative: str, source: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        link.symlink_to(relative)
    except (OSError, NotImplementedError):
        shutil.copyfile(source, link)


def _remove_leftovers(folder: Path, prefix: str) -> None:
    for path in folder.glob(prefix + "*"):
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
