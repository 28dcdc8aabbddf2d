"""Reading and writing files safely: the only module that changes a filesystem.

- Files and folders appear whole: they are written under another name, flushed, and renamed or linked into place.
- They disappear whole: a folder is renamed before it is emptied, so that a process that still writes into it gets
  ``FileNotFoundError`` and never puts half of a folder into place.
- Files are flushed first, then each folder from the inside out, then the folder that holds the whole.
- What others can write is read only if it is a regular file of a limited size in a real folder: never a link, a pipe or
  a device, which could hang, never end, or lead out of the home.

Only functions of ``os`` are called, under two names, so that tests can intercept them: ``os`` for what changes the
disk, ``_look`` for what only reads it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import os as _look
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from embcache.errors import StoreError, UsageError
from embcache.log import log

if TYPE_CHECKING:
    from embcache.mirror import Mirror

PathLike = str | os.PathLike[str]
MOST_BYTES = 1 << 31
"""Largest file that is read whole without a recorded size; the snapshot of ten million images has half of it."""

STALE_SECONDS = 600.0
"""No write takes longer from its first byte under a staged name to its rename."""

_TAKEN = (errno.EEXIST, errno.ENOTEMPTY)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_NO_SYMLINKS = (*_NO_LINKS, errno.EACCES, errno.EINVAL)  # the last one: Windows, without the privilege
# What a filesystem answers that cannot flush a folder, or does not know this kind of rename.
_UNKNOWN = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
_GONE = ".gone"
_NOREPLACE, _EXCHANGE = 1, 2  # of Linux's renameat2
_STAGED = re.compile(r"\.(?P<name>.+)-[0-9a-f]{16}(?P<old>\.old)?(?P<gone>\.gone)?", re.DOTALL)
_OLD = ".old"
_READ = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
_FIX = "check the disk, then run the same command: what is committed stays"
_FIXES = {
    errno.ENOSPC: "free space there, then run the same command: what is committed stays",
    errno.EDQUOT: "raise the quota or free space, then run the same command: what is committed stays",
    errno.EACCES: "make the folder writable, or give --home FOLDER",
    errno.EROFS: "give --home FOLDER on a disk that can be written",
}


_MIRRORS: dict[str, Mirror] = {}


def attach(root: Path, mirror: Mirror) -> None:
    """Ask a mirror first about what is read and written under a folder; None or False: as usual, on this machine."""
    make_folder(root)
    os.chmod(root, 0o700)  # snapshots hold labels and patients
    _MIRRORS[f"{root}{os.sep}"] = mirror


def mirrors() -> list[tuple[str, Mirror]]:
    """Each mirror with the beginning of the paths that lie in it."""
    return list(_MIRRORS.items())


def mirror_of(path: PathLike) -> Mirror | None:
    """The mirror that a path lies in."""
    return next((m for root, m in _MIRRORS.items() if f"{os.fspath(path)}{os.sep}".startswith(root)), None)


class IrregularError(OSError):
    """What was to be read is a link, a pipe, a device or a folder, or is larger than it may be."""


def open_regular(path: PathLike, *, follow: bool = False) -> FileIO:
    """Open a regular file for reading, through a link only with ``follow``; `IrregularError` for anything else."""
    try:
        descriptor = _look.open(path, _READ & ~getattr(os, "O_NOFOLLOW", 0) if follow else _READ)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket
            raise _irregular(path) from error
        if error.errno == errno.ENOENT and (mirror := mirror_of(path)) and mirror.fetch(Path(path)):
            return open_regular(path, follow=follow)
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _irregular(path)
    return FileIO(descriptor, "r")


def read_regular(path: PathLike, *, most: int = MOST_BYTES, follow: bool = False) -> bytes:
    """The bytes of a regular file of at most ``most`` bytes; raises as `open_regular`."""
    with open_regular(path, follow=follow) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise IrregularError(errno.EFBIG, f"{size:,} bytes, more than the {most:,} that are read", str(path))
        return file.readall()


def list_folder(folder: PathLike) -> list[os.DirEntry[str]]:
    """Entries of a real folder, sorted by name; none where it does not exist; `IrregularError` for anything else."""
    try:
        if not stat.S_ISDIR(_look.lstat(folder).st_mode):
            raise IrregularError(errno.ENOTDIR, "not a real folder", str(folder))
        with _look.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []


def is_folder(path: PathLike) -> bool:
    """Whether there is a real folder, no link."""
    try:
        return stat.S_ISDIR(_look.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def bytes_under(path: Path) -> int:
    """Bytes of a file, or of all files under a folder; links count as links, what vanishes meanwhile as nothing."""
    walked = [f"{root}/{name}" for root, _, names in os.walk(path) for name in names]
    total = 0
    for each in [path] if path.is_symlink() or not path.is_dir() else walked:
        with suppress(FileNotFoundError):
            total += os.lstat(each).st_size
    return total


def is_stale(path: Path, older: float = STALE_SECONDS) -> bool:
    """Whether no process can still use it: not touched for ``older`` seconds, or dated as far in the future."""
    try:
        return abs(time.time() - path.lstat().st_mtime) > older
    except FileNotFoundError:
        return False


def _irregular(path: PathLike) -> IrregularError:
    return IrregularError(errno.EINVAL, "not a regular file (a link, a pipe, a device or a folder)", str(path))


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Raise what the system refuses as one `StoreError` that says what to do about it."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            "the feature store cannot be written", code="store-not-written", found=error.strerror or str(error),
            where=error.filename or where,
            fix=(_FIXES.get(error.errno or 0, _FIX), *["another --cache-dir FOLDER"] * (mirror_of(where) is not None)),
        ) from error  # fmt: skip


def staged_name(prefix: str) -> str:
    """A unique name; it begins with ``prefix``, by which what a killed process left is found."""
    return prefix + secrets.token_hex(8)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old bytes or the new ones, and nothing between; makes its folder."""
    prefix = f".{path.name}-"
    if (mirror := mirror_of(path)) and mirror.replace_file(path, data):
        return
    with writing(path):
        make_folder(path.parent)
        if not _same_bytes(path, data):
            staged = path.with_name(staged_name(prefix))
            try:
                with _removed_on_error(staged):
                    write_file(staged, data)
                    os.replace(staged, path)
            except FileNotFoundError:
                # Another process wrote the same file and removed what we had begun: ours counts as overwritten.
                if not path.exists():
                    raise
        # Also when it was there: who wrote it may have been killed before the name was on disk.
        sync_folder(path.parent)
        remove_leftovers(path.parent, prefix)


def cache_file(path: Path, data: bytes, *, again: bool = True) -> None:
    """Write a copy of what is kept elsewhere: whole or not at all, and not flushed."""
    with writing(path):
        staged = path.with_name(staged_name(f".{path.name[:100]}-"))
        try:
            os.makedirs(path.parent, exist_ok=True)
            with _removed_on_error(staged):
                staged.write_bytes(data)
                os.replace(staged, path)
        except (FileNotFoundError, FileExistsError):  # another process has just removed the folder
            if not again:
                raise
            cache_file(path, data, again=False)


def keep_file(path: Path, data: bytes) -> None:
    """`replace_file` of what only saves work: not kept where that cannot be written, in another user's home say."""
    try:
        replace_file(path, data)
    except StoreError as error:
        log.info("%s is not kept: %s", path, error.found)


def _same_bytes(path: Path, data: bytes) -> bool:
    with suppress(FileNotFoundError, IrregularError):
        return path.lstat().st_size == len(data) and read_regular(path) == data
    return False


def check_target(path: Path) -> None:
    """Raise a `UsageError` where `write_output` could not write: before hours of work, not after."""
    if _is_stream(path):
        return
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise _not_written(path, "it is a folder" if path.is_dir() else "its folder does not exist or is not writable")


def write_output(path: Path, data: bytes | str, *, parents: bool = False) -> Path:
    """Write a file that a user named, whole or not at all, through links and to devices; else a `UsageError`.

    Text is UTF-8, in which the bytes of file names that are not are escaped. With ``parents`` its folder is made.
    """
    data = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    if not parents:
        check_target(path)
    if _is_stream(path):
        path.write_bytes(data)  # /dev/stdout
    else:
        write_outputs({path: data})
    return path


def write_outputs(files: Mapping[Path, bytes]) -> None:
    """Write files, with their folders, as `write_output`: all or none, and the last one comes last."""
    first, staged = next(iter(files)), []
    try:
        for path in files:
            make_folder(path.parent)
        paths = [path.resolve() for path in files]  # through a link, not in its place
        if all((mirror := mirror_of(path)) and mirror.replace_file(path, files[path]) for path in files):
            return
        staged = [path.with_name(staged_name(f".{path.name[:100]}-")) for path in paths]
        for name, data in zip(staged, files.values(), strict=True):
            write_file(name, data)
        for name, path in zip(staged, paths, strict=True):
            os.replace(name, path)
            sweep(path.parent, path.name)
    except OSError as error:
        raise _not_written(first, str(error.strerror or error)) from error
    finally:
        for name in staged:
            with suppress(OSError):
                os.unlink(name)


def _is_stream(path: Path) -> bool:
    """Whether it is a device or a pipe."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _not_written(path: Path, reason: str) -> UsageError:
    return UsageError(
        "the file cannot be written", code="file-not-written", found=reason, where=path,
        fix="name a file in an existing folder that is writable",
    )  # fmt: skip


def replace_folder(target: Path, files: Mapping[str, bytes | Path]) -> None:
    """Write a folder whole or not at all, with copies or links of files, in place of what was there.

    Where the system can exchange two names that is one step; elsewhere the old folder is renamed first, and
    `list_replaced` restores it if the second rename never came. The later of two writers wins.
    """
    make_folder(target.parent)
    if mirror := mirror_of(target):
        files = mirror.replace_folder(target, files) or files
    with replacing(target) as staged:
        write_tree(staged, files)


@contextmanager
def replacing(target: Path, *, flush: bool = False) -> Iterator[Path]:
    """A name beside ``target`` for a file or folder that the block writes; at the end it takes the target's place.

    With ``flush`` everything is flushed to disk first. What was begun is removed on an error.
    """
    staged = target.with_name(staged_name(f".{target.name}-"))
    old = staged.with_name(staged.name + _OLD)
    try:
        yield staged
        for path in [staged, *staged.rglob("*")] if flush else ():
            sync_folder(path) if path.is_dir() else _sync(path)
        swap_in(staged, target, aside=old)
        sync_folder(target.parent)
    finally:
        # Removed too after an exchange of names: then what was there before lies here.
        for left in (staged, old) if target.exists() else (staged,):
            with suppress(OSError):
                remove(left)
    sweep(target.parent, target.name)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take(source: Path, target: Path) -> None:
    """A file under a second name; a copy where the filesystem cannot do that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    _sync(target)


def list_replaced(folder: Path) -> list[os.DirEntry[str]]:
    """`list_folder`, after giving back their names to folders whose replacement was killed between two renames."""
    entries = list_folder(folder)
    names, lost = {entry.name for entry in entries}, False
    for entry in entries:
        staged = _STAGED.fullmatch(entry.name)
        if staged and staged["old"] and not staged["gone"] and staged["name"] not in names:
            with suppress(OSError):  # a home that cannot be written to is still listed
                os.rename(entry.path, folder / staged["name"])
                lost = True
    return list_folder(folder) if lost else entries


def leftovers(folder: Path, name: str | None = None) -> list[Path]:
    """What killed processes have left in ``folder`` beside what they were to replace there: ``name``, or anything."""
    found = [(Path(entry.path), _STAGED.fullmatch(entry.name)) for entry in list_replaced(folder)]
    return [path for path, staged in found if staged and name in (None, staged["name"]) and is_stale(path)]


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove the `leftovers`; what cannot be removed stays."""
    with suppress(OSError):
        for path in leftovers(folder, name):
            with suppress(OSError):
                remove(path)


def create_exclusive(path: Path, data: bytes, *, staging: Path) -> bool:
    """Write a file that must not be there yet, whole or not at all; False when it is there."""
    prefix = exclusive_prefix(path)
    if (mirror := mirror_of(path)) and (created := mirror.create_file(path, data)) is not None:
        return created
    staged = staging / staged_name(prefix)
    with writing(path):
        won = False
        if not path.exists():
            with _removed_on_error(staged):
                write_file(staged, data)
                won = _link_new(staged, path)
        sync_folder(path.parent)
        remove_leftovers(staging, prefix)
    return won


def exclusive_prefix(path: Path) -> str:
    """How names under ``staging/`` begin that :func:`create_exclusive` of ``path`` removes."""
    return f"{path.parent.name}-{path.name}-"


def discard(path: Path) -> None:
    """`remove` a file or folder of a store, if it exists."""
    if mirror := mirror_of(path):
        mirror.delete(path)
    with writing(path), suppress(FileNotFoundError):
        remove(path)


def take_aside(path: Path, aside: Path) -> bool:
    """Move a file or folder of a store to another folder of its filesystem; False when it does not exist (any more)."""
    with writing(path):
        make_folder(aside.parent)
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return False
        sync_folder(path.parent)
        sync_folder(aside.parent)
    return True


def touch_file(path: Path) -> None:
    """Set a file's modification time to now, by the clock of the filesystem."""
    with writing(path):
        os.utime(path, follow_symlinks=False)


def filesystem_time(folder: Path, prefix: str) -> float:
    """Seconds since the epoch by the clock that stamps the files of ``folder``, that of a server perhaps."""
    path = folder / staged_name(prefix)
    with writing(folder):
        descriptor = os.open(path, _NEW, 0o666)
        try:
            os.write(descriptor, b"\n")
            os.fsync(descriptor)
            return os.fstat(descriptor).st_mtime  # of the open file: others may have removed the name by now
        finally:
            os.close(descriptor)
            with suppress(OSError):
                os.unlink(path)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each flushed to disk before the next is made."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        with suppress(FileExistsError):  # another process was quicker
            os.mkdir(path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    if os.name == "nt":
        return  # Windows has no handle to flush for a folder
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and flush it; none is left where that fails."""
    with _removed_on_error(path):
        descriptor = os.open(path, _NEW, 0o666)
        try:
            left = memoryview(data)
            while left:
                written = os.write(descriptor, left)  # a signal, a quota or 2 GiB may cut it short
                if not written:
                    raise OSError(errno.EIO, "nothing more can be written", str(path))
                left = left[written:]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_tree(
    root: Path,
    files: Mapping[str, bytes | Path],
    folders: Sequence[str] = (),
    links: Mapping[str, tuple[str, Path]] | None = None,
) -> None:
    """Write a new folder of bytes, of files that exist, of empty folders and links, and flush it.

    ``links`` has texts of symbolic links, and the files that are copied where links cannot be made. Where another
    process removes the folder meanwhile, that is a FileNotFoundError.
    """
    links = links or {}
    paths = [Path(folder) for folder in folders] + [Path(name).parent for name in (*files, *links)]
    inner = {part for path in paths for part in (path, *path.parents)} | {Path()}
    with _removed_on_error(root):
        # From the top, each one once: a root that was removed meanwhile must not come back in part.
        for folder in sorted(inner, key=lambda folder: len(folder.parts)):
            os.mkdir(root / folder)
        for name, data in files.items():
            write_file(root / name, data) if isinstance(data, bytes) else _take(data, root / name)
        for name, (text, source) in links.items():
            try:
                os.symlink(text, root / name)
            except (OSError, NotImplementedError) as error:
                if isinstance(error, OSError) and error.errno not in _NO_SYMLINKS:
                    raise
                write_file(root / name, read_regular(source))
        for folder in sorted(inner, key=lambda folder: -len(folder.parts)):
            sync_folder(root / folder)


def rename_new(staged: Path, target: Path) -> bool:
    """Rename a folder to a name that must be free; False, and the folder removed, when it is taken."""
    with _removed_on_error(staged):
        try:
            os.rename(staged, target)
        except OSError as error:
            if error.errno not in _TAKEN or not target.is_dir():
                raise
            with suppress(OSError):
                remove(staged)
            return False
    return True


def swap_in(staged: Path, target: Path, *, aside: Path | None = None) -> None:
    """Put a file or folder in the place of another one; what was there then lies at ``staged`` or at ``aside``."""
    if staged.is_file() and not target.is_dir():
        os.replace(staged, target)
        return
    for _ in range(100):
        try:
            os.rename(staged, target)
            return
        except OSError as error:
            if error.errno not in (*_TAKEN, errno.EISDIR, errno.ENOTDIR):
                raise
        if _rename_at(staged, target, _EXCHANGE):
            return
        # No atomic exchange here: for an instant there is nothing. Another process may do the same: look again.
        away = aside or staged.with_name(f"{staged.name}-{secrets.token_hex(4)}")
        with suppress(FileNotFoundError):
            if aside is not None and aside.exists():
                remove(aside)
            os.rename(target, away)
    raise StoreError("another process keeps writing the same", code="write-contention", where=target)


def remove(path: Path) -> None:
    """Remove a file or a folder, the folder at once for all who know its name."""
    if path.is_symlink() or not path.is_dir():
        os.unlink(path)
        return
    if path.suffix != _GONE:
        gone = path.with_name(path.name + _GONE)
        os.rename(path, gone)
        path = gone
    for folder, folders, files in os.walk(path, topdown=False):
        for name in (*files, *folders):
            inner = Path(folder, name)
            with suppress(FileNotFoundError):  # another process removes it too
                os.rmdir(inner) if name in folders and not inner.is_symlink() else os.unlink(inner)
    os.rmdir(path)


def remove_leftovers(folder: Path, *prefixes: str) -> None:
    """Remove what begins with a prefix: killed processes left it, or slower ones still write it in vain."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if name.startswith(prefixes):
                with suppress(OSError):
                    remove(folder / name)


@contextmanager
def _removed_on_error(staged: Path) -> Iterator[None]:
    """Remove what was begun when it cannot be finished: on a full disk it must not take space."""
    try:
        yield
    except OSError:
        with suppress(OSError):
            remove(staged)
        raise


def _link_new(staged: Path, path: Path) -> bool:
    """Give a staged file a name that must be free; False when it is taken."""
    try:
        try:
            os.link(staged, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # A filesystem without hard links.
            if not _rename_at(staged, path, _NOREPLACE):
                # Nor such a rename. Between look and rename another process may take the name: that costs work only.
                if path.exists():
                    return False
                os.rename(staged, path)
    except FileExistsError:
        return False
    except FileNotFoundError:
        # Only who takes the name removes what others have staged for it.
        if staged.exists() or not (staged.parent.is_dir() and path.parent.is_dir()):
            raise
        return False
    return True


def _rename_at(one: Path, other: Path, flags: int) -> bool:
    """Rename without replacing, or exchange two names, atomically; False where that is not to be had (Linux has it)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    at_cwd = -100
    if rename is None:
        return False
    if rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
