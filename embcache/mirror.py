"""A home in an object store, as a folder that everything else reads and writes like any other.

The object store is what counts; the folder, under ``$EMBCACHE_CACHE_DIR``, is a copy of what was needed of it so far
and can be deleted at any time. `embcache.io` calls a mirror where a path lies in one: changes are made in the object
store first and then here, and files of features are read from there when they are first opened.

Keys, under the prefix::

    home/<dataset>/dataset.parquet                          documents, under their paths in the home
    home/<dataset>/<store>/recipe.json, canaries.json, plan/000017.json           created once
    home/<dataset>/<store>/commits/000017.json              which attempt at a shard counts: created once
    home/<dataset>/<store>/manifests/001000.json            copies of a thousand commits
    home/<dataset>/runs/<id>.json                           which attempt at a run counts: replaced
    attempts/<dataset>/<store>/000017/<attempt>/data.zarr/… files, under a hash of all of them
    leases/…                                                advisory

A folder (a shard, a run) becomes visible by the one object that names its attempt, written last. Equal work is one
attempt. What other readers see is the old folder or the new one.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from embcache import io as disk
from embcache.errors import CorruptStoreError, StoreError, UsageError
from embcache.log import log
from embcache.places import (  # fmt: skip
    ENDPOINTS,
    Entry,
    Place,
    as_url,
    cache_bytes,
    cache_dir,
    check_key,
    is_url,
    open_place,
    probe,
    refuse_url,
)
from embcache.sealed import crc32c, file_records, hash_files, seal, unseal

MARK = ".place"  # file of a mirror: its URL
_SHARD = re.compile(r"(?P<store>[^/]+/[^/]+)/shards/(?P<name>\d{6,})/(?P<file>.*)")
_RUN = re.compile(r"(?P<dataset>[^/]+)/runs/(?P<name>[^/.][^/]*)/(?P<file>.+)")
_LEASE = re.compile(r"[^/]+/[^/]+/leases/[^/]+")
# Of this machine alone: checkpoints, drawings, states of files, and what is begun and not finished.
_OWN = re.compile(
    r"(weights|sample-images)(/.*)?|(.*/)?\..*|.*scan\.parquet"
    r"|[^/]+/(networks\.json|figures/.*|[^/]+/(staging|view\.zarr)/.*)"
)
# What belongs to one shard, or some, and is brought when it is needed: there may be very many. By key, and by path.
_MANY_KEYS = re.compile(r"home/[^/]+/([^/]+/(commits|manifests|plan)|partitions)/")
_MANY = re.compile(
    r"[^/]+/([^/]+/(plan/\d{6,}\.json|manifests/\d{6,}\.json|shards/\d{6,}/commit\.json)|partitions/[0-9a-f]{16}\.parquet)"
)
_PASSED = 2000  # of those in a row that a listing passes before it begins anew behind them
_COMMIT = "commit.json"
_FIRST = "result.json"  # of a run, which listings need
THREADS = 16  # requests at a time: what takes long is waiting for the answers
_FOLDED = 1000  # commits in one manifest
_FRESH_SECONDS, _CURRENT_SECONDS = 2.0, 60.0  # for which a store, and a home, are not listed again
_SETTLED_SECONDS = 60.0  # a younger file may be one that was written since the place was listed
_USED_SECONDS = 60.0  # for which what was brought stays, however full the cache is: it is about to be read
_GIVEN_UP_SECONDS = 86_400.0  # after which no process still writes an attempt at a run


class Mirror:
    """The folder ``root`` as a copy of a home in ``place``."""

    def __init__(self, root: Path, place: Place) -> None:
        self.root, self.place = root, place
        self._refreshed: dict[Path | None, float] = {}  # when documents were last compared with those of the place
        self._marked = -1.0  # when `MARK` was written, as of then: another one where all copies were deleted meanwhile
        self._plans: dict[Path, set[int]] = {}  # numbers of plans by store, as of then
        self._held: int | None = None  # bytes of features here
        self._lock = threading.Lock()  # of `_held`

    # Paths and keys

    def key(self, path: Path) -> str | None:
        """The key of a document; None for what is not one: of this machine alone, or a file of an attempt."""
        name = path.relative_to(self.root).as_posix()
        if _LEASE.fullmatch(name):
            return f"leases/{name}"
        if _OWN.fullmatch(name):
            return None
        if match := _SHARD.fullmatch(name):
            return f"home/{match['store']}/commits/{match['name']}.json" if match["file"] == _COMMIT else None
        if match := _RUN.fullmatch(name):
            return f"home/{match['dataset']}/runs/{match['name']}.json" if match["file"] == _COMMIT else None
        return f"home/{name}"

    def path(self, key: str) -> Path | None:
        """The inverse of :meth:`key`; None for a key that is none of ours."""
        name = key.removeprefix("home/")
        name = re.sub(r"^([^/]+/[^/]+)/commits/(\d{6,})\.json$", rf"\1/shards/\2/{_COMMIT}", name)
        name = re.sub(r"^([^/]+/runs)/([^/.][^/]*)\.json$", rf"\1/\2/{_COMMIT}", name)
        with suppress(ValueError):
            path = self.root / check_key(name)
            if self.key(path) == key and "/" in name and (_MANY.fullmatch(name) or not _MANY_KEYS.match(key)):
                return path
        return None

    def _is_many(self, path: Path) -> bool:
        return _MANY.fullmatch(path.relative_to(self.root).as_posix()) is not None

    def _created_once(self, path: Path) -> bool:
        """Whether a document never changes."""
        return self._is_many(path) or path.name in ("recipe.json", "canaries.json")

    def attempts(self, folder: Path) -> str:
        """Prefix of all attempts at a folder."""
        name = folder.relative_to(self.root).as_posix()
        match = _SHARD.fullmatch(f"{name}/")
        return f"attempts/{match['store']}/{match['name']}" if match else f"attempts/{name}"

    def address(self, folder: Path, file: str) -> str:
        """URL of a file of a committed folder, for readers without embcache."""
        attempt = _read_commit(folder / _COMMIT)["attempt"]
        return f"{self.place.url}/{self.attempts(folder)}/{attempt}/{file}"

    # What `embcache.io` calls before it changes something here

    def replace_file(self, path: Path, data: bytes) -> bool:
        """Write a document there and here, or one file of a run; False where it is neither."""
        if (match := _RUN.fullmatch(path.relative_to(self.root).as_posix())) and match["file"] != _COMMIT:
            folder = self.root / match["dataset"] / "runs" / match["name"]
            self._bring([folder / _COMMIT])  # its other files as they are there now
            names = _read_commit(folder / _COMMIT)["files"]
            files = {name: disk.read_regular(folder / name) for name in names}
            disk.replace_folder(folder, {**files, match["file"]: data})
            return True
        if (key := self.key(path)) is None:
            return False
        self.check_fit()
        self.place.put(key, data)
        if key.startswith("home/"):
            disk.cache_file(path, data)
        return True

    def create_file(self, path: Path, data: bytes) -> bool | None:
        """Create a document there; here it is then as it is there. None where it is none."""
        if (key := self.key(path)) is None:
            return None
        self.check_fit()
        created = self.place.put_new(key, data)
        if self._is_many(path) and path.parent.name == "plan" and path.parents[1] in self._plans:
            self._plans[path.parents[1]].add(int(path.stem))
        if not created:
            self._refreshed.clear()  # another process was quicker: the next listing is a new one
        if key.startswith("home/"):
            disk.cache_file(path, data if created else self.place.get(key))
        if created and path.name == "recipe.json":  # by which it is seen whether another one is there
            for entry in self.place.list(key.rpartition("/")[0]):
                if entry.key == key:
                    etags = {**self._etags(), str(path): entry.version}
                    disk.cache_file(self.root / ".etags.json", json.dumps(etags).encode())
        return created

    def replace_folder(self, folder: Path, files: Mapping[str, bytes | Path]) -> dict[str, bytes] | None:
        """Write a run there, whole; the files to write here. None where the folder is no run."""
        name = folder.relative_to(self.root).as_posix()
        if not _RUN.fullmatch(f"{name}/{_COMMIT}"):
            return None
        read = {n: data if isinstance(data, bytes) else disk.read_regular(data) for n, data in files.items()}
        read.pop(_COMMIT, None)
        sealed = self._upload(folder, read, {"files": file_records(read)})
        self.place.put(cast("str", self.key(folder / _COMMIT)), sealed)
        return {**read, _COMMIT: sealed}

    def commit_folder(self, folder: Path, files: Mapping[str, bytes], content: Mapping[str, Any]) -> bool:
        """Commit a shard's files there; whether this attempt is the one that counts.

        ``content`` is that of the commit; after a lost answer or a conflict the client may say that there is one
        already, of its own or none at all: so it is read back, and the attempts compared.
        """
        path = folder / _COMMIT
        sealed = self._upload(folder, files, content)
        key = cast("str", self.key(path))
        self.place.put_new(key, sealed)
        there = self.place.get(key)
        disk.cache_file(path, there)
        counts = _attempt(there, path) == _attempt(sealed, path)
        for name, data in files.items() if counts else ():
            disk.cache_file(folder / name, data)
        self._bound(sum(map(len, files.values())) if counts else 0)
        return counts

    def restore_folder(self, folder: Path, files: Mapping[str, bytes], content: Mapping[str, Any]) -> bool:
        """Write a damaged shard again; False where the commit, which is final, names other files."""
        path = folder / _COMMIT
        sealed = self._upload(folder, files, content)
        with suppress(CorruptStoreError):
            if _attempt(disk.read_regular(path), path) != _attempt(sealed, path):
                return False
        self.place.put(cast("str", self.key(path)), sealed)
        disk.cache_file(path, sealed)
        self.forget(folder)
        manifest = folder.parents[1] / "manifests" / f"{int(folder.name) // _FOLDED * _FOLDED:06d}.json"
        disk.discard(manifest)  # it has the damaged commit
        return True

    def collect(self, store: Path, committed: Iterable[int], *, dry_run: bool = False) -> list[Entry]:
        """Remove attempts at committed shards that do not count, and their leases; what was removed."""
        commits = {f"{number:06d}": store / "shards" / f"{number:06d}" / _COMMIT for number in committed}
        self._bring([*commits.values()])  # as they are there: what a copy does not name may count by now
        counts = {name: _read_commit(path)["attempt"] for name, path in commits.items()}
        top, leases = self.attempts(store), f"leases/{store.relative_to(self.root).as_posix()}/leases"
        found = [entry for entry in self.place.list(leases) if Path(entry.key).stem in counts]
        for entry in self.place.list(top):
            name, attempt, _ = f"{entry.key.removeprefix(f'{top}/')}//".split("/", 2)
            found += [entry] if re.fullmatch("[0-9a-f]{64}", attempt) and counts.get(name, attempt) != attempt else []
        return self._remove(found, dry_run)

    def collect_rest(self, *, dry_run: bool = False) -> list[Entry]:
        """Remove attempts at runs that were replaced a day ago or before, and what killed processes left of leases."""
        old = [entry for entry in self.place.list("leases") if re.fullmatch("leases/clock-[0-9a-f]+", entry.key)]
        for folder in sorted(self.root.glob("*/runs/[!.]*")):
            path = folder / _COMMIT
            self._bring([path])
            if path.exists():
                top, attempt = self.attempts(folder), _read_commit(path)["attempt"]
                old += [each for each in self.place.list(top) if not each.key.startswith(f"{top}/{attempt}/")]
        return self._remove([each for each in old if each.modified < time.time() - _GIVEN_UP_SECONDS], dry_run)

    def _remove(self, entries: list[Entry], dry_run: bool) -> list[Entry]:
        for entry in () if dry_run else entries:
            self.place.delete(entry.key)
        return entries

    def delete(self, path: Path) -> None:
        """Remove a document there; commits stay, for without one another attempt could win."""
        if (key := self.key(path)) is not None and not (self._is_many(path) and path.name == _COMMIT):
            self.place.delete(key)

    def fetch(self, path: Path) -> bool:
        """Bring a document or a file of a committed folder here; False where there is none."""
        name = path.relative_to(self.root).as_posix()
        match = _SHARD.fullmatch(name) or _RUN.fullmatch(name)
        if match is None or match["file"] == _COMMIT:
            return (self.key(path) or "").startswith("home/") and self.look(path)
        folder = Path(str(path)[: -len(match["file"]) - 1])
        try:
            commit = _read_commit(folder / _COMMIT)
        except FileNotFoundError:
            return False
        if match["file"] not in commit["files"]:
            return False
        try:
            data = self.place.get(f"{self.attempts(folder)}/{commit['attempt']}/{match['file']}")
        except FileNotFoundError:
            return False
        recorded, found = commit["files"][match["file"]], {"size": len(data), "crc32c": crc32c(data)}
        if recorded != found:
            raise CorruptStoreError(
                "a file in the object store is not the one that was committed", code="file-changed",
                expected=f"{recorded}", found=f"{found}", where=self.address(folder, match["file"]),
                fix="embcache verify --repair",
            )  # fmt: skip
        disk.cache_file(path, data)
        if match.re is _SHARD:
            self._bound(len(data))
        return True

    # What reads the folder calls

    def refresh(self, folder: Path | None = None, *, whole: bool = False, again: bool = False) -> None:
        """Bring documents here as they are there: those of one store with its commits, by default all but shards'.

        Not within a moment, unless ``again``. Plans are listed only, and brought when they are read. With ``whole`` a
        store's documents are brought although they are here and never change, and those go that are not there.
        """
        if self._marked != (marked := self._mark_time()):
            self._marked = marked
            self._refreshed.clear()
        age = time.monotonic() - self._refreshed.get(folder, -1e9)
        if not (whole or again) and age < (_FRESH_SECONDS if folder else _CURRENT_SECONDS):
            return
        from filelock import FileLock, Timeout  # which imports asyncio

        # One process of a machine at a time: of two, the one that read older bytes could be the last to write them.
        self.mark()
        lock = FileLock(self.root / ".refresh.lock")
        with suppress(Timeout):  # a long listing of another process is not waited for for ever
            lock.acquire(timeout=_SETTLED_SECONDS)
        try:
            self._refresh(folder, whole)
        finally:
            lock.release()
        self._refreshed[folder] = time.monotonic()

    def mark(self) -> None:
        """Say in the folder what it is a copy of."""
        if not (self.root / MARK).exists():
            disk.attach(self.root, self)
            disk.cache_file(self.root / MARK, self.place.url.encode())
            self._marked = self._mark_time()

    def _mark_time(self) -> float:
        with suppress(FileNotFoundError):
            return (self.root / MARK).lstat().st_mtime
        return 0.0

    def _refresh(self, folder: Path | None, whole: bool) -> None:
        started, known, learned, wanted = time.time(), self._etags(), dict[str, str](), dict[Path, int]()
        name = "" if folder is None else f"/{folder.relative_to(self.root).as_posix()}"
        plans, manifests = set[int](), list[Path]()
        for entry in self.place.list(f"home{name}") if folder else self._beyond_shards():
            if (path := self.path(entry.key)) is None:
                continue
            kind = path.parent.name if self._is_many(path) else ""
            plans |= {int(path.stem)} if kind == "plan" else set()
            manifests += [path] if kind == "manifests" else []
            # Not by its bytes alone, of which the tag is: they may have been others in between.
            before, now = known.get(str(path), ""), "" if kind else entry.version
            learned[str(path)], size = now, _size(path)
            stale = size != entry.size or (before != now and not self._created_once(path))
            if folder is None and path.name == "recipe.json" and size >= 0 and before != now:
                stale = self._remove_copies(path.parent)
            if whole or (stale and (not kind or path.name == _COMMIT)):
                wanted[path] = entry.size
            elif stale and size >= 0:  # cut when power was lost: brought when it is read
                with suppress(FileNotFoundError):
                    disk.remove(path)
        if not whole:
            self._unfold(manifests)
        # What was unfolded is here by now.
        self._bring({p: n for p, n in wanted.items() if whole or not self._is_many(p) or _size(p) != n})
        if folder is not None:
            self._plans[folder] = plans
            for path in [*folder.glob("plan/*.json"), *folder.glob(f"shards/*/{_COMMIT}")] if whole else ():
                if str(path) not in learned:
                    disk.remove(path.parent if path.name == _COMMIT else path)
        else:
            disk.cache_file(self.root / ".etags.json", json.dumps(learned).encode())
            for path in (Path(text) for text in {*known, *map(str, self._documents())} - {*learned}):
                # Younger than the listing: written by this or another process of this machine.
                with suppress(FileNotFoundError):
                    gone = str(path) in known or path.lstat().st_mtime < started - _SETTLED_SECONDS
                    if gone and (path.name != "recipe.json" or not self._remove_copies(path.parent)):
                        disk.remove(path.parent if path.name == _COMMIT else path)

    def _remove_copies(self, store: Path) -> bool:
        """Remove those of a store that someone has removed there, and what a killed removal left."""
        for name in ("shards", "manifests", "plan", "canaries.json", "recipe.json"):
            for path in (store / f"{name}.gone", store / name):
                with suppress(FileNotFoundError):
                    disk.remove(path)
        disk.cache_file(self.root / MARK, self.place.url.encode())  # other processes list again, too
        return True

    def _beyond_shards(self) -> Iterator[Entry]:
        """Documents of the home; a listing that passes many of shards begins anew behind them."""
        after, passed = "", 0
        while True:
            for entry in self.place.list("home", after):
                many = _MANY_KEYS.match(entry.key)
                passed = passed + 1 if many else 0
                if many and passed > _PASSED:
                    after, passed = f"{many[0]}~", 0  # greater than all digits
                    break
                if many is None:
                    yield entry
            else:
                return

    def plans(self, store: Path) -> set[int]:
        """Numbers of a store's plans."""
        self.refresh(store)
        return self._plans[store]

    def fold(self, store: Path, committed: Sequence[int]) -> None:
        """Keep the commits of each complete thousand of shards in one object: it only makes them quicker to read."""
        there = set(committed)
        for first in range(0, max(there, default=0) + 1, _FOLDED):
            numbers, path = range(first, first + _FOLDED), store / "manifests" / f"{first:06d}.json"
            if there.issuperset(numbers) and not path.exists():
                paths = [store / "shards" / f"{number:06d}" / _COMMIT for number in numbers]
                self.create_file(path, seal({"commits": [disk.read_regular(each).decode() for each in paths]}))

    def _unfold(self, manifests: Sequence[Path]) -> None:
        for path in manifests:
            first = int(path.stem)
            paths = [path.parents[1] / "shards" / f"{first + k:06d}" / _COMMIT for k in range(_FOLDED)]
            if all(each.exists() for each in paths) or (data := self.read(path)) is None:
                continue
            with suppress(CorruptStoreError, KeyError, ValueError, AttributeError):  # then they are read one by one
                for each, text in zip(paths, unseal(data, path, "")["commits"], strict=True):
                    if not each.exists():
                        self._install(each, text.encode())

    def look(self, path: Path) -> bool:
        """Whether a document exists, here or there; it is then here."""
        if path.exists() or self.key(path) is None:
            return path.exists()
        data = self.read(path)
        return data is not None and self._install(path, data)

    def read(self, path: Path) -> bytes | None:
        """A document as it is there now; None where there is none."""
        try:
            return self.place.get(cast("str", self.key(path)))
        except FileNotFoundError:
            return None

    def age(self, path: Path) -> float:
        """Seconds since a document was written, by the place's clock; infinite where there is none."""
        key = cast("str", self.key(path))
        tick = f"leases/clock-{secrets.token_hex(8)}"
        self.place.put(tick, b"\n")
        try:
            there = {entry.key: entry.modified for entry in self.place.list("leases") if entry.key in (key, tick)}
        finally:
            self.place.delete(tick)
        return there[tick] - there[key] if key in there and tick in there else float("inf")

    def prefetch(self, paths: Iterable[Path]) -> None:
        """Bring files of committed folders here, several at a time."""
        missing = [path for path in paths if not path.exists()]
        if missing:
            with ThreadPoolExecutor(THREADS, thread_name_prefix="fetch") as pool:
                list(pool.map(self.fetch, missing))

    def forget(self, folder: Path) -> None:
        """Remove the copies of files of a committed folder: what is read next is read from the place."""
        for path in folder.rglob("*"):
            if path != folder / _COMMIT and not path.name.startswith(".") and not path.is_dir():
                with suppress(FileNotFoundError):  # another process does the same
                    disk.remove(path)

    def drop(self, path: Path) -> bool:
        """Remove the copy of a file of a committed folder, which may have been cut; False where it is none."""
        match = _SHARD.fullmatch(path.relative_to(self.root).as_posix())
        if match is None or match["file"] == _COMMIT:
            return False
        with suppress(FileNotFoundError):
            disk.remove(path)
        return True

    def check_fit(self) -> None:
        """Try the place before the first write; `StoreError` where commits cannot rely on it."""
        if not (self.root / ".probed").exists():
            probe(self.place)
            disk.cache_file(self.root / ".probed", b"\n")
            log.info("%s will hold labels and patients too: let only your group read it", self.place.url)

    def _upload(self, folder: Path, files: Mapping[str, bytes], content: Mapping[str, Any]) -> bytes:
        """Write the files of an attempt; the sealed commit that names it."""
        self.check_fit()
        attempt = hash_files(files)
        self._put_all({f"{self.attempts(folder)}/{attempt}/{name}": data for name, data in files.items()})
        return seal({**content, "attempt": attempt})

    def _put_all(self, objects: Mapping[str, bytes]) -> None:
        with ThreadPoolExecutor(THREADS, thread_name_prefix="put") as pool:
            list(pool.map(self.place.put, objects.keys(), objects.values()))

    def _bring(self, paths: Mapping[Path, int] | Sequence[Path]) -> None:
        """Bring documents; of one that is damaged there, as many zeros as it is listed with."""
        sizes = paths if isinstance(paths, Mapping) else {}
        with ThreadPoolExecutor(THREADS, thread_name_prefix="get") as pool:
            read = pool.map(lambda path: self._readable(path, sizes.get(path, 0)), paths)
            for path, data in zip(paths, read, strict=True):
                try:
                    if data is not None:
                        self._install(path, data)
                except StoreError as error:  # of others: a document that has the name of a folder, say
                    log.warning("%s is not brought: %s", path, error.found)
        runs = [path for path in paths if path.name == _COMMIT and path.parents[1].name == "runs"]
        self.prefetch(path.with_name(_FIRST) for path in runs)

    def _readable(self, path: Path, size: int) -> bytes | None:
        try:
            return self.read(path)
        except CorruptStoreError as error:
            log.warning("%s: %s; %s", error.where, error.problem, error.found)
            return bytes(size)  # its readers find it damaged

    def _install(self, path: Path, data: bytes) -> bool:
        if path.name == _COMMIT and path.exists() and disk.read_regular(path) != data:
            self.forget(path.parent)  # of another attempt
        disk.cache_file(path, data)
        return True

    def _etags(self) -> dict[str, str]:
        with suppress(OSError, ValueError):
            found = json.loads(disk.read_regular(self.root / ".etags.json"))
            return {str(path): str(etag) for path, etag in found.items()}
        return {}

    def _documents(self) -> list[Path]:
        """Documents that are here, but those of shards."""
        found = []
        for root, folders, files in os.walk(self.root):
            folders[:] = [] if _MANY_KEYS.match(f"home/{Path(root).relative_to(self.root).as_posix()}/") else folders
            paths = [Path(root, name) for name in files]
            found += [path for path in paths if self.path(self.key(path) or "") == path and not self._is_many(path)]
        return found

    def _bound(self, added: int) -> None:
        """Count what was added, and remove the oldest files of features where there are too many bytes."""
        most = cache_bytes()
        with self._lock:
            if self._held is not None and self._held + added <= most:
                self._held += added
                return
            states = list[tuple[float, int, Path]]()
            for path in self.root.glob("*/*/shards/*/**/*"):
                with suppress(FileNotFoundError):  # another process removes it too
                    state = path.lstat()
                    kept = path.name == _COMMIT or path.name.startswith(".") or path.is_dir()  # "." while it is written
                    states += [] if kept else [(state.st_mtime, state.st_size, path)]
            self._held = sum(size for _, size, _ in states)
            for written, size, path in sorted(states):
                if self._held <= 0.8 * most or written > time.time() - _USED_SECONDS:
                    break
                with suppress(FileNotFoundError):
                    disk.remove(path)
                self._held -= size


def _size(path: Path) -> int:
    """Bytes of a file of this machine; -1 without one."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return path.lstat().st_size
    return -1


def _attempt(sealed: bytes, where: Path) -> str:
    return str(_checked(sealed, where)["attempt"])


def _read_commit(path: Path) -> dict[str, Any]:
    return _checked(disk.read_regular(path), path)


def _checked(sealed: bytes, path: Path) -> dict[str, Any]:
    """A commit's attempt and files: they become parts of keys and of paths."""
    content = unseal(sealed, path, f"remove {path.parent}: it is a copy")
    attempt, files = content.get("attempt"), content.get("files")
    bad = not isinstance(attempt, str) or not re.fullmatch("[0-9a-f]{64}", attempt) or not isinstance(files, dict)
    if bad or any(".." in Path(name).parts or Path(name).is_absolute() for name in cast("dict[str, Any]", files)):
        raise CorruptStoreError(
            "a commit is not as embcache writes it", code="file-foreign", found=f"attempt {str(attempt)[:80]!r}",
            where=path, fix="embcache verify",
        )  # fmt: skip
    return content


@functools.cache
def open_mirror(url: str) -> Mirror:
    """The mirror of a home in an object store; nothing is read or written there yet."""
    url = as_url(url)
    endpoint = next(filter(None, map(os.environ.get, ENDPOINTS)), "")
    digits = hashlib.sha256(f"{url}\0{endpoint}".encode()).hexdigest()[:12]
    readable = re.sub(r"[^a-z0-9]+", "-", url.lower()).strip("-")[:60]
    root = cache_dir() / f"{readable}-{digits}"
    mirror = Mirror(root, open_place(url))
    try:
        disk.attach(root, mirror)
        mirror.mark()
    except (OSError, StoreError) as error:
        raise UsageError(
            "copies of an object store cannot be kept here", code="cache-dir", where=root,
            found=error.found if isinstance(error, StoreError) else error.strerror,
            fix="--cache-dir FOLDER, on a disk that can be written",
        ) from error  # fmt: skip
    return mirror


def home_of(home: disk.PathLike) -> Path:
    """A home's folder: of a URL that of its mirror, which is brought up to date when it is first used."""
    path = Path(home).expanduser()
    if not is_url(home):
        refuse_url(home)
        if not os.path.isfile(path / MARK) or path.parent != cache_dir():  # noqa: PTH113  # False where not allowed
            return path
        home = disk.read_regular(path / MARK).decode()  # another process has opened it
    mirror = open_mirror(os.fspath(home))
    mirror.refresh()
    return mirror.root


def shown_home(home: disk.PathLike) -> str:
    """A home as a user types it."""
    mirror = disk.mirror_of(home)
    return mirror.place.url if mirror and mirror.root == Path(home) else as_url(home)
