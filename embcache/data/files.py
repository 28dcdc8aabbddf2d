"""Finding a dataset's files: its root at whatever level it was given, its images, and what is absent."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from embcache.data.checks import refuse_outside
from embcache.errors import DatasetError

# What Pillow and pydicom read of what lies in image collections; other files in class folders are counted, not read.
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".dib", ".gif", ".webp", ".avif", ".tga"}
    | {".jp2", ".j2k", ".jpx", ".pgm", ".ppm", ".pbm", ".pnm", ".pcx", ".dcm", ".dicom", ".dic"}
)

_DICOM_SUFFIXES = (".dcm", ".dicom", ".dic")

MOST_LEVELS = 64
"""Of folders in a class folder: more are a loop of mounts, or made to break what walks them."""

# A dataset may be a table of paths and labels instead of a folder.
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".pq", ".xlsx")

# `IM000001`, `1.2.840.113619`, `I0000001.IMA`: scanners and archives name DICOM files so. Their content tells.
_UNNAMED = re.compile(r"[^.]+|.*\.(?:\d+|ima|acr|dc3)", re.IGNORECASE)


def is_litter(name: str) -> bool:
    """Whether a file or folder is an archive's or a file manager's leaving (``__MACOSX``, ``._x``, ``.DS_Store``…)."""
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
    if _UNNAMED.fullmatch(name) is None or is_litter(name):
        return False
    place = os.path.join(folder, name)  # noqa: PTH118
    if not stat.S_ISREG(os.stat(place).st_mode):  # noqa: PTH116  # a pipe would never answer
        return False
    with open(place, "rb") as file:  # noqa: PTH123
        return file.read(132)[128:] == b"DICM"


def suffix_of(name: str) -> str:
    """A file's suffix for counting: both of ``.nii.gz``, "no suffix" where there is none."""
    match = re.fullmatch(r".+?((?:\.nii)?\.[A-Za-z][\w-]{0,15}|\.tar\.\w+)", name)
    return match.group(1).lower() if match else "no suffix"


def passed_note(passed: Counter[str]) -> list[str]:
    """What to say of files that a scan passed over, by suffix."""
    if not passed:
        return []
    told = f"{sum(passed.values()):,} files that are not images, or of no format that is read, are left out"
    return [f"{told}: {suffix_counts(passed)}"]


def suffix_counts(passed: Counter[str]) -> str:
    """Counts by suffix as text, the most first."""
    return ", ".join(f"{n:,} {suffix}" for suffix, n in sorted(passed.items(), key=lambda item: (-item[1], item[0])))


def list_folder(folder: Path | str) -> list[os.DirEntry[str]]:
    """Entries of a folder sorted by name, litter left out."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not is_litter(e.name)), key=lambda e: e.name)


def subfolders(folder: Path) -> list[Path]:
    """Folders directly inside ``folder``, sorted by name."""
    with os.scandir(folder) as entries:
        return [folder / name for name in sorted(e.name for e in entries if e.is_dir() and not is_litter(e.name))]


def holds_images(folder: Path | str) -> bool:
    """Whether there is an image at or below a folder; linked folders are not looked into."""
    level, depth = [os.fspath(folder)], 0
    while level:
        if depth > MOST_LEVELS:
            raise too_deep(folder, os.path.relpath(level[0], folder))
        inner: list[str] = []
        for each in level:
            with os.scandir(each) as entries:
                for entry in entries:
                    if entry.is_dir():
                        inner += [] if entry.is_symlink() or is_litter(entry.name) else [entry.path]
                    elif is_image_name(entry.name) or (entry.is_file() and is_image_file(each, entry.name)):
                        return True
        level, depth = inner, depth + 1
    return False


def too_deep(where: Path | str, folder: str) -> DatasetError:
    """The error for folders that are nested more than `MOST_LEVELS` deep."""
    return DatasetError(
        "folders are nested too deep", expected=f"at most {MOST_LEVELS} levels", found=f"{folder[:60]}…",
        where=where,
        fix="name the folder of the class folders with --data-root",
    )  # fmt: skip


def find_level(root: Path, matches: Callable[[Path], bool], depth: int = 2) -> Path | None:
    """The outermost folder at or below ``root`` for which ``matches`` holds, at most ``depth`` levels down.

    Archives unpack into one or two folders of their own, and some hold a copy of themselves: the outermost wins.
    """
    level = [root]
    for remaining in range(depth, -1, -1):
        for folder in level:
            if matches(folder):
                return folder
        if remaining:
            level = [child for folder in level for child in subfolders(folder)]
    return None


def walk_images(
    root: Path, folder: str = "", passed: Counter[str] | None = None, *, refuse: bool = True
) -> Iterator[str]:
    """Paths (relative to ``root``, posix) of the images at or below ``root/folder``, in sorted order.

    Linked folders that lie inside the root are passed over (their images are found where they are). Other files are
    counted in ``passed`` by their suffix. Without ``refuse``, linked folders that lead out of the root are passed over.
    """
    if folder.count("/") > MOST_LEVELS:
        raise too_deep(root, folder)
    for entry in list_folder(root / folder):
        path = f"{folder}/{entry.name}" if folder else entry.name
        if entry.is_dir():
            if not entry.is_symlink():
                yield from walk_images(root, path, passed, refuse=refuse)
            elif refuse and not is_inside(root, os.path.realpath(entry.path)):
                raise refuse_outside(path, where=root)
        elif is_image_name(entry.name) or (entry.is_file() and is_image_file(root / folder, entry.name)):
            yield path
        elif passed is not None:
            passed[suffix_of(entry.name)] += 1


def image_index(folder: Path) -> dict[str, str]:
    """File name of each image directly in ``folder`` by its stem, sorted; empty where there is no such folder."""
    if not folder.is_dir():
        return {}
    index: dict[str, str] = {}
    for entry in list_folder(folder):
        if is_image_name(entry.name):
            stem = os.path.splitext(entry.name)[0]  # noqa: PTH122
            if stem in index:
                raise DatasetError(
                    f"two images have the id {stem!r}",
                    expected="one file an id",
                    found=f"{folder / index[stem]} and {folder / entry.name}",
                    where=folder,
                    fix="remove the one that is not the dataset's",
                )
            index[stem] = entry.name
    return index


def locate_files(root: Path, paths: Sequence[str], *, sizes: bool = True) -> dict[str, int | None]:
    """Size in bytes of every distinct path under ``root``, None where there is no such file.

    Each folder is listed once, so that 220,025 images cost two listings instead of as many look-ups.
    """
    if not sizes:
        return {path: state and state.size for path, state in _look(root, paths, lambda place: _NOT_LOOKED_AT)}
    return {path: state and state.size for path, state in stat_files(root, paths)}


class FileState(NamedTuple):
    """What tells, without reading it, that a file is the one that was there: size in bytes, times in ns, inode.

    Programs can restore ``mtime_ns`` and archives do; ``ctime_ns``, set by the system at every change of the file, and
    the inode, another one where another file took its name, they cannot. On Windows ``ctime_ns`` is when the file was
    made and there is no inode: a file that is rewritten in place, and has its time restored, is not noticed there.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


def stat_files(root: Path, paths: Sequence[str]) -> Iterator[tuple[str, FileState | None]]:
    """Every distinct path under ``root`` with the state of its file, or None where there is none."""
    return _look(root, paths, _state)


_NOT_LOOKED_AT = FileState(0, 0, 0, 0)


def _state(place: str | os.DirEntry[str]) -> FileState:
    state = os.stat(place) if isinstance(place, str) else place.stat()  # noqa: PTH116
    inode = state.st_ino & 0x7FFF_FFFF_FFFF_FFFF  # some file systems number them in more than 63 bits
    return FileState(state.st_size, state.st_mtime_ns, state.st_ctime_ns, inode)


def _look(
    root: Path, paths: Sequence[str], look: Callable[[str | os.DirEntry[str]], FileState]
) -> Iterator[tuple[str, FileState | None]]:
    by_folder: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        by_folder.setdefault(path.rpartition("/")[0], []).append(path)
    for folder, members in by_folder.items():
        inside = is_inside(root, os.path.realpath(root / folder))
        entries = {e.name: e for e in _scan(root / folder)}
        start = len(folder) + 1 if folder else 0
        for path in members:
            if not inside:
                raise refuse_outside(path, where=root)
            entry = entries.get(path[start:])
            try:
                if entry is not None and entry.is_file(follow_symlinks=False):
                    yield path, look(entry)
                    continue
                if entry is not None and not entry.is_symlink():
                    yield path, None
                    continue
                # A link; or a name the file system spells otherwise (letter case, composed accents); or absent.
                real = os.path.realpath(root / path)
                if not is_inside(root, real):
                    raise refuse_outside(path, where=root)
                yield path, look(real) if stat.S_ISREG(os.stat(real).st_mode) else None  # noqa: PTH116
            except (FileNotFoundError, NotADirectoryError):  # absent, or gone since the folder was listed
                yield path, None


def is_inside(root: Path | str, real: str) -> bool:
    """Whether the resolved path ``real`` is ``root`` or lies in it."""
    base = os.path.realpath(root)
    return real == base or real.startswith(base.rstrip(os.sep) + os.sep)


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
