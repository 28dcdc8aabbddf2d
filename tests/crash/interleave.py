"""Two commands on one home, one of them paused at each of its steps while the other runs whole.

A step is a call of `embcache.io` to the filesystem: what changes it, and what looks at it. Images come in versions;
each version's features are known from a store of its own, so that a row that serves another version's is found by
comparison, without embcache's own opinion of what is current.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import embcache.extract.engines.local as compute
import embcache.extract.extract as extracting
import embcache.extract.recipes as run
import embcache.store.lease as lease
from embcache import io
from embcache.data.dataset import load_dataset
from embcache.errors import EmbcacheError
from embcache.maintain.export import export_features
from embcache.maintain.gc import collect
from embcache.maintain.repair import Rebuild, repair_store
from embcache.maintain.verify import verify_store
from embcache.probe.probe import probe_features
from embcache.store.feature_store import FeatureStore, list_stores
from tests.crash.faults import CHANGING
from tests.extract.conftest import draw
from tests.extract.tiny import load_tiny, run_extraction

COMMANDS = ("extract", "gc", "repair", "verify", "probe", "export")
IMAGES, ROWS = 12, 4
SECOND, THIRD = (0, 1, 5), (2, 3, 6)  # images that changed before, and after, the last extraction
_LOOKING = ("open", "lstat", "scandir")


class _Watched:
    """What `embcache.io` takes for ``os``; tells of each call of the thread that made it, before it is made."""

    def __init__(self, names: tuple[str, ...], told: Callable[[], None]) -> None:
        self._names, self._told, self._thread = names, told, threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        original = getattr(os, name)
        if name not in self._names:
            return original

        def call(*arguments: Any, **keywords: Any) -> Any:
            if threading.get_ident() == self._thread:
                self._told()
            return original(*arguments, **keywords)

        return call


@contextmanager
def paused(at: int, other: Callable[[], None]) -> Iterator[list[int]]:
    """Run ``other`` whole before the ``at``-th step of what is inside; gives the number of steps, in a list."""
    steps, busy = [0], False

    def told() -> None:
        nonlocal busy
        if busy:
            return
        if steps[0] == at:
            busy = True
            other()
            busy = False
        steps[0] += 1

    before = io.os, io._look
    io.os, io._look = _Watched(CHANGING, told), _Watched(_LOOKING, told)  # type: ignore[assignment]
    try:
        yield steps
    finally:
        io.os, io._look = before


@contextmanager
def small() -> Iterator[None]:
    """A tiny network, small shards; leases that are over at once, for their holder is paused; no waiting for disks."""
    patches: list[tuple[Any, str, Any]] = [
        (run, "load_backbone", load_tiny),
        (extracting, "ROWS_PER_SHARD", {"cpu": ROWS, "cuda": ROWS}),
        (compute, "_POLL_SECONDS", 0.0),
        (lease, "TTL_SECONDS", -1.0),
        (lease.Lease, "_beat", lambda self: None),
        (os, "fsync", lambda descriptor: None),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@dataclass
class World:
    """A home in which every command has something to do, copied afresh for each trial.

    Attributes
    ----------
    totals : Counter
        Trials, steps, rows compared, errors that were told.
    """

    folder: Path
    format: str
    totals: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.images, self.home, self._base = self.folder / "images", self.folder / "home", self.folder / "base"
        self._versions: list[Mapping[str, bytes]] = []  # of each id, the features of its first, second … version
        for version, changed in enumerate((range(IMAGES), SECOND, THIRD)):
            for index in changed:
                draw(self._image(index), index + 100 * version, size=24)
            if version < 2:
                self._extract(self._base)
            self._extract(self.folder / f"only-{version}")
            self._versions.append(self._rows(self.folder / f"only-{version}"))
        self.dataset = load_dataset("folder", self.images)
        self._before = self._rows(self._base)

    def _image(self, index: int) -> Path:
        return self.images / ("benign" if index % 2 else "malignant") / f"{index:02}.png"

    def _extract(self, home: Path) -> None:
        dataset = load_dataset("folder", self.images)
        run_extraction(
            ["random"], dataset, home=home, format=self.format, workers=1, batch_size=ROWS, device="cpu"
        )  # fmt: skip

    @staticmethod
    def _rows(home: Path) -> Mapping[str, bytes]:
        (store,) = list_stores(home)
        return {id_: row.tobytes() for id_, row in zip(store.ids.tolist(), store.features[:], strict=True)}

    @property
    def store(self) -> Path:
        """The store's folder."""
        return list_stores(self.home)[0].path

    def start(self, *, damaged: bool) -> None:
        """Begin anew, with a shard that a repair must compute."""
        shutil.rmtree(self.home, ignore_errors=True)
        shutil.copytree(self._base, self.home, symlinks=True)
        if damaged:
            path = self.store / "shards" / "000003" / "commit.json"  # the highest: of the images that changed
            path.write_bytes(path.read_bytes()[:-1])

    def command(self, name: str) -> None:
        """Run one command; the error that it tells is none of ours."""
        try:
            {
                "extract": lambda: self._extract(self.home),
                "gc": lambda: collect(self.store),
                "repair": self._repair,
                "verify": lambda: verify_store(self.store),
                "probe": self._probe,
                "export": self._export,
            }[name]()
        except EmbcacheError as error:
            self.totals[f"errors told by {name}"] += 1
            self.last = str(error)

    def _repair(self) -> None:
        check = verify_store(self.store)
        if check.damage:
            repair_store(check, lambda: self.dataset, Rebuild(home=self.home, device="cpu"))

    def _probe(self) -> None:
        probe_features(
            self.dataset, ["random"], head="logreg", subset="F", folds=2, home=self.home, again=True
        )  # fmt: skip

    def _export(self) -> None:
        target = self.folder / "export.npz"
        export_features(list_stores(self.home)[0], self.dataset, target, overwrite=True)
        with np.load(target) as file:
            self._check_rows(dict(zip(file["ids"].tolist(), map(np.ndarray.tobytes, file["features"]), strict=True)))

    def trial(self, first: str, second: str, at: int) -> int:
        """``first``, paused before its ``at``-th step while ``second`` runs; gives the steps of ``first``."""
        self.start(damaged="repair" in (first, second))
        with paused(at, lambda: self.command(second)) as steps:
            self.command(first)
        with suppress(EmbcacheError):  # damaged still: an error was told, by the repair
            self._check_rows(self._rows(self.home))
        self._repair()
        self._check_rows(self._rows(self.home))
        self._extract(self.home)
        current, found = self._versions[2], self._rows(self.home)
        wrong = [id_ for id_, row in current.items() if found.get(id_) != row]
        assert not wrong, f"after an extraction, old features of {wrong}"
        check = verify_store(self.store)
        assert not check.damage, check.damage
        assert not check.planned, f"{check.planned} rows planned and not computed"
        entries = FeatureStore(self.store).sources()
        for path in self.dataset.table["path"]:
            state = (self.images / path).stat()
            kept = entries[path]
            assert kept.size == state.st_size or kept.digest, f"{path}: an entry that says nothing of its file"
        self.totals["trials"] += 1
        return steps[0]

    def _check_rows(self, rows: Mapping[str, bytes]) -> None:
        """Every row is there, and of no older version than before."""
        assert rows.keys() >= self._before.keys(), f"lost: {self._before.keys() - rows.keys()}"
        for id_, row in rows.items():
            known = [version[id_] for version in self._versions]
            assert row in known[known.index(self._before[id_]) :], f"{id_}: features of an older version"
            self.totals["rows compared"] += 1
