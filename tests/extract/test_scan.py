"""What a scan of the images may be spared, and what not."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from embcache.backbones.catalog import find_backbone
from embcache.backbones.transforms import choose_transform
from embcache.data.dataset import ImageDataset, load_dataset
from embcache.errors import DatasetError, DatasetNotFoundError
from embcache.extract import recipes as run
from embcache.extract import scan as scanning
from embcache.extract.extract import Extraction
from embcache.extract.scan import Scan, decode_scan, encode_scan, read_sizes, scan_dataset, scan_images
from tests.extract.conftest import draw
from tests.extract.tiny import load_tiny, run_extraction
from tests.refusal import refused


@pytest.fixture
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def dataset(images: Path) -> ImageDataset:
    return load_dataset("folder", images)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the headers that are read, by the decoder or without it."""
    paths: list[str] = []
    decoder, bare = scanning.read_size, scanning.is_square_of

    def by_decoder(root: Path, path: str, place: str) -> tuple[int, int]:
        paths.append(path)
        return decoder(root, path, place)

    def without(path: str, side: int) -> bool:
        found = bare(path, side)
        paths.extend(["/".join(Path(path).parts[-2:])] * found)
        return found

    monkeypatch.setattr(scanning, "read_size", by_decoder)
    monkeypatch.setattr(scanning, "is_square_of", without)
    return paths


def kept(scan: Scan, folder: Path) -> pd.DataFrame | None:
    (folder / "scan.parquet").write_bytes(encode_scan(scan))
    return decode_scan(folder / "scan.parquet")


def test_headers_are_read_once(
    dataset: ImageDataset, images: Path, tmp_path: Path, pool: Executor, read: list[str]
) -> None:
    first = scan_images(dataset, images, None, pool)
    assert set(read_sizes(first, pool)) == {(40, 40)}
    assert sorted(read) == sorted(dataset.table["path"])
    again = scan_images(dataset, images, kept(first, tmp_path), pool)
    assert set(read_sizes(again, pool)) == {(40, 40)}
    assert np.array_equal(again.states, first.states)
    assert np.array_equal(again.seen, first.seen)
    assert len(read) == 20


def test_a_large_image_or_a_second_size_spares_the_other_headers(
    images: Path, pool: Executor, read: list[str], tmp_path: Path
) -> None:
    for index in range(100):
        draw(images / "benign" / f"more{index:03}.png", 100 + index)
    draw(images / "benign" / "0.png", 1, size=56)  # the first to be listed
    dataset = load_dataset("folder", images)
    scan = scan_images(dataset, images, None, pool)
    sizes = read_sizes(scan, pool)
    assert choose_transform(find_backbone("random"), None, sizes).resize == (256, 256)
    assert len(read) < 40
    before = len(read)
    again = scan_images(dataset, images, kept(scan, tmp_path), pool)
    assert choose_transform(find_backbone("random"), None, read_sizes(again, pool)).resize == (256, 256)
    assert len(read) == before
    # What decided has gone: the headers that were not read are unknown, not unreadable.
    (images / "benign" / "0.png").unlink()
    left = scan_images(load_dataset("folder", images), images, kept(scan, tmp_path), pool)
    assert choose_transform(find_backbone("random"), None, read_sizes(left, pool)).resize is None
    assert left.seen.tolist() == [[40, 40]] * 120


def test_none_readable_is_told_and_one_is_enough(images: Path, home: Path, pool: Executor) -> None:
    files = sorted(images.rglob("*.png"))
    for path in files[:-1]:
        path.write_bytes(b"broken")
    dataset = load_dataset("folder", images)
    assert set(scan_dataset(dataset, home, pool).sizes) == {(40, 40)}
    files[-1].write_bytes(b"broken")
    with refused(DatasetNotFoundError, "no-readable-image"):
        scan_dataset(load_dataset("folder", images), home, pool)


def test_a_link_that_leads_out_since_loading_is_refused(dataset: ImageDataset, images: Path, pool: Executor) -> None:
    path = images / dataset.table["path"].tolist()[-1]
    outside = images.parent / "outside.png"
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(DatasetError, match="leaves the dataset's root"):
        scan_images(dataset, images, None, pool)


def test_a_missing_decoder_ends_the_scan(images: Path, pool: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(
        images / "benign" / "0.png", 1, size=300
    )  # no other size matters: the one DICOM file is looked at all the same
    (images / "benign" / "x.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 50)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DatasetError) as caught:
        scan_images(load_dataset("folder", images), images, None, pool)
    assert caught.value.fix == 'pip install "embcache[dicom]"'


def exchange(one: Path, other: Path) -> None:
    """Each file's bytes under the other's name, as files of their own, with the first one's modification time."""
    time, pixels = one.stat().st_mtime_ns, (one.read_bytes(), other.read_bytes())
    for path, content in ((one, pixels[1]), (other, pixels[0])):
        path.unlink()
        path.write_bytes(content)
        os.utime(path, ns=(time, time))


def rewrite(one: Path, other: Path) -> None:
    """The second file's bytes in the first one, in place, its time restored (``touch -r``, ``rsync --inplace``)."""
    time = one.stat().st_mtime_ns
    with one.open("r+b") as file:
        file.write(other.read_bytes())
    os.utime(one, ns=(time, time))


def rename(one: Path, other: Path) -> None:
    """The files change their names: inodes, bytes and times go with them."""
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@pytest.fixture
def alike(tmp_path: Path) -> Path:
    """Twelve bitmaps of one size and one modification time, an hour old."""
    root = tmp_path / "alike"
    for index in range(12):
        draw(root / "ab"[index % 2] / f"{index:02}.bmp", index)
    for path in root.rglob("*.bmp"):
        os.utime(path, (1.6e9, 1.6e9))
    return root


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were written just now count as old: what is known of them is believed."""
    monkeypatch.setattr(scanning, "TICK_NS", -10 * 10**9)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the files that are hashed to learn whether they changed."""
    paths: list[str] = []
    digests = scanning._digests

    def counted(root: Path, decoding: Any, images: Any) -> list[str]:
        paths.extend(path for path, _ in images)
        return digests(root, decoding, images)

    monkeypatch.setattr(scanning, "_digests", counted)
    return paths


def first_bytes(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def extracted(root: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Extraction:
    monkeypatch.setattr(run, "load_backbone", load_tiny)
    (done,) = run_extraction(["random"], load_dataset("folder", root), home=home)
    held = done.store.digests
    assert held == {name: first_bytes(root / name) for name in held}  # each row is of the bytes that are there
    assert len(held) == 12
    return done


@pytest.mark.skipif(os.name == "nt", reason="Windows has no time of change")
@pytest.mark.parametrize(("change", "old"), [(exchange, True), (rewrite, True), (rename, True), (exchange, False)])
def test_a_change_that_size_and_time_do_not_tell_is_found(
    change: Callable[[Path, Path], None], old: bool, alike: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old:
        monkeypatch.setattr(scanning, "TICK_NS", -10 * 10**9)
    assert extracted(alike, home, monkeypatch).computed == 12
    change(alike / "a" / "00.bmp", alike / "a" / "02.bmp")
    again = extracted(alike, home, monkeypatch)
    assert (again.computed, again.changed) == ((1, 1) if change is rewrite else (2, 2))
    assert extracted(alike, home, monkeypatch).computed == 0


@pytest.mark.usefixtures("settled")
def test_a_dataset_that_was_moved_is_hashed_once(
    alike: Path, home: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = extracted(alike, home, monkeypatch).store.path
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    assert extracted(alike, home, monkeypatch).computed == 0
    assert hashed == []  # it was read when it was computed
    shutil.copytree(alike, alike.with_name("copy"))
    alike.rename(alike.with_name("old"))
    alike.with_name("copy").rename(alike)
    for _ in range(2):
        assert extracted(alike, home, monkeypatch).computed == 0
        assert len(hashed) == 12
    assert before == {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    (home / store.parent.name / "scan.parquet").unlink()
    for _ in range(2):
        assert extracted(alike, home, monkeypatch).computed == 0
        assert len(hashed) == 24


@pytest.mark.usefixtures("settled")
def test_what_two_processes_learn_is_kept_of_both(alike: Path, home: Path, pool: Executor) -> None:
    dataset = load_dataset("folder", alike)
    mine, theirs = (scan_dataset(dataset, home, pool) for _ in range(2))
    for files, image in ((mine, dataset.table["path"][0]), (theirs, dataset.table["path"][1])):
        with files.learning():
            files.scan.confirm([files.scan.rows[image, ""]])
    kept = scan_dataset(dataset, home, pool).scan
    known = {path: kept.digests[row].tobytes().hex() for (path, _), row in kept.rows.items() if kept.digests[row].any()}
    assert known == {path: first_bytes(alike / path) for path in dataset.table["path"][:2]}


@pytest.mark.usefixtures("settled")
def test_each_store_finds_out_that_an_unreadable_image_was_exchanged(
    alike: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = alike / "a" / "00.bmp"
    good = path.read_bytes()
    path.write_bytes(b"BM" + b"\0" * (len(good) - 2))
    os.utime(path, (1.6e9, 1.6e9))
    monkeypatch.setattr(run, "load_backbone", load_tiny)
    dataset = load_dataset("folder", alike)
    views = (1, 2)  # a store each
    for number in views:
        (done,) = run_extraction(["random"], dataset, home=home, views=number)
        assert done.store.sources()["a/00.bmp"].digest == first_bytes(path)
        assert "a/00.bmp" not in done.store.digests  # groups are merged by these
    path.write_bytes(good)
    os.utime(path, (1.6e9, 1.6e9))
    for number in views:
        (done,) = run_extraction(["random"], dataset, home=home, views=number)
        assert (done.computed, done.quarantined) == (1, {})
