"""Where things lie: the three folders a user can move, by argument or by environment variable."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

PathLike = str | os.PathLike[str]


def home_dir(home: PathLike | None = None) -> Path:
    """Folder of stores and runs: ``home``, else ``$EMBCACHE_HOME``, else ``~/.cache/embcache``."""
    return Path(home or os.environ.get("EMBCACHE_HOME") or Path.home() / ".cache" / "embcache").expanduser()


def data_dir() -> Path:
    """Folder of dataset roots: ``$EMBCACHE_DATA``, else ``./data``."""
    return Path(os.environ.get("EMBCACHE_DATA") or "data").expanduser()


def weights_dir(home: PathLike | None = None) -> Path:
    """Folder of checkpoints: ``$EMBCACHE_WEIGHTS``, else ``<home>/weights``."""
    return Path(os.environ.get("EMBCACHE_WEIGHTS") or home_dir(home) / "weights").expanduser()


def slug(name: str) -> str:
    """``name`` as one safe path component: ``[a-z0-9._-]``, never empty, hidden or able to leave its folder.

    Two names never share a slug: where characters were replaced, a short hash of the name is appended.
    """
    safe = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.")[:80]
    if safe == name:
        return safe
    return f"{safe or 'x'}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
