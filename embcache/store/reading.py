"""Reading the files of a store. Every byte is checked against its checksum before anything parses it.

::

    <store>/recipe.json            header: the recipe and how the store was created
            canaries.json          features of two drawn images, made by the network when the store was created
            plan/000017.json       the rows that shard 17 owes
            shards/000017/         commit.json and the files that it vouches for
"""

from __future__ import annotations

import functools
import os
import re
import shlex
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import NoReturn, TypeVar

import numpy as np

from embcache.errors import CorruptStoreError, StoreError
from embcache.io import IrregularError, bytes_under, is_folder, list_folder, mirror_of, open_regular, read_regular
from embcache.mirror import shown_home
from embcache.partitions import Partition, columns_key
from embcache.paths import PathLike, home_dir
from embcache.sealed import crc32c, unseal
from embcache.store.schema import (
    FORM,
    FORMATS,
    Digests,
    PlanEntry,
    PlannedRange,
    Recipe,
    RowIndex,
    StoreHeader,
    find_format,
    plan_entries,
)

_T = TypeVar("_T")
CANARIES = "canaries.json"
FOLDERS = ("plan", "shards", "leases", "staging")
_NUMBER = re.compile(r"\d{6,}")


@dataclass(frozen=True)
class CommitRecord:
    """What ``commit.json`` says of a shard."""

    rows: int
    files: Mapping[str, tuple[int, str]]  # size and crc32c of each
    batch_size: int | None = None  # that it was computed with, as threads; None where it is the store's
    threads: int | None = None
    runtime: str | None = None


@dataclass(frozen=True)
class LiveRows:
    """The rows of a store that no later shard supersedes, in shard order."""

    ids: list[str]
    valid: np.ndarray  # (n,); false where the image could not be read
    digests: Digests
    reasons: list[str]
    shards: np.ndarray
    positions: np.ndarray
    shard_rows: dict[int, int]  # rows of every committed shard, superseded ones included


def shard_name(number: int) -> str:
    """Folder of a shard, and stem of its plan: ``000017``."""
    return f"{number:06d}"


def plan_path(store: Path, number: int) -> Path:
    """File of a plan."""
    return store / "plan" / f"{shard_name(number)}.json"


def shard_path(store: Path, number: int) -> Path:
    """Folder of a shard."""
    return store / "shards" / shard_name(number)


def misplaced(store: Path) -> list[Path]:
    """What lies where a store has its folders and is no real folder: a link could lead out of the home."""
    paths = [store / name for name in FOLDERS]
    return [path for path in paths if os.path.lexists(path) and not is_folder(path)]


def check_folders(store: Path) -> None:
    """Raise a CorruptStoreError where `misplaced` finds anything: nothing is read or written through it."""
    for path in misplaced(store):
        raise CorruptStoreError(
            "a folder of a feature store is not a real folder", code="folder-irregular", expected="a folder",
            found="a link" if path.is_symlink() else "a file", where=path,
            fix="move the folder itself there, or remove what is in its place",
        )  # fmt: skip


def read_header(store: Path) -> StoreHeader:
    """Read and check ``recipe.json``."""
    check_folders(store)
    path, fix = store / "recipe.json", recipe_fix(store)
    content = unseal(read_file(path, fix), path, fix)
    if content.get("form") != FORM:
        raise StoreError(
            "a feature store has a form that this version of embcache does not read", code="store-form",
            expected=f"form {FORM}", found=f"form {content.get('form', 1)!r}"[:80], where=path,
            fix=f"extract again, after rm -r {shlex.quote(str(store))}; or read it with the version that wrote it",
        )  # fmt: skip
    try:
        recipe = Recipe.from_json(content["recipe"])
        settled = {field.name: content[field.name] for field in fields(StoreHeader)}
        header = StoreHeader(**{**settled, "recipe": recipe, "row_shape": tuple(content["row_shape"])})
    except (KeyError, TypeError) as error:  # the checksum says nothing of what it covers
        raise _not_ours("recipe.json", error, path, fix) from error
    if recipe.fingerprint != content.get("fingerprint") or not store.name.endswith("-" + recipe.fingerprint[:12]):
        raise CorruptStoreError(
            "the recipe of a store is not the one that names it", code="recipe-mismatch", expected=recipe.fingerprint,
            found=f"{str(content.get('fingerprint'))[:80]} in a folder called {store.name}", where=path, fix=fix,
        )  # fmt: skip
    if header.format not in FORMATS:
        raise StoreError(
            "a store has a file format that this version of embcache does not read", code="store-format",
            expected=" | ".join(FORMATS), found=header.format, where=path, fix="pip install --upgrade embcache",
        )  # fmt: skip
    return header


def read_canaries(store: Path) -> np.ndarray | None:
    """Features of the drawn images, float32 (2, \\*row_shape); None where a store was made without."""
    path, fix = store / CANARIES, f"`{repair_command(store)}`: the store is then used without them"
    if not os.path.lexists(path):
        return None
    content = unseal(read_file(path, fix), path, fix, indent=None)
    try:
        return np.frombuffer(bytes.fromhex(content["features"]), "<f4").reshape(content["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise _not_ours(CANARIES, error, path, fix) from error


def plan_numbers(store: Path) -> list[int]:
    """Numbers of the published plans, ascending."""
    if mirror := mirror_of(store):
        return sorted(mirror.plans(store))
    listed = _listing(store / "plan", os.DirEntry.is_file)
    return _numbers(name.removesuffix(".json") for name in listed if name.endswith(".json"))


def committed_numbers(store: Path) -> list[int]:
    """Numbers of the committed shards, ascending."""
    if mirror := mirror_of(store):
        mirror.refresh(store)
    return _numbers(_listing(store / "shards", os.DirEntry.is_dir))


def _listing(folder: Path, kind: Callable[..., bool]) -> list[str]:
    with refusals_raised(folder, ""):
        return [entry.name for entry in list_folder(folder) if kind(entry, follow_symlinks=False)]


def _numbers(names: Iterable[str]) -> list[int]:
    return sorted(int(name) for name in names if _NUMBER.fullmatch(name) and name == shard_name(int(name)))


def read_plan(store: Path, number: int) -> tuple[PlanEntry, ...]:
    """Read the rows that a shard owes."""
    planned = read_planned(store, number)
    if not isinstance(planned, PlannedRange):
        return planned
    try:
        return tuple(planned.entries(store.parent))
    except (ValueError, StoreError) as error:
        if isinstance(error, CorruptStoreError):
            raise
        raise _not_ours("a plan", error, plan_path(store, number), f"`{repair_command(store)}`") from error


def read_planned(store: Path, number: int) -> PlannedRange | tuple[PlanEntry, ...]:
    """Read the rows that a shard owes as its plan has them: one by one, or a range of a partition."""
    path, fix = plan_path(store, number), f"`{repair_command(store)}`"
    content = unseal(read_file(path, fix), path, fix, indent=None)
    if content.get("number") != number:
        raise CorruptStoreError(
            "a plan lies under another number", code="plan-number", found=f"plan {content.get('number')}"[:80],
            where=path, fix=fix,
        )  # fmt: skip
    try:
        return PlannedRange.from_json(content) if "range" in content else tuple(plan_entries(content["rows"]))
    except (KeyError, TypeError, ValueError, StoreError) as error:
        raise _not_ours("a plan", error, path, fix) from error


def store_bytes(store: Path) -> int:
    """Bytes that a store takes: on disk, or in the object store as its commits have it."""
    if mirror_of(store) is None:
        return bytes_under(store)
    commits = [read_commit(store, number) for number in committed_numbers(store)]
    return sum(size for commit in commits for size, _ in commit.files.values())


def numbers_of_part(store: Path, part: Partition) -> tuple[int, list[int]]:
    """The first free number; and those of the plans and shards that may hold rows of a partition, ascending.

    They are its own ranges, lists of IDs, and ranges of partitions that the dataset no longer has, but for those with
    the IDs of another one that it has.
    """
    numbers, others = sorted({*committed_numbers(store), *plan_numbers(store)}), {*part.current} - {part.digest}
    of_others = {columns_key(store.parent, digest, "id") for digest in others}

    def elsewhere(digest: str) -> bool:
        return digest in others or (bool(digest) and columns_key(store.parent, digest, "id") in of_others)

    return max(numbers, default=-1) + 1, [n for n in numbers if not elsewhere(range_of(store, n)[0])]


def range_of(store: Path, number: int) -> tuple[str, int]:
    """The partition that a plan is a range of, and its first row; an empty name for a list of IDs, or no plan."""
    path = plan_path(store, number)
    try:
        state = os.lstat(path)
    except OSError:
        mirror = mirror_of(path)
        if mirror is None or not mirror.fetch(path):
            return "", 0  # reading it says why
        state = os.lstat(path)
    return _known_range(store, number, (state.st_ino, state.st_size, state.st_mtime_ns))


@functools.lru_cache(maxsize=1 << 17)  # asked for each partition of a dataset; a plan is never edited
def _known_range(store: Path, number: int, _: tuple[int, ...]) -> tuple[str, int]:
    planned = read_planned(store, number)
    return (planned.partition, planned.start) if isinstance(planned, PlannedRange) else ("", 0)


def read_commit(store: Path, number: int) -> CommitRecord:
    """Read what a shard's ``commit.json`` vouches for."""
    folder = shard_path(store, number)
    path, fix = folder / "commit.json", _recompute(folder)
    try:
        return _parse_commit(read_file(path, fix), path, fix)
    except CorruptStoreError as error:
        if is_folder(folder):
            raise
        raise CorruptStoreError(
            "a shard no longer exists", code="shard-gone", where=folder,
            found="no folder: `embcache gc` may have removed it since it was listed",
            fix=f"run the same command again; if it fails again, {fix}",
        ) from error  # fmt: skip


# Read with the index and, streamed, each epoch: a cache with less room than there are shards would never be of use.
@functools.lru_cache(maxsize=1 << 15)
def _parse_commit(data: bytes, path: Path, fix: str) -> CommitRecord:
    content = unseal(data, path, fix)
    try:
        files = {name: (_count(entry["size"]), str(entry["crc32c"])) for name, entry in content["files"].items()}
        rows = _count(content["rows"])
        # Only where they differ from what the store was created with.
        batch_size, threads = (_count(content[k]) if k in content else None for k in ("batch_size", "threads"))
        runtime = str(content["runtime"]) if "runtime" in content else None
    except (KeyError, TypeError, AttributeError) as error:
        raise _not_ours("a commit", error, path, fix) from error
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise CorruptStoreError(
                "a commit names a file outside its shard", code="outside-shard", found=name, where=path, fix=fix
            )
    return CommitRecord(rows, files, batch_size, threads, runtime)


def _count(value: object) -> int:
    """A number of bytes or rows as JSON has it; TypeError where it is none."""
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r} is not a number of bytes or rows")
    return value


class ShardFiles(Mapping[str, bytes]):
    """Verified bytes of a committed shard's files by name, each read when it is first looked up."""

    def __init__(self, store: Path, number: int) -> None:
        self.folder = shard_path(store, number)
        self.record = read_commit(store, number)
        self.sizes = {name: size for name, (size, _) in self.record.files.items()}
        self.read: dict[str, bytes] = {}

    def __getitem__(self, name: str) -> bytes:
        if name not in self.read:
            # Joined as texts: there are thousands of files, and a Path takes longer to make than such a file to read.
            path = f"{self.folder}/{name}"
            self.read[name] = read_file(path, _recompute(self.folder), self.record.files[name])
        return self.read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def decode(self, decode: Callable[[ShardFiles], _T]) -> _T:
        """What a format makes of the files; anything that it raises is damage."""
        try:
            return decode(self)
        except StoreError:
            raise
        except Exception as error:  # zarr and h5py raise many kinds; the bytes match, so the shard was made elsewhere
            raise CorruptStoreError(
                "a shard cannot be decoded", code="shard-damaged", found=f"{type(error).__name__}: {error}",
                where=self.folder, fix=_recompute(self.folder),
            ) from error  # fmt: skip

    def check_sizes(self, names: Iterable[str]) -> None:
        """Refuse files that are not as long as the commit says, before anything is read or memory taken for it.

        Of a store in an object store they are not looked at: a copy may be missing, and is checked when it is read.
        """
        names = () if mirror_of(self.folder) else names
        for name in names:
            path, there = self.folder / name, -1
            with refusals_raised(path, _recompute(self.folder)), suppress(FileNotFoundError, NotADirectoryError):
                there = path.lstat().st_size
            if there != self.sizes[name]:
                found = f"{there} bytes" if there >= 0 else "no such file"
                self.refuse(f"{self.sizes[name]} bytes in {name}", found)

    def refuse(self, expected: str, found: str) -> NoReturn:
        """Raise the error for a shard that does not hold what its store promises."""
        raise CorruptStoreError(
            "a shard does not hold what its store promises", code="shard-damaged", expected=expected, found=found,
            where=self.folder, fix=_recompute(self.folder),
        )  # fmt: skip


def read_index(store: Path, header: StoreHeader, number: int, files: ShardFiles | None = None) -> RowIndex:
    """Read a shard's rows without their features."""
    files = files or ShardFiles(store, number)
    rows, held = files.record.rows, sum(files.sizes.values())
    # Arrays are made by these numbers before the features are looked at.
    if rows > header.rows_per_shard or rows * header.row_bytes > held:
        files.refuse(f"at most {header.rows_per_shard} rows of {header.row_bytes} bytes", f"{rows} in {held} bytes")
    index = files.decode(find_format(header.format).decode_index)
    # Features are read when they are needed; that none of them is cut short is known at once.
    files.check_sizes(files.sizes.keys() - files.read.keys())
    lengths = {len(index.ids), len(index.valid), len(index.digests), len(index.reasons), rows}
    if len(lengths) != 1 or index.valid.dtype != np.bool_:
        files.refuse(f"{rows} rows", f"{len(index.ids)} ids, {len(index.valid)} of valid")
    return index


def read_features(store: Path, header: StoreHeader, number: int, files: ShardFiles | None = None) -> np.ndarray:
    """Read a shard's features, ``(n, *row_shape)`` of the recipe's dtype, rows that are not valid included."""
    files = files or ShardFiles(store, number)
    features = files.decode(find_format(header.format).decode_features)
    expected = (files.record.rows, *header.row_shape)
    if features.shape != expected or features.dtype != header.dtype:
        files.refuse(f"{header.dtype} {expected}", f"{features.dtype} {features.shape}")
    return features


def unless_collected(store: Path, look: Callable[[], _T], whole: Callable[[_T], bool] = lambda found: True) -> _T:
    """What ``look`` finds in a store; it looks again where `embcache gc` removed what was listed and not yet read.

    It also looks again where what it finds is not ``whole``.
    """

    def listed() -> set[tuple[str, int]]:
        plans = {("plan", number) for number in plan_numbers(store)}
        return plans | {("shard", number) for number in committed_numbers(store)}

    while True:
        before = listed()
        try:
            found = look()
            if whole(found) or before <= listed():
                return found
        except CorruptStoreError:
            if before <= listed():
                raise


def read_plans(store: Path, but: Container[int] = ()) -> dict[int, tuple[PlanEntry, ...]]:
    """Rows that each published shard owes or owed, by number, ascending, but some; raises as `read_plan`."""

    def look() -> dict[int, tuple[PlanEntry, ...]]:
        numbers = [n for n in plan_numbers(store) if n not in but]
        if mirror := mirror_of(store):
            mirror.prefetch(plan_path(store, n) for n in numbers)
        return {n: read_plan(store, n) for n in numbers}

    return unless_collected(store, look)


def read_live(store: Path, header: StoreHeader, numbers: Sequence[int] | None = None) -> LiveRows:
    """Find the live rows: each id's row in the highest committed shard that holds it.

    With ``numbers``, ascending, as if only these shards were committed.
    """
    if numbers is None:
        return unless_collected(store, lambda: read_live(store, header, committed_numbers(store)))
    if mirror := mirror_of(store):
        names = find_format(header.format).index_files
        mirror.prefetch(shard_path(store, number) / name for number in numbers for name in names)
    indexes = [read_index(store, header, number) for number in numbers]
    ids = [id_ for index in indexes for id_ in index.ids]
    lengths = [len(index.ids) for index in indexes]
    last = dict(zip(ids, range(len(ids)), strict=True))  # of the rows of an id, the last one stays
    kept = range(len(ids)) if len(last) == len(ids) else sorted(last.values())
    rows = np.array(kept, dtype=np.int64)
    reasons = [reason for index in indexes for reason in index.reasons]
    return LiveRows(
        ids=[ids[k] for k in kept],
        valid=np.concatenate([np.zeros(0, bool), *(index.valid for index in indexes)])[rows],
        digests=Digests(np.concatenate([np.zeros((0, 32), np.uint8), *(index.digests.raw for index in indexes)])[rows]),
        reasons=[reasons[k] for k in kept],
        shards=np.repeat(np.array(numbers, dtype=np.int64), lengths)[rows],
        positions=np.concatenate([np.zeros(0, np.int64), *(np.arange(n) for n in lengths)])[rows],
        shard_rows=dict(zip(numbers, lengths, strict=True)),
    )


def row_sources(live: LiveRows, plan: Callable[[int], Sequence[PlanEntry]]) -> list[PlanEntry]:
    """The source of each live row: as its own shard's plan has it, with the digest that was decoded."""
    found: list[PlanEntry] = []
    rows = zip(live.shards.tolist(), live.ids, live.digests, strict=True)
    for number, those in groupby(rows, lambda row: row[0]):  # one plan at a time: there may be millions of rows
        planned = {entry.id: entry for entry in plan(number)}
        for _, id_, digest in those:
            entry = planned.get(id_) or PlanEntry(id_, -1, -1)
            found.append(PlanEntry(id_, entry.size, entry.mtime_ns, digest or None, entry.place))
    return found


def read_file(path: PathLike, fix: str, expected: tuple[int, str] | None = None, *, again: bool = False) -> bytes:
    """The bytes of a file; with ``expected`` (size, crc32c) only those."""
    with refusals_raised(path, fix):
        if expected is None:
            return read_regular(path)
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            # A wrong size is refused before reading: a file that grew to gigabytes is not loaded for that.
            data = file.readall() if size == expected[0] else b""
    if size != expected[0] or crc32c(data) != expected[1]:
        if not again and (mirror := mirror_of(path)) and mirror.drop(Path(path)):
            return read_file(path, fix, expected, again=True)  # a copy may have been cut when power was lost
        raise CorruptStoreError(
            "a file of the feature store is not the one that was committed", code="file-changed",
            expected=f"{expected[0]} bytes, crc32c {expected[1]}",
            found=f"{size} bytes" + (f", crc32c {crc32c(data)}" if size == expected[0] else ""), where=path, fix=fix,
        )  # fmt: skip
    return data


@contextmanager
def refusals_raised(path: PathLike, fix: str) -> Iterator[None]:
    """Raise what the system refuses as errors of the store: missing is damage, the rest says nothing of the bytes."""
    try:
        yield
    except IrregularError as error:
        raise CorruptStoreError(
            "a file of the feature store is not a plain file", code="file-irregular", found=error.strerror, where=path,
            fix=fix,
        ) from error  # fmt: skip
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptStoreError(
            "a file of the feature store is missing", code="file-missing", where=path, fix=fix
        ) from error
    except OSError as error:
        raise StoreError(
            "a file of the feature store cannot be read", code="file-not-readable",
            found=error.strerror or str(error), where=path, fix="check the disk and its permissions, then try again",
        ) from error  # fmt: skip


def _not_ours(what: str, error: Exception, path: Path, fix: str) -> CorruptStoreError:
    """The error for a sealed file that embcache cannot have written."""
    found = f"lacks {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
    return CorruptStoreError(
        f"{what} is not as embcache writes it", code="file-foreign", found=found[:200], where=path, fix=fix
    )


def repair_command(store: Path) -> str:
    """The command that repairs a store."""
    return _repair_command(str(store), os.environ.get("EMBCACHE_HOME"))


@functools.lru_cache(maxsize=256)  # made for each file that is read, shown for the one that is damaged
def _repair_command(store: str, _: str | None) -> str:
    path = Path(store)
    backbone, more, home = re.sub(r"-[0-9a-f]{12}$", "", path.name), "", path.parent.parent
    with suppress(StoreError):
        header = read_header(path)
        if file := str(header.provenance.get("checkpoint", "")):
            backbone, more = header.recipe.backbone, " " + header.recipe.weights_option(file)
    words = ["embcache", "verify", "--repair", "--dataset", path.parent.name, "--backbone", backbone]
    return shlex.join(words if home == home_dir() else [*words, "--home", shown_home(home)]) + more


def recipe_fix(store: Path) -> str:
    """What to do about a damaged ``recipe.json``: nothing else says what the features are."""
    return f"restore it from a copy, or move the store away and extract again: mv {shlex.quote(str(store))} FOLDER"


def _recompute(folder: Path) -> str:
    return f"`{repair_command(folder.parent.parent)}`: it recomputes this shard only"
