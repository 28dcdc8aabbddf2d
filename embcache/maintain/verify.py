"""Every byte of a store against what vouches for it (``embcache verify``). Nothing here writes to one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from embcache.cores import usable_cores
from embcache.data.dataset import ImageDataset
from embcache.data.files import is_object, open_file
from embcache.data.images import ImageRef, image_refs, read_image
from embcache.data.published import kept_table
from embcache.errors import CorruptStoreError, DatasetError, DatasetNotFoundError, EmbcacheError, ImageError, StoreError
from embcache.io import is_stale, list_folder, mirror_of
from embcache.maintain.listing import STORE_NAME, VIEWS
from embcache.partitions import partitions_problem
from embcache.paths import PathLike
from embcache.store.feature_store import FeatureStore, store_folders
from embcache.store.lease import is_abandoned
from embcache.store.reading import (
    CANARIES,
    ShardFiles,
    committed_numbers,
    misplaced,
    plan_numbers,
    plan_path,
    range_of,
    read_canaries,
    read_features,
    read_header,
    read_index,
    read_plan,
    refusals_raised,
    shard_name,
    shard_path,
    unless_collected,
)
from embcache.store.schema import StoreHeader

# A store's own entries; anything else in its folder is reported and left alone.
_ENTRIES = {"recipe.json", CANARIES, "plan", "shards", "leases", "staging", "manifests", *VIEWS}
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

    kind: str  # "recipe", "canaries", "plan", "shard" or "extra"
    path: Path  # the file, or the folder where that is all that is known
    problem: str  # in one line
    shard: int | None = None
    rows: Rows | None = None  # of the shard, as far as its plan or its index still says


@dataclass(frozen=True)
class StoreCheck:
    """What a verification found in one store."""

    dataset: str  # folder name of the store's dataset
    backbone: str
    fingerprint: str
    path: Path  # the store's folder
    shards: int
    rows: int
    planned: int  # rows that are planned and not computed yet; that is no damage
    files: int
    bytes: int
    damage: tuple[Damage, ...]
    notes: tuple[str, ...]  # what is worth knowing and no damage


def verify_store(path: Path, on_shard: Callable[[int, int], object] = lambda done, total: None) -> StoreCheck:
    """Read every file of a store and compare it with what was committed."""
    # What `embcache gc` removed meanwhile is no damage.
    return unless_collected(path, lambda: _Verification(path).run(on_shard), lambda check: not check.damage)


class _Verification:
    """One look at a store: what is found while its files are read."""

    def __init__(self, path: Path) -> None:
        self.path, self.mirror = path, mirror_of(path)
        self.header: StoreHeader | None = None
        self.committed: list[int] = []
        self.damage: list[Damage] = []
        self.notes: list[str] = []
        self.plans: dict[int, tuple[str, ...]] = {}  # ids of the intact plans
        self.shards: dict[int, tuple[str, ...]] = {}  # ids of the intact shards
        self.sizes: list[int] = []  # of the files that are read

    def run(self, on_shard: Callable[[int, int], object]) -> StoreCheck:
        if wrong := misplaced(self.path):
            # Nothing is read through a link: what it leads to is not this store's.
            self.damage += [Damage("extra", each, "it is not a real folder") for each in wrong]
        else:
            self.look(on_shard)
        header, name = self.header, STORE_NAME.fullmatch(self.path.name)
        return StoreCheck(
            dataset=self.path.parent.name,
            backbone=header.recipe.backbone if header else name["slug"] if name else self.path.name,
            fingerprint=(header.recipe.fingerprint if header else name["digits"] if name else "")[:12],
            path=self.path,
            shards=len(self.committed),
            rows=sum(len(self.shards.get(number) or self.plans.get(number, ())) for number in self.committed),
            planned=sum(len(ids) for number, ids in self.plans.items() if number not in self.committed),
            files=len(self.sizes),
            bytes=sum(self.sizes),
            damage=tuple(self.damage),
            notes=tuple(self.notes),
        )

    def look(self, on_shard: Callable[[int, int], object]) -> None:
        if self.mirror:
            self.mirror.refresh(self.path, whole=True)  # what counts is there, not its copy
        try:
            self.header = read_header(self.path)
            self.sizes.append((self.path / "recipe.json").lstat().st_size)
        except StoreError as error:
            if isinstance(error.__cause__, OSError) and not isinstance(error, CorruptStoreError):
                raise
            self.damage.append(Damage("recipe", self.path / "recipe.json", _in_one_line(error)))
        try:
            if read_canaries(self.path) is not None:
                self.sizes.append((self.path / CANARIES).lstat().st_size)
        except CorruptStoreError as error:
            self.damage.append(Damage("canaries", self.path / CANARIES, _in_one_line(error)))
        for number in plan_numbers(self.path):
            file = plan_path(self.path, number)
            with self.noting("plan", file, number):
                self.plans[number] = tuple(entry.id for entry in read_plan(self.path, number))
                self.sizes.append(file.lstat().st_size)
        self.committed = committed_numbers(self.path)
        for done, number in enumerate(self.committed, start=1):
            self.check_shard(number)
            on_shard(done, len(self.committed))
        self.check_pairs()
        self.check_listing()
        if self.header and self.header.recipe.foreign:
            self.notes.append("imported features: their bytes are verified, and never compared with images")
        self.notes += store_notes(self.path)

    def check_shard(self, number: int) -> None:
        folder, before, files = shard_path(self.path, number), len(self.damage), None
        with self.noting("shard", folder / "commit.json", number):
            files = ShardFiles(self.path, number)
            self.sizes.append((folder / "commit.json").lstat().st_size)
        if files is None:
            return
        if self.mirror:
            self.mirror.forget(folder)
            with suppress(StoreError):  # found again below, file by file
                self.mirror.prefetch(folder / name for name in files)
        for name in files:
            with self.noting("shard", folder / name, number):
                files.get(name)
            if (folder / name).is_file():
                self.sizes.append((folder / name).lstat().st_size)
        if self.header is not None and len(self.damage) == before:
            with self.noting("shard", folder, number):
                ids = read_index(self.path, self.header, number, files).ids
                read_features(self.path, self.header, number, files)
                self.shards[number] = ids
        for extra in () if self.mirror else _extra(folder, {"commit.json", *files}):  # of copies it says nothing
            self.damage.append(Damage("extra", extra, "no commit names it", number))

    def check_pairs(self) -> None:
        """Shards against their plans."""
        there, superseded = set(plan_numbers(self.path)), set()
        later: set[str] = set()  # ids of higher shards
        for number in reversed(self.committed):
            held = self.shards.get(number, ())
            if held and later.issuperset(held):
                superseded.add(number)
            later.update(held)
        for number in self.committed:
            ids = self.shards.get(number)
            if number not in there and number in superseded:
                self.notes.append(f"shard {number} has no plan and no row in use: `embcache gc` removes it")
            elif number not in there:
                self.found("plan", plan_path(self.path, number), "a file of the feature store is missing", number)
            elif ids is not None and number in self.plans and ids != self.plans[number]:
                self.found("shard", shard_path(self.path, number), "its rows are not those of its plan", number)

    def check_listing(self) -> None:
        """Entries that embcache did not make: what lies between the shards and plans, and in the store's folder."""
        plans = {f"{shard_name(number)}.json" for number in plan_numbers(self.path)}
        shards = {shard_name(number) for number in committed_numbers(self.path)}
        for folder, known in ((self.path / "plan", plans), (self.path / "shards", shards)):
            for entry in _strangers(folder, known):
                self.damage.append(Damage("extra", entry, f"it is no {folder.name.removesuffix('s')}"))
        if names := [entry.name for entry in _strangers(self.path, _ENTRIES)]:
            self.notes.append(f"not of the store, and left alone: {', '.join(names)}")

    @contextmanager
    def noting(self, kind: str, path: Path, number: int) -> Iterator[None]:
        try:
            yield
        except CorruptStoreError as error:
            self.found(kind, path, _in_one_line(error), number)

    def found(self, kind: str, path: Path, problem: str, number: int) -> None:
        """Damage of a shard or its plan, with the rows that its plan or, where that is damaged, its index names."""
        ids = self.plans.get(number) or self.shards.get(number)
        if not ids and self.header is not None:
            with suppress(StoreError):
                ids = read_index(self.path, self.header, number).ids
        first = number * self.header.rows_per_shard if self.header else 0
        rows = Rows(first, first + len(ids) - 1, len(ids), ids[0], ids[-1]) if ids else None
        self.damage.append(Damage(kind, path, problem, number, rows))


def _in_one_line(error: StoreError) -> str:
    """Problem, expectation and finding of an error, without where and how."""
    parts = [("expected", error.expected), ("found", error.found)]
    return " ".join((error.problem + "".join(f"; {label} {value}" for label, value in parts if value)).split())


def _extra(folder: Path, known: set[str]) -> Iterator[Path]:
    """Files and empty folders of a shard that are not ``known``."""
    holding = {parent.as_posix() for name in known for parent in PurePosixPath(name).parents}
    for path in sorted(folder.rglob("*")):
        name, real = path.relative_to(folder).as_posix(), path.is_dir() and not path.is_symlink()
        if (name not in holding and not any(path.iterdir())) if real else (name not in known and path.name[:4] != _NFS):
            yield path


def _strangers(folder: Path, known: set[str]) -> list[Path]:
    with refusals_raised(folder, ""):
        entries = list_folder(folder)
    return [Path(entry.path) for entry in entries if entry.name not in known and not entry.name.startswith(_NFS)]


def lease_files(store: Path) -> list[Path]:
    """Files of all leases of a store."""
    paths = [Path(entry.path) for entry in list_folder(store / "leases") if entry.name.endswith(".json")]
    return [path for path in paths if path.stem.isdecimal() and path.stem.isascii()]


def leftovers(store: Path) -> list[Path]:
    """What killed processes have left of a store, under staging and leases."""
    claims = lease_files(store)
    staged = [Path(entry.path) for name in ("staging", "leases") for entry in list_folder(store / name)]
    stale = [path for path in staged if path not in claims and is_stale(path)]
    return sorted([*filter(is_abandoned, claims), *stale])


def store_notes(store: Path) -> list[str]:
    """Leases and leftovers in words."""
    notes, claims, left = [], lease_files(store), leftovers(store)
    if working := [path for path in claims if path not in left]:
        shards = ", ".join(path.stem.lstrip("0") or "0" for path in working)
        notes.append(f"another process is computing shard {shards}")
    dead = len(claims) - len(working)
    counts = {"leases of processes that are gone": dead, "leftovers of killed processes": len(left) - dead}
    return notes + [f"{number} {what}: `embcache gc` removes them" for what, number in counts.items() if number]


@dataclass(frozen=True)
class SourceCheck:
    """What became of the images of a store's live rows."""

    checked: int  # images that were read
    changed: tuple[str, ...]  # ids with other bytes than those that the features were made from
    missing: tuple[str, ...]  # ids without a file that had features
    removed: int  # live rows of images that left the dataset; they are hidden

    @property
    def ok(self) -> bool:
        """Whether every row is of the image that is there."""
        return not self.changed and not self.missing


def image_folder(dataset: ImageDataset) -> Path:
    """Folder of a dataset's images; a `DatasetNotFoundError` where it is not here."""
    if dataset.root is None or not dataset.root.is_dir():
        raise DatasetNotFoundError(
            f"the images of {dataset.name} are not here", code="images-not-here",
            expected=str(dataset.root) if dataset.root else None, fix="--data-root FOLDER",
        )  # fmt: skip
    return dataset.root


def check_source(
    store: FeatureStore, dataset: ImageDataset, on_rows: Callable[[int, int], object] = lambda done, total: None
) -> SourceCheck:
    """Hash the images of every live row again, whatever their modification times say."""
    root, rows = image_folder(dataset), store.sources()
    held = {id_: rows[id_].digest or "" for id_ in (*store.quarantined, *store.digests)}
    sources = [source for source in image_refs(dataset.table) if source.id in held]
    changed, missing = [], []
    # File by file: the images of one array file lie beside each other, and are decoded from it in order.
    with ThreadPoolExecutor(usable_cores()) as pool:
        for start in range(0, len(sources), _AHEAD):
            chunk = sources[start : start + _AHEAD]
            for source, digest in zip(chunk, pool.map(lambda s: digest_now(root, s), chunk), strict=True):
                if digest is None:
                    missing.append(source.id)
                elif held[source.id] and digest != held[source.id]:
                    changed.append(source.id)
            on_rows(start + len(chunk), len(sources))
    # Those that were quarantined had no features, maybe for the same reason.
    gone = tuple(id_ for id_ in missing if id_ not in store.quarantined)
    return SourceCheck(len(sources), tuple(changed), gone, len(held) - len(sources))


def check_partitions(dataset_dir: Path, home: PathLike | None, repair: bool) -> dict[str, Any] | None:
    """What is wrong with the partitions of a dataset that its table or its plans name; None for a dataset without.

    Repair reads the table anew.
    """
    from embcache.data.partitioned import find_partitioned

    problem, repaired = _partitions_problem(dataset_dir, home), False
    if problem and repair:
        with suppress(EmbcacheError):
            repaired = find_partitioned(dataset_dir.name, home=home) is not None
        problem = _partitions_problem(dataset_dir, home) if repaired else problem
    return problem if problem is None else {
        "path": str(dataset_dir / "partitions"), "problem": problem, "repaired": repaired,
    }  # fmt: skip


def _partitions_problem(dataset_dir: Path, home: PathLike | None) -> str | None:
    try:
        kept = kept_table(dataset_dir.name, home)
    except DatasetError as error:
        return f"{error.problem}: {error.found}"
    named = {*kept.partitions} if kept else set[str]()
    for store in store_folders(home, dataset_dir.name):
        for number in plan_numbers(store):
            with suppress(StoreError):  # reported with the store
                named.add(range_of(store, number)[0])
    named.discard("")  # of plans that list IDs
    return partitions_problem(dataset_dir, sorted(named)) if named else None


def digest_now(root: Path, source: ImageRef) -> str | None:
    """Sha256 (hex) of an image's bytes as they are now: of its file, or of its place in an array file.

    ``""`` where it can still not be read as an image; None where there is no file.
    """
    try:
        if not source.place:
            with open_file(root, source.path) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        return read_image(root, source.path, source.place)[1]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ImageError:
        return "" if is_object(source.path) or (root / source.path).is_file() else None
