"""Stores of a tiny network over real files, in shards of eight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import embcache.extract.extract as extracting
import embcache.extract.pixels as pixels
import embcache.extract.recipes as run
from embcache.backbones.catalog import find_backbone
from embcache.backbones.transforms import choose_transform
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.extract.pixels import cache_pixels
from tests.extract.conftest import images
from tests.extract.tiny import load_tiny, run_extraction
from tests.store.build import quick_disk

__all__ = ["images", "quick_disk"]

KINDS = ("zarr", "hdf5", "views", "pixels")
Make = Callable[[str], Path]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, quick_disk: None) -> None:
    """A small network, small shards, no waiting for the disk."""
    monkeypatch.setattr(run, "load_backbone", load_tiny)
    monkeypatch.setitem(extracting.ROWS_PER_SHARD, "cpu", 8)
    monkeypatch.setattr(pixels, "MAX_ROWS", 8)


@pytest.fixture
def ds(images: Path) -> ImageDataset:
    """Twenty images of two classes, one of which cannot be read."""
    path = images / "benign" / "01.png"
    path.write_bytes(path.read_bytes()[:100])
    return load_dataset("folder", images)


@pytest.fixture
def make(ds: ImageDataset, tiny: None, home: Path) -> Make:
    """Makes a store of one of ``KINDS`` over the dataset and gives its folder."""

    def extracted(kind: str) -> Path:
        if kind == "pixels":
            return cache_pixels(ds, choose_transform(find_backbone("random"), "paper", {(40, 40)})).path
        format, views = ("hdf5", 1) if kind == "hdf5" else ("zarr", 3 if kind == "views" else 1)
        (done,) = run_extraction(["random"], ds, format=format, views=views)
        return done.store.path

    return extracted


def flip(path: Path, position: int, bit: int = 0) -> bytes:
    """Change one bit of a file; gives the bytes before."""
    before = path.read_bytes()
    changed = bytearray(before)
    changed[position % len(before)] ^= 1 << bit
    path.write_bytes(bytes(changed))
    return before


def damage(path: Path, how: str) -> bytes:
    """Flip, cut, lengthen, empty or remove a file; gives the bytes before."""
    before = path.read_bytes()
    if how == "flip":
        return flip(path, len(before) // 2)
    if how == "remove":
        path.unlink()
    else:
        path.write_bytes({"cut": before[:-1], "lengthen": before + b"\0", "empty": b""}[how])
    return before


def files_of(store: Path) -> list[Path]:
    """Every file of a store but its view."""
    files = (path for path in store.rglob("*") if path.is_file())
    return sorted(path for path in files if not path.relative_to(store).parts[0].startswith("view."))


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of all that is under a folder."""
    return {
        path.relative_to(folder).as_posix(): (path.lstat().st_ino, path.lstat().st_mtime_ns)
        for path in (folder, *folder.rglob("*"))
    }
