"""A dataset's files: safe relative paths, images at any level of a folder, and near misses of paths that are absent.

In a table ``s3://bucket/key`` names an object, which is read whole. Objects are not below the root, and need not be.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from embcache.data.budget import SHARED, Budget, too_large
from embcache.errors import DatasetError, ImageError, StoreError, first_few
from embcache.places import Entry, Place, open_place, split_url

# What Pillow and pydicom read of what lies in image collections; other files in class folders are counted, not read.
_DICOM_SUFFIXES = (".dcm", ".dicom", ".dic")
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".dib", ".gif", ".webp", ".avif", ".tga"}
    | {".jp2", ".j2k", ".jpx", ".pgm", ".ppm", ".pbm", ".pnm", ".pcx", *_DICOM_SUFFIXES}
)
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".pq", ".xlsx")  # a dataset may be a table of paths and labels
MOST_LEVELS = 64
"""Of folders in a class folder: more are a loop of mounts, or an attack on programs that walk them."""

# `IM000001`, `1.2.840.113619`, `I0000001.IMA`: scanners and archives name DICOM files so. Their content decides.
_UNNAMED = re.compile(r"[^.]+|.*\.(?:\d+|ima|acr|dc3)", re.IGNORECASE)
LARGE_FILE, LARGEST_FILE = 1 << 26, 1 << 32
"""Bytes of a file that is read while no other image is decoded; and that none may have that is read whole."""
_MOST_FILES = 500_000  # of a root that are looked through for a near miss


# Paths and ids that stay inside the root


def check_paths(paths: Sequence[str], column: str, *, where: object) -> None:
    """Raise `DatasetError` unless all ``paths`` are relative and, as written, stay inside the root.

    Ids must, too: they may contain slashes, and no file that is named after one may land elsewhere.
    """
    whole = "\n" + "\n".join(paths)  # one look at all of them, for there may be a million
    if not any(mark in whole for mark in ("..", "\n/", "\n\\", ":/", ":\\")):
        return
    for path in paths:
        if is_object(path):
            split_url(path)
        elif is_absolute(path) or (".." in path and ".." in path.replace("\\", "/").split("/")):
            raise refuse_outside(path, column, where=where)


def check_file_ids(ids: Iterable[str], *, where: object) -> None:
    """Raise `DatasetError` unless each id, which becomes a file's name, can name nothing but a file in its folder."""
    for image_id in ids:
        if "/" in image_id or "\\" in image_id or image_id in (".", ".."):
            raise refuse_outside(image_id, "id", where=where)


def is_absolute(path: str) -> bool:
    """Whether a path is absolute on any system."""
    return path.startswith(("/", "\\")) or path[1:3] in (":/", ":\\")


def is_inside(root: Path | str, real: str) -> bool:
    """Whether the resolved path ``real`` is ``root`` or lies in it."""
    base = os.path.realpath(root)
    return real == base or real.startswith(base.rstrip(os.sep) + os.sep)


def resolve_inside(root: Path | str, path: str) -> str:
    """The file that a path below ``root`` leads to, links followed; a `DatasetError` where it lies elsewhere."""
    real = os.path.realpath(os.path.join(root, path))  # noqa: PTH118
    if not is_inside(root, real):
        raise refuse_outside(path, where=root)
    return real


def refuse_outside(path: str, column: str = "path", *, where: object) -> DatasetError:
    """The error for a path, or an id read as one, that leads out of the dataset's root."""
    return DatasetError(
        f"the {column} of an image leaves the dataset's root, or could, and is refused", code="outside-root",
        expected="relative to the root, not absolute and without .., to a file inside it (links followed)",
        found=repr(path), where=where, fix="write it as seen from the root, or copy the file into it",
    )  # fmt: skip


# Objects

_OBJECTS = ("s3://", "gs://", "az://", "memory://")
_LOOKED_AT, _LOOKERS = 4000, 16  # keys that a thread looks for at a time, and threads
_PASSED = 2000  # objects that are not looked for, in a row: beyond them the listing starts again at the next that is


def is_object(path: str) -> bool:
    """Whether a path of a table names an object in an object store."""
    return path.startswith(_OBJECTS)


@contextmanager
def open_file(root: Path, path: str, budget: Budget = SHARED) -> Iterator[io.BytesIO | io.BufferedReader]:
    """A file below ``root``, or an object read whole, a large one while the budget is held; FileNotFoundError if none.

    `ImageError` for an object of more bytes than any file may have that is decoded.
    """
    if not is_object(path):
        with (root / path).open("rb") as file:
            yield file
        return
    bucket, key = split_url(path)
    place = open_place(bucket)
    with ExitStack() as held:
        try:
            data = place.get(key, most=LARGE_FILE)
        except StoreError as error:
            if error.code != "place-too-large":
                raise
            held.enter_context(budget.hold())
            data = _get_large(place, key)
        yield io.BytesIO(data)


def _get_large(place: Place, key: str) -> bytes:
    try:
        return place.get(key, most=LARGEST_FILE)
    except StoreError as error:
        if error.code != "place-too-large":
            raise
        raise file_too_large(error.found or "") from error


def file_too_large(size: str) -> ImageError:
    """The error for a file of more than `LARGEST_FILE` bytes."""
    return too_large(f"too large: a file of {size}, more than {LARGEST_FILE:,}: cut it into tiles")


def _stat_objects(urls: Iterable[str]) -> Iterator[tuple[str, FileState | None]]:
    """Each object with its state, None where there is none; by listings, which have up to 1,000 objects a request."""
    by_bucket = defaultdict[str, list[str]](list)
    for bucket, key in map(split_url, urls):
        by_bucket[bucket].append(key)
    for bucket, keys in by_bucket.items():
        keys.sort()
        chunks = [keys[start : start + _LOOKED_AT] for start in range(0, len(keys), _LOOKED_AT)]
        with ThreadPoolExecutor(min(_LOOKERS, len(chunks))) as pool:
            for found in pool.map(partial(_list_objects, open_place(bucket)), chunks):
                yield from ((f"{bucket}/{key}", state) for key, state in found)


def _list_objects(place: Place, keys: Sequence[str]) -> list[tuple[str, FileState | None]]:
    """The state of each of some keys, which ascend."""
    folder = os.path.commonpath([f"/{keys[0]}", f"/{keys[-1]}", f"/{keys[0].rpartition('/')[0]}"])[1:]
    found: list[tuple[str, FileState | None]] = []
    while len(found) < len(keys):
        passed = 0
        for entry in place.list(folder, after=_before(keys[len(found)])):
            while len(found) < len(keys) and keys[len(found)] < entry.key:
                found.append((keys[len(found)], None))
            if len(found) == len(keys) or (passed >= _PASSED and _before(keys[len(found)]) > entry.key):
                break
            passed += 1
            if entry.key == keys[len(found)]:
                found.append((entry.key, _object_state(entry)))
                passed = 0
        else:
            found += [(key, None) for key in keys[len(found) :]]
    return found


def _before(key: str) -> str:
    """What is less than a key, and not much less."""
    return key[:-1].rstrip("./")


def _object_state(entry: Entry) -> FileState:
    """Size and time of an object; in the place of the inode its etag, which is another one for other bytes."""
    time_ns, digest = round(entry.modified * 1e9), hashlib.sha256(entry.etag.encode()).digest()
    return FileState(entry.size, time_ns, time_ns, int.from_bytes(digest[:8], "big") >> 1)


# Images in folders


def is_litter(name: str) -> bool:
    """Whether an archive or a file manager left this file or folder (``__MACOSX``, ``._x``, ``.DS_Store`` …)."""
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini", "__pycache__")


def is_image_name(name: str) -> bool:
    """Whether a file name has an image's suffix."""
    _, dot, suffix = name.rpartition(".")
    return dot + suffix.lower() in IMAGE_SUFFIXES and not is_litter(name)


def has_dicom_suffix(name: str) -> bool:
    """Whether a file name ends as DICOM files' names do."""
    return name.lower().endswith(_DICOM_SUFFIXES)


def is_image_file(folder: Path | str, name: str) -> bool:
    """Whether a file's name has an image's suffix; or it has none, and the file is DICOM by its content."""
    if is_image_name(name):
        return True
    place = os.path.join(folder, name)  # noqa: PTH118
    if _UNNAMED.fullmatch(name) is None or is_litter(name) or not os.path.isfile(place):  # noqa: PTH113  # nor a pipe
        return False
    with open(place, "rb") as file:  # noqa: PTH123
        return file.read(132)[128:] == b"DICM"


def suffix_of(name: str) -> str:
    """A file's suffix for counting: both of ``.nii.gz``, "no suffix" where there is none."""
    match = re.fullmatch(r".+?((?:\.nii)?\.[A-Za-z][\w-]{0,15}|\.tar\.\w+)", name)
    return match.group(1).lower() if match else "no suffix"


def suffix_counts(paths: Iterable[str]) -> str:
    """Counts of files by suffix as text, the most first."""
    counts = Counter(suffix_of(path.rpartition("/")[2]) for path in paths)
    return ", ".join(f"{n:,} {suffix}" for suffix, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def passed_note(passed: Sequence[str]) -> list[str]:
    """A note on files that a scan passed over, by suffix."""
    what = f"{len(passed):,} files that are not images, or of no format that is read, are left out"
    return [f"{what}: {suffix_counts(passed)}"] if passed else []


def list_folder(folder: Path | str) -> list[os.DirEntry[str]]:
    """Entries of a folder sorted by name, litter left out."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not is_litter(e.name)), key=lambda e: e.name)


def subfolders(folder: Path) -> list[Path]:
    """Folders directly inside ``folder``, sorted by name."""
    return [folder / e.name for e in list_folder(folder) if e.is_dir()]


def find_level(root: Path, matches: Callable[[Path], bool]) -> Path | None:
    """The outermost folder at or below ``root`` for which ``matches`` holds, at most two levels down.

    Archives unpack into one or two folders of their own, and some hold a copy of themselves: the outermost wins.
    """
    level = [root]
    for remaining in (2, 1, 0):
        for folder in level:
            if matches(folder):
                return folder
        if remaining:
            level = [child for folder in level for child in subfolders(folder)]
    return None


def walk_images(
    root: Path, folder: str = "", passed: list[str] | None = None, outside: list[str] | None = None
) -> Iterator[str]:
    """Paths (relative to ``root``, posix) of the images at or below ``root/folder``, in sorted order.

    ``passed`` gets the paths of other files. Linked folders are passed over, for images inside the root are found where
    they are; those that lead out of it are refused, or added to ``outside``.
    """
    if folder.count("/") > MOST_LEVELS:
        raise DatasetError(
            "folders are nested too deep", code="folders-too-deep", expected=f"at most {MOST_LEVELS} levels",
            found=f"{folder[:60]}…", where=root, fix="name the folder of the class folders with --data-root",
        )  # fmt: skip
    for entry in list_folder(root / folder):
        path = f"{folder}/{entry.name}" if folder else entry.name
        if entry.is_dir():
            if not entry.is_symlink():
                yield from walk_images(root, path, passed, outside)
            elif not is_inside(root, os.path.realpath(entry.path)):
                if outside is None:
                    raise refuse_outside(path, where=root)
                outside.append(path)
        elif is_image_file(root / folder, entry.name):
            yield path
        elif passed is not None:
            passed.append(path)


def image_index(folder: Path) -> dict[str, str]:
    """File name of each image directly in ``folder`` by its stem, sorted; empty where there is no such folder."""
    index: dict[str, str] = {}
    for name in (entry.name for entry in list_folder(folder) if is_image_name(entry.name)) if folder.is_dir() else ():
        if (stem := _stem(name)) in index:
            raise DatasetError(
                f"two images have the id {stem!r}", code="duplicate-ids", expected="one file per id",
                found=f"{index[stem]} and {name}", where=folder, fix="remove the one that is not the dataset's",
            )  # fmt: skip
        index[stem] = name
    return index


# Whether files are there


class FileState(NamedTuple):
    """What shows, without reading it, that a file is the one that was there: size in bytes, times in ns, inode.

    Programs can restore ``mtime_ns`` and archives do; ``ctime_ns``, set by the system at every change of the file, and
    the inode, another one where another file took its name, they cannot. On Windows ``ctime_ns`` is when the file was
    made and there is no inode: a file that is rewritten in place, and has its time restored, is not noticed there.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


def locate_files(root: Path, paths: Sequence[str], *, sizes: bool = True) -> dict[str, int | None]:
    """Size in bytes (0 without ``sizes``) of every distinct path under ``root``, None where there is no such file.

    Each folder is listed once, so that 220,025 images cost two listings instead of as many look-ups.
    """
    return {path: state and state.size for path, state in stat_files(root, paths, sizes)}


def file_state(place: str | os.DirEntry[str]) -> FileState:
    """The state of a file now, through links."""
    return _state_of(os.stat(place) if isinstance(place, str) else place.stat())  # noqa: PTH116


def _state_of(state: os.stat_result) -> FileState:
    inode = state.st_ino & 0x7FFF_FFFF_FFFF_FFFF  # some file systems number them in more than 63 bits
    return FileState(state.st_size, state.st_mtime_ns, state.st_ctime_ns, inode)


def state_now(root: Path, path: str) -> FileState | None:
    """The state of one file, or object; None where there is none."""
    if is_object(path):
        return next(state for _, state in _stat_objects([path]))
    return file_state(os.path.join(root, path)) if (root / path).is_file() else None  # noqa: PTH118


def stat_files(root: Path, paths: Sequence[str], states: bool = True) -> Iterator[tuple[str, FileState | None]]:
    """Every distinct path with the state of its file (zeros without ``states``, but for objects), None if gone."""
    look = file_state if states else lambda place: FileState(0, 0, 0, 0)
    by_folder: dict[str, list[str]] = {}
    distinct = dict.fromkeys(paths)
    yield from _stat_objects(filter(is_object, distinct))
    for path in filter(lambda path: not is_object(path), distinct):
        by_folder.setdefault(path.rpartition("/")[0], []).append(path)
    folder_of = _real_folders(root)
    for folder, members in by_folder.items():
        place = folder_of(members[0])
        try:
            with os.scandir(place) as listed:
                entries = {e.name: e for e in listed}
        except (FileNotFoundError, NotADirectoryError):
            yield from ((path, None) for path in members)
            continue
        start = len(folder) + 1 if folder else 0
        for path in members:
            entry = entries.pop(path[start:], None)  # it keeps what it is asked
            try:
                if entry is not None and not entry.is_symlink():
                    yield path, look(entry) if entry.is_file() else None
                    continue
                # A link; or a name the file system spells otherwise (letter case, composed accents); or absent.
                real = resolve_inside(root, path)
                yield path, look(real) if stat.S_ISREG(os.stat(real).st_mode) else None  # noqa: PTH116
            except (FileNotFoundError, NotADirectoryError):  # absent, or gone since the folder was listed
                yield path, None


def stat_each(root: Path, paths: Sequence[str]) -> Iterator[FileState | None]:
    """As `stat_files`, file by file: a folder of which a partition names a few files is not listed."""
    folder_of, objects = _real_folders(root), dict(_stat_objects(filter(is_object, paths)))
    for path in paths:
        if path in objects:
            yield objects[path]
            continue
        place, name = folder_of(path), path.rpartition("/")[2]
        try:
            found = None if name in ("", ".", "..") or "\\" in name else os.lstat(f"{place}/{name}")
            if found is None or stat.S_ISLNK(found.st_mode):
                found = os.stat(resolve_inside(root, path))  # noqa: PTH116
            yield _state_of(found) if stat.S_ISREG(found.st_mode) else None
        except (FileNotFoundError, NotADirectoryError):
            yield None


def _real_folders(root: Path) -> Callable[[str], str]:
    """Returns the function that resolves the folder of a path: one look at each, for there may be 200,000.

    It refuses one that is not below ``root``.
    """
    base = os.path.realpath(root)
    within, known = base.rstrip(os.sep) + os.sep, {"": base}

    def real(folder: str) -> str:
        if folder not in known:
            above, _, name = folder.rpartition("/")
            place = os.path.join(real(above), name)  # noqa: PTH118
            plain = name not in ("", ".", "..") and "\\" not in name and not os.path.islink(place)  # noqa: PTH114
            known[folder] = place if plain else os.path.realpath(place)
        return known[folder]

    def folder_of(path: str) -> str:
        place = real(path.rpartition("/")[0])
        if place != base and not place.startswith(within):
            raise refuse_outside(path, where=root)
        return place

    return folder_of


# Paths that name no file: the file that was meant, where that is certain, and otherwise what comes near


def settle_paths(root: Path, paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths of a table as seen from its folder, where another way of writing them leaves no doubt; and notes.

    Absolute paths inside the root become relative; backslashes become slashes, and composed accents decomposed ones or
    the reverse, where no file has the name as it is written and one has it otherwise.
    """
    whole = "\n".join(paths)
    found, notes = list(paths), list[str]()

    def settle(others: list[str], why: str) -> None:
        changed = [(a, b) for a, b in zip(found, others, strict=True) if a != b]
        if changed:
            notes.append(f"{len(changed):,} paths {why}: {changed[0][0]!r} is {changed[0][1]!r}")
        found[:] = others

    if "/" in {path[:1] for path in paths}:
        inside = _relative(root)
        settle([inside(path) for path in found], "are absolute paths inside the folder")
    if "\\" in whole:
        slashed = [p if PureWindowsPath(p).drive else p.replace("\\", "/").removeprefix("./") for p in found]
        settle(_there_instead(root, found, slashed), "have backslashes, read as slashes")
    found = [path.removeprefix("./") for path in found]
    for form in () if whole.isascii() else ("NFC", "NFD"):
        other = [unicodedata.normalize(form, path) for path in found]
        why = f"are written in another Unicode form than their files, which have {form}"
        settle(_there_instead(root, found, other), why)
    return found, notes


def _relative(root: Path) -> Callable[[str], str]:
    """Returns the function that makes an absolute path inside ``root`` relative, links followed; others stay."""
    folders: dict[str, str] = {}

    def inside(path: str) -> str:
        if not path.startswith("/"):
            return path
        folder, _, name = path.rpartition("/")
        if folder not in folders:
            real = os.path.realpath(folder or "/")
            folders[folder] = os.path.relpath(real, root).replace(os.sep, "/") if is_inside(root, real) else ""
        relative = folders[folder]
        return path if not relative else name if relative == "." else f"{relative}/{name}"

    return inside


def _there_instead(root: Path, paths: list[str], others: list[str]) -> list[str]:
    """``others`` where they are there and what is written is not."""
    pairs = [(p, o) for p, o in zip(paths, others, strict=True) if p != o and not o.startswith("/") and ".." not in o]
    as_written = locate_files(root, [p for p, _ in pairs if ".." not in p], sizes=False)
    otherwise = locate_files(root, [o for _, o in pairs], sizes=False)
    better = {p: o for p, o in pairs if as_written.get(p) is None and otherwise[o] is not None}
    return [better.get(path, path) for path in paths]


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]  # noqa: PTH122


def _spellings(path: str) -> tuple[str, ...]:
    """What paths are compared by, the strictest first: without letter case, then suffix, then folder."""
    whole = unicodedata.normalize("NFC", path).casefold()
    stem = _stem(whole)
    return whole, stem, whole.rpartition("/")[2], stem.rpartition("/")[2]


def near_misses(root: Path, missing: Sequence[str]) -> tuple[str, str]:
    """Files that come near paths that are not there, in words, and advice; else two empty texts."""
    index: tuple[defaultdict[str, list[str]], ...] = tuple(defaultdict(list) for _ in range(4))
    files = 0
    for top, folders, names in os.walk(root):
        folders.sort()
        start = "" if Path(top) == root else os.path.relpath(top, root).replace(os.sep, "/") + "/"
        for path in (start + name for name in sorted(names)):
            for by, spelling in zip(index, _spellings(path), strict=True):
                by[spelling].append(path)
        files += len(names)
        if files > _MOST_FILES:
            break
    pairs = []
    for path in missing:
        plain = path.replace("\\", "/").removeprefix("./")
        spelled = zip(index, _spellings(plain), strict=True)
        hits = next((by[spelling] for by, spelling in spelled if spelling in by), [])
        if not hits and not plain.startswith("/") and (root.parent / plain).is_file():
            hits = [f"../{plain}"]
        pairs += [(path, hits)] if hits else []
    if not pairs:
        return "", ""
    near = first_few([f"{path} is there as {' or '.join(hits[:3])}" for path, hits in pairs], 2)
    certain = [(path, hits[0]) for path, hits in pairs if len(hits) == 1]
    if not certain:
        return near, f"write which file is meant: {' or '.join(pairs[0][1][:3])} for {pairs[0][0]}"
    around = {there.replace(path, "PATH", 1) for path, there in certain}  # one where all lack the same folder or suffix
    return near, f"write the paths as the files are called: {around.pop() if len(around) == 1 else certain[0][1]}"
