"""Paths that name no file: what was meant, where that is certain, and otherwise what comes near."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path, PureWindowsPath

from embcache.data.files import is_inside, locate_files
from embcache.errors import first_few

_MOST = 500_000  # files of a root that are looked through for a near miss


def settle_paths(root: Path, paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths of a table as seen from its folder, where another way of writing them leaves no doubt; and notes.

    Absolute paths inside the root become relative; backslashes become slashes, and composed accents decomposed ones or
    the reverse, where no file has the name as it is written and one has it otherwise.
    """
    whole = "\n".join(paths)
    found, notes = list(paths), list[str]()
    if "/" in {path[:1] for path in paths}:
        inside = _relative(root)
        found = _told(found, [inside(path) for path in found], "are absolute paths inside the folder", notes)
    if "\\" in whole:
        slashed = [path.replace("\\", "/").removeprefix("./") for path in found]
        slashed = [p if not PureWindowsPath(f).drive else f for f, p in zip(found, slashed, strict=True)]
        found = _told(found, _there_instead(root, found, slashed), "have backslashes, read as slashes", notes)
    found = [path.removeprefix("./") for path in found]
    if not whole.isascii():
        for form in ("NFC", "NFD"):
            other = [unicodedata.normalize(form, path) for path in found]
            why = f"are written in another Unicode form than their files, which have {form}"
            found = _told(found, _there_instead(root, found, other), why, notes)
    return found, notes


def _told(before: list[str], after: list[str], why: str, notes: list[str]) -> list[str]:
    changed = [(b, a) for b, a in zip(before, after, strict=True) if b != a]
    if changed:
        notes.append(f"{len(changed):,} paths {why}: {changed[0][0]!r} is {changed[0][1]!r}")
    return after


def _relative(root: Path) -> Callable[[str], str]:
    """What makes an absolute path inside ``root`` relative to it, links in its folders followed; others stay."""
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
    if not pairs:
        return paths
    as_written = locate_files(root, [p for p, _ in pairs if ".." not in p], sizes=False)
    otherwise = locate_files(root, [o for _, o in pairs], sizes=False)
    better = {p: o for p, o in pairs if as_written.get(p) is None and otherwise[o] is not None}
    return [better.get(path, path) for path in paths]


def near_misses(root: Path, missing: Sequence[str]) -> tuple[str, str]:
    """What comes near paths that are not there, by cause with counts, and what to do about it; else two empty texts."""
    files = _files_below(root)
    if not files:
        return "", ""
    by_path, by_stem = _index(files, _folded), _index(files, lambda path: _folded(_stem(path)))
    by_name, by_name_stem = (
        _index(files, lambda p: _folded(_name(p))),
        _index(files, lambda p: _folded(_stem(_name(p)))),
    )
    causes: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
    for path in missing:
        plain = path.replace("\\", "/").removeprefix("./")
        hits: list[str] = []
        for cause, index, key in (
            ("letter case or Unicode form", by_path, _folded(plain)),
            ("suffix", by_stem, _folded(plain)),
            ("suffix", by_stem, _folded(_stem(plain))),
            ("folder", by_name, _folded(_name(plain))),
            ("folder and suffix", by_name_stem, _folded(_name(plain))),
            ("folder and suffix", by_name_stem, _folded(_stem(_name(plain)))),
        ):
            hits = index.get(key, [])
            if hits:
                causes[cause].append((path, hits))
                break
        if not hits and not plain.startswith("/") and (root.parent / plain).is_file():
            causes["table's folder"].append((path, [f"../{plain}"]))
    if not causes:
        return "", ""
    told = [
        f"{len(pairs):,} with another {cause}: {first_few([f'{a} is there as {_either(b)}' for a, b in pairs], 2)}"
        for cause, pairs in sorted(causes.items(), key=lambda item: -len(item[1]))
    ]
    return "\n".join(told), _advice(causes)


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
        if len(found) > _MOST:
            break
    return found


def _index(files: Sequence[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    index: dict[str, list[str]] = defaultdict(list)
    for path in files:
        index[key(path)].append(path)
    return index


def _folded(path: str) -> str:
    return path.casefold() if path.isascii() else unicodedata.normalize("NFC", path).casefold()


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]  # noqa: PTH122
