"""Which images a run leaves out, and how many of them it accepts.

An image that cannot be decoded is quarantined: its row is kept, without features, with the reason. A disk, a mount or
a server that fails says nothing about an image, and stops the run: images quarantined for it would be missing from
every table until a user noticed.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from embcache.config import ExtractConfig
from embcache.data.images import ImageRef
from embcache.errors import DatasetError, DatasetNotFoundError, UsageError
from embcache.store.commit import ShardRows
from embcache.store.feature_store import FeatureStore
from embcache.store.reading import range_of, read_header, read_index

if TYPE_CHECKING:
    from embcache.extract.engines.engine import OwedShard

# Why a row is empty: its image left the dataset after the shard was planned, which is no fault of the image.
LEFT = "no longer in the dataset"
_VANISHED = "the file is not there"
_SHOWN = 20


def medium_failed(path: Path, error: OSError) -> DatasetError:
    """The error for a file that the system does not give: it says nothing about the image, so the run stops."""
    return DatasetError(
        "an image cannot be read for now; it is not quarantined, for that says nothing about the image",
        code="image-not-readable", found=f"{errno.errorcode.get(error.errno or 0, 'error')}: {error.strerror or error}",
        where=path,
        fix="check the disk, the mount and the permissions, then run the same command: what is committed stays",
    )  # fmt: skip


def parse_max_bad(value: int | str, images: int) -> int:
    """How many of a dataset's images may be quarantined: a number, or a percentage, of which one is always allowed."""
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)%", str(value).strip(), flags=re.ASCII)
    if match is None or (match[2] and float(match[2]) > 100):
        raise UsageError(
            "--max-bad is neither a number of images nor a percentage", code="option-max-bad",
            expected="such as 20, or 1%", found=str(value), fix="--max-bad 1%",
        )  # fmt: skip
    if match[1]:
        return int(match[1])
    share = float(match[2])
    return max(1, int(images * share / 100)) if share else 0


def unusable(quarantined: Mapping[str, str]) -> dict[str, str]:
    """The images of a store that count: not those that left the dataset."""
    return {image: why for image, why in quarantined.items() if why != LEFT}


class Quarantine:
    """Judges the unusable images of one run over a number of images: every shard is checked before it is committed.

    ``ids`` gives the IDs of a partition, by its digest; of a dataset without ``partitions`` all of them, for ``""``.
    """

    def __init__(
        self, images: int, ids: Callable[[str], Sequence[str]], root: Path, config: ExtractConfig,
        partitions: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._images, self._list_ids, self._root, self._config = images, ids, root, config
        self._partitions = partitions
        self._allowed = parse_max_bad(config.max_bad, images)
        self._folder = _identity(root)
        self._part = ""  # the partition that the tallies are of: the IDs of more would fill the memory
        self._tallies: dict[Path, _Tally] = {}

    def check(self, stores: Sequence[FeatureStore], rows: Sequence[ShardRows], shard: OwedShard) -> None:
        """Refuse the rows of one shard, in every store, if too many images would be quarantined."""
        if shard.part != self._part:
            self._part, self._tallies = shard.part, {}
        for store, each in zip(stores, rows, strict=True):
            bad = {image: why for image, why in zip(each.ids, each.reasons, strict=True) if why and why != LEFT}
            if not bad:
                continue
            for source in shard.sources:
                if bad.get(source.id) == _VANISHED:
                    self._check_root(source)
                if source.id in bad and self._config.on_error == "fail":
                    raise DatasetError(
                        f"an image cannot be used: {source.id}", code="bad-image", found=bad[source.id],
                        where=self._root / source.path, fix="repair or remove it and run the same command; --on-error "
                        "quarantine continues without it",
                    )  # fmt: skip
            tally = self._tallies.get(store.path)
            if tally is None:  # needed only if an image is bad
                ids = next((each.ids for each in self._tallies.values()), None)
                ids = frozenset(self._list_ids(shard.part)) if ids is None else ids
                others = frozenset(self._partitions) - {shard.part}
                tally = self._tallies[store.path] = _Tally(store.path, ids, others)
            again = set(each.ids)  # rows of the same images that were there are superseded
            before = {image: why for image, why in tally.bad().items() if image not in again}
            new = f"{len(bad):,} of them in the current shard, which is not committed"
            if error := self.too_many({**bad, **before}, new, shard.bad):
                raise error

    def too_many(self, bad: Mapping[str, str], new: str, elsewhere: int = 0) -> DatasetError | None:
        """The error for so many unusable images, given with their reasons; ``new`` says where the last were found."""
        total = elsewhere + len(bad)
        if total <= self._allowed:
            return None
        lines = [f"{image}: {reason}" for image, reason in list(bad.items())[:_SHOWN]]
        if total > len(lines):
            lines.append(f"… and {total - len(lines):,} more")
        return DatasetError(
            f"too many images cannot be used: {total:,} of {self._images:,} ({new})",
            code="too-many-bad-images", found="\n".join(lines), where=self._root,
            expected=f"at most {self._allowed:,} (--max-bad {self._config.max_bad})",
            fix="repair or remove them and run the same command: what is committed stays; or accept more of them: "
            f"the same command with --max-bad {total}",
        )  # fmt: skip

    def _check_root(self, source: ImageRef) -> None:
        """`DatasetNotFoundError` if a missing file says something about its root, not about the image."""
        found = None
        if self._folder is None or _identity(self._root) != self._folder:
            found = "the folder is another one than when the run began, or none: was it unmounted?"
        elif next(self._root.iterdir(), None) is None:  # of a mount that is gone, only the empty folder is left
            found = "the folder is empty: was it unmounted?"
        elif (self._root / source.path).exists():
            found = f"{source.path} was not there a moment ago, and is again: does the mount come and go?"
        if found:
            raise DatasetNotFoundError(
                "the images of the dataset went away while they were extracted", code="images-went-away", found=found,
                where=self._root, fix="bring the folder back, then run the same command: what is committed stays",
            )  # fmt: skip


class _Tally:
    """The quarantined images of a dataset, or of one partition, in a store, kept up with what others commit."""

    def __init__(self, store: Path, ids: frozenset[str], others: frozenset[str]) -> None:
        self._path, self._header, self.ids, self._others = store, read_header(store), ids, others
        self._seen: set[int] = set()
        self._bad: dict[str, str] = {}

    def bad(self) -> dict[str, str]:
        """Reasons by id; reads the shards that were committed since the last call."""
        for number in FeatureStore(self._path).committed():
            if number in self._seen:
                continue
            self._seen.add(number)
            if self._others and range_of(self._path, number)[0] in self._others:
                continue
            index = read_index(self._path, self._header, number)
            for image, reason in zip(index.ids, index.reasons, strict=True):
                self._bad.pop(image, None)  # superseded
                if reason and reason != LEFT and image in self.ids:
                    self._bad[image] = reason
        return self._bad


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        state = os.stat(folder)  # noqa: PTH116  # a fresh look
    except OSError:
        return None
    return state.st_dev, state.st_ino
