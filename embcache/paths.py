"""Where things lie: the three folders a user can move, by argument or by environment variable."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from embcache.errors import EmbcacheError, StoreError, printable
from embcache.io import PathLike as PathLike
from embcache.io import mirror_of, mirrors
from embcache.log import log
from embcache.mirror import Mirror, home_of, shown_home
from embcache.places import as_url, is_url, refuse_url


def home_dir(home: PathLike | None = None) -> Path:
    """Folder of stores and runs: ``home``, else ``$EMBCACHE_HOME``, else ``~/.cache/embcache``.

    Of a URL (``s3://bucket/prefix``) the folder that mirrors it: see `embcache.mirror`.
    """
    return home_of(home or os.environ.get("EMBCACHE_HOME") or Path.home() / ".cache" / "embcache")


def home_text(home: PathLike | None = None) -> str:
    """`home_dir` as a user types it."""
    return shown_home(home_dir(home))


def portable_home(home: PathLike | None = None) -> str:
    """The home for processes that may have another working folder and environment; no address is opened."""
    given = home or os.environ.get("EMBCACHE_HOME")
    if is_url(given):
        return as_url(given)
    text = home_text(home)
    return text if is_url(text) else str(Path(text).absolute())


def addressed(text: str) -> str:
    """A text with addresses in the place of paths of documents that a folder here mirrors."""
    for root, mirror in mirrors():

        def address(match: re.Match[str], mirror: Mirror = mirror) -> str:
            key = mirror.key(Path(match[0]))
            return f"{mirror.place.url}/{key}" if (key or "").startswith("home/") else match[0]

        text = re.sub(re.escape(root) + r"[^\s'\"`,;:()]+", address, text)
    return text


def data_dir() -> Path:
    """Folder of dataset roots: ``$EMBCACHE_DATA``, else ``./data``."""
    return Path(os.environ.get("EMBCACHE_DATA") or "data").expanduser()


def weights_dir(home: PathLike | None = None) -> Path:
    """Folder of checkpoints: ``$EMBCACHE_WEIGHTS``, else ``<home>/weights``.

    Of a home in an object store, of which there are only copies here, that of the usual home.
    """
    folder = home_dir(home)
    folder = folder if mirror_of(folder) is None else Path.home() / ".cache" / "embcache"
    given = os.environ.get("EMBCACHE_WEIGHTS")
    refuse_url(given, "a folder in EMBCACHE_WEIGHTS; a checkpoint by its address is --weights NAME=s3://…")
    return Path(given or folder / "weights").expanduser()


def slug(name: str) -> str:
    """``name`` as one safe path component: ``[a-z0-9._-]``, never empty, hidden or able to leave its folder.

    Two names never share a slug: where characters were replaced, a short hash of the name is appended.
    """
    safe = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.")[:80]
    if safe == name and safe not in ("weights", "sample-images"):  # folders of a home that are no dataset's
        return safe
    return f"{safe or 'x'}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


def home_folders(home: Path, skipped: Callable[[PathLike, OSError], object] | None = None) -> list[Path]:
    """Folders of datasets in a home, links too, sorted; ``skipped`` (default `skip`) gets those that are unreadable."""
    found = []
    try:
        with os.scandir(home) as entries:
            folders = sorted(Path(e.path) for e in entries if e.is_dir() and not e.name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise not_readable(home, error) from error
    for folder in folders:
        try:
            with os.scandir(folder):
                found.append(folder)
        except OSError as error:
            (skipped or skip)(folder, error)
    return found


def not_readable(path: PathLike, error: OSError) -> StoreError:
    """The error for a folder or file of a home that this user may not read."""
    return StoreError(
        "a part of the home cannot be read", code="home-not-readable", found=error.strerror or str(error), where=path,
        fix=("ask its owner for permission (chmod -R g+rX)", "--home FOLDER"),
    )  # fmt: skip


@functools.lru_cache(maxsize=1 << 12)
def _say_skipped(path: str, why: str) -> None:
    log.warning("skipped %s: %s", printable(path), printable(why))


def skip(path: PathLike, error: OSError | EmbcacheError) -> None:
    """Log, once, that something in a home is skipped; a listing of the rest continues."""
    said = [error.problem, error.found] if isinstance(error, EmbcacheError) else [error.strerror or str(error)]
    _say_skipped(os.fspath(path), ": ".join(" ".join(text.split())[:300] for text in said if text))
