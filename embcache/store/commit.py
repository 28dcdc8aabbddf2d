"""What the store writes to disk, and in which order; `embcache.io` makes the calls.

Nothing that readers look at is ever edited. A shard is written under ``staging/``, flushed to disk file by file and
folder by folder, and renamed into place as a whole; a plan is linked into place, which fails when its number is taken.
A process killed at any instant leaves either the old state or the new one, and at most rubbish under ``staging/``,
which is never read and which the next commit of the same shard removes. So does a machine that loses its power: what
is renamed is on disk before it gets its name, and a shard never outlives the plan that it fulfils.
"""

from __future__ import annotations

import itertools
import json
import os
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from embcache import io as disk
from embcache.errors import StoreError, UsageError, check_choice
from embcache.mirror import Mirror
from embcache.paths import slug
from embcache.sealed import crc32c, seal
from embcache.store import reading
from embcache.store.schema import FORMATS, Recipe, StoreHeader, check_ids, find_format, plan_rows
from embcache.store.schema import PlanEntry as PlanEntry
from embcache.store.schema import PlannedRange as PlannedRange
from embcache.store.schema import ShardRows as ShardRows

MOST_VIEW_ROWS = 1 << 26  # each takes memory while the view is made; shard numbers come from folder names
REFERENCES = "view.refs.json"  # the view of a store in an object store
# The library that a format's view is written with: another version of it may write other bytes for the same view.
_LIBRARIES = {"zarr": "zarr", "hdf5": "h5py"}


def store_path(dataset_dir: Path, recipe: Recipe) -> Path:
    """Folder of the store of a recipe, whether or not it is there."""
    path = Path(dataset_dir) / f"{slug(recipe.backbone)}-{recipe.fingerprint[:12]}"
    if recipe.nameless:  # it may have been made under another name
        return min(Path(dataset_dir).glob(f"*-{recipe.fingerprint[:12]}"), default=path)
    return path


def create_store(
    dataset_dir: Path,
    recipe: Recipe,
    *,
    format: str | None = None,
    canaries: Callable[[], np.ndarray] | None = None,
    **settled: Any,
) -> Path:
    """Create the store of ``recipe``, or find the existing one.

    ``settled`` are the other fields of a `StoreHeader`; ``canaries`` makes the features of the drawn images of a store
    that is not there yet.
    """
    check_choice("--format", format or "zarr", FORMATS)
    if format == "hdf5" and disk.mirror_of(Path(dataset_dir)):
        raise UsageError(
            "a store in an object store is Zarr: HDF5 readers need whole files on a disk", code="format-in-place",
            found="--format hdf5", fix="--format zarr; `embcache export` writes HDF5 files",
        )  # fmt: skip
    header = StoreHeader(recipe, format or "zarr", tuple(settled.pop("row_shape")), **settled)
    store, files = store_path(Path(dataset_dir), recipe), {"recipe.json": seal(header.to_json())}
    if canaries is not None and not store.is_dir():
        values = np.ascontiguousarray(canaries(), dtype="<f4")
        content = {"shape": list(values.shape), "features": values.tobytes().hex()}
        files[reading.CANARIES] = seal(content, indent=None)
    with disk.writing(store):
        if not store.is_dir():
            disk.make_folder(store.parent)
            staged = store.parent / disk.staged_name(f".{store.name}-")
            if disk.mirror_of(store):
                for name in sorted(files):  # recipe.json, by which a store exists, is the last
                    disk.create_exclusive(store / name, files.pop(name), staging=store)
            try:
                disk.write_tree(staged, files, reading.FOLDERS)
                disk.rename_new(staged, store)
            except FileNotFoundError:
                # Another process created it first and removed what we had begun.
                if not store.is_dir():
                    raise
        disk.remove_leftovers(store.parent, f".{store.name}-")
        # Copying tools drop empty folders; and a process may have been killed before the names it made were on disk.
        reading.check_folders(store)
        for name in reading.FOLDERS:
            disk.make_folder(store / name)
        for folder in (store / "shards", store, store.parent, store.parent.parent):
            disk.sync_folder(folder)
        # What killed processes and power cuts left of committed shards: no process needs it any more.
        for number in reading.committed_numbers(store) if any((store / "staging").iterdir()) else ():
            disk.remove_leftovers(store / "staging", *_staged_prefixes(store, number))
    there = reading.read_header(store)
    if there.recipe.fingerprint != recipe.fingerprint or there.row_shape != header.row_shape:
        raise StoreError(
            "the existing store holds something else", code="store-mismatch",
            expected=f"rows of shape {header.row_shape}, recipe {recipe.fingerprint}",
            found=f"rows of shape {there.row_shape}, recipe {there.recipe.fingerprint}", where=store,
        )  # fmt: skip
    if format is not None and there.format != format:
        raise StoreError(
            "a store has one format, and this one exists in the other", code="store-format-differs",
            expected=format, found=there.format, where=store,
            fix=f"leave out --format, or give --format {there.format}; `embcache export` writes other formats",
        )  # fmt: skip
    return store


def _staged_prefixes(store: Path, number: int) -> list[str]:
    """How names under ``staging/`` begin that a shard's rows, plan and lease are written under."""
    lease = store / "leases" / f"{reading.shard_name(number)}.json"
    plan = reading.plan_path(store, number)
    prefixes = [disk.exclusive_prefix(plan), disk.exclusive_prefix(lease)]
    return [f"shard-{reading.shard_name(number)}-", *prefixes]


def publish_plan(store: Path, number: int, entries: Sequence[PlanEntry]) -> bool:
    """Publish the rows that shard ``number`` owes, once and for all; False where the number is taken."""
    store = Path(store)
    check_ids([entry.id for entry in entries])
    limit = reading.read_header(store).rows_per_shard
    if len(entries) > limit or number < 0:
        raise StoreError(
            "a plan does not fit its shard", code="plan-size", expected=f"1 to {limit} rows",
            found=f"{len(entries)} rows",
        )  # fmt: skip
    path, staging = reading.plan_path(store, number), store / "staging"
    return disk.create_exclusive(path, _sealed_plan(number, entries), staging=staging)


def publish_range(store: Path, number: int, planned: PlannedRange) -> bool:
    """`publish_plan` of a range of rows of a partition; the plan names them and does not list them."""
    path, staging = reading.plan_path(store, number), store / "staging"
    return disk.create_exclusive(path, seal({"number": number, **planned.to_json()}, indent=None), staging=staging)


def replace_plan(store: Path, number: int, entries: Sequence[PlanEntry]) -> None:
    """Write the plan of a shard in place of one that is missing or damaged."""
    disk.replace_file(reading.plan_path(Path(store), number), _sealed_plan(number, entries))


def _sealed_plan(number: int, entries: Sequence[PlanEntry]) -> bytes:
    return seal({"number": number, "rows": plan_rows(entries)}, indent=None)


def commit_shard(
    store: Path,
    number: int,
    rows: ShardRows,
    *,
    batch_size: int | None = None,
    threads: int | None = None,
    runtime: str | None = None,
    damaged: bool = False,
) -> bool:
    """Commit the computed rows of shard ``number``; on return they are on disk, whichever process wrote them."""
    store = Path(store)
    header, name, target = reading.read_header(store), reading.shard_name(number), reading.shard_path(store, number)
    header.check_rows(rows, [entry.id for entry in reading.read_plan(store, number)])
    mirror = disk.mirror_of(store)
    with disk.writing(store):
        won = False
        if damaged or not is_committed(store, number):
            staged = store / "staging" / disk.staged_name(f"shard-{name}-")
            files = find_format(header.format).encode_shard(rows.blanked(), header.rows_per_shard)
            record = {name: {"size": len(data), "crc32c": crc32c(data)} for name, data in sorted(files.items())}
            made = {"batch_size": batch_size, "threads": threads, "runtime": runtime}
            unusual = {name: n for name, n in made.items() if n is not None and n != vars(header)[name]}
            content = {"rows": len(rows.ids), "files": record, **unusual}
            if mirror and damaged and not mirror.restore_folder(target, files, content):
                raise StoreError(
                    "the shard computed now is not the one that was committed, and a commit in an object store is "
                    "final", code="shard-differs", expected="the bytes that its commit names", found="other bytes",
                    where=target, fix="repair it on a machine, and with the threads, that made it",
                )  # fmt: skip
            if mirror and damaged:
                return True
            if mirror:
                return mirror.commit_folder(target, files, content)
            files["commit.json"] = seal(content)
            # The plan may be another process's, killed before its name was on disk: no shard without its plan.
            disk.sync_folder(store / "plan")
            try:
                disk.write_tree(staged, files)
                if damaged:
                    disk.swap_in(staged, target)
                won = damaged or disk.rename_new(staged, target)
            except FileNotFoundError:
                # The process that commits first removes what others have staged for the same shard.
                if not target.is_dir():
                    raise
        disk.sync_folder(target.parent)
        # The process that published the plan, or took the lease, may have been killed just after it.
        disk.remove_leftovers(store / "staging", *_staged_prefixes(store, number))
    return won


def is_committed(store: Path, number: int) -> bool:
    """Whether a shard is committed, without a listing of all."""
    target = reading.shard_path(Path(store), number)
    if mirror := disk.mirror_of(store):
        return mirror.look(target / "commit.json")
    return target.is_dir()


def write_view(store: Path) -> None:
    """Write ``view.zarr``, ``view.h5`` or ``view.refs.json``: one array over all shards, for readers without embcache.

    ``valid`` is False for padding, superseded and quarantined rows. Features are not copied: chunks are relative links
    into the shards, or a virtual dataset with relative names, so that a store can be moved. Where links cannot be
    made, chunks are copied.
    """
    store = Path(store)
    header = reading.read_header(store)
    form = find_format(header.format)
    for again in itertools.count():
        mark = _mark(store)  # first: of what is committed while the rows are read, the view may show the old ones
        files, links = form.encode_view(header, *_view_rows(header, reading.read_live(store, header), mark))
        if mirror := disk.mirror_of(store):
            disk.replace_file(store / REFERENCES, _references(mirror, store, form.view, files, links))
            mirror.refresh(store, again=True)
            if again == 2 or view_is_current(store, header):
                return  # machines that go on to commit will write theirs
            continue
        # Relative to where a link will lie, not to where it is staged.
        targets = {link: (os.path.relpath(target, Path(link).parent), store / target) for link, target in links.items()}
        staged = store / "staging" / disk.staged_name("view-")
        with disk.writing(store):
            try:
                disk.write_tree(staged, files, links=targets)
                disk.swap_in(staged / form.view, store / form.view)
            except FileNotFoundError:
                # Another process wrote its view first and removed ours from staging.
                if not (store / form.view).exists():
                    raise
            disk.sync_folder(store)
            disk.remove_leftovers(store / "staging", "view-")
        # What another process committed meanwhile is in its view: ours may just have replaced it, or removed it from
        # staging.
        if view_is_current(store, header):
            return


def _references(mirror: Mirror, store: Path, view: str, files: Mapping[str, bytes], links: Mapping[str, str]) -> bytes:
    """A view as a reference file: by key its bytes, or the address and range of an object that holds them."""
    refs: dict[str, Any] = {}
    for name, data in files.items():
        text = name.endswith("zarr.json")
        refs[name.removeprefix(f"{view}/")] = data.decode() if text else f"base64:{b64encode(data).decode()}"
    for name, target in links.items():
        shard, file = Path(*Path(target).parts[:2]), Path(*Path(target).parts[2:]).as_posix()
        size = reading.read_commit(store, int(shard.name)).files[file][0]
        refs[name.removeprefix(f"{view}/")] = [mirror.address(store / shard, file), 0, size]
    return json.dumps({"version": 1, "refs": refs}).encode()


def refresh_view(store: Path) -> bool:
    """Write the view unless it shows what is committed: a killed run leaves this to the next; True when written."""
    store = Path(store)
    if mirror := disk.mirror_of(store):
        mirror.fold(store, reading.committed_numbers(store))
    if (store.parent / "partitions.json").is_file():  # it would hold millions of IDs, and be written for each partition
        return False
    if view_is_current(store, reading.read_header(store)):
        disk.remove_leftovers(store / "staging", "view-")
        return False
    write_view(store)
    return True


def _view_rows(
    header: StoreHeader, live: reading.LiveRows, mark: str
) -> tuple[list[str], np.ndarray, Mapping[int, int], Mapping[str, str]]:
    """Ids, validity, rows per shard and attributes of a view; rows that are not live have no id and are not valid."""
    size = header.rows_per_shard * (max(live.shard_rows, default=-1) + 1)
    if size > MOST_VIEW_ROWS:
        raise StoreError(
            "a store has too many rows for a view", code="view-size", expected=f"at most {MOST_VIEW_ROWS:,}",
            found=f"{size:,}: {header.rows_per_shard:,} rows per shard, the last of them number "
            f"{max(live.shard_rows):,}",
        )  # fmt: skip
    ids, valid, rows = [""] * size, np.zeros(size, bool), live.shards * header.rows_per_shard + live.positions
    valid[rows] = live.valid
    for row, id_ in zip(rows.tolist(), live.ids, strict=True):
        ids[row] = id_
    library = _LIBRARIES[header.format]
    attributes = {
        "backbone": header.recipe.backbone,
        "fingerprint": header.recipe.fingerprint,
        "written_by": f"embcache view 1, {library} {version(library)}",
        "shards": mark,
        "rows": "use only rows with valid = true; the others are padding, superseded or unreadable",
    }
    return ids, valid, live.shard_rows, attributes


def view_is_current(store: Path, header: StoreHeader) -> bool:
    """Whether the existing view was made of just these shards; searched, not parsed: no checksum covers it."""
    view = store / (REFERENCES if disk.mirror_of(store) else find_format(header.format).view)
    try:
        data = disk.read_regular(view / "zarr.json" if disk.is_folder(view) else view)
    except OSError:
        return False
    return _mark(store).encode() in data


def _mark(store: Path) -> str:
    """What says in a view of which shards it was made: a checksum over their numbers and commits.

    Not over numbers alone: a repair may commit other rows under the same number.
    """

    def commit(number: int) -> str:
        data = reading.read_file(reading.shard_path(store, number) / "commit.json", "")
        return f"{number} {crc32c(data)}"

    commits = reading.unless_collected(store, lambda: [commit(number) for number in reading.committed_numbers(store)])
    return f"view of the shards {crc32c(' '.join(commits).encode())}"


def write_snapshot(dataset_dir: Path, parquet: bytes) -> None:
    """Write the snapshot of a dataset's table, ``dataset.parquet``, beside its stores."""
    disk.replace_file(Path(dataset_dir) / "dataset.parquet", parquet)


def write_scan(dataset_dir: Path, parquet: bytes, name: str = "scan.parquet") -> None:
    """Write the last scan of a dataset's files, or of a partition's, beside its stores; it only saves work."""
    disk.keep_file(Path(dataset_dir) / name, parquet)


def take_out(store: Path, path: Path, label: str) -> None:
    """Remove a file or folder of a store, if it exists, in one step for all processes that know its name."""
    aside = Path(store) / "staging" / disk.staged_name(f"{label}-")
    if disk.mirror_of(store):
        return disk.discard(path)
    if disk.take_aside(path, aside):
        disk.discard(aside)
