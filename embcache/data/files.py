"""A dataset's files: safe relative paths, images at any level of a folder, and near misses of paths that are absent."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import NamedTuple, NoReturn

from embcache.errors import DatasetError, first_few

# What Pillow and pydicom read of what lies in image collections; other files in class folders are counted, not read.
IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".dib", ".gif", ".webp", ".avif", ".tga"}
    | {".jp2", ".j2k", ".jpx", ".pgm", ".ppm", ".pbm", ".pnm", ".pcx", ".dcm", ".dicom", ".dic"}
)

MOST_LEVELS = 64
"""Of folders in a class folder: more are a loop of mounts, or an attack on programs that walk them."""

# A dataset may be a table of paths and labels instead of a folder.
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".pq", ".xlsx")

# `IM000001`, `1.2.840.113619`, `I0000001.IMA`: scanners and archives name DICOM files so. Their content decides.
_UNNAMED = re.compile(r"[^.]+|.*\.(?:\d+|ima|acr|dc3)", re.IGNORECASE)

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
        if is_absolute(path) or (".." in path and ".." in path.replace("\\", "/").split("/")):
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


def refuse_outside(path: str, column: str = "path", *, where: object) -> DatasetError:
    """The error for a path, or an id read as one, that leads out of the dataset's root."""
    if column == "id":
        return DatasetError(
            "an id leaves the dataset's root and is refused", code="outside-root", found=repr(path), where=where,
            expected="an id that, read as a path, is relative and stays inside the root", fix="correct the id",
        )  # fmt: skip
    return DatasetError(
        "a path leaves the dataset's root, or could, and is refused", code="outside-root", found=repr(path),
        expected="a path relative to the root, not absolute and without .., to a file inside it (links followed)",
        where=where, fix="write the path as seen from the root, or copy the file into it",
    )  # fmt: skip


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
    return name.lower().endswith((".dcm", ".dicom", ".dic"))


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


def passed_note(passed: Counter[str]) -> list[str]:
    """A note on files that a scan passed over, by suffix."""
    n = sum(passed.values())
    what = f"{n:,} files that are not images, or of no format that is read, are left out: {suffix_counts(passed)}"
    return [what] if passed else []


def suffix_counts(passed: Counter[str]) -> str:
    """Counts by suffix as text, the most first."""
    return ", ".join(f"{n:,} {suffix}" for suffix, n in sorted(passed.items(), key=lambda item: (-item[1], item[0])))


def list_folder(folder: Path | str) -> list[os.DirEntry[str]]:
    """Entries of a folder sorted by name, litter left out."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not is_litter(e.name)), key=lambda e: e.name)


def subfolders(folder: Path) -> list[Path]:
    """Folders directly inside ``folder``, sorted by name."""
    return [folder / e.name for e in list_folder(folder) if e.is_dir()]


def holds_images(folder: Path | str) -> bool:
    """Whether there is an image at or below a folder; linked folders are not looked into."""
    start = os.fspath(folder).count(os.sep)
    for top, folders, files in os.walk(folder, onerror=_reraise):
        if top.count(os.sep) - start > MOST_LEVELS:
            raise _too_deep(folder, os.path.relpath(top, folder))
        folders[:] = [name for name in folders if not is_litter(name)]
        if any(map(is_image_name, files)) or any(is_image_file(top, name) for name in files):
            return True
    return False


def _reraise(error: OSError) -> NoReturn:
    raise error


def _too_deep(where: Path | str, folder: str) -> DatasetError:
    return DatasetError(
        "folders are nested too deep", code="folders-too-deep", expected=f"at most {MOST_LEVELS} levels",
        found=f"{folder[:60]}…", where=where, fix="name the folder of the class folders with --data-root",
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
        raise _too_deep(root, folder)
    for entry in list_folder(root / folder):
        path = f"{folder}/{entry.name}" if folder else entry.name
        if entry.is_dir():
            if not entry.is_symlink():
                yield from walk_images(root, path, passed, refuse=refuse)
            elif refuse and not is_inside(root, os.path.realpath(entry.path)):
                raise refuse_outside(path, where=root)
        elif is_image_file(root / folder, entry.name):
            yield path
        elif passed is not None:
            passed[suffix_of(entry.name)] += 1


def image_index(folder: Path) -> dict[str, str]:
    """File name of each image directly in ``folder`` by its stem, sorted; empty where there is no such folder."""
    index: dict[str, str] = {}
    for entry in list_folder(folder) if folder.is_dir() else ():
        if is_image_name(entry.name):
            stem = _stem(entry.name)
            if stem in index:
                raise DatasetError(
                    f"two images have the id {stem!r}", code="duplicate-ids", expected="one file per id",
                    found=f"{folder / index[stem]} and {folder / entry.name}", where=folder,
                    fix="remove the one that is not the dataset's",
                )  # fmt: skip
            index[stem] = entry.name
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
    look = _state if sizes else lambda place: FileState(0, 0, 0, 0)
    return {path: state and state.size for path, state in _look(root, paths, look)}


def stat_files(root: Path, paths: Sequence[str]) -> Iterator[tuple[str, FileState | None]]:
    """Every distinct path under ``root`` with the state of its file, or None where there is none."""
    return _look(root, paths, _state)


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
        try:
            with os.scandir(root / folder) as listed:
                entries = {e.name: e for e in listed}
        except (FileNotFoundError, NotADirectoryError):
            entries = {}
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
    if not whole.isascii():
        for form in ("NFC", "NFD"):
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


def _folded(path: str) -> str:
    return path.casefold() if path.isascii() else unicodedata.normalize("NFC", path).casefold()


def _name(path: str) -> str:
    return _folded(path.rpartition("/")[2])


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]  # noqa: PTH122


_CAUSES: dict[str, tuple[Callable[[str], str], ...]] = {  # by what files are compared with a path, and it with them
    "letter case or Unicode form": (_folded, _folded),
    "suffix": (lambda p: _folded(_stem(p)), _folded, lambda p: _folded(_stem(p))),
    "folder": (_name, _name),
    "folder and suffix": (lambda p: _name(_stem(p)), _name, lambda p: _name(_stem(p))),
}


def near_misses(root: Path, missing: Sequence[str]) -> tuple[str, str]:
    """What comes near paths that are not there, by cause with counts, and advice; else two empty texts."""
    files = _files_below(root)
    indexes: dict[str, dict[str, list[str]]] = {cause: defaultdict(list) for cause in _CAUSES if files}
    for cause, index in indexes.items():
        for path in files:
            index[_CAUSES[cause][0](path)].append(path)
    found: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
    for path in missing if files else ():
        plain = path.replace("\\", "/").removeprefix("./")
        keys = ((cause, key(plain)) for cause, (_, *keys) in _CAUSES.items() for key in keys)
        for cause, key in keys:
            if hits := indexes[cause].get(key):
                found[cause].append((path, hits))
                break
        else:
            if not plain.startswith("/") and (root.parent / plain).is_file():
                found["table's folder"].append((path, [f"../{plain}"]))
    if not found:
        return "", ""
    lines = [
        f"{len(pairs):,} with another {cause}: {first_few([f'{a} is there as {_either(b)}' for a, b in pairs], 2)}"
        for cause, pairs in sorted(found.items(), key=lambda item: -len(item[1]))
    ]
    return "\n".join(lines), _advice(found)


def _either(paths: Sequence[str]) -> str:
    return " or ".join(paths) if len(paths) < 4 else f"{' or '.join(paths[:3])} or {len(paths) - 3:,} others"


def _advice(found: dict[str, list[tuple[str, list[str]]]]) -> str:
    several = [pair for pairs in found.values() for pair in pairs if len(pair[1]) > 1]
    causes = {cause: one for cause, pairs in found.items() if (one := [(a, b[0]) for a, b in pairs if len(b) == 1])}
    if not causes or len(several) > max(map(len, causes.values())):
        path, hits = several[0]
        return f"write which file is meant: {_either(hits)} for {path}"
    cause = max(causes, key=lambda name: len(causes[name]))
    path, there = causes[cause][0]
    if cause == "folder" and there.endswith(path) and all(b == there[: -len(path)] + a for a, b in causes[cause]):
        return f"write {there[: -len(path)]} before every path, or move the table into that folder"
    if cause == "suffix" and there.startswith(path) and all(b == a + there[len(path) :] for a, b in causes[cause]):
        return f"append {there[len(path) :]} to every path"
    if cause == "table's folder":
        return "move the table into the folder above it, which the paths are relative to"
    return f"write the paths as the files are called: {there} for {path}"


def _files_below(root: Path) -> list[str]:
    found: list[str] = []
    for top, folders, files in os.walk(root):
        folders.sort()
        start = "" if Path(top) == root else os.path.relpath(top, root).replace(os.sep, "/") + "/"
        found += [start + name for name in sorted(files)]
        if len(found) > _MOST_FILES:
            break
    return found
