"""What a scan of the images may be spared, and what not."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from embcache.data.dataset import ImageDataset, load_dataset
from embcache.errors import DatasetError
from embcache.extract import scan as scanning
from embcache.extract.scan import decode_scan, encode_scan, image_sizes, scan_images


@pytest.fixture
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def dataset(images: Path) -> ImageDataset:
    return load_dataset("folder", images)


def kept(scan: pd.DataFrame, folder: Path) -> pd.DataFrame | None:
    (folder / "scan.parquet").write_bytes(encode_scan(scan))
    return decode_scan(folder / "scan.parquet")


def test_headers_are_read_once(
    dataset: ImageDataset, images: Path, tmp_path: Path, pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = scan_images(dataset, images, None, pool)
    read: list[str] = []
    monkeypatch.setattr(scanning, "read_size", lambda root, path, member: read.append(path) or (40, 40))
    again = scan_images(dataset, images, kept(first, tmp_path), pool)
    assert again.equals(first)
    assert read == []


def test_an_image_that_could_not_be_read_is_looked_at_again(
    dataset: ImageDataset, images: Path, tmp_path: Path, pool: Executor
) -> None:
    path = images / dataset.table["path"][0]
    good, state = path.read_bytes(), path.stat()
    path.write_bytes(b"\0" * len(good))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    first = scan_images(dataset, images, None, pool)
    assert first["width"].tolist() == [0] + [40] * 19
    path.write_bytes(good)  # as when a decoder was installed: neither size nor time of the file tell
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    again = scan_images(dataset, images, kept(first, tmp_path), pool)
    assert again["width"].tolist() == [40] * 20
    assert image_sizes(again) == {(40, 40)}


def test_a_scan_of_another_decoder_is_not_used(
    dataset: ImageDataset, images: Path, tmp_path: Path, pool: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = scan_images(dataset, images, None, pool)
    found = kept(scan, tmp_path)
    assert found is not None
    assert found.equals(scan)
    monkeypatch.setattr(scanning, "DECODER_VERSION", "pillow-2")
    assert decode_scan(tmp_path / "scan.parquet") is None
    scan.to_parquet(tmp_path / "scan.parquet")  # without a version
    assert decode_scan(tmp_path / "scan.parquet") is None


def test_a_missing_decoder_ends_the_scan(images: Path, pool: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    (images / "benign" / "x.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 50)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(DatasetError) as caught:
        scan_images(load_dataset("folder", images), images, None, pool)
    assert caught.value.fix == 'pip install "embcache[dicom]"'
