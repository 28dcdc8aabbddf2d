"""What the store writes to disk, and in which order; with its hands, `embcache.io`.

Nothing that readers look at is ever edited. A shard is written under ``staging/``, flushed to disk file by file and
folder by folder, and renamed into place as a whole; a plan is linked into place, which fails when its number is taken.
A process killed at any instant leaves either the old state or the new one, and at most rubbish under ``staging/``,
which is never read and which the next commit of the same shard removes. So does a machine that loses its power: what
is renamed is on disk before it gets its name, and a shard never outlives the plan that it fulfils.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embcache.errors import StoreError
from embcache.io import (
    create_exclusive,
    discard,
    exclusive_prefix,
    keep_file,
    make_folder,
    remove_leftovers,
    rename_new,
    replace_file,
    staged_name,
    swap_in,
    sync_folder,
    take_aside,
    write_tree,
    writing,
)
from embcache.paths import slug
from embcache.sealed import crc32c, seal
from embcache.store.formats import FORMATS, find_format
from embcache.store.header import StoreHeader
from embcache.store.reading import (
    FOLDERS,
    check_folders,
    committed_numbers,
    read_header,
    read_live,
    read_plan,
    shard_name,
)
from embcache.store.recipe import Recipe
from embcache.store.rows import PlanEntry, ShardRows, check_ids
from embcache.store.view import view_files, view_is_current

__all__ = [
    "PlanEntry",
    "ShardRows",
    "commit_shard",
    "create_exclusive",
    "create_store",
    "discard",
    "is_committed",
    "publish_plan",
    "refresh_view",
    "replace_file",
    "replace_plan",
    "take_out",
    "write_scan",
    "write_snapshot",
    "write_view",
]


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
    """Create the store of ``recipe``, or find the one that is there."""
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
    with writing(store):
        if not store.is_dir():
            make_folder(store.parent)
            staged = store.parent / staged_name(f".{store.name}-")
            try:
                write_tree(staged, {"recipe.json": seal(header.to_json())}, FOLDERS)
                rename_new(staged, store)
            except FileNotFoundError:
                # Another process created it first and removed what we had begun.
                if not store.is_dir():
                    raise
        remove_leftovers(store.parent, f".{store.name}-")
        # Copying tools drop empty folders; and whoever made a name may have been killed before it was on disk.
        check_folders(store)
        for name in FOLDERS:
            make_folder(store / name)
        for folder in (store / "shards", store, store.parent, store.parent.parent):
            sync_folder(folder)
        _sweep(store)
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


def _sweep(store: Path) -> None:
    """Remove what killed processes and power cuts left of the shards that are committed: nobody needs it any more."""
    for number in committed_numbers(store) if any((store / "staging").iterdir()) else ():
        remove_leftovers(store / "staging", *_staged_prefixes(store, shard_name(number)))


def _staged_prefixes(store: Path, name: str) -> list[str]:
    """How names under ``staging/`` begin that a shard's rows, plan and lease are written under."""
    return [f"shard-{name}-", *(exclusive_prefix(store / folder / f"{name}.json") for folder in ("plan", "leases"))]


def publish_plan(store: Path, number: int, entries: Sequence[PlanEntry]) -> bool:
    """Publish the rows that shard ``number`` owes, once and for all."""
    store = Path(store)
    check_ids([entry.id for entry in entries])
    limit = read_header(store).rows_per_shard
    if len(entries) > limit or number < 0:
        raise StoreError("a plan does not fit its shard", expected=f"1 to {limit} rows", found=f"{len(entries)} rows")
    path = store / "plan" / f"{shard_name(number)}.json"
    return create_exclusive(path, _sealed_plan(number, entries), staging=store / "staging")


def _sealed_plan(number: int, entries: Sequence[PlanEntry]) -> bytes:
    rows = [[entry.id, entry.size, entry.mtime_ns, entry.digest] for entry in entries]
    return seal({"number": number, "rows": rows}, indent=None)


def commit_shard(
    store: Path,
    number: int,
    rows: ShardRows,
    *,
    batch_size: int | None = None,
    threads: int | None = None,
    damaged: bool = False,
) -> bool:
    """Commit the computed rows of shard ``number``; on return they are on disk, whoever wrote them."""
    store = Path(store)
    header, name = read_header(store), shard_name(number)
    header.check_rows(rows, [entry.id for entry in read_plan(store, number)])
    target = store / "shards" / name
    with writing(store):
        won = False
        if damaged or not target.is_dir():
            staged = store / "staging" / staged_name(f"shard-{name}-")
            files = FORMATS[header.format].encode_shard(rows.blanked(), header.rows_per_shard)
            record = {name: {"size": len(data), "crc32c": crc32c(data)} for name, data in sorted(files.items())}
            made = {"batch_size": batch_size, "threads": threads}
            unusual = {name: n for name, n in made.items() if n is not None and n != getattr(header, name)}
            files["commit.json"] = seal({"rows": len(rows.ids), "files": record, **unusual})
            # The plan may be another process's, killed before its name was on disk: no shard without its plan.
            sync_folder(store / "plan")
            try:
                write_tree(staged, files)
                if damaged:
                    swap_in(staged, target)
                won = damaged or rename_new(staged, target)
            except FileNotFoundError:
                # Whoever commits first removes what others have staged for the same shard.
                if not target.is_dir():
                    raise
        sync_folder(target.parent)
        # Whoever published the plan, or took the lease, may have been killed just after it.
        remove_leftovers(store / "staging", *_staged_prefixes(store, name))
    return won


def is_committed(store: Path, number: int) -> bool:
    """Whether a shard is committed, without a listing of all."""
    return (Path(store) / "shards" / shard_name(number)).is_dir()


def write_view(store: Path) -> None:
    """Write ``view.zarr`` or ``view.h5``: one array over all shards, for readers without embcache.

    ``valid`` is False for padding, superseded and quarantined rows. Features are not copied: chunks are relative links
    into the shards, or a virtual dataset with relative names, so that a store can be moved. Where links cannot be
    made, chunks are copied.
    """
    store = Path(store)
    header = read_header(store)
    view = store / FORMATS[header.format].view
    while True:
        live = read_live(store, header)
        files, links = view_files(header, live)
        # Relative to where a link will lie, not to where it is staged.
        targets = {link: (os.path.relpath(target, Path(link).parent), store / target) for link, target in links.items()}
        staged = store / "staging" / staged_name("view-")
        with writing(store):
            try:
                write_tree(staged, files, links=targets)
                swap_in(staged / view.name, view)
            except FileNotFoundError:
                # Another process wrote its view first and removed ours from staging.
                if not view.exists():
                    raise
            sync_folder(store)
            remove_leftovers(store / "staging", "view-")
        # What another process committed meanwhile is in its view: ours may just have replaced it, or removed it from
        # staging.
        if view_is_current(store, header, committed_numbers(store)):
            return


def refresh_view(store: Path) -> bool:
    """Write the view unless it shows the shards that are committed; True when it was written.

    A run that is killed between its last commit and its view leaves this to the next one.
    """
    store = Path(store)
    if view_is_current(store, read_header(store), committed_numbers(store)):
        remove_leftovers(store / "staging", "view-")
        return False
    write_view(store)
    return True


def write_snapshot(dataset_dir: Path, parquet: bytes) -> None:
    """Write the snapshot of a dataset's table, ``dataset.parquet``, beside its stores."""
    replace_file(Path(dataset_dir) / "dataset.parquet", parquet)


def write_scan(dataset_dir: Path, parquet: bytes) -> None:
    """Write the last scan of a dataset's files, ``scan.parquet``, beside its stores; it only saves work."""
    keep_file(Path(dataset_dir) / "scan.parquet", parquet)


def take_out(store: Path, path: Path, label: str) -> None:
    """Remove a file or folder of a store, at once for all who know its name; none there (any more) is as well."""
    aside = Path(store) / "staging" / staged_name(f"{label}-")
    if take_aside(path, aside):
        discard(aside)


def replace_plan(store: Path, number: int, entries: Sequence[PlanEntry]) -> None:
    """Write the plan of a shard that is there anew, in place of one that is missing or damaged."""
    replace_file(Path(store) / "plan" / f"{shard_name(number)}.json", _sealed_plan(number, entries))
