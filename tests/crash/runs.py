"""Real extractions with a small network, each in a process of its own that is forked from this one."""

from __future__ import annotations

import json
import marshal
import os
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet
import torch
import zarr.storage
from PIL import Image

import embcache.extract.engines.local as compute
import embcache.extract.extract as extracting
import embcache.extract.recipes as run
import embcache.extract.worker as worker
import embcache.store.lease as lease
from embcache.backbones.catalog import LoadedBackbone
from embcache.data.dataset import ImageDataset
from embcache.errors import EmbcacheError
from embcache.store.reading import shard_name
from tests.crash.faults import Hook, between
from tests.crash.powerloss import Journal
from tests.extract.conftest import draw
from tests.extract.tiny import load_tiny, run_extraction

ROWS = 4  # of a shard
BEFORE, AFTER = 6, 11  # images of the first and of the second extraction
HANGS_SECONDS = 120


@dataclass(frozen=True)
class Case:
    """One kind of extraction: into an empty home, or into one that holds an extraction of fewer images."""

    format: str
    backbones: tuple[str, ...]
    grown: bool = False

    def __str__(self) -> str:
        return f"{self.format}, {len(self.backbones)} backbone(s), {'grown' if self.grown else 'fresh'} home"


CASES = [
    Case(format, backbones, grown)
    for format in ("zarr", "hdf5")
    for backbones in (("random",), ("random", "random:1"))
    for grown in (False, True)
]


def prepare() -> None:
    """Settle, in the process that forks, all that its children share, modules too; it starts no thread."""
    assert zarr.storage
    assert pyarrow.parquet
    Image.init()
    torch.set_num_threads(1)
    run.load_backbone = _load
    extracting.ROWS_PER_SHARD["cpu"] = ROWS
    compute._POLL_SECONDS = 0.02


def _load(name: str, **_: object) -> LoadedBackbone:
    loaded = load_tiny(name)
    with torch.no_grad():
        for parameter in loaded.module.parameters():
            parameter *= 1 + zlib.crc32(name.encode()) % 7 / 8  # so that backbones differ
    return loaded


def draw_images(root: Path, *, grown: bool) -> None:
    """Images of two classes, one of them cut short; and those that come later, one of them with new bytes."""
    for index in range(BEFORE, AFTER) if grown else range(BEFORE):
        draw(_image(root, index), index, size=24)
    if grown:
        draw(_image(root, 1), 101, size=24)
    else:
        broken = _image(root, 3)
        broken.write_bytes(broken.read_bytes()[:60])


def _image(root: Path, index: int) -> Path:
    return root / ("benign" if index % 2 else "malignant") / f"{index:02}.png"


@dataclass(frozen=True)
class Done:
    """How a child ended."""

    status: int  # 0 well, 1 with an error that says what to do, 70 with another one, -9 killed
    computed: int = 0  # rows that went through a network
    error: str = ""


class Child:
    """A forked process that extracts.

    Parameters
    ----------
    dataset : ImageDataset
        Says where images are read.
    home : Path
        Where stores are written.
    case : Case
        What is extracted.
    log : Path
        Folder for what the child tells: one byte in ``shards`` for each shard of a store that it computed.
    hook : Hook, optional
        Stands between it and the filesystem.
    part : (int, int), optional
        As of ``run_extraction``.
    ttl : float, optional
        Seconds that a lease lives without a heartbeat.
    journal : Journal, optional
        In which its calls are written down, then left in its log's ``journal``.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        home: Path,
        case: Case,
        log: Path,
        *,
        hook: Hook | None = None,
        part: tuple[int, int] | None = None,
        ttl: float | None = None,
        journal: Journal | None = None,
    ) -> None:
        self._journal = journal
        self.log = log
        log.mkdir(parents=True, exist_ok=True)
        for name in ("shards", "end"):
            (log / name).unlink(missing_ok=True)
        self.pid = fork(lambda: self._extract(dataset, home, case, hook, part, ttl), log)

    def _extract(
        self,
        dataset: ImageDataset,
        home: Path,
        case: Case,
        hook: Hook | None,
        part: tuple[int, int] | None,
        ttl: float | None,
    ) -> None:
        if ttl is not None:
            lease.TTL_SECONDS = ttl
        original = worker.compute_shard
        counter = os.open(self.log / "shards", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def counting(root: Path, sources: Any, networks: Sequence[Any], **keywords: Any) -> Any:
            rows = original(root, sources, networks, **keywords)
            os.write(counter, b"." * len(networks))
            return rows

        worker.compute_shard = counting
        if self._journal:
            hook = self._journal.hook
            compute.commit_shard = _acknowledging(self._journal, home)
        with ExitStack() as stack:
            if hook:
                stack.enter_context(between(hook))
            done = run_extraction(
                list(case.backbones),
                dataset,
                home=home,
                format=case.format,
                workers=1,
                batch_size=3,
                part=part,
                device="cpu",
            )
        if self._journal:
            (self.log / "journal").write_bytes(marshal.dumps(self._journal.entries))
        text = json.dumps({"computed": sum(extraction.computed for extraction in done)})
        (self.log / "end").write_text(text)

    @property
    def shards(self) -> int:
        """Shards of a store computed so far."""
        path = self.log / "shards"
        return path.stat().st_size if path.exists() else 0

    def wait(self) -> Done:
        """Until it ends."""
        until = time.monotonic() + HANGS_SECONDS
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                os.kill(self.pid, 9)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"the extraction hangs: {self.log}")
            time.sleep(0.002)
        return status

    def poll(self) -> Done | None:
        """How it ended, or None; to be called until it is not None, and not again."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return None
        code = os.waitstatus_to_exitcode(status)
        end = self.log / "end"
        text = end.read_text() if end.exists() else ""
        return Done(code, json.loads(text)["computed"] if code == 0 else 0, text if code else "")


def _acknowledging(journal: Journal, home: Path) -> Callable[..., bool]:
    original = compute.commit_shard

    def commit_shard(store: Path, number: int, *arguments: Any, **keywords: Any) -> bool:
        won = original(store, number, *arguments, **keywords)
        journal.acknowledge((store / "shards" / shard_name(number)).relative_to(home).as_posix())
        return won

    return commit_shard


def fork(body: Callable[[], None], log: Path) -> int:
    """Run ``body`` in a forked process, whose status is 0, 1 (an `EmbcacheError`) or 70 (any other error)."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        body()
        code = 0
    except EmbcacheError as error:
        (log / "end").write_text(f"{type(error).__name__}: {error}")
        code = 1
    except BaseException:
        (log / "end").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def stores(home: Path) -> Iterator[Path]:
    """Folders of the stores under a home."""
    yield from sorted(path.parent for path in home.glob("*/[!.]*/recipe.json"))


def committed(home: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Committed shards, each with (inode, modification time) of its files."""
    found = {}
    for store in stores(home):
        for shard in sorted((store / "shards").iterdir()):
            files = [shard, *sorted(path for path in shard.rglob("*") if path.is_file())]
            states = [(path, path.stat()) for path in files]
            found[shard.relative_to(home).as_posix()] = {
                path.relative_to(shard).as_posix(): (state.st_ino, state.st_mtime_ns) for path, state in states
            }
    return found


def contents(home: Path) -> dict[str, bytes]:
    """All that a home holds but leases and staging: bytes of files, texts of links, arrays of ``view.h5``."""
    found: dict[str, bytes] = {}
    for path in sorted(home.rglob("*")):
        name = path.relative_to(home).as_posix()
        if {"leases", "staging"} & set(path.parts):
            continue
        if path.is_symlink():
            found[name] = b"-> " + os.fsencode(path.readlink())
        elif path.name == "view.h5":
            with h5py.File(path) as file:
                arrays = [np.asarray(file[key][...]) for key in ("features", "ids", "valid")]
                found[name] = (
                    b"".join(
                        repr(array.tolist()).encode() if array.dtype == object else array.tobytes() for array in arrays
                    )
                    + str(file.attrs["shards"]).encode()
                )
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def rubbish(home: Path) -> list[str]:
    """What lies in staging, and beside stores, and is not one's."""
    names = [path.name for store in stores(home) for path in (store / "staging").iterdir()]
    return names + [path.name for path in home.glob("*/.*")]
