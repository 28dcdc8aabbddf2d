"""The view of a store against the one that its shards give. Nothing here writes, and no library parses the view."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from embcache.io import IrregularError, is_folder, list_folder, read_regular
from embcache.store.formats import FORMATS
from embcache.store.header import StoreHeader
from embcache.store.reading import committed_numbers, read_live
from embcache.store.view import view_files, view_writer


@dataclass(frozen=True)
class ViewCheck:
    """What the comparison found.

    Attributes
    ----------
    wrong : tuple of (Path, str)
        Files that are not as they should be, and why.
    notes : tuple of str
        What is no damage: the view is missing, older than the store, or another version's.
    files, bytes : int
        Compared.
    """

    wrong: tuple[tuple[Path, str], ...] = ()
    notes: tuple[str, ...] = ()
    files: int = 0
    bytes: int = 0


def check_view(store: Path, header: StoreHeader) -> ViewCheck:
    """Make the view of a store anew, in memory, and compare it with the one that is there.

    Raises
    ------
    CorruptStoreError
        A shard is damaged: whether the view is right cannot be said.
    """
    view = store / FORMATS[header.format].view
    if not os.path.lexists(view):
        return ViewCheck(notes=("there is no view for plain readers: `embcache verify --repair` writes it",))
    wrong, files, size = _compare(store, header, view, committed_numbers(store))
    if not wrong:
        return ViewCheck((), (), files, size)
    again = "`embcache verify --repair` writes it anew"
    spanned, committed = spanned_shards(view), committed_numbers(store)
    if set(spanned) < set(committed) and not _compare(store, header, view, spanned)[0]:
        return ViewCheck((), (f"the view is older than the newest shard: {again}",), files, size)
    writer = view_writer(header.format)
    if _is_head(head := _head(view)) and writer.encode() not in head:
        return ViewCheck((), (f"the view is not by {writer} and cannot be compared: {again}",), files, size)
    return ViewCheck(tuple(sorted(wrong)), (), files, size)


def _compare(
    store: Path, header: StoreHeader, view: Path, numbers: Sequence[int]
) -> tuple[list[tuple[Path, str]], int, int]:
    """What differs from the view over some shards; files and bytes compared."""
    files, links = view_files(header, read_live(store, header, numbers))
    wrong = [(store / name, problem) for name, data in files.items() if (problem := _differs(store / name, data))]
    for link, target in links.items():
        if problem := _misleads(store / link, os.path.relpath(target, Path(link).parent), store / target):
            wrong.append((store / link, problem))
    wrong += [(path, "the view has no such file") for path in _files_of(view) - {store / n for n in (*files, *links)}]
    return wrong, len(files) + len(links), sum(map(len, files.values()))


def spanned_shards(view: Path) -> list[int]:
    """Numbers of the shards that a view leads to, as its names say; none of it is parsed."""
    names: list[str] = []
    with suppress(OSError):  # not there, a link, a pipe …: it leads to nothing
        if is_folder(view):
            names = [entry.name for entry in list_folder(view / "features" / "c")]
        else:
            names = [digits.decode() for digits in re.findall(rb"shards/(\d{6,12})/data\.h5", read_regular(view))]
    return sorted({int(name) for name in names if name.isascii() and name.isdecimal() and len(name) < 13})


def _differs(path: Path, data: bytes) -> str:
    try:
        if path.lstat().st_size == len(data) and read_regular(path) == data:
            return ""
    except (FileNotFoundError, NotADirectoryError):
        return "a file of the view is missing"
    except IrregularError as error:
        return str(error.strerror)
    return "it is not what the shards give"


def _misleads(link: Path, relative: str, target: Path) -> str:
    if link.is_symlink():
        return "" if os.readlink(link) == relative else f"the link leads to {os.readlink(link)}, not {relative}"  # noqa: PTH115
    return _differs(link, read_regular(target))  # where links cannot be made, chunks are copied


def _files_of(view: Path) -> set[Path]:
    if not view.is_dir() or view.is_symlink():
        return {view}
    # A link to a folder is no folder of the view, and is not followed.
    return {
        path
        for root, folders, names in os.walk(view)
        for path in (Path(root) / name for name in (*names, *folders))
        if path.is_symlink() or not path.is_dir()
    }


def _is_head(head: bytes) -> bool:
    """Whether this can be what another version wrote: the signature of an HDF5 file, or whole JSON."""
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return True
    try:
        return isinstance(json.loads(head), dict)
    except (ValueError, RecursionError):
        return False


def _head(view: Path) -> bytes:
    """The file in which a view says who wrote it."""
    try:
        return read_regular(view / "zarr.json" if is_folder(view) else view)
    except (FileNotFoundError, IrregularError):
        return b""
