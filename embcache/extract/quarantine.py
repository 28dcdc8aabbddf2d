"""What of an image's trouble is the image's, and how much of it a run bears.

An image that cannot be decoded is quarantined: its row is kept, without features, with the reason. A disk, a mount or
a server that fails says nothing of an image, and stops the run: what was quarantined for it would be missing from every
table until somebody noticed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from embcache.data.dataset import ImageDataset
from embcache.data.images import ImageRef
from embcache.errors import DatasetError, DatasetNotFoundError, UsageError
from embcache.extract.batching import LEFT
from embcache.paths import PathLike
from embcache.store.commit import ShardRows
from embcache.store.feature_store import FeatureStore, extract_command
from embcache.store.reading import read_header, read_index

ON_ERROR = ("quarantine", "fail")
_VANISHED = "the file is not there"
_SHOWN = 20


def parse_max_bad(value: int | str, images: int) -> int:
    """How many of a dataset's images may be quarantined: ``"1%"`` of them, one at least, or a number."""
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)%", str(value).strip(), flags=re.ASCII)
    if match is None or (match[2] and float(match[2]) > 100):
        raise UsageError(
            "--max-bad is neither a number of images nor a share of them",
            expected="such as 20, or 1%",
            found=str(value),
            fix="--max-bad 1%",
        )
    if match[1]:
        return int(match[1])
    share = float(match[2])
    return max(1, int(images * share / 100)) if share else 0


def check_on_error(value: str) -> None:
    """`UsageError` for what an extraction cannot do with an unreadable image."""
    if value not in ON_ERROR:
        raise UsageError("unknown --on-error", expected=" or ".join(ON_ERROR), found=value, fix="--on-error quarantine")


class Guard:
    """Watches over one run: every shard passes it before it is committed."""

    def __init__(
        self,
        dataset: ImageDataset,
        root: Path,
        on_error: str = "quarantine",
        max_bad: int | str = "1%",
        home: PathLike | None = None,
    ) -> None:
        check_on_error(on_error)
        self._dataset, self._root, self._home = dataset, root, home
        self._fail, self._asked = on_error == "fail", max_bad
        self._allowed = parse_max_bad(max_bad, len(dataset))
        self._folder = _identity(root)
        self._tallies: dict[Path, _Tally] = {}

    @cached_property
    def _ids(self) -> frozenset[str]:  # asked for only where an image is bad
        return frozenset(self._dataset.table["id"].tolist())

    def look(self, source: ImageRef, reason: str) -> None:
        """Judge an image that cannot be used, as soon as that is known."""
        if reason == LEFT:
            return
        if reason == _VANISHED:
            self._check_root(source)
        if self._fail:
            raise DatasetError(
                f"an image cannot be used: {source.id}",
                found=reason,
                where=_path(self._root, source),
                fix="mend or remove it and run the same command; --on-error quarantine goes on without it",
            )

    def admit(self, commits: Sequence[tuple[FeatureStore, ShardRows]], sources: Sequence[ImageRef]) -> None:
        """Refuse the rows of one shard, in every store, if too many images are quarantined by then."""
        for store, rows in commits:
            bad = {image: why for image, why in zip(rows.ids, rows.reasons, strict=True) if why and why != LEFT}
            if not bad:
                continue
            for source in sources:
                if source.id in bad:
                    self.look(source, bad[source.id])
            tally = self._tallies.setdefault(store.path, _Tally(store, self._ids))
            again = set(rows.ids)
            # A row of the same image that was there is superseded.
            before = {image: why for image, why in tally.bad().items() if image not in again}
            if len(before) + len(bad) > self._allowed:
                raise self._too_many(store, {**bad, **before}, len(bad))

    def _too_many(self, store: FeatureStore, bad: Mapping[str, str], new: int) -> DatasetError:
        lines = [f"{image}: {reason}" for image, reason in list(bad.items())[:_SHOWN]]
        if len(bad) > _SHOWN:
            lines.append(f"… and {len(bad) - _SHOWN:,} more")
        command = extract_command(store.recipe.backbone, self._dataset, self._home)
        return DatasetError(
            f"too many images cannot be used: {len(bad):,} of {len(self._dataset):,} "
            f"({new:,} of them in the current shard, which is not committed)",
            expected=f"at most {self._allowed:,} (--max-bad {self._asked})",
            found="\n".join(lines),
            where=self._root,
            fix="mend or remove them and run the same command: what is committed stays; or bear with more of them:\n"
            f"{command} --max-bad {len(bad)}",
        )

    def _check_root(self, source: ImageRef) -> None:
        """`DatasetNotFoundError` where a file that is not there says something of its root, not of the image."""
        found = None
        if _identity(self._root) != self._folder or self._folder is None:
            found = "the folder is another one than when the run began, or none: was it unmounted?"
        elif _empty(self._root):  # of a mount that is gone, only the empty folder is left
            found = "the folder is empty: was it unmounted?"
        elif _path(self._root, source).exists():
            found = f"{source.path} was not there a moment ago, and is again: does the mount come and go?"
        if found:
            raise DatasetNotFoundError(
                "the images of the dataset went away while they were extracted",
                found=found,
                where=self._root,
                fix="bring the folder back, then run the same command: what is committed stays",
            )


class _Tally:
    """The quarantined images of a dataset in one store, kept up with what other processes commit."""

    def __init__(self, store: FeatureStore, ids: frozenset[str]) -> None:
        self._path, self._header, self._ids = store.path, read_header(store.path), ids
        self._seen: set[int] = set()
        self._bad: dict[str, str] = {}

    def bad(self) -> dict[str, str]:
        """Reasons by id; reads the shards that were committed since it was last asked."""
        for number in FeatureStore(self._path).committed():
            if number in self._seen:
                continue
            self._seen.add(number)
            index = read_index(self._path, self._header, number)
            for image, reason in zip(index.ids, index.reasons, strict=True):
                self._bad.pop(image, None)  # superseded
                if reason and reason != LEFT and image in self._ids:
                    self._bad[image] = reason
        return self._bad


def _empty(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return next(entries, None) is None


def _path(root: Path, source: ImageRef) -> Path:
    return root / source.path


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        state = os.stat(folder)  # noqa: PTH116  # not cached by anybody
    except OSError:
        return None
    return state.st_dev, state.st_ino
