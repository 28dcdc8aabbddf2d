"""The images that a store was made from, hashed again (``embcache verify --source``)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from embcache.cores import usable_cores
from embcache.data.dataset import ImageDataset
from embcache.data.images import Source, image_sources, read_image
from embcache.errors import DatasetNotFoundError, ImageError
from embcache.store.feature_store import FeatureStore

_AHEAD = 1024  # images handed to the threads at a time


@dataclass(frozen=True)
class SourceCheck:
    """What became of the images of a store's live rows.

    Attributes
    ----------
    checked : int
        Images that were read.
    changed, missing : tuple of str
        Ids whose bytes are others than those that the features were made from, and of which there is no file.
    removed : int
        Live rows of images that the dataset has no more; their rows are hidden.
    """

    checked: int
    changed: tuple[str, ...]
    missing: tuple[str, ...]
    removed: int

    @property
    def well(self) -> bool:
        """Whether every row is of the image that is there."""
        return not self.changed and not self.missing

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON data."""
        return {
            "checked": self.checked,
            "changed": list(self.changed),
            "missing": list(self.missing),
            "removed": self.removed,
        }


def check_source(
    store: FeatureStore, dataset: ImageDataset, on_rows: Callable[[int, int], object] = lambda done, total: None
) -> SourceCheck:
    """Hash the images of every live row again; modification times are not believed.

    Raises
    ------
    DatasetNotFoundError
        The images are not here.
    CorruptStoreError
        The store is damaged.
    OSError
        The disk fails.
    """
    root = dataset.root
    if root is None or not root.is_dir():
        raise DatasetNotFoundError(
            f"the images of {dataset.name} are not here", expected=str(root) if root else None, fix="--data-root FOLDER"
        )
    rows = store.sources()
    held = {id_: rows[id_].digest or "" for id_ in (*store.quarantined, *store.digests)}
    sources = [source for source in image_sources(dataset.table) if source.id in held]
    changed, missing, done = [], [], 0
    # File by file: the images of one array file lie beside each other, and are decoded from it in order.
    with ThreadPoolExecutor(usable_cores()) as pool:
        rest = iter(sources)
        while chunk := list(islice(rest, _AHEAD)):
            for source, digest in zip(chunk, pool.map(lambda s: digest_now(root, s), chunk), strict=True):
                if digest is None:
                    missing.append(source.id)
                elif held[source.id] and digest != held[source.id]:
                    changed.append(source.id)
            done += len(chunk)
            on_rows(done, len(sources))
    return SourceCheck(len(sources), tuple(changed), _still(missing, store), len(held) - len(sources))


def digest_now(root: Path, source: Source) -> str | None:
    """Sha256 (hex) of an image's bytes as they are now: of its file, or of its member of an array file.

    ``""`` where it can still not be read as an image; None where there is no file.
    """
    try:
        if source.member < 0:
            with (root / source.path).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        return read_image(root, source.path, source.member)[1]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ImageError:
        return "" if (root / source.path).is_file() else None


def readable_now(root: Path, source: Source) -> bool:
    """Whether an image can be decoded."""
    try:
        read_image(root, source.path, source.member)
    except ImageError:
        return False
    return True


def _still(missing: Sequence[str], store: FeatureStore) -> tuple[str, ...]:
    """Those of the missing that had features: the others were quarantined, maybe for the same reason."""
    return tuple(id_ for id_ in missing if id_ not in store.quarantined)
