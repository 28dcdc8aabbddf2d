"""Every byte of a store against what vouches for it (``embcache verify``). Nothing here writes."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from embcache.cores import usable_cores
from embcache.data.dataset import ImageDataset
from embcache.data.images import ImageRef, image_refs, read_image
from embcache.errors import CorruptStoreError, DatasetNotFoundError, ImageError, StoreError
from embcache.io import STALE_SECONDS, is_stale, list_folder, skip
from embcache.paths import PathLike, slug
from embcache.store.feature_store import FeatureStore, folders_with
from embcache.store.header import StoreHeader
from embcache.store.lease import is_abandoned
from embcache.store.reading import (
    committed_numbers,
    misplaced,
    plan_numbers,
    read_commit,
    read_features,
    read_header,
    read_index,
    read_plan,
    shard_name,
)
from embcache.store.verified import read_file, refusals_told

_FOLDER = re.compile(r"(?P<slug>.+)-(?P<digits>[0-9a-f]{12})")
# A store's own entries; anything else in its folder is told and left alone.
_ENTRIES = {"recipe.json", "plan", "shards", "leases", "staging", "view.zarr", "view.h5"}
_AHEAD = 1024  # images handed to the threads at a time by `check_source`
_NFS = ".nfs"  # what an NFS client leaves of a file that is removed while it is open


@dataclass(frozen=True)
class Rows:
    """A run of rows of a store, numbered as in its view: row ``i`` of shard ``N`` is ``N * rows_per_shard + i``."""

    first: int
    last: int
    count: int
    first_id: str
    last_id: str


@dataclass(frozen=True)
class Damage:
    """One thing that is not as it was committed."""

    kind: str  # "recipe", "plan", "shard" or "extra"
    path: Path  # the file, or the folder where that is all that can be said
    problem: str  # in one line
    shard: int | None = None
    rows: Rows | None = None  # of the shard, as far as its plan or its index still says

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON data."""
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True)
class StoreCheck:
    """What a verification found in one store."""

    path: Path  # the store's folder
    backbone: str
    fingerprint: str
    shards: int
    rows: int
    planned: int  # rows that are planned and not computed yet; that is no damage
    files: int
    bytes: int
    damage: tuple[Damage, ...]
    notes: tuple[str, ...]  # what is worth knowing and no damage

    @property
    def dataset(self) -> str:
        """Folder name of the store's dataset."""
        return self.path.parent.name

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON data."""
        return {
            "dataset": self.dataset,
            "backbone": self.backbone,
            "fingerprint": self.fingerprint,
            "path": str(self.path),
            "shards": self.shards,
            "rows": self.rows,
            "planned": self.planned,
            "files": self.files,
            "bytes": self.bytes,
            "damage": [each.to_json() for each in self.damage],
            "notes": list(self.notes),
        }


@dataclass
class _Found:
    """What is gathered while a store is read."""

    damage: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plans: dict[int, tuple[str, ...]] = field(default_factory=dict)  # ids of the intact plans
    shards: dict[int, tuple[str, ...]] = field(default_factory=dict)  # ids of the intact shards
    files: int = 0
    bytes: int = 0

    def count(self, path: Path) -> None:
        self.files += 1
        self.bytes += path.lstat().st_size


def find_stores(
    home: PathLike | None = None,
    dataset: str | None = None,
    backbones: Sequence[str] = (),
    recipe: str | None = None,
    skipped: Callable[[PathLike, OSError], object] = skip,
) -> list[Path]:
    """Folders of stores, those without a recipe included; names of backbones may be given as folders spell them.

    ``skipped`` is told of folders that cannot be listed; raises as `embcache.store.feature_store.folders_with`.
    """
    wanted = {slug(name) for name in backbones}
    found = {path for entry in ("recipe.json", "shards") for path in folders_with(entry, home, dataset, skipped)}
    return [
        path
        for path in sorted(found)
        if (name := _FOLDER.fullmatch(path.name))
        and (not wanted or name["slug"] in wanted)
        and name["digits"].startswith((recipe or "")[:12])
    ]


def verify_store(path: Path, on_shard: Callable[[int, int], object] = lambda done, total: None) -> StoreCheck:
    """Read every file of a store and compare it with what was committed."""
    while True:
        listed = {*plan_numbers(path)}, {*committed_numbers(path)}
        check, failed = None, None
        try:
            check = _verify_once(path, on_shard)
        except CorruptStoreError as error:
            failed = error
        # What `embcache gc` removed meanwhile is no damage.
        kept = listed[0] <= {*plan_numbers(path)} and listed[1] <= {*committed_numbers(path)}
        if check is not None and (kept or not check.damage):
            return check
        if failed is not None and kept:
            raise failed


def _verify_once(path: Path, on_shard: Callable[[int, int], object]) -> StoreCheck:
    found = _Found()
    if wrong := misplaced(path):
        # Nothing is read through a link: what it leads to is not this store's.
        found.damage += [Damage("extra", each, "it is not a real folder") for each in wrong]
        return _store_check(path, None, (), found)
    header = _check_recipe(path, found)
    for number in plan_numbers(path):
        _check_plan(path, header, number, found)
    committed = committed_numbers(path)
    for done, number in enumerate(committed, start=1):
        _check_shard(path, header, number, found)
        on_shard(done, len(committed))
    _check_pairs(path, header, committed, found)
    _check_listing(path, found)
    found.notes += store_notes(path)
    return _store_check(path, header, committed, found)


def _store_check(path: Path, header: StoreHeader | None, committed: Sequence[int], found: _Found) -> StoreCheck:
    name = _FOLDER.fullmatch(path.name)
    return StoreCheck(
        path=path,
        backbone=header.recipe.backbone if header else name["slug"] if name else path.name,
        fingerprint=(header.recipe.fingerprint if header else name["digits"] if name else "")[:12],
        shards=len(committed),
        rows=sum(len(found.shards.get(number) or found.plans.get(number, ())) for number in committed),
        planned=sum(len(ids) for number, ids in found.plans.items() if number not in committed),
        files=found.files,
        bytes=found.bytes,
        damage=tuple(found.damage),
        notes=tuple(found.notes),
    )


def in_one_line(error: StoreError) -> str:
    """Problem, expectation and finding of an error, without where and how."""
    said = [("expected", error.expected), ("found", error.found)]
    text = error.problem + "".join(f"; {label} {value}" for label, value in said if value)
    return " ".join(text.split())


def _check_recipe(path: Path, found: _Found) -> StoreHeader | None:
    file = path / "recipe.json"
    try:
        header = read_header(path)
    except StoreError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error, CorruptStoreError):
            raise
        found.damage.append(Damage("recipe", file, in_one_line(error)))
        return None
    found.count(file)
    return header


def _check_plan(path: Path, header: StoreHeader | None, number: int, found: _Found) -> None:
    file = path / "plan" / f"{shard_name(number)}.json"
    try:
        found.plans[number] = tuple(entry.id for entry in read_plan(path, number))
    except CorruptStoreError as error:
        rows = _shard_rows(path, header, number, found)
        found.damage.append(Damage("plan", file, in_one_line(error), number, rows))
        return
    found.count(file)


def _check_shard(path: Path, header: StoreHeader | None, number: int, found: _Found) -> None:
    folder = path / "shards" / shard_name(number)
    before = len(found.damage)

    def damaged(where: Path, problem: str) -> None:
        found.damage.append(Damage("shard", where, problem, number, _shard_rows(path, header, number, found)))

    try:
        record = read_commit(path, number)
    except CorruptStoreError as error:
        damaged(folder / "commit.json", in_one_line(error))
        return
    found.count(folder / "commit.json")
    try:
        if header is None:
            raise CorruptStoreError("without the recipe, files are checked one by one")
        index = read_index(path, header, number)
        read_features(path, header, number)  # together these have read every file that the commit names
    except CorruptStoreError as error:
        for name, expected in record.files.items():
            try:
                read_file(folder / name, "", expected)
            except CorruptStoreError as wrong:
                damaged(folder / name, in_one_line(wrong))
        if len(found.damage) == before and header is not None:
            damaged(folder, in_one_line(error))
    else:
        found.shards[number] = index.ids
    for name in record.files:
        if (folder / name).is_file():
            found.count(folder / name)
    for extra in _extra(folder, {"commit.json", *record.files}):
        found.damage.append(Damage("extra", extra, "no commit names it", number, None))


def _check_pairs(path: Path, header: StoreHeader | None, committed: Sequence[int], found: _Found) -> None:
    """Shards against their plans."""
    there = set(plan_numbers(path))
    later: set[str] = set()  # ids of higher shards
    superseded = set()
    for number in reversed(committed):
        held = found.shards.get(number, ())
        if held and later.issuperset(held):
            superseded.add(number)
        later.update(held)
    for number in committed:
        plan = path / "plan" / f"{shard_name(number)}.json"
        ids = found.shards.get(number)
        if number not in there and number in superseded:
            found.notes.append(f"shard {number} has no plan and no row in use: `embcache gc` removes it")
        elif number not in there:
            rows = _shard_rows(path, header, number, found)
            found.damage.append(Damage("plan", plan, "a file of the feature store is missing", number, rows))
        elif ids is not None and number in found.plans and ids != found.plans[number]:
            folder = path / "shards" / shard_name(number)
            rows = _shard_rows(path, header, number, found)
            found.damage.append(Damage("shard", folder, "its rows are not those of its plan", number, rows))


def _check_listing(path: Path, found: _Found) -> None:
    """Entries that embcache did not make: what lies between the shards and plans, and in the store's folder."""
    plans = {f"{shard_name(number)}.json" for number in plan_numbers(path)}
    shards = {shard_name(number) for number in committed_numbers(path)}
    for folder, known in ((path / "plan", plans), (path / "shards", shards)):
        for entry in _entries(folder):
            if entry.name not in known and not entry.name.startswith(_NFS):
                found.damage.append(Damage("extra", entry, f"it is no {folder.name.removesuffix('s')}"))
    strangers = [e.name for e in _entries(path) if e.name not in _ENTRIES and not e.name.startswith(_NFS)]
    if strangers:
        found.notes.append(f"not of the store, and left alone: {', '.join(strangers)}")


def _shard_rows(path: Path, header: StoreHeader | None, number: int, found: _Found) -> Rows | None:
    """The rows of a shard, from its plan or, where that is damaged, from its index."""
    ids = found.plans.get(number) or found.shards.get(number)
    if not ids and header is not None:
        try:
            ids = read_index(path, header, number).ids
        except StoreError:
            ids = None
    if not ids:
        return None
    first = number * header.rows_per_shard if header else 0
    return Rows(first, first + len(ids) - 1, len(ids), ids[0], ids[-1])


def _extra(folder: Path, known: set[str]) -> Iterator[Path]:
    """Files and empty folders of a shard that are not ``known``."""
    holding = {parent.as_posix() for name in known for parent in PurePosixPath(name).parents}
    for root, folders, names in os.walk(folder):
        here = Path(root)
        for name in names:
            path = here / name
            if path.relative_to(folder).as_posix() not in known and not name.startswith(_NFS):
                yield path
        for name in folders:
            path = here / name
            if path.is_symlink() or (path.relative_to(folder).as_posix() not in holding and not any(path.iterdir())):
                yield path


def _entries(folder: Path) -> list[Path]:
    with refusals_told(folder, ""):
        return [Path(entry.path) for entry in list_folder(folder)]


def lease_files(store: Path) -> list[Path]:
    """Files of all leases of a store."""
    paths = [Path(entry.path) for entry in list_folder(store / "leases") if entry.name.endswith(".json")]
    return [path for path in paths if path.stem.isdecimal() and path.stem.isascii()]


def leftovers(store: Path, *, older: float = STALE_SECONDS) -> list[Path]:
    """What killed processes have left of a store, under staging and leases."""
    staged = [Path(entry.path) for entry in list_folder(store / "staging")]
    claims = lease_files(store)
    staged += [path for path in (Path(e.path) for e in list_folder(store / "leases")) if path not in claims]
    dead = [path for path in claims if is_abandoned(path)]
    return sorted([*dead, *(path for path in staged if is_stale(path, older))])


def store_notes(store: Path) -> list[str]:
    """The same in words, for a person."""
    notes, claims = [], lease_files(store)
    dead = [path for path in claims if is_abandoned(path)]
    if working := [path for path in claims if path not in dead]:
        shards = ", ".join(path.stem.lstrip("0") or "0" for path in working)
        notes.append(f"another process is computing shard {shards}")
    if dead:
        notes.append(f"{len(dead)} leases of processes that are gone: `embcache gc` removes them")
    rubbish = [path for path in leftovers(store) if path not in dead]
    if rubbish:
        notes.append(f"{len(rubbish)} leftovers of killed processes: `embcache gc` removes them")
    return notes


@dataclass(frozen=True)
class SourceCheck:
    """What became of the images of a store's live rows."""

    checked: int  # images that were read
    changed: tuple[str, ...]  # ids with other bytes than those that the features were made from
    missing: tuple[str, ...]  # ids without a file
    removed: int  # live rows of images that left the dataset; they are hidden

    @property
    def well(self) -> bool:
        """Whether every row is of the image that is there."""
        return not self.changed and not self.missing

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON data."""
        return {
            "checked": self.checked,
            "changed": list(self.changed),
            "missing": list(self.missing),
            "removed": self.removed,
        }


def check_source(
    store: FeatureStore, dataset: ImageDataset, on_rows: Callable[[int, int], object] = lambda done, total: None
) -> SourceCheck:
    """Hash the images of every live row again, whatever their modification times say."""
    root = dataset.root
    if root is None or not root.is_dir():
        raise DatasetNotFoundError(
            f"the images of {dataset.name} are not here", expected=str(root) if root else None, fix="--data-root FOLDER"
        )
    rows = store.sources()
    held = {id_: rows[id_].digest or "" for id_ in (*store.quarantined, *store.digests)}
    sources = [source for source in image_refs(dataset.table) if source.id in held]
    changed, missing, done = [], [], 0
    # File by file: the images of one array file lie beside each other, and are decoded from it in order.
    with ThreadPoolExecutor(usable_cores()) as pool:
        rest = iter(sources)
        while chunk := list(islice(rest, _AHEAD)):
            for source, digest in zip(chunk, pool.map(lambda s: digest_now(root, s), chunk), strict=True):
                if digest is None:
                    missing.append(source.id)
                elif held[source.id] and digest != held[source.id]:
                    changed.append(source.id)
            done += len(chunk)
            on_rows(done, len(sources))
    return SourceCheck(len(sources), tuple(changed), _still(missing, store), len(held) - len(sources))


def digest_now(root: Path, source: ImageRef) -> str | None:
    """Sha256 (hex) of an image's bytes as they are now: of its file, or of its place in an array file.

    ``""`` where it can still not be read as an image; None where there is no file.
    """
    try:
        if not source.place:
            with (root / source.path).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        return read_image(root, source.path, source.place)[1]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ImageError:
        return "" if (root / source.path).is_file() else None


def readable_now(root: Path, source: ImageRef) -> bool:
    """Whether an image can be decoded."""
    try:
        read_image(root, source.path, source.place)
    except ImageError:
        return False
    return True


def _still(missing: Sequence[str], store: FeatureStore) -> tuple[str, ...]:
    """Those of the missing that had features: the others were quarantined, maybe for the same reason."""
    return tuple(id_ for id_ in missing if id_ not in store.quarantined)
